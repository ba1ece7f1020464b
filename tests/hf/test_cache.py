"""`generate` gives with the compressed cache what it gives with everything kept."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache, pipeline
from transformers.cache_utils import Cache, QuantizedLayer

from colonnade.hf import FixedCache, byte_tokenizer, load, retrofit
from tests.hf.models import FAMILIES, dense_model, generate, positions_of, prompts, random_model
from tests.hf.test_batches import HOLES, SETTINGS
from tests.oracle import fixed_mask
from tests.rounding import check_half_the_digits

MODELS = [*SETTINGS, "llama", "gpt2"]
each_model = pytest.mark.parametrize("name", MODELS)
GREEDY: dict[str, Any] = {"max_new_tokens": 20, "pad_token_id": 0}


def _model(name: str) -> Any:
    """Return ours in one of its settings, with room for 96 positions; or another, retrofitted."""
    if name in SETTINGS:
        return random_model(max_position_embeddings=96, **SETTINGS[name])
    return retrofit(dense_model(name), 8, 2, subblocks=2, layers=[0, 2])


def _generate(model: PreTrainedModel, ids: Tensor, **options: Any) -> Any:
    torch.manual_seed(0)
    return generate(model, ids, **{**GREEDY, **options})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("subblocks", [1, 2])
@pytest.mark.plain
def test_tokens_are_those_of_dense_attention_with_the_mask(family: str, subblocks: int) -> None:
    """The oracle is transformers' own attention, without a cache, under the mask of the sets."""
    model, dense = dense_model(family), dense_model(family, attn_implementation="eager")
    retrofit(model, 8, 2, subblocks)
    ids = prompts(2, 21)
    cache = FixedCache(model.config)
    found = _generate(model, ids, past_key_values=cache, max_new_tokens=16)
    heads, kv_heads = 4, getattr(model.config, "num_key_value_heads", 4)
    for _ in range(16):
        n = ids.shape[1]
        mask = fixed_mask(n, kv_heads, stride=8, summary=2, subblocks=subblocks)
        mask = mask.repeat_interleave(heads // kv_heads, 0)
        hidden = torch.zeros(mask.shape, dtype=torch.float64).masked_fill(~mask, -torch.inf)
        logits = dense(ids, attention_mask=hidden.expand(2, -1, -1, -1), use_cache=False).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, ids)
    assert cache.get_seq_length() == 36
    assert cache.num_stored == 4 * 2 + 4


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 2},
    "chunks": {"prefill_chunk_size": 5},
    "chunks of a block": {"prefill_chunk_size": 8},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}


@each_model
@pytest.mark.parametrize(
    "way", [pytest.param(way, marks=pytest.mark.slow if " " in way else ()) for way in WAYS]
)
@pytest.mark.plain
def test_ways_to_generate(name: str, way: str) -> None:
    """Across the ends of two blocks. Ours takes the small cache by itself, others the full one."""
    model = _model(name)
    ids = prompts(1, 19).repeat(1 if "lookup" in way else 2, 2)
    ids[-1] = ids[-1].flip(0)
    options = {"max_new_tokens": 12, **WAYS[way]}
    full = _generate(model, ids, past_key_values=DynamicCache(), **options)
    fixed = _generate(model, ids, past_key_values=FixedCache(model.config), **options)
    assert torch.equal(fixed, full)
    assert torch.equal(_generate(model, ids, **options), full)


@each_model
@pytest.mark.plain
def test_an_assistant_guesses_and_is_corrected(name: str) -> None:
    """Guesses go back across the ends of blocks."""
    model = _model(name)
    assistant = _model(name)
    with torch.no_grad():
        for parameter in assistant.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    ids = prompts(1, 21)
    alone = _generate(model, ids, past_key_values=DynamicCache())
    assisted = _generate(
        model, ids, past_key_values=FixedCache(model.config), assistant_model=assistant
    )
    assert torch.equal(assisted, alone)


@each_model
@pytest.mark.parametrize("way", ["greedy", pytest.param("beams", marks=pytest.mark.slow), "chunks"])
@pytest.mark.plain
def test_left_padded_rows_are_the_rows_alone(name: str, way: str) -> None:
    """Each row has a phase of its own, and keeps what it would keep alone."""
    model = _model(name)
    ids, lengths = prompts(3, 21), (21, 9, 1)
    mask = torch.stack([(torch.arange(21) >= 21 - n).long() for n in lengths])
    cache = FixedCache(model.config)
    options = {"max_new_tokens": 12, **WAYS[way]}
    together = _generate(model, ids, attention_mask=mask, past_key_values=cache, **options)
    for row, length in enumerate(lengths):
        alone = _generate(model, ids[row, None, 21 - length :], past_key_values=None, **options)
        assert torch.equal(together[row, 21:], alone[0, length:])
    seq_lens = cache.layers[0].kv.seq_lens
    assert sorted(set(seq_lens)) == sorted(length + 11 for length in lengths)


