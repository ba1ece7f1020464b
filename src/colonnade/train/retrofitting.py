"""A retrofit from a dense model and a text to a saved model and what was measured, resumably.

The folder holds `retrofit.json` (the settings), `results.jsonl` (a line for each model that was
scored), the Trainer's checkpoints, and at the end the converted model with its tokenizer, which
`colonnade.hf.load` takes. The dense model that was tuned as long is in `dense`.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import CONFIG_NAME

from colonnade import hf
from colonnade.hf.settings import patterns_of
from colonnade.hf.windows import full_layers
from colonnade.ops.heads import Patterns
from colonnade.train.data import PackedWindows
from colonnade.train.dense import load_dense, saved_dtype
from colonnade.train.distillation import attending_by
from colonnade.train.folder import find_checkpoint
from colonnade.train.retrofit_settings import SUGGEST, RetrofitSettings, layers_in
from colonnade.train.scores import (
    cache_entries,
    dense_entries,
    entry_bytes,
    held_out_windows,
    score,
)
from colonnade.train.tokens import HELD_OUT, TRAIN, TokenCorpus, open_tokens
from colonnade.train.tuning import Tuning, frozen_copy

RESULTS_FILE = "results.jsonl"
DENSE, CONVERTED, TUNED, DENSE_TUNED = "dense", "converted", "tuned", "dense, tuned as long"
"""The models that are scored, as `results.jsonl` calls them."""
SAMPLES = 4
"""Windows of the training text that `suggest` measures."""

Bar = Callable[[str, int], AbstractContextManager[Callable[[int], object]]]
"""Opens a progress bar with a label and a length; what it gives is told of each advance."""


@contextmanager
def no_bar(label: str, length: int) -> Iterator[Callable[[int], object]]:
    """Open a progress bar that nobody sees."""
    yield lambda advance: None


@dataclass
class Retrofit:
    """A retrofit whose model and text are open.

    Attributes:
        settings: Its settings, with what is known by now.
        model: The model, converted.
        attention: Name of the attention under which the model is dense.
        dtype: Type in which the model's weights are saved.
        tokenizer: The model's tokenizer.
        corpus: The text.
        windows: The held-out windows that are scored.
    """

    settings: RetrofitSettings
    model: PreTrainedModel
    attention: str
    dtype: torch.dtype
    tokenizer: PreTrainedTokenizerBase
    corpus: TokenCorpus
    windows: list[tuple[int, int]]


def open_retrofit(settings: RetrofitSettings, folder: Path | None = None) -> Retrofit:
    """Open model and text, and convert the model; nothing is written.

    Args:
        settings: What to do.
        folder: For a retrofit that is resumed, its folder.

    Raises:
        ValueError: The settings do not go together or with the model, there is too little text, or
            a retrofit is resumed and its text has changed.
        TypeError, NotImplementedError: The model cannot be converted; see `colonnade.hf.retrofit`.
        OSError: The model or the text cannot be read.
    """
    settings.check()
    model = load_dense(settings.model)
    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    text = None if settings.eval_data is None else Path(settings.eval_data)
    corpus = open_tokens(tokenizer, Path(settings.data), text, settings.eval_share)
    _check_fit(settings, model, corpus)
    windows = held_out_windows(corpus, settings.seq_len, settings.eval_windows)
    _check_longer_than_a_block(windows, settings, corpus)
    fingerprint = corpus.fingerprint()
    if settings.fingerprint not in ("", fingerprint):
        raise ValueError(
            f"{corpus.name} or its tokenizer has changed since the retrofit was started: its "
            "tuned and held-out text would mix. Restore it, or start again in another folder."
        )
    attention: str = model.config.get_text_config(decoder=True)._attn_implementation
    _convert(model, settings, corpus, folder)
    return Retrofit(
        replace(settings, fingerprint=fingerprint),
        model,
        attention,
        saved_dtype(settings.model),
        tokenizer,
        corpus,
        windows,
    )


def _check_longer_than_a_block(
    windows: list[tuple[int, int]], settings: RetrofitSettings, corpus: TokenCorpus
) -> None:
    """Refuse held-out windows in which the converted model reads what the dense one reads.

    Raises:
        ValueError: They are no longer than a block.
    """
    begin, end = windows[0]
    if end - begin <= settings.stride:
        held_out = corpus.documents(*corpus.split(HELD_OUT))
        raise ValueError(
            "a held-out document must have more tokens than a block, for within a block everything "
            f"is read; got documents of at most {max(b - a for a, b in held_out)} tokens and "
            f"stride={settings.stride}. Hold out more text, or use a shorter stride."
        )


def _check_fit(settings: RetrofitSettings, model: PreTrainedModel, corpus: TokenCorpus) -> None:
    """Refuse a text or a length that the model cannot take.

    Raises:
        ValueError: Windows are longer than the model's positions or than the text, no longer than a
            block, or hold tokens that the model does not know.
    """
    longest = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if isinstance(longest, int) and settings.seq_len > longest:
        raise ValueError(
            f"seq_len must be at most the model's max_position_embeddings={longest}, got "
            f"seq_len={settings.seq_len}."
        )
    if settings.seq_len <= settings.stride:
        raise ValueError(
            "seq_len must be above stride, for within a block everything is read; got "
            f"seq_len={settings.seq_len} and stride={settings.stride}."
        )
    begin, end = corpus.split(TRAIN)
    if end - begin < settings.seq_len:
        raise ValueError(
            f"the text to tune on must hold at least one window of {settings.seq_len} tokens, got "
            f"{end - begin} tokens of {corpus.name} ({len(corpus)} with what is held out). Use "
            "more text, or a shorter seq_len."
        )
    table: Any = model.get_input_embeddings()
    known = table.weight.shape[0]
    if (highest := int(corpus.read(0, len(corpus)).max())) >= known:
        raise ValueError(
            f"tokenizer and model must belong together, got token {highest} and a model of {known}."
        )


def _convert(
    model: PreTrainedModel, settings: RetrofitSettings, corpus: TokenCorpus, folder: Path | None
) -> None:
    """Convert the layers that the settings name, or those that were suggested."""
    config = model.config.get_text_config(decoder=True)
    layers = range(config.num_hidden_layers)
    if settings.layers != SUGGEST:
        full = full_layers(config)
        # Without any, `retrofit` says so.
        chosen = layers_in(settings.layers, len(layers), full) if full else None
        pattern = settings.pattern()
        hf.retrofit(
            *(model, pattern.stride, pattern.summary, pattern.subblocks, chosen),
            sinks=pattern.sinks,
        )
        return
    if folder is not None and (folder / CONFIG_NAME).exists():
        saved = AutoConfig.from_pretrained(folder).get_text_config(decoder=True)
        hf.retrofit(model, patterns={layer: patterns_of(saved, layer) for layer in layers})
        return
    assert settings.budget is not None, "checked with the settings"
    hf.retrofit(model, patterns=_suggested(model, settings, corpus))


def _suggested(
    model: PreTrainedModel, settings: RetrofitSettings, corpus: TokenCorpus
) -> Mapping[int, Patterns]:
    """Return the patterns that are suggested by windows of the training text."""
    windows = PackedWindows(corpus, TRAIN, settings.seq_len, SAMPLES, settings.seed)
    tokens = torch.stack([windows[i]["input_ids"] for i in range(SAMPLES)])
    found = hf.suggest(
        model.eval(),
        tokens,
        stride=settings.stride,
        summary=settings.summary,
        sinks=settings.sinks,
        windows=(),
        budget=settings.budget,
    )
    return found.patterns


def prepare_folder(folder: Path) -> None:
    """Make an empty folder for a retrofit.

    Raises:
        ValueError: There is something in it.
        OSError: It cannot be made or written.
    """
    refuse_filled(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=folder).close()


def refuse_filled(folder: Path) -> None:
    """Refuse a folder that holds anything, before much is done for it.

    Raises:
        ValueError: There is something in it, or it is no folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"the folder of a retrofit must be empty, got {folder}. Name another one; --resume "
            "goes on with a retrofit that was started."
        )


