"""What a dense model's layers would keep under other patterns, and which of them to convert to."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from colonnade.cost import num_kept
from colonnade.hf.knapsack import choose
from colonnade.ops.check import check_finite
from colonnade.ops.heads import Patterns, head_groups
from colonnade.pattern import FixedPattern, FullPattern, LocalPattern, Pattern
from colonnade.plot import draw_shares

FULL = FullPattern()
TOLERANCE = 1e-3
"""The change is at most this share above the least possible; a measurement says no more."""
ROOT = "√change"
"""The root of a mean square change, which tables and pictures show."""
PER_TABLE = 12
"""The most candidates side by side; more go into tables below one another."""
WIDTH = 100
"""Of a line of a table, at most."""


@dataclass(frozen=True)
class LayerScore:
    """What one layer would keep of its attention mass, and how its output would change.

    Attributes:
        layer: Number of the layer.
        num_heads: Number of query heads.
        num_kv_heads: Number of key heads.
        window: The layer's own sliding window, which it keeps; None: it reads everything.
        kept: kept[c][h] is the share of mass that the queries of key head h keep under candidate c.
            Empty for a layer with a window, and so is `change`.
        change: The sum of change[c] is the mean square by which candidate c changes the output of
            the layer, relative to the square of that output; change[c][h] is the part of it that
            key head h has.
    """

    layer: int
    num_heads: int
    num_kv_heads: int
    window: int | None
    kept: tuple[tuple[float, ...], ...]
    change: tuple[tuple[float, ...], ...]

    @property
    def own(self) -> Pattern:
        """The pattern of the dense layer."""
        return FULL if self.window is None else LocalPattern(self.window)


@dataclass(frozen=True)
class Suggestion:
    """The scores of all layers, and what to convert; `print` shows it as two tables.

    The first has a line for each candidate, with the mean of `kept_by` over layers, and √change,
    the root of the mean of `change_by` over layers. The second has a line for each layer, with the
    root of each `change_by`, what is kept of its mass under the choice, and the numbers of the
    candidates that are chosen: one for all key heads, or one for each group of them.

    Attributes:
        candidates: The patterns that were measured.
        layers: The scores of each layer that attends, in ascending order.
        patterns: The patterns to convert to, by layer, for `retrofit(model, patterns=…)`: one for
            all key heads, or a tuple whose patterns the key heads share as in `nn.SelfAttention`.
            Layers that stay as they are are not in it.
        seq_len: The length in tokens at which caches are counted.
    """

    candidates: tuple[Pattern, ...]
    layers: tuple[LayerScore, ...]
    seq_len: int
    patterns: Mapping[int, Patterns] = field(default_factory=dict)

    @property
    def share(self) -> float:
        """The cache as a share of the dense model's, in entries over all layers and key heads."""
        found = (self._of_heads(layer) for layer in self.layers)
        return sum(map(sum, map(self._entries, found))) / self._dense

    @property
    def kept(self) -> float:
        """The share of its mass that a query head keeps, the mean over layers without a window."""
        return _mean([self._kept(*of_head) for of_head in self._chosen(per_query=True)])

    @property
    def change(self) -> float:
        """The sum over layers of the mean square by which the output changes, relative to it."""
        return sum(self._change(*of_head) for of_head in self._chosen())

    def kept_by(self, pattern: Pattern, layer: int) -> float:
        """Return the share of mass that a layer keeps under a candidate, the mean over its heads.

        Raises:
            ValueError: The pattern is no candidate, or there is no such layer without a window.
        """
        return _mean(self._layer(pattern, layer).kept[self.candidates.index(pattern)])

    def change_by(self, pattern: Pattern, layer: int) -> float:
        """Return the mean square by which a candidate changes a layer's output, relative to it.

        Raises:
            ValueError: The pattern is no candidate, or there is no such layer without a window.
        """
        return sum(self._layer(pattern, layer).change[self.candidates.index(pattern)])

    def choose(self, budget: float, per_head: bool = False) -> Suggestion:
        """Return the suggestion for another budget, from the same scores.

        Its `change` is at most 0.1 % above the least that the budget allows.

        Args:
            budget: The most that `share` may be, in (0, 1].
            per_head: Choose a pattern for each key head instead of each layer.

        Raises:
            TypeError: The budget is not a number.
            ValueError: The budget lies outside (0, 1], or below what the candidates can reach.
        """
        check_budget(budget)
        units = [
            (layer, heads)
            for layer in self.layers
            if layer.window is None
            for heads in ([[h] for h in _heads(layer)] if per_head else [list(_heads(layer))])
        ]
        options = (*self.candidates, FULL)
        costs = [[self._cost(pattern, heads) for pattern in options] for _, heads in units]
        losses = [
            [sum(self._change(layer, h, pattern) for h in heads) for pattern in options]
            for layer, heads in units
        ]
        windows = sum(sum(self._entries([s.own] * s.num_kv_heads)) for s in self.layers if s.window)
        least = windows + sum(map(min, costs))
        # The product may lie below an integer that it stands for.
        capacity = math.floor(budget * self._dense * (1 + 1e-12))
        if least > capacity:
            raise ValueError(
                f"budget must be at least {math.ceil(1e4 * least / self._dense) / 1e4:.4f}, the "
                f"smallest share that these candidates reach at seq_len={self.seq_len}, got "
                f"budget={budget}. Use a smaller summary, another stride, or longer sequences."
            )
        chosen = choose(costs, losses, capacity - windows, TOLERANCE)
        of_heads: dict[int, list[Pattern]] = {}
        for (layer, heads), option in zip(units, chosen, strict=True):
            of_heads.setdefault(layer.layer, []).extend([options[option]] * len(heads))
        return replace(
            self,
            patterns={
                layer: as_few_as_possible(patterns)
                for layer, patterns in of_heads.items()
                if set(patterns) != {FULL}
            },
        )

    def plot(self, path: Path | str, per_head: bool = False, change: bool = False) -> None:
        """Write a heat map, layers down and candidates across, to an image file.

        It shows the attention mass that is lost. A frame marks what was chosen.

        Args:
            path: The file; its ending chooses the format, such as .png or .svg.
            per_head: Give every key head a line of its own.
            change: Show √change instead, the root of the mean square by which the output changes,
                as the table does.

        Raises:
            ModuleNotFoundError: matplotlib, which the extra "plot" installs, is missing.
            ValueError: matplotlib does not know the file's ending.
            OSError: The file cannot be written.
        """
        options = (*self.candidates, FULL)
        names, rows, marks = [], [], []
        for layer in self.layers:
            chosen = self._of_heads(layer)
            for heads in [[h] for h in _heads(layer)] if per_head else [list(_heads(layer))]:
                name = f"{layer.layer}.{heads[0]}" if per_head else f"{layer.layer}"
                shown = self._changed if change else self._lost
                found = {chosen[h] for h in heads} if layer.window is None else set()
                names.append(name if layer.window is None else f"{name} (window)")
                rows.append(None if layer.window else [shown(layer, heads, p) for p in options])
                marks.append([index for index, each in enumerate(options) if each in found])
        shares = [self._cost(pattern, [0]) / self.seq_len for pattern in options]
        columns = [f"{_name(p)}: {s:.0%}" for p, s in zip(options, shares, strict=True)]
        label = f"{ROOT} of the layer's output" if change else "attention mass lost"
        draw_shares(rows, names, columns, marks, label, self._summary(), Path(path))

    def __str__(self) -> str:
        count = len(self.candidates)
        shown = [range(i, min(i + PER_TABLE, count)) for i in range(0, count, PER_TABLE)]
        tables = [self._by_candidate(), *map(self._by_layer, shown)]
        notes = [
            f"{ROOT}: the root of the mean square change of a layer's output, in % of it",
            self._summary(),
        ]
        return "\n\n".join("\n".join(lines) for lines in (*tables, notes))

    def _by_candidate(self) -> list[str]:
        """Return the lines of a table of candidates, with means over layers without a window."""
        width = len(str(len(self.candidates)))
        lines = [
            f"{'':>{width}}  {'candidate':<28} {'entries':>8} {'of dense':>9} {'kept':>7} {ROOT:>8}"
        ]
        measured = [layer for layer in self.layers if layer.window is None]
        for number, pattern in enumerate(self.candidates, start=1):
            entries = self._cost(pattern, [0])
            kept = _mean([self.kept_by(pattern, layer.layer) for layer in measured])
            change = _mean([self.change_by(pattern, layer.layer) for layer in measured])
            lines.append(
                f"{number:>{width}}  {_name(pattern):<28} {entries:>8,} "
                f"{entries / self.seq_len:>9.1%} {kept:>7.1%} {math.sqrt(change):>8.1%}"
            )
        return lines

    def _by_layer(self, shown: range) -> list[str]:
        """Return the lines of a table of layers and some candidates; the last says the choice."""
        is_last = shown.stop == len(self.candidates)
        numbers = "".join(f"{index + 1:>6}" for index in shown)
        choice = "     kept  chosen" if is_last else ""
        lines = [f"       {ROOT} under candidate, in %", f"layer{numbers}{choice}"]
        for layer in self.layers:
            if layer.window is not None:
                lines.append(f"{layer.layer:>5}  keeps its window of {layer.window:,}")
                continue
            changes = "".join(_percent(math.sqrt(sum(layer.change[index]))) for index in shown)
            line = f"{layer.layer:>5}{changes}"
            if is_last:
                kept = _mean([self._kept(*found) for found in self._chosen() if found[0] is layer])
                line += f"  {kept:>7.1%}  "
                words = textwrap.wrap(self._numbers(layer), WIDTH - len(line))
                line += f"\n{'':{len(line)}}".join(words)
            lines.append(line)
        return lines

    def _summary(self) -> str:
        """Say in a line what the choice comes to."""
        return (
            f"cache {self.share:.1%} of dense at {self.seq_len:,} tokens, "
            f"{self.kept:.1%} of the attention mass kept"
        )

    def _numbers(self, layer: LayerScore) -> str:
        """Return the number of each candidate that a layer reads, if it takes the suggestion."""
        patterns = self.patterns.get(layer.layer, FULL)
        number = {each: f"{index}" for index, each in enumerate(self.candidates, start=1)}
        each = patterns if isinstance(patterns, tuple) else (patterns,)
        return ", ".join("full" if pattern == FULL else number[pattern] for pattern in each)

    def _layer(self, pattern: Pattern, layer: int) -> LayerScore:
        """Return the scores of a layer that was measured under a pattern."""
        measured = {each.layer: each for each in self.layers if each.window is None}
        if pattern not in self.candidates or layer not in measured:
            raise ValueError(
                f"pattern must be one of candidates and layer one of {list(measured)}, got "
                f"pattern={pattern} and layer={layer}."
            )
        return measured[layer]

    def _chosen(self, per_query: bool = False) -> Iterator[tuple[LayerScore, int, Pattern]]:
        """Yield each key head of a layer without a window, once or for each of its queries."""
        for layer in self.layers:
            times = layer.num_heads // layer.num_kv_heads if per_query else 1
            for head, pattern in enumerate(self._of_heads(layer)):
                if layer.window is None:
                    yield from [(layer, head, pattern)] * times

    def _of_heads(self, layer: LayerScore) -> list[Pattern]:
        """Return the pattern that each key head of a layer is to have."""
        patterns = self.patterns.get(layer.layer, layer.own)
        return [
            group.pattern
            for group in head_groups(patterns, layer.num_kv_heads)
            for _ in range(group.first, group.stop)
        ]

    def _kept(self, layer: LayerScore, head: int, pattern: Pattern) -> float:
        """Return the share that the queries of a key head keep under a pattern."""
        return 1.0 if pattern == FULL else layer.kept[self.candidates.index(pattern)][head]

    def _change(self, layer: LayerScore, head: int, pattern: Pattern) -> float:
        """Return the part that a key head has in the change of a layer under a pattern."""
        return 0.0 if pattern == FULL else layer.change[self.candidates.index(pattern)][head]

    def _lost(self, layer: LayerScore, heads: Sequence[int], pattern: Pattern) -> float:
        return _mean([1 - self._kept(layer, head, pattern) for head in heads])

    def _changed(self, layer: LayerScore, heads: Sequence[int], pattern: Pattern) -> float:
        return math.sqrt(sum(self._change(layer, head, pattern) for head in heads))

    def _entries(self, of_heads: Sequence[Pattern]) -> list[int]:
        """Return the entries that each key head keeps."""
        return [num_kept(pattern, self.seq_len, head) for head, pattern in enumerate(of_heads)]

    def _cost(self, pattern: Pattern, heads: Iterable[int]) -> int:
        """Return the entries that some key heads keep under one pattern."""
        return sum(num_kept(pattern, self.seq_len, head) for head in heads)

    @property
    def _dense(self) -> int:
        """The entries that the dense model keeps; layers with a window keep their window."""
        return sum(sum(self._entries([each.own] * each.num_kv_heads)) for each in self.layers)


