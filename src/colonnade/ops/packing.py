"""Padded and packed batches: the tokens of all rows, one document after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from colonnade.backends.tracing.memo import remembered
from colonnade.backends.tracing.operation import may_decide
from colonnade.shapes import CuSeqlens, Positions


@dataclass(frozen=True, eq=False)
class Packing:
    """The tokens of a batch [batch, seq_len], and how they fall into documents.

    Attributes:
        batch: Number of batch rows.
        seq_len: Their length, padding included.
        index: Where in the flattened batch each token lies, in order; None: everywhere.
        cu_seqlens: Where documents begin and end among the tokens.
        is_token: False where the index leads to padding after all; None: nowhere.
    """

    batch: int
    seq_len: int
    index: Positions | None
    cu_seqlens: CuSeqlens
    is_token: Bool[Tensor, " total"] | None = None

    @classmethod
    def of_padded(cls, padding_mask: Bool[Tensor, "batch seq_len"]) -> Packing:
        """Make one document of each batch row: its real tokens, wherever the padding is."""
        return _of_padded(padding_mask)

    @classmethod
    def of_documents(cls, document: Positions) -> Packing:
        """Pack rows without padding; a document ends where `document` changes, or its batch row."""
        batch, seq_len = document.shape
        first = torch.arange(seq_len, device=document.device) == 0
        begins = (document != document.roll(1, 1)) | first
        return cls(batch, seq_len, None, _cu_seqlens(begins.flatten()))

    @classmethod
    def of_either(
        cls, padding_mask: Bool[Tensor, "batch seq_len"], position_ids: Positions
    ) -> Packing:
        """Pack padded rows, or if there is no padding, documents where positions restart.

        For a compiler, which cannot tell the two apart.
        """
        jumps = position_ids.diff() != 1
        document = F.pad(jumps.long().cumsum(-1), (1, 0)) * padding_mask.all()
        return _of_unknown(padding_mask, document.expand_as(padding_mask))

    def pack(self, x: Tensor) -> Tensor:
        """Lay [batch, seq_len, …] out as [total, …]."""
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat[self.index]

    def unpack(self, packed: Tensor) -> Tensor:
        """Lay [total, …] out as [batch, seq_len, …], zero where there is no token."""
        if self.is_token is not None:
            shape = -1, *[1] * (packed.dim() - 1)
            packed = packed.masked_fill(~self.is_token.view(shape), 0.0)
        if self.index is not None:
            flat = packed.new_zeros(self.batch * self.seq_len, *packed.shape[1:])
            packed = flat.index_copy(0, self.index, packed)
        unpacked: Tensor = packed.unflatten(0, (self.batch, self.seq_len))
        return unpacked


@remembered
def _of_padded(padding_mask: Bool[Tensor, "batch seq_len"]) -> Packing:
    """All layers of a step are handed one mask, and share what is found in it."""
    batch, seq_len = padding_mask.shape
    flat = padding_mask.flatten()
    if may_decide(padding_mask):
        cu_seqlens = F.pad(padding_mask.sum(1).cumsum(0), (1, 0))
        return Packing(batch, seq_len, flat.nonzero()[:, 0], cu_seqlens)
    return _of_unknown(padding_mask, torch.zeros_like(padding_mask, dtype=torch.long))


def _of_unknown(
    padding_mask: Bool[Tensor, "batch seq_len"], document: Int[Tensor, "batch seq_len"]
) -> Packing:
    """Pack documents of rows with padding where nobody knows how many tokens there are.

    Padding goes along behind all tokens, each position a document of its own.
    """
    batch, seq_len = padding_mask.shape
    row = torch.arange(batch, device=document.device)[:, None]
    number = (row * seq_len + document).flatten()
    flat = padding_mask.flatten()
    index = (~flat).long().argsort(stable=True)
    number, is_token = number[index], flat[index]
    begins = (number != number.roll(1)) | (index == index[:1]) | ~is_token
    return Packing(batch, seq_len, index, _cu_seqlens(begins), is_token)


def _cu_seqlens(begins: Bool[Tensor, " total"]) -> CuSeqlens:
    """Return where documents begin, and the total."""
    total = begins.shape[0]
    if may_decide(begins):
        return F.pad(begins.nonzero()[:, 0], (0, 1), value=total)
    # Nor how many documents: those that are not there are empty, and come last.
    position = torch.arange(total + 1, device=begins.device)
    end = position[-1:]  # As a number it would be taken for a constant.
    return torch.cat([torch.where(begins, position[:-1], end).sort().values, end])
