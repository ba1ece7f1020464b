"""Time alternatives side by side in one process, round after round, as medians and spreads.

Each round runs every contender once, so that a machine that changes its speed changes it for all.
"""

from __future__ import annotations

import statistics
import timeit
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from colonnade.backends import native
from colonnade.ops import attention
from colonnade.pattern import FixedPattern, Part, check_count

Contender = Callable[[], Any]
"""Runs what is measured once."""
CONTENDERS = ("native", "eager", "dense", "masked")


@dataclass(frozen=True)
class Sizes:
    """The attention to measure; with `backward`, forward and backward together.

    Raises:
        TypeError: A count is not an integer.
        ValueError: A count is below 1, the heads do not divide, or another `dtype`.
    """

    seq_len: int = 16_384
    stride: int = 128
    summary: int = 8
    part: Part = "merged"
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    dtype: str = "float32"
    backward: bool = False

    def __post_init__(self) -> None:
        for name in ("seq_len", "batch", "heads", "kv_heads", "head_dim"):
            check_count(name, getattr(self, name), minimum=1)
        if self.heads % self.kv_heads != 0:
            raise ValueError(
                "heads must be a multiple of kv_heads, "
                f"got heads={self.heads} and kv_heads={self.kv_heads}."
            )
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be float32 or bfloat16, got dtype={self.dtype!r}.")

    def pattern(self) -> FixedPattern:
        """Return the pattern of these sizes."""
        return FixedPattern(self.stride, self.summary, part=self.part)

    def num_pairs(self) -> int:
        """Return the number of pairs (query, key) over the batch and all query heads."""
        return self.batch * self.heads * self.pattern().num_pairs(self.seq_len)

    def inputs(self, device: torch.device | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Draw queries, keys, values and a gradient of the output from a normal distribution.

        They are drawn on `device`; on the CPU if it is None.
        """
        device = torch.device("cpu") if device is None else device
        generator = torch.Generator(device).manual_seed(0)
        query, key, value, grad = (
            torch.randn(
                self.batch, h, self.seq_len, self.head_dim, generator=generator, device=device
            ).to(getattr(torch, self.dtype))
            for h in (self.heads, self.kv_heads, self.kv_heads, self.heads)
        )
        if self.backward:
            query, key, value = (t.requires_grad_() for t in (query, key, value))
        return query, key, value, grad


@dataclass(frozen=True)
class Spread:
    """Median, minimum and maximum of several measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """Summarize the measurements."""
        return cls(statistics.median(numbers), min(numbers), max(numbers))


@dataclass(frozen=True)
class Comparison:
    """Contenders that were timed in turns.

    Attributes:
        seconds: Time of each contender.
        ratio: Time of each contender but the first, divided by that of the first in the same round.
        rounds: Number of times that each contender ran.
    """

    seconds: dict[str, Spread]
    ratio: dict[str, Spread]
    rounds: int


def compare(contenders: Mapping[str, Contender], rounds: int = 9) -> Comparison:
    """Run every contender once in each of `rounds` rounds, after a round that does not count."""
    _, *counted = (
        {name: timeit.timeit(run, number=1) for name, run in contenders.items()}
        for _ in range(rounds + 1)
    )
    first, *others = contenders
    return Comparison(
        {name: Spread.of([each[name] for each in counted]) for name in contenders},
        {name: Spread.of([each[name] / each[first] for each in counted]) for name in others},
        rounds,
    )


def contenders(sizes: Sizes, names: Sequence[str]) -> dict[str, Contender]:
    """Return functions that run the attention, by their names out of `CONTENDERS`.

    "native" and "eager" are our backends, "dense" is PyTorch's causal attention over all earlier
    keys, and "masked" is PyTorch's attention with the same pattern as a boolean mask.
    """
    query, key, value, grad = sizes.inputs()
    pattern = sizes.pattern()
    ours = partial(attention, query, key, value, pattern)
    pytorch = partial(
        scaled_dot_product_attention, query, key, value, enable_gqa=sizes.heads != sizes.kv_heads
    )
    forward: dict[str, Contender] = {
        "native": partial(ours, backend="native"),
        "eager": partial(ours, backend="eager"),
        "dense": partial(pytorch, is_causal=True),
    }
    if "masked" in names:
        # [1, 1, n, n]: with fewer dimensions PyTorch takes a slower way, which keeps all scores.
        forward["masked"] = partial(pytorch, attn_mask=pattern.mask(sizes.seq_len)[None])

    def with_backward(run: Contender) -> tuple[Tensor, ...]:
        return torch.autograd.grad(run(), (query, key, value), grad)

    if sizes.backward:
        return {name: partial(with_backward, forward[name]) for name in names}
    return {name: forward[name] for name in names}


def check(sizes: Sizes) -> None:
    """Refuse sizes that "native" does not run here, by running a single position.

    Raises:
        ValueError: The pattern of these sizes is impossible.
        NotImplementedError: "native" does not run on this machine.
    """
    contenders(replace(sizes, seq_len=1), ["native"])["native"]()


def ceiling(sizes: Sizes) -> float:
    """Return the seconds that the products at the kernel's tiles and the exponentials take alone.

    Raises:
        NotImplementedError: "native" does not run on this machine.
    """
    forward, backward = native.ceiling(
        torch.empty(0, dtype=getattr(torch, sizes.dtype)), sizes.head_dim, sizes.head_dim
    )
    busy = sizes.num_pairs() * (forward + backward if sizes.backward else forward)
    return busy / torch.get_num_threads()
