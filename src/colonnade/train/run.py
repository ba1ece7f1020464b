"""One training run: settings, a step count that fits the minutes, the Trainer, what is left behind.

A run is a folder. It holds `run.json` (the settings, for resuming and evaluating), the Trainer's
checkpoints, and at the end the model and its tokenizer, loadable with `from_pretrained`.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import accelerate  # noqa: F401  # The Trainer's need, known here before a run has begun.
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from colonnade.hf import SparseTransformerConfig, SparseTransformerForCausalLM, byte_tokenizer
from colonnade.pattern import check_count
from colonnade.train.data import Corpus, PackedWindows, Windows, open_corpus, standard_library
from colonnade.train.optimizer import make_optimizer

SETTINGS_FILE = "run.json"
WARM_UP_STEPS, TIMED_STEPS = 5, 20
"""Steps that are thrown away and steps that are timed, before the number of steps is fixed."""
VALIDATION_WINDOWS = 32

RECIPES: dict[str, dict[str, Any]] = {
    # What the paper and its code state: the rate for CIFAR-10 only, the batch size not at all.
    "enwik8": {},
    # What reached the lowest loss in three minutes on two cores.
    "demo": {
        "batch_size": 2,
        "learning_rate": 1e-2,
        "warmup_steps": 30,
        "optimizer": "muon",
    },
}
"""Settings of a run that go with a preset of the model."""


@dataclass(frozen=True)
class RunSettings:
    """What a run is made of; saved with it.

    Attributes:
        data: File or folder; None for the Python standard library's source.
        num_bytes: Length of the data, to notice when it is no longer the same.
        steps: Number of optimizer steps; 0 until it is measured.
        minutes: How long the run may take, measuring and compiling included, if steps is 0.
        batch_size: Windows a step.
        learning_rate: Peak rate, after the warm-up and before the cosine decay to 0.
        warmup_steps: Steps over which the rate rises linearly.
        optimizer: "adamw" or "muon".
        weight_decay: Decoupled decay of matrices.
        seed: Of the weights, the windows and dropout.
        bf16: Compute in bfloat16 under autocast.
        compile: Compile the residual blocks with torch.compile.
        recompute: Recompute blocks in the backward pass to save memory.
        pack: Take each file as a document of its own; nothing attends from one to another.
    """

    data: str | None = None
    num_bytes: int = 0
    steps: int = 0
    minutes: float = 3.0
    batch_size: int = 1
    learning_rate: float = 3.5e-4
    warmup_steps: int = 5_000
    optimizer: str = "adamw"
    weight_decay: float = 0.01
    seed: int = 0
    bf16: bool = False
    compile: bool = False
    recompute: bool = False
    pack: bool = False

    @classmethod
    def load(cls, folder: Path) -> RunSettings:
        """The settings that a run was started with.

        Raises:
            ValueError: The folder holds no run.
        """
        try:
            return cls(**json.loads((folder / SETTINGS_FILE).read_text()))
        except (FileNotFoundError, NotADirectoryError):
            raise ValueError(f"{folder} holds no run: there is no {SETTINGS_FILE} in it.") from None
        except (json.JSONDecodeError, TypeError) as error:
            raise ValueError(f"{folder / SETTINGS_FILE} is damaged: {error}.") from error

    def save(self, folder: Path) -> None:
        """Write the settings, whole or not at all."""
        temporary = folder / f".{SETTINGS_FILE}.tmp"
        temporary.write_text(json.dumps(asdict(self), indent=2) + "\n")
        temporary.replace(folder / SETTINGS_FILE)

    def windows(
        self, corpus: Corpus, split: str, context: int, num_windows: int
    ) -> Windows | PackedWindows:
        """The windows of a split, which the run trains on or is watched by."""
        kind = PackedWindows if self.pack else Windows
        return kind(corpus, split, context, num_windows, self.seed)

    def corpus(self) -> Corpus:
        """The data of the run.

        Raises:
            ValueError: It is gone, or no longer as long as it was.
        """
        corpus = standard_library() if self.data is None else open_corpus(Path(self.data))
        if self.num_bytes not in (0, len(corpus)):
            raise ValueError(
                f"{corpus.name} has {len(corpus)} bytes, but the run was started on "
                f"{self.num_bytes}: its training and held-out bytes would mix."
            )
        return corpus


def recipe(preset: str) -> dict[str, Any]:
    """The settings of a run that go with a preset of the model.

    Raises:
        ValueError: The preset has none: it is not a model of bytes in a row.
    """
    if preset not in RECIPES:
        raise ValueError(
            f"preset must be one of {sorted(RECIPES)} to train on bytes, got preset={preset!r}."
        )
    return RECIPES[preset]


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
    with torch.device("meta"):
        model = SparseTransformerForCausalLM(config)
    make_optimizer(model, settings.optimizer, settings.learning_rate, settings.weight_decay)
    corpus = settings.corpus()
    settings.windows(corpus, "train", config.max_position_embeddings, 1)
    _validation_windows(corpus, config.max_position_embeddings, settings)


def good_at_bf16() -> bool:
    """Whether the processor multiplies bfloat16 matrices in hardware."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def has_compiler() -> bool:
    """Whether torch.compile finds what it needs on a CPU: a C++ compiler and Python's headers."""
    compiler = os.environ.get("CXX", "g++")
    header = Path(sysconfig.get_path("include"), "Python.h")
    return shutil.which(compiler) is not None and header.exists()


