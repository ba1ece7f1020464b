"""Packed documents: their lengths, and how equal ones become a batch where there is no plan."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor
from torch.nn import functional as F

from colonnade.backends.tracing.device import kept_on_device
from colonnade.backends.tracing.memo import remembered
from colonnade.backends.tracing.operation import contents, rows_of
from colonnade.shapes import CuSeqlens


@dataclass(frozen=True, eq=False)
class Documents:
    """The lengths of documents that lie one after the other, on the CPU; equal to itself alone.

    Empty ones are left out: to a compiler there are as many as there may be at most. Each document
    has the number that it has among all, the empty ones too.
    """

    lengths: Int[Tensor, " documents"]
    numbers: Int[Tensor, " documents"]


@remembered
def documents_of(cu_seqlens: CuSeqlens, total: int) -> Documents:
    """Look into cu_seqlens, once for all layers that are handed it.

    Raises:
        ValueError: cu_seqlens does not start at 0, decreases, or does not end at `total`.
    """
    ends = cu_seqlens.to("cpu", torch.long)
    _check(ends, total)
    lengths = ends.diff()
    there = lengths > 0
    return Documents(lengths[there], torch.arange(len(lengths), device="cpu")[there])


def check_documents(cu_seqlens: CuSeqlens, total: int) -> None:
    """Refuse boundaries that do not fit, where nobody may look at how long documents are.

    What torch.vmap maps is looked at row by row, and a compiled program looks when it runs; but a
    compiled transformation of torch.func cannot.

    Raises:
        ValueError: As `documents_of`.
    """
    if torch.compiler.is_compiling():
        if torch._C._are_functorch_transforms_active():
            return  # The assertion has no batching rule.
        # As long as cu_seqlens: one difference would broadcast, and hold for several documents.
        before = F.pad(cu_seqlens, (1, 0))[:-1]
        fit = (cu_seqlens[0] == 0) & (cu_seqlens >= before).all() & (cu_seqlens[-1] == total)
        torch._assert_async(
            fit, "cu_seqlens must start at 0, not decrease, and end at the number of tokens."
        )
        return
    with torch._C._DisableFuncTorch():
        rows = rows_of(cu_seqlens)
        for ends in () if rows is None else rows.to("cpu", torch.long):
            _check(ends, total)


def _check(ends: Tensor, total: int) -> None:
    lengths = ends.diff()
    if ends[0] != 0:
        raise ValueError(f"cu_seqlens must start at 0, got cu_seqlens[0]={ends[0]}.")
    if (lengths < 0).any():
        document = int((lengths < 0).nonzero()[0])
        raise ValueError(
            f"cu_seqlens must not decrease, got cu_seqlens[{document}]={ends[document]} and "
            f"cu_seqlens[{document + 1}]={ends[document + 1]}."
        )
    if ends[-1] != total:
        raise ValueError(
            "cu_seqlens must end at the number of tokens, got "
            f"cu_seqlens[-1]={ends[-1]} for {total} tokens."
        )


def lengths_to_count(cu_seqlens: CuSeqlens | None, total: int) -> list[int]:
    """Return the lengths of documents; of one that is everything where nobody knows them.

    No documents have more pairs than that one.
    """
    known = contents(cu_seqlens)
    lengths: list[int] = [total] if known is None else documents_of(known, total).lengths.tolist()
    return lengths


def by_documents(
    attend: Callable[..., tuple[Tensor, ...]], cu_seqlens: CuSeqlens | None, *tensors: Tensor
) -> tuple[Tensor, ...]:
    """Run packed documents through a function that knows sequences only: equal lengths as a batch.

    Tensors and results are [1, heads, total, …]; `attend` gets and gives [documents, heads,
    length, …]. Before the tensors it gets the numbers of the documents, [documents]. Without
    cu_seqlens it is called once, with the numbers of the batch rows.
    """
    if cu_seqlens is None:
        return attend(torch.arange(len(tensors[0]), device=tensors[0].device), *tensors)
    documents = documents_of(cu_seqlens, tensors[0].shape[2])
    batches, back = kept_on_device(tensors[0].device, _batches, documents)
    found = []
    for numbers, index in batches:
        results = attend(numbers, *(t[0][:, index].transpose(0, 1) for t in tensors))
        found.append([t.transpose(0, 1).flatten(1, 2) for t in results])
    return tuple(torch.cat(parts, 1)[:, back][None] for parts in zip(*found, strict=True))


def _batches(documents: Documents) -> tuple[list[tuple[Tensor, Tensor]], Tensor]:
    """Return a batch for each length, and the order that undoes this sorting.

    A batch is the numbers of its documents, and their positions [documents, length].
    """
    begins: dict[int, list[tuple[int, int]]] = {}
    begin = 0
    numbered = torch.stack([documents.numbers, documents.lengths], 1).tolist()
    for number, length in numbered or [(0, 0)]:
        begins.setdefault(length, []).append((number, begin))
        begin += length
    batches = []
    for length, of_length in begins.items():
        numbers, first = torch.tensor(of_length).unbind(1)
        batches.append((numbers, first[:, None] + torch.arange(length)))
    return batches, torch.cat([index.flatten() for _, index in batches]).argsort()
