"""Settings of a retrofit, kept in its folder as `retrofit.json` for resuming."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from colonnade.pattern import FixedPattern, check_count
from colonnade.train.settings import read_settings, write_settings

RETROFIT_FILE = "retrofit.json"
ALL, ALTERNATE, SUGGEST = "all", "alternate", "suggest"

LORA_RATE, FULL_RATE = 5e-4, 5e-5
"""Peak learning rates where none is asked for: of adapters, and of all weights."""


@dataclass(frozen=True)
class RetrofitSettings:
    """Everything that determines a retrofit.

    Attributes:
        model: Folder of a transformers model and its tokenizer, or a name that transformers knows.
        data: File or folder of UTF-8 text to tune on; each file is a document.
        eval_data: File or folder of text that is held out; None: the last tokens of `data`.
        eval_share: Share of the tokens of `data` that is held out, without `eval_data`.
        eval_windows: Number of held-out windows that are scored.
        fingerprint: Hash of the tokens, which must not change; empty until it is known.
        seq_len: Number of tokens in a window, in tuning and in scoring.
        stride: Length of a block.
        summary: Number of columns of every block that all later positions read.
        subblocks: Number of sub-blocks.
        sinks: Number of first positions that all later ones read.
        layers: Layers that get the pattern: "all" with full attention; "alternate", every second
            one of these; numbers and ranges such as "0,2,5-9"; or "suggest", which takes a pattern
            for each layer from `colonnade.hf.suggest`.
        budget: For "suggest", the cache as a share of the dense model's.
        lora: Rank of the adapters; 0: tune all weights.
        distill: Weight of the dense model's distribution in the loss, from 0 to 1; see
            `colonnade.train.distillation`.
        steps: Number of optimizer steps; 0: do not tune; None until it is measured.
        minutes: Time for tuning, measuring included, where steps is None.
        batch_size: Number of windows in a step.
        at_once: Number of windows that go through the model together.
        learning_rate: Peak rate after the warm-up and before the cosine decay to 0; None: 5e-4 for
            adapters and 5e-5 for all weights.
        seed: Seed for adapters and windows.
        bf16: Compute in bfloat16 under autocast.
        recompute: Recompute layers in the backward pass to save memory.
        tune_dense: Tune the dense model as long too, on the same windows, to compare with.
    """

    model: str
    data: str
    eval_data: str | None = None
    eval_share: float = 0.1
    eval_windows: int = 8
    fingerprint: str = ""
    seq_len: int = 2048
    stride: int = 128
    summary: int = 32
    subblocks: int = 1
    sinks: int = 1
    layers: str = ALL
    budget: float | None = None
    lora: int = 16
    distill: float = 0.5
    steps: int | None = None
    minutes: float = 30.0
    batch_size: int = 4
    at_once: int = 1
    learning_rate: float | None = None
    seed: int = 0
    bf16: bool = False
    recompute: bool = False
    tune_dense: bool = False

    @classmethod
    def load(cls, folder: Path) -> RetrofitSettings:
        """Read the settings that a retrofit was started with.

        Raises:
            ValueError: The folder holds no retrofit, or its settings are damaged.
        """
        return read_settings(cls, folder / RETROFIT_FILE, "retrofit")

    def save(self, folder: Path) -> None:
        """Write the settings, whole or not at all."""
        write_settings(self, folder / RETROFIT_FILE)

    @property
    def rate(self) -> float:
        """Peak learning rate."""
        usual = LORA_RATE if self.lora else FULL_RATE
        return usual if self.learning_rate is None else self.learning_rate

    def pattern(self) -> FixedPattern:
        """Return the pattern of the layers that are converted.

        Raises:
            ValueError: It does not exist.
        """
        return FixedPattern(self.stride, self.summary, self.subblocks, sinks=self.sinks)

    def check(self) -> None:
        """Refuse settings that cannot work, whatever the model and the text are.

        Raises:
            TypeError: A count is no integer.
            ValueError: A setting lies outside its range, or does not go with another one.
        """
        self.pattern()
        for name, minimum in _COUNTS.items():
            check_count(name, getattr(self, name), minimum)
        if self.steps is not None:
            check_count("steps", self.steps, 0)
        if self.seed >= 2**32:
            raise ValueError(f"seed must be below 2**32, got seed={self.seed}.")
        for name in ("minutes", "rate"):
            number = getattr(self, name)
            if not (math.isfinite(number) and number > 0):
                name = "learning_rate" if name == "rate" else name
                raise ValueError(f"{name} must be finite and above 0, got {name}={number}.")
        if not 0 < self.eval_share < 1:
            raise ValueError(
                f"eval_share must be between 0 and 1, got eval_share={self.eval_share}."
            )
        if not 0 <= self.distill <= 1:
            raise ValueError(f"distill must be in [0, 1], got distill={self.distill}.")
        if self.batch_size % self.at_once:
            raise ValueError(
                "batch_size must be a multiple of at_once, got "
                f"batch_size={self.batch_size} and at_once={self.at_once}."
            )
        if (self.layers == SUGGEST) != (self.budget is not None):
            raise ValueError(
                f"--budget is for --layers {SUGGEST}, which needs it; got layers={self.layers!r} "
                f"and budget={self.budget}."
            )
        if self.layers == SUGGEST and self.subblocks != 1:
            raise ValueError(
                f"--layers {SUGGEST} has no sub-blocks, got subblocks={self.subblocks}. Leave them "
                "out, or name the layers."
            )
        if self.tune_dense and self.steps == 0:
            raise ValueError("tune_dense needs steps to tune for, got steps=0.")


_COUNTS = {
    "eval_windows": 1,
    "seq_len": 2,
    "lora": 0,
    "batch_size": 1,
    "at_once": 1,
    "seed": 0,
}
"""The least that each count may be."""


def layers_in(text: str, num_layers: int, full: Sequence[int]) -> list[int]:
    """Return the layers that "all", "alternate", or numbers and ranges such as "0,2,5-9" name.

    Args:
        text: These words or numbers.
        num_layers: Number of layers of the model.
        full: Layers with full attention, which are those that words speak of.

    Raises:
        ValueError: The text says something else, or names no layer or one that there is not.
    """
    if text == ALL:
        return list(full)
    if text == ALTERNATE:
        if len(full) < 2:
            raise ValueError(
                f"layers={ALTERNATE!r} needs two layers with full attention, got a model with "
                f"{len(full)}."
            )
        return list(full[1::2])
    found: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(
                f"layers must be {ALL!r}, {ALTERNATE!r}, {SUGGEST!r}, or numbers and ranges such "
                f"as 0,2,5-9, got layers={text!r}."
            )
        if int(last or first) < int(first):
            raise ValueError(
                f"a range of layers must go up, got {part.strip()} in layers={text!r}."
            )
        found += range(int(first), int(last or first) + 1)
    if max(found) >= num_layers:
        raise ValueError(
            f"layers must be in [0, {num_layers}), for the model has {num_layers}, got "
            f"layers={text!r}."
        )
    return sorted(set(found))
