"""Models whose attention drops weights by default, as GPT-2's does, train on the fast kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, StaticCache

from colonnade.backends.choice import backends
from colonnade.backends.dropout import Dropout
from colonnade.hf import FixedCache, retrofit


def _model(attention: float = 0.1) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "n_embd": 16,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 50,
        "n_positions": 64,
    }
    model = GPT2LMHeadModel(
        GPT2Config(**sizes, attn_pdrop=attention, resid_pdrop=0.0, embd_pdrop=0.0)
    )
    retrofit(model, stride=8, summary=2)
    return model


@pytest.mark.skipif(backends()["native"] is not None, reason="needs native")
@pytest.mark.parametrize("padded", [False, True])
def test_gpt2_trains_with_its_dropout(padded: bool, backends_that_ran: list[str]) -> None:
    """The settings are GPT-2's own: a tenth of all weights."""
    model = _model().train()
    assert model.config.attn_pdrop == GPT2Config().attn_pdrop == 0.1
    tokens = torch.randint(50, (3, 40))
    mask = torch.ones_like(tokens)
    if padded:
        mask[1, 30:] = 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = model(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    assert set(backends_that_ran) == {"native"}
    model.eval()
    assert torch.equal(*(model(tokens, attention_mask=mask).logits for _ in range(2)))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_does_not_change_what_is_dropped(
    side: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row drops what it drops without the padding, whose positions count from its first token."""
    seed = torch.tensor([12345])
    monkeypatch.setattr(Dropout, "drawn", lambda self, device: self._replace(seed=seed))
    model = _model(0.5).train().double()
    tokens, length = torch.randint(50, (2, 33)), 21
    mask = torch.ones_like(tokens)
    some = slice(33 - length, None) if side == "left" else slice(length)
    mask[1] = 0
    mask[1, some] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    found = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    row = torch.cat([tokens[:1, :length], tokens[1:, some]])
    alone = model(row, use_cache=False).logits[1]
    torch.testing.assert_close(found[1, some], alone)


@pytest.mark.parametrize("cache", ["fixed", "fixed static", "dynamic", "static"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()  # One of fixed size has no gradients.
def test_caches_do_not_change_what_is_dropped(
    padded: bool, cache: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In training, which keeps a cache if it is given one: prompt, then a token at a time."""
    seed = torch.tensor([777])
    monkeypatch.setattr(Dropout, "drawn", lambda self, device: self._replace(seed=seed))
    model = _model(0.5).train().double()
    tokens = torch.randint(50, (2, 30))
    mask = torch.ones_like(tokens)
    if padded:
        mask[0, :5] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = model(tokens, attention_mask=mask, position_ids=positions, use_cache=False).logits
    kept = {
        "fixed": lambda: FixedCache(model.config),
        "fixed static": lambda: FixedCache(model.config, 30, static=True),
        "dynamic": lambda: None,
        "static": lambda: StaticCache(config=model.config, max_cache_len=32),
    }[cache]()
    found: list[Tensor] = []
    for begin, end in [(0, 17), *((i, i + 1) for i in range(17, 30))]:
        out = model(
            tokens[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=positions[:, begin:end],
            past_key_values=kept,
            use_cache=True,
        )
        kept = out.past_key_values
        found.append(out.logits)
    is_token = mask.bool()
    torch.testing.assert_close(torch.cat(found, 1)[is_token], whole[is_token])
