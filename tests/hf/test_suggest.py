"""What a dense model would keep and change, against its own weights, and what is chosen."""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from colonnade import FixedPattern, FullPattern, LocalPattern, Pattern
from colonnade.cost import num_kept
from colonnade.hf import FixedCache, Suggestion, retrofit, suggest
from colonnade.hf.settings import patterns_of
from colonnade.hf.suggestion import LayerScore, as_few_as_possible
from colonnade.ops.heads import head_groups
from tests import oracle
from tests.hf.models import GROUPED, SIZES, dense_model, prompts, random_model

GPT_OSS: dict[str, Any] = {
    **SIZES,
    **GROUPED,
    "head_dim": 8,
    "num_local_experts": 2,
    "num_experts_per_tok": 1,
    "experts_implementation": "eager",  # The others have no float64.
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "sliding_window": 6,
}


def _gpt_oss() -> Any:
    """Return a model with learnt sink logits, a layer of windows, and grouped heads."""
    config = AutoConfig.for_model("gpt_oss", **GPT_OSS)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks, 1.0, 2.0)
    return model


def _weights(model: Any, ids: Tensor) -> tuple[Tensor, ...]:
    """Return what the model itself gives as its attention weights, of a copy of it."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        found: tuple[Tensor, ...] = eager(ids, output_attentions=True, use_cache=False).attentions
    return found


def _mask_of(pattern: Pattern, n: int) -> Tensor:
    """Return the oracle's mask [1, n, n]."""

    def read(head: int, i: int) -> set[int]:
        if isinstance(pattern, FixedPattern):
            return oracle.fixed_set(i, n, pattern.stride, pattern.summary, sinks=pattern.sinks)
        assert isinstance(pattern, LocalPattern)
        return oracle.local_set(i, n, pattern.window, pattern.sinks)

    return oracle.mask_of_sets(n, 1, read)


