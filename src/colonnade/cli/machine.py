"""`bench` and `info`: how fast attention is on this machine, and what the machine has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from colonnade.cli import options
from colonnade.cli.common import (
    EXTRAS,
    app,
    at_least_one,
    one_line_for_mistakes,
    percent,
    size,
    table_of,
    times,
)

if TYPE_CHECKING:
    from colonnade.bench.timing import Comparison, Sizes
    from colonnade.info import Info


@app.command()
def bench(
    length: options.Length = 16384,
    stride: options.Stride = 128,
    summary: options.Summary = 8,
    part: options.Part = "merged",
    batch: options.Batch = 1,
    heads: options.Heads = 8,
    kv_heads: options.KvHeads = None,
    head_dim: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    dtype: Annotated[str, typer.Option(help="Type of the tensors: float32 or bfloat16.")] = (
        "float32"
    ),
    backward: Annotated[
        bool, typer.Option("--backward", help="Time the backward pass too.")
    ] = False,
    rounds: Annotated[int, typer.Option(help="Number of times that each contender runs.")] = 9,
    flex: Annotated[
        bool,
        typer.Option(
            "--flex", help="Time FlexAttention at several tiles too: minutes, forward only."
        ),
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """Time the fixed pattern here, against dense attention and other ways to run it.

    All contenders run in turns in one process, so that a machine that changes
    its speed changes it for all. The table shows medians, with the fastest
    and the slowest run; ratios are taken within each round.

    The ceiling is the time that the matrix products at the kernel's own tiles
    and the exponentials take alone.
    """
    with one_line_for_mistakes():
        from colonnade.bench import memory, timing

        at_least_one("length", length)
        at_least_one("rounds", rounds)
        sizes = timing.Sizes(
            length,
            stride,
            summary,
            part,  # type: ignore[arg-type]  # The pattern refuses any other.
            batch,
            heads,
            heads if kv_heads is None else kv_heads,
            head_dim,
            dtype,
            backward,
        )
        timing.check(sizes)
    names = ["native", "eager", "dense", *(["masked"] if memory.masked_fits(sizes) else [])]
    found = timing.compare(timing.contenders(sizes, names), rounds)
    ceiling = timing.ceiling(sizes)
    tiles: dict[str, Comparison | str] = {}
    if flex and not backward:
        from colonnade.bench.flex import compare_tiles

        tiles = compare_tiles(sizes, rounds=rounds)
    if as_json:
        of_tiles = {
            tile: each if isinstance(each, str) else asdict(each) for tile, each in tiles.items()
        }
        result = {"sizes": asdict(sizes), **asdict(found), "ceiling": ceiling, "flex": of_tiles}
        typer.echo(json.dumps(result))
    else:
        _print_times(found, tiles)
        _print_limits(sizes, found, ceiling)


def _print_times(found: Comparison, tiles: dict[str, Comparison | str]) -> None:
    """Print the time of each contender, and of FlexAttention at each tile that ran."""
    table = table_of("", "ms", "fastest", "slowest", "times native")
    rows = [(name, each, found.ratio.get(name)) for name, each in found.seconds.items()]
    rows += [
        (f"flex, {tile}", each.seconds["flex"], each.ratio["flex"])
        for tile, each in tiles.items()
        if not isinstance(each, str)
    ]
    for name, seconds, ratio in rows:
        numbers = [f"{1e3 * s:.4g}" for s in (seconds.median, seconds.low, seconds.high)]
        table.add_row(name, *numbers, times(ratio.median) if ratio else "")
    Console(highlight=False).print(table)


def _print_limits(sizes: Sizes, found: Comparison, ceiling: float) -> None:
    """Print why no mask was timed, if none was, and how far native is from the ceiling."""
    from colonnade.bench.memory import MASKED_LIMIT, masked_bytes

    console = Console(highlight=False)
    if "masked" not in found.seconds:
        needed = f"{masked_bytes(sizes) / 2**30:,.1f} GiB"
        console.print(
            f"masked, attention under a boolean mask, is left out: it takes {needed}, and is timed "
            f"up to n = {MASKED_LIMIT:,} where memory holds it"
        )
    share = ceiling / found.seconds["native"].median
    console.print(f"ceiling {1e3 * ceiling:.4g} ms, of which native reaches {percent(share)}")


@app.command()
def info(
    build: Annotated[
        bool, typer.Option("--build", help="Build the native kernel now, if it is not built yet.")
    ] = False,
    as_json: options.AsJson = False,
) -> None:
    """List what colonnade runs on here: versions, processor, compiler, GPUs and backends.

    Put it at the top of a bug report, or beside a measurement; it names no folders.
    """
    from colonnade.info import info as collect

    found = collect(["torch", "jaxtyping", *EXTRAS, "typer", "rich"], build)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    table = Table(show_header=False)
    for name, text in _info_lines(found):
        table.add_row(name, Text(text))  # Not markup: "[train]" is to be read.
    Console().print(table)


def _info_lines(found: Info) -> Iterator[tuple[str, str]]:
    """Yield a name and a text for each line of the table."""
    for package, version in found.versions.items():
        missing = f"not installed: pip install 'colonnade[{EXTRAS.get(package, 'train')}]'"
        yield package, version or missing
    yield "platform", found.platform
    yield "processor", found.processor
    yield "instructions", " ".join(found.instructions) or "none known to torch"
    yield "kernels of torch", found.torch_kernels
    yield "threads of torch", f"{found.threads}, logical cores: {found.cores or 'unknown'}"
    headers = "" if found.python_headers else "; no Python.h, so no torch.compile on the CPU"
    yield "C++ compiler", (found.compiler or "none found; CXX may name one") + headers
    for gpu in found.gpus:
        memory = size(gpu["memory_bytes"])
        yield "GPU", f"{gpu['name']}, compute capability {gpu['compute_capability']}, {memory}"
    if not found.gpus:
        yield "GPU", "none that torch can use"
    for name, why_not in found.backends.items():
        yield f"backend {name}", why_not or "usable here"
