"""`generate` over a FixedCache of fixed size, compiled and not: the tokens of a full cache."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import CompileConfig, DynamicCache

from colonnade.hf import FixedCache, retrofit
from colonnade.hf.names import CACHE
from tests.hf.models import dense_model, positions_of, prompts
from tests.hf.test_cache import MODELS, WAYS, _generate, _model

pytestmark = pytest.mark.plain
each_model = pytest.mark.parametrize("name", MODELS)
ROOM = 41
LEFT_PADDED = torch.ones(2, 21, dtype=torch.long)
LEFT_PADDED[1, :12] = 0


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


def _uniform(name: str) -> Any:
    """Return a model whose layers are alike: others do not compile in transformers 5.15."""
    return retrofit(dense_model("llama"), 8, 2, subblocks=2) if name == "llama" else _model(name)


def _compiled(backend: str = "aot_eager", **options: Any) -> CompileConfig:
    """Return what lets `generate` compile on a CPU too."""
    options = {"mode": None if backend == "aot_eager" else "default", **options}
    config = CompileConfig(fullgraph=True, backend=backend, **options)
    config._compile_all_devices = True  # type: ignore[assignment]  # Annotated by its default.
    return config


@each_model
@pytest.mark.parametrize(
    "way",
    [
        pytest.param(way, marks=pytest.mark.slow if " " in way else ())
        for way in WAYS
        if "lookup" not in way
    ],
)
def test_ways_to_generate(name: str, way: str) -> None:
    model = _model(name)
    ids = prompts(2, 38)
    options = {"max_new_tokens": 12, **WAYS[way]}
    full = _generate(model, ids, past_key_values=DynamicCache(), **options)
    cache = FixedCache(model.config, 50, static=True)
    assert torch.equal(_generate(model, ids, past_key_values=cache, **options), full)


@each_model
@pytest.mark.parametrize("way", ["greedy", "chunks"])
def test_left_padded_rows_and_a_conversation(name: str, way: str) -> None:
    """A second turn goes on from the cache, in a chunk and then in steps."""
    model = _model(name)
    ids, reply, mask = prompts(2, 21), prompts(2, 11), LEFT_PADDED
    results = []
    for cache in (DynamicCache(), FixedCache(model.config, 60, static=True)):
        options = {"past_key_values": cache, "max_new_tokens": 12, **WAYS[way]}
        first = _generate(model, ids, attention_mask=mask, **options)
        options.pop("prefill_chunk_size", None)  # Earlier releases take it only for a new cache.
        more = torch.cat([first, reply], 1)
        both = torch.cat([mask, mask.new_ones(2, more.shape[1] - 21)], 1)
        results.append(_generate(model, more, attention_mask=both, **options))
    assert torch.equal(*results)


QUICK = ("merged", "llama")
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "llama" else slow) for n in MODELS]
)
def test_generate_compiles_its_steps(name: str) -> None:
    """In one graph without a break, for all tokens, batches with padding and calls."""
    model = _uniform(name)
    ids = prompts(2, 21)
    torch._dynamo.utils.counters.clear()
    for mask in (torch.ones_like(ids), LEFT_PADDED):
        full = _generate(model, ids, attention_mask=mask, past_key_values=DynamicCache())
        cache = FixedCache(model.config, ROOM, static=True)
        options = {"attention_mask": mask, "past_key_values": cache}
        found = _generate(model, ids, **options, compile_config=_compiled())
        assert torch.equal(found, full)
        torch.compiler.set_stance("fail_on_recompile")
    assert cache.layers[0].kv.seq_lens == [40, 28]
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["merged", "multihead", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("way", ["greedy", "sampling", "beams"])
def test_the_whole_compiler(name: str, dtype: torch.dtype, way: str) -> None:
    """In float32 the same tokens; in bfloat16 a compiler rounds less often."""
    model = _model(name).to(dtype)
    ids = prompts(2, 21)
    results = []
    for config in (None, _compiled("inductor")):
        cache = FixedCache(model.config, ROOM, static=True)
        options = {"compile_config": config, "attention_mask": LEFT_PADDED, **WAYS[way]}
        results.append(_generate(model, ids, past_key_values=cache, **options))
        torch.compiler.reset()
    if dtype == torch.float32:
        assert torch.equal(*results)


@pytest.mark.parametrize(
    ("name", "padded"),
    [
        ("merged", False),
        ("llama", True),
        pytest.param("merged", True, marks=slow),
        pytest.param("llama", False, marks=slow),
    ],
)
def test_a_compiled_forward_in_a_loop(name: str, padded: bool) -> None:
    """With the mask of all positions, which grows, or without one; and it checks that mask."""
    model = _uniform(name)
    ids = prompts(2, 21)
    mask = LEFT_PADDED if padded else torch.ones_like(ids)
    full = _generate(model, ids, attention_mask=mask, past_key_values=DynamicCache())
    cache = FixedCache(model.config, ROOM, static=True)
    step = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        logits = model(
            ids, attention_mask=mask, position_ids=positions_of(mask), **{CACHE: cache}
        ).logits
        for at in range(21, 40):
            if at == 24:
                torch.compiler.set_stance("fail_on_recompile")
            token = logits[:, -1:].argmax(-1)
            assert torch.equal(token[:, 0], full[:, at])
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            given: dict[str, Any] = {"position_ids": positions_of(mask)[:, -1:], CACHE: cache}
            if padded:
                given["attention_mask"] = mask
            logits = step(token, **given).logits
        if padded:
            given["attention_mask"] = torch.cat([mask, mask.new_ones(2, 1)], 1)
            given["attention_mask"][0, 3] = 0
            given["position_ids"] = (positions_of(mask) + 1)[:, -1:]
            with pytest.raises(RuntimeError, match="say of earlier positions what"):
                step(token, **given)


@slow
def test_a_forward_that_was_replaced() -> None:
    """As transformers' documents do it; the prompt breaks the graph."""
    model = _model("llama")
    ids = prompts(2, 21)
    full = _generate(model, ids, past_key_values=DynamicCache())
    model.forward = torch.compile(model.forward, backend="aot_eager")
    cache = FixedCache(model.config, ROOM, static=True)
    assert torch.equal(_generate(model, ids, past_key_values=cache), full)


