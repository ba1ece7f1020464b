"""Choosing a backend, and eager's operation as a compiler sees it."""

from __future__ import annotations

import pickle

import pytest
import torch
from torch import Tensor

from colonnade import FixedPattern, FullPattern, Pattern, attention, backends, explain
from colonnade.pattern import Part
from colonnade.plan import fixed_plan
from tests import oracle
from tests.cases import Case, backpropagate, both


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


def test_auto_takes_eager_for_a_fixed_pattern() -> None:
    case = Case()
    query, key, value = case.inputs()[:3]
    explanation = explain(query, key, value, case.pattern)
    assert explanation.backend == "eager"
    assert set(explanation.others) == set(backends()) - {"eager"}
    assert str(explanation).splitlines() == [
        "eager runs.",
        "reference does not run: eager comes first and takes these inputs.",
    ]
    assert torch.equal(_attend(case, case.pattern, "auto"), _attend(case, case.pattern, "eager"))


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        (FullPattern(), "FullPattern"),
        (FullPattern(causal=False), "FullPattern"),
        (FixedPattern(4, 1, causal=False), "causal=False"),
    ],
)
def test_auto_takes_reference_for_what_eager_declines(pattern: Pattern, why: str) -> None:
    """And eager, asked for by name, raises: nothing falls back silently."""
    case = Case()
    query, key, value = case.inputs()[:3]
    explanation = explain(query, key, value, pattern)
    assert explanation.backend == "reference"
    assert why in explanation.others["eager"]
    assert why in str(explanation)
    assert torch.equal(_attend(case, pattern, "auto"), _attend(case, pattern, "reference"))
    with pytest.raises(NotImplementedError, match=f"backend 'eager'.*{why}.*'reference'"):
        _attend(case, pattern, "eager")


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


def test_eager_refuses_an_object_that_is_no_fixed_pattern() -> None:
    with pytest.raises(NotImplementedError, match=r"eager.*_Drawn"):
        _attend(Case(), _Drawn(), "eager")


@pytest.mark.plain
@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
def test_meta_tensors_give_shapes(backend: str) -> None:
    """To learn a model's shapes without memory, as transformers and accelerate do."""
    query, key, value = (torch.empty(2, heads, 13, 4, device="meta") for heads in (4, 2, 2))
    out, lse = both(query, key, value, FixedPattern(4, 1), backend)
    assert out.shape == (2, 4, 13, 4)
    assert lse.shape == (2, 4, 13)
    assert out.device.type == "meta"


@pytest.mark.plain
@pytest.mark.parametrize("part", ["merged", "summary"])
def test_the_operation_keeps_the_compilers_rules(part: Part) -> None:
    """Schema, fake implementation and autograd registration, forward and backward."""
    case = Case(FixedPattern(4, 1, part=part), q_len=11)
    inputs = case.inputs(torch.float32)
    query, key, value = (t.requires_grad_() for t in inputs[:3])
    plan = fixed_plan(case.pattern, case.q_len, case.kv_len, case.kv_heads)
    last = (plan.gather, plan.table, plan.shift, plan.own_from_slots, 0.7)
    torch.library.opcheck(torch.ops.colonnade.eager_forward.default, (query, key, value, *last))
    _, lse = torch.ops.colonnade.eager_forward(query, key, value, *last)
    backward = (inputs.grad_out, inputs.grad_lse, *inputs[:3], lse)
    torch.library.opcheck(
        torch.ops.colonnade.eager_backward.default,
        (*(t.detach() for t in backward), *last),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.plain
@pytest.mark.parametrize(
    "compiler",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                # PyTorch's own: inductor imports a module that uses torch.jit.
                pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
            ],
        ),
    ],
)
def test_compiled_equals_uncompiled(compiler: str) -> None:
    """One graph, no break, the same bits, forward and backward: the operation is opaque to it."""
    case = Case(FixedPattern(4, 1, subblocks=2), q_len=11)
    inputs = case.inputs(torch.float32)

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return both(query, key, value, case.pattern, "eager")

    results = []
    for function in (run, torch.compile(run, fullgraph=True, backend=compiler)):
        leaves = inputs.leaves()
        results.append(backpropagate(function(*leaves), leaves, inputs))
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)


def test_an_explanation_is_a_value() -> None:
    query, key, value = Case().inputs()[:3]
    explanation = explain(query, key, value, FixedPattern(4, 1))
    assert pickle.loads(pickle.dumps(explanation)) == explanation
