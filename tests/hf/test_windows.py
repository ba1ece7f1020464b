"""Layers with a sliding window, and learnt sink logits: what they give is what they gave."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, DynamicCache, StaticCache

import colonnade as col
from colonnade.hf import FixedCache, retrofit
from colonnade.hf.settings import patterns_of
from colonnade.hf.windows import window_of
from tests.hf.drawn import by_the_oracle
from tests.hf.models import (
    ALL_WINDOWED,
    WINDOW,
    WINDOWED_FAMILIES,
    dense_model,
    enable_recomputation,
    generate,
    positions_of,
    prompts,
    windowed_model,
)

pytestmark = pytest.mark.plain
each_family = pytest.mark.parametrize("family", WINDOWED_FAMILIES)
most_slowly = pytest.mark.parametrize(
    "family",
    [
        pytest.param(each, marks=() if each in ("mistral", "gpt_oss") else pytest.mark.slow)
        for each in WINDOWED_FAMILIES
    ],
)
CHUNKS = [3, 1, 9, 1, 1, 2, 6]
CACHES: dict[str, Callable[[Any], Any]] = {
    "fixed": FixedCache,
    "fixed, static": lambda config: FixedCache(config, 30, static=True),
    "dynamic": lambda config: DynamicCache(),
    "dynamic, with windows": lambda config: DynamicCache(config=config),
    "static": lambda config: StaticCache(config=config, max_cache_len=30),
    "static, full": lambda config: StaticCache(config=config, max_cache_len=23),
}


def _near(found: Tensor, expected: Tensor) -> None:
    assert expected.abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def _padded(ids: Tensor) -> dict[str, Tensor]:
    mask = torch.ones_like(ids)
    mask[0, :9] = 0
    return {"attention_mask": mask, "position_ids": positions_of(mask)}


def _in_chunks(model: Any, ids: Tensor, cache: Any, where: dict[str, Tensor]) -> Tensor:
    """Return the logits of calls that go on from a cache."""
    parts, begin = [], 0
    for size in CHUNKS:
        end = begin + size
        piece = {name: each[:, begin:end] for name, each in where.items()}
        if "attention_mask" in where:
            piece["attention_mask"] = where["attention_mask"][:, :end]
        parts.append(model(ids[:, begin:end], past_key_values=cache, **piece).logits)
        begin = end
    return torch.cat(parts, 1)


@each_family
@torch.no_grad()
def test_without_a_layer_it_is_the_model_it_was(family: str) -> None:
    """transformers' own attention sets the off-by-one of a window; alone, padded and packed."""
    dense, model = windowed_model(family), retrofit(windowed_model(family), 8, 2, layers=[])
    ids = prompts(2, 23)
    whole, where = dense(ids).logits, _padded(ids)
    _near(model(ids).logits, whole)
    # The window matters, and so does every position of it.
    for other in (WINDOW - 1, WINDOW + 1):
        assert (windowed_model(family, sliding_window=other)(ids).logits - whole).abs().max() > 1e-3
    tokens = where["attention_mask"].bool()
    _near(model(ids, **where).logits[tokens], dense(ids, **where).logits[tokens])
    documents = ids.split([11, 12], 1)
    positions = torch.cat([torch.arange(11), torch.arange(12)])[None].expand(2, -1)
    alone = torch.cat([dense(each).logits for each in documents], 1)
    _near(model(ids, position_ids=positions, use_cache=False).logits, alone)


@most_slowly
@torch.no_grad()
def test_every_cache_gives_what_the_whole_gives(family: str) -> None:
    dense, model = windowed_model(family), retrofit(windowed_model(family), 8, 2, layers=[])
    ids = prompts(2, 23)
    for where in ({}, _padded(ids)):
        expected = dense(ids, **where).logits
        tokens = where.get("attention_mask", torch.ones_like(ids)).bool()
        for make in CACHES.values():
            found = _in_chunks(model, ids, make(model.config), where)
            _near(found[tokens], expected[tokens])
    cache = FixedCache(model.config)
    model(ids, past_key_values=cache)
    kept = {window_of(model.config, layer): cache.layers[layer].kv.num_stored for layer in range(3)}
    assert kept == ({WINDOW: WINDOW} | ({} if family in ALL_WINDOWED else {None: 23}))


