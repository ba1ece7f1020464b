"""Take integers of Python, NumPy and PyTorch, one or several, as Python's."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, SupportsIndex, TypeAlias

Counts: TypeAlias = SupportsIndex | Iterable[SupportsIndex]
"""A number, or several to try."""


def as_int(number: Any) -> int | None:
    """Return an integer of Python, NumPy or PyTorch as an int, or None if it is none; no bool is.

    A tensor of PyTorch with one element is one, as `operator.index` has it.
    """
    # NumPy 2.2, the newest on Python 3.10, takes its bool as an index, and only warns.
    if isinstance(number, bool) or str(getattr(number, "dtype", "")).endswith("bool"):
        return None
    with suppress(TypeError):
        return operator.index(number)
    return None


def as_ints(name: str, counts: Counts) -> list[int]:
    """Return one integer, or several, as a list without repetitions.

    Raises:
        TypeError: It is neither, named as the argument that it is.
    """
    number = as_int(counts)
    if number is not None:
        return [number]
    # Text and dicts can be iterated over as well, and bytes even give integers.
    is_several = not isinstance(counts, str | bytes | bytearray | Mapping)
    each = items(counts) if is_several else None
    numbers = None if each is None else [as_int(count) for count in each]
    if numbers is None or None in numbers:
        raise TypeError(f"{name} must be an int or several, got {name}={counts!r}.")
    return [count for count in dict.fromkeys(numbers) if count is not None]


def items(several: Any) -> list[Any] | None:
    """Return what an iterable gives, or None if it is none, as an array without dimensions."""
    try:
        iterator = iter(several)
    except TypeError:
        return None
    return list(iterator)  # Outside of the try: what a generator raises is its own.
