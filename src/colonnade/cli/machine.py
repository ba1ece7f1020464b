"""`bench` and `info`: how fast this machine is, and what it has."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

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
    from colonnade.bench import Comparison, Sizes
    from colonnade.info import Info


@app.command()
def bench(
    length: Annotated[int, typer.Option(help="Positions n of a sequence.")] = 16384,
    stride: Annotated[int, typer.Option(help="Length l of a block.")] = 128,
    summary: Annotated[int, typer.Option(help="Summary columns c of a block.")] = 8,
    part: Annotated[str, typer.Option(help="merged, local or summary.")] = "merged",
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    heads: Annotated[int, typer.Option(help="Query heads.")] = 8,
    kv_heads: Annotated[
        int | None, typer.Option(help="Key/value heads. Default: as many as query heads.")
    ] = None,
    head_dim: Annotated[int, typer.Option(help="Width of a head.")] = 64,
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    backward: Annotated[bool, typer.Option("--backward", help="The backward pass too.")] = False,
    rounds: Annotated[int, typer.Option(help="How often each runs.")] = 9,
    flex: Annotated[
        bool, typer.Option("--flex", help="FlexAttention at its tiles too; minutes.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Time the fixed pattern here, beside dense attention and the other ways to run it.

    All run in turns in one process, so that a machine that changes its speed
    does so for all. Shown are medians, with the fastest and the slowest; a
    ratio is taken within each round.

    The ceiling is what the matrix products at the kernel's own tiles and the
    exponentials take alone.
    """
    with one_line_for_mistakes():
        from colonnade import bench as timing

        at_least_one("length", length)
        at_least_one("rounds", rounds)
        if dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got dtype={dtype!r}.")
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
        sizes.pattern()
        names = ["native", "eager", "dense"]
        if timing.masked_fits(sizes):
            names.append("masked")
        found = timing.compare(timing.contenders(sizes, names), rounds)
        limit = timing.ceiling(sizes)
        tiles = timing.flex(sizes, rounds=rounds) if flex and not backward else {}
    if as_json:
        of_tiles = {
            tile: each if isinstance(each, str) else asdict(each) for tile, each in tiles.items()
        }
        result = {"sizes": asdict(sizes), **asdict(found), "ceiling": limit, "flex": of_tiles}
        typer.echo(json.dumps(result))
    else:
        _print_times(sizes, found, limit, tiles)


def _print_times(
    sizes: Sizes, found: Comparison, limit: float, tiles: dict[str, Comparison | str]
) -> None:
    """What `bench` measured, as a table, and how far it is from the ceiling `limit`."""
    from colonnade import bench as timing

    table = table_of("", "ms", "fastest", "slowest", "times native")
    rows = [(name, each, found.ratio.get(name)) for name, each in found.seconds.items()]
    for tile, each in tiles.items():
        if not isinstance(each, str):
            rows.append((f"flex, {tile}", each.seconds["flex"], each.ratio["flex"]))
    for name, seconds, ratio in rows:
        numbers = [f"{1e3 * s:.4g}" for s in (seconds.median, seconds.low, seconds.high)]
        table.add_row(name, *numbers, times(ratio.median) if ratio else "")
    console = Console(highlight=False)
    console.print(table)
    if "masked" not in found.seconds:
        needed = f"{timing.masked_bytes(sizes) / 2**30:,.1f} GiB"
        console.print(
            f"masked, attention under a boolean mask, is left out: it takes {needed}, and is timed "
            f"up to n = {timing.MASKED_LIMIT:,} where memory holds it"
        )
    share = limit / found.seconds["native"].median
    console.print(f"ceiling {1e3 * limit:.4g} ms, of which native reaches {percent(share)}")


@app.command()
def info(
    build: Annotated[
        bool, typer.Option("--build", help="Build the native kernel now, if it never was.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what colonnade runs on here: versions, processor, compiler, GPUs and backends.

    A report of a mistake or of a measurement can start with it; it names no folders.
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
