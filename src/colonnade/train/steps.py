"""What runs of all kinds need of the Trainer: one process, recomputation, the time of a step."""

from __future__ import annotations

import functools
import math
import os
import time
from typing import Any

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState

UNSEEN: dict[str, Any] = {"logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
"""Arguments of a Trainer whose steps are timed and thrown away."""


class ScheduledTrainer(Trainer):
    """A Trainer in which every step counts: the rate rises linearly from above 0, then decays.

    That of transformers is 0 in the first step, so a run of one step would train nothing.
    """

    def create_scheduler(
        self, num_training_steps: int, optimizer: Optimizer | None = None
    ) -> LRScheduler:
        """Make the schedule of `rate_share` from the Trainer's number of warm-up steps."""
        if self.lr_scheduler is None:
            warm_up = self.args.get_warmup_steps(num_training_steps)
            share = functools.partial(rate_share, warm_up=warm_up, steps=num_training_steps)
            optimizer = optimizer or self.optimizer
            assert optimizer is not None, "the Trainer makes it first"
            self.lr_scheduler = LambdaLR(optimizer, share)
            self._created_lr_scheduler = True
        return self.lr_scheduler


def rate_share(step: int, warm_up: int, steps: int) -> float:
    """Return the share of the peak rate in a step, counted from 0.

    It is (step + 1) / warm_up up to 1, and from there half a cosine that is 0 when all steps are
    done.
    """
    if step < warm_up:
        return (step + 1) / warm_up
    return (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2


def check_alone() -> None:
    """Refuse to be one of several processes, which would each train and write the same folder.

    Raises:
        ValueError: WORLD_SIZE, which torchrun sets, is above 1.
    """
    if (world := os.environ.get("WORLD_SIZE", "1")) not in ("", "1"):
        raise ValueError(
            f"a run trains in one process, got WORLD_SIZE={world}. Start it without torchrun, or "
            "with --nproc-per-node 1."
        )


def recompute_layers(model: Any) -> None:
    """Have a transformers model recompute each layer in the backward pass, to save memory."""
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()  # Its name in earlier releases of transformers.


def seconds_per_step(trainer: Trainer, warm_up_steps: int) -> float:
    """Run a trainer to its end, and return the mean time of a step after the first ones."""
    clock = _StepClock()
    trainer.add_callback(clock)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    timed = len(clock.ends) - warm_up_steps
    return (clock.ends[-1] - clock.ends[warm_up_steps - 1]) / timed


class _StepClock(TrainerCallback):
    """Records when each step ends, in seconds."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.ends.append(time.monotonic())
