"""Backend "eager": every pattern in plain PyTorch, on any device, in any floating type and width.

    fixed.py     fixed patterns: the plan's rows, tile by tile
    rows.py      what that needs of tiles
    stacked.py   tiles of equal rows, for CPUs
    padded.py    tiles of similar rows, padded, for other devices
    layout.py    which rows are padded together, and where they read and write
    windowed.py  strided and local patterns, in lines as wide as their stride or window
    regions.py   what these read: windows, columns and sinks
    full.py      full patterns, in PyTorch's own kernel where that keeps the contract
    seen.py      queries that read all keys, or marked ones: a decoder's token, static caches

Nothing grows like n². Scores, weights and all gradients are kept in float32 for half-precision
inputs (in float64 for float64); only results are rounded.
"""

from __future__ import annotations

from colonnade.backends.call import Call, Seen
from colonnade.backends.eager import fixed, full, seen, windowed
from colonnade.pattern import FixedPattern, FullPattern, LocalPattern, StridedPattern
from colonnade.shapes import Key, LogSumExp, Output, Query, Value

FULL_TILE = 128
"""Queries of a full pattern that are computed together where it runs as a fixed one."""


def reason_unusable(build: bool = True) -> None:
    """It runs wherever PyTorch does, and has nothing to be built."""


def reason_declined(query: Query, key: Key, value: Value, call: Call) -> str | None:
    """Return why this backend does not take a call, or None if it does."""
    known = FixedPattern | StridedPattern | LocalPattern | FullPattern
    if isinstance(call.keys, Seen) or isinstance(call.pattern, known):
        return None
    return (
        "runs FixedPattern, StridedPattern, LocalPattern and FullPattern only, "
        f"got a {type(call.pattern).__name__}"
    )


def attend(query: Query, key: Key, value: Value, call: Call) -> tuple[Output, LogSumExp | None]:
    """softmax(scale · q kᵀ) v over what is read, and the log of its denominator."""
    pattern = call.pattern
    if isinstance(call.keys, Seen):
        return seen.attend(query, key, value, call.keys, call)
    if isinstance(pattern, StridedPattern | LocalPattern):
        return windowed.attend(query, key, value, pattern, call)
    if isinstance(pattern, FullPattern):
        if full.keeps_the_contract(query, key, value, pattern, call):
            return full.attend(query, key, value, pattern, call), None
        call = call._replace(pattern=pattern.as_fixed(FULL_TILE))
    return fixed.attend(query, key, value, call)
