"""Settings of a training run, kept in its folder as `run.json` for resuming and evaluating."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from colonnade.train.data import Corpus, PackedWindows, Windows, open_corpus, standard_library

SETTINGS_FILE = "run.json"
VALIDATION_WINDOWS = 32

Settings = TypeVar("Settings")

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


def read_settings(kind: type[Settings], file: Path, what: str = "run") -> Settings:
    """Read the settings that a run, or `what` it is, was started with.

    Raises:
        ValueError: There is no such file, or it is damaged.
    """
    try:
        return kind(**json.loads(file.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{file.parent} holds no {what}: there is no {file.name} in it.") from None
    except (json.JSONDecodeError, TypeError) as error:
        raise ValueError(f"{file} is damaged: {error}.") from error


def write_settings(settings: Any, file: Path) -> None:
    """Write settings, which are a dataclass, whole or not at all."""
    temporary = file.with_name(f".{file.name}.tmp")
    temporary.write_text(json.dumps(asdict(settings), indent=2) + "\n")
    temporary.replace(file)


@dataclass(frozen=True)
class RunSettings:
    """Everything that determines a run besides the model.

    Attributes:
        data: File or folder to train on; None for the source of Python's standard library.
        num_bytes: Length of the data, which must not change during a run; 0 until it is known.
        steps: Number of optimizer steps; 0 until it is measured.
        minutes: Time for the run, measuring and compiling included, where steps is 0.
        batch_size: Number of windows in a step.
        learning_rate: Peak rate, after the warm-up and before the cosine decay to 0.
        warmup_steps: Number of steps over which the rate rises linearly.
        optimizer: "adamw" or "muon".
        weight_decay: Decoupled decay of matrices.
        seed: Seed for the weights, the windows and dropout.
        bf16: Compute in bfloat16 under autocast.
        compile: Compile the residual blocks with torch.compile.
        recompute: Recompute blocks in the backward pass to save memory.
        pack: Take each file as a document; no document attends to another.
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
    def preset(cls, name: str, **changes: Any) -> RunSettings:
        """Return the settings that go with a preset of the model, with `changes` on top.

        Raises:
            ValueError: The preset has none, since it is not a model of bytes in a row.
        """
        if name not in RECIPES:
            raise ValueError(
                f"preset must be one of {sorted(RECIPES)} to train on bytes, got preset={name!r}."
            )
        return cls(**{**RECIPES[name], **changes})

    @classmethod
    def load(cls, folder: Path) -> RunSettings:
        """Read the settings that a run was started with.

        Raises:
            ValueError: The folder holds no run, or its settings are damaged.
        """
        return read_settings(cls, folder / SETTINGS_FILE)

    def save(self, folder: Path) -> None:
        """Write the settings, whole or not at all."""
        write_settings(self, folder / SETTINGS_FILE)

    def corpus(self) -> Corpus:
        """Open the data of the run.

        Raises:
            ValueError: The data is gone, or its length is not that of the start.
        """
        corpus = standard_library() if self.data is None else open_corpus(Path(self.data))
        if self.num_bytes not in (0, len(corpus)):
            raise ValueError(
                f"{corpus.name} has {len(corpus)} bytes, but the run was started on "
                f"{self.num_bytes}: its training and held-out bytes would mix."
            )
        return corpus

    def windows(
        self, corpus: Corpus, split: str, context: int, num_windows: int
    ) -> Windows | PackedWindows:
        """Return windows of a split, packed if the run is."""
        kind = PackedWindows if self.pack else Windows
        return kind(corpus, split, context, num_windows, self.seed)

    def validation_windows(self, corpus: Corpus, context: int) -> Windows | PackedWindows:
        """Return windows to watch the run by, shorter than the context if the data is short."""
        begin, end = corpus.split("validation")
        context = max(2, min(context, end - begin))
        return self.windows(corpus, "validation", context, VALIDATION_WINDOWS)
