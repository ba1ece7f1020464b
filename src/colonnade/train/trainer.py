"""The transformers Trainer as a run sets it up, with a log in bits per byte."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from colonnade.hf import SparseTransformerForCausalLM
from colonnade.train.data import Corpus, PackedWindows, Windows
from colonnade.train.optimizer import make_optimizer
from colonnade.train.settings import RunSettings


class BitsTrainer(Trainer):
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


def make_trainer(
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
            lr_scheduler_type="cosine",
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
