"""The command `colonnade`: train, evaluate, sample, show and count patterns, name the machine.

A user's mistake gets one line on standard error and exit code 2. What an extra brings is imported
inside the commands, so that a missing one can be named.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

try:
    import typer
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ImportError:
    sys.stderr.write("colonnade: this needs typer and rich; install extra 'train' or 'plot'.\n")
    sys.exit(2)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from colonnade.cost import Cost, Sizes
    from colonnade.info import Info

app = typer.Typer(
    help="Fixed factorized attention (Child et al. 2019): train, evaluate, sample, show, count.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
EXTRAS = {
    "transformers": "train",
    "accelerate": "train",
    "tokenizers": "train",
    "safetensors": "train",
    "numpy": "train",
    "matplotlib": "plot",
}
MISTAKE = 2
"""Exit code for what a user did."""


def main() -> None:
    """Entry point of the command."""
    app()


def _fail(message: str) -> NoReturn:
    typer.echo(f"colonnade: {' '.join(message.split())}", err=True)
    raise typer.Exit(MISTAKE)


@contextmanager
def _one_line_for_mistakes() -> Iterator[None]:
    """Turn what a user did wrong, or did not install, into one line and exit code 2.

    Used around the checks and openings of a command, not around its work: an error in there is
    ours, and deserves its traceback.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        if package not in EXTRAS:
            raise
        _fail(f"this needs {package}; install the extra {EXTRAS[package]!r}.")
    except (ValueError, TypeError, NotImplementedError) as error:
        _fail(str(error))
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{error.strerror or error}.")


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
    with _one_line_for_mistakes():
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
                steps=0 if steps is None else _at_least_one("steps", steps),
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


def _at_least_one(name: str, count: int) -> int:
    if count < 1:
        raise ValueError(f"{name} must be at least 1, got {name}={count}.")
    return count


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
    with _one_line_for_mistakes():
        from colonnade.train import evaluate, run
        from colonnade.train.data import open_corpus

        _at_least_one("batch_size", batch_size)
        settings = run.RunSettings.load(run_folder)
        model = _load_model(run_folder)
        corpus = settings.corpus()
        scored = corpus if data is None else open_corpus(data)
        begin, end = corpus.split(split) if data is None else (0, len(scored))
        if max_bytes is not None:
            end = min(end, begin + _at_least_one("max_bytes", max_bytes))
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
    """Write the prompt and the bytes that the model continues it with to standard output."""
    with _one_line_for_mistakes():
        from transformers import set_seed

        start = _prompt_bytes(prompt, prompt_file)
        _at_least_one("bytes", num_bytes)
        if temperature < 0 or top_k < 0:
            raise ValueError(
                "temperature and top_k must be at least 0, "
                f"got temperature={temperature} and top_k={top_k}."
            )
        model = _load_model(run_folder)
        limit = model.config.max_position_embeddings
        if len(start) + num_bytes > limit:
            raise ValueError(
                f"prompt and new bytes must fit into the model's {limit} positions, "
                f"got a prompt of {len(start)} bytes and bytes={num_bytes}."
            )
    set_seed(seed)
    written = _generate(model, start, num_bytes, temperature, top_k)
    sys.stdout.buffer.write(written)
    sys.stdout.buffer.write(b"\n")
    sys.stdout.buffer.flush()


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


def _generate(
    model: PreTrainedModel, start: bytes, num_bytes: int, temperature: float, top_k: int
) -> bytes:
    import torch

    tokens = torch.tensor([list(start)], device=model.device)
    draw: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        draw = {"do_sample": True, "temperature": temperature, "top_k": top_k}
    # The mask is given: transformers would guess padding from a byte that equals the pad token.
    generated = model.generate(  # type: ignore[operator]  # Typed as an attribute of any module.
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=num_bytes, **draw
    )
    return bytes(generated[0].tolist())


def _load_model(folder: Path) -> PreTrainedModel:
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
    with _one_line_for_mistakes():
        from colonnade.pattern import FixedPattern

        # Any string may be typed; the pattern is what refuses it.
        pattern = FixedPattern(stride, summary, subblocks, part, causal)  # type: ignore[arg-type]
        _at_least_one("length", length)
        _at_least_one("heads", heads)
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
    with _one_line_for_mistakes():
        from colonnade import cost as counting
        from colonnade.pattern import FixedPattern

        _at_least_one("length", length)
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
    pairs = _table("pairs", "a head", "of full", "fewer than full")
    work = _table("work", "forward", "backward", "times strided")
    cache = _table("cache", "entries a head", "keys and values", "of full")
    for name, cost in costs.items():
        pairs.add_row(
            names[name],
            f"{cost.pairs_per_kv_head[0]:,}",  # Of merged patterns: the same for every head.
            _percent(cost.share_of_full),
            _times(cost.times_fewer_than(full)),
        )
        work.add_row(
            names[name],
            _flops(cost.forward_flops),
            _flops(cost.backward_flops),
            _times(strided.times_fewer_than(cost)),
        )
        cache.add_row(
            names[name],
            f"{cost.cache_entries:,}",
            _bytes(cost.cache_bytes),
            _percent(cost.cache_bytes / full.cache_bytes),
        )
    console = Console(highlight=False)
    console.print(
        f"length {length:,}, summary {fixed.summary:,}, subblocks {fixed.subblocks:,}, "
        f"heads {sizes.heads:,}, kv_heads {sizes.kv_heads:,}, qk_dim {sizes.qk_dim:,}, "
        f"v_dim {sizes.v_dim:,}, layers {sizes.layers:,}, batch {sizes.batch:,}, {sizes.dtype}"
    )
    console.print(pairs, work, cache)


def _table(name: str, *of_numbers: str) -> Table:
    """Its cells may break into lines, but lose no digit."""
    table = Table(name)
    for column in of_numbers:
        table.add_column(column, justify="right", overflow="fold")
    return table


def _percent(share: float) -> str:
    return f"{_three_digits(100 * share)} %"


def _times(ratio: float) -> str:
    return f"{ratio:,.0f} ×" if ratio >= 100 else f"{_three_digits(ratio)} ×"


def _three_digits(value: float) -> str:
    return f"{value:#.3g}".removesuffix(".")


def _flops(count: int) -> str:
    return _scaled(count, ("", "k", "M", "G", "T", "P", "E", "Z"), 1000, "FLOP")


def _bytes(count: int) -> str:
    return _scaled(count, ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei", "Zi"), 1024, "B")


def _scaled(value: float, prefixes: tuple[str, ...], step: int, unit: str) -> str:
    """With the largest prefix that leaves at least 1, in three digits or more."""
    power = 0
    while value >= step and power < len(prefixes) - 1:
        value, power = value / step, power + 1
    return f"{value:,.{0 if power == 0 or value >= 100 else 2}f} {prefixes[power]}{unit}"


@app.command()
def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Say what colonnade runs on here: versions, processor, compiler, GPUs and backends.

    A report of a mistake or of a measurement can start with it; it names no folders.
    """
    from colonnade.info import info as collect

    found = collect(["torch", "jaxtyping", *EXTRAS, "typer", "rich"])
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
        memory = _bytes(gpu["memory_bytes"])
        yield "GPU", f"{gpu['name']}, compute capability {gpu['compute_capability']}, {memory}"
    if not found.gpus:
        yield "GPU", "none that torch can use"
    for name, why_not in found.backends.items():
        yield f"backend {name}", why_not or "usable here"


if __name__ == "__main__":
    main()
