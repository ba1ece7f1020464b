"""Calls inside of calls, calls that were interrupted, and what a call may be given."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaModel, LlamaPreTrainedModel, StaticCache
from transformers.cache_utils import DynamicLayer

from colonnade.hf import FixedCache, retrofit
from tests.hf.models import dense_model, prompts, random_model
from tests.rounding import check_half_the_digits

pytestmark = pytest.mark.plain
FIRST, TOTAL = 9, 20
RESTARTS = torch.cat([torch.arange(FIRST), torch.arange(TOTAL - FIRST)])[None]
each_model = pytest.mark.parametrize("family", ["sparse_transformer", "llama", "gpt2"])


def _model(family: str = "llama") -> Any:
    if family == "sparse_transformer":
        return random_model(max_position_embeddings=64)
    return retrofit(dense_model(family), 8, 2, subblocks=2)


class _Head(LlamaPreTrainedModel):
    """A head that keeps to itself what it is told of documents, and calls another model first."""

    def __init__(self, config: Any, other: nn.Module | None, times: int) -> None:
        super().__init__(config)
        self.model = LlamaModel(config)
        self.other, self.times = [other], times

    def forward(self, input_ids: Tensor, **told: Any) -> Tensor:
        for _ in range(self.times):
            for other in self.other:
                if other is not None:
                    other(input_ids)
            states: Tensor = self.model(input_ids, use_cache=False).last_hidden_state
        return states


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("other", [None, "sparse_transformer", "llama", "gpt2"])
@pytest.mark.parametrize(
    "told",
    [
        {"cu_seq_lens_q": torch.tensor([0, FIRST, TOTAL])},
        {"seq_idx": (torch.arange(TOTAL) >= FIRST).int()[None]},
        {"position_ids": RESTARTS},
    ],
    ids=lambda told: next(iter(told)),
)
def test_what_a_head_keeps_to_itself_reaches_its_model(
    told: dict[str, Any], other: str | None, times: int
) -> None:
    base = _model()
    head = _Head(base.config, _model(other) if other else None, times).double().eval()
    head.model.load_state_dict(base.model.state_dict())
    ids = prompts(1, TOTAL)
    parts = [head.model(part).last_hidden_state for part in ids.split([FIRST, TOTAL - FIRST], 1)]
    check_half_the_digits(head(ids, **told), torch.cat(parts, 1))


@each_model
def test_another_model_may_be_called_before_the_mask_is_made(family: str) -> None:
    """By a hook on the model inside, for example."""
    model, other, ids = _model(family), _model("llama"), prompts(1, TOTAL)
    expected = model(ids, position_ids=RESTARTS, use_cache=False).logits
    base = model.base_model
    hook = base.get_input_embeddings().register_forward_hook(lambda *_: void(other(ids)))
    found = model(ids, position_ids=RESTARTS, use_cache=False).logits
    hook.remove()
    check_half_the_digits(found, expected)


def void(_: object) -> None:
    """Drop a result."""


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


@each_model
def test_an_interrupted_call_leaves_nothing(family: str) -> None:
    """Neither documents for a forward that is called past all hooks, nor memory after the next."""
    model, ids = _model(family), prompts(1, TOTAL)
    layer = next(each for each in model.modules() if isinstance(each, nn.ModuleList))[1]
    hook = layer.register_forward_pre_hook(_interrupt)
    tokens = ids.clone()
    kept = weakref.ref(tokens)
    with pytest.raises(KeyboardInterrupt):
        model(tokens, position_ids=RESTARTS, use_cache=False)
    hook.remove()
    with pytest.raises(NotImplementedError, match="has to see what a model is called with"):
        model.base_model.forward(ids, use_cache=False)
    del tokens
    model(ids)
    gc.collect()
    assert kept() is None


@each_model
@pytest.mark.parametrize("make", [FixedCache, DynamicCache, StaticCache])
def test_a_cache_that_a_call_left_unfinished_is_refused(family: str, make: Any) -> None:
    model, ids = _model(family), prompts(1, TOTAL)
    cache = make(model.config, 60) if make is StaticCache else make(config=model.config)
    model(ids[:, :5], past_key_values=cache)
    layer = next(each for each in model.modules() if isinstance(each, nn.ModuleList))[1]
    hook = layer.register_forward_pre_hook(_interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(ids[:, 5:8], past_key_values=cache)
    hook.remove()
    with pytest.raises(ValueError, match=r"got 8 in the first and 5 in the last.*a new cache"):
        model(ids[:, 5:8], past_key_values=cache)


def test_a_cache_may_have_more_layers_than_its_model() -> None:
    model, ids, cache = _model(), prompts(1, TOTAL), DynamicCache()
    cache.layers = [DynamicLayer() for _ in range(5)]
    parts = [model(part, past_key_values=cache).logits for part in ids.split([9, 11], 1)]
    check_half_the_digits(torch.cat(parts, 1), model(ids).logits)


@each_model
@pytest.mark.parametrize("cache", [(), ((torch.zeros(1), torch.zeros(1)),), "cache"], ids=str)
def test_a_cache_of_another_kind_is_refused(family: str, cache: Any) -> None:
    with pytest.raises(TypeError, match="past_key_values must be a Cache"):
        _model(family)(prompts(1, TOTAL), past_key_values=cache)


@each_model
def test_a_dict_of_masks_has_to_be_made_ahead(family: str) -> None:
    masks = {"full_attention": torch.ones(1, TOTAL)}
    with pytest.raises(ValueError, match=r"create_masks_for_generate made, got \['Tensor'\]"):
        _model(family)(prompts(1, TOTAL), attention_mask=masks)
