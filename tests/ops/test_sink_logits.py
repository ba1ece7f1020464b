"""Learnt sink logits: one more score in the softmax of each query head, which weighs no value."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import colonnade as col
from colonnade.backends.dropout import Dropout
from colonnade.ops.heads import attention_in_groups
from colonnade.ops.packing import Packing
from colonnade.ops.sink_logits import with_sink_logits
from colonnade.pattern import FixedPattern, LocalPattern
from tests.oracle import dense_weights

GROUPS = (FixedPattern(4, 1, part="summary"), LocalPattern(3, sinks=1))


def _inputs(length: int = 13, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 4, length, 3), (2, 2, length, 3), (2, 2, length, 5), (4,)]
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def _expected(query: Tensor, key: Tensor, value: Tensor, logits: Tensor) -> Tensor:
    """Return softmax over [scores | logit], without the last weight, times the values."""
    mask = torch.cat([each.mask(query.shape[2]) for each in GROUPS]).repeat_interleave(2, 0)
    key, value = (t.repeat_interleave(2, 1) for t in (key, value))
    scores = (0.7 * query @ key.mT).masked_fill(~mask, -math.inf)
    column = logits.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
    weights = torch.cat([scores, column], 3).softmax(-1)[..., :-1]
    return weights @ value


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("padded", [False, True])
def test_they_are_a_score_that_weighs_no_value(padded: bool, backend: str) -> None:
    """In output and gradients; rows under part "summary" that read nothing give 0."""
    query, key, value, logits = _inputs()
    mask = torch.ones(2, 13, dtype=torch.bool)
    packing = Packing.of_padded(mask) if padded else None
    options: dict[str, Any] = {"scale": 0.7, "backend": backend, "sink_logits": logits}
    out = attention_in_groups(query, key, value, GROUPS, packing, **options)
    expected = _expected(query, key, value, logits)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    assert not out[:, :2, :3].any()
    weights = torch.randn_like(out)
    found = torch.autograd.grad((out * weights).sum(), [query, key, value, logits])
    wanted = torch.autograd.grad((expected * weights).sum(), [query, key, value, logits])
    for gradient, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-11, atol=1e-11)


def test_minus_infinity_is_no_score_at_all() -> None:
    query, key, value, _ = _inputs()
    without = attention_in_groups(query, key, value, GROUPS)
    never = torch.full((4,), -math.inf, dtype=torch.float64)
    assert torch.equal(attention_in_groups(query, key, value, GROUPS, sink_logits=never), without)
    assert not attention_in_groups(query, key, value, GROUPS, sink_logits=-never).any()


def test_half_precision_is_rounded_at_the_end() -> None:
    query, key, value, logits = _inputs(dtype=torch.bfloat16)
    out = attention_in_groups(query, key, value, GROUPS, scale=0.7, sink_logits=logits)
    assert out.dtype == torch.bfloat16
    expected = _expected(*(t.double() for t in (query, key, value, logits)))
    torch.testing.assert_close(out.double(), expected, rtol=2**-6, atol=2**-7)


def test_dropout_does_not_drop_the_score() -> None:
    """A dropped weight leaves the others as they are, divided by the share that is kept."""
    query, key, value, logits = _inputs()
    value = torch.eye(13, dtype=torch.float64).expand(2, 2, -1, -1)
    mask = torch.cat([each.mask(13) for each in GROUPS])
    weights, lse = dense_weights(query, key, mask, 0.7)
    share = torch.exp(lse) / (torch.exp(lse) + torch.exp(logits)[:, None])
    dropout = Dropout(0.4, torch.tensor([5]))
    out = attention_in_groups(
        query, key, value, GROUPS, scale=0.7, dropout=dropout, sink_logits=logits
    )
    kept = out != 0
    torch.testing.assert_close(out, weights * share[..., None] / 0.6 * kept)
    assert 0.4 < kept.sum() / (weights != 0).sum() < 0.8


def test_the_formula_takes_what_a_cache_returns() -> None:
    query, key, value, logits = (t.detach() for t in _inputs())
    for static in (False, True):
        cache = col.KVCache(GROUPS, 13, static=static)
        parts = []
        for begin, end in ((0, 6), (6, 7), (7, 8), (8, 13)):
            q, k, v = (t[:, :, begin:end] for t in (query, key, value))
            out, lse = cache.attend(q, k, v, 0.7, return_lse=True)
            parts.append(with_sink_logits(out, lse, logits))
        expected = _expected(query, key, value, logits)
        torch.testing.assert_close(torch.cat(parts, 2), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.plain
@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        (torch.zeros(2), ValueError, r"shape \(2,\) for 4 query heads"),
        (torch.zeros(1, 4), ValueError, r"shape \(1, 4\)"),
        (torch.zeros(4).long(), TypeError, r"floating-point numbers, got torch\.int64"),
    ],
)
def test_anything_but_one_for_each_head_is_refused(
    logits: Tensor, error: type[Exception], message: str
) -> None:
    query, key, value, _ = _inputs()
    with pytest.raises(error, match=message):
        attention_in_groups(query, key, value, GROUPS, sink_logits=logits)
