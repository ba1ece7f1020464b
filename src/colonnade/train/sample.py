"""Continue bytes with a trained model: one as soon as it is drawn, and past the last position."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from colonnade.hf import FixedCache, compile_config
from colonnade.hf.names import CACHE

COMPILE_FROM = 6_000
"""Number of bytes from which on compiling a step pays: on CPUs it takes 7 to 20 seconds, and then
saves three to four milliseconds a byte."""


@dataclass
class Report:
    """Time and memory that continuing took.

    Attributes:
        prompt_seconds: Time to the first new byte, summed over all windows.
        compile_seconds: Time that the first two compiled steps took, which compile.
        seconds: Time from the first new byte to the last, summed over all windows, but for that.
        num_bytes: Number of bytes that were written in `seconds`.
        seen: Number of positions that the cache of the last window had seen.
        kept: Number of entries that each key head kept of them.
        cache_bytes: Size of the cache in bytes.
    """

    prompt_seconds: float = 0.0
    compile_seconds: float = 0.0
    seconds: float = 0.0
    num_bytes: int = 0
    seen: int = 0
    kept: int = 0
    cache_bytes: int = 0

    def __str__(self) -> str:
        rate = f"{self.num_bytes / self.seconds:,.0f} bytes a second, " if self.num_bytes else ""
        compiling = f" and {self.compile_seconds:.1f} s of compiling" * (self.compile_seconds > 0)
        return (
            f"{rate}after {self.prompt_seconds:.2f} s of reading{compiling}; the cache kept "
            f"{self.kept:,} entries a head of {self.seen:,} positions, "
            f"{self.cache_bytes / 1024:,.0f} KiB"
        )


def windows(prompt_len: int, num_bytes: int, limit: int) -> Iterator[tuple[int, int]]:
    """Yield (bytes read, bytes written) for each window in which a model continues a prompt.

    The model has `limit` positions. Where the prompt does not fit, or the positions are used up, it
    continues from the last half window of what there is. The last byte that a window writes is not
    read in it, so it takes no position.
    """
    half = max(limit // 2, 1)
    total, end = prompt_len, prompt_len + num_bytes
    read = prompt_len if prompt_len <= limit else half
    while total < end:
        written = min(end - total, limit + 1 - read)
        yield read, written
        total += written
        read = min(total, half)


def continue_bytes(
    model: PreTrainedModel,
    prompt: bytes,
    num_bytes: int,
    write: Callable[[bytes], object],
    **options: Any,
) -> Report:
    """Continue a prompt by `num_bytes` bytes, and pass each to `write` as soon as it is drawn.

    From `COMPILE_FROM` bytes on, the step of a byte is compiled where torch.compile works, over a
    cache of fixed size.

    Args:
        model: A Sparse Transformer on bytes.
        prompt: At least one byte. If it is longer than the model has positions, only its end is
            read, half a window; see `windows`.
        num_bytes: Number of bytes to draw.
        write: Called with each new byte.
        **options: Options of `generate`.
    """
    report = Report()
    everything = bytearray(prompt)
    limit = int(model.config.max_position_embeddings)
    compiles = num_bytes >= COMPILE_FROM and _compiler_works()
    if compiles:
        options["compile_config"] = compile_config(model.device)
    for read, written in windows(len(prompt), num_bytes, limit):
        tokens = torch.tensor([list(everything[-read:])], device=model.device)
        # Of one size for all windows, so that a step is compiled once.
        cache = FixedCache(model.config, limit if compiles else None, static=compiles)
        stream = _Stream(everything, write)
        # Without a mask transformers would take a byte that equals the pad token for padding.
        model.generate(  # type: ignore[operator]  # Typed as an attribute of any module.
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=written,
            **{CACHE: cache},
            streamer=stream,
            **options,
        )
        first = 1
        if compiles and report.seen == 0 and len(stream.times) > 3:
            first = 3
            report.compile_seconds = stream.times[3] - stream.times[1]
        report.prompt_seconds += stream.times[1] - stream.times[0]
        report.seconds += stream.times[-1] - stream.times[first]
        report.num_bytes += len(stream.times) - 1 - first
        report.seen, report.kept = cache.get_seq_length(), cache.num_stored
        report.cache_bytes = cache.nbytes
    return report


def _compiler_works() -> bool:
    """Whether torch.compile works here; it is tried out."""
    from colonnade.train.run import reason_not_compiled  # It loads the Trainer.

    return reason_not_compiled() is None


@dataclass
class _Stream(BaseStreamer):
    """Receives from `generate` first the prompt, then one byte after another, each with a time."""

    everything: bytearray
    write: Callable[[bytes], object]
    times: list[float] = field(default_factory=list)

    def put(self, value: Tensor) -> None:
        """Receive the next tokens."""
        self.times.append(time.perf_counter())
        if len(self.times) > 1:
            new = bytes(value.flatten().tolist())
            self.everything += new
            self.write(new)

    def end(self) -> None:
        """Do nothing: no byte has been held back."""
