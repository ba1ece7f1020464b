"""Dropout on the weights, drawn again in the backward from the seeds of a call."""

from __future__ import annotations

import torch
from torch import Tensor


def draw_seeds(dropout_p: float, number: int = 1) -> Tensor | None:
    """Draw seeds from PyTorch's default generator, on the CPU; None where nothing is dropped.

    Activation checkpointing puts that generator back before it recomputes.
    """
    return torch.randint(2**62, (number,), device="cpu") if dropout_p > 0 else None


class Dropout:
    """Factors on the weights, 0 or 1/(1-p): the n-th call of equal shape gives equal factors."""

    def __init__(self, p: float, seed: Tensor | None, device: torch.device) -> None:
        self.p = p
        if seed is not None:
            self.generator = torch.Generator(device).manual_seed(int(seed))

    def factors(self, weights: Tensor) -> Tensor | float | None:
        """For the next weights, in their shape and type; None where nothing is dropped."""
        if self.p == 0:
            return None
        if self.p == 1:
            return 0.0
        kept = torch.empty_like(weights).bernoulli_(1 - self.p, generator=self.generator)
        return kept.div_(1 - self.p)


def multiply_(weights: Tensor, factors: Tensor | float | None) -> Tensor:
    """Multiply by `Dropout.factors` in place."""
    return weights if factors is None else weights.mul_(factors)
