"""Optimizers of a run: AdamW as in the paper, or Muon for the matrices and AdamW for the rest.

Both are PyTorch's own. Muon orthogonalises the update of each matrix, and in short runs needs far
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
    """Make the optimizer `name` for all parameters of a model.

    With "muon" the matrices of the residual blocks get Muon, scaled so that its updates are as
    large as AdamW's; embeddings, output head, biases and norms get AdamW. Weight decay is
    decoupled and spares vectors.

    Raises:
        ValueError: An unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"optimizer must be one of {NAMES}, got optimizer={name!r}.")
    tables = {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding) or (name == "lm_head" and isinstance(module, nn.Linear))
    }
    matrices = [p for p in model.parameters() if p.ndim == 2 and id(p) not in tables]
    others = [p for p in model.parameters() if p.ndim == 2 and id(p) in tables]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    decayed = others if name == "muon" else [*matrices, *others]
    adamw = AdamW(
        [
            {"params": decayed, "weight_decay": weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=learning_rate,
        betas=BETAS,
        fused=True,
    )
    if name == "adamw":
        return adamw
    muon = Muon(
        matrices, lr=learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return CombinedOptimizer(muon, adamw)


class CombinedOptimizer(Optimizer):
    """Several optimizers as one, for a schedule and a Trainer that know only one.

    The parameter groups are those of the members, so a schedule that sets a group's rate sets it
    for the member too.
    """

    def __init__(self, *members: Optimizer) -> None:
        self.members = members
        super().__init__(self._groups(), {})

    def _groups(self) -> list[dict[str, Any]]:
        return [group for member in self.members for group in member.param_groups]

    # The base class has an overload for closures, which no run uses.
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take one step with every member; a closure is not supported."""
        assert closure is None, "no run passes a closure"
        for member in self.members:
            member.step()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the members, in order."""
        return {"parts": [member.state_dict() for member in self.members]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore every member; the parameter groups are new objects afterwards."""
        for member, state in zip(self.members, state_dict["parts"], strict=True):
            member.load_state_dict(state)
        self.param_groups = self._groups()
