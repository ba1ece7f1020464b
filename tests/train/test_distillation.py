"""The loss of tuning against its formula, and the dense model as it was."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from colonnade.hf import retrofit
from colonnade.train.distillation import Losses, Teacher, attending_by, losses
from colonnade.train.logits import Head, find_head
from colonnade.train.tuning import frozen_copy, with_adapters
from tests.hf.models import GROUPED, SIZES, dense_model
from tests.train.tuned import write_model


def linear_head(width: int, vocabulary: int) -> Head:
    weight = torch.randn(vocabulary, width, dtype=torch.float64, requires_grad=True)
    return Head(lambda **_: torch.empty(0), lambda states: states @ weight.mT, is_split=True)


def plain_losses(p_logits: Tensor, q_logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Add both losses up position by position, as the definition has them."""
    terms = []
    for row in range(labels.shape[0]):
        for t in range(labels.shape[1] - 1):
            if (target := int(labels[row, t + 1])) == -100:
                continue
            p = torch.exp(p_logits[row, t]) / torch.exp(p_logits[row, t]).sum()
            q = torch.exp(q_logits[row, t]) / torch.exp(q_logits[row, t]).sum()
            terms.append(torch.stack([-p[target].log(), (q * (q / p).log()).sum()]))
    cross_entropy, divergence = torch.stack(terms).mean(0)
    return cross_entropy, divergence


@pytest.mark.parametrize("at_once", [1, 3, 512])
def test_losses_and_gradients_are_those_of_the_formula(at_once: int) -> None:
    head, teacher = linear_head(5, 11), linear_head(4, 11)
    states = torch.randn(2, 7, 5, dtype=torch.float64, requires_grad=True)
    of_teacher = torch.randn(2, 7, 4, dtype=torch.float64)
    labels = torch.randint(11, (2, 7))
    labels[0, [0, 3]] = labels[1, 6] = -100
    found = losses(head, states, labels, teacher, of_teacher, at_once=at_once)
    expected = plain_losses(head.logits(states), teacher.logits(of_teacher), labels)
    for name, each, right in zip(Losses._fields, found, expected, strict=True):
        assert each.item() == pytest.approx(right.item(), rel=1e-12), name
        ours, theirs = (
            torch.autograd.grad(loss, states, retain_graph=True)[0] for loss in (each, right)
        )
        assert (ours - theirs).abs().max() < 1e-13, name
    assert found.weighted(0.25).item() == pytest.approx(
        0.75 * expected[0].item() + 0.25 * expected[1].item(), rel=1e-12
    )


def test_a_weight_of_nought_or_one_keeps_the_other_loss_out() -> None:
    endless = torch.tensor(math.inf)
    assert Losses(torch.tensor(2.0), endless).weighted(0.0) == 2
    assert Losses(endless, torch.tensor(3.0)).weighted(1.0) == 3


def test_the_last_layer_of_bytes_that_nobody_predicts_costs_nothing() -> None:
    head = linear_head(5, 11)
    labels = torch.full((1, 4), -100)
    found = losses(head, torch.randn(1, 4, 5, dtype=torch.float64), labels)
    assert found.cross_entropy == found.divergence == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_states_and_head_give_the_logits_of_the_model(family: str) -> None:
    model = dense_model(family)
    head = find_head(model)
    tokens = torch.randint(1, 97, (2, 9))
    with torch.no_grad():
        assert head.is_split
        assert torch.equal(head.logits(head.states(input_ids=tokens)), model(tokens).logits)


def test_a_model_that_changes_its_logits_keeps_them_whole() -> None:
    """Granite divides them by a constant."""
    config = AutoConfig.for_model("granite", **{**SIZES, **GROUPED, "logits_scaling": 3.0})
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).eval()
    head = find_head(model)
    tokens = torch.randint(1, 97, (1, 9))
    with torch.no_grad():
        assert not head.is_split
        assert torch.equal(head.logits(head.states(input_ids=tokens)), model(tokens).logits)


def packed() -> dict[str, Tensor]:
    """Return two rows, the first of three documents."""
    positions = torch.cat([torch.arange(20), torch.arange(9), torch.arange(35)])
    return {
        "input_ids": torch.randint(258, (2, 64)),
        "position_ids": torch.stack([positions, torch.arange(64)]),
    }


@pytest.fixture
def dense(tmp_path: Path) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(write_model(tmp_path))
    return model.double()


def apart(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Return the logits of packed rows, a document after the other."""
    ids = inputs["input_ids"]
    first = [model(part).logits for part in ids[:1].split([20, 9, 35], 1)]
    return torch.cat([torch.cat(first, 1), model(ids[1:]).logits])


@torch.no_grad()
def test_the_teacher_is_the_dense_model(dense: PreTrainedModel) -> None:
    """With adapters that say something, converted, on packed rows, in the middle of training."""
    inputs = packed()
    expected = apart(dense, inputs)
    attention = dense.config._attn_implementation
    head = find_head(dense)
    retrofit(dense, 16, 4, layers=[1], sinks=1)
    converted = apart(dense, inputs)
    tuned = with_adapters(dense, 2)
    for name, weight in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.2)
    tuned.train()
    teacher = Teacher(dense, head, attention, tuned.disable_adapter)
    assert (head.logits(teacher.states(**inputs)) - expected).abs().max() < 1e-10
    assert tuned.training
    assert dense.config._attn_implementation == "colonnade"
    assert (head.logits(head.states(**inputs)) - converted).abs().max() > 1e-3
    with tuned.disable_adapter():
        assert (head.logits(head.states(**inputs)) - converted).abs().max() < 1e-10


@torch.no_grad()
def test_a_copy_stays_dense_while_the_model_changes(dense: PreTrainedModel) -> None:
    inputs = packed()
    expected = apart(dense, inputs)
    attention = dense.config._attn_implementation
    retrofit(dense, 16, 4)
    with attending_by(dense, attention):
        copied = frozen_copy(dense)
    for weight in dense.parameters():
        weight.add_(1)
    teacher = Teacher(copied, find_head(copied), attention)
    assert (teacher.head.logits(teacher.states(**inputs)) - expected).abs().max() < 1e-10
    assert not any(weight.requires_grad for weight in copied.parameters())


def test_an_error_in_between_leaves_the_attention_as_it_was(dense: PreTrainedModel) -> None:
    retrofit(dense, 16, 4)
    with attending_by(dense, "sdpa"):
        assert dense.config._attn_implementation == "sdpa"
    with pytest.raises(ZeroDivisionError), attending_by(dense, "sdpa"):
        1 / 0  # noqa: B018
    assert dense.config._attn_implementation == "colonnade"