def run(
    retrofit: Retrofit,
    folder: Path,
    say: Callable[[str], object] = print,
    bar: Bar = no_bar,
) -> list[dict[str, Any]]:
    """Score, tune, save and score again, going on where the folder says that a run was cut off.

    Returns:
        What was measured, as in `results.jsonl`.
    """
    model, settings = retrofit.model, retrofit.settings
    settings.save(folder)
    _save_config(retrofit, folder)
    begin, end = retrofit.corpus.split(TRAIN)
    say(
        f"{model.num_parameters():,} parameters; {end - begin:,} tokens of {retrofit.corpus.name} "
        f"to tune on, {len(retrofit.corpus) - end:,} held out"
    )
    results = Results(retrofit, folder, bar)
    with attending_by(model, retrofit.attention):
        results.add(DENSE, model)
    results.add(CONVERTED, model)
    if settings.steps == 0:
        _save(model, retrofit, folder)
    elif not results.has(TUNED):
        dense = None
        if settings.distill and not settings.lora:
            with attending_by(model, retrofit.attention):
                dense = frozen_copy(model)
        steps = _tune(model, dense, retrofit, folder, say)
        retrofit.settings = settings = replace(settings, steps=steps)
        results.add(TUNED, hf.load(folder, dtype=torch.float32).to(model.device))
    if settings.tune_dense and not results.has(DENSE_TUNED):
        model = load_dense(settings.model)
        alone = replace(settings, distill=0.0)
        _tune(model, None, replace(retrofit, settings=alone), folder / "dense", say)
        results.add(DENSE_TUNED, load_dense(str(folder / "dense")))
    return results.lines


