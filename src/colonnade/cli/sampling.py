"""`sample`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from colonnade.cli.common import app, at_least_one, one_line_for_mistakes
from colonnade.cli.training import load_model


@app.command()
def sample(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File whose bytes are continued; - for standard input.")
    ] = None,
    num_bytes: Annotated[int, typer.Option("--bytes", help="How many to write.")] = 400,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest byte.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="Draw from so many of the likeliest; 0: all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
) -> None:
    """Write the prompt and, as they are drawn, the bytes that the model continues it with.

    They go to standard output, and what it took to standard error. A model has a number of
    positions: of a longer prompt it reads the end, half as long as that; and when the positions are
    used up, it goes on from so much of what is there.
    """
    with one_line_for_mistakes():
        from transformers import set_seed

        from colonnade.train.sample import continue_bytes

        start = _prompt_bytes(prompt, prompt_file)
        at_least_one("bytes", num_bytes)
        if temperature < 0 or top_k < 0:
            raise ValueError(
                "temperature and top_k must be at least 0, "
                f"got temperature={temperature} and top_k={top_k}."
            )
        model = load_model(run_folder)
    _say_what_is_read(len(start), num_bytes, model.config.max_position_embeddings)
    set_seed(seed)
    draw: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        draw = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    _write(start)
    report = continue_bytes(model, start, num_bytes, _write, **draw)
    _write(b"\n")
    typer.echo(f"{report}.", err=True)


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()


def _say_what_is_read(prompt_len: int, num_bytes: int, limit: int) -> None:
    half = max(limit // 2, 1)
    if prompt_len > limit:
        typer.echo(
            f"the model has {limit:,} positions: of the {prompt_len:,} bytes of the prompt it "
            f"reads the last {half:,}.",
            err=True,
        )
    if min(prompt_len, limit) + num_bytes > limit + 1:
        typer.echo(
            f"the model has {limit:,} positions: whenever they are used up, it goes on from the "
            f"last {half:,} bytes and has forgotten what came before.",
            err=True,
        )


def _prompt_bytes(prompt: str | None, prompt_file: Path | None) -> bytes:
    if prompt is not None and prompt_file is not None:
        raise ValueError("give --prompt or --prompt-file, not both.")
    if prompt_file is None:
        start = os.fsencode("\n" if prompt is None else prompt)
    elif str(prompt_file) == "-":
        start = sys.stdin.buffer.read()
    else:
        start = prompt_file.read_bytes()
    if not start:
        raise ValueError("the prompt must hold at least one byte, got an empty one.")
    return start