@most_slowly
@torch.no_grad()
def test_full_layers_become_fixed_and_windows_stay(family: str) -> None:
    """In one model: against the oracle's masks, whole, padded, packed and in every cache."""
    groups = (col.LocalPattern(7, sinks=1), col.FixedPattern(8, 2, sinks=3))
    fixed: dict[int, Any] = {} if family in ALL_WINDOWED else {1: groups}
    model: Any = retrofit(windowed_model(family), patterns=fixed)
    ids = prompts(2, 23)
    with by_the_oracle():
        expected = model(ids, use_cache=False).logits
        alone = model(ids[:1, 9:], use_cache=False).logits
    _near(model(ids).logits, expected)
    where = _padded(ids)
    _near(model(ids, **where).logits[:1, 9:], alone)
    for make in CACHES.values():
        _near(_in_chunks(model, ids, make(model.config), {}), expected)
        _near(_in_chunks(model, ids, make(model.config), where)[:1, 9:], alone)
    rows = model(torch.cat([ids[:1, :9], ids[:1, 9:]], 1), use_cache=False, **_packed(9, 14)).logits
    _near(rows[:, 9:], alone)


def _packed(*lengths: int) -> dict[str, Tensor]:
    ends = torch.tensor([0, *lengths]).cumsum(0)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends}


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"prompt_lookup_num_tokens": 3},
        {"past_key_values": FixedCache},
        {"past_key_values": lambda config: FixedCache(config, 40, static=True)},
    ],
    ids=["default", "static", "beams", "lookup", "fixed", "fixed, static"],
)
def test_generate_by_default_and_otherwise(family: str, options: dict[str, Any]) -> None:
    """`generate` makes a cache that drops what is outside of the windows."""
    dense, model = windowed_model(family), retrofit(windowed_model(family), 8, 2, layers=[])
    lookup = "prompt_lookup_num_tokens" in options
    ids, options = prompts(1 if lookup else 2, 15), {**options, "max_new_tokens": 14}
    given = {name: options[name] for name in options if name != "past_key_values"}
    if "past_key_values" in options:
        options["past_key_values"] = options["past_key_values"](model.config)
    assert torch.equal(generate(model, ids, **options), generate(dense, ids, **given))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_masks_that_are_made_ahead_for_each_kind_of_layer(family: str) -> None:
    """Models with `layer_types` take them as they are, unless the call makes them again."""
    model = retrofit(dense_model(family), 8, 2)
    ids, mask = prompts(2, 15), torch.ones(2, 15, dtype=torch.long)
    mask[1, :6] = 0
    options: dict[str, Any] = {"max_new_tokens": 9, "attention_mask": mask}
    expected = generate(model, ids, **options)
    assert torch.equal(generate(model, ids, cache_implementation="static", **options), expected)
    cache = FixedCache(model.config, 40, static=True)
    assert torch.equal(generate(model, ids, past_key_values=cache, **options), expected)


@most_slowly
def test_gradients_are_those_of_the_model_it_was(family: str) -> None:
    """With recomputation too; those of learnt sink logits among them."""
    ids, where = prompts(2, 23), _padded(prompts(2, 23))
    labels = ids.masked_fill(where["attention_mask"] == 0, -100)
    found = []
    for retrofitted in (False, True):
        model: Any = windowed_model(family)
        if retrofitted:
            retrofit(model, 8, 2, layers=[])
            enable_recomputation(model)
        model.train()(ids, labels=labels, use_cache=False, **where).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    assert ("model.layers.0.self_attn.sinks" in found[0]) == (family == "gpt_oss")
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss"])
@torch.no_grad()
def test_half_precision_is_as_near_as_transformers_own(family: str) -> None:
    ids = prompts(2, 23)
    exact = windowed_model(family)(ids).logits
    dense: Any = windowed_model(family).bfloat16()
    model: Any = retrofit(windowed_model(family).bfloat16(), 8, 2, layers=[])
    error, of_dense = ((each(ids).logits - exact).abs().mean() for each in (model, dense))
    assert error < 1.5 * of_dense


