"""The number of steps that fill a run's minutes, from steps that are timed and thrown away."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import TrainerControl, TrainerState

from colonnade.hf import SparseTransformerForCausalLM
from colonnade.train.data import Corpus
from colonnade.train.settings import RunSettings
from colonnade.train.trainer import make_trainer

WARM_UP_STEPS, TIMED_STEPS = 5, 20


def steps_that_fit(
    model: SparseTransformerForCausalLM,
    corpus: Corpus,
    settings: RunSettings,
    folder: Path,
    started: float,
    say: Callable[[str], None],
) -> int:
    """Return the number of steps that fill what is left of the minutes since `started`, at least 1.

    Afterwards the model's weights and the random state are those of a run that is about to begin.
    """
    step_seconds = _seconds_per_step(model, corpus, settings, folder)
    left = settings.minutes * 60 - (time.monotonic() - started)
    steps = max(1, int(left / step_seconds))
    say(f"{step_seconds * 1000:.0f} ms a step: {steps} steps fill the {settings.minutes:g} minutes")
    return steps


def _seconds_per_step(
    model: SparseTransformerForCausalLM, corpus: Corpus, settings: RunSettings, folder: Path
) -> float:
    """Time steps of this very run, after compiling and warm-up; then restore weights and seed."""
    initial = {name: weight.clone() for name, weight in model.state_dict().items()}
    clock = _StepClock()
    trainer = make_trainer(
        model,
        corpus,
        replace(settings, steps=WARM_UP_STEPS + TIMED_STEPS),
        folder,
        callbacks=[clock],
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    model.load_state_dict(initial)
    model.zero_grad()
    set_seed(settings.seed)
    return (clock.ends[-1] - clock.ends[WARM_UP_STEPS - 1]) / TIMED_STEPS


class _StepClock(TrainerCallback):
    """Records when each step ends, in seconds."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.ends.append(time.monotonic())