def check_budget(budget: float) -> None:
    """Refuse anything but a share of the dense cache."""
    check_finite("budget", budget)
    if not 0 < budget <= 1:
        raise ValueError(
            "budget must be in (0, 1], the share of the dense cache that may be kept, got "
            f"budget={budget}."
        )


def _heads(layer: LayerScore) -> range:
    return range(layer.num_kv_heads)


def _mean(numbers: Sequence[float]) -> float:
    return sum(numbers) / len(numbers) if numbers else math.nan


def _percent(share: float) -> str:
    """Return a share in %, in six characters."""
    return f"{100 * share:>6.1f}" if share < 10 else f"{100 * share:>6.0f}"


def _name(pattern: Pattern) -> str:
    """Name a pattern in a few words."""
    if isinstance(pattern, FixedPattern):
        return f"fixed {pattern.stride}, {pattern.summary}{_and_sinks(pattern.sinks)}"
    if isinstance(pattern, LocalPattern):
        return f"window {pattern.window}{_and_sinks(pattern.sinks)}"
    return "full" if pattern == FULL else str(pattern)


def _and_sinks(sinks: int) -> str:
    return f" + {sinks}" if sinks else ""


def as_few_as_possible(of_heads: Sequence[Pattern]) -> Patterns:
    """Return the shortest tuple that gives each key head its pattern, or a single pattern."""
    for count in range(1, len(of_heads) + 1):
        groups = list(head_groups((FULL,) * count, len(of_heads)))
        patterns = tuple(of_heads[group.first] for group in groups)
        if all({*of_heads[g.first : g.stop]} == {p} for g, p in zip(groups, patterns, strict=True)):
            break
    return patterns if len(patterns) > 1 else patterns[0]
