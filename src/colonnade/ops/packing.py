"""Padded and packed batches: the real tokens of all rows, one document after the other."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F

from colonnade.backends.tracing.memo import remembered
from colonnade.shapes import CuSeqlens, Positions


@dataclass(frozen=True, eq=False)
class Packing:
    """The tokens of a batch [batch, seq_len], and how they fall into documents.

    Attributes:
        batch: Number of batch rows.
        seq_len: Their length, padding included.
        index: Where in the flattened batch each token lies, in order; None: everywhere.
        cu_seqlens: Where documents begin and end among the tokens.
    """

    batch: int
    seq_len: int
    index: Positions | None
    cu_seqlens: CuSeqlens

    @classmethod
    def of_padded(cls, padding_mask: Bool[Tensor, "batch seq_len"]) -> Packing:
        """Make one document of each batch row: its real tokens, wherever the padding is."""
        return _of_padded(padding_mask)

    @classmethod
    def of_documents(cls, document: Positions) -> Packing:
        """Pack rows without padding; a document ends where `document` changes, or its batch row."""
        batch, seq_len = document.shape
        begins = F.pad(document[:, 1:] != document[:, :-1], (1, 0), value=True)
        cu_seqlens = F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=batch * seq_len)
        return cls(batch, seq_len, None, cu_seqlens)

    def pack(self, x: Tensor) -> Tensor:
        """Lay [batch, seq_len, …] out as [total, …]."""
        flat = x.flatten(0, 1)
        return flat if self.index is None else flat[self.index]

    def unpack(self, packed: Tensor) -> Tensor:
        """Lay [total, …] out as [batch, seq_len, …], zero where there is no token."""
        if self.index is not None:
            flat = packed.new_zeros(self.batch * self.seq_len, *packed.shape[1:])
            packed = flat.index_copy(0, self.index, packed)
        unpacked: Tensor = packed.unflatten(0, (self.batch, self.seq_len))
        return unpacked


@remembered
def _of_padded(padding_mask: Bool[Tensor, "batch seq_len"]) -> Packing:
    """All layers of a step are handed one mask, and share what is found in it."""
    index = padding_mask.flatten().nonzero()[:, 0]
    cu_seqlens = F.pad(padding_mask.sum(1).cumsum(0), (1, 0))
    return Packing(padding_mask.shape[0], padding_mask.shape[1], index, cu_seqlens)