@each_model
@pytest.mark.plain
def test_a_conversation_goes_on_from_a_returned_cache(name: str) -> None:
    model = _model(name)
    ids, more = prompts(2, 13), prompts(2, 11)
    options = {"return_dict_in_generate": True, "past_key_values": FixedCache(model.config)}
    first = _generate(model, ids, **options)
    assert first.past_key_values is options["past_key_values"]
    whole = torch.cat([first.sequences, more], 1)
    another = copy.deepcopy(first.past_key_values)
    second = _generate(model, whole, past_key_values=first.past_key_values)
    assert torch.equal(second, _generate(model, whole, past_key_values=DynamicCache()))
    assert torch.equal(second, _generate(model, whole, past_key_values=another))


@each_model
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.plain
def test_static_caches_give_the_same(name: str, padded: bool) -> None:
    model = _model(name)
    ids = prompts(2, 21)
    mask = torch.ones_like(ids)
    mask[1, : 12 * padded] = 0
    full = _generate(model, ids, attention_mask=mask, past_key_values=DynamicCache())
    static = _generate(model, ids, attention_mask=mask, cache_implementation="static")
    assert torch.equal(static, full)


@pytest.mark.slow
@pytest.mark.plain
@pytest.mark.parametrize("name", ["merged", "multihead", "llama"])
def test_a_compiled_step_over_a_static_cache(name: str) -> None:
    """No graph breaks, and no compilation for each token."""
    torch._dynamo.reset()
    model = _model(name)
    ids = prompts(2, 21)
    mask = torch.ones_like(ids)
    mask[1, :12] = 0
    full = _generate(model, ids, attention_mask=mask, past_key_values=DynamicCache())
    cache = StaticCache(config=model.config, max_cache_len=41)
    step = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    positions = positions_of(mask)
    with torch.no_grad():
        logits = model(ids, mask, positions, cache).logits
        for index in range(19):
            token = logits[:, -1:].argmax(-1)
            assert torch.equal(token[:, 0], full[:, 21 + index])
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            inputs = model.prepare_inputs_for_generation(
                token,
                past_key_values=cache,
                attention_mask=mask,
                position_ids=positions[:, -1:] + index + 1,
            )
            logits = step(**inputs).logits


@pytest.mark.slow
@pytest.mark.plain
def test_a_compiled_model_decodes_through_the_small_cache() -> None:
    """The cache breaks the graph, and the results are those without a compiler."""
    model = _model("llama")
    ids = torch.randint(3, 40, (2, 20))
    torch.compiler.reset()
    results = []
    for call in (model.forward, torch.compile(model.forward, backend="eager")):
        cache = FixedCache(model.config)
        with torch.no_grad():
            chunks = [call(c, past_key_values=cache).logits for c in ids.split([15, 1, 1, 3], 1)]
        results.append(torch.cat(chunks, 1))
    torch.testing.assert_close(*results)


@each_model
@pytest.mark.plain
def test_padding_anywhere_in_chunks(name: str) -> None:
    """Logits and gradients, as with a full cache."""
    model = _model(name)
    ids = prompts(4, 21)
    weight = torch.randn(int(HOLES.sum()), model.config.vocab_size, dtype=torch.float64)
    results = []
    for cache in (DynamicCache(), FixedCache(model.config)):
        pieces = []
        for begin, end in ((0, 7), (7, 8), (8, 19), (19, 21)):
            mask = HOLES[:, :end].long()
            positions = positions_of(mask)[:, begin:]
            pieces.append(
                model(ids[:, begin:end], mask, positions, cache).logits
                if name in SETTINGS
                else model(
                    ids[:, begin:end],
                    attention_mask=mask,
                    position_ids=positions,
                    past_key_values=cache,
                ).logits
            )
        logits = torch.cat(pieces, 1)[HOLES]
        grads = torch.autograd.grad((logits * weight).sum(), list(model.base_model.parameters()))
        results.append((logits, torch.cat([grad.flatten() for grad in grads])))
    check_half_the_digits(results[1][0], results[0][0])
    check_half_the_digits(results[1][1], results[0][1])


