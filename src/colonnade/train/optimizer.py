"""Optimizers of a run: AdamW as in the paper, or Muon for the matrices beside AdamW for the rest.

Both are torch's own. Muon orthogonalises the update of each matrix, and in short runs needs far
fewer steps than AdamW (the figures are in docs/training.md).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import AdamW, Muon, Optimizer

BETAS = (0.9, 0.999)
NAMES = ("adamw", "muon")


def make_optimizer(
    model: nn.Module, name: str, learning_rate: float, weight_decay: float
) -> Optimizer:
    """The optimizer `name` over all of a model's parameters.

    With "muon" the matrices of the residual blocks get Muon, scaled so that its updates are as
    large as AdamW's; embeddings, output head, biases and norms get AdamW. Weight decay is
    decoupled and spares vectors.

    Raises:
        ValueError: An unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"optimizer must be one of {NAMES}, got optimizer={name!r}.")
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    head = getattr(model, "lm_head", None)
    tables |= {id(head.weight)} if isinstance(head, nn.Linear) else set()
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in tables]
    others = [p for p in model.parameters() if p.ndim == 2 and id(p) in tables]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    if name == "adamw":
        return _adamw([*matrices, *others], vectors, learning_rate, weight_decay)
    muon = Muon(
        matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return Together(muon, _adamw(others, vectors, learning_rate, weight_decay))


def _adamw(
    decayed: list[nn.Parameter],
    not_decayed: list[nn.Parameter],
    learning_rate: float,
    weight_decay: float,
) -> AdamW:
    groups = [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": not_decayed, "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)


class Together(Optimizer):
    """Several optimizers as one, for a schedule and a Trainer that know only one.

    The parameter groups are the parts' own, so a schedule that sets a group's rate sets theirs.
    """

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})

    # The base class has an overload for closures, which no part of a run uses.
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step of every part; a closure is not supported."""
        assert closure is None, "no part of a run passes a closure"
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """The parts' states, in order."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore every part; their groups are new objects afterwards."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
