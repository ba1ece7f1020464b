"""Choosing a backend, and eager's operation as a compiler sees it."""

from __future__ import annotations

import pickle
from dataclasses import astuple
from typing import Any

import pytest
import torch
from torch import Tensor

from colonnade import (
    FixedPattern,
    FullPattern,
    LocalPattern,
    Pattern,
    StridedPattern,
    attention,
    attention_varlen,
    backends,
    explain,
)
from colonnade.backends.dropout import Dropout
from colonnade.pattern import Part
from tests import oracle
from tests.cases import (
    EXAMPLES,
    PARTS,
    Case,
    Inputs,
    backpropagate,
    both,
    each_pattern,
    output,
)


def _attend(case: Case, pattern: Pattern | _Drawn, backend: str) -> Tensor:
    query, key, value = case.inputs()[:3]
    out = attention(query, key, value, pattern, backend=backend)
    assert isinstance(out, Tensor)
    return out


def test_backends_names_the_usable_ones() -> None:
    known = backends()
    assert known["eager"] is None
    assert known["reference"] is None
    assert "auto" not in known


@each_pattern
def test_auto_takes_eager_for_every_pattern_in_float64(pattern: Pattern) -> None:
    case = Case(pattern)
    query, key, value = case.inputs()[:3]
    explanation = explain(query, key, value, pattern)
    assert explanation.backend == "eager"
    assert set(explanation.others) == set(backends()) - {"eager"}
    assert str(explanation).splitlines() == [
        "eager runs.",
        f"native does not run: {explanation.others['native']}.",
        f"triton does not run: {explanation.others['triton']}.",
        "reference does not run: eager comes first and takes these inputs.",
    ]
    assert torch.equal(_attend(case, pattern, "auto"), _attend(case, pattern, "eager"))


