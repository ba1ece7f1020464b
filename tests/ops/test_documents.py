"""Packed documents: each is attended to alone, whatever lies before and after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colonnade import FixedPattern, Pattern, attention_varlen, explain
from tests.cases import Case, each_pattern, patterns
from tests.packing import check_documents


@pytest.mark.parametrize("backend", ["eager", "reference"])
@settings(max_examples=80)
@given(
    pattern=patterns(),
    lengths=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    kv_heads=st.integers(1, 3),
    integers=st.sampled_from((torch.int32, torch.int64)),
)
def test_each_document_equals_the_definition(
    backend: str, pattern: Pattern, lengths: list[int], kv_heads: int, integers: torch.dtype
) -> None:
    """Output, log-sum-exp and all gradients; equal lengths, which are stacked, are drawn too."""
    case = Case(pattern, kv_heads=kv_heads)
    check_documents(case, lengths, backend, integers=integers)


@each_pattern
@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1] * 9 + [20, 0, 1], [5, 0, 5, 5]], ids=str)
def test_unlike_documents(lengths: list[int], backend: str, pattern: Pattern) -> None:
    check_documents(Case(pattern), lengths, backend, integers=torch.int32)


each_wrong_one = pytest.mark.parametrize(
    "lengths", [[1, 3, 6], [0, 4, 2, 6], [0, 5], [0, 7], [0, 6, 5]], ids=str
)


@pytest.mark.plain
@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
@each_wrong_one
def test_what_cu_seqlens_says_in_a_mapping(lengths: list[int], backend: str) -> None:
    """One row of several is wrong; explain looks too."""
    x = torch.zeros(6, 2, 8)
    good = torch.zeros(len(lengths), dtype=torch.long).index_fill(0, torch.tensor([-1]), 6)
    rows = torch.stack([good, torch.tensor(lengths)])

    def attend(cu_seqlens: Tensor) -> Any:
        return attention_varlen(x, x, x, cu_seqlens, FixedPattern(4, 1), backend=backend)

    def look(cu_seqlens: Tensor) -> Tensor:
        explain(x, x, x, FixedPattern(4, 1), cu_seqlens=cu_seqlens, backend=backend)
        return cu_seqlens

    def gradient(cu_seqlens: Tensor) -> Any:
        def loss(x: Tensor) -> Any:
            out = attention_varlen(x, x, x, cu_seqlens, FixedPattern(4, 1), backend=backend)
            assert isinstance(out, Tensor)
            return out.sum()

        return torch.func.grad(loss)(x)

    message = r"cu_seqlens must .*got cu_seqlens\[-?\d\]=-?\d"
    for function in (attend, look, gradient):
        with pytest.raises(ValueError, match=message):
            torch.vmap(function, in_dims=1)(rows.T)
        with pytest.raises(ValueError, match=message):
            torch.vmap(torch.vmap(function))(rows.expand(2, *rows.shape))


@pytest.mark.plain
@each_wrong_one
def test_what_cu_seqlens_says_in_a_compiled_program(lengths: list[int]) -> None:
    x = torch.zeros(6, 2, 8)

    def attend(cu_seqlens: Tensor) -> Any:
        return attention_varlen(x, x, x, cu_seqlens, FixedPattern(4, 1), backend="reference")

    torch.compiler.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    compiled(torch.tensor([0] * (len(lengths) - 1) + [6]))
    with pytest.raises(RuntimeError, match="cu_seqlens must start at 0, not decrease, and end at"):
        compiled(torch.tensor(lengths))
