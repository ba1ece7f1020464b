"""Backend "native": the C++ against float64, and what must hold of it to the bit."""

from __future__ import annotations

import math
from dataclasses import astuple, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

import colonnade
from colonnade import FixedPattern, attention
from colonnade.backends.dropout import Dropout
from tests.cases import (
    PARTS,
    Case,
    attend,
    attend_by_products,
    backpropagate,
    both,
    cases,
    fixed_patterns,
    output,
)
from tests.layouts import LAYOUTS, laid_out
from tests.packing import check_documents
from tests.rounding import check

why_not = colonnade.backends()["native"]
pytestmark = pytest.mark.skipif(why_not is not None, reason=f"native {why_not}")

LARGE = [
    # More than a granule of slots, with and without some left over; blocks longer than a piece of
    # queries, or than a tile of keys; a stride beyond the sequence; short last blocks.
    Case(FixedPattern(8, 2), 2, 1, 3, 700, 700, 16, 16, 0.3),
    Case(FixedPattern(7, 3, subblocks=2), 1, 4, 1, 600, 613, 24, 40, -0.3),
    Case(FixedPattern(128, 8), 1, 2, 2, 1_100, 1_100, 64, 64, 0.125),
    Case(FixedPattern(128, 8, subblocks=3), 1, 3, 1, 333, 1_100, 64, 32, 0.125),
    Case(FixedPattern(100, 30), 2, 1, 2, 555, 555, 33, 17, 0.2),
    Case(FixedPattern(600, 5), 1, 2, 1, 1_300, 1_300, 8, 8, 0.4),
    Case(FixedPattern(5_000, 7), 1, 1, 2, 700, 700, 16, 8, 0.3),
    Case(FixedPattern(1, 1), 1, 2, 1, 300, 300, 8, 8, 0.3),
    Case(FixedPattern(300, 200, part="summary"), 1, 2, 2, 900, 900, 16, 16, 0.3),
    Case(FixedPattern(12, 3, subblocks=4, part="summary"), 2, 5, 1, 400, 401, 16, 16, 0.3),
    Case(FixedPattern(90, 9, part="local"), 1, 2, 9, 400, 400, 16, 16, 0.3),
]


