"""`show` and `cost`: a pattern's picture, and what it costs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from colonnade.cli.common import (
    app,
    at_least_one,
    flops,
    one_line_for_mistakes,
    percent,
    size,
    table_of,
    times,
)

if TYPE_CHECKING:
    from colonnade.cost import Cost, Sizes


@app.command()
def show(
    stride: Annotated[int, typer.Option(help="Length of a block.")] = 8,
    summary: Annotated[int, typer.Option(help="Summary columns of a block.")] = 2,
    subblocks: Annotated[int, typer.Option(help="Sub-blocks, one a head in turn.")] = 1,
    part: Annotated[str, typer.Option(help="merged, local or summary.")] = "merged",
    causal: Annotated[bool, typer.Option(help="Whether position i reads only up to i.")] = True,
    length: Annotated[int, typer.Option(help="Positions to show.")] = 32,
    heads: Annotated[int, typer.Option(help="Key/value heads to show.")] = 1,
    row: Annotated[int | None, typer.Option(help="Query position to highlight.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="PNG or SVG to write. Default: text, here.")
    ] = None,
) -> None:
    """Show which positions each position reads."""
    with one_line_for_mistakes():
        from colonnade.pattern import FixedPattern

        # Any string may be typed; the pattern is what refuses it.
        pattern = FixedPattern(stride, summary, subblocks, part, causal)  # type: ignore[arg-type]
        at_least_one("length", length)
        at_least_one("heads", heads)
        write = _show_text if out is None else _show_picture
        write(pattern, length, heads, row, out)


def _show_text(pattern: Any, length: int, heads: int, row: int | None, out: Path | None) -> None:
    from colonnade.plot import pattern_text

    for head in range(heads):
        if heads > 1:
            typer.echo(f"head {head}")
        typer.echo(pattern_text(pattern, length, head, row))
    typer.echo(f"{pattern.num_pairs(length):,} pairs, {pattern.density(length):.1%}")


def _show_picture(pattern: Any, length: int, heads: int, row: int | None, out: Path | None) -> None:
    from colonnade.plot import draw_pattern

    assert out is not None
    draw_pattern(pattern, length, out, heads, row)
    typer.echo(f"wrote {out}")


@app.command()
def cost(
    length: Annotated[int, typer.Option(help="Positions n of a sequence.")] = 16384,
    stride: Annotated[int, typer.Option(help="Length l of a block.")] = 128,
    summary: Annotated[int, typer.Option(help="Summary columns c of a block.")] = 8,
    subblocks: Annotated[int, typer.Option(help="Sub-blocks, one a key/value head in turn.")] = 1,
    window: Annotated[
        int | None, typer.Option(help="Of local attention. Default: the stride.")
    ] = None,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key/value heads. Default: as many as query heads.")
    ] = None,
    width: Annotated[int, typer.Option(help="Width of the model: of the values, all heads.")] = 512,
    qk_width: Annotated[
        int | None, typer.Option(help="Width of the queries, all heads. Default: --width.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Layers with this pattern.")] = 1,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="Of the cache: float32, bfloat16, float16 or float64.")
    ] = "float32",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Count what the fixed pattern costs, beside strided, local and full attention.

    All by formulas, so any length is quick. Position i reads its own block up
    to itself, and the summary columns of all earlier blocks:
    (i mod l) + 1 + c · floor(i / l) keys.

    Work of a head is 2 · pairs · (qk_dim + v_dim) FLOP forward, two products,
    and 2 · pairs · (3 · qk_dim + 2 · v_dim) FLOP backward, five products, for
    the scores are computed again. Shown is the sum over heads, layers and
    batch, of attention alone: without projections and softmax.

    The cache is the most keys and values that a decoder has to hold at once:
    of the fixed pattern the open block and c entries of each closed block, so
    at most l + c · (n / l - 1) a key/value head where l divides n.

    The best stride is sqrt(c · n), rounded, which makes the mean number of
    keys, about l / 2 + c · n / (2 · l), smallest.
    """
    with one_line_for_mistakes():
        from colonnade import cost as counting
        from colonnade.pattern import FixedPattern

        at_least_one("length", length)
        pattern = FixedPattern(stride, summary, subblocks)
        sizes = counting.Sizes(
            heads=heads,
            kv_heads=heads if kv_heads is None else kv_heads,
            width=width,
            qk_width=width if qk_width is None else qk_width,
            layers=layers,
            batch=batch,
            dtype=dtype,
        )
        patterns = counting.comparison(pattern, stride if window is None else window, length)
        costs = {name: counting.cost(each, length, sizes) for name, each in patterns.items()}
    if as_json:
        typer.echo(json.dumps(_cost_as_json(length, sizes, patterns, costs)))
        return
    _print_costs(length, sizes, patterns, costs)


def _cost_as_json(
    length: int, sizes: Sizes, patterns: dict[str, Any], costs: dict[str, Cost]
) -> dict[str, Any]:
    return {
        "length": length,
        **asdict(sizes),
        "best_stride": patterns["fixed_at_best_stride"].stride,
        "patterns": {
            name: {
                **asdict(patterns[name]),
                **asdict(found),
                "times_fewer_than_full": found.times_fewer_than(costs["full"]),
                "times_fewer_than_strided": found.times_fewer_than(costs["strided"]),
            }
            for name, found in costs.items()
        },
    }


def _print_costs(
    length: int, sizes: Sizes, patterns: dict[str, Any], costs: dict[str, Cost]
) -> None:
    """Three tables, for one would not fit into 80 columns."""
    fixed, best = patterns["fixed"], patterns["fixed_at_best_stride"]
    names = {
        "fixed": f"fixed, stride {fixed.stride:,}",
        "fixed_at_best_stride": f"fixed, best {best.stride:,}",
        "strided": f"strided, stride {fixed.stride:,}",
        "local": f"local, window {patterns['local'].window:,}",
        "full": "full",
    }
    full, strided = costs["full"], costs["strided"]
    pairs = table_of("pairs", "a head", "of full", "fewer than full")
    work = table_of("work", "forward", "backward", "times strided")
    cache = table_of("cache", "entries a head", "keys and values", "of full")
    for name, cost in costs.items():
        pairs.add_row(
            names[name],
            f"{cost.pairs_per_kv_head[0]:,}",  # Of merged patterns: the same for every head.
            percent(cost.share_of_full),
            times(cost.times_fewer_than(full)),
        )
        work.add_row(
            names[name],
            flops(cost.forward_flops),
            flops(cost.backward_flops),
            times(strided.times_fewer_than(cost)),
        )
        cache.add_row(
            names[name],
            f"{cost.cache_entries:,}",
            size(cost.cache_bytes),
            percent(cost.cache_bytes / full.cache_bytes),
        )
    console = Console(highlight=False)
    console.print(
        f"length {length:,}, summary {fixed.summary:,}, subblocks {fixed.subblocks:,}, "
        f"heads {sizes.heads:,}, kv_heads {sizes.kv_heads:,}, qk_dim {sizes.qk_dim:,}, "
        f"v_dim {sizes.v_dim:,}, layers {sizes.layers:,}, batch {sizes.batch:,}, {sizes.dtype}"
    )
    console.print(pairs, work, cache)
