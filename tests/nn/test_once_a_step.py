"""A step looks once into what says where its tokens are, whatever the number of layers.

On a GPU every look is a synchronisation. So all layers share what was found, and so do the backward
and the recomputation of activation checkpointing; an edit in place is seen all the same.
"""

from __future__ import annotations

import functools
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from colonnade import FixedPattern, StridedPattern, backends
from colonnade.backends import choice
from colonnade.hf import SparseTransformerConfig, SparseTransformerForCausalLM
from colonnade.nn import SelfAttention
from colonnade.ops.heads import Patterns
from tests.hf.models import enable_recomputation

# Once is enough: with run-time type checks twelve layers take three times as long.
pytestmark = pytest.mark.plain
NUM_LAYERS = {"fixed": 12}
"""Layers of a step; 3 where another pattern is tried, so that a look for each layer would show."""
MODES = ("training", "checkpointed", "inference")
of_models = pytest.mark.parametrize(
    "name", ["fixed", pytest.param("interleaved", marks=pytest.mark.slow), "strided"]
)
LENGTHS = itertools.count(20)
"""Every test takes lengths of its own, so that it finds nothing that another one looked up."""

PATTERNS: dict[str, Patterns] = {
    "fixed": FixedPattern(4, 1),
    "multihead": FixedPattern(4, 1).factors(),
    "strided": StridedPattern(4),
}
PLANS = {"fixed": 1, "multihead": 2, "interleaved": 2, "strided": 0}
"""Plans of a step. Backend "eager" reads the table of each once, on the CPU, where it is new."""


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Counts of the looks into the contents of a tensor, by the name of the method."""
    counts: Counter[str] = Counter()
    inside = dict.fromkeys(("tolist", "nonzero"), False)

    def counting(name: str) -> Callable[..., Any]:
        method = getattr(Tensor, name)

        @functools.wraps(method)
        def call(*args: Any, **kwargs: Any) -> Any:
            # Under a default device PyTorch finds the method again by its name, and calls that.
            is_again, inside[name] = inside[name], True
            counts[name] += not is_again
            found = method(*args, **kwargs)
            inside[name] = is_again
            return found

        return call

    for name in ("tolist", "nonzero"):
        monkeypatch.setattr(Tensor, name, counting(name))
    return counts


@pytest.fixture(params=["eager", "native"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The backend that runs fixed patterns, asked for or not."""
    if why_not := backends()[request.param]:
        pytest.skip(f"{request.param} {why_not}")
    others = {name: each for name, each in choice.BACKENDS.items() if name != "native"}
    if request.param == "eager":
        monkeypatch.setattr(choice, "BACKENDS", others)
    return str(request.param)


def _step(call: Callable[[], Tensor], mode: str) -> None:
    with torch.inference_mode(mode == "inference"):
        loss = call().sum()
    if mode != "inference":
        loss.backward()


def _layer_step(layers: list[SelfAttention], x: Tensor, mode: str, **given: Tensor) -> None:
    def call() -> Tensor:
        h = x
        for layer in layers:
            run = functools.partial(layer, **given)
            out = checkpoint(run, h, use_reentrant=False) if mode == "checkpointed" else run(h)
            h = h + out
        return h

    _step(call, mode)


def _check(looks: Counter[str], step: Callable[[Tensor], None], given: Tensor, plans: int) -> None:
    """A step whose lengths are new, one with the same lengths in another tensor, one with new ones.

    `given` has at least 8 entries a row; its last dimension is turned for the third.
    """
    for tensor, tables in ((given, plans), (given.clone(), 0), (given.roll(-3, -1), plans)):
        looks.clear()
        step(tensor)
        assert looks["tolist"] <= 1 + tables
        assert looks["nonzero"] <= 1


def _padding(seq_len: int) -> Tensor:
    """Three rows: without padding, padded on the left, padded on the right."""
    at = torch.arange(seq_len)
    return torch.stack([at >= 0, at >= 5, at < 9])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PATTERNS)
