"""Dropout on the weights: which are dropped is a function of a seed and of where a weight is.

The weight of key j for query i of head h, in batch row b, has the factor

    0 if w < round(p · 2³²), else float32(1 / (1 - p))

where w is word j mod 4 of Philox-4x32 with 7 rounds, at the counter (j // 4, i, h, b) and with the
seed as its key (64 bits). Heads are query heads, and i and j are positions in the sequence,
whatever chunk, tile, pack or cache they are computed in. In a pack b is the number of the document.
So all backends drop the same weights, and so do a padded batch and its pack, and a sequence and its
chunks.

Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; with 7 rounds, the fewest
that pass all tests of TestU01's BigCrush, as in flash attention.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from colonnade.backends.tracing.operation import may_decide

ROUNDS = 7
MULTIPLIERS = 0xD2511F53, 0xCD9E8D57
KEY_STEPS = 0x9E3779B9, 0xBB67AE85
WORD = 2**32 - 1
"""All bits of a word; words lie in int64, because PyTorch computes little in uint32."""
MOST_FACTORS = 2**22
"""Factors that PyTorch computes at once, where nothing else bounds them: about 32 MB a step."""

Seed = Int[Tensor, " 1"]
Words = tuple[Tensor, Tensor, Tensor, Tensor]


class Dropout(NamedTuple):
    """The dropout of a call, as an operation takes it, flat: `DROPOUT_SCHEMA`.

    Where a call computes a part of a larger one, it says where that part begins.
    """

    p: float = 0.0
    """Share of the weights that is dropped."""
    seed: Seed | None = None
    """Drawn by `drawn`; None if nothing is dropped, or if nothing was drawn yet."""
    first_row: int = 0
    """Number of the first batch row, or of the first document."""
    first_head: int = 0
    """Number of the first query head."""
    first_position: int = 0
    """Position of the first key."""

    def drawn(self, device: torch.device) -> Dropout:
        """Return the same with a seed, which comes from the default generator of the device.

        It stays on the device, so nothing waits for it, and a captured graph draws a new one each
        time it runs.
        Activation checkpointing puts the generator back before it recomputes.
        """
        if self.p == 0 or self.seed is not None:
            return self
        return self._replace(seed=torch.randint(2**62, (1,), device=device))

    @property
    def threshold(self) -> int:
        """Words from this one on are kept; there are 2³² words."""
        return round(self.p * 2**32)

    @property
    def factor(self) -> float:
        """The factor of weights that are kept, to be rounded to float32; 0 if none is."""
        return 0.0 if self.p == 1 else 1 / (1 - self.p)


DROPOUT_SCHEMA = (
    "float dropout_p, Tensor? seed, SymInt first_row, SymInt first_head, SymInt first_position"
)
"""`Dropout` in the schema of an operation."""


def factors(
    dropout: Dropout,
    row: Int[Tensor, "#batch #heads #tiles #queries"],
    head: Int[Tensor, "#batch #heads #tiles #queries"],
    query: Int[Tensor, "#batch #heads #tiles #queries"],
    key: Int[Tensor, "#batch #heads #tiles keys"],
) -> Float[Tensor, "batch heads tiles queries keys"]:
    """Return the factors of weights in float32, given where they are.

    Args:
        dropout: With a seed.
        row: Number of the batch row, or of the document, counted from the first one.
        head: Number of the query head, counted from the first one.
        query: Position of the query, counted from the first key.
        key: Position of the key, counted from the first key. Those of weights that are 0 anyway may
            be anything.
    """
    assert dropout.seed is not None
    row, head = row + dropout.first_row, head + dropout.first_head
    query, key = query + dropout.first_position, key + dropout.first_position
    if row.device.type == "cpu" and may_decide(row) and may_decide(dropout.seed) and _is_compiled():
        found: Tensor = torch.ops.colonnade.native_dropout(
            row, head, query, key, dropout.seed, dropout.threshold, dropout.factor
        )
        return found
    counters = [*(counter[..., None] for counter in (row, head, query)), key[..., None, :]]
    return _in_parts(dropout, dropout.seed, counters)


@functools.cache
def _is_compiled() -> bool:
    """Whether the C++ of backend "native" is there; nothing is built for the factors alone."""
    from colonnade.backends.native.build import reason_unusable

    return reason_unusable(build=False) is None


def _in_parts(dropout: Dropout, seed: Seed, counters: list[Tensor]) -> Tensor:
    """Return factors, computed by PyTorch in parts that bound the memory of what is in between.

    `counters` are rows, heads, queries and keys, and broadcast.
    """
    if not torch.compiler.is_compiling():
        shape = torch.broadcast_shapes(*(counter.shape for counter in counters))
        if shape.numel() > MOST_FACTORS and max(shape[:4]) > 1:
            axis = max(range(4), key=lambda each: shape[each])
            halves = [
                each.tensor_split(2, axis) if each.shape[axis] > 1 else (each, each)
                for each in counters
            ]
            parts = [_in_parts(dropout, seed, list(half)) for half in zip(*halves, strict=True)]
            return torch.cat(parts, axis)
    row, head, query, key = (each & WORD for each in counters)
    words = philox((key >> 2, query, head, row), seed)
    number = key & 3
    word = torch.where(
        number < 2,
        torch.where(number == 0, words[0], words[1]),
        torch.where(number == 2, words[2], words[3]),
    )
    kept = torch.full((), dropout.factor, dtype=torch.float32, device=word.device)
    return torch.where(word >= dropout.threshold, kept, torch.zeros_like(kept))


def philox(counter: Words, seed: Seed) -> Words:
    """Return the four words of Philox-4x32 for a counter, with the seed as the key."""
    one, two, three, four = counter
    keys = seed & WORD, seed >> 32 & WORD
    for step in range(ROUNDS):
        key, other_key = (k + step * by & WORD for k, by in zip(keys, KEY_STEPS, strict=True))
        (first_high, first_low), (second_high, second_low) = (
            _halves(word, by) for word, by in zip((one, three), MULTIPLIERS, strict=True)
        )
        one, three = second_high ^ two ^ key, first_high ^ four ^ other_key
        two, four = second_low, first_low
    return one, two, three, four


def _halves(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Return the high and the low word of a product.

    Nothing in between has more than 49 bits: what overflows in C++ that a compiler of PyTorch
    writes may come out as anything.
    """
    low = word * (multiplier & 0xFFFF)
    high = word * (multiplier >> 16) + (low >> 16)
    return high >> 16, (high & 0xFFFF) << 16 | low & 0xFFFF


def multiply_(weights: Tensor, factors: Tensor | None) -> Tensor:
    """Multiply weights by `factors` in place; None where nothing is dropped."""
    return weights if factors is None else weights.mul_(factors)
