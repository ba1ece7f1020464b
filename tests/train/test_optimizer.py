"""Muon and AdamW as one optimizer: the same steps as apart, also through a saved state."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.optim import AdamW, Muon

from colonnade.hf import SparseTransformerConfig, SparseTransformerForCausalLM
from colonnade.train.optimizer import BETAS, CombinedOptimizer, make_optimizer


def tiny_model() -> SparseTransformerForCausalLM:
    return SparseTransformerForCausalLM(
        SparseTransformerConfig(
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            stride=4,
            summary=1,
        )
    )


def fill_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_in_one_group(name: str) -> None:
    model = tiny_model()
    groups = make_optimizer(model, name, 1e-2, 0.1).param_groups
    grouped = [id(p) for group in groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    for group in groups:
        for parameter in group["params"]:
            assert (group["weight_decay"] > 0) == (parameter.ndim == 2)


def test_combined_optimizers_step_as_they_do_apart() -> None:
    model, apart = tiny_model(), tiny_model()
    apart.load_state_dict(model.state_dict())
    combined = make_optimizer(model, "muon", 1e-2, 0.1)
    tables = ("token.weight", "row.weight", "column.weight", "lm_head.weight")
    named = dict(apart.named_parameters())
    matrices = [p for n, p in named.items() if p.ndim == 2 and not n.endswith(tables)]
    muon = Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = AdamW(
        [
            {"params": [p for n, p in named.items() if n.endswith(tables)], "weight_decay": 0.1},
            {"params": [p for p in named.values() if p.ndim != 2], "weight_decay": 0.0},
        ],
        lr=1e-2,
        betas=BETAS,
        fused=True,
    )
    for seed in range(3):
        fill_gradients(model, seed)
        fill_gradients(apart, seed)
        combined.step()
        muon.step()
        adamw.step()
    for one, other in zip(model.parameters(), apart.parameters(), strict=True):
        assert torch.equal(one, other)


def test_state_survives_saving_and_loading() -> None:
    model, other = tiny_model(), tiny_model()
    first = make_optimizer(model, "muon", 1e-2, 0.1)
    fill_gradients(model, 0)
    first.step()
    other.load_state_dict(model.state_dict())
    second = make_optimizer(other, "muon", 5e-1, 0.1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for optimizer, stepped in ((first, model), (second, other)):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3  # What a schedule does; it has to reach the members.
        fill_gradients(stepped, 1)
        optimizer.step()
    assert isinstance(second, CombinedOptimizer)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_unknown_name_raises() -> None:
    with pytest.raises(ValueError, match="optimizer='sgd'"):
        make_optimizer(tiny_model(), "sgd", 1e-2, 0.1)
