"""`sample`: continue a prompt with a trained model."""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from colonnade.cli.common import RunFolder, app, one_line_for_mistakes
from colonnade.pattern import check_count


@app.command()
def sample(
    run_folder: RunFolder,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option(help="File whose bytes to continue; - reads standard input.")
    ] = None,
    num_bytes: Annotated[int, typer.Option("--bytes", help="Number of bytes to write.")] = 400,
    temperature: Annotated[
        float, typer.Option(help="Temperature of the draws; 0 takes the likeliest byte.")
    ] = 0.8,
    top_k: Annotated[
        int, typer.Option(help="Number of likeliest bytes to draw from; 0 draws from all.")
    ] = 0,
    seed: Annotated[int, typer.Option(help="Seed for the draws.")] = 0,
) -> None:
    """Write the prompt, and each byte that continues it as soon as it is drawn.

    The bytes go to standard output, time and memory to standard error. A model has a limited number
    of positions. Of a longer prompt it reads only the end, half as many bytes as it has positions;
    and whenever the positions are used up, it continues from that many of the last bytes.

    For 6,000 bytes and more the step of a byte is compiled, where torch.compile works: bytes stop
    for 7 to 20 seconds after the first one, and then come faster.
    """
    with one_line_for_mistakes():
        from transformers import set_seed

        from colonnade.train.folder import load_model
        from colonnade.train.sample import continue_bytes

        start = _prompt_bytes(prompt, prompt_file)
        check_count("bytes", num_bytes, minimum=1)
        if not temperature >= 0 or top_k < 0:  # NaN is not either.
            raise ValueError(
                "temperature and top_k must be at least 0, "
                f"got temperature={temperature} and top_k={top_k}."
            )
        model = load_model(run_folder)
    _say_what_is_read(len(start), num_bytes, model.config.max_position_embeddings)
    set_seed(seed)
    draws: dict[str, Any] = {"temperature": temperature, "top_k": top_k} if temperature > 0 else {}
    write = partial(typer.echo, nl=False)  # It takes bytes too, and flushes.
    write(start)
    report = continue_bytes(model, start, num_bytes, write, do_sample=temperature > 0, **draws)
    typer.echo()
    typer.echo(f"{report}.", err=True)


def _say_what_is_read(prompt_len: int, num_bytes: int, limit: int) -> None:
    """Warn on standard error if the prompt or its continuation does not fit into the positions."""
    half = max(limit // 2, 1)
    if prompt_len > limit:
        typer.echo(
            f"the model has {limit:,} positions: of the {prompt_len:,} bytes of the prompt it "
            f"reads the last {half:,}.",
            err=True,
        )
    if min(prompt_len, limit) + num_bytes > limit + 1:
        typer.echo(
            f"the model has {limit:,} positions: whenever they are used up, it continues from the "
            f"last {half:,} bytes and has forgotten what came before.",
            err=True,
        )


def _prompt_bytes(prompt: str | None, prompt_file: Path | None) -> bytes:
    """Return the bytes to continue, a newline if none are given."""
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
