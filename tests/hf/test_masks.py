"""What a mask function of transformers is: read off its closure, and asked where nobody can."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import CompileConfig
from transformers.masking_utils import (
    and_masks,
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sliding_window_bidirectional_overlay,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

import colonnade as col
from colonnade.hf import FixedCache, retrofit
from colonnade.hf.mask import UNKNOWN, _require_known, mask_function, read_mask_function
from tests.hf.models import generate, positions_of, prompts, windowed_model

pytestmark = pytest.mark.plain

Function = Callable[..., Any]
NUMBERS = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1]).repeat(2, 1)
PACKED = packed_sequence_mask_function(NUMBERS)
WINDOW = sliding_window_causal_mask_function(3)
CHUNKS = chunked_causal_mask_function(3, torch.zeros(2, dtype=torch.long))

KNOWN: dict[str, tuple[Function, int | None]] = {
    "causal": (causal_mask_function, None),
    "window": (WINDOW, 3),
    "packed": (and_masks(PACKED, causal_mask_function), None),
    "packed window": (and_masks(PACKED, WINDOW), 3),
    "window of one": (sliding_window_causal_mask_function(1), 1),
    "nested": (and_masks(and_masks(causal_mask_function), sliding_window_overlay(3)), 3),
}
UNLIKE: dict[str, Function] = {
    "both directions": bidirectional_mask_function,
    "union": or_masks(causal_mask_function, sliding_window_overlay(3)),
    "window without an end": sliding_window_overlay(3),
    "window in both directions": and_masks(sliding_window_bidirectional_overlay(3)),
    "a prefix": or_masks(causal_mask_function, lambda b, h, q, k: k < 4),
    "one of your own": and_masks(causal_mask_function, lambda b, h, q, k: (q - k) % 2 == 0),
}


@pytest.mark.parametrize("name", KNOWN)
def test_causal_masks_windows_and_packed_rows_are_known(name: str) -> None:
    function, window = KNOWN[name]
    assert read_mask_function(function, packed_is_known=True) == (True, window)
    _require_known(function, 2, 12, 12, window, None)
    if "packed" not in name:  # transformers finds packed rows only without a cache.
        _require_known(function, 2, 1, 12, window, None)


@pytest.mark.parametrize("name", UNLIKE)
def test_no_other_mask_is(name: str) -> None:
    """Asked, chunks look like packed rows: a layer with chunks is refused for what it is."""
    for function in (UNLIKE[name], CHUNKS):
        assert read_mask_function(function, packed_is_known=True) == (False, None)
    for window in (None, 3):
        with pytest.raises(RuntimeError, match="got another mask"):
            _require_known(UNLIKE[name], 2, 12, 12, window, None)


@pytest.mark.parametrize(("said", "made"), [(None, 3), (3, None), (4, 3), (3, 4), (1, 2), (3, 2)])
def test_another_window_than_is_said_is_found(said: int | None, made: int | None) -> None:
    function = causal_mask_function if made is None else sliding_window_causal_mask_function(made)
    function = and_masks(function)
    with pytest.raises(RuntimeError, match="got another mask"):
        _require_known(function, 2, 12, 12, said, None)
    if said is not None:
        with pytest.raises(RuntimeError, match="got another mask"):
            _require_known(function, 2, 1, 12, said, None)


def test_a_window_within_a_window_and_packed_rows_that_nobody_read() -> None:
    twice = and_masks(WINDOW, sliding_window_overlay(2))
    assert not read_mask_function(twice, packed_is_known=True)[0]
    packed = and_masks(PACKED, causal_mask_function)
    assert read_mask_function(packed, packed_is_known=False) == (False, None)


def test_a_mask_that_is_unknown_is_refused_by_the_layer_that_reads_it() -> None:
    found = mask_function(2, 12, 12, mask_function=CHUNKS)
    assert found.unreadable == UNKNOWN
    assert mask_function(2, 12, 12, attention_mask=found).unreadable == UNKNOWN
    assert mask_function(2, 12, 12, mask_function=WINDOW).window == 3
    # No layer may read everything from a cache that dropped something.
    dropped = mask_function(2, 2, 6, q_offset=20, kv_offset=16)
    assert dropped.unreadable is not None
    within = mask_function(2, 2, 6, q_offset=20, kv_offset=16, mask_function=WINDOW)
    assert (within.unreadable, within.dropped) == (None, 16)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize(
    "family",
    ["mistral", *(pytest.param(f, marks=pytest.mark.slow) for f in ("gemma3_text", "qwen2"))],
)
def test_compiled_steps_over_windows(family: str) -> None:
    groups = (col.LocalPattern(7, sinks=1), col.FixedPattern(8, 2, sinks=2))
    patterns: dict[int, Any] = {} if family == "mistral" else {1: groups}
    layers = 1 if family == "mistral" else 3
    model = retrofit(windowed_model(family, num_hidden_layers=layers), patterns=patterns)
    ids, mask = prompts(2, 15), torch.ones(2, 15, dtype=torch.long)
    mask[1, :6] = 0
    options: dict[str, Any] = {"max_new_tokens": 14, "attention_mask": mask}
    expected = generate(model, ids, **options)
    aot: dict[str, Any] = {"backend": "aot_eager", "mode": None}
    config = CompileConfig(fullgraph=True, **aot)
    config._compile_all_devices = True  # type: ignore[assignment]  # Annotated by its default.
    cache = FixedCache(model.config, 40, static=True)
    found = generate(model, ids, past_key_values=cache, compile_config=config, **options)
    assert torch.equal(found, expected)


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("family", ["mistral", pytest.param("gpt_oss", marks=pytest.mark.slow)])
@torch.no_grad()
def test_compiled_batches_over_windows_and_learnt_sink_logits(family: str) -> None:
    # The experts that compile have no float64.
    options: dict[str, Any] = {"num_hidden_layers": 1}
    if family == "gpt_oss":
        options = {"experts_implementation": "batched_mm"}
    model: Any = retrofit(windowed_model(family, **options).float(), 8, 2, layers=[])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids, mask = prompts(2, 23), torch.ones(2, 23, dtype=torch.long)
    mask[1, :6] = 0
    where = {"attention_mask": mask, "position_ids": positions_of(mask)}
    packed = torch.cat([torch.arange(11), torch.arange(12)])[None].expand(2, -1)
    for given in (where, {"position_ids": packed}):
        expected = model(ids, use_cache=False, **given).logits
        found = compiled(ids, use_cache=False, **given).logits
        tokens = mask.bool() | ("attention_mask" not in given)
        torch.testing.assert_close(found[tokens], expected[tokens], rtol=1e-4, atol=1e-4)
