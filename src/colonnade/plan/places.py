"""The places of queries and keys: their positions in the sequence that they belong to.

A kernel that drops weights needs them, because a weight is dropped or kept by where it is, and not
by where a chunk, a pack or a cache has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Int
from torch import Tensor

from colonnade.pattern import FixedPattern, Pattern
from colonnade.plan.kept import columns_read, kept_positions, num_positions
from colonnade.shapes import Gather, Positions


@dataclass(frozen=True, eq=False)
class Places:
    """The places of all queries and keys of a call.

    Attributes:
        document: [q_len], the number of the document of each query; 0 if nothing is packed.
        query: [q_len], the position of each query in its sequence.
        key: [kv_heads or 1, kv_len], the position of each key in its sequence.
    """

    document: Positions
    query: Positions
    key: Int[Tensor, "kv_heads_or_1 kv_len"]

    def slots(self, gather: Gather) -> Gather:
        """Return the position of the key that fills each slot of a plan."""
        return self.key.expand(gather.shape[0], -1).gather(1, gather)


def last_places(q_len: int, kv_len: int) -> Places:
    """Return the places of the last `q_len` of `kv_len` positions, which all have their keys."""
    query = torch.arange(kv_len - q_len, kv_len, device="cpu")
    return Places(torch.zeros_like(query), query, torch.arange(kv_len, device="cpu")[None])


def kept_places(pattern: Pattern, q_len: int, kv_len: int, begin: int, num_kv_heads: int) -> Places:
    """Return the places of the last `q_len` positions, where only slots are left before `begin`."""
    seq_len = num_positions(pattern, kv_len, begin)
    query = torch.arange(seq_len - q_len, seq_len, device="cpu")
    key = kept_positions(pattern, seq_len, begin, num_kv_heads)
    return Places(torch.zeros_like(query), query, key)


def packed_places(lengths: Int[Tensor, " documents"], numbers: Int[Tensor, " documents"]) -> Places:
    """Return the places of documents that lie one after the other, with these numbers."""
    begin = (lengths.cumsum(0) - lengths).repeat_interleave(lengths)
    position = torch.arange(len(begin), device="cpu") - begin
    return Places(numbers.repeat_interleave(lengths), position, position[None])


def lie_in_quads(pattern: FixedPattern) -> bool:
    """Whether keys lie in quads wherever a plan of the pattern reads them.

    A quad is four keys that follow one another, of which the first is at a multiple of 4. The own
    keys of a row then are quads from the first one on, and so are its slots, as far as they are
    read; the last quad may be cut short.
    """
    return all(size % 4 == 0 for size in (pattern.stride, columns_read(pattern), pattern.sinks))