@settings(max_examples=200)
@given(case=cases(pattern=fixed_patterns(causal=True)))
def test_short_sequences_against_the_definition(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    check(case, inputs, attend(case, inputs, "native"), attend_by_products(case, inputs))


@pytest.mark.parametrize("case", LARGE, ids=lambda case: str(case.pattern))
def test_long_sequences_against_float64(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    expected = attend(case, inputs.double(), "reference")
    check(case, inputs, attend(case, inputs, "native"), expected)


def _distance(found: Tensor, expected: Tensor) -> float:
    """Return the distance of all entries together, relative to what is expected."""
    finite = expected.isfinite()
    assert torch.equal(found.isfinite(), finite)
    error = (found.double() - expected)[finite].square().mean().sqrt()
    return float(error / expected[finite].square().mean().sqrt())


@pytest.mark.parametrize("n", [200, 1_000, 3_000])
def test_single_precision_is_good_to_two_in_a_million(n: int) -> None:
    """Normal numbers at the usual scale: output and every gradient."""
    case = Case(FixedPattern(128, 8), 1, 2, 2, n, n, 64, 64, 0.125)
    inputs = case.inputs(torch.float32)
    expected = attend(case, inputs.double(), "eager")
    for found, true in zip(attend(case, inputs, "native"), expected, strict=True):
        assert _distance(found, true) < 2e-6


@pytest.mark.parametrize("case", LARGE, ids=lambda case: str(case.pattern))
def test_bfloat16_is_as_good_as_pytorchs_own(case: Case) -> None:
    """At most 1.5 times the error of its masked attention in bfloat16, out and gradients.

    Values as wide as keys: for others PyTorch computes everything in float32.

    The exponential has a relative error of 1.2e-4, so the log-sum-exp is off by no more than that,
    next to the rounding of the products in float32.
    """
    case = replace(case, v_dim=case.qk_dim)
    assert isinstance(case.pattern, FixedPattern)
    if case.pattern.part == "summary":
        case = replace(case, q_len=min(case.q_len, 200))  # PyTorch gives NaN for empty rows.
    inputs = case.inputs(torch.bfloat16)
    inputs = inputs._replace(grad_lse=torch.zeros_like(inputs.grad_lse))
    expected = attend(case, inputs.double(), "reference")
    found = attend(case, inputs, "native")
    mask = case.mask()
    leaves = inputs.leaves()
    out = scaled_dot_product_attention(
        leaves[0],
        leaves[1].repeat_interleave(case.group, 1),
        leaves[2].repeat_interleave(case.group, 1),
        attn_mask=mask.repeat_interleave(case.group, 0)[None],
        scale=case.scale,
    )
    theirs = backpropagate((out, expected.lse), leaves, inputs)
    for name in ("out", "grad_query", "grad_key", "grad_value"):
        ours, their, true = (getattr(r, name) for r in (found, theirs, expected))
        assert _distance(ours, true) <= 1.5 * _distance(their, true), name
    assert (found.lse - expected.lse).nan_to_num(0.0).abs().max() < 2e-4


@settings(max_examples=60)
@given(
    pattern=fixed_patterns(causal=True),
    lengths=st.lists(st.integers(0, 30), min_size=1, max_size=5),
)
def test_each_document_equals_the_definition(pattern: FixedPattern, lengths: list[int]) -> None:
    check_documents(Case(pattern), lengths, "native", torch.float32)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("lengths", [[700, 0, 31, 600], [0, 0], [1] * 40 + [500]], ids=len)
def test_documents_of_many_granules(lengths: list[int], part: Any) -> None:
    """Slots of unlike documents share no granule."""
    check_documents(Case(FixedPattern(5, 1, part=part)), lengths, "native", torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@settings(max_examples=150)
@given(
    case=cases(60, fixed_patterns(causal=True)),
    of=st.sampled_from(("query", "key", "value")),
    bad=st.sampled_from((math.nan, math.inf, -math.inf)),
    data=st.data(),
)
def test_bad_numbers_stay_where_the_contract_says(
    dtype: torch.dtype, case: Case, of: str, bad: float, data: st.DataObject
) -> None:
    """A query's in its row; a key's in its block and its readers. Exactly, and NaN is not lost."""
    inputs = case.inputs(dtype)
    tensor = getattr(inputs, of).clone()
    head = data.draw(st.integers(0, tensor.shape[1] - 1), label="head")
    position = data.draw(st.integers(0, tensor.shape[2] - 1), label="position")
    tensor[0, head, position] = bad
    before = both(*inputs[:3], case.pattern, "native", case.scale)
    after = both(*inputs._replace(**{of: tensor})[:3], case.pattern, "native", case.scale)
    touched = torch.zeros(before[1].shape, dtype=torch.bool)
    if of == "query":
        touched[0, head, position] = True
        readers = touched & (before[1] > -math.inf)
    else:
        touched[0, case.queries_of(head)] = case.reach(head, position)
        readers = torch.zeros_like(touched)
        readers[0, case.queries_of(head)] = case.mask()[head, :, position]
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one[~touched], other[~touched])
    if of == "value":
        assert not after[0][readers].isfinite().any()
    elif math.isnan(bad):
        assert after[0][readers].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bad_numbers_do_not_vanish_in_gradients(dtype: torch.dtype) -> None:
    case = Case(FixedPattern(4, 1), batch=1, kv_heads=1, group=1)
    for of in ("query", "key", "value"):
        inputs = case.inputs(dtype)
        getattr(inputs, of)[0, 0, 5] = math.nan
        found = attend(case, inputs, "native")
        assert found.grad_query[0, 0, 5].isnan().all()
        assert found.grad_key[0, 0, 3].isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["±1e4", "one huge key", "equal", "zeros"])
def test_extreme_scores(kind: str, dtype: torch.dtype) -> None:
    """Weights of 0 and 1, or all alike: no overflow, and the same as float64 makes of them."""
    case = Case(FixedPattern(16, 4), 1, 2, 1, 300, 300, 8, 8, 1.0)
    inputs = case.inputs(dtype)
    if kind == "±1e4":
        inputs = inputs._replace(query=inputs.query * 4_000)
    elif kind == "one huge key":
        inputs.key[0, :, 20] *= 1e4
    elif kind == "equal":
        inputs = inputs._replace(key=inputs.key[:, :, :1].expand(-1, -1, 300, -1))
    else:
        inputs = inputs._replace(query=torch.zeros_like(inputs.query))
    expected = attend(case, inputs.double(), "reference")
    found = attend(case, inputs, "native")
    assert all(t.isfinite().all() for t in found)
    if dtype == torch.float32:
        check(case, inputs, found, expected)
    else:
        # Weights and results are rounded to 8 bits.
        torch.testing.assert_close(found.out.double(), expected.out, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"contiguous"}))
