"""Dropout on the weights: which, how often, and the same ones whenever they are needed again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from colonnade import FixedPattern, FullPattern, Pattern, StridedPattern
from colonnade.nn import SelfAttention
from tests.cases import EXAMPLES, Case, both, each_pattern, output
from tests.oracle import dense_weights
from tests.packing import cu_seqlens_of, packed, packed_case

BACKENDS = ("eager", "reference")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def _weights(case: Case, query: Tensor, key: Tensor, p: float, backend: str, seed: int) -> Tensor:
    """Return the weights [B, H, q_len, kv_len] after dropout: values are unit vectors."""
    torch.manual_seed(seed)
    unit = torch.eye(case.kv_len, dtype=query.dtype).expand(*key.shape[:2], -1, -1)
    return output(query, key, unit, case.pattern, backend, case.scale, p)


@each_pattern
@each_backend
def test_a_weight_is_dropped_or_divided_by_what_is_kept(backend: str, pattern: Pattern) -> None:
    case = Case(pattern, q_len=11)
    query, key = case.inputs()[:2]
    whole = _weights(case, query, key, 0.0, backend, 0)
    found = _weights(case, query, key, 0.25, backend, 0)
    dropped = (found == 0) & (whole > 0)
    assert dropped.any()
    assert (found[dropped] == 0).all()
    torch.testing.assert_close(found[~dropped], (whole / 0.75)[~dropped])


@each_pattern
@each_backend
def test_the_log_sum_exp_is_that_before_dropout(backend: str, pattern: Pattern) -> None:
    case = Case(pattern)
    inputs = case.inputs()[:3]
    plain, dropped = (both(*inputs, pattern, backend, dropout_p=p)[1] for p in (0.0, 0.5))
    assert torch.equal(plain, dropped)


@each_pattern
def test_gradients_are_those_of_the_weights_that_were_kept(pattern: Pattern) -> None:
    """Against plain products with the dropped weights set to 0, read off the forward."""
    case = Case(pattern, q_len=11)
    inputs = case.inputs()
    query, key, value = inputs.leaves()
    factor = _weights(case, query, key, 0.3, "eager", 5) / _weights(
        case, query, key, 0.0, "eager", 5
    )
    kept = factor.nan_to_num(0.0).detach()
    torch.manual_seed(5)
    out = output(query, key, value, pattern, "eager", case.scale, 0.3)
    found = torch.autograd.grad(out, (query, key, value), inputs.grad_out)

    weights, _ = dense_weights(query, key, case.mask(), case.scale)
    expected_out = (weights * kept) @ value.repeat_interleave(case.group, 1)
    expected = torch.autograd.grad(expected_out, (query, key, value), inputs.grad_out)
    torch.testing.assert_close(out, expected_out)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@each_pattern
@each_backend
def test_everything_dropped_gives_zero(backend: str, pattern: Pattern) -> None:
    case = Case(pattern)
    inputs = case.inputs()
    leaves = inputs.leaves()
    out = output(*leaves, pattern, backend, dropout_p=1.0)
    grads = torch.autograd.grad(out, leaves, inputs.grad_out)
    assert all((t == 0).all() for t in (out, *grads))


def _share_and_mean(pattern: Pattern, p: float) -> tuple[float, int, Tensor, Tensor, int]:
    case = Case(pattern, 8, 2, 2, 24, 24, 4, 3, 0.3)
    query, key = case.inputs()[:2]
    whole = _weights(case, query, key, 0.0, "eager", 0)
    runs = 60
    total, dropped = torch.zeros_like(whole), 0
    for seed in range(runs):
        found = _weights(case, query, key, p, "eager", seed)
        total += found
        dropped += int(((found == 0) & (whole > 0)).sum())
    weights = int((whole > 0).sum())
    return dropped / (runs * weights), runs * weights, total / runs, whole, runs


@pytest.mark.parametrize(
    "pattern", [FixedPattern(4, 1), StridedPattern(4), FullPattern(), EXAMPLES["bidirectional"]]
)
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_as_many_are_dropped_as_asked_for_and_the_mean_stays(p: float, pattern: Pattern) -> None:
    """The share of dropped weights is p, and the mean of every weight is the weight.

    The share of N draws has standard deviation sqrt(p(1-p)/N); the mean of a weight w over R runs
    has w·sqrt(p/(1-p)/R). Were the draws independent and right, the share would be 6 of the first
    off with probability 2e-9. Any of at most 18,432 means would be 8 of the second off with
    probability 3e-5 (Chernoff's bound for 60 draws at p = 0.1; at 0.5 it cannot be). The seeds are
    fixed: the answer is the same every time.
    """
    share, draws, mean, whole, runs = _share_and_mean(pattern, p)
    assert abs(share - p) <= 6 * math.sqrt(p * (1 - p) / draws)
    deviation = whole * math.sqrt(p / (1 - p) / runs)
    assert ((mean - whole).abs() <= 8 * deviation + 1e-12).all()


def test_heads_rows_and_calls_drop_different_weights() -> None:
    case = Case(FixedPattern(8, 2), 2, 2, 2, 32, 32)
    query = torch.zeros(2, 4, 32, 4, dtype=torch.float64)
    key = torch.zeros(2, 2, 32, 4, dtype=torch.float64)
    torch.manual_seed(0)
    unit = torch.eye(32, dtype=torch.float64).expand(2, 2, -1, -1)
    calls = [output(query, key, unit, case.pattern, "eager", dropout_p=0.5) for _ in range(2)]
    every = [t == 0 for out in calls for row in out for t in row]
    for first in range(len(every)):
        for second in range(first):
            assert not torch.equal(every[first], every[second])


@pytest.mark.parametrize("pattern", [FixedPattern(4, 1), StridedPattern(4)], ids=str)
def test_documents_drop_their_own_weights(pattern: Pattern) -> None:
    """And forward and backward agree: the gradient of a linear function is the function."""
    lengths = (10, 0, 10, 10)
    query, key, value = packed_case(Case(pattern), lengths).inputs()[:3]
    value.requires_grad_()
    cu_seqlens = cu_seqlens_of(lengths)
    torch.manual_seed(1)
    out, _ = packed(query, key, value, cu_seqlens, pattern, dropout_p=0.4)
    weight = torch.randn_like(out)
    (grad,) = torch.autograd.grad((out * weight).sum(), value)
    torch.testing.assert_close((grad * value).sum(), (out * weight).sum())
    plain, _ = packed(query, key, value, cu_seqlens, pattern)
    assert not torch.equal(plain, out)


@pytest.mark.parametrize(
    "pattern", [FixedPattern(4, 1), FixedPattern(4, 1).factors(), StridedPattern(4)], ids=str
)
@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputation_drops_the_same_weights(
    reentrant: bool, pattern: Pattern | tuple[Pattern, ...]
) -> None:
    """With and without activation checkpointing: the same output and gradients, to the bit."""
    layer = SelfAttention(8, 4, pattern, dropout=0.4).double()
    x = torch.randn(2, 17, 8, dtype=torch.float64)
    results = []
    for recompute in (False, True):
        torch.manual_seed(11)
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        y = checkpoint(layer, leaf, use_reentrant=reentrant) if recompute else layer(leaf)
        (y * x).sum().backward()
        grads = [t.grad.clone() for t in (leaf, *layer.parameters()) if t.grad is not None]
        assert len(grads) == 1 + len(list(layer.parameters()))
        results.append([y.detach(), *grads])
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_nothing_is_dropped_in_evaluation() -> None:
    layer = SelfAttention(8, 2, FixedPattern(4, 1), dropout=0.9).eval()
    without = SelfAttention(8, 2, FixedPattern(4, 1))
    without.load_state_dict(layer.state_dict())
    x = torch.randn(1, 12, 8)
    assert torch.equal(layer(x), without(x))
    assert not torch.equal(layer.train()(x), without(x))
