"""Gradients follow the weights that were dropped, no two weights share a draw, no draw is wasted.

Which weights a call dropped is read off its output: with unit vectors as values, the output of a
query is the row of its weights. The draws depend on no value, so the same seed drops the same ones
again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from colonnade import (
    FixedPattern,
    FullPattern,
    LocalPattern,
    Pattern,
    StridedPattern,
)
from tests.cases import (
    EXAMPLES,
    Case,
    Inputs,
    Leaves,
    backpropagate,
    both,
    cases,
    each_pattern,
    output,
)
from tests.oracle import dense_weights
from tests.packing import cu_seqlens_of, packed
from tests.rounding import check

Pair = tuple[Tensor, Tensor]
SEED = 11


def _run(case: Case, query: Tensor, key: Tensor, value: Tensor, p: float, backend: str) -> Pair:
    """Return output and log-sum-exp; the same weights are dropped at every call."""
    torch.manual_seed(SEED)
    return both(query, key, value, case.pattern, backend, case.scale, p)


def _packed_run(lengths: list[int]) -> Callable[..., Pair]:
    """Return the same for documents of these lengths, in the layout of `attention`."""
    cu_seqlens = cu_seqlens_of(lengths)

    def run(case: Case, query: Tensor, key: Tensor, value: Tensor, p: float, backend: str) -> Pair:
        torch.manual_seed(SEED)
        options: dict[str, Any] = {"scale": case.scale, "dropout_p": p, "backend": backend}
        out, lse = packed(query, key, value, cu_seqlens, case.pattern, **options)
        assert lse is not None
        return out, lse

    return run


def _weights(case: Case, query: Tensor, key: Tensor) -> Pair:
    """Return [batch, heads, q_len, kv_len] and the logarithm of what they were divided by."""
    return dense_weights(query, key, case.mask(), case.scale)


def _kept(case: Case, query: Tensor, key: Tensor, found: Tensor, p: float) -> Tensor:
    """Return the weights that were kept, [batch, heads, q_len, kv_len] of 0 and 1.

    `found` is the output for unit vectors as values: each entry is 0 or a weight over 1 - p.
    """
    weights = _weights(case, query, key)[0]
    assert (found[weights == 0] == 0).all()
    kept = (found != 0).double()
    torch.testing.assert_close(found, weights * kept * float(np.float32(1 / (1 - p))))
    return kept


def _check_gradients(case: Case, inputs: Inputs, p: float, backend: str) -> None:
    """Assert that all results equal those of dense products with the weights kept."""
    unit = torch.eye(case.kv_len, dtype=torch.float64)
    unit = unit.expand(case.batch, case.kv_heads, -1, -1)
    rows = _run(case, inputs.query, inputs.key, unit, p, backend)[0]
    kept = _kept(case, inputs.query, inputs.key, rows, p)
    leaves = inputs.leaves()
    found = backpropagate(_run(case, *leaves, p, backend), leaves, inputs)
    leaves = inputs.leaves()
    factor = float(np.float32(1 / (1 - p)))
    expected = backpropagate(_by_hand(case, leaves, kept * factor), leaves, inputs)
    # A factor on weights is one on values; the bounds know values.
    inputs = inputs._replace(value=inputs.value * factor)
    found, expected = (r._replace(grad_value=r.grad_value / factor) for r in (found, expected))
    check(case, inputs, found, expected)


def _by_hand(case: Case, leaves: Leaves, factors: Tensor) -> Pair:
    query, key, value = leaves
    weights, lse = _weights(case, query, key)
    return (weights * factors) @ value.repeat_interleave(case.group, 1), lse


shares = st.sampled_from((0.1, 0.5, 0.9))


@given(case=cases(12), p=shares)
def test_gradients_are_those_of_dense_products_with_the_weights_kept(case: Case, p: float) -> None:
    """For output and log-sum-exp together; grouped heads, mid-block starts, any scale."""
    for backend in ("eager", "reference"):
        _check_gradients(case, case.inputs(), p, backend)


# Tests marked plain make hundreds of calls of one kind: checks of types would repeat themselves.
@pytest.mark.plain
@each_pattern
def test_gradients_equal_differences_of_the_same_draws(pattern: Pattern) -> None:
    """No formula at all: the seed is put back before every call."""
    case = Case(pattern, batch=1, q_len=5, kv_len=7, qk_dim=1, v_dim=1)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Pair:
        out, lse = _run(case, query, key, value, 0.4, "eager")
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(run, case.inputs().leaves())


@pytest.mark.plain
@each_pattern
def test_gradients_of_documents_equal_differences(pattern: Pattern) -> None:
    """Two documents of one length, which share a batch where there is no plan, and an empty one."""
    case = Case(pattern, batch=1, group=1, q_len=10, kv_len=10, qk_dim=1, v_dim=1)
    packed_run = _packed_run([2, 6, 0, 2])

    def run(query: Tensor, key: Tensor, value: Tensor) -> Pair:
        out, lse = packed_run(case, query, key, value, 0.4, "eager")
        return out, lse.masked_fill(lse.isinf(), 0.0)

    assert torch.autograd.gradcheck(run, case.inputs().leaves(), fast_mode=True)


def test_documents_drop_weights_within_documents() -> None:
    """A block-diagonal mask has both kept and dropped ones."""
    lengths = [5, 0, 9, 5]
    case = Case(FullPattern(), batch=1, q_len=19, kv_len=19)
    query, key = case.inputs()[:2]
    unit = torch.eye(19, dtype=torch.float64).expand(1, 2, -1, -1)
    for pattern in (FullPattern(), StridedPattern(1), FixedPattern(9, 1)):
        of_pattern = replace(case, pattern=pattern)
        rows = _packed_run(lengths)(of_pattern, query, key, unit, 0.5, "eager")[0]
        document = torch.tensor([0] * 5 + [2] * 9 + [3] * 5)
        inside = (document[:, None] == document).tril().expand_as(rows)
        assert (rows[~inside] == 0).all()
        assert (rows[inside] > 0).any()
        assert (rows[inside] == 0).any()


@pytest.mark.plain
@pytest.mark.parametrize(
    ("pattern", "p", "backend"),
    [
        (FixedPattern(3, 1), 0.5, "eager"),
        (FixedPattern(3, 1), 0.2, "reference"),
        (EXAMPLES["bidirectional sub-blocks"], 0.2, "eager"),
        (StridedPattern(3), 0.2, "eager"),
        (LocalPattern(3), 0.5, "eager"),
    ],
    ids=str,
)
def test_every_weight_is_dropped_by_a_draw_of_its_own(
    pattern: Pattern, p: float, backend: str
) -> None:
    """Each with probability p, and no two of them together, over N = 240 or 560 calls.

    Hoeffding: the mean of N independent numbers from a range r is t off with probability below
    2·exp(-2N·(t/r)²). Whether a weight is kept has r = 1 and mean q = 1 - p; the product of two
    weights' deviations from q has r <= 1 and mean 0, but p·q if they share a draw: 0.16 or 0.25.
    With the t below, 0.15 or 0.23, each of fewer than 10,000 means is off with probability 1e-11,
    any with 1e-7. The seed is fixed, so the answer is the same at every run.
    """
    case = Case(pattern, batch=2, kv_heads=2, group=1, q_len=5, kv_len=5)
    query, key = case.inputs()[:2]
    read = _weights(case, query, key)[0] > 0
    calls = 240 if p == 0.5 else 560
    unit = torch.eye(5, dtype=torch.float64).expand(2, 2, -1, -1)
    torch.manual_seed(0)
    rows = [output(query, key, unit, pattern, backend, dropout_p=p)[read] for _ in range(calls)]
    deviation = (torch.stack(rows) != 0).double() - (1 - p)
    t = math.sqrt(math.log(2 / 1e-11) / (2 * calls))
    assert t < p * (1 - p)
    means = deviation.mean(0)
    assert means.abs().max() <= t
    products = (deviation.mT @ deviation / calls).fill_diagonal_(0.0)
    assert len(means) * (len(means) + 3) // 2 < 10_000
    assert products.abs().max() <= t
    # From one call to the next, too.
    assert (deviation[1:] * deviation[:-1]).mean(0).abs().max() <= t


@pytest.mark.plain
@pytest.mark.parametrize(
    "pattern",
    [FixedPattern(4, 1), EXAMPLES["bidirectional sub-blocks"], StridedPattern(4), FullPattern()],
    ids=str,
)
def test_the_mean_over_many_calls_is_the_output_without_dropout(pattern: Pattern) -> None:
    """Hoeffding again: an output is a sum over keys of terms in [0, P·v/(1-p)].

    The mean of N calls is t off with probability below 2·exp(-2N·t²/Σ(P·v/(1-p))²); with 1e-10 for
    each of 312 entries, that any is off has probability 3e-8.
    """
    case = Case(pattern, q_len=13, kv_len=13)
    query, key, value = case.inputs()[:3]
    p, calls, value = 0.3, 200, value.abs()
    plain = output(query, key, value, pattern, scale=case.scale)
    assert plain.numel() == 312
    torch.manual_seed(0)
    total = torch.zeros_like(plain)
    for _ in range(calls):
        total += output(query, key, value, pattern, scale=case.scale, dropout_p=p)
    weights = _weights(case, query, key)[0] / (1 - p)
    squares = weights.square() @ value.square().repeat_interleave(case.group, 1)
    t = (squares * math.log(2 / 1e-10) / (2 * calls)).sqrt()
    assert ((total / calls - plain).abs() <= t).all()


@each_pattern
@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_a_log_sum_exp_has_the_gradient_that_it_has_without_dropout(
    backend: str, pattern: Pattern
) -> None:
    """With everything dropped, too: nothing else is left then, and nothing is NaN."""
    case = Case(pattern)
    inputs = case.inputs()
    found = []
    for p in (0.0, 0.6, 1.0):
        leaves = inputs.leaves()
        lse = _run(case, *leaves, p, backend)[1]
        grads = torch.autograd.grad(lse, leaves, inputs.grad_lse, materialize_grads=True)
        found.append(grads)
    for plain, some, every in zip(*found, strict=True):
        assert plain.isfinite().all()
        assert torch.equal(plain, some)
        assert torch.equal(plain, every)


def test_drawing_disturbs_no_other_draw() -> None:
    """Nothing is drawn without dropout, and nothing in a backward."""
    case = Case()
    leaves = case.inputs().leaves()
    state = torch.get_rng_state()
    output(*leaves, case.pattern)
    assert torch.equal(torch.get_rng_state(), state)
    for pattern in (FixedPattern(4, 1), StridedPattern(4), FullPattern()):
        out = output(*leaves, pattern, dropout_p=0.5)
        drawn = torch.get_rng_state()
        assert not torch.equal(drawn, state)
        out.sum().backward()
        assert torch.equal(torch.get_rng_state(), drawn)
