"""Backend "triton" in Triton's interpreter, against float64: `make test` sets TRITON_INTERPRET=1.

A program of a kernel takes the interpreter some ten milliseconds, so the cases are small.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings

import colonnade
from colonnade import FixedPattern, StridedPattern, attention, explain
from colonnade.backends.call import Kept
from colonnade.backends.choice import run
from colonnade.ops.check import make_call
from tests import fuzz
from tests.cases import (
    Case,
    Inputs,
    attend,
    attend_by_products,
    both,
    cases,
    fixed_patterns,
    output,
    set_of,
)
from tests.layouts import LAYOUTS, expanded, laid_out
from tests.packing import attend_packed, cu_seqlens_of, documents, packed_case
from tests.rounding import check

why_not = colonnade.backends()["triton"]
pytestmark = [
    pytest.mark.interpreted,
    pytest.mark.skipif(
        why_not is not None or torch.cuda.is_available(),
        reason=f"triton {why_not or 'is not interpreted'}; TRITON_INTERPRET=1 has it interpreted",
    ),
]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
each_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)

LARGE = [
    # Whole tiles of slots and some left over; rows longer than a tile; a stride beyond the
    # sequence; fewer queries, mid-block; unlike widths; short last blocks.
    Case(FixedPattern(32, 16), 1, 1, 2, 150, 150, 64, 64, 0.125),
    Case(FixedPattern(100, 30, subblocks=2), 1, 2, 1, 140, 250, 33, 17, -0.3),
    Case(FixedPattern(500, 7), 2, 1, 1, 70, 70, 16, 8, 0.3),
    Case(FixedPattern(20, 9, part="summary", subblocks=2), 1, 2, 1, 75, 75, 16, 40, 0.3),
    Case(FixedPattern(70, 9, part="local"), 1, 1, 3, 90, 160, 100, 16, 0.3),
    Case(FixedPattern(24, 9, subblocks=2, causal=False), 1, 2, 1, 40, 90, 16, 16, 0.3),
    Case(FixedPattern(24, 9, part="summary", causal=False), 1, 1, 1, 40, 60, 16, 130, 0.3),
]


def _check(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    expected = attend(case, inputs.double(), "reference")
    check(case, inputs, attend(case, inputs, "triton"), expected, dtype != torch.float32)


@pytest.mark.parametrize("case", LARGE, ids=lambda case: str(case.pattern))
def test_values_and_gradients_against_float64(case: Case) -> None:
    _check(case, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("case", LARGE[::3], ids=lambda case: str(case.pattern))
def test_half_precision_against_float64(case: Case, dtype: torch.dtype) -> None:
    _check(case, dtype)


@settings(max_examples=6)
@given(case=cases(14, fixed_patterns(max_stride=14), batches=(1, 1, 2), min_len=0))
def test_drawn_calls_against_the_definition(case: Case) -> None:
    inputs = case.inputs(torch.float32)
    found = attend(case, inputs, "triton")
    if case.q_len * case.batch:
        check(case, inputs, found, attend_by_products(case, inputs))


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # NumPy, of NaN.
def test_a_few_calls_of_the_fuzzing(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--backend", "triton", "--calls", "8", "--seed", "7"]
    assert fuzz.main(arguments) == 0, capsys.readouterr().out


@each_type
def test_large_scores_stay_finite(dtype: torch.dtype) -> None:
    case = Case(FixedPattern(8, 2), 1, 1, 1, 20, 20, 16, 16, 30.0)
    inputs = case.inputs(dtype)
    expected = attend(case, inputs.double(), "reference")
    check(case, inputs, attend(case, inputs, "triton"), expected, dtype != torch.float32)


@pytest.mark.parametrize("part", ["merged", "local", "summary"])
def test_packed_documents(part: Any) -> None:
    """Some of them are empty. Nothing crosses a boundary, not even NaN."""
    lengths = (0, 9, 1, 0, 23, 8)
    case = packed_case(Case(FixedPattern(8, 3, part=part), 1, 2, 1, 9, 9, 8, 8, 0.4), lengths)
    inputs = case.inputs(torch.float32)
    found = attend_packed(case, inputs, cu_seqlens_of(lengths), "triton")
    for place, alone in documents(case, lengths):
        own = inputs.part(place)
        check(alone, own, found.part(place), attend_by_products(alone, own))
    inputs.value[:, :, 9:10] = math.nan
    again = attend_packed(case, inputs, cu_seqlens_of(lengths), "triton")
    assert torch.equal(again.out[:, :, :9], found.out[:, :, :9])
    assert torch.equal(again.out[:, :, 10:], found.out[:, :, 10:])
    assert again.out[:, :, 9].isnan().all() or part == "summary"


@pytest.mark.parametrize(
    ("part", "sinks"), [("merged", 0), ("summary", 0), ("merged", 1), ("summary", 1), ("local", 1)]
)
@pytest.mark.parametrize("q_len", [0, 2, 9])
def test_blocks_of_which_only_the_slots_are_kept(part: Any, sinks: int, q_len: int) -> None:
    """Chunks behind a cache; each key head has the summaries of its own sub-block."""
    pattern, begin = FixedPattern(5, 2, subblocks=2, part=part, sinks=sinks), 10
    case = Case(pattern, 1, 2, 2, q_len, 19, 8, 8, 0.4)
    query, key, value, *_ = case.inputs(torch.float32)
    expected = both(query.double(), key.double(), value.double(), pattern, "reference", 0.4)
    kept = torch.tensor(
        [
            sorted(set_of(pattern, begin, 19, head) - {begin}) + list(range(begin, 19))
            for head in (0, 1)
        ]
    )
    k, v = (torch.stack([t[:, head, kept[head]] for head in (0, 1)], 1) for t in (key, value))
    found = run(query, k, v, make_call(query, pattern, 0.4, keys=Kept(begin)), "triton")
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=0, atol=2e-6)


def test_any_memory_layout() -> None:
    """To the bit; and the bits are the same in every run."""
    case = Case(FixedPattern(8, 2), 2, 1, 2, 10, 12, 8, 8, 0.4)
    inputs = case.inputs(torch.float32)
    expected = attend(case, inputs, "triton")
    for layout in LAYOUTS:
        found = attend(case, laid_out(inputs, layout), "triton")
        same = [torch.equal(a, b) for a, b in zip(found, expected, strict=True)]
        assert all(same), layout


def test_a_negation_that_was_put_off() -> None:
    case = Case(FixedPattern(4, 1), 1, 1, 1, 9, 9, 8, 8, 0.4)
    inputs = case.inputs(torch.float32)
    expected = attend(case, inputs, "triton")
    conjugate = [torch.complex(t, -t).conj() for t in inputs]
    found = attend(case, Inputs(*[t.imag for t in conjugate]), "triton")
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("stride", [2**31 - 1, 2**40])
@pytest.mark.parametrize("part", ["merged", "local", "summary"])
@pytest.mark.parametrize("causal", [True, False])
def test_a_stride_beyond_every_sequence(stride: int, part: Any, causal: bool) -> None:
    case = Case(FixedPattern(stride, 2, part=part, causal=causal), 1, 1, 1, 5, 9, 8, 8, 0.4)
    inputs = case.inputs(torch.float32)
    expected = attend(case, inputs.double(), "reference")
    for one, other in zip(attend(case, inputs, "triton"), expected, strict=True):
        torch.testing.assert_close(one, other.float(), rtol=0, atol=2e-6)


def test_strides_of_zero() -> None:
    case = Case(FixedPattern(8, 2), 2, 2, 1, 10, 12, 8, 8, 0.4)
    inputs = expanded(case.inputs(torch.float32))
    check(case, inputs, attend(case, inputs, "triton"), attend_by_products(case, inputs))


def test_offsets_beyond_two_to_the_31() -> None:
    """The second head lies 3 · 2³⁰ entries behind the first; nothing else of the memory is used."""
    gap = 3 * 2**30
    case = Case(FixedPattern(8, 2), 1, 2, 1, 12, 12, 8, 8, 0.4)
    query, key, value, *_ = case.inputs(torch.float16)
    far = torch.empty(gap + 12 * 8, dtype=torch.float16).as_strided(key.shape, (0, gap, 8, 1))
    far.copy_(key)
    found = output(query, far, value, case.pattern, "triton")
    assert torch.equal(found, output(query, key, value, case.pattern, "triton"))


def test_rows_that_read_nothing() -> None:
    """Output 0, log-sum-exp -inf and gradients of 0, whatever gradient arrives."""
    case = Case(FixedPattern(20, 3, part="summary"), 1, 1, 1, 30, 30, 8, 8, 0.4)
    inputs = case.inputs(torch.float32)
    found = attend(case, inputs, "triton")
    assert (found.out[:, :, :17] == 0).all()
    assert (found.lse[:, :, :17] == -math.inf).all()
    assert (found.grad_query[:, :, :17] == 0).all()
    assert all(grad.isfinite().all() for grad in found[2:])


def test_shares_of_the_queries_are_added_up() -> None:
    """With more than one share of 512 queries behind each slot; blocks are long to be few."""
    case = Case(FixedPattern(300, 16), 1, 1, 1, 1_400, 1_400, 16, 16, 0.25)
    _check(case, torch.float16)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": torch.float64}, "computes in"),
        ({"pattern": StridedPattern(4)}, "runs FixedPattern only"),
        ({"width": 257}, "takes widths from 1 to 256, got qk_dim=257"),
        ({"device": "meta"}, "runs on cpu only here, got query.device=meta"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_it_declines_it_names(change: dict[str, Any], reason: str) -> None:
    options = {"dtype": torch.float32, "width": 8, "device": "cpu", **change}
    x = torch.zeros(1, 1, 6, options["width"], dtype=options["dtype"], device=options["device"])
    pattern = options.get("pattern", FixedPattern(4, 1))
    assert reason in explain(x, x, x, pattern).others["triton"]
    with pytest.raises(NotImplementedError, match=f"backend 'triton' {reason}"):
        attention(x, x, x, pattern, backend="triton")


def test_it_runs_if_it_is_asked_for_by_name_alone() -> None:
    x = torch.zeros(1, 1, 6, 8)
    assert "by name alone" in explain(x, x, x, FixedPattern(4, 1)).others["triton"]
    assert explain(x, x, x, FixedPattern(4, 1), backend="triton").backend == "triton"


def test_sizes_of_zero() -> None:
    for batch, q_len, kv_len in ((1, 0, 6), (0, 6, 6), (1, 0, 0)):
        case = Case(FixedPattern(4, 1), batch, 1, 2, q_len, kv_len, 8, 8, 0.4)
        inputs = case.inputs(torch.float32)
        found = attend(case, inputs, "triton")
        assert found.out.shape == (case.batch, 2, case.q_len, 8)
        assert all((grad == 0).all() for grad in found[2:])
