"""`retrofit`: a dense model becomes one with a small cache, tuned and measured."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from colonnade.cli.common import (
    AsJson,
    app,
    fail,
    is_given,
    one_line_for_mistakes,
    one_line_for_the_world,
    percent,
    refuse_other_options,
    size,
)
from colonnade.info import good_at_bf16

EXAMPLE = (
    "Example: colonnade retrofit models/smollm --data books --out runs/smollm --minutes 60 "
    "--tune-dense"
)
OUT_OF_MEMORY = (
    "out of memory. Start again in another folder with --recompute, --at-once 1, a shorter "
    "--seq-len, or without --full."
)


@app.command(epilog=EXAMPLE)
def retrofit(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Argument(help="Folder of a dense transformers model, or its name.")
    ] = None,
    *,
    data: Annotated[
        Path | None, typer.Option(help="UTF-8 text to tune on: a file, or a folder of documents.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Empty folder for model and results.")],
    eval_data: Annotated[
        Path | None, typer.Option(help="Held-out text. Default: the last tokens of --data.")
    ] = None,
    eval_share: Annotated[
        float,
        typer.Option(help="Share of the tokens of --data that is held out, without --eval-data."),
    ] = 0.1,
    eval_windows: Annotated[int, typer.Option(help="Held-out windows that are scored.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens in a window.")] = 2048,
    stride: Annotated[int, typer.Option(help="Length of a block.")] = 128,
    summary: Annotated[int, typer.Option(help="Columns of a block that all later ones read.")] = 32,
    subblocks: Annotated[int, typer.Option(help="Sub-blocks; key heads take them in turn.")] = 1,
    sinks: Annotated[int, typer.Option(help="First positions that all later ones read.")] = 1,
    layers: Annotated[
        str,
        typer.Option(
            help="all with full attention, alternate ones, numbers (0,2,5-9), or suggest."
        ),
    ] = "all",
    budget: Annotated[
        float | None, typer.Option(help="For suggest: the cache as a share of the dense one.")
    ] = None,
    lora: Annotated[int, typer.Option(help="Rank of the LoRA adapters.")] = 16,
    full: Annotated[bool, typer.Option("--full", help="Tune all weights instead.")] = False,
    distill: Annotated[
        float, typer.Option(help="Weight of the dense model's distribution in the loss.")
    ] = 0.5,
    minutes: Annotated[float, typer.Option(help="Time for tuning; sets the steps.")] = 30.0,
    steps: Annotated[
        int | None, typer.Option(help="Number of steps, instead of --minutes; 0: do not tune.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in a step.")] = 4,
    at_once: Annotated[
        int, typer.Option(help="How many of these go through the model together.")
    ] = 1,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak rate. Default: 5e-4; with --full 5e-5.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed for adapters and windows.")] = 0,
    bf16: Annotated[
        bool,
        typer.Option(
            default_factory=good_at_bf16,
            show_default=False,
            help="Tune in bfloat16. Default: on where the hardware computes in it.",
        ),
    ],
    recompute: Annotated[
        bool,
        typer.Option("--recompute", help="Recompute layers in the backward pass, to save memory."),
    ] = False,
    tune_dense: Annotated[
        bool, typer.Option("--tune-dense", help="Tune the dense model as long, to compare with.")
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the retrofit in --out.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Give a dense model fixed attention, tune it on a text, and measure what it costs.

    Scores are bits per byte of held-out text. The folder ends up with the converted model, which
    colonnade.hf.load and from_pretrained take, and results.jsonl.
    """
    with one_line_for_mistakes():
        from transformers.utils import logging

        from colonnade.train import retrofitting
        from colonnade.train.retrofit_settings import RetrofitSettings
        from colonnade.train.steps import check_alone

        logging.disable_progress_bar()
        check_alone()
        if resume:
            refuse_other_options(context, "out", "resume", "as_json")
            opened = retrofitting.open_retrofit(RetrofitSettings.load(out), out)
        else:
            if model is None or data is None:
                raise ValueError("retrofit needs MODEL and --data, or --resume.")
            _refuse_pairs(context)
            settings = RetrofitSettings(
                model=_absolute(model),
                data=_absolute(data),
                eval_data=None if eval_data is None else _absolute(eval_data),
                lora=0 if full else lora,
                **{name: context.params[name] for name in _SAME},
            )
            retrofitting.refuse_filled(out)
            opened = retrofitting.open_retrofit(settings)
            retrofitting.prepare_folder(out)
    say = (lambda line: typer.echo(line, err=True)) if as_json else typer.echo
    resuming = f"colonnade retrofit --resume --out {out}"
    with one_line_for_lack_of_memory(), one_line_for_the_world(resuming):
        results = retrofitting.run(opened, out, say, _bar)
    if as_json:
        typer.echo(json.dumps({"folder": str(out), "results": results}))
        return
    Console().print(_table(results))
    typer.echo(f"model and {retrofitting.RESULTS_FILE} in {out}")


_SAME = (
    *("eval_share", "eval_windows", "seq_len", "stride", "summary", "subblocks", "sinks"),
    *("layers", "budget", "distill", "steps", "minutes", "batch_size", "at_once"),
    *("learning_rate", "seed", "bf16", "recompute", "tune_dense"),
)
"""Parameters that are settings under the same name."""


def _refuse_pairs(context: typer.Context) -> None:
    """Refuse options of which one would be ignored.

    Raises:
        ValueError: They come together, or --lora is below 1.
    """
    pairs = {"full": "lora", "eval_data": "eval_share", "steps": "minutes"}
    for used, ignored in pairs.items():
        if is_given(context, used) and is_given(context, ignored):
            shown = [f"--{name.replace('_', '-')}" for name in (used, ignored)]
            raise ValueError(f"{shown[0]} goes without {shown[1]}, got both. Leave one out.")
    if (rank := context.params["lora"]) < 1:
        raise ValueError(
            f"--lora must be at least 1, got --lora {rank}. Use --full to tune all weights."
        )


def _absolute(path: str | Path) -> str:
    """Return the absolute path of what exists; a name of transformers' stays."""
    return str(Path(path).resolve()) if Path(path).exists() else str(path)


@contextmanager
def _bar(label: str, length: int) -> Iterator[Callable[[int], object]]:
    """Show how many held-out tokens a model has scored."""
    with typer.progressbar(length=length, label=f"scoring: {label}", file=sys.stderr) as bar:
        yield bar.update


@contextmanager
def one_line_for_lack_of_memory() -> Iterator[None]:
    """Turn a lack of memory into one line that says what to change."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError:
        fail(OUT_OF_MEMORY)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # What PyTorch says on a CPU.
            raise
        fail(OUT_OF_MEMORY)


def _table(results: list[dict[str, Any]]) -> Table:
    """Show what was measured, a row for each model."""
    first = results[0]
    half = first["tokens"] // 2
    count = first["windows"]
    windows = f"{count} window" if count == 1 else f"{count} windows"
    table = Table(
        *("", "steps", "bits per byte", f"from token {half} on", "× dense", "cache", "of dense"),
        title=f"{windows} of {first['tokens']} tokens, {first['bytes']:,} bytes",
    )
    for column in table.columns[1:]:
        column.justify = "right"
    for line in results:
        table.add_row(
            line["model"],
            str(line["steps"]),
            f"{line['bits_per_byte']:.3f}",
            f"{line['second_half']:.3f}",
            f"{line['second_half'] / first['second_half']:.3f}",
            size(line["cache_bytes"]),
            percent(line["cache_share"]),
        )
    return table
