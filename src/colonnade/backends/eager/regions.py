"""The regions that a query of a strided or local pattern reads: its window, its column and sinks.

Each region is one dense product over lines of keys, see `windowed`, and has the same methods.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional as F

from colonnade.backends.dropout import Dropout, factors


class Keys(NamedTuple):
    """A tensor over keys: in lines […, lines, width, D], and once more of the sinks alone.

    Attributes:
        lines: The keys of the tail, laid out in lines.
        sinks: […, sinks, D], the first keys of the sequence.
    """

    lines: Tensor
    sinks: Tensor


@runtime_checkable
class Region(Protocol):
    """Some of the keys that queries read, as one dense product."""

    num_keys: int
    visible: Tensor

    def products(self, q: Tensor, k: Keys) -> Tensor:
        """q kᵀ for every key, visible or not: […, q_lines, q_columns, keys]."""

    def weigh(self, weights: Tensor, v: Keys) -> Tensor:
        """The keys' values, weighted for each query: […, q_lines, q_columns, D]."""

    def spread(self, weights: Tensor, x: Tensor, into: Keys) -> None:
        """Add the queries' x, weighted for each key, to the keys."""

    def factors(
        self, dropout: Dropout, row: Tensor, head: Tensor, query: Tensor, position: Keys
    ) -> Tensor:
        """The factors of the weights, given the positions of the keys, D = 1."""

    def reaches(self, bad: Keys) -> Tensor:
        """Mark the queries that read a marked key, D = 1."""


class Window:
    """The line above and the own line: [above ; own], 2·width keys for each query."""

    def __init__(self, q_lines: int, q_columns: int, real: Tensor, as_printed: bool) -> None:
        self.q_lines = q_lines
        self.q_columns = q_columns
        self.as_printed = as_printed
        width = real.shape[-2]
        self.num_keys = 2 * width
        column = torch.arange(width, device=real.device)
        q_column = column[width - q_columns :, None]
        itself, own, above = column == q_column, column <= q_column, column > q_column
        if as_printed:
            above = above | itself
        band = torch.cat([above, own], -1)
        # Padding in front reads itself, so that no softmax is empty.
        always = torch.cat([torch.zeros_like(itself), itself], -1)
        self.visible = band & self._keys(real)[..., 0][..., None, :] | always

    def products(self, q: Tensor, k: Keys) -> Tensor:
        """q kᵀ for the keys of both lines: […, q_lines, q_columns, 2·width]."""
        return q @ self._keys(k.lines).mT

    def weigh(self, weights: Tensor, v: Keys) -> Tensor:
        """The values of both lines, weighted for each query."""
        return weights @ self._keys(v.lines)

    def spread(self, weights: Tensor, x: Tensor, into: Keys) -> None:
        """Add the queries' x, weighted for each key of both lines."""
        above, own = (weights.mT @ x).chunk(2, -2)
        lines = into.lines
        first = lines.shape[-3] - self.q_lines
        lines[..., first:, :, :] += own
        # What would lie above the first line of keys has no weight.
        hidden = 1 if first == 0 else 0
        lines[..., first - 1 + hidden : lines.shape[-3] - 1, :, :] += above[..., hidden:, :, :]

    def factors(
        self, dropout: Dropout, row: Tensor, head: Tensor, query: Tensor, position: Keys
    ) -> Tensor:
        """The factors of the weights of both lines."""
        return factors(dropout, row, head, query, self._keys(position.lines)[None, None, ..., 0])

    def reaches(self, bad: Keys) -> Tensor:
        """Mark the queries whose window holds a marked key, by sums along lines."""
        above, own = self._keys(bad.lines.long()).chunk(2, -2)
        to_the_right = above.flip(-2).cumsum(-2).flip(-2)
        if not self.as_printed:
            to_the_right = to_the_right - above
        reached = (own.cumsum(-2) + to_the_right) > 0
        return reached[..., reached.shape[-2] - self.q_columns :, :]

    def _keys(self, lines: Tensor) -> Tensor:
        """[…, lines, width, D] as […, q_lines, 2·width, D], for each line of queries."""
        first, stop = lines.shape[-3] - self.q_lines, lines.shape[-3]
        above = F.pad(lines, (0, 0, 0, 0, 1, 0))[..., first:stop, :, :]
        return torch.cat([above, lines[..., first:, :, :]], -2)