def test_layers_look_at_padding_once(
    looks: Counter[str], backend: str, name: str, mode: str
) -> None:
    layers = [SelfAttention(16, 4, PATTERNS[name]) for _ in range(NUM_LAYERS.get(name, 3))]
    seq_len = next(LENGTHS)
    x = torch.randn(3, seq_len, 16)

    def step(padding_mask: Tensor) -> None:
        _layer_step(layers, x, mode, padding_mask=padding_mask)

    _check(looks, step, _padding(seq_len), PLANS[name] * (backend == "eager"))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PATTERNS)
def test_layers_look_at_packed_documents_once(
    looks: Counter[str], backend: str, name: str, mode: str
) -> None:
    layers = [SelfAttention(16, 4, PATTERNS[name]) for _ in range(NUM_LAYERS.get(name, 3))]
    total = next(LENGTHS)
    x = torch.randn(1, total, 16)

    def step(lengths: Tensor) -> None:
        cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
        _layer_step(layers, x, mode, cu_seqlens=cu_seqlens)

    lengths = torch.tensor([1, 2, 0, 6, 3, 1, 4, total - 17])
    _check(looks, step, lengths, PLANS[name] * (backend == "eager"))


def _model(name: str, mode: str) -> SparseTransformerForCausalLM:
    config = SparseTransformerConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=NUM_LAYERS.get(name, 3),
        num_attention_heads=4,
        max_position_embeddings=256,
        stride=4,
        summary=1,
        pattern="strided" if name == "strided" else "fixed",
        scheme="interleaved" if name == "interleaved" else "merged",
    )
    model = SparseTransformerForCausalLM(config)
    model.train(mode != "inference")
    if mode == "checkpointed":
        enable_recomputation(model)
    return model


@pytest.mark.parametrize("mode", MODES)
@of_models
def test_the_model_looks_at_padding_once(
    looks: Counter[str], backend: str, name: str, mode: str
) -> None:
    model = _model(name, mode)
    seq_len = next(LENGTHS)
    ids = torch.randint(32, (3, seq_len))

    def step(padding: Tensor) -> None:
        _step(lambda: model(ids, attention_mask=padding.long(), use_cache=False).logits, mode)

    _check(looks, step, _padding(seq_len), PLANS[name] * (backend == "eager"))


@of_models
def test_the_model_looks_at_padding_once_on_the_way_into_a_cache(
    looks: Counter[str], backend: str, name: str
) -> None:
    model = _model(name, "inference")
    seq_len = next(LENGTHS)
    ids = torch.randint(32, (3, seq_len))

    def step(padding: Tensor) -> None:
        _step(lambda: model(ids, attention_mask=padding.long()).logits, "inference")

    # Padded rows go into a cache one by one, with a plan each.
    _check(looks, step, _padding(seq_len), 3 * PLANS[name] * (backend == "eager"))


@pytest.mark.parametrize("mode", MODES)
@of_models
def test_the_model_looks_at_packed_documents_once(
    looks: Counter[str], backend: str, name: str, mode: str
) -> None:
    model = _model(name, mode)
    seq_len = next(LENGTHS)
    ids = torch.randint(32, (2, seq_len))

    def step(lengths: Tensor) -> None:
        positions = torch.cat([torch.arange(length) for length in lengths])
        _step(lambda: model(ids, position_ids=positions.expand(2, -1)).logits, mode)

    lengths = torch.tensor([1, 2, 6, 3, 1, 4, 1, seq_len - 18])
    _check(looks, step, lengths, PLANS[name] * (backend == "eager"))


def _edit_in_place(cu_seqlens: Tensor) -> None:
    cu_seqlens[1] = 7


def _edit_through_numpy(cu_seqlens: Tensor) -> None:
    cu_seqlens.numpy()[1] = 7


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("edit", [_edit_in_place, _edit_through_numpy])
@pytest.mark.parametrize("name", PATTERNS)
def test_an_edit_of_the_documents_is_seen(
    backend: str, name: str, edit: Callable[[Tensor], None], inference: bool
) -> None:
    layer = SelfAttention(16, 4, PATTERNS[name])
    x = torch.randn(1, 20, 16)
    with torch.inference_mode(inference):
        cu_seqlens = torch.tensor([0, 3, 20])
        before = layer(x, cu_seqlens=cu_seqlens)
        edit(cu_seqlens)
        after = layer(x, cu_seqlens=cu_seqlens)
        expected = torch.cat([layer(x[:, :7]), layer(x[:, 7:])], 1)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, expected)
