"""The tile sizes of each kernel, and the number of warps that work on a tile.

A tile that is too large for the registers of a processor spills them to memory, which costs more
than a larger tile saves. `make gpu-code` compiles every row for the devices in `CHECKED`, and holds
it to the bounds of `bench.machine_code`; what no row fits is declined.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import torch

Kernel = Literal["forward", "query", "slots", "own"]
"""The forward, and the gradients of queries, of slots and of own keys."""
KERNELS: tuple[Kernel, ...] = ("forward", "query", "slots", "own")
Precision = Literal["half", "tf32", "ieee"]
"""The products: bfloat16 or float16, float32 by TF32 matrix instructions, or plain float32."""
Words = Literal["none", "quads", "each"]
"""The way to compute random words for dropout: none, four keys at once, or each key alone.

In the last case they take more registers.
"""
DROPS: tuple[Words, ...] = ("quads", "each")

WIDEST = 256
"""The most entries that a query or a value may have."""

CHECKED = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120", "gfx942", "gfx950")
"""Devices whose machine code is checked; "auto" takes the kernels on these."""
# Matrix instructions of four warps, which read shared memory, of which there is more.
WARP_GROUPS = ("sm_90", "sm_100", "sm_103")
# Warps of 64, little shared memory, and matrix instructions for float32 too.
AMD = ("gfx942", "gfx950")


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


class Row(NamedTuple):
    """A row of the table: where it holds, and the configuration.

    Attributes:
        precision: What is multiplied.
        kernels: Which kernels.
        widest: It holds for widths up to this; the larger of the two counts.
        configuration: What they are launched with.
        on: The devices; none: all.
        words: How words that drop weights are computed where it holds; none: in any way.
    """

    precision: Precision
    kernels: tuple[Kernel, ...]
    widest: int
    configuration: Configuration
    on: tuple[str, ...] = ()
    words: tuple[Words, ...] = ()


FORWARD: tuple[Kernel, ...] = ("forward",)
QUERY: tuple[Kernel, ...] = ("query",)
SLOTS: tuple[Kernel, ...] = ("slots",)
OWN: tuple[Kernel, ...] = ("own",)
KEYS: tuple[Kernel, ...] = ("slots", "own")
BACKWARD: tuple[Kernel, ...] = ("query", "slots", "own")

TABLE: tuple[Row, ...] = (
    # The first row that holds counts. An interpreter has no registers.
    Row("ieee", KERNELS, 256, Configuration(64, 32, 4, 1), ("cpu",)),
    # One product of 64 queries is all that an AMD processor's 64 KiB and 512 registers hold.
    Row("half", FORWARD, 64, Configuration(128, 64, 4, 1), AMD),
    Row("half", FORWARD, 128, Configuration(64, 64, 4, 1), AMD),
    Row("half", ("query", "own"), 64, Configuration(64, 64, 4, 1), AMD),
    Row("half", SLOTS, 64, Configuration(128, 64, 4, 1), AMD),
    Row("half", BACKWARD, 128, Configuration(64, 32, 4, 1), AMD),
    Row("half", KERNELS, 256, Configuration(32, 32, 4, 1), AMD),
    Row("ieee", KERNELS, 64, Configuration(32, 16, 8, 1), AMD, ("each",)),
    Row("ieee", KERNELS, 64, Configuration(64, 32, 8, 1), AMD),
    Row("ieee", FORWARD, 128, Configuration(16, 16, 8, 1), AMD, ("each",)),
    Row("ieee", FORWARD, 128, Configuration(32, 32, 8, 1), AMD),
    Row("ieee", BACKWARD, 128, Configuration(16, 16, 8, 1), AMD),
    Row("ieee", QUERY, 256, Configuration(32, 16, 4, 1), AMD),
    Row("ieee", KERNELS, 256, Configuration(16, 16, 8, 1), AMD),
    # A row of 128 queries in one tile. Masks of widths that are no powers of two take registers.
    Row("half", FORWARD, 64, Configuration(128, 64, 8, 2)),
    Row("half", FORWARD, 128, Configuration(128, 32, 8, 2), ("sm_120",)),
    Row("half", FORWARD, 128, Configuration(128, 64, 8, 2)),
    # The output takes half of the registers.
    Row("half", FORWARD, 256, Configuration(64, 32, 8, 2), WARP_GROUPS),
    Row("half", FORWARD, 256, Configuration(16, 32, 8, 1), words=DROPS),
    Row("half", FORWARD, 256, Configuration(32, 32, 8, 1)),
    # Queries, outputs and both their gradients stay in registers.
    Row("half", QUERY, 64, Configuration(64, 64, 4, 2)),
    Row("half", QUERY, 128, Configuration(64, 64, 8, 2)),
    # Four words for each weight take registers.
    Row("half", SLOTS, 64, Configuration(128, 64, 8, 1), ("sm_90",), ("each",)),
    Row("half", OWN, 128, Configuration(64, 32, 8, 2), ("sm_90",), ("each",)),
    # Two sums of all slots stay in registers, and queries and their gradients pass by: ahead of
    # their use where shared memory has room.
    Row("half", SLOTS, 64, Configuration(128, 64, 8, 2), WARP_GROUPS),
    Row("half", SLOTS, 64, Configuration(128, 64, 8, 1)),
    Row("half", SLOTS, 128, Configuration(64, 32, 8, 2)),
    Row("half", OWN, 128, Configuration(64, 64, 8, 2), WARP_GROUPS),
    Row("half", OWN, 128, Configuration(64, 64, 8, 1)),
    Row("half", BACKWARD, 256, Configuration(32, 32, 8, 1)),
    # Elements are twice as large.
    Row("tf32", FORWARD, 64, Configuration(64, 32, 4, 2)),
    Row("tf32", FORWARD, 128, Configuration(64, 32, 8, 2), WARP_GROUPS),
    Row("tf32", FORWARD, 128, Configuration(32, 32, 8, 2)),
    Row("tf32", FORWARD, 256, Configuration(16, 16, 8, 1)),
    Row("tf32", QUERY, 64, Configuration(64, 32, 8, 2)),
    Row("tf32", QUERY, 128, Configuration(32, 32, 8, 1)),
    Row("tf32", QUERY, 256, Configuration(32, 16, 8, 1)),
    Row("tf32", KEYS, 64, Configuration(64, 32, 8, 2)),
    Row("tf32", KEYS, 128, Configuration(32, 32, 8, 1)),
    Row("tf32", KEYS, 256, Configuration(16, 16, 8, 1)),
    # Without matrix instructions a thread holds whole rows of both operands. At width 256 the
    # forward spills whatever its tile is.
    Row("ieee", FORWARD, 64, Configuration(64, 16, 8, 2)),
    Row("ieee", FORWARD, 128, Configuration(16, 16, 8, 2)),
    Row("ieee", QUERY, 64, Configuration(64, 32, 8, 2)),
    Row("ieee", QUERY, 128, Configuration(16, 16, 8, 1)),
    Row("ieee", KEYS, 64, Configuration(32, 32, 8, 1)),
    Row("ieee", KEYS, 128, Configuration(32, 16, 8, 1)),
)


def precision_of(dtype: torch.dtype, device: torch.device) -> Precision:
    """Return what is multiplied in a type: of float32, what PyTorch is asked for."""
    if dtype != torch.float32:
        return "half"
    asked = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if asked == "tf32" and device.type == "cuda" and not torch.version.hip else "ieee"


@functools.cache
def name_of(device: torch.device) -> str:
    """Return the name of a device as in `CHECKED`; of one that is no GPU of these, its type."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return str(properties.gcnArchName.split(":")[0])
    return f"sm_{properties.major}{properties.minor}"


