"""A sequence laid out in lines as wide as the stride: blocks, and offsets inside them."""

from __future__ import annotations

from typing import TypeVar

from torch import Tensor

from colonnade.shapes import Positions

Length = TypeVar("Length", int, Tensor)


def num_blocks(seq_len: Length, stride: int) -> Length:
    """Return the number of blocks of a sequence, a short last one included."""
    return -(-seq_len // stride)


def block_and_offset(positions: Positions, stride: int) -> tuple[Positions, Positions]:
    """Return (block, offset in the block) of each position."""
    return positions // stride, positions % stride
