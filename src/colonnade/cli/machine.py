"""`bench` and `info`: how fast attention is on this machine, and what the machine has."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from colonnade.backends.native.build import forget_failures
from colonnade.bench.memory import MASKED_LIMIT, masked_bytes, masked_fits
from colonnade.bench.timing import Comparison, Sizes, ceiling, check, compare, contenders
from colonnade.cli.common import (
    EXTRAS,
    AsJson,
    KvHeads,
    app,
    one_line_for_mistakes,
    percent,
    size,
    table_of,
    times,
)
from colonnade.info import Info
from colonnade.info import info as collect
from colonnade.pattern import check_count


@app.command()
def bench(
    length: Annotated[int, typer.Option(help="Number of positions n in a sequence.")] = 16384,
    stride: Annotated[int, typer.Option(help="Length l of a block.")] = 128,
    summary: Annotated[int, typer.Option(help="Number of summary columns c in a block.")] = 8,
    part: Annotated[str, typer.Option(help="Part of the pattern: merged, local or summary.")] = (
        "merged"
    ),
    batch: Annotated[int, typer.Option(help="Number of sequences in a batch.")] = 1,
    heads: Annotated[int, typer.Option(help="Number of query heads.")] = 8,
    kv_heads: KvHeads = None,
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
    as_json: AsJson = False,
) -> None:
    """Time the fixed pattern here, against dense attention and other ways to run it.

    All contenders run in turns in one process, so that a machine that changes
    its speed changes it for all. The table shows medians, with the fastest
    and the slowest run; ratios are taken within each round.

    The ceiling is the time that the matrix products at the kernel's own tiles
    and the exponentials take alone.
    """
    with one_line_for_mistakes():
        if flex and backward:
            raise ValueError("--flex times the forward pass only; leave out --flex or --backward.")
        check_count("length", length, minimum=1)
        check_count("rounds", rounds, minimum=1)
        sizes = Sizes(
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
        check(sizes)
    names = ["native", "eager", "dense", *(["masked"] if masked_fits(sizes) else [])]
    found = compare(contenders(sizes, names), rounds)
    limit = ceiling(sizes)
    tiles: dict[str, Comparison | str] = {}
    if flex:
        from colonnade.bench.flex import compare_tiles  # It loads PyTorch's compiler.

        tiles = compare_tiles(sizes, rounds=rounds)
    if as_json:
        result = {"sizes": sizes, **asdict(found), "ceiling": limit, "flex": tiles}
        typer.echo(json.dumps(result, default=asdict))
    else:
        _print_times(sizes, found, limit, tiles)


def _print_times(
    sizes: Sizes, found: Comparison, limit: float, tiles: dict[str, Comparison | str]
) -> None:
    """Print the time of each contender, and of FlexAttention at each tile that ran.

    Below the table, say why no mask was timed, if none was, and how much of the ceiling native
    reaches.
    """
    table = table_of("", "ms", "fastest", "slowest", "times native")
    rows = [
        *((name, each, found.ratio.get(name)) for name, each in found.seconds.items()),
        *(
            (f"flex, {tile}", each.seconds["flex"], each.ratio["flex"])
            for tile, each in tiles.items()
            if not isinstance(each, str)
        ),
    ]
    for name, seconds, ratio in rows:
        numbers = [f"{1e3 * s:.4g}" for s in (seconds.median, seconds.low, seconds.high)]
        table.add_row(name, *numbers, times(ratio.median) if ratio else "")
    console = Console(highlight=False)
    console.print(table)
    if "masked" not in found.seconds:
        console.print(
            "masked, attention under a boolean mask, is left out: it takes "
            f"{masked_bytes(sizes) / 2**30:,.1f} GiB, and is timed up to n = {MASKED_LIMIT:,} "
            "where memory holds it"
        )
    reached = percent(limit / found.seconds["native"].median)
    console.print(f"ceiling {1e3 * limit:.4g} ms, of which native reaches {reached}")


@app.command()
def info(
    build: Annotated[
        bool,
        typer.Option(
            "--build",
            help="Build the native kernel now, if it is not built yet; also if that failed before.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """List what colonnade runs on here: versions, processor, compiler, GPUs and backends.

    Put it at the top of a bug report, or next to a measurement; it names no folders.
    """
    if build:
        forget_failures()
    found = collect(["torch", "jaxtyping", *EXTRAS, "typer", "rich"], build)
    if as_json:
        typer.echo(json.dumps(asdict(found)))
        return
    table = Table(show_header=False)
    for name, text in _info_lines(found):
        table.add_row(name, Text(text))  # Not markup: "[train]" is to be read.
    Console().print(table)


def _info_lines(found: Info) -> list[tuple[str, str]]:
    """Return a name and a text for each line of the table."""
    headers = "" if found.python_headers else "; no Python.h, so no torch.compile on the CPU"
    gpus = [
        f"{gpu['name']}, compute capability {gpu['compute_capability']}, "
        f"{size(gpu['memory_bytes'])}"
        for gpu in found.gpus
    ]
    return [
        *(
            (
                name,
                version or f"not installed: pip install 'colonnade[{EXTRAS.get(name, 'train')}]'",
            )
            for name, version in found.versions.items()
        ),
        ("platform", found.platform),
        ("processor", found.processor),
        ("instructions", " ".join(found.instructions) or "none known to torch"),
        ("kernels of torch", found.torch_kernels),
        ("threads of torch", f"{found.threads}, logical cores: {found.cores or 'unknown'}"),
        (
            "C++ compiler",
            (found.compiler or "none found; CXX may name one") + headers,
        ),
        *(("GPU", gpu) for gpu in gpus or ["none that torch can use"]),
        *((f"backend {name}", why or "usable here") for name, why in found.backends.items()),
    ]