def prepare_folder(folder: Path, overwrite: bool) -> None:
    """Make the folder, and see that a run can be written into it.

    Raises:
        ValueError: It holds a run already, and `overwrite` is False.
        OSError: It cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / SETTINGS_FILE).exists():
        if not overwrite:
            raise ValueError(
                f"{folder} holds a run already; --resume goes on with it, --overwrite replaces it."
            )
        for checkpoint in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(checkpoint)
        for weights in folder.glob("*.safetensors"):
            weights.unlink()
    probe = folder / f".{SETTINGS_FILE}.tmp"
    probe.write_text("")
    probe.unlink()


def train(
    config: SparseTransformerConfig,
    settings: RunSettings,
    folder: Path,
    say: Callable[[str], None] = print,
) -> Trainer:
    """Start a run and bring it to its end."""
    started = time.monotonic()
    corpus = settings.corpus()
    settings = replace(settings, num_bytes=len(corpus))
    set_seed(settings.seed)
    model = SparseTransformerForCausalLM(config)
    say(f"{model.num_parameters():,} parameters; {len(corpus):,} bytes of {corpus.name}")
    _prepare(model, settings)
    if settings.steps == 0:
        step_seconds = _seconds_per_step(model, corpus, settings, folder)
        left = settings.minutes * 60 - (time.monotonic() - started)
        settings = replace(settings, steps=max(1, int(left / step_seconds)))
        say(
            f"{step_seconds * 1000:.0f} ms a step: {settings.steps} steps fill "
            f"the {settings.minutes:g} minutes"
        )
    settings.save(folder)
    config.save_pretrained(folder)
    return _run(model, corpus, settings, folder, resume_from=None)


def last_checkpoint(folder: Path) -> Path:
    """The checkpoint that a run goes on from: the last one that was written to its end.

    Raises:
        ValueError: There is none.
    """
    complete = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if _is_complete(path)]
    if not complete:
        raise ValueError(
            f"{folder} holds no checkpoint to resume from: the run ended before its first. "
            "Start it anew with --overwrite."
        )
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]))


def _is_complete(checkpoint: Path) -> bool:
    """Whether the Trainer came to writing its own state, which it does last."""
    try:
        json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
    except (OSError, json.JSONDecodeError):
        return False
    return True


def resume(folder: Path, say: Callable[[str], None] = print) -> Trainer:
    """Go on with a run from its last checkpoint; its losses are those of an unbroken run.

    Raises:
        ValueError: No run, no checkpoint, or other data than it was started on.
    """
    settings = RunSettings.load(folder)
    corpus = settings.corpus()
    checkpoint = last_checkpoint(folder)
    say(f"resuming from {checkpoint}")
    set_seed(settings.seed)
    model = SparseTransformerForCausalLM(SparseTransformerConfig.from_pretrained(folder))
    _prepare(model, settings)
    return _run(model, corpus, settings, folder, resume_from=checkpoint)


def loss_curve(trainer: Trainer) -> tuple[list[int], list[float]]:
    """(steps, training loss in bits per byte), as logged."""
    logged = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [int(e["step"]) for e in logged], [e["bits_per_byte"] for e in logged]


class BitsTrainer(Trainer):
    """A Trainer whose log is in bits per byte too."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add bits to whatever loss is logged."""
        for loss, bits in (("loss", "bits_per_byte"), ("eval_loss", "eval_bits_per_byte")):
            if loss in logs:
                logs[bits] = round(logs[loss] / math.log(2), 4)
        super().log(logs, *args, **kwargs)


def _run(
    model: SparseTransformerForCausalLM,
    corpus: Corpus,
    settings: RunSettings,
    folder: Path,
    resume_from: Path | None,
) -> Trainer:
    context = model.config.max_position_embeddings
    trainer = _make_trainer(
        model,
        corpus,
        settings,
        folder,
        logging_steps=max(1, settings.steps // 50),
        save_steps=max(1, settings.steps // 5),
        eval_dataset=_validation_windows(corpus, context, settings),
    )
    trainer.train(resume_from_checkpoint=None if resume_from is None else str(resume_from))
    trainer.evaluate()
    model.config.use_cache = True  # The Trainer trains without, and would save that.
    trainer.save_model(str(folder))
    byte_tokenizer().save_pretrained(folder)
    return trainer


def _validation_windows(
    corpus: Corpus, context: int, settings: RunSettings
) -> Windows | PackedWindows:
    """Windows to watch a run by, shorter than the context if the data is short."""
    begin, end = corpus.split("validation")
    context = max(2, min(context, end - begin))
    return settings.windows(corpus, "validation", context, VALIDATION_WINDOWS)


def _make_trainer(
    model: SparseTransformerForCausalLM,
    corpus: Corpus,
    settings: RunSettings,
    folder: Path,
    eval_dataset: Windows | PackedWindows | None = None,
    callbacks: list[TrainerCallback] | None = None,
    **arguments: Any,
) -> Trainer:
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


def _prepare(model: SparseTransformerForCausalLM, settings: RunSettings) -> None:
    """Recompute and compile block by block: one graph serves all layers, attention a call in it."""
    if settings.recompute and hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    elif settings.recompute:
        model.gradient_checkpointing_enable()  # Its name in earlier releases of transformers.
    if settings.compile:
        for layer in model.model.layers:
            layer.block.compile()


class _StepClock(TrainerCallback):
    """When each step ended, in seconds."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.ends.append(time.monotonic())


def _seconds_per_step(
    model: SparseTransformerForCausalLM, corpus: Corpus, settings: RunSettings, folder: Path
) -> float:
    """Time steps of this very run after compiling and warm-up, then put the weights back."""
    fresh = {name: weight.clone() for name, weight in model.state_dict().items()}
    clock = _StepClock()
    trainer = _make_trainer(
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
    model.load_state_dict(fresh)
    model.zero_grad()
    set_seed(settings.seed)
    return (clock.ends[-1] - clock.ends[WARM_UP_STEPS - 1]) / TIMED_STEPS