def reason_no_tile_fits(dtype: torch.dtype, width: int, device: torch.device) -> str | None:
    """Return why no row of the table fits, as a clause, or None if each kernel has one."""
    target, precision = name_of(device), precision_of(dtype, device)
    if all(_row(kernel, precision, width, target) for kernel in KERNELS):
        return None
    of = f"{dtype} in matrix instructions of TF32" if precision == "tf32" else str(dtype)
    return f"has no tile for {of} at a width of {width} that fits the registers of {target}"


def configuration(
    kernel: Kernel,
    precision: Precision,
    width: int,
    target: str,
    longest: int,
    words: Words = "none",
) -> Configuration | None:
    """Return the configuration of a kernel, or None if no tile of it fits.

    Args:
        kernel: Which one.
        precision: What is multiplied.
        width: The larger of the two widths.
        target: Name of the device as in `CHECKED`.
        longest: Most queries of a row of the table; a tile of more would be empty in part.
        words: How words that drop weights are computed.
    """
    row = _row(kernel, precision, width, target, words)
    if row is None:
        return None
    return row.configuration._replace(queries=min(row.configuration.queries, power_of_two(longest)))


@functools.lru_cache
def _row(
    kernel: Kernel, precision: Precision, width: int, target: str, words: Words = "none"
) -> Row | None:
    for row in TABLE:
        holds = row.precision == precision and kernel in row.kernels and width <= row.widest
        here = (not row.on or target in row.on) and (not row.words or words in row.words)
        if holds and here:
            return row
    return None


def power_of_two(size: int) -> int:
    """Return the next power of two; at least 16, the least that a matrix instruction takes."""
    return max(16, 1 << (size - 1).bit_length())
