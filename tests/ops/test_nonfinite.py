"""Rules without a tolerance: empty rows, no leak of the future, and NaN that stays where it is."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colonnade import FixedPattern, FullPattern, Pattern
from tests.cases import Case, Inputs, attend, both, cases, each_pattern, fixed_patterns, output

BACKENDS = ("eager", "reference")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

bad_numbers = st.sampled_from((math.nan, math.inf, -math.inf))


def _attend(case: Case, inputs: Inputs, backend: str) -> tuple[Tensor, Tensor]:
    return both(*inputs[:3], case.pattern, backend, case.scale)


def _equal_where(
    where: Tensor, found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]
) -> bool:
    """Whether output and log-sum-exp are the same numbers on the rows [B, H, T] of `where`."""
    return all(torch.equal(a[where], b[where]) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@settings(max_examples=15)
@given(case=cases(pattern=fixed_patterns().map(lambda p: replace(p, part="summary"))))
def test_rows_that_read_nothing(dtype: torch.dtype, backend: str, case: Case) -> None:
    """Output 0, lse -inf, gradient 0, though a gradient of the lse arrives; and never NaN."""
    inputs = case.inputs(dtype)
    found = attend(case, inputs, backend)
    empty = ~case.mask().any(-1).repeat_interleave(case.group, 0).expand(case.batch, -1, -1)
    assert (found.out[empty] == 0).all()
    assert (found.lse[empty] == -math.inf).all()
    assert (found.grad_query[empty] == 0).all()
    assert found.lse[~empty].isfinite().all()
    assert all(t.isfinite().all() for t in (found.out, *found[2:]))
    unread = ~case.mask().any(-2).expand(case.batch, -1, -1)
    assert (found.grad_key[unread] == 0).all()
    assert (found.grad_value[unread] == 0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_first_block_without_a_summary_reads_nothing(backend: str, causal: bool) -> None:
    """All rows are empty: nothing to attend to is no error."""
    case = Case(FixedPattern(20, 1, part="summary", causal=causal))
    found = attend(case, case.inputs(), backend)
    assert (found.lse == -math.inf).all()
    assert all((t == 0).all() for t in (found.out, *found[2:]))


@pytest.mark.parametrize("backend", BACKENDS)
@given(case=cases(), data=st.data())
def test_a_key_moves_no_row_that_does_not_read_it(
    backend: str, case: Case, data: st.DataObject
) -> None:
    """So no row sees the future; and neither other batch rows nor other heads move. Exactly."""
    inputs = case.inputs()
    j = data.draw(st.integers(0, case.kv_len - 1), label="position")
    head = data.draw(st.integers(0, case.kv_heads - 1), label="head")
    key, value = inputs.key.clone(), inputs.value.clone()
    key[0, head, j] += 1.0
    value[0, head, j] -= 100.0
    before = _attend(case, inputs, backend)
    after = _attend(case, inputs._replace(key=key, value=value), backend)
    readers = torch.zeros(before[1].shape, dtype=torch.bool)
    readers[0, case.queries_of(head)] = case.mask()[head, :, j]
    assert _equal_where(~readers, after, before)
    if readers.any():
        assert (after[0] != before[0])[readers].any()


@settings(max_examples=100)
@given(case=cases(), bad=bad_numbers, data=st.data())
def test_a_bad_query_touches_its_row_only(case: Case, bad: float, data: st.DataObject) -> None:
    inputs = case.inputs()
    i = data.draw(st.integers(0, case.q_len - 1), label="query")
    head = data.draw(st.integers(0, case.kv_heads * case.group - 1), label="head")
    query = inputs.query.clone()
    query[0, head, i] = bad
    before = _attend(case, inputs, "eager")
    after = _attend(case, inputs._replace(query=query), "eager")
    others = torch.ones(before[1].shape, dtype=torch.bool)
    others[0, head, i] = False
    assert _equal_where(others, after, before)
    if math.isnan(bad) and before[1][0, head, i] > -math.inf:
        assert after[0][0, head, i].isnan().all()


@pytest.mark.parametrize("of", ["key", "value"])
@settings(max_examples=150)
@given(case=cases(), bad=bad_numbers, data=st.data())
def test_a_bad_key_touches_its_block_and_its_readers_only(
    of: str, case: Case, bad: float, data: st.DataObject
) -> None:
    """Never an earlier block, another batch row, or the queries of another key head.

    Strided and local patterns have no blocks: there it touches its readers alone.
    """
    inputs = case.inputs()
    j = data.draw(st.integers(0, case.kv_len - 1), label="position")
    head = data.draw(st.integers(0, case.kv_heads - 1), label="head")
    entries = data.draw(st.sampled_from((0, slice(None))), label="entries")
    tensor = getattr(inputs, of).clone()
    tensor[0, head, j, entries] = bad
    before = _attend(case, inputs, "eager")
    after = _attend(case, inputs._replace(**{of: tensor}), "eager")
    touched = torch.zeros(before[1].shape, dtype=torch.bool)
    group = case.queries_of(head)
    touched[0, group] = case.reach(head, j)
    assert _equal_where(~touched, after, before)
    readers = case.mask()[head, :, j]
    if of == "value":
        assert not after[0][0, group][:, readers][..., entries].isfinite().any()
    elif math.isnan(bad):
        assert after[0][0, group][:, readers].isnan().all()


@pytest.mark.parametrize("of", ["query", "key", "value"])
@given(case=cases(pattern=st.builds(FullPattern, st.booleans())), bad=bad_numbers, data=st.data())
def test_full_attention_without_the_lse_keeps_bad_numbers_too(
    of: str, case: Case, bad: float, data: st.DataObject
) -> None:
    """PyTorch's own kernel is held to the same: a query's row, a key's head of its batch row."""
    case = replace(case, q_len=case.kv_len, v_dim=case.qk_dim)
    inputs = case.inputs()
    tensor = getattr(inputs, of).clone()
    head = data.draw(st.integers(0, tensor.shape[1] - 1), label="head")
    position = data.draw(st.integers(0, case.kv_len - 1), label="position")
    tensor[0, head, position] = bad
    before, after = (
        output(*tensors, case.pattern, "eager", case.scale)
        for tensors in (inputs[:3], inputs._replace(**{of: tensor})[:3])
    )
    untouched = torch.ones(before.shape[:3], dtype=torch.bool)
    if of == "query":
        untouched[0, head, position] = False
    else:
        untouched[0, case.queries_of(head)] = False
    assert torch.equal(after[untouched], before[untouched])


@pytest.mark.parametrize("backend", BACKENDS)
@each_pattern
@pytest.mark.parametrize(("batch", "q_len", "kv_len"), [(0, 5, 5), (2, 0, 5), (2, 0, 0), (0, 0, 0)])
def test_empty_inputs_give_empty_results(
    batch: int, q_len: int, kv_len: int, pattern: Pattern, backend: str
) -> None:
    case = Case(pattern, batch=batch, q_len=q_len, kv_len=kv_len)
    found = attend(case, case.inputs(), backend)
    assert found.out.shape == (batch, 4, q_len, 3)
    assert found.lse.shape == (batch, 4, q_len)
    assert found.grad_query.shape == (batch, 4, q_len, 4)
    assert torch.equal(found.grad_key, torch.zeros(batch, 2, kv_len, 4, dtype=torch.float64))
    assert torch.equal(found.grad_value, torch.zeros(batch, 2, kv_len, 3, dtype=torch.float64))
    out = output(*case.inputs()[:3], pattern, backend)
    assert out.shape == (batch, 4, q_len, 3)