def _kept(weights: Tensor, pattern: Pattern, kv_heads: int) -> list[float]:
    """Return 1 - the weight outside of the sets: the mean over rows and a key head's queries."""
    n = weights.shape[-1]
    lost = weights.masked_fill(_mask_of(pattern, n), 0.0).sum(-1)[:, :, n // 2 :]
    kept: list[float] = (1 - lost).unflatten(1, (kv_heads, -1)).mean((0, 2, 3)).tolist()
    return kept


@pytest.mark.parametrize(
    ("make", "kv_heads", "near"),
    [
        # Their softmax is in the type of the model, that of a Llama in float32.
        (lambda: dense_model("gpt2"), 4, 1e-10),
        (_gpt_oss, 2, 1e-10),
        (lambda: dense_model("llama"), 2, 1e-6),
    ],
    ids=["gpt2", "gpt_oss", "llama"],
)
def test_it_keeps_the_weight_inside_the_mask(
    make: Callable[[], Any], kv_heads: int, near: float
) -> None:
    model, ids = make(), prompts(2, 45)
    found = suggest(model, ids, (8, 12), (1, 3), (0, 2), windows=(5, 11))
    assert len(found.candidates) == 8 + 2
    for layer, weights in zip(found.layers, _weights(model, ids), strict=True):
        if layer.window is not None:
            assert (layer.layer, layer.window, layer.kept) == (1, 6, ())
            continue
        assert (layer.num_heads, layer.num_kv_heads) == (4, kv_heads)
        for pattern, kept in zip(found.candidates, layer.kept, strict=True):
            assert kept == pytest.approx(_kept(weights, pattern, kv_heads), abs=near)
            mean = sum(kept) / len(kept)
            assert found.kept_by(pattern, layer.layer) == pytest.approx(mean)
    if make is _gpt_oss:
        with pytest.raises(ValueError, match=r"layer one of \[0, 2\], got .*layer=1"):
            found.kept_by(found.candidates[0], 1)


def _changes(
    model: Any, layers: Any, ids: Tensor, patterns: Sequence[Pattern]
) -> list[list[float]]:
    """Return by layer and pattern the change of the output, of a copy that attends under masks."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    changes = []

    def compare(layer: Any, args: Any, kwargs: Any, out: Any) -> None:
        n = ids.shape[1]
        change = []
        for pattern in patterns:
            read = _mask_of(pattern, n)
            mask = torch.zeros(1, 1, n, n).double().masked_fill(~read, -torch.inf)
            # GPT-2 gives it after another argument.
            named = kwargs | {"attention_mask": mask} if "attention_mask" in kwargs else kwargs
            others = [mask if getattr(a, "ndim", 0) == 4 else a for a in args]
            with torch.no_grad():
                found = layer.forward(*others, **named)
            found, dense = (
                (o[0] if isinstance(o, tuple) else o)[:, n // 2 :] for o in (found, out)
            )
            ratio = (found - dense).norm(dim=-1).square() / dense.norm(dim=-1).square()
            change.append(float(ratio.mean()))
        changes.append(change)

    for layer in layers(eager):
        layer.register_forward_hook(compare, with_kwargs=True)
    with torch.no_grad():
        eager(ids, use_cache=False)
    return changes


@pytest.mark.parametrize(
    ("make", "layers", "kv_heads"),
    [
        (lambda: dense_model("gpt2"), lambda model: model.transformer.h, 4),
        (_gpt_oss, lambda model: model.model.layers, 2),
    ],
    ids=["gpt2", "gpt_oss"],
)
def test_it_changes_what_a_mask_changes(
    make: Callable[[], Any], layers: Callable[[Any], Any], kv_heads: int
) -> None:
    model, ids = make(), prompts(2, 45)
    found = suggest(model, ids, 8, (1, 3), 2, windows=(5, 11))
    expected = _changes(model, layers, ids, found.candidates)
    for layer, changes in zip(found.layers, expected, strict=True):
        if layer.window is not None:
            assert layer.change == ()
            continue
        for pattern, change in zip(found.candidates, changes, strict=True):
            assert found.change_by(pattern, layer.layer) == pytest.approx(change, rel=1e-9)
        assert all(len(each) == kv_heads and min(each) > 0 for each in layer.change)


def test_the_change_of_one_key_head_is_its_own() -> None:
    """The parts of heads add up, and a head that reads one token everywhere has no part."""
    model = dense_model("llama")
    attention = model.model.layers[1].self_attn
    with torch.no_grad():
        attention.v_proj.weight[:8] = 0  # Key head 0 of two.
    found = suggest(model, prompts(1, 45), 8, 2, 0, windows=())
    for layer in found.layers:
        assert (layer.change[0][0] == 0) == (layer.layer == 1)
        assert layer.change[0][1] > 0


def test_several_samples_count_by_their_rows() -> None:
    model, parts = dense_model("gpt2"), [prompts(1, 24), prompts(3, 37), prompts(1, 24)]
    found = suggest(model, iter(parts), 8, 2, 0, windows=())
    assert found.seq_len == 37
    rows = [part.shape[0] * (part.shape[1] - part.shape[1] // 2) for part in parts]
    of_parts = [
        [_kept(weights, found.candidates[0], 4) for weights in _weights(model, part)]
        for part in parts
    ]
    for number, layer in enumerate(found.layers):
        for head in range(4):
            each = [kept[number][head] for kept in of_parts]
            mean = sum(r * k for r, k in zip(rows, each, strict=True)) / sum(rows)
            assert layer.kept[0][head] == pytest.approx(mean, abs=1e-10)


def test_by_default_a_window_is_as_large_as_each_fixed_cache() -> None:
    found = suggest(dense_model("gpt2"), prompts(1, 64), 16, (2, 4), (0, 1), seq_len=100)
    fixed = [p for p in found.candidates if isinstance(p, FixedPattern)]
    assert fixed == [FixedPattern(16, c, sinks=k) for c in (2, 4) for k in (0, 1)]
    local = found.candidates[len(fixed) :]
    assert [num_kept(p, 100) for p in local] == [num_kept(p, 100) for p in fixed if p.sinks == 1]
    assert all(isinstance(p, LocalPattern) and p.sinks == 1 for p in local)


def _suggestion(**changes: Any) -> Suggestion:
    """Return the scores of three layers of two key heads, drawn; the one in the middle a window."""
    draw = random.Random(1)
    candidates = (FixedPattern(8, 1), FixedPattern(8, 2), LocalPattern(20, sinks=1))

    def scores() -> tuple[tuple[float, ...], ...]:
        return tuple(tuple(draw.random() for _ in range(2)) for _ in candidates)

    layers = [LayerScore(i, 4, 2, None, scores(), scores()) for i in (0, 2)]
    layers.insert(1, LayerScore(1, 4, 2, 12, (), ()))
    return Suggestion(
        **{"candidates": candidates, "layers": tuple(layers), "seq_len": 64, **changes}
    )


@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("budget", [0.35, 0.5, 0.75, 1.0])
def test_patterns_change_as_little_as_the_budget_allows(budget: float, per_head: bool) -> None:
    found = _suggestion().choose(budget, per_head)
    options = (*found.candidates, FullPattern())
    dense = 2 * 64 + 2 * 12 + 2 * 64
    best = None
    for choice in itertools.product(range(4), repeat=4):
        if not per_head and (choice[0] != choice[1] or choice[2] != choice[3]):
            continue
        entries = 2 * 12 + sum(num_kept(options[c], 64) for c in choice)
        if entries <= budget * dense:
            of_heads = [(layer, head) for layer in (0, 2) for head in (0, 1)]
            change = sum(
                found.layers[layer].change[c][head] if c < 3 else 0.0
                for (layer, head), c in zip(of_heads, choice, strict=True)
            )
            best = change if best is None else min(best, change)
    assert best is not None
    assert best - 1e-12 <= found.change <= 1.002 * best + 1e-12
    assert found.share <= budget
    assert 1 not in found.patterns
    if budget == 1:
        assert (found.patterns, found.share, found.kept) == ({}, 1, 1)


def test_key_heads_share_the_shortest_tuple() -> None:
    fixed, local, full = FixedPattern(8, 1), LocalPattern(20), FullPattern()
    for of_heads, expected in (
        ([fixed, fixed, fixed], fixed),
        ([fixed, fixed, local], (fixed, local)),
        ([fixed, local, local], (fixed, local, local)),
        ([fixed, fixed, local, local, full], (fixed, local, full)),
    ):
        found = as_few_as_possible(of_heads)
        assert found == expected
        groups = head_groups(found, len(of_heads))
        assert [g.pattern for g in groups for _ in range(g.first, g.stop)] == of_heads


def _state(model: Any) -> tuple[Any, ...]:
    hooks = [len(module._forward_hooks) for module in model.modules()]
    training = [module.training for module in model.modules()]
    return model.config.to_json_string(), model.config._attn_implementation, training, hooks


def test_the_model_stays_as_it_is() -> None:
    model, ids = dense_model("llama"), prompts(1, 40)
    model.train()
    model.model.layers[1].eval()
    before, weights = _state(model), copy.deepcopy(model.state_dict())
    rounds = torch.get_rng_state()
    found = suggest(model, ids, 8, 2, budget=0.5)
    assert _state(model) == before
    assert torch.equal(torch.get_rng_state(), rounds)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    with model.model.layers[2].mlp.register_forward_hook(fail), pytest.raises(KeyboardInterrupt):
        suggest(model, ids, 8, 2)
    assert _state(model) == before
    assert suggest(model, ids, 8, 2, budget=0.5) == found
    assert all(p.grad is None for p in model.parameters())


def test_a_suggestion_is_what_retrofit_takes() -> None:
    model, ids = dense_model("llama"), prompts(1, 64)
    found = suggest(model, ids, 8, (1, 2), (0, 1), budget=0.55, per_head=True)
    assert any(isinstance(each, tuple) for each in found.patterns.values())
    retrofit(model, patterns=found.patterns)
    for layer in range(3):
        assert patterns_of(model.config, layer) == found.patterns.get(layer, FullPattern())
    cache = FixedCache(model.config)
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="Measure it before the retrofit"):
        suggest(model, ids, 8, 2)


def _in_type(model: Any, dtype: torch.dtype) -> Any:
    return model.to(dtype)


def test_half_precision_is_measured_too() -> None:
    ids = prompts(1, 64)
    half, precise = (
        suggest(_in_type(dense_model("qwen3"), dtype), ids, 8, 2, 1)
        for dtype in (torch.bfloat16, torch.float64)
    )
    for a, b in zip(half.layers, precise.layers, strict=True):
        torch.testing.assert_close(torch.tensor(a.kept), torch.tensor(b.kept), rtol=0, atol=0.1)


def test_it_prints_and_draws(tmp_path: Path) -> None:
    found = _suggestion().choose(0.5, per_head=True)
    lines = str(found).splitlines()
    assert "fixed 8, 1" in lines[1]
    assert "window 20 + 1" in lines[3]
    assert lines[5:7] == [
        "       √change under candidate, in %",
        "layer     1     2     3     kept  chosen",
    ]
    assert [line for line in lines if "keeps its window of 12" in line]
    assert f"cache {found.share:.1%} of dense at 64 tokens" in lines[-1]
    assert max(map(len, lines)) <= 100
    for name, options in (
        ("a.png", {}),
        ("b.svg", {"per_head": True}),
        ("c.png", {"change": True}),
    ):
        found.plot(tmp_path / name, **options)
        assert (tmp_path / name).stat().st_size > 5_000
    with pytest.raises(ValueError, match="not supported"):
        found.plot(tmp_path / "a.nothing")


def test_it_prints_the_root_of_the_change_under_a_name_of_its_own() -> None:
    found = _suggestion().choose(0.5)
    lines = str(found).splitlines()
    first, pattern = lines[7].split(), found.candidates[0]
    root = math.sqrt(found.change_by(pattern, 0))
    assert first[:2] == ["0", f"{100 * root:.1f}"]
    options: list[Any] = [*found.candidates, FullPattern()]
    assert first[-1] == ["1", "2", "3", "full"][options.index(found.patterns.get(0, options[-1]))]
    mean = math.sqrt((root**2 + found.change_by(pattern, 2)) / 2)
    assert lines[0].endswith(" √change")
    assert lines[1].endswith(f" {mean:.1%}")
    assert (
        lines[-2] == "√change: the root of the mean square change of a layer's output, in % of it"
    )


def test_tables_of_many_candidates_and_heads_stay_narrow() -> None:
    candidates = [LocalPattern(window) for window in range(1, 31)]
    drawn = tuple((index / 100,) * 32 for index in range(30))
    score = LayerScore(0, 32, 32, None, drawn, drawn)
    found = Suggestion(tuple(candidates), (score,), 64, {0: tuple((candidates * 2)[:32])})
    lines = str(found).splitlines()
    assert max(map(len, lines)) <= 100
    tables = [lines[i + 1].split() for i, line in enumerate(lines) if "under candidate" in line]
    assert [number for each in tables for number in each if number.isdigit()] == [
        str(number) for number in range(1, 31)
    ]
    [start] = [line.index("chosen") for line in lines if line.endswith("chosen")]
    chosen = ", ".join(str(n) for n in (*range(1, 31), 1, 2))
    last = max(i for i, line in enumerate(lines) if line.startswith("    0 "))
    assert " ".join(line[start:] for line in lines[last:-3]) == chosen


def test_every_count_may_be_of_numpy_or_pytorch() -> None:
    model, ids = dense_model("gpt2"), prompts(1, 40)
    plain = suggest(model, ids, 8, (1, 2), (0, 1), windows=(9, 12), seq_len=50)
    numpy = np.int64(8), np.array([1, 2]), np.array([0, 1])
    options: dict[str, Any] = {"windows": np.array([9, 12]), "seq_len": np.int64(50)}
    assert suggest(model, ids, *numpy, **options) == plain
    tensors = torch.tensor(8), torch.tensor([1, 2]), torch.tensor([0, 1])
    options = {"windows": torch.tensor([9, 12]), "seq_len": torch.tensor(50)}
    assert suggest(model, ids, *tensors, **options) == plain
    nothing: list[Any] = [(), [], np.array([])]
    none = [suggest(model, ids, 8, 2, 0, windows=windows) for windows in nothing]
    assert none[0].candidates == (FixedPattern(8, 2),)
    assert none[1] == none[2] == none[0]


@pytest.mark.plain
def test_bad_input_says_what_to_do() -> None:
    model, ids = dense_model("gpt2"), prompts(1, 40)

    def refuses(kind: type[Exception], text: str, *args: Any, **options: Any) -> None:
        with pytest.raises(kind, match=text):
            suggest(*args, **options)

    refuses(TypeError, "transformers model, got a Linear", torch.nn.Linear(1, 1), ids)
    refuses(ValueError, "must be dense, got a SparseTransformer", random_model(), ids)
    refuses(ValueError, r"two blocks long, 2 · stride = 256, got a sample of 40", model, ids)
    refuses(ValueError, "max_position_embeddings=256", model, prompts(1, 300), 8, 2)
    refuses(ValueError, r"tokens must be in \[0, 97\), got 97 … 97", model, ids * 0 + 97, 8, 2)
    refuses(ValueError, "at least one sample", model, [], 8, 2)
    refuses(ValueError, r"\[batch, length\], got tokens.shape=\(40,\)", model, ids[0], 8, 2)
    refuses(TypeError, "got torch.float64", model, ids.double(), 8, 2)
    refuses(TypeError, "got a str. Of a tokenizer's result", model, {"input_ids": ids}, 8, 2)
    refuses(ValueError, "summary=9 and stride=8", model, ids, 8, (2, 9))
    refuses(ValueError, "sinks must be at most", model, ids, 8, 6)
    refuses(ValueError, "summary must be a number or several", model, ids, 8, ())
    refuses(TypeError, "stride must be an int or several, got stride=8.0", model, ids, 8.0, 2)
    refuses(TypeError, "stride must be an int or several, got stride='32'", model, ids, "32", 2)
    refuses(TypeError, "windows must be an int or several", model, ids, 8, 2, windows=[True])
    refuses(TypeError, "seq_len must be an int, got seq_len=True", model, ids, 8, 2, seq_len=True)
    refuses(TypeError, "seq_len must be an int, got seq_len=50.0", model, ids, 8, 2, seq_len=50.0)
    refuses(ValueError, "sinks must be at least 0, got sinks=-1", model, ids, 8, 2, (1, -1))
    refuses(TypeError, r"tensor \[batch, length\] .* iterable of them, got a int", model, 5, 8, 2)
    refuses(ValueError, "seq_len must be at least 16", model, ids, 8, 2, seq_len=10)
    refuses(ValueError, r"budget must be in \(0, 1\]", model, ids, 8, 2, budget=0.0)
    refuses(TypeError, "budget must be a float", model, ids, 8, 2, budget="a third")
    # 8 positions of the open block and 2 of each of the 4 before it, of 40.
    refuses(ValueError, "at least 0.4000, the smallest", model, ids, 8, 2, 0, budget=0.1)
    found = suggest(model, ids, 8, 2, 0, budget=0.4)
    assert found.share == 0.4
    windowed = dense_model("mistral", sliding_window=8)
    refuses(ValueError, "3 layers all keep their sliding window", windowed, ids, 8, 2)
    crossed = dense_model("gpt2", add_cross_attention=True)
    refuses(NotImplementedError, "cross-attention", crossed, ids, 8, 2)
    capped = AutoConfig.for_model("gemma2", **{**SIZES, **GROUPED, "head_dim": 8})
    capped = AutoModelForCausalLM.from_config(capped)
    refuses(NotImplementedError, "capped scores", capped, ids, 8, 2)
