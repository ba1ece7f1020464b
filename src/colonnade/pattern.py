"""Connectivity patterns: which positions each position reads.

This file is the only statement of the index sets S_i. Everything else, masks and counts included,
follows from a pattern's `reads`. The sets are those of Child et al. 2019, "Generating Long
Sequences with Sparse Transformers" (arXiv:1904.10509), sections 4 and 5, counted from 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar, get_args, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from colonnade.shapes import Mask, Positions

Part = Literal["merged", "local", "summary"]


@runtime_checkable
class HasMask(Protocol):
    """Any connectivity that can draw itself; what backend "reference" asks of a pattern."""

    def mask(self, seq_len: int, num_heads: int) -> Mask:
        """The mask [num_heads, seq_len, seq_len] of the key/value heads, True where it reads."""


class Pattern(ABC):
    """A connectivity pattern S = {S_0, …, S_(n-1)}; position i reads the positions in S_i.

    Patterns are frozen, hashable and picklable. In their methods a `head` is a key/value head.
    """

    causal: bool

    @abstractmethod
    def reads(self, query: Positions, key: Positions, head: int = 0) -> Bool[Tensor, "..."]:
        """Whether position `query` reads position `key`, for every pair that they broadcast to."""

    @abstractmethod
    def num_pairs(self, seq_len: int, head: int = 0) -> int:
        """The number of pairs (i, j) with j in S_i, over a sequence of `seq_len`; closed form."""

    def indices(self, i: int, head: int = 0, seq_len: int | None = None) -> list[int]:
        """S_i in ascending order.

        Args:
            i: The reading position, in [0, seq_len).
            head: The key/value head.
            seq_len: Length of the sequence. A causal pattern does not need it.

        Raises:
            TypeError: A count is not an integer.
            ValueError: i lies outside the sequence, or a bidirectional pattern has no `seq_len`.
        """
        check_count("i", i, minimum=0)
        check_count("head", head, minimum=0)
        if seq_len is None:
            if not self.causal:
                raise ValueError(
                    f"a bidirectional pattern needs seq_len, got seq_len=None for {self}."
                )
            seq_len = i + 1
        check_count("seq_len", seq_len, minimum=0)
        if i >= seq_len:
            raise ValueError(f"i must be in [0, seq_len), got i={i} and seq_len={seq_len}.")
        keys = torch.arange(i + 1 if self.causal else seq_len)
        read: list[int] = self.reads(torch.tensor(i), keys, head).nonzero().flatten().tolist()
        return read

    def mask(self, seq_len: int, num_heads: int = 1) -> Mask:
        """The pattern as a dense mask [num_heads, seq_len, seq_len]; True where it reads."""
        check_count("seq_len", seq_len, minimum=0)
        check_count("num_heads", num_heads, minimum=1)
        positions = torch.arange(seq_len)
        return torch.stack([self.reads(positions[:, None], positions, h) for h in range(num_heads)])

    def density(self, seq_len: int, head: int = 0) -> float:
        """The share of all pairs that is read: of n(n+1)/2 if causal, else of n²."""
        check_count("seq_len", seq_len, minimum=1)
        every = seq_len * (seq_len + 1) // 2 if self.causal else seq_len * seq_len
        return self.num_pairs(seq_len, head) / every


@dataclass(frozen=True)
class FixedPattern(Pattern):
    """Fixed factorized attention: the own block, and `summary` columns of every block.

    With l = `stride` and c = `summary`, block b is [b·l, (b+1)·l), and

        A1_i = {j <= i : j // l = i // l}             part="local"
        A2_i = {j <= i : l - c <= j mod l < l}        part="summary"
        S_i  = A1_i ∪ A2_i                            part="merged"

    For stride 4, summary 1, row 6 of the merged pattern reads `...####`: of block 0 the last
    column, and its own block up to itself.

    Args:
        stride: Length l of a block, in tokens.
        summary: Columns c of every block that all later positions may read, in [1, stride].
        subblocks: With s sub-blocks, key/value head h reads the columns
            [l - (g+1)·c, l - g·c) of a block, g = h mod s, in place of the last c.
            With fewer key/value heads than sub-blocks, some sub-blocks stay unused.
        part: "merged", or one of the two factors: "local" (A1) or "summary" (A2). Under
            "summary" the rows before the first summary column read nothing.
        causal: False drops `j <= i`: the own block in full and the summaries of all blocks.

    Raises:
        TypeError: A count is not an integer, or `causal` is not a bool.
        ValueError: A count or `part` lies outside its range.
    """

    stride: int
    summary: int
    subblocks: int = 1
    part: Part = "merged"
    causal: bool = True

    def __post_init__(self) -> None:
        check_count("stride", self.stride, minimum=1)
        check_count("summary", self.summary)
        check_count("subblocks", self.subblocks, minimum=1)
        if not 1 <= self.summary <= self.stride:
            raise ValueError(
                "summary must be in [1, stride], "
                f"got summary={self.summary} and stride={self.stride}."
            )
        if self.subblocks * self.summary > self.stride:
            raise ValueError(
                "subblocks · summary must be at most stride, got "
                f"subblocks={self.subblocks}, summary={self.summary} and stride={self.stride}."
            )
        _check_part(self.part)
        check_flag("causal", self.causal)

    def summary_columns(self, head: int = 0) -> range:
        """The columns of a block, counted from its start, that are summaries of `head`."""
        stop = self.stride - (head % self.subblocks) * self.summary
        return range(stop - self.summary, stop)

    def reads(self, query: Positions, key: Positions, head: int = 0) -> Bool[Tensor, "..."]:
        """Whether position `query` reads position `key`, for every pair that they broadcast to."""
        columns = self.summary_columns(head)
        offset = key % self.stride
        own = key // self.stride == query // self.stride
        summary = (offset >= columns.start) & (offset < columns.stop)
        if self.part == "local":
            read = own
        elif self.part == "summary":
            read = summary
        else:
            read = own | summary
        if self.causal:
            return read & (key <= query)
        return read.expand(torch.broadcast_shapes(query.shape, key.shape))

    def num_pairs(self, seq_len: int, head: int = 0) -> int:
        """The number of pairs (i, j) with j in S_i, over a sequence of `seq_len`; closed form."""
        check_count("seq_len", seq_len, minimum=0)
        check_count("head", head, minimum=0)
        blocks, rest = divmod(seq_len, self.stride)
        own = blocks * self._own_pairs(self.stride) + self._own_pairs(rest)
        of_own_block = blocks * self._own_summary_pairs(self.stride, head)
        of_own_block += self._own_summary_pairs(rest, head)
        if self.causal:
            of_other_blocks = self.summary * (
                self.stride * blocks * (blocks - 1) // 2 + rest * blocks
            )
        else:
            in_sequence = blocks * self.summary + self._summaries_within(rest, head)
            of_other_blocks = seq_len * in_sequence - of_own_block
        return {
            "merged": own + of_other_blocks,
            "local": own,
            "summary": of_own_block + of_other_blocks,
        }[self.part]

    def _own_pairs(self, length: int) -> int:
        """Pairs inside one block of `length` tokens."""
        return length * (length + 1) // 2 if self.causal else length * length

    def _own_summary_pairs(self, length: int, head: int) -> int:
        """Pairs inside one block of `length` tokens whose key is a summary column."""
        held = self._summaries_within(length, head)
        if not self.causal:
            return length * held
        after_last = max(length - self.summary_columns(head).stop, 0)
        return held * (held + 1) // 2 + after_last * held

    def _summaries_within(self, length: int, head: int) -> int:
        """Summary columns among the first `length` tokens of a block."""
        return min(max(length - self.summary_columns(head).start, 0), self.summary)

    def factors(self) -> tuple[FixedPattern, FixedPattern]:
        """(A1, A2): the two factors whose union the merged pattern reads.

        Raises:
            ValueError: This pattern is itself a factor.
        """
        return _factors(self)

    @staticmethod
    def best_stride(seq_len: int, summary: int) -> int:
        """The stride that minimises n·l/2 + c·n²/(2l): sqrt(c·n), rounded, within [c, n].

        For n >= 4,096 and c <= 8 it is within 0.5 % of the fewest pairs of any stride.

        Raises:
            ValueError: `summary` is larger than `seq_len`.
        """
        check_count("seq_len", seq_len, minimum=1)
        check_count("summary", summary, minimum=1)
        if summary > seq_len:
            raise ValueError(
                f"summary must be at most seq_len, got summary={summary} and seq_len={seq_len}."
            )
        return min(max(round(math.sqrt(summary * seq_len)), summary), seq_len)


@dataclass(frozen=True)
class StridedPattern(Pattern):
    """Strided factorized attention: the last positions, and every `stride`-th one before.

    With l = `stride`,

        A1_i = {max(0, i - l), …, i}            part="local": l + 1 keys, as printed in the paper
        A2_i = {j <= i : (i - j) mod l = 0}     part="summary"
        S_i  = A1_i ∪ A2_i                      part="merged"

    The union is the disjoint {i-l+1, …, i} and {i-l, i-2l, …}. It suits data whose rows have a
    natural length, such as images; the paper has `FixedPattern` for text.

    Args:
        stride: Length l of a row, in tokens.
        part: "merged", or one of the two factors: "local" (A1) or "summary" (A2).

    Raises:
        TypeError: `stride` is not an integer.
        ValueError: `stride` or `part` lies outside its range.
    """

    stride: int
    part: Part = "merged"

    causal = True

    def __post_init__(self) -> None:
        check_count("stride", self.stride, minimum=1)
        _check_part(self.part)

    def reads(self, query: Positions, key: Positions, head: int = 0) -> Bool[Tensor, "..."]:
        """Whether position `query` reads position `key`, for every pair that they broadcast to."""
        local, column = key >= query - self.stride, key % self.stride == query % self.stride
        read = {"merged": local | column, "local": local, "summary": column}[self.part]
        return read & (key <= query)

    def num_pairs(self, seq_len: int, head: int = 0) -> int:
        """The number of pairs (i, j) with j in S_i, over a sequence of `seq_len`; closed form."""
        check_count("seq_len", seq_len, minimum=0)
        check_count("head", head, minimum=0)
        rows, rest = divmod(seq_len, self.stride)
        above = self.stride * rows * (rows - 1) // 2 + rest * rows
        return {
            "merged": _window_pairs(seq_len, self.stride) + above,
            "local": _window_pairs(seq_len, self.stride + 1),
            "summary": seq_len + above,
        }[self.part]

    def factors(self) -> tuple[StridedPattern, StridedPattern]:
        """(A1, A2): the two factors whose union the merged pattern reads.

        Raises:
            ValueError: This pattern is itself a factor.
        """
        return _factors(self)


@dataclass(frozen=True)
class LocalPattern(Pattern):
    """Attention within a window of `window` keys, S_i = {j : i - window < j <= i}.

    Args:
        window: How many of the last positions are read, the reading one included.

    Raises:
        TypeError: `window` is not an integer.
        ValueError: `window` is below 1.
    """

    window: int

    causal = True

    def __post_init__(self) -> None:
        check_count("window", self.window, minimum=1)

    def reads(self, query: Positions, key: Positions, head: int = 0) -> Bool[Tensor, "..."]:
        """Whether position `query` reads position `key`, for every pair that they broadcast to."""
        return (key <= query) & (key > query - self.window)

    def num_pairs(self, seq_len: int, head: int = 0) -> int:
        """m(m+1)/2 + (n-m)·window pairs, m = min(n, window), for a sequence of n = `seq_len`."""
        check_count("seq_len", seq_len, minimum=0)
        check_count("head", head, minimum=0)
        return _window_pairs(seq_len, self.window)


@dataclass(frozen=True)
class FullPattern(Pattern):
    """Full attention, S_i = {j : j <= i}, or all positions if not `causal`."""

    causal: bool = True

    def __post_init__(self) -> None:
        check_flag("causal", self.causal)

    def reads(self, query: Positions, key: Positions, head: int = 0) -> Bool[Tensor, "..."]:
        """Whether position `query` reads position `key`, for every pair that they broadcast to."""
        read = key <= query
        return read if self.causal else torch.ones_like(read)

    def num_pairs(self, seq_len: int, head: int = 0) -> int:
        """n(n+1)/2 pairs, or n² if not causal, for a sequence of n = `seq_len`."""
        check_count("seq_len", seq_len, minimum=0)
        check_count("head", head, minimum=0)
        return seq_len * (seq_len + 1) // 2 if self.causal else seq_len * seq_len

    def as_fixed(self, stride: int) -> FixedPattern:
        """The same sets as a fixed pattern: blocks of any `stride` whose every column is read."""
        return FixedPattern(stride, stride, causal=self.causal)


def check_count(name: str, value: int, minimum: int | None = None) -> None:
    """Refuse anything but an integer of at least `minimum`; a bool is no count."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {name}={value!r}.")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {name}={value}.")


def check_flag(name: str, value: bool) -> None:
    """Refuse anything but a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {name}={value!r}.")


def _check_part(part: str) -> None:
    if part not in get_args(Part):
        raise ValueError(f"part must be one of {get_args(Part)}, got part={part!r}.")


_Factorized = TypeVar("_Factorized", FixedPattern, StridedPattern)


def _factors(pattern: _Factorized) -> tuple[_Factorized, _Factorized]:
    if pattern.part != "merged":
        raise ValueError(f"only part='merged' has factors, got part={pattern.part!r}.")
    return replace(pattern, part="local"), replace(pattern, part="summary")


def _window_pairs(seq_len: int, window: int) -> int:
    """Pairs (i, j) with i - window < j <= i."""
    growing = min(seq_len, window)
    return growing * (growing + 1) // 2 + (seq_len - growing) * window
