"""Start a training run, or resume one, and bring it to its end on the transformers Trainer."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import TrainerControl, TrainerState

from colonnade.hf import SparseTransformerConfig, SparseTransformerForCausalLM, byte_tokenizer
from colonnade.pattern import check_count
from colonnade.train.data import Corpus, PackedWindows, Windows
from colonnade.train.folder import last_checkpoint
from colonnade.train.optimizer import make_optimizer
from colonnade.train.settings import RunSettings
from colonnade.train.steps import UNSEEN, ScheduledTrainer, recompute_layers, seconds_per_step

WARM_UP_STEPS, TIMED_STEPS = 5, 20
"""Steps of a run of minutes that are run before it, timed and thrown away."""


class BitsTrainer(ScheduledTrainer):
    """A Trainer that logs losses in bits per byte too."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add bits to each loss that is logged."""
        for loss, bits in (("loss", "bits_per_byte"), ("eval_loss", "eval_bits_per_byte")):
            if loss in logs:
                logs[bits] = round(logs[loss] / math.log(2), 4)
        super().log(logs, *args, **kwargs)

    def loss_curve(self) -> tuple[list[int], list[float]]:
        """Return (steps, training loss in bits per byte) as logged."""
        logged = [entry for entry in self.state.log_history if "loss" in entry]
        return [int(e["step"]) for e in logged], [e["bits_per_byte"] for e in logged]


def check(config: SparseTransformerConfig, settings: RunSettings) -> None:
    """Refuse a run that could not be finished, before anything is written.

    Raises:
        ValueError: A setting outside its range, sizes that do not divide, or too little data.
    """
    for name in ("minutes", "learning_rate"):
        number = getattr(settings, name)
        if not (math.isfinite(number) and number > 0):
            raise ValueError(f"{name} must be finite and above 0, got {name}={number}.")
    for name, minimum in (("steps", 0), ("batch_size", 1), ("warmup_steps", 0), ("seed", 0)):
        check_count(name, getattr(settings, name), minimum)
    if settings.seed >= 2**32:
        raise ValueError(f"seed must be below 2**32, got seed={settings.seed}.")
    if config.max_position_embeddings < 2:
        raise ValueError(
            "context must be at least 2, for the first token of a window has no prediction; got "
            f"context={config.max_position_embeddings}."
        )
    with torch.device("meta"):
        model = SparseTransformerForCausalLM(config)
    make_optimizer(model, settings.optimizer, settings.learning_rate, settings.weight_decay)
    corpus = settings.corpus()
    settings.windows(corpus, "train", config.max_position_embeddings, 1)
    settings.validation_windows(corpus, config.max_position_embeddings)


def start(
    config: SparseTransformerConfig,
    settings: RunSettings,
    folder: Path,
    say: Callable[[str], None] = print,
) -> BitsTrainer:
    """Start a run in a folder and bring it to its end.

    The number of steps is fixed before the run, by timing some if `settings` has none. So the
    schedule, the progress bar and resuming are those of any Trainer run.
    """
    started = time.monotonic()
    corpus = settings.corpus()
    settings = _compiled_if_possible(replace(settings, num_bytes=len(corpus)), say)
    model = _model(config, settings)
    say(f"{model.num_parameters():,} parameters; {len(corpus):,} bytes of {corpus.name}")
    if settings.steps == 0:
        step_seconds = _seconds_per_step(model, corpus, settings, folder)
        left = settings.minutes * 60 - (time.monotonic() - started)
        steps = max(1, int(left / step_seconds))
        say(
            f"{step_seconds * 1000:.0f} ms a step: {steps} steps fill "
            f"the {settings.minutes:g} minutes"
        )
        settings = replace(settings, steps=steps)
    saver = _SettingsSaver(config, settings, folder)
    return _finish(model, corpus, settings, folder, callbacks=[saver])


def resume(folder: Path, say: Callable[[str], None] = print) -> BitsTrainer:
    """Resume a run from its last checkpoint; its losses are those of an unbroken run.

    Raises:
        ValueError: There is no run or no checkpoint, or the data has changed.
    """
    settings = _compiled_if_possible(RunSettings.load(folder), say)
    corpus = settings.corpus()
    checkpoint = last_checkpoint(folder)
    say(f"resuming from {checkpoint}")
    model = _model(SparseTransformerConfig.from_pretrained(folder), settings)
    return _finish(model, corpus, settings, folder, str(checkpoint))