def _tune(
    model: PreTrainedModel,
    dense: PreTrainedModel | None,
    retrofit: Retrofit,
    folder: Path,
    say: Callable[[str], object],
) -> int:
    """Tune a model and save it; return for how many steps."""
    settings = retrofit.settings
    tuning = Tuning(model, dense, retrofit.attention, settings, retrofit.corpus, folder)
    checkpoint = find_checkpoint(folder)
    steps = settings.steps
    if steps is None:
        steps, seconds = tuning.steps_for(settings.minutes)
        say(f"{seconds:.2f} s a step: {steps} steps fill the {settings.minutes:g} minutes")
        replace(settings, steps=steps).save(folder)
    if checkpoint is not None:
        say(f"resuming from {checkpoint}")
    _save(tuning.run(steps, checkpoint), retrofit, folder)
    return steps


def _save(model: PreTrainedModel, retrofit: Retrofit, folder: Path) -> None:
    """Save a model in the type that it came in, with its tokenizer."""
    torch.nn.Module.to(model, retrofit.dtype)
    model.save_pretrained(folder)
    retrofit.tokenizer.save_pretrained(folder)


def _save_config(retrofit: Retrofit, folder: Path) -> None:
    """Write the configuration that goes with the weights to come, unless it is there already.

    The model is in float32 here, whatever it is saved in.
    """
    if (folder / CONFIG_NAME).exists():
        return
    config = copy.deepcopy(retrofit.model.config)
    config.dtype = retrofit.dtype
    # Whole or not at all: patterns that were suggested are read from it.
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        config.save_pretrained(temporary)
        Path(temporary, CONFIG_NAME).replace(folder / CONFIG_NAME)


class Results:
    """What was measured, a line for each model, kept in `results.jsonl`.

    Args:
        retrofit: What to measure with.
        folder: Where the file is.
        bar: Opens a progress bar.
    """

    def __init__(self, retrofit: Retrofit, folder: Path, bar: Bar) -> None:
        self._retrofit = retrofit
        self._file = folder / RESULTS_FILE
        self._bar = bar
        self.lines: list[dict[str, Any]] = read_results(folder)

    def has(self, name: str) -> bool:
        """Whether a model was measured already."""
        return any(line["model"] == name for line in self.lines)

    def add(self, name: str, model: PreTrainedModel) -> None:
        """Measure a model and write down what was found, unless that was done before."""
        if self.has(name):
            return
        retrofit = self._retrofit
        begin, end = retrofit.windows[0]
        with self._bar(name, len(retrofit.windows) * (end - begin)) as advance:
            found = score(model, retrofit.corpus, retrofit.windows, advance)
        is_fixed = name in (CONVERTED, TUNED)
        entries = (cache_entries if is_fixed else dense_entries)(model.config, end - begin)
        of_dense = dense_entries(model.config, end - begin)
        line = {
            "model": name,
            **found.as_results(),
            "cache_entries": entries,
            "cache_bytes": entries * entry_bytes(model.config, retrofit.dtype),
            "cache_share": entries / of_dense,
            "steps": retrofit.settings.steps if name in (TUNED, DENSE_TUNED) else 0,
        }
        self.lines.append(line)
        temporary = self._file.with_name(f".{self._file.name}.tmp")
        temporary.write_text("".join(json.dumps(each) + "\n" for each in self.lines))
        temporary.replace(self._file)


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Read what a retrofit has measured so far."""
    file = folder / RESULTS_FILE
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines()]
