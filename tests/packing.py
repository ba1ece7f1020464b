"""Packed documents: several sequences one after the other, each attended to alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from colonnade import Pattern, attention_varlen
from tests.cases import Case, Inputs, Results, attend_by_products, backpropagate
from tests.rounding import check


def cu_seqlens_of(lengths: Sequence[int], dtype: torch.dtype = torch.int64) -> Tensor:
    """Return 0, then where each document ends."""
    return torch.tensor([0, *accumulate(lengths)], dtype=dtype)


def cuts(total: int, most: int = 6) -> st.SearchStrategy[tuple[int, ...]]:
    """Draw lengths of at most `most` documents of `total` tokens together; some may be empty."""
    ends = st.lists(st.integers(0, total), max_size=most - 1).map(sorted)
    return ends.map(lambda cut: tuple(end - begin for begin, end in pairwise([0, *cut, total])))


def packed_case(case: Case, lengths: Sequence[int]) -> Case:
    """Return the case of all documents together."""
    return replace(case, batch=1, q_len=sum(lengths), kv_len=sum(lengths))


def documents(case: Case, lengths: Sequence[int]) -> Iterator[tuple[slice, Case]]:
    """Yield where each document lies, empty ones left out, and its case alone."""
    for end, length in zip(accumulate(lengths), lengths, strict=True):
        if length > 0:
            yield slice(end - length, end), replace(case, q_len=length, kv_len=length)


def packed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Tensor,
    pattern: Pattern,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """Return output and log-sum-exp of `attention_varlen`, in the layout of `attention`."""
    query, key, value = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    options = {"return_lse": True, **options}
    found = attention_varlen(query, key, value, cu_seqlens, pattern, **options)
    out, lse = found if isinstance(found, tuple) else (found, None)
    return out.transpose(0, 1)[None], None if lse is None else lse[None]


def attend_packed(case: Case, inputs: Inputs, cu_seqlens: Tensor, backend: str) -> Results:
    """Return the results of a backend for all documents in one call."""
    leaves = inputs.leaves()
    out, lse = packed(*leaves, cu_seqlens, case.pattern, backend=backend, scale=case.scale)
    assert lse is not None
    return backpropagate((out, lse), leaves, inputs)


def check_documents(
    case: Case,
    lengths: Sequence[int],
    backend: str,
    dtype: torch.dtype = torch.float64,
    integers: torch.dtype = torch.int64,
) -> None:
    """Assert that each document has the results of the definition for it alone."""
    inputs = packed_case(case, lengths).inputs(dtype)
    found = attend_packed(case, inputs, cu_seqlens_of(lengths, integers), backend)
    for part, one in documents(case, lengths):
        alone = inputs.part(part)
        check(one, alone, found.part(part), attend_by_products(one, alone))
