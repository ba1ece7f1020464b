"""Padded and packed batches through the model: each row, each document, is as if alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.hf.test_model import random_model, tokens

SETTINGS: dict[str, dict[str, Any]] = {
    "merged": {},
    "interleaved": {"scheme": "interleaved"},
    "multihead": {"scheme": "multihead"},
    "strided": {"pattern": "strided"},
    "strided interleaved": {"pattern": "strided", "scheme": "interleaved"},
    "local": {"pattern": "local"},
    "full": {"pattern": "full"},
}
each_setting = pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS.keys())
LENGTHS = (21, 9, 1)


def _padded(side: str) -> tuple[Tensor, Tensor]:
    """Tokens [3, 21] and the mask that says which are there."""
    mask = torch.arange(21) < torch.tensor(LENGTHS)[:, None]
    return tokens(3, 21), (mask.flip(1) if side == "left" else mask).long()


@each_setting
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_is_the_row_alone(side: str, changes: dict[str, Any]) -> None:
    model = random_model(**changes)
    ids, mask = _padded(side)
    logits = model(ids, attention_mask=mask).logits
    for row in range(3):
        there = mask[row].bool()
        alone = model(ids[row, None, there]).logits[0]
        torch.testing.assert_close(logits[row, there], alone, rtol=1e-10, atol=1e-10)


@each_setting
@pytest.mark.plain
def test_generation_from_left_padding_is_that_of_each_row(changes: dict[str, Any]) -> None:
    """Through a cache, across the ends of blocks."""
    model = random_model(**changes)
    ids, mask = _padded("left")
    ids, mask = ids[:, 6:], mask[:, 6:]
    options = {"max_new_tokens": 13, "do_sample": False, "pad_token_id": 255}
    together = model.generate(ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    for row in range(3):
        prompt = ids[row, None, mask[row].bool()]
        alone = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        assert torch.equal(together[row], alone[0, prompt.shape[1] :])


@each_setting
def test_a_packed_document_is_the_document_alone(changes: dict[str, Any]) -> None:
    """Found by positions that restart, as transformers' data collators make them."""
    model = random_model(**changes)
    ids = tokens(2, 24)
    rows = ((10, 14), (1, 3, 20))
    positions = torch.stack([torch.cat([torch.arange(n) for n in row]) for row in rows])
    logits = model(ids, position_ids=positions, use_cache=False).logits
    for row, lengths in enumerate(rows):
        begin = 0
        for length in lengths:
            part = slice(begin, begin + length)
            alone = model(ids[row, None, part]).logits[0]
            torch.testing.assert_close(logits[row, part], alone, rtol=1e-10, atol=1e-10)
            begin += length


def test_packed_rows_take_no_cache() -> None:
    model = random_model()
    positions = torch.arange(12).remainder(6)[None]
    with pytest.raises(ValueError, match=r"packed rows.*take no cache"):
        model(tokens(1, 12), position_ids=positions, past_key_values=DynamicCache())
    assert model(tokens(1, 12), position_ids=positions).past_key_values is None


def test_positions_that_do_not_restart_are_one_document() -> None:
    model = random_model()
    ids = tokens(1, 12)
    shifted = model(ids, position_ids=torch.arange(3, 15)[None]).logits
    assert not torch.equal(shifted, model(ids).logits)
    ids_of_two = torch.cat([ids, ids])
    together = model(ids_of_two, position_ids=torch.arange(12)[None].expand(2, -1)).logits
    torch.testing.assert_close(together[:1], model(ids).logits, rtol=1e-10, atol=1e-10)


def test_attention_dropout_is_recomputed_and_is_off_in_evaluation() -> None:
    model = random_model(attention_dropout=0.5)
    ids = tokens(2, 20)
    assert torch.equal(model(ids).logits, model(ids).logits)
    model.train()
    assert not torch.equal(model(ids).logits, model(ids).logits)

    def gradients() -> list[Tensor]:
        torch.manual_seed(5)
        loss = model(ids, labels=ids, use_cache=False).loss
        return [loss, *torch.autograd.grad(loss, list(model.parameters()))]

    plain = gradients()
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable()
    else:
        model.gradient_checkpointing_enable()  # Its name in earlier releases of transformers.
    for one, other in zip(plain, gradients(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)
