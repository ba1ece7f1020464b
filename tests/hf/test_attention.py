"""The attention function by itself: heads whose numbers say what they read, and caches."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel

from colonnade.hf import FixedCache, retrofit
from colonnade.hf.attention import attention_function
from colonnade.hf.mask import PatternMask
from tests.hf.models import (
    SIZES,
    dense_model,
    enable_recomputation,
    generate,
    prompts,
    random_model,
)
from tests.rounding import check_half_the_digits

pytestmark = pytest.mark.plain


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """Be rank 0 of 2, which exchange nothing."""
    distributed.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    yield
    distributed.destroy_process_group()


def _attend(model: Any, heads: int, kv_heads: int, layer: int = 0) -> tuple[Tensor, Tensor]:
    """Return the first heads of the whole attention, and the attention of the first heads."""
    query = torch.randn(1, 4, 40, 8, dtype=torch.float64)
    key, value = torch.randn(2, 1, 4 if kv_heads == heads else 2, 40, 8, dtype=torch.float64)
    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    attention = layers[layer].attn if hasattr(model, "transformer") else layers[layer].self_attn
    whole = attention_function(attention, query, key, value, PatternMask(is_of_call=True))[0][
        :, :, :heads
    ]
    parts = query[:, :heads], key[:, :kv_heads], value[:, :kv_heads]
    return whole, attention_function(attention, *parts, PatternMask(is_of_call=True))[0]


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_some_of_the_heads_are_refused_where_their_numbers_matter(family: str) -> None:
    model = retrofit(dense_model(family), 8, 2, subblocks=2)
    with pytest.raises(NotImplementedError, match=r"hold all heads.*got 2 of 4.*subblocks=1"):
        _attend(model, 2, 2 if family == "gpt2" else 1)
    whole, found = _attend(model, 4, 4 if family == "gpt2" else 2)
    check_half_the_digits(found, whole)


@pytest.mark.usefixtures("two_ranks")
def test_some_of_the_heads_of_two_factors_are_refused() -> None:
    model = random_model(scheme="multihead")
    query, key = torch.randn(1, 2, 20, 2).double(), torch.randn(1, 1, 20, 2).double()
    with pytest.raises(NotImplementedError, match="hold all heads"):
        attention_function(
            model.model.layers[0].block.attention, query, key, key, PatternMask(is_of_call=True)
        )


@pytest.mark.usefixtures("two_ranks")
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_some_of_the_heads_go_where_all_read_the_same(family: str) -> None:
    whole, found = _attend(retrofit(dense_model(family), 8, 2), 2, 2 if family == "gpt2" else 1)
    check_half_the_digits(found, whole)


@pytest.mark.usefixtures("two_ranks")
def test_layers_may_have_head_counts_of_their_own() -> None:
    model: Any = retrofit(dense_model("llama"), 8, 2, subblocks=2)
    model.config.per_layer_config = {1: {"num_attention_heads": 2}}
    query, key = torch.randn(1, 2, 20, 16).double(), torch.randn(1, 1, 20, 16).double()
    attention: Any = model.model.layers[1].self_attn
    attention_function(attention, query, key, key, PatternMask(is_of_call=True))


LATENT: dict[str, Any] = {
    **SIZES,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "first_k_dense_replace": 3,
    "n_group": 1,
    "topk_group": 1,
}


def _worked_on_after_the_cache(kind: str) -> PreTrainedModel:
    """Return a model that makes keys or values for all heads of what the cache gives back."""
    sizes = {**SIZES, "intermediate_size": 48} if kind == "diffllama" else LATENT
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
    assert isinstance(model, PreTrainedModel)
    model.double().eval()
    return model


@pytest.mark.parametrize("kind", ["deepseek_v2", "deepseek_v3", "diffllama"])
def test_what_works_on_what_the_cache_gives_back(kind: str) -> None:
    ids = prompts(2, 30)
    model = retrofit(_worked_on_after_the_cache(kind), 8, 2)
    whole = model(ids, use_cache=False).logits
    cache = FixedCache(model.config)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([13, 1, 16], 1)]
    # Some of these models rotate keys in float32, whatever their type.
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)
    retrofit(model, 8, 2, subblocks=2)
    with pytest.raises(NotImplementedError, match=r"keep the heads.*subblocks=1"):
        model(ids, past_key_values=FixedCache(model.config))
    full = DynamicCache()
    parts = [model(part, past_key_values=full).logits for part in ids.split([13, 1, 16], 1)]
    whole = model(ids, use_cache=False).logits
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [FixedCache, DynamicCache])
@pytest.mark.parametrize("family", ["llama", "gpt2", "sparse_transformer"])
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`")  # Its newer name.
def test_a_cache_under_recomputation_is_refused(family: str, kind: type) -> None:
    ours = family == "sparse_transformer"
    model: Any = random_model() if ours else retrofit(dense_model(family), 8, 2)
    enable_recomputation(model)
    model.train()
    ids = prompts(2, 20)
    make = (lambda: FixedCache(model.config)) if kind is FixedCache else DynamicCache
    with pytest.raises(ValueError, match=r"checkpointing drops the cache.*model\.eval"):
        model(ids, past_key_values=make())
    with pytest.raises(ValueError, match="checkpointing drops the cache"):
        generate(model, ids, past_key_values=make(), max_new_tokens=2)
    model(ids, labels=ids).loss.backward()
    found = generate(model.eval(), ids, past_key_values=make(), max_new_tokens=4)
    assert torch.equal(found, generate(model, ids, use_cache=False, max_new_tokens=4))


def test_a_layer_that_does_not_bring_its_keys_to_the_cache_is_refused() -> None:
    model: Any = retrofit(dense_model("llama"), 8, 2)
    cache = FixedCache(model.config)
    attention = model.model.layers[0].self_attn
    query, key = torch.randn(1, 4, 12, 8).double(), torch.randn(1, 2, 12, 8).double()
    cache.announce(12, None)
    with pytest.raises(ValueError, match=r"come from the FixedCache.*got none from it"):
        attention_function(attention, query, key, key, PatternMask(cache=cache, is_of_call=True))
    keys, values = cache.update(key, key, 0)
    more, mores = (torch.cat([t, t[:, :, :1]], 2) for t in (keys, values))
    with pytest.raises(ValueError, match="got 12 of 13 from it"):
        attention_function(attention, query, more, mores, PatternMask(cache=cache, is_of_call=True))


@pytest.mark.parametrize("family", ["sparse", "llama", "gpt2"])
@pytest.mark.parametrize("way", ["call", "base model", "generate", "configuration"])
def test_weights_are_refused_for_they_are_never_formed(way: str, family: str) -> None:
    """GPT-2 drops the argument before it calls an attention."""
    sparse = family == "sparse"
    model: Any = random_model() if sparse else retrofit(dense_model(family), 8, 2)
    ids, called = prompts(1, 9), model
    ask: dict[str, Any] = {"output_attentions": True}
    if way == "base model":
        called = model.base_model
    elif way == "generate":
        called = partial(generate, model, max_new_tokens=2, return_dict_in_generate=True)
    elif way == "configuration":  # Its setter refuses in transformers' words.
        model.config._output_attentions, ask = True, {}
    with pytest.raises(NotImplementedError, match=r"weights.*output_attentions.*pattern\.mask"):
        called(ids, **ask)