@pytest.mark.plain
def test_generate_takes_it_by_itself_and_it_is_small() -> None:
    model = random_model(max_position_embeddings=400, subblocks=1)
    out = generate(model, prompts(1, 300), **GREEDY, return_dict_in_generate=True)
    cache = out.past_key_values
    assert isinstance(cache, FixedCache)
    assert cache.get_seq_length() == 319
    assert cache.num_stored == 319 // 8 * 2 + 319 % 8
    # float64, 2 layers, 2 key heads, keys and values 2 and 4 wide; a quarter is room to grow.
    assert cache.nbytes <= 1.25 * (cache.num_stored + 8) * 8 * 2 * 2 * (2 + 4)


@pytest.mark.plain
@pytest.mark.parametrize("name", ["merged", "llama"])
def test_the_text_pipeline_in_batches(name: str) -> None:
    model = _model(name)
    tokenizer = byte_tokenizer()
    if name == "llama":  # It reads padding too.
        model = retrofit(dense_model("llama", vocab_size=len(tokenizer)), 8, 2)
    texts = ["def f(x):", "x", "import os, sys, math", "1 +", "for"]
    options = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
    tokenizer.padding_side = "left"
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=4)
    together = pipe(texts, **options)
    for text, found in zip(texts, together, strict=True):
        ids = tokenizer(text, return_tensors="pt").input_ids
        alone = _generate(model, ids, max_new_tokens=12, pad_token_id=255)[0, ids.shape[1] :]
        assert found[0]["generated_text"] == tokenizer.decode(alone, skip_special_tokens=True)


def _filled(model: PreTrainedModel, ids: Tensor) -> FixedCache:
    cache = FixedCache(model.config)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


def test_rows_are_chosen_repeated_and_forgotten() -> None:
    model = _model("llama")
    ids, token = prompts(3, 21), prompts(3, 1)
    whole = model(torch.cat([ids, token], 1)).logits[:, -1]
    cache = _filled(model, ids)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    order = torch.tensor([2, 0, 1])
    check_half_the_digits(model(token[order], past_key_values=cache).logits[:, 0], whole[order])
    cache = _filled(model, ids)
    cache.batch_repeat_interleave(2)
    assert cache.batch_size == 6
    cache.batch_select_indices(torch.tensor([True, False, True, True, False, True]))
    order = torch.tensor([0, 1, 1, 2])
    check_half_the_digits(model(token[order], past_key_values=cache).logits[:, 0], whole[order])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.batch_size == -1
    model(ids, past_key_values=cache)
    check_half_the_digits(model(token, past_key_values=cache).logits[:, 0], whole)


def test_cropped_it_goes_on_as_if_nothing_had_been_there() -> None:
    model = _model("llama")
    ids = prompts(2, 30)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    positions = positions_of(mask)
    cache = FixedCache(model.config)

    def step(tokens: Tensor, begin: int, end: int) -> Tensor:
        logits: Tensor = model(
            tokens,
            attention_mask=mask[:, :end],
            position_ids=positions[:, begin:end],
            past_key_values=cache,
        ).logits
        return logits

    step(ids[:, :17], 0, 17)
    cache.activate_past_recording()
    step(prompts(2, 9), 17, 26)
    cache.crop(-9)
    assert cache.get_seq_length() == 17
    whole = model(ids, attention_mask=mask, position_ids=positions).logits
    check_half_the_digits(step(ids[:, 17:], 17, 30), whole[:, 17:])


@pytest.mark.plain
def test_what_would_be_silently_wrong_raises() -> None:
    model = _model("llama")
    ids = prompts(2, 12)
    cache = _filled(model, ids)
    padded = torch.ones(2, 13)
    padded[0, 0] = 0
    with pytest.raises(
        ValueError, match=r"what it said when they came.*\[11, 12\].*had \[12, 12\]"
    ):
        model(ids[:, :1], attention_mask=padded, past_key_values=cache)
    with pytest.raises(ValueError, match="cover every position so far"):
        model(ids[:, :1], attention_mask=torch.zeros(2, 1), past_key_values=cache)
    with pytest.raises(ValueError, match="2-D attention_mask"):
        model(ids[:, :1], attention_mask=torch.zeros(2, 1, 1, 13), past_key_values=cache)
    with pytest.raises(ValueError, match="tokens_to_remove must be negative"):
        cache.crop(3)
    with pytest.raises(ValueError, match="what a shorter sequence reads is gone"):
        cache.crop(-7)
    with pytest.raises(NotImplementedError, match="not offloaded"):
        cache.layers[0].offload()
    other = retrofit(dense_model("llama"), 4, 2)
    with pytest.raises(ValueError, match=r"another pattern than layer 0 reads.*FixedCache\(model"):
        model(ids, past_key_values=FixedCache(other.config))
    with pytest.raises(ValueError, match="needs colonnade_stride"):
        FixedCache(dense_model("llama").config)
    padded_cache = FixedCache(model.config)
    model(ids, attention_mask=padded[:, :12], past_key_values=padded_cache)
    with pytest.raises(ValueError, match="holds padded rows"):
        model(ids[:, :1], past_key_values=padded_cache)
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        with pytest.raises(ValueError, match="works with attn_implementation='colonnade'"):
            generate(model, ids, past_key_values=FixedCache(model.config), **GREEDY)
        with pytest.raises(ValueError, match="works with attn_implementation='colonnade'"):
            model(ids[:, :1], past_key_values=copy.deepcopy(cache))


