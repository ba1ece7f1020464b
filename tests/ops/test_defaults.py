"""Default devices and types of the caller change no result: attention, caches, plans, layers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import colonnade
from colonnade import FixedPattern, FullPattern, KVCache, LocalPattern, Pattern, StridedPattern
from colonnade.backends import planning
from colonnade.hf import FixedCache, SparseTransformerConfig, SparseTransformerForCausalLM
from colonnade.plan.table import fixed_plan


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


DEFAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "meta": lambda: torch.device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
}
PATTERNS = [
    FixedPattern(8, 2, 2),
    FixedPattern(8, 2, 2, part="summary"),
    FixedPattern(8, 2, part="local"),
    StridedPattern(8),
    LocalPattern(8),
    FullPattern(),
]
LENGTH = 40


@pytest.fixture(params=DEFAULTS)
def defaults(request: pytest.FixtureRequest) -> Callable[[], AbstractContextManager[Any]]:
    """Nothing is kept from the calls of another test, which knew no such default."""
    planning._kept.cache_clear()
    return DEFAULTS[request.param]


def same(defaults: Callable[[], AbstractContextManager[Any]], run: Callable[[], Tensor]) -> None:
    """Run it under the default first, while nothing is kept, and then without."""
    with defaults():
        found = run()
    expected = run()
    assert (found.dtype, found.device) == (expected.dtype, expected.device)
    assert torch.equal(found, expected)


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.randn(2, 4, LENGTH, 8) for _ in range(3))
    return query, key[:, :2], value[:, :2]


@pytest.mark.parametrize("pattern", PATTERNS, ids=repr)
@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
def test_attention(
    backend: str, pattern: Pattern, defaults: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Whole, of the last queries, of documents; with gradients."""
    query, key, value = tensors()
    ends = torch.tensor([0, 15, LENGTH])

    def run() -> Tensor:
        q, k, v = (t.clone().requires_grad_() for t in (query, key, value))
        whole = colonnade.attention(q, k, v, pattern, backend=backend)
        grads = torch.autograd.grad(whole.square().sum(), (q, k, v))
        last = colonnade.attention(query[:, :, -3:], key, value, pattern, backend=backend)
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        packed = colonnade.attention_varlen(q, k, v, ends, pattern, backend=backend)
        return torch.cat([t.detach().flatten() for t in (whole, *grads, last, packed)])

    same(defaults, run)


@pytest.mark.parametrize("evicting", [True, False])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("pattern", [*PATTERNS, (PATTERNS[0], PATTERNS[4])], ids=repr)
def test_caches(
    pattern: Any,
    padded: bool,
    evicting: bool,
    defaults: Callable[[], AbstractContextManager[Any]],
) -> None:
    query, key, value = tensors()
    mask = torch.ones(2, 30, dtype=torch.bool)
    mask[0, :7] = not padded
    index, two = torch.tensor([3, 0, 1, 2]), torch.tensor([0, 2])

    def run() -> Tensor:
        cache = KVCache(pattern)
        cache.evicting = evicting
        q, k, v = (t[:, :, :30] for t in (query, key, value))
        outs = [cache.attend(q, k, v, padding_mask=mask)]
        for first, last in ((30, 31), (31, 35), (35, 36)):
            q, k, v = (t[:, :, first:last] for t in (query, key, value))
            cache.explain(q, k, v)
            outs.append(cache.attend(q, k, v))
        cache.repeat(2)
        cache.reorder(index)
        cache.select(two)
        cache.crop(cache.seq_len)
        cache.evict()
        entries = cache.append(key[:, :, 36:38], value[:, :, 36:38])
        outs.append(cache.read(query[:, :, 36:38], entries))
        return torch.cat([out.flatten() for out in outs])

    same(defaults, run)


def test_plans_and_indices(defaults: Callable[[], AbstractContextManager[Any]]) -> None:
    pattern = FixedPattern(8, 2, 2)
    expected = [pattern.indices(20, head) for head in range(2)]
    with defaults():
        assert [pattern.indices(20, head) for head in range(2)] == expected
    drawn = pattern.mask(LENGTH, 2)
    plan = fixed_plan(pattern, LENGTH, LENGTH, (0, 1))
    with defaults():
        assert torch.equal(plan.mask(LENGTH), drawn)


def test_a_model_and_its_cache(defaults: Callable[[], AbstractContextManager[Any]]) -> None:
    config = SparseTransformerConfig(
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        stride=8,
        summary=2,
    )
    model = SparseTransformerForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    tokens = torch.randint(256, (2, 20))
    mask = torch.ones(2, 21, dtype=torch.long)
    mask[0, :5] = 0

    @torch.no_grad()
    def run() -> Tensor:
        cache = FixedCache(config)
        first = model(tokens, attention_mask=mask[:, :20], past_key_values=cache).logits
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(mask[0, :4] == 0)
        second = model(
            tokens[:, :1].repeat(2, 1),
            attention_mask=mask.repeat_interleave(2, 0),
            past_key_values=cache,
        )
        return torch.cat([first.flatten(), second.logits.flatten()])

    same(defaults, run)