def test_which_layers_keep_their_window() -> None:
    model = retrofit(windowed_model("gemma3_text"), 8, 2, sinks=1)
    own, fixed = col.LocalPattern(WINDOW), col.FixedPattern(8, 2, sinks=1)
    assert [patterns_of(model.config, layer) for layer in range(3)] == [own, fixed, own]
    retrofit(model, patterns={0: own})
    assert [patterns_of(model.config, layer) for layer in range(3)] == [own, col.FullPattern(), own]
    for layers in ([0, 1], [2]):
        with pytest.raises(NotImplementedError, match=r"keeps it.*with full attention, here \[1\]"):
            retrofit(model, 8, 2, layers=layers)
    with pytest.raises(NotImplementedError, match=r"got LocalPattern\(window=4.*for layer 2"):
        retrofit(model, patterns={2: col.LocalPattern(4)})
    mistral = windowed_model("mistral")
    with pytest.raises(NotImplementedError, match=r"every layer has a sliding window.*window=5"):
        retrofit(mistral, 8, 2)
    mistral.config.sliding_window = None
    assert patterns_of(retrofit(mistral, 8, 2).config, 0) == col.FixedPattern(8, 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"layer_types": ["chunked_attention"] * 3}, NotImplementedError, "'chunked_attention'"),
        ({"layer_types": ["linear_attention"] * 3}, NotImplementedError, "'linear_attention'"),
        ({"attention_chunk_size": 8}, NotImplementedError, "attention_chunk_size=8. Set"),
        ({"layer_types": ["sliding_attention"] * 3}, ValueError, "needs sliding_window"),
        ({"attn_logit_softcapping": 50.0}, NotImplementedError, "tanh between scores and softmax"),
    ],
)
def test_other_kinds_of_layers_are_refused(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = dense_model("llama")
    model.config.update(changes)
    with pytest.raises(error, match=message):
        retrofit(model, 8, 2, layers=[])


def test_a_window_must_be_the_same_everywhere() -> None:
    """In configuration, settings, mask and call."""
    ids = prompts(1, 12)
    model: Any = retrofit(windowed_model("gemma3_text"), 8, 2)
    model.config.sliding_window = WINDOW + 1  # Of the mask too, but not of the settings.
    with pytest.raises(NotImplementedError, match=r"one sliding window.*=6.*6 in the mask.*5 in"):
        model(ids)
    model.config.sliding_window = WINDOW
    model(ids)
    model.config.per_layer_config = {2: {"colonnade_window": WINDOW - 1}}
    with pytest.raises(NotImplementedError, match=r"read within it, got sliding_window=5 and Fix"):
        model(ids)
    # The model makes no mask with a window, whatever its configuration says.
    model = dense_model("llama")
    model.config.sliding_window = WINDOW
    retrofit(model, 8, 2, layers=[])
    with pytest.raises(NotImplementedError, match=r"=5 in the configuration .* None in the mask"):
        model(ids)


def test_a_cache_with_other_windows_is_refused() -> None:
    model: Any = retrofit(windowed_model("mistral"), 8, 2, layers=[])
    narrow = AutoConfig.for_model("mistral", num_hidden_layers=3, sliding_window=WINDOW - 1)
    wide = AutoConfig.for_model("mistral", num_hidden_layers=3, sliding_window=WINDOW + 4)
    ids = prompts(1, 23)
    expected = model(ids, use_cache=False).logits
    _near(_in_chunks(model, ids, DynamicCache(config=wide), {}), expected)
    with pytest.raises(NotImplementedError, match=r"holds every position once, or a FixedCache"):
        _in_chunks(model, ids, DynamicCache(config=narrow), {})
    short = StaticCache(config=model.config, max_cache_len=WINDOW - 1)
    with pytest.raises(NotImplementedError, match=r"holds every position once, or a FixedCache"):
        _in_chunks(model, ids, short, {})


def test_padding_between_tokens_and_a_cache_that_drops_positions() -> None:
    """A window counts tokens: what it still reads may be gone from such a cache."""
    model: Any = retrofit(windowed_model("mistral"), 8, 2, layers=[])
    ids, mask = prompts(2, 23), torch.ones(2, 23, dtype=torch.long)
    mask[0, 6:10] = 0
    where = {"attention_mask": mask, "position_ids": positions_of(mask)}
    alone = torch.cat([ids[:1, :6], ids[:1, 10:]], 1)
    expected = model(alone, use_cache=False).logits
    for make in (FixedCache, lambda config: DynamicCache()):
        found = _in_chunks(model, ids, make(model.config), where)
        _near(found[:1][:, mask[0].bool()], expected)
    for kind in ("dynamic, with windows", "static"):
        with pytest.raises(ValueError, match=r"padding must be on the left.*in rows \[0\]"):
            _in_chunks(model, ids, CACHES[kind](model.config), where)


def test_dropout_does_not_depend_on_what_a_cache_dropped() -> None:
    torch.manual_seed(0)
    ids, found = prompts(2, 23), []
    for where in ({}, _padded(ids)):
        for make in CACHES.values():
            model: Any = retrofit(windowed_model("mistral", attention_dropout=0.5), 8, 2, layers=[])
            torch.manual_seed(7)
            with torch.no_grad():
                found.append(_in_chunks(model.train(), ids, make(model.config), where))
    tokens = _padded(ids)["attention_mask"].bool()
    for index, logits in enumerate(found):
        first = found[0 if index < len(CACHES) else len(CACHES)]
        _near(logits[tokens], first[tokens])
