"""What is asked of a backend beside the tensors, and packed documents for those without a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from colonnade.pattern import HasMask
from colonnade.shapes import CuSeqlens


@dataclass(frozen=True)
class Request:
    """One call of the operation.

    Attributes:
        pattern: Which positions each position reads.
        scale: Factor on the scores.
        dropout_p: Share of the weights that is dropped.
        return_lse: Whether the caller wants the log-sum-exp.
        cu_seqlens: Where documents begin and end that lie one after the other along the sequence,
            batch 1, as many queries as keys; not checked yet, see `document_lengths`. None: one
            sequence, whose last positions are the queries.
        reduced: Of so many blocks, the first ones, the keys are the summaries alone, as in a cache;
            the pattern is a causal FixedPattern then. The queries lie behind them.
    """

    pattern: HasMask
    scale: float
    dropout_p: float = 0.0
    return_lse: bool = True
    cu_seqlens: CuSeqlens | None = None
    reduced: int = 0


def document_lengths(cu_seqlens: Tensor, total: int) -> list[int]:
    """How long each document is.

    Raises:
        ValueError: cu_seqlens does not start at 0, decreases, or does not end at `total`.
    """
    ends = cu_seqlens.tolist()
    if ends[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got cu_seqlens[0]={ends[0]}.")
    for document, (begin, end) in enumerate(pairwise(ends)):
        if end < begin:
            raise ValueError(
                f"cu_seqlens must not decrease, got cu_seqlens[{document}]={begin} and "
                f"cu_seqlens[{document + 1}]={end}."
            )
    if ends[-1] != total:
        raise ValueError(
            "cu_seqlens must end at the number of tokens, got "
            f"cu_seqlens[-1]={ends[-1]} for {total} tokens."
        )
    return [end - begin for begin, end in pairwise(ends)]


def by_documents(
    attend: Callable[..., tuple[Tensor, ...]], cu_seqlens: CuSeqlens | None, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Packed documents through a function that knows sequences only: equal lengths as one batch.

    Tensors and results are [1, heads, total, …]; `attend` gets and gives [documents, heads,
    length, …]. Without cu_seqlens it is called as it is.
    """
    if cu_seqlens is None:
        return attend(*tensors)
    begins: dict[int, list[int]] = {}
    begin = 0
    for length in document_lengths(cu_seqlens, tensors[0].shape[2]) or [0]:
        begins.setdefault(length, []).append(begin)
        begin += length
    order, found = [], []
    for length, of_length in begins.items():
        index = torch.tensor(of_length)[:, None] + torch.arange(length)
        order.append(index.flatten())
        results = attend(*(t[0][:, index.to(t.device)].transpose(0, 1) for t in tensors))
        found.append([t.transpose(0, 1).flatten(1, 2) for t in results])
    back = torch.cat(order).argsort().to(tensors[0].device)
    return tuple(torch.cat(parts, 1)[:, back][None] for parts in zip(*found, strict=True))


def only_heads(tensor: Tensor, kv_heads: Sequence[int], num_kv_heads: int) -> Tensor:
    """[B, heads, …] for some key heads alone: their own, or their groups of query heads."""
    if len(kv_heads) == num_kv_heads:
        return tensor
    index = torch.tensor(kv_heads, device=tensor.device)
    grouped: Tensor = tensor.unflatten(1, (num_kv_heads, -1))
    return grouped.index_select(1, index).flatten(1, 2)


def in_order(parts: Sequence[Tensor], kv_heads: Sequence[Sequence[int]]) -> Tensor:
    """What `only_heads` took apart, together again."""
    if len(parts) == 1:
        return parts[0]
    grouped = [t.unflatten(1, (len(h), -1)) for t, h in zip(parts, kv_heads, strict=True)]
    order = torch.tensor([head for heads in kv_heads for head in heads]).argsort()
    return torch.cat(grouped, 1).index_select(1, order.to(parts[0].device)).flatten(1, 2)
