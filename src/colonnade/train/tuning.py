"""Tune a converted model on the transformers Trainer, by adapters or fully, and keep the result."""

from __future__ import annotations

import copy
import math
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments, set_seed

from colonnade.train.data import PackedWindows
from colonnade.train.distillation import Teacher, losses
from colonnade.train.logits import Head, find_head
from colonnade.train.retrofit_settings import RetrofitSettings
from colonnade.train.steps import UNSEEN, ScheduledTrainer, recompute_layers, seconds_per_step
from colonnade.train.tokens import TRAIN, TokenCorpus

WARM_UP_STEPS, TIMED_STEPS = 1, 3
"""Steps of a run of minutes that are run before it, timed and thrown away."""
WARM_UP_SHARE = 0.05
"""Share of the steps over which the learning rate rises."""


class TuningTrainer(ScheduledTrainer):
    """A Trainer with the loss of `colonnade.train.distillation`.

    Args:
        head: Where the logits come from.
        teacher: The dense model; None: the text alone is the target.
        weight: Weight of the dense model's distribution.
        bytes_per_token: Bytes that a token stands for on average, for the log.
        **others: Passed on to `Trainer`.
    """

    def __init__(
        self,
        head: Head,
        teacher: Teacher | None,
        weight: float,
        bytes_per_token: float,
        **others: Any,
    ) -> None:
        super().__init__(**others)
        # The loss is a mean, which the Trainer divides by the number of batches of a step.
        self.model_accepts_loss_kwargs = False
        self._head = head
        self._teacher = teacher
        self._weight = weight
        self._bytes_per_token = bytes_per_token
        self._since_log: list[Tensor] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor:
        """Return the mean loss of a batch of windows.

        The model's parts are called instead of the model, so autocast is entered here.
        """
        assert not return_outputs, "nothing is evaluated during tuning"
        labels = inputs["labels"]
        tokens = {name: inputs[name] for name in ("input_ids", "position_ids")}
        with self.accelerator.autocast():
            teacher = self._teacher
            dense = None if teacher is None else teacher.states(**tokens)
            states = self._head.states(**tokens)
            of_teacher = None if teacher is None else teacher.head
            found = losses(self._head, states, labels, of_teacher, dense)
        self._since_log.append(torch.stack(found).detach())
        return found.weighted(self._weight)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add bits per byte of the text and the divergence since the last log."""
        if "loss" in logs and self._since_log:
            cross_entropy, divergence = torch.stack(self._since_log).mean(0).tolist()
            self._since_log.clear()
            logs["bits_per_byte"] = round(cross_entropy / math.log(2) / self._bytes_per_token, 4)
            if self._teacher is not None:
                logs["divergence"] = round(divergence, 4)
        super().log(logs, *args, **kwargs)


class Tuning:
    """A model that is being tuned: with adapters on it or without, and its dense teacher.

    Args:
        model: The model, converted or dense; adapters are put into it.
        dense: For tuning all weights with a teacher, the dense model; its weights stay.
        attention: Name of the attention under which `model` is dense.
        settings: How to tune.
        corpus: What to tune on.
        folder: Where checkpoints go.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dense: PreTrainedModel | None,
        attention: str,
        settings: RetrofitSettings,
        corpus: TokenCorpus,
        folder: Path,
    ) -> None:
        set_seed(settings.seed)
        self.settings = settings
        self._corpus = corpus
        self._folder = folder
        self._head = find_head(model)
        self._base = model
        # With adapters it is a model of PEFT, which need not be installed without them.
        self.tuned: Any = with_adapters(model, settings.lora) if settings.lora else model
        if settings.recompute:
            recompute_layers(model)
        self._teacher = None
        if settings.distill and settings.lora:
            adapted: Any = self.tuned
            self._teacher = Teacher(model, self._head, attention, lambda: adapted.disable_adapter())
        elif settings.distill and dense is not None:
            self._teacher = Teacher(dense, find_head(dense), attention)

    def steps_for(self, minutes: float) -> tuple[int, float]:
        """Return the number of steps that fill the minutes, and the seconds of each.

        Some steps are run, timed and thrown away.
        """
        started = time.monotonic()
        trained = [p for p in self.tuned.parameters() if p.requires_grad]
        initial = [parameter.detach().clone() for parameter in trained]
        few = replace(self.settings, steps=WARM_UP_STEPS + TIMED_STEPS)
        seconds = seconds_per_step(self._trainer(few, **UNSEEN), WARM_UP_STEPS)
        with torch.no_grad():
            for parameter, before in zip(trained, initial, strict=True):
                parameter.copy_(before)
                parameter.grad = None
        set_seed(self.settings.seed)
        left = minutes * 60 - (time.monotonic() - started)
        return max(1, int(left / seconds)), seconds

    def run(self, steps: int, checkpoint: Path | None = None) -> PreTrainedModel:
        """Tune to the last step, and return the model with its adapters merged.

        Args:
            steps: Number of steps.
            checkpoint: The checkpoint to go on from; None: begin.
        """
        trainer = self._trainer(
            replace(self.settings, steps=steps),
            logging_steps=max(1, steps // 50),
            save_steps=max(1, steps // 20),
        )
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        self._base.config.use_cache = True  # The Trainer trains without, and would save that.
        if not self.settings.lora:
            return self._base
        merged: PreTrainedModel = self.tuned.merge_and_unload()
        return merged

    def _trainer(self, settings: RetrofitSettings, **arguments: Any) -> TuningTrainer:
        """Make a Trainer for the steps of `settings`; `arguments` go to TrainingArguments."""
        assert settings.steps is not None, "the caller knows them"
        windows = PackedWindows(
            self._corpus,
            TRAIN,
            settings.seq_len,
            settings.steps * settings.batch_size,
            settings.seed,
        )
        begin, end = self._corpus.split(TRAIN)
        return TuningTrainer(
            self._head,
            self._teacher,
            settings.distill if self._teacher else 0.0,
            float(self._corpus.num_bytes(begin, end).mean()),
            model=self.tuned,
            args=TrainingArguments(
                output_dir=str(self._folder),
                max_steps=settings.steps,
                per_device_train_batch_size=settings.at_once,
                gradient_accumulation_steps=settings.batch_size // settings.at_once,
                learning_rate=settings.rate,
                warmup_steps=math.ceil(settings.steps * WARM_UP_SHARE),
                weight_decay=0.0,
                max_grad_norm=1.0,
                use_cpu=not torch.accelerator.is_available(),
                bf16=settings.bf16,
                seed=settings.seed,
                save_total_limit=2,
                report_to="none",
                remove_unused_columns=False,
                dataloader_pin_memory=torch.cuda.is_available(),
                **arguments,
            ),
            train_dataset=windows,
        )


def with_adapters(model: PreTrainedModel, rank: int) -> Any:
    """Put LoRA adapters (Hu et al. 2021, arXiv:2106.09685) on every linear layer but the last one.

    They begin as zero, so the model gives what it gave; only they are trained.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules="all-linear",
    )
    with warnings.catch_warnings():
        # PEFT asks for a name that transformers has replaced.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        return get_peft_model(model, config)


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy of a model that is never trained."""
    copied: PreTrainedModel = copy.deepcopy(model).eval()
    copied.requires_grad_(False)
    return copied
