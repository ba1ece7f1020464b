"""Padded and packed batches: the tokens of all rows, one document after the other."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool
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
    def of_padded(
        cls, padding_mask: Bool[Tensor, "batch seq_len"], device: torch.device | None = None
    ) -> Packing:
        """Make one document of each batch row: its real tokens, wherever the padding is.

        Args:
            padding_mask: True at tokens.
            device: That of the tensors that will be packed; that of the mask if None.
        """
        return _of_padded(padding_mask, padding_mask.device if device is None else device)

    @classmethod
    def of_documents(
        cls,
        begins: Bool[Tensor, "batch seq_len"],
        padding_mask: Bool[Tensor, "batch seq_len"] | None = None,
    ) -> Packing:
        """Make documents of the tokens of each batch row, wherever the padding is.

        Args:
            begins: True at the first token of each document, and so at the first of each row.
            padding_mask: True at tokens; None: everywhere.
        """
        if not may_decide(begins):
            return _of_unknown(
                torch.ones_like(begins) if padding_mask is None else padding_mask, begins
            )
        batch, seq_len = begins.shape
        index = None if padding_mask is None else padding_mask.flatten().nonzero()[:, 0]
        of_tokens = begins.flatten() if index is None else begins.flatten()[index]
        return cls(batch, seq_len, index, _cu_seqlens(of_tokens))

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
def _of_padded(padding_mask: Bool[Tensor, "batch seq_len"], device: torch.device) -> Packing:
    """All layers of a step are handed one mask, and share what is found in it."""
    batch, seq_len = padding_mask.shape
    if may_decide(padding_mask):
        cu_seqlens = F.pad(padding_mask.sum(1).cumsum(0), (1, 0))
        index = padding_mask.flatten().nonzero()[:, 0]
        return Packing(batch, seq_len, index.to(device), cu_seqlens)
    padding_mask = padding_mask.to(device)
    index = _marked_first(padding_mask.flatten())
    # A row without a token is a document too, so that documents have the numbers of their rows.
    ends = padding_mask.sum(1).cumsum(0)
    position = torch.arange(index.shape[0] + 1, device=device)
    # Padding goes along behind all tokens, each position a document of its own.
    behind = torch.minimum(ends[-1:] + position[1:], position[-1:])
    cu_seqlens = torch.cat([position[:1], ends, behind])
    return Packing(batch, seq_len, index, cu_seqlens, padding_mask.flatten()[index])


def _of_unknown(
    padding_mask: Bool[Tensor, "batch seq_len"], begins: Bool[Tensor, "batch seq_len"]
) -> Packing:
    """Pack documents of rows with padding where nobody knows how many tokens there are.

    Padding goes along behind all tokens here, too.
    """
    flat = padding_mask.flatten()
    index = _marked_first(flat)
    is_token = flat[index]
    begins = begins.flatten()[index] | ~is_token
    batch, seq_len = padding_mask.shape
    return Packing(batch, seq_len, index, _cu_seqlens(begins), is_token)


def _cu_seqlens(begins: Bool[Tensor, " total"]) -> CuSeqlens:
    """Return where documents begin, and the total."""
    total = begins.shape[0]
    if may_decide(begins):
        return F.pad(begins.nonzero()[:, 0], (0, 1), value=total)
    # Nor how many documents: those that are not there are empty, and come last.
    position = torch.arange(total + 1, device=begins.device)
    end = position[-1:]  # As a number it would be taken for a constant.
    of_documents = position[:-1] < begins.sum()
    return torch.cat([torch.where(of_documents, _marked_first(begins), end), end])


def _marked_first(marks: Bool[Tensor, " total"]) -> Positions:
    """Return the positions that are marked in ascending order, and then the others.

    It is a stable sort of the marks, which ONNX does not have.
    """
    marked, others = (each.long().cumsum(0) for each in (marks, ~marks))
    place = torch.where(marks, marked, marked[-1:] + others) - 1
    return place.scatter(0, place, torch.arange(marks.shape[0], device=marks.device))
