"""Packed documents: each is attended to alone, whatever lies before and after it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colonnade import Pattern
from colonnade.ops import attention_varlen
from tests.cases import (
    Case,
    Inputs,
    Results,
    attend_by_loops,
    backpropagate,
    each_pattern,
    patterns,
)
from tests.rounding import check


def _packed(case: Case, lengths: list[int], backend: str, integers: torch.dtype) -> Results:
    """All documents in one call, the inputs of the case along [total, heads, width]."""
    inputs = case.inputs()
    leaves = inputs.leaves()
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(integers)
    out, lse = attention_varlen(
        *(t[0].transpose(0, 1) for t in leaves),
        cu_seqlens,
        case.pattern,
        scale=case.scale,
        return_lse=True,
        backend=backend,
    )
    assert isinstance(out, Tensor)
    return backpropagate((out.transpose(0, 1)[None], lse[None]), leaves, inputs)


def _check_documents(
    pattern: Pattern, lengths: list[int], kv_heads: int, backend: str, integers: torch.dtype
) -> None:
    total = sum(lengths)
    case = Case(pattern, batch=1, kv_heads=kv_heads, q_len=total, kv_len=total)
    inputs, found = case.inputs(), _packed(case, lengths, backend, integers)
    begin = 0
    for length in filter(None, lengths):
        part = slice(begin, begin + length)
        of_document = Inputs(*(t[:, :, part] for t in inputs))
        alone = Case(pattern, batch=1, kv_heads=kv_heads, q_len=length, kv_len=length)
        expected = attend_by_loops(alone, of_document)
        check(alone, of_document, Results(*(t[:, :, part] for t in found)), expected)
        begin += length


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
    _check_documents(pattern, lengths, kv_heads, backend, integers)


@each_pattern
@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("lengths", [[], [0], [0, 0], [1] * 9 + [20, 0, 1], [5, 0, 5, 5]], ids=str)
def test_unlike_documents(lengths: list[int], backend: str, pattern: Pattern) -> None:
    _check_documents(pattern, lengths, 2, backend, torch.int32)
