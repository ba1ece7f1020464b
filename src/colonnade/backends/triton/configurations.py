"""The tile sizes of each kernel, and the number of warps that work on a tile.

A tile that is too large for the registers of a processor spills them to memory, which costs more
than a larger tile saves.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Kernel = Literal["forward", "query", "slots", "own"]
"""The forward, and the gradients of queries, of slots and of own keys."""

WIDEST = 256
"""The most entries that a query or a value may have."""


class Configuration(NamedTuple):
    """Sizes of a tile, and what Triton is told.

    Attributes:
        queries: Queries of a tile.
        keys: Keys or slots of a tile.
        warps: Warps that work on one program.
        stages: Tiles under way at once: that which is multiplied, and those loaded ahead of it.
    """

    queries: int
    keys: int
    warps: int
    stages: int


# By the larger of both widths. Half precision at widths up to 128 spills no register on sm_80,
# sm_90 and sm_100.
_HALF: dict[Kernel, dict[int, Configuration]] = {
    "forward": {
        64: Configuration(128, 64, 8, 2),
        128: Configuration(128, 64, 8, 2),
        256: Configuration(64, 32, 8, 2),
    },
    "query": {
        64: Configuration(64, 64, 4, 2),
        128: Configuration(64, 64, 8, 2),
        256: Configuration(32, 32, 8, 1),
    },
    # It holds two products of all its slots, and loads queries and their gradients.
    "slots": {
        64: Configuration(128, 64, 8, 2),
        128: Configuration(64, 32, 8, 2),
        256: Configuration(32, 32, 8, 1),
    },
    "own": {
        64: Configuration(64, 64, 8, 2),
        128: Configuration(64, 64, 8, 2),
        256: Configuration(32, 32, 8, 1),
    },
}
# Elements are twice as large, and products in IEEE's float32 take no matrix instruction.
_SINGLE: dict[Kernel, dict[int, Configuration]] = {
    "forward": {
        64: Configuration(64, 32, 4, 2),
        128: Configuration(32, 32, 4, 2),
        256: Configuration(16, 32, 4, 1),
    },
    "query": {
        64: Configuration(32, 32, 4, 2),
        128: Configuration(32, 32, 4, 1),
        256: Configuration(16, 16, 4, 1),
    },
    "slots": {
        64: Configuration(32, 32, 4, 2),
        128: Configuration(32, 32, 4, 1),
        256: Configuration(16, 16, 4, 1),
    },
    "own": {
        64: Configuration(32, 32, 4, 2),
        128: Configuration(32, 32, 4, 1),
        256: Configuration(16, 16, 4, 1),
    },
}


def configuration(kernel: Kernel, dtype: torch.dtype, width: int, longest: int) -> Configuration:
    """Return the configuration of a kernel.

    Args:
        kernel: Which one.
        dtype: Type of the inputs.
        width: The larger of the two widths.
        longest: Most queries of a row of the table; a tile of more would be empty in part.
    """
    table = (_SINGLE if dtype == torch.float32 else _HALF)[kernel]
    found = table[min(most for most in table if width <= most)]
    return found._replace(queries=min(found.queries, power_of_two(longest)))


def power_of_two(size: int) -> int:
    """Return the next power of two; at least 16, the least that a matrix instruction takes."""
    return max(16, 1 << (size - 1).bit_length())
