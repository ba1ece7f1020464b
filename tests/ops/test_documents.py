"""Packed documents: each is attended to alone, whatever lies before and after it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from colonnade import Pattern
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
