"""Calls after a transformation of torch.func, and before: neither leaves anything to the other.

Results that are kept from one call to the next would outlive the tensors of a transformation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import pytest
import torch
from torch import Tensor

from colonnade import FixedPattern, KVCache, Pattern, StridedPattern, attention_varlen, explain
from colonnade.nn import SelfAttention

pytestmark = pytest.mark.plain

PATTERNS: tuple[Pattern, ...] = (FixedPattern(4, 1), StridedPattern(4))
Function = Callable[[Tensor], Tensor]


def _twice(function: Function) -> Function:
    grad = torch.func.grad(lambda x: function(x).square().sum())
    return torch.func.grad(lambda x: grad(x).square().sum())


def _mapped(function: Function) -> Function:
    return lambda x: torch.vmap(function)(torch.stack([x, 2 * x]))


TRANSFORMATIONS: dict[str, Callable[[Function], Function]] = {
    "vmap": _mapped,
    "grad": lambda function: torch.func.grad(lambda x: function(x).square().sum()),
    "grad of grad": _twice,
    "jacrev": torch.func.jacrev,
    "hessian": lambda function: torch.func.hessian(lambda x: function(x).square().sum()),
    "vmap of grad": lambda function: _mapped(torch.func.grad(lambda x: function(x).square().sum())),
    "functionalize": torch.func.functionalize,
}

LENGTHS: Iterator[int] = count(5)
"""Lengths that no other call has had: whatever is kept is made in this test."""


def _documents(pattern: Pattern, length: int) -> Function:
    cu_seqlens = torch.tensor([0, 3, 3, length])

    def attend(x: Tensor) -> Tensor:
        explain(x, x, x, pattern, cu_seqlens=cu_seqlens, backend="reference")
        out = attention_varlen(x, x.sin(), x.cos(), cu_seqlens, pattern, backend="reference")
        assert isinstance(out, Tensor)
        return out

    return lambda x: attend(x.unflatten(-1, (2, 2)))


def _padded(pattern: Pattern, length: int) -> Function:
    layer = SelfAttention(4, 2, pattern, backend="reference").requires_grad_(False)
    mask = torch.arange(length) < torch.tensor([[3], [length]])
    return lambda x: layer(torch.stack([x, x.sin()]), padding_mask=mask)


def _cached(pattern: Pattern, length: int) -> Function:
    mask = torch.arange(length) < torch.tensor([[3], [length]])

    def attend(x: Tensor) -> Tensor:
        x = torch.stack([x, x.sin()]).unflatten(-1, (2, 2)).transpose(1, 2)
        out = KVCache(pattern, backend="reference").attend(x, x.sin(), x.cos(), padding_mask=mask)
        assert isinstance(out, Tensor)
        return out

    return attend


KINDS = {"documents": _documents, "padded": _padded, "cached": _cached}


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("way", TRANSFORMATIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_calls_after_a_transformation(kind: str, way: str, pattern: Pattern) -> None:
    """The first one of all is under the transformation, and what it keeps serves the others."""
    length = next(LENGTHS)
    function, x = KINDS[kind](pattern, length), torch.randn(length, 4)
    transform = TRANSFORMATIONS[way]
    first = transform(function)(x)
    plain = function(x)
    if way == "functionalize":
        torch.testing.assert_close(first, plain)
    elif way == "vmap":
        torch.testing.assert_close(first, torch.stack([plain, function(2 * x)]))
    torch.testing.assert_close(transform(function)(x), first)
    torch.testing.assert_close(function(x), plain)


@pytest.mark.parametrize("way", TRANSFORMATIONS)
def test_each_transformation_after_each_other(way: str) -> None:
    length = next(LENGTHS)
    function, x = _documents(PATTERNS[0], length), torch.randn(length, 4)
    function(x)
    expected = TRANSFORMATIONS[way](function)(x)
    length = next(LENGTHS)
    for other in TRANSFORMATIONS.values():
        other(function)(x)
        torch.testing.assert_close(TRANSFORMATIONS[way](function)(x), expected)


@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_padding_that_is_mapped(pattern: Pattern, backend: str) -> None:
    """The mask of each mapped row is its own, under one transformation or two."""
    layer = SelfAttention(4, 2, pattern, backend=backend)
    x, lengths = torch.randn(3, 2, 9, 4), torch.tensor([[9, 4], [1, 9], [5, 6]])
    mask = torch.arange(9) < lengths[..., None]

    def attend(x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = layer(x, padding_mask=mask)
        return out

    def loss(x: Tensor, mask: Tensor) -> Tensor:
        return attend(x, mask).square().sum()

    for function in (attend, torch.func.grad(loss)):
        expected = torch.stack([function(*each) for each in zip(x, mask, strict=True)])
        torch.testing.assert_close(torch.vmap(function)(x, mask), expected)
        found = torch.stack([function(*each) for each in zip(x, mask, strict=True)])
        assert torch.equal(found, expected)


@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_documents_that_are_mapped_under_a_gradient(pattern: Pattern, backend: str) -> None:
    x, cu_seqlens = torch.randn(2, 11, 2, 8), torch.tensor([[0, 3, 11], [0, 7, 11]])

    def loss(x: Tensor, ends: Tensor) -> Any:
        explain(x, x, x, pattern, cu_seqlens=ends, backend=backend)
        out = attention_varlen(x, x, x, ends, pattern, backend=backend)
        assert isinstance(out, Tensor)
        return out.square().sum()

    grad = torch.func.grad(loss)
    expected = torch.stack([grad(*each) for each in zip(x, cu_seqlens, strict=True)])
    torch.testing.assert_close(torch.vmap(grad)(x, cu_seqlens), expected)
