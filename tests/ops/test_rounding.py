"""Half and single precision: no error beyond what rounding explains (see tests/rounding.py)."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from colonnade import FullPattern, Pattern
from tests.cases import (
    Case,
    Results,
    attend,
    attend_by_products,
    backpropagate,
    both,
    cases,
    each_pattern,
    output,
    patterns,
)
from tests.rounding import check

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _check_dtypes(results: Results, dtype: torch.dtype) -> None:
    assert results.lse.dtype == torch.promote_types(dtype, torch.float32)
    for name in ("out", "grad_query", "grad_key", "grad_value"):
        assert getattr(results, name).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=75)
@given(case=cases())
def test_short_sequences_against_the_definition(dtype: torch.dtype, case: Case) -> None:
    inputs = case.inputs(dtype)
    expected = attend_by_products(case, inputs)
    for backend in ("eager", "reference"):
        found = attend(case, inputs, backend)
        _check_dtypes(found, dtype)
        check(case, inputs, found, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=50)
@given(case=cases(120, patterns(24)))
def test_longer_sequences_against_float64(dtype: torch.dtype, case: Case) -> None:
    """Here rows read up to a hundred keys: a weight rounded to half precision would show."""
    inputs = case.inputs(dtype)
    expected = attend(case, inputs.double(), "reference")
    check(case, inputs, attend(case, inputs, "eager"), expected)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_full_attention_without_the_lse_against_float64(dtype: torch.dtype, causal: bool) -> None:
    """PyTorch's own kernel, over more than one of its tiles of 512 keys."""
    case = Case(FullPattern(causal), 1, q_len=600, kv_len=600, qk_dim=8, v_dim=8, scale=0.5)
    inputs = case.inputs(dtype)
    inputs = inputs._replace(grad_lse=torch.zeros_like(inputs.grad_lse))
    expected = attend_by_products(case, inputs)
    leaves = inputs.leaves()
    out = output(*leaves, case.pattern, "eager", case.scale)
    found = backpropagate((out, expected.lse.to(dtype)), leaves, inputs)
    check(case, inputs, found, expected._replace(lse=found.lse.double()))


@each_pattern
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_scores_neither_overflow_nor_lose_the_maximum(
    dtype: torch.dtype, pattern: Pattern
) -> None:
    """Scores in the hundreds: exp overflows float32 beyond 88 unless the peak is taken off."""
    case = Case(pattern, scale=60.0)
    inputs = case.inputs(dtype)
    expected = attend_by_products(case, inputs)
    assert expected.lse.max() > 100
    found = attend(case, inputs, "eager")
    assert all(t.isfinite().all() for t in (found.out, *found[2:]))
    assert torch.equal(found.lse.isfinite(), expected.lse.isfinite())
    check(case, inputs, found, expected)


@each_pattern
@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_rounds_the_inputs_and_nothing_else(
    dtype: torch.dtype, backend: str, pattern: Pattern
) -> None:
    """Inside, scores and weights stay float32: autocast must not reach the backend's products."""
    case = Case(pattern)
    query, key, value = (t.float() for t in case.inputs()[:3])
    with torch.autocast("cpu", dtype=dtype):
        pair = both(query, key, value, case.pattern, backend)
    query, key, value = (t.to(dtype) for t in (query, key, value))
    expected = both(query, key, value, case.pattern, backend)
    assert pair[0].dtype == dtype
    assert pair[1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(pair, expected, strict=True))


@each_pattern
@pytest.mark.parametrize(
    ("backend", "backward_too"), [("eager", False), ("eager", True), ("reference", False)]
)
def test_autocast_gradients_come_in_the_type_of_the_inputs(
    backend: str, backward_too: bool, pattern: Pattern
) -> None:
    """And they are those of the rounded inputs.

    The backward belongs outside, as PyTorch advises; eager's is the same inside.
    """
    case = Case(pattern)
    single = case.inputs(torch.float32)
    leaves = single.leaves()
    grad_out = single.grad_out.bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = both(*leaves, case.pattern, backend, case.scale)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=backward_too):
        grads = torch.autograd.grad(out, leaves, grad_out)
    rounded = single._replace(
        **{name: getattr(single, name).bfloat16() for name in ("query", "key", "value")},
        grad_out=grad_out,
        grad_lse=torch.zeros_like(single.grad_lse),
    )
    for found, expected in zip(grads, attend(case, rounded, backend)[2:], strict=True):
        assert found.dtype == torch.float32
        assert torch.equal(found, expected.float())


def test_float64_stays_under_autocast() -> None:
    """As PyTorch's own attention does."""
    case = Case()
    query, key, value = case.inputs()[:3]
    expected = both(query, key, value, case.pattern)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pair = both(query, key, value, case.pattern)
    assert all(torch.equal(a, b) for a, b in zip(pair, expected, strict=True))


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_autocast_unites_types(backend: str) -> None:
    """Mixed types raise elsewhere; here a cached bfloat16 key may meet a float32 query."""
    case = Case()
    query, key, value = (t.bfloat16() for t in case.inputs()[:3])
    expected = both(query, key, value, case.pattern, backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pair = both(query.float(), key, value.float(), case.pattern, backend)
    assert all(torch.equal(a, b) for a, b in zip(pair, expected, strict=True))