@pytest.mark.plain
@pytest.mark.parametrize("kind", ["quantized", "offloaded", "offloaded_static"])
def test_other_kinds_of_caches_are_refused(kind: str) -> None:
    with pytest.raises(NotImplementedError, match=f"has no {kind} cache"):
        generate(random_model(), prompts(1, 5), cache_implementation=kind, **GREEDY)


class StoredInBytes(QuantizedLayer):
    """A quantised layer, without the package that transformers' own need."""

    def _quantize(self, tensor: Tensor, axis: int = 0) -> Tensor:
        return tensor

    def _dequantize(self, q_tensor: Tensor) -> Tensor:
        return q_tensor


@pytest.mark.plain
@pytest.mark.parametrize("kind", ["sparse_transformer", "llama", "loaded"])
def test_a_cache_that_is_quantised_or_offloaded_is_refused_where_it_is_handed_in(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.accelerator.is_available():
        # An offloaded cache makes a stream, which a torch for GPUs refuses where there is none.
        monkeypatch.setattr(torch, "Stream", object)
    ours = kind == "sparse_transformer"
    model = random_model() if ours else retrofit(dense_model("llama"), 4, 2)
    if kind == "loaded":
        model.save_pretrained(tmp_path)
        model = load(tmp_path)
    ids = prompts(1, 5)
    quantised = Cache(layers=[StoredInBytes() for _ in range(3)])
    for cache, what in (
        (quantised, "a quantised"),
        (DynamicCache(offloading=True), "an offloaded"),
    ):
        with pytest.raises(NotImplementedError, match=f"no offloaded cache, got {what}"):
            model(ids, past_key_values=cache)
        with pytest.raises(NotImplementedError, match=f"got {what}"):
            model.base_model(ids, None, None, cache)
        with pytest.raises(NotImplementedError, match=r"Use FixedCache\(model\.config\)"):
            generate(model, ids, past_key_values=cache, **GREEDY)
    if not ours:
        with pytest.raises(NotImplementedError, match="got an offloaded DynamicCache"):
            generate(model, ids, cache_implementation="offloaded", **GREEDY)
        model.set_attn_implementation("sdpa")
        model(ids, past_key_values=quantised)


def test_a_mask_with_as_many_tokens_elsewhere_is_refused() -> None:
    """The entries that it names were never kept, or are those of other positions."""
    model, ids = retrofit(dense_model("llama"), 8, 2), prompts(1, 12)
    cache = FixedCache(model.config)
    mask = torch.ones(1, 12)
    mask[0, 0] = 0
    model(ids[:, :10], attention_mask=mask[:, :10], past_key_values=cache)
    other = mask.roll(3, 1)
    with pytest.raises(ValueError, match="attention_mask must say of earlier positions what it"):
        model(ids[:, 10:], attention_mask=other, past_key_values=cache)
    found = model(ids[:, 10:], attention_mask=mask, past_key_values=cache).logits
    check_half_the_digits(found, model(ids, attention_mask=mask).logits[:, 10:])


def test_a_call_that_failed_before_anything_was_kept_leaves_an_empty_cache() -> None:
    model, ids = retrofit(dense_model("llama"), 8, 2), prompts(1, 12)
    cache = FixedCache(model.config)
    mask = torch.ones(1, 12)
    mask[0, :3] = 0
    hook = model.model.layers[0].register_forward_pre_hook(_fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        model(ids, attention_mask=mask, past_key_values=cache)
    hook.remove()
    found = model(ids, past_key_values=cache).logits
    check_half_the_digits(found, model(ids).logits)


def _fail(*_: Any) -> None:
    raise RuntimeError("on purpose")


def test_a_crop_to_the_beginning_of_a_later_document_is_refused() -> None:
    """The entries before it are gone, so the earlier document could not continue."""
    model, ids = retrofit(dense_model("llama"), 8, 2), prompts(1, 25)
    cache = FixedCache(model.config)
    model(ids[:, :10], past_key_values=cache)
    model(ids[:, 10:], position_ids=torch.arange(15)[None], past_key_values=cache)
    with pytest.raises(ValueError, match="a document began at the new end or behind it"):
        cache.crop(-15)
