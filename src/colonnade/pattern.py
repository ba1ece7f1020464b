"""Connectivity patterns: which positions each position reads.

No other file states the index sets S_i: a pattern's masks and index lists follow from its `reads`,
and its closed-form counts are tested against them. The sets are those of Child et al. 2019,
"Generating Long Sequences with Sparse Transformers" (arXiv:1904.10509), sections 4 and 5, with
positions counted from 0.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, TypeVar, get_args, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from colonnade.shapes import Mask, Positions

Part = Literal["merged", "local", "summary"]
Factorized = TypeVar("Factorized", bound="_Factorized")


@runtime_checkable
class HasMask(Protocol):
    """Any connectivity that can draw its own mask, which is all that backend "reference" needs."""

    def mask(self, seq_len: int, num_heads: int) -> Mask:
        """Return one mask for each key/value head, True where the row reads the column."""


class Pattern(ABC):
    """A connectivity pattern S = {S_0, …, S_(n-1)}; position i reads the positions in S_i.

    Patterns are frozen, hashable and picklable. In their methods a `head` is a key/value head.
    """

    causal: bool

    @abstractmethod
    def reads(self, query: Positions, key: Positions, head: int = 0) -> Bool[Tensor, "..."]:
        """Return True where position `query` reads position `key`; the two are broadcast."""

    @abstractmethod
    def num_pairs(self, seq_len: int, head: int = 0) -> int:
        """Return the number of pairs (i, j) with j in S_i, i < `seq_len`, from a closed form.

        Raises:
            TypeError: `seq_len` or `head` is not an integer.
            ValueError: `seq_len` or `head` is below 0.
        """

    def indices(self, i: int, head: int = 0, seq_len: int | None = None) -> list[int]:
        """Return S_i, the positions that position i reads, in ascending order.

        Args:
            i: The reading position, in [0, seq_len).
            head: The key/value head.
            seq_len: Length of the sequence. Causal patterns do not need it.

        Raises:
            TypeError: A count is not an integer.
            ValueError: i lies outside the sequence, or a bidirectional pattern has no `seq_len`.
        """
        check_counts(0, i=i, head=head)
        if seq_len is None and not self.causal:
            raise ValueError(
                f"a bidirectional pattern needs seq_len, got seq_len=None for {self}. "
                "Pass the length of the sequence."
            )
        seq_len = i + 1 if seq_len is None else seq_len
        check_counts(0, seq_len=seq_len)
        if i >= seq_len:
            raise ValueError(f"i must be in [0, seq_len), got i={i} and seq_len={seq_len}.")
        keys = torch.arange(i + 1 if self.causal else seq_len, device="cpu")
        read: list[int] = (
            self.reads(torch.tensor(i, device="cpu"), keys, head).nonzero().flatten().tolist()
        )
        return read

    def mask(self, seq_len: int, num_heads: int = 1) -> Mask:
        """Return the pattern as a dense mask [num_heads, seq_len, seq_len], True where it reads.

        Raises:
            TypeError: A count is not an integer.
            ValueError: `seq_len` is below 0, or `num_heads` below 1.
        """
        check_count("seq_len", seq_len, minimum=0)
        check_count("num_heads", num_heads, minimum=1)
        positions = torch.arange(seq_len)
        return torch.stack([self.reads(positions[:, None], positions, h) for h in range(num_heads)])

    def density(self, seq_len: int, head: int = 0) -> float:
        """Return the share of all pairs that is read: out of n(n+1)/2 if causal, else out of n².

        Raises:
            TypeError: A count is not an integer.
            ValueError: `seq_len` is below 1, or `head` below 0.
        """
        check_count("seq_len", seq_len, minimum=1)
        return self.num_pairs(seq_len, head) / FullPattern(self.causal).num_pairs(seq_len)


class _Factorized(Pattern):
    """A pattern that is the union of two factors, or one of them."""

    part: Part

    def factors(self: Factorized) -> tuple[Factorized, Factorized]:
        """Return (A1, A2), the two factors whose union the merged pattern reads.

        Raises:
            ValueError: This pattern is itself a factor.
        """
        if self.part != "merged":
            raise ValueError(
                f"a pattern has factors only under part='merged', got part={self.part!r}. "
                "It is itself a factor."
            )
        # Frozen dataclasses both.
        return replace(self, part="local"), replace(self, part="summary")  # type: ignore[type-var]

    def _check_part(self) -> None:
        if self.part not in get_args(Part):
            raise ValueError(f"part must be one of {get_args(Part)}, got part={self.part!r}.")


@dataclass(frozen=True)
class FixedPattern(_Factorized):
    """Fixed factorized attention: a query's own block, and `summary` columns of every block.

    With l = `stride` and c = `summary`, block b is [b·l, (b+1)·l), and

        A1_i = {j <= i : j // l = i // l}             part="local"
        A2_i = {j <= i : l - c <= j mod l < l}        part="summary"
        S_i  = A1_i ∪ A2_i                            part="merged"

    For stride 4 and summary 1, row 6 of the merged pattern reads `...####`: the last column of
    block 0, and its own block up to itself.

    With k = `sinks`, every set also holds {j <= i : j < k}, the first k positions of the sequence:
    pretrained models park attention there (Xiao et al. 2023, "Efficient Streaming Language Models
    with Attention Sinks", arXiv:2309.17453). The paper has none.

    Args:
        stride: Length l of a block, in tokens.
        summary: Number c of columns of every block that all later positions may read, in
            [1, stride].
        subblocks: With s sub-blocks, key/value head h reads the columns
            [l - (g+1)·c, l - g·c) of a block, g = h mod s, instead of the last c.
            With fewer key/value heads than sub-blocks, some sub-blocks stay unused.
        part: "merged", or one of the two factors: "local" (A1) or "summary" (A2). Under
            "summary" the rows before the first summary column read nothing.
        causal: False drops the condition `j <= i`, so that a position reads all of its own block
            and the summaries of all blocks.
        sinks: Number k of positions at the start of a sequence that all later positions read, in
            [0, stride - subblocks · summary], so that none of them is a summary too.

    Raises:
        TypeError: A count is not an integer, or `causal` is not a bool.
        ValueError: A count or `part` lies outside its range.
    """

    stride: int
    summary: int
    subblocks: int = 1
    part: Part = "merged"
    causal: bool = True
    sinks: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        check_counts(1, stride=self.stride, subblocks=self.subblocks)
        check_count("summary", self.summary)
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
        self._check_part()
        check_flag("causal", self.causal)
        check_count("sinks", self.sinks, minimum=0)
        if self.sinks > (room := self.stride - self.subblocks * self.summary):
            raise ValueError(
                f"sinks must be at most stride - subblocks · summary = {room}, got "
                f"sinks={self.sinks}, stride={self.stride}, subblocks={self.subblocks} and "
                f"summary={self.summary}. A position of block 0 is a sink or a summary."
            )

    def summary_columns(self, head: int = 0) -> range:
        """Return the columns of a block, counted from its start, that are summaries of `head`."""
        stop = self.stride - (head % self.subblocks) * self.summary
        return range(stop - self.summary, stop)

    def reads(self, query: Positions, key: Positions, head: int = 0) -> Bool[Tensor, "..."]:
        """Return True where `key` is in the block of `query`, a summary or a sink; see `part`."""
        columns = self.summary_columns(head)
        offset = key % self.stride
        own = key // self.stride == query // self.stride
        summary = (offset >= columns.start) & (offset < columns.stop)
        read = {"merged": own | summary, "local": own, "summary": summary}[self.part]
        read = read | (key < self.sinks)
        if self.causal:
            return read & (key <= query)
        return read.expand(torch.broadcast_shapes(query.shape, key.shape))

    def num_pairs(self, seq_len: int, head: int = 0) -> int:
        """Return the number of pairs (i, j) with j in S_i, i < `seq_len`, from a closed form.

        The causal merged pattern has m·l(l+1)/2 + c·l·m(m-1)/2 pairs over m >= 1 whole blocks, and
        k·(m-1)·l more with k sinks.
        """
        check_counts(0, seq_len=seq_len, head=head)
        blocks, rest = divmod(seq_len, self.stride)
        full, summaries = FullPattern(self.causal).num_pairs, self._own_summary_pairs
        own = blocks * full(self.stride) + full(rest)
        of_own_block = blocks * summaries(self.stride, head) + summaries(rest, head)
        if self.causal:
            of_other_blocks = self.summary * _sum_of_rows(seq_len, self.stride)
        else:
            in_sequence = blocks * self.summary + self._summaries_within(rest, head)
            of_other_blocks = seq_len * in_sequence - of_own_block
        # Block 0 reads its sinks as its own keys, but under part "summary".
        sinks = self.sinks * max(seq_len - self.stride, 0)
        if self.part == "summary":
            sinks = seq_len * min(seq_len, self.sinks)
            if self.causal:
                sinks = _pairs_of_at_most(self.sinks, seq_len)
        return (
            sinks
            + {
                "merged": own + of_other_blocks,
                "local": own,
                "summary": of_own_block + of_other_blocks,
            }[self.part]
        )

    def _own_summary_pairs(self, length: int, head: int) -> int:
        """Return the number of pairs inside a block of `length` tokens whose key is a summary."""
        summaries = self._summaries_within(length, head)
        if not self.causal:
            return length * summaries
        after_last = max(length - self.summary_columns(head).stop, 0)
        return summaries * (summaries + 1) // 2 + after_last * summaries

    def _summaries_within(self, length: int, head: int) -> int:
        """Return the number of summary columns among the first `length` tokens of a block."""
        return min(max(length - self.summary_columns(head).start, 0), self.summary)

    @staticmethod
    def best_stride(seq_len: int, summary: int) -> int:
        """Return the stride that minimises n·l/2 + c·n²/(2l): sqrt(c·n), rounded, within [c, n].

        For n >= 4,096 and c <= 8 it gives at most 0.5 % more pairs than any other stride.

        Raises:
            TypeError: A count is not an integer.
            ValueError: A count is below 1, or `summary` is larger than `seq_len`.
        """
        check_counts(1, seq_len=seq_len, summary=summary)
        if summary > seq_len:
            raise ValueError(
                f"summary must be at most seq_len, got summary={summary} and seq_len={seq_len}."
            )
        return min(max(round(math.sqrt(summary * seq_len)), summary), seq_len)


@dataclass(frozen=True)
class StridedPattern(_Factorized):
    """Strided factorized attention: the last positions, and every `stride`-th one before them.

    With l = `stride`,

        A1_i = {max(0, i - l), …, i}            part="local": l + 1 keys, as printed in the paper
        A2_i = {j <= i : (i - j) mod l = 0}     part="summary"
        S_i  = A1_i ∪ A2_i                      part="merged"

    The union consists of two disjoint sets, {i-l+1, …, i} and {i-l, i-2l, …}. The pattern suits
    data whose rows have a natural length, such as images; for text the paper has `FixedPattern`.

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
        self._check_part()

    def reads(self, query: Positions, key: Positions, head: int = 0) -> Bool[Tensor, "..."]:
        """Return True where `key` is in the window or in the column of `query`, as `part` says."""
        local, column = key >= query - self.stride, key % self.stride == query % self.stride
        read = {"merged": local | column, "local": local, "summary": column}[self.part]
        return read & (key <= query)

    def num_pairs(self, seq_len: int, head: int = 0) -> int:
        """Return the number of pairs (i, j) with j in S_i, i < `seq_len`, from a closed form.

        Merged, these are the pairs of a window of l keys, and for n = m·l another l·m(m-1)/2.
        """
        check_counts(0, seq_len=seq_len, head=head)
        above = _sum_of_rows(seq_len, self.stride)
        return {
            "merged": _pairs_of_at_most(self.stride, seq_len) + above,
            "local": _pairs_of_at_most(self.stride + 1, seq_len),
            "summary": seq_len + above,
        }[self.part]


@dataclass(frozen=True)
class LocalPattern(Pattern):
    """Attention within a window of `window` keys, S_i = {j : i - window < j <= i}.

    With k = `sinks`, every set also holds {j <= i : j < k}: a window with attention sinks (Xiao et
    al. 2023, arXiv:2309.17453).

    Args:
        window: Number of positions that are read, the reading one included.
        sinks: Number k of positions at the start of a sequence that all later positions read.

    Raises:
        TypeError: A count is not an integer.
        ValueError: `window` is below 1, or `sinks` below 0.
    """

    window: int
    sinks: int = field(default=0, kw_only=True)

    causal = True

    def __post_init__(self) -> None:
        check_count("window", self.window, minimum=1)
        check_count("sinks", self.sinks, minimum=0)

    def reads(self, query: Positions, key: Positions, head: int = 0) -> Bool[Tensor, "..."]:
        """Return True where query - window < key <= query, or `key` is a sink before that."""
        return (key <= query) & ((key > query - self.window) | (key < self.sinks))

    def num_pairs(self, seq_len: int, head: int = 0) -> int:
        """Return m(m+1)/2 + (n-m)·window for n = `seq_len` and m = min(n, window), without sinks.

        The t-th row behind the window, which loses sight of t positions, reads min(t, sinks) more.
        """
        check_counts(0, seq_len=seq_len, head=head)
        behind = max(seq_len - self.window, 0)
        return _pairs_of_at_most(self.window, seq_len) + _pairs_of_at_most(self.sinks, behind)


@dataclass(frozen=True)
class FullPattern(Pattern):
    """Full attention, S_i = {j : j <= i}, or all positions if not `causal`.

    Raises:
        TypeError: `causal` is not a bool.
    """

    causal: bool = True

    def __post_init__(self) -> None:
        check_flag("causal", self.causal)

    def reads(self, query: Positions, key: Positions, head: int = 0) -> Bool[Tensor, "..."]:
        """Return True where key <= query, or everywhere if not `causal`."""
        read = key <= query
        return read if self.causal else torch.ones_like(read)

    def num_pairs(self, seq_len: int, head: int = 0) -> int:
        """Return n(n+1)/2, or n² if not `causal`, for n = `seq_len`."""
        check_counts(0, seq_len=seq_len, head=head)
        return seq_len * (seq_len + 1) // 2 if self.causal else seq_len * seq_len

    def as_fixed(self, stride: int) -> FixedPattern:
        """Return a fixed pattern with the same sets: every column of its blocks is a summary."""
        return FixedPattern(stride, stride, causal=self.causal)


def check_count(name: str, value: int, minimum: int | None = None) -> None:
    """Refuse anything but an integer of at least `minimum`; a bool is not a count.

    A length that a compiler leaves open is one.
    """
    if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
        raise TypeError(f"{name} must be an int, got {name}={value!r}.")
    if minimum is not None and value < minimum:
        raise ValueError(f"{name} must be at least {minimum}, got {name}={value}.")


def check_counts(minimum: int, **counts: int) -> None:
    """Refuse anything but integers of at least `minimum`, named as the arguments that they are."""
    for name, count in counts.items():
        check_count(name, count, minimum)


def check_multiple(name: str, value: int, of: str, divisor: int) -> None:
    """Refuse a `value` that is not a multiple of `divisor`, the value of `of`."""
    if value % divisor != 0:
        raise ValueError(
            f"{name} must be a multiple of {of}, got {name}={value} and {of}={divisor}; "
            f"{name}={value - value % divisor + divisor} would be."
        )


def check_flag(name: str, value: bool) -> None:
    """Refuse anything but a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be a bool, got {name}={value!r}.")


def _pairs_of_at_most(most: int, seq_len: int) -> int:
    """Return the sum of min(i + 1, `most`) over i < `seq_len`: rows that grow to `most` keys."""
    growing = min(seq_len, most)
    return growing * (growing + 1) // 2 + (seq_len - growing) * most


def _sum_of_rows(seq_len: int, stride: int) -> int:
    """Return the sum of i // stride over i < `seq_len`: l·m(m-1)/2 for m whole rows."""
    rows, rest = divmod(seq_len, stride)
    return stride * rows * (rows - 1) // 2 + rest * rows
