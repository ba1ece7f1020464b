"""Padded and packed batches through the model: each row, each document, is as if alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from tests.hf.models import enable_recomputation, generate, random_model, tokens
from tests.rounding import check_half_the_digits

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
    """Return tokens [3, 21] and the mask that says which are there."""
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
    options = {"max_new_tokens": 13, "pad_token_id": 255}
    together = generate(model, ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    for row in range(3):
        prompt = ids[row, None, mask[row].bool()]
        alone = generate(model, prompt, **options)
        assert torch.equal(together[row], alone[0, prompt.shape[1] :])


HOLES = torch.tensor(
    [
        [token == "#" for token in row]
        for row in (
            "######..############.",
            "..#.#################",
            ".....................",
            "###.................#",
        )
    ]
)


@each_setting
@pytest.mark.plain
def test_padding_anywhere_in_chunks_through_a_cache(changes: dict[str, Any]) -> None:
    """Logits and gradients; one row is all padding, some chunks are for some rows."""
    model = random_model(**changes)
    ids = tokens(4, 21)
    cache, pieces = DynamicCache(), []
    for begin, end in ((0, 7), (7, 8), (8, 19), (19, 21)):
        mask = HOLES[:, :end].long()
        pieces.append(model(ids[:, begin:end], attention_mask=mask, past_key_values=cache).logits)
    whole = model(ids, attention_mask=HOLES.long()).logits
    alone = [model(ids[row, None, there]).logits[0] for row, there in enumerate(HOLES)]
    weight = torch.randn_like(whole[HOLES])
    wanted = list(model.model.parameters())
    results = []
    for logits in (whole[HOLES], torch.cat(pieces, 1)[HOLES], torch.cat(alone)):
        grads = torch.autograd.grad((logits * weight).sum(), wanted)
        results.append((logits, torch.cat([grad.flatten() for grad in grads])))
    for found in results[:2]:
        check_half_the_digits(found[0], results[2][0])
        check_half_the_digits(found[1], results[2][1])


@pytest.mark.plain
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_scores_tokens_as_for_the_row_alone(beams: int) -> None:
    """Beams copy and reorder the cache. Scores are rounded to float32, logits of size 10 at most
    one place apart, before a softmax of 256.
    """
    model = random_model()
    ids, mask = _padded("left")
    ids, mask = ids[:, 6:], mask[:, 6:]
    options = {"max_new_tokens": 13, "pad_token_id": 255, "num_beams": beams}
    options |= {"return_dict_in_generate": True, "output_scores": True}
    together = generate(model, ids, attention_mask=mask, **options)
    for row in range(3):
        prompt = ids[row, None, mask[row].bool()]
        alone = generate(model, prompt, **options)
        assert torch.equal(together.sequences[row, 15:], alone.sequences[0, prompt.shape[1] :])
        for scores, scores_alone in zip(together.scores, alone.scores, strict=True):
            of_row = scores[row * beams : (row + 1) * beams]
            allowed = 8 * torch.finfo(torch.float32).eps * scores_alone.abs().max()
            assert (of_row - scores_alone).abs().max() <= allowed


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


def test_a_chunk_that_restarts_cannot_go_on_from_a_cache() -> None:
    """transformers looks for packed rows only where there is no cache."""
    model = random_model()
    ids = tokens(1, 12)
    cache = model(ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"packed rows.*take no cache"):
        model(
            ids[:, 4:],
            position_ids=torch.tensor([[4, 5, 0, 1, 2, 0, 1, 2]]),
            past_key_values=cache,
        )
    onward = model(ids[:, 4:], position_ids=torch.arange(4, 12)[None], past_key_values=cache)
    check_half_the_digits(onward.logits, model(ids).logits[:, 4:])


def test_one_run_of_positions_packs_all_rows_and_a_mask_of_ones_is_none() -> None:
    model = random_model()
    ids = tokens(2, 12)
    positions = torch.tensor([[0, 1, 2, 3, 0, 0, 1, 2, 3, 4, 5, 6]])
    packed = model(ids, position_ids=positions).logits
    check_half_the_digits(packed[:, :4], model(ids[:, :4]).logits)
    check_half_the_digits(packed[:, 4:5], model(ids[:, 4:5]).logits)
    check_half_the_digits(packed[:, 5:], model(ids[:, 5:]).logits)
    with_mask = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
    assert torch.equal(with_mask, packed)


def test_positions_that_do_not_restart_are_one_document() -> None:
    model = random_model()
    ids = tokens(1, 12)
    shifted = model(ids, position_ids=torch.arange(3, 15)[None]).logits
    assert not torch.equal(shifted, model(ids).logits)
    ids_of_two = torch.cat([ids, ids])
    together = model(ids_of_two, position_ids=torch.arange(12)[None].expand(2, -1)).logits
    torch.testing.assert_close(together[:1], model(ids).logits, rtol=1e-10, atol=1e-10)


KINDS: dict[str, dict[str, Tensor]] = {
    "plain": {},
    "padded": {"attention_mask": HOLES.long()},
    "packed": {"position_ids": torch.cat([torch.arange(n) for n in (5, 1, 15)])[None]},
}
each_kind = pytest.mark.parametrize("where", KINDS.values(), ids=KINDS.keys())


@each_kind
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("changes", [{}, {"scheme": "multihead"}, {"pattern": "strided"}], ids=str)
@pytest.mark.plain
def test_recomputation_drops_the_same_weights(
    changes: dict[str, Any], reentrant: bool, where: dict[str, Tensor]
) -> None:
    """Loss and gradients, to the bit; other draws give others."""
    model = random_model(attention_dropout=0.5, dropout=0.2, **changes).train()
    ids = tokens(4, 21)

    def step(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        model.zero_grad()
        loss = model(ids, labels=ids, use_cache=False, **where).loss
        loss.backward()
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    plain, other = step(5), step(6)
    assert len(plain) == 1 + len(list(model.parameters()))
    assert not torch.equal(plain[0], other[0])
    enable_recomputation(model, use_reentrant=reentrant)
    for one, again in zip(plain, step(5), strict=True):
        assert torch.equal(one, again)


@each_kind
def test_attention_dropout_is_of_training_alone(where: dict[str, Tensor]) -> None:
    """With every weight dropped the attention gives its bias; in evaluation nothing is drawn."""
    model = random_model(attention_dropout=1.0)
    without = random_model()
    without.load_state_dict(model.state_dict())
    ids = tokens(4, 21)
    state = torch.get_rng_state()
    assert torch.equal(model(ids, **where).logits, without(ids, **where).logits)
    assert torch.equal(torch.get_rng_state(), state)
    seen = []
    for layer in model.model.layers:
        attention = layer.block.attention
        attention.register_forward_hook(lambda module, _, y: seen.append((y, module.layer)))
    model.train()(ids, use_cache=False, **where)
    assert len(seen) == 2
    for y, layer in seen:
        assert torch.equal(y, layer.out_proj.bias.expand_as(y))
