"""`show` and `cost`: a picture of a pattern, and the work and memory that it needs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from colonnade import cost as counting
from colonnade.cli.common import (
    AsJson,
    KvHeads,
    app,
    flops,
    one_line_for_mistakes,
    percent,
    size,
    table_of,
    times,
)
from colonnade.pattern import FixedPattern, check_count
from colonnade.plot import draw_pattern, pattern_text

Sinks = Annotated[
    int, typer.Option(help="Number of positions at the start that all later ones read.")
]


@app.command()
def show(
    stride: Annotated[int, typer.Option(help="Length of a block.")] = 8,
    summary: Annotated[int, typer.Option(help="Number of summary columns in a block.")] = 2,
    subblocks: Annotated[int, typer.Option(help="Number of sub-blocks; heads take turns.")] = 1,
    sinks: Sinks = 0,
    part: Annotated[str, typer.Option(help="Part of the pattern: merged, local or summary.")] = (
        "merged"
    ),
    causal: Annotated[
        bool, typer.Option(help="Let a position read up to itself; with --no-causal both ways.")
    ] = True,
    length: Annotated[int, typer.Option(help="Number of positions to show.")] = 32,
    heads: Annotated[int, typer.Option(help="Number of key/value heads to show.")] = 1,
    row: Annotated[int | None, typer.Option(help="Query position to highlight.")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="PNG or SVG file to write. Default: print the picture as text."),
    ] = None,
) -> None:
    """Show which positions each position reads."""
    with one_line_for_mistakes():
        # Any string may be typed; the pattern is what refuses it.
        pattern = FixedPattern(stride, summary, subblocks, part, causal, sinks=sinks)  # type: ignore[arg-type]
        check_count("length", length, minimum=1)
        check_count("heads", heads, minimum=1)
        if out is not None:
            draw_pattern(pattern, length, out, heads, row)
            typer.echo(f"wrote {out}")
            return
        pictures = [pattern_text(pattern, length, head, row) for head in range(heads)]
    for head, picture in enumerate(pictures):
        typer.echo(f"head {head}\n{picture}" if heads > 1 else picture)
    typer.echo(f"{pattern.num_pairs(length):,} pairs, {pattern.density(length):.1%}")


@app.command()
def cost(
    length: Annotated[int, typer.Option(help="Number of positions n in a sequence.")] = 16384,
    stride: Annotated[int, typer.Option(help="Length l of a block.")] = 128,
    summary: Annotated[int, typer.Option(help="Number of summary columns c in a block.")] = 8,
    subblocks: Annotated[
        int, typer.Option(help="Number of sub-blocks; key/value heads take turns.")
    ] = 1,
    sinks: Sinks = 0,
    window: Annotated[
        int | None, typer.Option(help="Window of local attention. Default: the stride.")
    ] = None,
    heads: Annotated[int, typer.Option(help="Number of query heads.")] = 8,
    kv_heads: KvHeads = None,
    width: Annotated[
        int, typer.Option(help="Width of the model, and of the values over all heads.")
    ] = 512,
    qk_width: Annotated[
        int | None, typer.Option(help="Width of the queries over all heads. Default: --width.")
    ] = None,
    layers: Annotated[int, typer.Option(help="Number of layers with this pattern.")] = 1,
    batch: Annotated[int, typer.Option(help="Number of sequences in a batch.")] = 1,
    dtype: Annotated[
        str, typer.Option(help="Type of the cache: float32, bfloat16, float16 or float64.")
    ] = "float32",
    as_json: AsJson = False,
) -> None:
    """Count what the fixed pattern costs, next to strided, local and full attention.

    Everything is computed by formulas, so any length is quick. Position i
    reads its own block up to itself, and the summary columns of all earlier
    blocks: (i mod l) + 1 + c · floor(i / l) keys, and the sinks.

    The work of a head is 2 · pairs · (qk_dim + v_dim) FLOP forward, two
    products, and 2 · pairs · (3 · qk_dim + 2 · v_dim) FLOP backward, five
    products, because the scores are computed again. The table shows the sum
    over heads, layers and batch, for attention alone: without projections and
    softmax.

    The cache is the most keys and values that a decoder keeps at once: with
    the fixed pattern the open block and c entries of each closed block, so at
    most l + c · (n / l - 1) for a key/value head where l divides n.

    The best stride is sqrt(c · n), rounded. It minimizes the mean number of
    keys, about l / 2 + c · n / (2 · l).
    """
    with one_line_for_mistakes():
        check_count("length", length, minimum=1)
        pattern = FixedPattern(stride, summary, subblocks, sinks=sinks)
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
        typer.echo(json.dumps(_costs_as_json(length, sizes, patterns, costs)))
    else:
        _print_costs(length, sizes, patterns, costs)


def _costs_as_json(
    length: int, sizes: counting.Sizes, patterns: dict[str, Any], costs: dict[str, counting.Cost]
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
    length: int, sizes: counting.Sizes, patterns: dict[str, Any], costs: dict[str, counting.Cost]
) -> None:
    """Print three tables, because one would not fit into 80 columns."""
    fixed = patterns["fixed"]
    names = {
        "fixed": f"fixed, stride {fixed.stride:,}",
        "fixed_at_best_stride": f"fixed, best {patterns['fixed_at_best_stride'].stride:,}",
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
        f"sinks {fixed.sinks:,}, "
        f"heads {sizes.heads:,}, kv_heads {sizes.kv_heads:,}, qk_dim {sizes.qk_dim:,}, "
        f"v_dim {sizes.v_dim:,}, layers {sizes.layers:,}, batch {sizes.batch:,}, {sizes.dtype}"
    )
    console.print(pairs, work, cache)