class Column:
    """The keys above a query, one for each line; `with_itself`, its own position too."""

    def __init__(self, q_lines: int, q_columns: int, real: Tensor, with_itself: bool) -> None:
        self.q_lines = q_lines
        self.first_column = real.shape[-2] - q_columns
        lines = self.num_keys = real.shape[-3]
        line = torch.arange(lines, device=real.device)
        q_line = line[lines - q_lines :, None]
        above = (line < q_line)[:, None] & self._under(real)[..., 0].mT
        self.visible = above | ((line == q_line) & with_itself)[:, None]

    def products(self, q: Tensor, k: Keys) -> Tensor:
        """q kᵀ for every line, above or not: […, q_lines, q_columns, lines]."""
        return (q.transpose(-3, -2) @ self._under(k.lines).transpose(-3, -2).mT).transpose(-3, -2)

    def weigh(self, weights: Tensor, v: Keys) -> Tensor:
        """The values of the column, weighted for each query."""
        return (weights.transpose(-3, -2) @ self._under(v.lines).transpose(-3, -2)).transpose(
            -3, -2
        )

    def spread(self, weights: Tensor, x: Tensor, into: Keys) -> None:
        """Add the queries' x, weighted for each key of their column."""
        spread = weights.transpose(-3, -2).mT @ x.transpose(-3, -2)
        self._under(into.lines).add_(spread.transpose(-3, -2))

    def factors(
        self, dropout: Dropout, row: Tensor, head: Tensor, query: Tensor, position: Keys
    ) -> Tensor:
        """The factors of the weights of the column."""
        above = self._under(position.lines)[..., 0].mT
        return factors(dropout, row, head, query.mT, above[None, None]).transpose(-3, -2)

    def reaches(self, bad: Keys) -> Tensor:
        """Mark the queries whose column holds a marked key, or theirs, by sums down the lines."""
        counts = self._under(bad.lines).long().cumsum(-3)
        return counts[..., self.num_keys - self.q_lines :, :, :] > 0

    def _under(self, lines: Tensor) -> Tensor:
        """The columns of […, lines, width, D] that hold queries."""
        return lines[..., self.first_column :, :]


class Sinks:
    """The first keys of the sequence, for queries whose window has left them."""

    def __init__(self, position: Tensor, sinks: int, window: int) -> None:
        self.num_keys = sinks
        self.visible = torch.arange(sinks, device=position.device) <= position - window

    def products(self, q: Tensor, k: Keys) -> Tensor:
        """q kᵀ for every sink, left or not: […, q_lines, q_columns, sinks]."""
        return q @ k.sinks[..., None, :, :].mT

    def weigh(self, weights: Tensor, v: Keys) -> Tensor:
        """The values of the sinks, weighted for each query."""
        return weights @ v.sinks[..., None, :, :]

    def spread(self, weights: Tensor, x: Tensor, into: Keys) -> None:
        """Add the queries' x, weighted for each sink."""
        into.sinks.add_((weights.mT @ x).sum(-3))

    def factors(
        self, dropout: Dropout, row: Tensor, head: Tensor, query: Tensor, position: Keys
    ) -> Tensor:
        """The factors of the weights of the sinks."""
        return factors(dropout, row, head, query, position.sinks[None, None, None, :, 0])

    def reaches(self, bad: Keys) -> Tensor:
        """Mark the queries whose window has left a marked sink."""
        return (self.visible & bad.sinks[..., None, None, :, 0]).any(-1, keepdim=True)
