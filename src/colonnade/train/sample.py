"""Continue bytes with a trained model: each as soon as it is drawn, and past its last position."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from colonnade.hf import FixedCache


@dataclass
class Report:
    """What continuing took.

    Attributes:
        prompt_seconds: Until the first byte was there, windows after the first one included.
        seconds: From each window's first new byte to its last.
        num_bytes: Written in these seconds.
        cached: Positions that the last window's cache had seen.
        stored: Entries that each key head kept of them.
        cache_bytes: Allocated for the cache.
    """

    prompt_seconds: float = 0.0
    seconds: float = 0.0
    num_bytes: int = 0
    cached: int = 0
    stored: int = 0
    cache_bytes: int = 0

    def __str__(self) -> str:
        rate = f"{self.num_bytes / self.seconds:,.0f} bytes a second, " if self.num_bytes else ""
        return (
            f"{rate}after {self.prompt_seconds:.2f} s for what was read; the cache kept "
            f"{self.stored:,} entries a head of {self.cached:,} positions, "
            f"{self.cache_bytes / 1024:,.0f} KiB"
        )


def windows(prompt_len: int, num_bytes: int, limit: int) -> Iterator[tuple[int, int]]:
    """How a model with `limit` positions continues a prompt: (bytes read, bytes written) each time.

    Where the prompt and what follows do not fit, the model goes on from the last half window of
    what there is. The last byte that is written is not read, so it takes no position.
    """
    total, left = prompt_len, num_bytes
    read = prompt_len if prompt_len <= limit else max(limit // 2, 1)
    while left > 0:
        written = min(left, limit + 1 - read)
        yield read, written
        total, left = total + written, left - written
        read = min(total, max(limit // 2, 1))


def continue_bytes(
    model: PreTrainedModel,
    prompt: bytes,
    num_bytes: int,
    write: Callable[[bytes], object],
    **options: Any,
) -> Report:
    """Draw `num_bytes` more, and hand each to `write` when it is there.

    Args:
        model: A Sparse Transformer on bytes.
        prompt: At least one byte. Of a longer one than the model has positions, the last half
            window is read; see `windows`.
        num_bytes: How many to draw.
        write: Called with each new byte.
        **options: To `generate`.
    """
    report = Report()
    everything = bytearray(prompt)
    limit = int(model.config.max_position_embeddings)
    for read, written in windows(len(prompt), num_bytes, limit):
        tokens = torch.tensor([list(everything[-read:])], device=model.device)
        cache = FixedCache(model.config)
        stream = _Stream(everything, write)
        start = time.perf_counter()
        # The mask is given: transformers would guess padding from a byte that equals the pad token.
        model.generate(  # type: ignore[operator]  # Typed as an attribute of any module.
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=written,
            past_key_values=cache,
            streamer=stream,
            **options,
        )
        report.prompt_seconds += stream.times[0] - start
        report.seconds += stream.times[-1] - stream.times[0]
        report.num_bytes += len(stream.times) - 1
        report.cached, report.stored = cache.get_seq_length(), cache.num_stored
        report.cache_bytes = cache.nbytes
    return report


class _Stream(BaseStreamer):
    """Takes what `generate` puts: first the prompt, then byte after byte."""

    def __init__(self, everything: bytearray, write: Callable[[bytes], object]) -> None:
        self.everything = everything
        self.write = write
        self.times: list[float] = []
        self.is_prompt = True

    def put(self, value: Tensor) -> None:
        """The next tokens."""
        if not self.is_prompt:
            new = bytes(value.flatten().tolist())
            self.times.append(time.perf_counter())
            self.everything += new
            self.write(new)
        self.is_prompt = False

    def end(self) -> None:
        """Nothing is held back."""
