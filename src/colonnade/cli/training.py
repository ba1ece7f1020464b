"""`train` and `eval`: a byte model, and how well it predicts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from colonnade.cli.common import (
    AsJson,
    RunFolder,
    app,
    is_given,
    one_line_for_mistakes,
    one_line_for_the_world,
    refuse_other_options,
)
from colonnade.info import good_at_bf16, has_compiler
from colonnade.pattern import check_count
from colonnade.plot import draw_loss

OF_THE_MODEL = (
    "num_hidden_layers",
    "num_attention_heads",
    "hidden_size",
    "max_position_embeddings",
    "stride",
    "summary",
    "subblocks",
    "sinks",
    "pattern",
    "scheme",
    "dropout",
    "embedding_std",
)
"""Parameters of `train` that are settings of the model, under the configuration's own names."""
OF_THE_RUN = (
    "steps",
    "minutes",
    "batch_size",
    "learning_rate",
    "warmup_steps",
    "optimizer",
    "seed",
    "bf16",
    "compile",
    "recompute",
    "pack",
)
"""Parameters of `train` that are settings of the run, under the names of `RunSettings`."""


@app.command()
def train(
    context: typer.Context,
    *,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/run"),
    data: Annotated[
        Path | None,
        typer.Option(
            help="File or folder to train on, as bytes. Default: Python's standard library."
        ),
    ] = None,
    preset: Annotated[str, typer.Option(help="Model to start from: demo or enwik8.")] = "demo",
    minutes: Annotated[
        float,
        typer.Option(help="Time to fill, compiling included; sets the number of steps."),
    ] = 3.0,
    steps: Annotated[
        int | None, typer.Option(help="Number of steps, instead of --minutes.")
    ] = None,
    num_hidden_layers: Annotated[
        int | None, typer.Option("--layers", help="Number of residual blocks.")
    ] = None,
    num_attention_heads: Annotated[
        int | None, typer.Option("--heads", help="Number of attention heads.")
    ] = None,
    hidden_size: Annotated[
        int | None, typer.Option("--width", help="Width of the residual stream.")
    ] = None,
    max_position_embeddings: Annotated[
        int | None, typer.Option("--context", help="Number of bytes in a window.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Length of a block.")] = None,
    summary: Annotated[
        int | None, typer.Option(help="Number of columns of a block that all later positions read.")
    ] = None,
    subblocks: Annotated[
        int | None, typer.Option(help="Number of sub-blocks; heads take them in turn.")
    ] = None,
    sinks: Annotated[
        int | None, typer.Option(help="Number of positions at the start that all later ones read.")
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(help="Pattern of attention: fixed, or to compare strided, local or full."),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(help="Use of a pattern's factors: merged, interleaved or multihead."),
    ] = None,
    dropout: Annotated[
        float | None, typer.Option(help="Dropout at the end of each residual branch.")
    ] = None,
    embedding_std: Annotated[
        float | None, typer.Option(help="Standard deviation of a fresh token embedding.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Number of windows in a step.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak learning rate; it decays along a cosine.")
    ] = None,
    warmup_steps: Annotated[
        int | None, typer.Option(help="Number of steps of linear warm-up.")
    ] = None,
    optimizer: Annotated[str | None, typer.Option(help="Optimizer: muon or adamw.")] = None,
    seed: Annotated[int, typer.Option(help="Seed for weights, windows and dropout.")] = 0,
    bf16: Annotated[
        bool,
        typer.Option(
            default_factory=good_at_bf16,
            show_default=False,
            help="Compute in bfloat16. Default: on where the hardware computes in it.",
        ),
    ],
    compile: Annotated[
        bool,
        typer.Option(
            default_factory=has_compiler,
            show_default=False,
            help="Compile the blocks with torch.compile. Default: if that works here.",
        ),
    ],
    recompute: Annotated[
        bool, typer.Option(help="Recompute blocks in the backward pass to save memory.")
    ] = False,
    pack: Annotated[
        bool,
        typer.Option("--pack", help="Take each file as a document; none attends to another."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out with its own settings.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run that --out holds already.")
    ] = False,
) -> None:
    """Train a Sparse Transformer on the bytes of any file or folder.

    The first 90 % of the bytes train, the next 5 % validate and the last 5 % test. The folder ends
    up with the model, its tokenizer, checkpoints and a picture of the loss.
    """
    with one_line_for_mistakes():
        from transformers.utils import logging

        from colonnade.hf import SparseTransformerConfig
        from colonnade.train import folder, run, settings
        from colonnade.train.steps import check_alone

        logging.disable_progress_bar()  # That of writing files; the run has a bar of its own.
        check_alone()
        if resume:
            refuse_other_options(context, "out", "resume")
            settings.RunSettings.load(out).corpus()
            folder.last_checkpoint(out)
        else:
            if steps is not None:
                check_count("steps", steps, minimum=1)
            new = (
                SparseTransformerConfig.preset(preset, **_given(context, OF_THE_MODEL)),
                settings.RunSettings.preset(
                    preset,
                    data=None if data is None else str(data.resolve()),
                    **_given(context, OF_THE_RUN),
                ),
            )
            run.check(*new)
            if compile and is_given(context, "compile") and (why := run.reason_not_compiled()):
                raise ValueError(f"--compile does not work here: {why}. Use --no-compile.")
            folder.prepare_folder(out, overwrite)
    with one_line_for_the_world(f"colonnade train --resume --out {out}"):
        trainer = run.resume(out, typer.echo) if resume else run.start(*new, out, typer.echo)
    bits = trainer.state.log_history[-1]["eval_bits_per_byte"]
    typer.echo(f"{bits:.3f} bits per byte on windows of the validation bytes; model in {out}")
    try:
        draw_loss(*trainer.loss_curve(), out / "loss.png", bits)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        typer.echo("no picture of the loss: matplotlib is not installed (extra 'plot').", err=True)


def _given(context: typer.Context, names: tuple[str, ...]) -> dict[str, Any]:
    """Return the named parameters that have a value; the others keep the preset's."""
    return {name: context.params[name] for name in names if context.params[name] is not None}


@app.command()
def eval(
    run_folder: RunFolder,
    data: Annotated[
        Path | None, typer.Option(help="Other data, all of which is scored instead of the run's.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="Bytes of the run to score: train, validation or test.")
    ] = "test",
    min_context: Annotated[
        int | None,
        typer.Option(
            help="Number of bytes that every scored byte has before it. Default: half a window."
        ),
    ] = None,
    max_bytes: Annotated[
        int | None, typer.Option(help="Number of bytes to score, from the first on. Default: all.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Number of windows in a batch.")] = 8,
    as_json: AsJson = False,
) -> None:
    """Compare a trained model with count tables and compressors, in bits per byte."""
    with one_line_for_mistakes():
        from colonnade.train import evaluate, folder, settings
        from colonnade.train.data import open_corpus

        check_count("batch_size", batch_size, minimum=1)
        corpus = settings.RunSettings.load(run_folder).corpus()
        model = folder.load_model(run_folder)
        scored = corpus if data is None else open_corpus(data)
        begin, end = corpus.split(split) if data is None else (0, len(scored))
        if max_bytes is not None:
            check_count("max_bytes", max_bytes, minimum=1)
            end = min(end, begin + max_bytes)
        if begin == end:
            raise ValueError(f"the {split} split of {scored.name} is empty.")
        window = model.config.max_position_embeddings
        min_context = window // 2 if min_context is None else min_context
        evaluate.check_min_context(min_context, window)
        held_out = scored.read(begin, end)
    with typer.progressbar(length=len(held_out), label="model", file=sys.stderr) as bar:
        results = evaluate.compare(model, corpus, held_out, min_context, batch_size, bar.update)
    if as_json:
        typer.echo(json.dumps({"bytes": len(held_out), "bits_per_byte": results}))
        return
    table = Table("", "bits per byte", title=f"{len(held_out):,} bytes of {scored.name}")
    for name, value in results.items():
        table.add_row(name, f"{value:.3f}")
    Console().print(table)