def test_any_layout_gives_the_same_bits(layout: str, dtype: torch.dtype) -> None:
    case = Case(FixedPattern(16, 4), 2, 2, 2, 150, 150, 24, 16)
    inputs = case.inputs(dtype)
    laid = laid_out(inputs, layout)
    query, key, value = (t.detach().requires_grad_() for t in laid[:3])
    pair = both(query, key, value, case.pattern, "native", case.scale)
    found = backpropagate(pair, (query, key, value), laid)
    expected = attend(case, inputs, "native")
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_expanded_inputs() -> None:
    """One key and value for all batch rows, and a gradient that is one number."""
    query = torch.randn(3, 2, 40, 8)
    key, value = (torch.randn(1, 1, 40, 8).expand(3, 2, 40, 8) for _ in range(2))
    pattern = FixedPattern(8, 2)
    query.requires_grad_()
    out = output(query, key, value, pattern, "native")
    copied = output(query, key.clone(), value.clone(), pattern, "native")
    assert torch.equal(out, copied)
    grad = torch.autograd.grad(out.sum(), query)[0]
    again = torch.autograd.grad(copied, query, torch.ones_like(copied))[0]
    assert torch.equal(grad, again)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    case = Case(FixedPattern(16, 4, subblocks=2), 1, 2, 2, 1_500, 1_500, 16, 16)
    inputs = case.inputs(dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            results.append(attend(case, inputs, "native"))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.plain
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Of opcheck, with torch 2.15.
def test_the_operations_keep_the_compilers_rules(part: Any) -> None:
    """Schema, fake implementation and autograd registration, forward and backward."""
    case = Case(FixedPattern(4, 1, part=part), q_len=11)
    inputs = case.inputs(torch.float32)
    assert isinstance(case.pattern, FixedPattern)
    forward, backward = torch.ops.colonnade.native_forward, torch.ops.colonnade.native_backward
    for dropout in (Dropout(), Dropout(0.5, torch.tensor([7]), 1, 2, 3)):
        last = (*astuple(case.pattern), 0, None, 0.7, *dropout)
        torch.library.opcheck(forward.default, (*inputs.leaves(), *last))
        results = forward(*inputs[:3], *last)
        torch.library.opcheck(
            backward.default,
            (inputs.grad_out, inputs.grad_lse, *inputs[:3], *results, *last),
            test_utils=("test_schema", "test_faketensor"),
        )


@pytest.mark.plain
def test_compiled_with_dynamic_lengths_equals_uncompiled() -> None:
    """One graph without a break, at most one for the first length and one for all others."""
    pattern = FixedPattern(8, 2, subblocks=2)
    graphs = []

    def count(module: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        graphs.append(module)
        return module.forward

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return both(query, key, value, pattern, "native")

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend=count)
    for n in range(20, 60):
        inputs = Case(pattern, q_len=n - 3, kv_len=n).inputs(torch.float32)
        results = []
        for function in (run, compiled):
            leaves = inputs.leaves()
            results.append(backpropagate(function(*leaves), leaves, inputs))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(graphs) <= 2


def test_recomputation_gives_the_same_bits() -> None:
    case = Case(FixedPattern(8, 2), q_len=50, kv_len=50)
    inputs = case.inputs(torch.float32)
    results = []
    for recompute in (False, True):
        leaves = inputs.leaves()

        def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
            return both(query, key, value, case.pattern, "native")

        pair = checkpoint(run, *leaves, use_reentrant=False) if recompute else run(*leaves)
        results.append(backpropagate(pair, leaves, inputs))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_autocast_rounds_the_inputs_and_nothing_else() -> None:
    case = Case(FixedPattern(8, 2), q_len=50, kv_len=50)
    query, key, value = case.inputs(torch.float32)[:3]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pair = both(query, key, value, case.pattern, "native")
    query, key, value = (t.bfloat16() for t in (query, key, value))
    expected = both(query, key, value, case.pattern, "native")
    assert all(torch.equal(a, b) for a, b in zip(pair, expected, strict=True))


@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, 5, 5), (2, 0, 5), (2, 0, 0), (0, 0, 0)])
@pytest.mark.parametrize("part", PARTS)
def test_empty_inputs_give_empty_results(part: Any, batch: int, q_len: int, kv_len: int) -> None:
    case = Case(FixedPattern(4, 1, part=part), batch=batch, q_len=q_len, kv_len=kv_len)
    found = attend(case, case.inputs(torch.float32), "native")
    assert found.out.shape == (batch, 4, q_len, 3)
    assert found.lse.shape == (batch, 4, q_len)
    assert torch.equal(found.grad_key, torch.zeros(batch, 2, kv_len, 4))
    assert torch.equal(found.grad_value, torch.zeros(batch, 2, kv_len, 3))


@pytest.mark.plain
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pattern": colonnade.StridedPattern(4)}, r"FixedPattern only, got a StridedPattern"),
        ({"pattern": FixedPattern(4, 1, causal=False)}, r"causal patterns only, got causal=False"),
        ({"dtype": torch.float64}, r"got query\.dtype=torch\.float64"),
        ({"dtype": torch.float16}, r"got query\.dtype=torch\.float16"),
        ({"device": "meta"}, r"CPUs only, got query\.device=meta"),
    ],
)
def test_what_it_declines(changes: dict[str, Any], message: str) -> None:
    """Asked for by name it raises, and names a backend that does it."""
    pattern = changes.pop("pattern", FixedPattern(4, 1))
    query, key, value = (torch.zeros(1, 2, 6, 8, **changes) for _ in range(3))
    with pytest.raises(NotImplementedError, match=message + r".*Use backend='eager'"):
        attention(query, key, value, pattern, backend="native")