def test_what_generate_asks_of_it() -> None:
    model = _model("llama")
    cache = FixedCache(model.config, ROOM, static=True)
    assert cache.is_compileable
    assert not FixedCache(model.config, ROOM).is_compileable
    assert cache.get_max_length() == ROOM
    assert cache.get_mask_sizes(1, 0) == (ROOM, 0)
    assert cache.get_seq_length() == 0
    with torch.no_grad():
        model(prompts(2, 21), **{CACHE: cache})
    assert cache.get_seq_length() == 21
    assert cache.get_mask_sizes(1, 0) == (ROOM, 0)
    assert copy.deepcopy(cache).get_seq_length() == 21
    cache.reset()
    assert cache.get_seq_length() == 0
    assert cache.layers[0].kv.seq_lens == [0, 0]


def test_what_it_cannot_do_raises() -> None:
    model = _model("llama")
    ids = prompts(1, 21)
    with pytest.raises(ValueError, match="static=True needs max_seq_len"):
        FixedCache(model.config, static=True)
    with pytest.raises(TypeError, match="static must be a bool"):
        FixedCache(model.config, 9, static=1)  # type: ignore[arg-type]
    cache = FixedCache(model.config, 30, static=True)
    with pytest.raises(ValueError, match="room for max_seq_len positions"):
        _generate(model, ids, past_key_values=cache)
    for options in ({"prompt_lookup_num_tokens": 4}, {"assistant_model": _model("llama")}):
        cache = FixedCache(model.config, ROOM, static=True)
        with pytest.raises(NotImplementedError, match=r"need FixedCache\(config\)"):
            _generate(model, ids, past_key_values=cache, **options)
    cache = FixedCache(model.config, ROOM, static=True)
    with pytest.raises(NotImplementedError, match=r"no gradients.*torch\.no_grad"):
        model(ids, past_key_values=cache)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="batch, heads and head width as before"):
            model(ids.repeat(2, 1)[:, :1], past_key_values=cache)
        cache = FixedCache(model.config, ROOM, static=True)
        model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="what a shorter sequence reads is gone"):
        cache.crop(-6)
    cache.crop(-5)
    with pytest.raises(ValueError, match="keeps its number of batch rows"):
        cache.batch_repeat_interleave(2)


def test_another_attention_does_not_read_it_compiled() -> None:
    model = _model("llama")
    ids = prompts(1, 21)
    cache = FixedCache(model.config, ROOM, static=True)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model.set_attn_implementation("sdpa")
        step = torch.compile(model, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="works with attn_implementation='colonnade'"):
            step(ids[:, :1], past_key_values=cache)


def test_it_is_made_in_inference_mode_and_used_outside() -> None:
    model = _uniform("llama")
    ids = torch.randint(1, 50, (1, 7))
    with torch.inference_mode():
        cache = FixedCache(model.config, 12, static=True)
    with torch.no_grad():
        found = model(ids, past_key_values=cache).logits
        assert torch.equal(found, model(ids, use_cache=False).logits)
    assert pickle.loads(pickle.dumps(cache)).get_seq_length() == 7