@functools.cache
def reason_not_compiled() -> str | None:
    """Return why torch.compile does not work here, in one line; None: it does. It is tried out."""
    # Unchecked, a build of torch for GPUs names one even where there is none.
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.ones(64, device=device))
    except (RuntimeError, OSError, ValueError) as error:  # Of PyTorch, of files, of encodings.
        cause = getattr(error, "inner_exception", error)
        lines = str(cause).strip().splitlines()[:1]
        if output := getattr(cause, "output", ""):  # Of a C++ compiler.
            lines = output.strip().splitlines()[-1:]
        return lines[0] if lines else type(cause).__name__
    return None


def _compiled_if_possible(settings: RunSettings, say: Callable[[str], None]) -> RunSettings:
    """Return the settings, without compiling where that does not work; say so in one line."""
    if settings.compile and (reason := reason_not_compiled()):
        say(f"not compiled, for torch.compile does not work here: {reason}")
        return replace(settings, compile=False)
    return settings


def _model(config: SparseTransformerConfig, settings: RunSettings) -> SparseTransformerForCausalLM:
    """Draw the weights; recompute and compile block by block: one graph serves all layers."""
    set_seed(settings.seed)
    model = SparseTransformerForCausalLM(config)
    if settings.recompute:
        recompute_layers(model)
    if settings.compile:
        for layer in model.model.layers:
            layer.block.compile()
    return model


def _seconds_per_step(
    model: SparseTransformerForCausalLM, corpus: Corpus, settings: RunSettings, folder: Path
) -> float:
    """Time steps of this very run, after compiling and warm-up; then restore weights and seed."""
    initial = {name: weight.clone() for name, weight in model.state_dict().items()}
    trainer = _make_trainer(
        model,
        corpus,
        replace(settings, steps=WARM_UP_STEPS + TIMED_STEPS),
        folder,
        **UNSEEN,
    )
    seconds = seconds_per_step(trainer, WARM_UP_STEPS)
    model.load_state_dict(initial)
    model.zero_grad()
    set_seed(settings.seed)
    return seconds


class _SettingsSaver(TrainerCallback):
    """Writes the settings after the first step, so that a run which fails before leaves nothing."""

    def __init__(
        self, config: SparseTransformerConfig, settings: RunSettings, folder: Path
    ) -> None:
        self.config = config
        self.settings = settings
        self.folder = folder

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.global_step == 1:
            self.config.save_pretrained(self.folder)
            self.settings.save(self.folder)


def _finish(
    model: SparseTransformerForCausalLM,
    corpus: Corpus,
    settings: RunSettings,
    folder: Path,
    checkpoint: str | None = None,
    callbacks: list[TrainerCallback] | None = None,
) -> BitsTrainer:
    """Train to the last step, from a checkpoint if there is one, and save model and tokenizer."""
    trainer = _make_trainer(
        model,
        corpus,
        settings,
        folder,
        logging_steps=max(1, settings.steps // 50),
        save_steps=max(1, settings.steps // 5),
        eval_dataset=settings.validation_windows(corpus, model.config.max_position_embeddings),
        callbacks=callbacks,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.evaluate()
    model.config.use_cache = True  # The Trainer trains without, and would save that.
    trainer.save_model(str(folder))
    byte_tokenizer().save_pretrained(folder)
    return trainer


def _make_trainer(
    model: SparseTransformerForCausalLM,
    corpus: Corpus,
    settings: RunSettings,
    folder: Path,
    eval_dataset: Windows | PackedWindows | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **arguments: Any,
) -> BitsTrainer:
    """Make a Trainer for the steps of `settings`; `arguments` go to TrainingArguments."""
    context = model.config.max_position_embeddings
    optimizer = make_optimizer(
        model, settings.optimizer, settings.learning_rate, settings.weight_decay
    )
    return BitsTrainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=settings.steps,
            per_device_train_batch_size=settings.batch_size,
            per_device_eval_batch_size=settings.batch_size,
            warmup_steps=min(settings.warmup_steps, settings.steps),
            max_grad_norm=1.0,
            use_cpu=not torch.accelerator.is_available(),
            bf16=settings.bf16,
            seed=settings.seed,
            save_total_limit=2,
            report_to="none",
            dataloader_pin_memory=torch.cuda.is_available(),
            **arguments,
        ),
        train_dataset=settings.windows(
            corpus, "train", context, settings.steps * settings.batch_size
        ),
        eval_dataset=eval_dataset,
        optimizers=(optimizer, None),
        callbacks=callbacks,
    )