@pytest.mark.skipif(backends()["native"] is not None, reason="needs native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@each_pattern
def test_auto_takes_native_where_it_runs(pattern: Pattern, dtype: torch.dtype) -> None:
    """For causal fixed patterns, in the two types that it computes in; with dropout too."""
    inputs = Case(pattern).inputs(dtype)[:3]
    suits = isinstance(pattern, FixedPattern) and pattern.causal
    name = "native" if suits else "eager"
    for dropout_p in (0.0, 0.1):
        assert explain(*inputs, pattern, dropout_p=dropout_p).backend == name
    assert torch.equal(*(output(*inputs, pattern, backend) for backend in ("auto", name)))


class _Drawn:
    """Connectivity without a rule: each head its own pairs, some rows empty."""

    def mask(self, seq_len: int, num_heads: int) -> Tensor:
        generator = torch.Generator().manual_seed(seq_len)
        mask = torch.rand(num_heads, seq_len, seq_len, generator=generator) < 0.3
        mask[:, -2] = False
        return mask


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_any_object_with_a_mask(backend: str) -> None:
    """Attention over an arbitrary S, as the paper writes it: also one that is not causal."""
    inputs = Case(q_len=9).inputs()
    query, key, value = inputs[:3]
    pattern = _Drawn()
    pair = attention(query, key, value, pattern, scale=0.7, return_lse=True, backend=backend)
    mask = pattern.mask(13, 2)[:, 4:]
    for found, expected in zip(
        pair, oracle.loop_attention(query, key, value, mask, 0.7), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_auto_takes_reference_for_what_eager_declines() -> None:
    """And eager, asked for by name, raises: nothing falls back silently."""
    case = Case()
    query, key, value = case.inputs()[:3]
    explanation = explain(query, key, value, _Drawn())
    assert explanation.backend == "reference"
    assert list(explanation.others) == ["native", "triton", "eager"]
    why = explanation.others["eager"]
    assert "_Drawn" in why
    for kind in {type(pattern) for pattern in EXAMPLES.values()}:
        assert kind.__name__ in why
    assert str(explanation).splitlines() == [
        "reference runs.",
        f"native does not run: {explanation.others['native']}.",
        f"triton does not run: {explanation.others['triton']}.",
        f"eager does not run: {why}.",
    ]
    assert torch.equal(_attend(case, _Drawn(), "auto"), _attend(case, _Drawn(), "reference"))
    with pytest.raises(NotImplementedError, match=r"backend 'eager'.*_Drawn.*'reference'"):
        _attend(case, _Drawn(), "eager")


@pytest.mark.plain
@each_pattern
@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
def test_meta_tensors_give_shapes(backend: str, pattern: Pattern) -> None:
    """To learn a model's shapes without memory, as transformers and accelerate do."""
    query, key, value = (torch.empty(2, heads, 13, 4, device="meta") for heads in (4, 2, 2))
    out, lse = both(query, key, value, pattern, backend)
    alone = output(query, key, value, pattern, backend)
    assert out.shape == alone.shape == (2, 4, 13, 4)
    assert lse.shape == (2, 4, 13)
    assert out.device.type == "meta"


@pytest.mark.plain
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("part", ["merged", "summary"])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Of opcheck, with torch 2.15.
def test_the_operation_keeps_the_compilers_rules(part: Part, causal: bool) -> None:
    """Schema, fake implementation and autograd registration, forward and backward."""
    pattern = FixedPattern(4, 1, part=part, causal=causal)
    case = Case(pattern, q_len=11)
    inputs = case.inputs(torch.float32)
    for dropout in (Dropout(), Dropout(0.5, torch.tensor([7]), 1, 2, 3)):
        last = (*astuple(pattern), 0, None, 0.7, *dropout)
        _check_operation(torch.ops.colonnade.eager_forward, inputs, last)


@pytest.mark.plain
@pytest.mark.parametrize("reads", ["window", *PARTS])
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Of opcheck, with torch 2.15.
def test_windows_keep_the_compilers_rules(reads: str) -> None:
    inputs = Case(q_len=11).inputs(torch.float32)
    for dropout in (Dropout(), Dropout(0.5, torch.tensor([7]), 1, 2, 3)):
        last = (4, reads, 2 * (reads == "window"), 0.7, 0, None, *dropout)
        _check_operation(torch.ops.colonnade.windowed_forward, inputs, last)


def _check_operation(forward: Any, inputs: Inputs, last: tuple[Any, ...]) -> None:
    """Run PyTorch's own checks of an operation and of the one that is its backward."""
    query, key, value = inputs.leaves()
    torch.library.opcheck(forward.default, (query, key, value, *last))
    _, lse = forward(*inputs[:3], *last)
    backward = getattr(torch.ops.colonnade, forward.__name__.replace("forward", "backward"))
    torch.library.opcheck(
        backward.default,
        (inputs.grad_out, inputs.grad_lse, *inputs[:3], lse, *last),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.plain
@pytest.mark.parametrize(
    "compiler",
    [
        "aot_eager",
        pytest.param("inductor", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "pattern",
    [
        FixedPattern(4, 1, subblocks=2),
        FixedPattern(4, 1, subblocks=2, causal=False),
        StridedPattern(4),
        StridedPattern(4, part="summary"),
        LocalPattern(4),
        FullPattern(),
    ],
    ids=str,
)
def test_compiled_equals_uncompiled(compiler: str, pattern: Pattern) -> None:
    """One graph, no break, the same bits, forward and backward: operations are opaque to it."""
    case = Case(pattern, q_len=11, scale=0.5)
    inputs = case.inputs(torch.float32)

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return both(query, key, value, pattern, "eager", case.scale)

    torch.compiler.reset()
    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend=compiler)):
        leaves = inputs.leaves()
        results.append(backpropagate(function(*leaves), leaves, inputs))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.plain
@pytest.mark.parametrize("causal", [True, False])
def test_compiled_full_attention_without_the_lse(causal: bool) -> None:
    """PyTorch's own kernel, chosen while compiling."""
    case = Case(FullPattern(causal), v_dim=4)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return output(query, key, value, case.pattern, "eager")

    query, key, value = case.inputs(torch.float32)[:3]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(query, key, value), run(query, key, value))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"dropout_p": 0.1},
        {"scale": 0.0, "return_lse": True},
        {"backend": "reference", "dropout_p": 0.5},
        {"cu_seqlens": torch.tensor([0, 5, 13])},
        {"cu_seqlens": torch.tensor([0, 5, 13]), "dropout_p": 0.1, "backend": "eager"},
    ],
    ids=str,
)
@each_pattern
def test_an_explanation_names_what_the_same_call_runs(
    pattern: Pattern, options: dict[str, Any], backends_that_ran: list[str]
) -> None:
    tensors: Any = Case(pattern).inputs(torch.float32)[:3]
    call: Any = attention
    if "cu_seqlens" in options:
        tensors, call = tuple(t[0].transpose(0, 1) for t in tensors), attention_varlen
    query, key, value = tensors
    found = explain(query, key, value, pattern, **options)
    assert backends_that_ran == []
    call(query, key, value, pattern=pattern, **options)
    assert backends_that_ran[0] == found.backend


def test_an_explanation_is_a_value() -> None:
    query, key, value = Case().inputs()[:3]
    explanation = explain(query, key, value, FixedPattern(4, 1))
    assert pickle.loads(pickle.dumps(explanation)) == explanation
