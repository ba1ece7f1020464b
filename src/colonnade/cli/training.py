"""`train` and `eval`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from colonnade.cli.common import app, at_least_one, one_line_for_mistakes

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@app.command()
def train(
    context: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the run.")] = Path("runs/run"),
    data: Annotated[
        Path | None,
        typer.Option(help="File or folder, read as bytes. Default: Python's standard library."),
    ] = None,
    preset: Annotated[str, typer.Option(help="Model to start from: demo or enwik8.")] = "demo",
    minutes: Annotated[
        float, typer.Option(help="Time to fill, compiling included; the steps are measured.")
    ] = 3.0,
    steps: Annotated[
        int | None, typer.Option(help="Number of steps, in place of --minutes.")
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Residual blocks.")] = None,
    heads: Annotated[int | None, typer.Option(help="Attention heads.")] = None,
    width: Annotated[int | None, typer.Option(help="Width of the residual stream.")] = None,
    context_length: Annotated[int | None, typer.Option("--context", help="Bytes a window.")] = None,
    stride: Annotated[int | None, typer.Option(help="Length of a block.")] = None,
    summary: Annotated[
        int | None, typer.Option(help="Columns of a block that all later positions read.")
    ] = None,
    subblocks: Annotated[int | None, typer.Option(help="Sub-blocks, one a head in turn.")] = None,
    pattern: Annotated[
        str | None, typer.Option(help="fixed, or to compare: strided, local, full.")
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(help="How factors are used: merged, interleaved, multihead."),
    ] = None,
    dropout: Annotated[float | None, typer.Option(help="At the end of each branch.")] = None,
    embedding_std: Annotated[
        float | None, typer.Option(help="Standard deviation of a fresh token embedding.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Windows a step.")] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Peak of the cosine schedule.")
    ] = None,
    warmup_steps: Annotated[int | None, typer.Option(help="Steps of linear warm-up.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="muon or adamw.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, windows and dropout.")] = 0,
    bf16: Annotated[
        bool | None, typer.Option(help="Compute in bfloat16. Default: where it is quick.")
    ] = None,
    compile_blocks: Annotated[
        bool | None,
        typer.Option(
            "--compile/--no-compile", help="torch.compile. Default: if there is a compiler."
        ),
    ] = None,
    recompute: Annotated[
        bool, typer.Option(help="Recompute blocks in the backward pass to save memory.")
    ] = False,
    pack: Annotated[
        bool,
        typer.Option("--pack", help="Each file is a document: none attends to another."),
    ] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --out, as it was started.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a run that --out holds already.")
    ] = False,
) -> None:
    """Train a Sparse Transformer on the bytes of any file or folder.

    The first 90 % of the bytes train, then 5 % validate and 5 % test. The folder ends up with the
    model, its tokenizer, checkpoints and a picture of the loss.
    """
    with one_line_for_mistakes():
        from transformers.utils import logging

        from colonnade.hf import SparseTransformerConfig
        from colonnade.train import run

        logging.disable_progress_bar()  # Of files being written; the run has a bar of its own.
        if resume:
            _refuse_others(context, {"out", "resume"})
            run.RunSettings.load(out).corpus()
            run.last_checkpoint(out)
        else:
            model_changes = {
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "hidden_size": width,
                "max_position_embeddings": context_length,
                "stride": stride,
                "summary": summary,
                "subblocks": subblocks,
                "pattern": pattern,
                "scheme": scheme,
                "dropout": dropout,
                "embedding_std": embedding_std,
            }
            recipe_changes = {
                "batch_size": batch_size,
                "learning_rate": learning_rate,
                "warmup_steps": warmup_steps,
                "optimizer": optimizer,
            }
            config = SparseTransformerConfig.preset(preset, **_given(model_changes))
            recipe = run.recipe(preset)
            settings = run.RunSettings(
                data=None if data is None else str(data.resolve()),
                steps=0 if steps is None else at_least_one("steps", steps),
                minutes=minutes,
                seed=seed,
                bf16=run.good_at_bf16() if bf16 is None else bf16,
                compile=run.has_compiler() if compile_blocks is None else compile_blocks,
                recompute=recompute,
                pack=pack,
                **{**recipe, **_given(recipe_changes)},
            )
            run.check(config, settings)
            run.prepare_folder(out, overwrite)
    trainer = (
        run.resume(out, typer.echo) if resume else run.train(config, settings, out, typer.echo)
    )
    bits = trainer.state.log_history[-1]["eval_bits_per_byte"]
    typer.echo(f"{bits:.3f} bits per byte on windows of the validation bytes; model in {out}")
    _draw_loss(*run.loss_curve(trainer), out / "loss.png", bits)


def _draw_loss(steps: list[int], losses: list[float], path: Path, held_out: float) -> None:
    try:
        from colonnade.plot import draw_loss

        draw_loss(steps, losses, path, held_out)
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        typer.echo("no picture of the loss: matplotlib is not installed (extra 'plot').", err=True)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """The options that the user set; the others keep the preset's value."""
    return {name: value for name, value in options.items() if value is not None}


def _refuse_others(context: typer.Context, allowed: set[str]) -> None:
    """--resume takes every setting from the run; another one beside it would be ignored."""
    # Every parameter of a running command has a source, whatever its type says.
    given = [
        parameter.opts[0]
        for parameter in context.command.params
        if parameter.name not in allowed
        and context.get_parameter_source(parameter.name or "").name == "COMMANDLINE"  # type: ignore[union-attr]
    ]
    if given:
        raise ValueError(
            f"--resume goes on with the settings of the run; leave out {', '.join(given)}."
        )


@app.command()
def eval(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run.")],
    data: Annotated[
        Path | None, typer.Option(help="Other bytes than the run's. All of them are scored.")
    ] = None,
    split: Annotated[
        str, typer.Option(help="train, validation or test bytes of the run.")
    ] = "test",
    min_context: Annotated[
        int | None,
        typer.Option(help="Bytes that every scored byte has before it. Default: half a window."),
    ] = None,
    max_bytes: Annotated[int | None, typer.Option(help="Score only the first so many.")] = None,
    batch_size: Annotated[int, typer.Option(help="Windows at once.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Held-out bits per byte, beside what tables and compressors need for the same bytes."""
    with one_line_for_mistakes():
        from colonnade.train import evaluate, run
        from colonnade.train.data import open_corpus

        at_least_one("batch_size", batch_size)
        settings = run.RunSettings.load(run_folder)
        model = load_model(run_folder)
        corpus = settings.corpus()
        scored = corpus if data is None else open_corpus(data)
        begin, end = corpus.split(split) if data is None else (0, len(scored))
        if max_bytes is not None:
            end = min(end, begin + at_least_one("max_bytes", max_bytes))
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


def load_model(folder: Path) -> PreTrainedModel:
    """A trained byte model, ready to evaluate.

    Raises:
        ValueError: The folder holds no model, or another kind of model.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    from colonnade.hf import SparseTransformerConfig, SparseTransformerForCausalLM

    if not (folder / "config.json").is_file() or not any(folder.glob("*.safetensors")):
        raise ValueError(f"{folder} holds no finished model (config.json and *.safetensors).")
    config = AutoConfig.from_pretrained(folder)
    if not isinstance(config, SparseTransformerConfig) or config.vocab_size != 256:
        raise ValueError(
            f"{folder} must hold a Sparse Transformer on bytes, "
            f"got a model of type {config.model_type!r} with {config.vocab_size} tokens."
        )
    logging.disable_progress_bar()
    model: PreTrainedModel = SparseTransformerForCausalLM.from_pretrained(folder)
    model.eval()
    return model
