"""Draw a pattern as characters or as an image, a training run as a loss curve, and shares.

The images need matplotlib, which the extra "plot" installs; the picture in characters does not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from colonnade.pattern import Pattern

READ, NOT_READ = "█", "·"
HIGHLIGHT, ROW = "#d1495b", "#f6c9cf"
COLOR = "#2e6f95"


def pattern_text(pattern: Pattern, seq_len: int, head: int = 0, row: int | None = None) -> str:
    """Return the mask of one head as lines of characters, queries down and keys across.

    Args:
        pattern: The pattern to draw.
        seq_len: Number of positions.
        head: The key/value head.
        row: A query position to mark with an arrow and its number of keys.

    Raises:
        TypeError: `seq_len` is not an integer.
        ValueError: `row` lies outside [0, seq_len).
    """
    _check_row(row, seq_len)
    mask = pattern.mask(seq_len, head + 1)[head].tolist()
    lines = ["".join(READ if read else NOT_READ for read in line) for line in mask]
    if row is not None:
        lines[row] += f" ← {row} reads {sum(mask[row])} of {row + 1 if pattern.causal else seq_len}"
    return "\n".join(lines)


def draw_pattern(
    pattern: Pattern, seq_len: int, path: Path, num_heads: int = 1, row: int | None = None
) -> None:
    """Write the masks of `num_heads` key/value heads, side by side, to an image file.

    Args:
        pattern: The pattern to draw.
        seq_len: Number of positions.
        path: The file; its ending chooses the format, such as .png or .svg.
        num_heads: Number of key/value heads.
        row: A query position to highlight.

    Raises:
        TypeError: `seq_len` or `num_heads` is not an integer.
        ValueError: `row` lies outside [0, seq_len), or matplotlib does not know the file's ending.
        OSError: The file cannot be written.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    _check_row(row, seq_len)
    figure = Figure(figsize=(4.2 * num_heads, 4.6), layout="constrained")
    # 0 is not read and 1 is read; in the highlighted row 2 is not read and 3 is read.
    colors = ListedColormap(["#f4f4f2", COLOR, ROW, HIGHLIGHT])
    shades = pattern.mask(seq_len, num_heads).byte()
    if row is not None:
        shades[:, row] += 2
    for head in range(num_heads):
        axes = figure.add_subplot(1, num_heads, head + 1)
        axes.imshow(shades[head].tolist(), cmap=colors, vmin=0, vmax=3, interpolation="nearest")
        if seq_len <= 64:
            edges = [position - 0.5 for position in range(1, seq_len)]
            axes.hlines(edges, -0.5, seq_len - 0.5, color="white", linewidth=0.4)
            axes.vlines(edges, -0.5, seq_len - 0.5, color="white", linewidth=0.4)
        axes.tick_params(labelsize=8)
        axes.set(xlabel="key position", ylabel="query position" if head == 0 else "")
        if num_heads > 1:
            axes.set_title(f"head {head}", fontsize=10)
    figure.suptitle(
        f"{pattern}\n{pattern.num_pairs(seq_len):,} pairs, {pattern.density(seq_len):.1%}",
        fontsize=8,
    )
    figure.savefig(path, dpi=150, bbox_inches="tight")


def draw_loss(
    steps: Sequence[int], bits_per_byte: Sequence[float], path: Path, held_out: float | None = None
) -> None:
    """Write the curve of a training loss, in bits per byte over steps, to an image file.

    Args:
        steps: The steps at which the loss was logged.
        bits_per_byte: The training loss at each of these steps.
        path: The file; its ending chooses the format, such as .png or .svg.
        held_out: Loss on validation bytes at the end, drawn as a dashed level.

    Raises:
        ValueError: matplotlib does not know the file's ending.
        OSError: The file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, bits_per_byte, color=COLOR, linewidth=1.5, label="training")
    if held_out is not None:
        axes.axhline(
            held_out,
            color=HIGHLIGHT,
            linestyle="--",
            label=f"validation, at the end: {held_out:.2f}",
        )
    axes.set(xlabel="step", ylabel="bits per byte")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def draw_shares(
    shares: Sequence[Sequence[float] | None],
    rows: Sequence[str],
    columns: Sequence[str],
    marked: Sequence[Sequence[int]],
    label: str,
    title: str,
    path: Path,
) -> None:
    """Write a heat map of shares on a logarithmic scale that begins with 0.1 % or less.

    The colors, those of "cividis", are told apart by everybody, and in gray.

    Args:
        shares: The share in each column of each row, at least 0; None: nothing was measured.
        rows: Names of the rows, from the top.
        columns: Names of the columns.
        marked: The columns of each row that get a frame.
        label: What the shares are of.
        title: What stands above the map.
        path: The file; its ending chooses the format, such as .png or .svg.

    Raises:
        ValueError: matplotlib does not know the file's ending.
        OSError: The file cannot be written.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import PercentFormatter

    least = 1e-3
    figure = Figure(
        figsize=(2.2 + 0.5 * len(columns), 2.2 + 0.22 * len(rows)), layout="constrained"
    )
    axes = figure.add_subplot()
    axes.set_facecolor("#e4e4e1")
    shades = [
        [math.nan] * len(columns) if r is None else [max(x, least) for x in r] for r in shares
    ]
    most = max((x for r in shades for x in r if x > least), default=1.0)
    image = axes.imshow(
        shades, cmap="cividis_r", norm=LogNorm(least, most), aspect="auto", interpolation="nearest"
    )
    for row, chosen in enumerate(marked):
        for column in chosen:
            at = (column - 0.43, row - 0.43)
            axes.add_patch(Rectangle(at, 0.86, 0.86, fill=False, edgecolor=HIGHLIGHT, linewidth=2))
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8 if len(rows) <= 40 else 5)
    axes.set(ylabel="layer")
    axes.set_title(title, fontsize=9)
    bar = figure.colorbar(image, ax=axes, format=PercentFormatter(1, decimals=1))
    bar.set_label(label)
    figure.savefig(path, dpi=150, bbox_inches="tight")


def _check_row(row: int | None, seq_len: int) -> None:
    if row is not None and not 0 <= row < seq_len:
        raise ValueError(f"row must be in [0, seq_len), got row={row} and seq_len={seq_len}.")
