"""A layer's step over a cache of fixed size, compiled: one graph, made once, whatever comes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from colonnade import FixedPattern, FullPattern, KVCache, LocalPattern, StridedPattern
from colonnade.nn import SelfAttention
from colonnade.ops.heads import Patterns

pytestmark = pytest.mark.plain  # Type checks stand in a compiler's way.

LENGTH, PROMPT = 40, 13
PATTERNS: dict[str, Patterns] = {
    "merged": FixedPattern(8, 2, subblocks=2, sinks=3),
    "local": FixedPattern(8, 2, part="local"),
    "summary": FixedPattern(8, 2, subblocks=2, part="summary", sinks=2),
    "strided": StridedPattern(8),
    "window": LocalPattern(8, sinks=2),
    "full": FullPattern(),
    "multi-head": FixedPattern(8, 2).factors(),
}
each_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()


def _steps(
    layer: SelfAttention, step: Any, x: Tensor, cache: KVCache, mask: Tensor | None = None
) -> Tensor:
    """Return the outputs of a prompt uncompiled, and of each position behind it by `step`.

    From the third step on nothing may be compiled any more.
    """

    def tokens(begin: int, end: int) -> dict[str, Tensor]:
        return {} if mask is None else {"padding_mask": mask[:, begin:end]}

    with torch.no_grad():
        outs = [layer(x[:, :PROMPT], cache, **tokens(0, PROMPT))]
        for at in range(PROMPT, x.shape[1]):
            if at == PROMPT + 2:
                torch.compiler.set_stance("fail_on_recompile")
            outs.append(step(x[:, at : at + 1], cache, **tokens(at, at + 1)))
    return torch.cat(outs, 1)


@each_pattern
@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32,
        *(pytest.param(d, marks=pytest.mark.slow) for d in (torch.bfloat16, torch.float64)),
    ],
    ids=str,
)
def test_a_compiled_step_is_the_layer(pattern: Patterns, dtype: torch.dtype) -> None:
    """Across the ends of blocks, and with another cache of these sizes afterwards."""
    layer = SelfAttention(16, 4, pattern, 2).to(dtype)
    step = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, LENGTH, 16, dtype=dtype)
    with torch.no_grad():
        expected = layer(x)
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2}[dtype]
    for _ in range(2):
        found = _steps(layer, step, x, layer.new_cache(LENGTH, static=True))
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    "pattern", [pytest.param(p, marks=pytest.mark.slow, id=n) for n, p in PATTERNS.items()]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_whole_compiler(pattern: Patterns, dtype: torch.dtype) -> None:
    layer = SelfAttention(16, 4, pattern, 2).to(dtype)
    step = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, LENGTH, 16, dtype=dtype)
    found = _steps(layer, step, x, layer.new_cache(LENGTH, static=True))
    with torch.no_grad():
        torch.testing.assert_close(found, layer(x), rtol=0, atol=2e-6)


@each_pattern
def test_rows_with_phases_of_their_own(pattern: Patterns) -> None:
    """Some have a token less now and then, in the compiled steps too."""
    layer = SelfAttention(16, 4, pattern, 2).double()
    step = torch.compile(layer, fullgraph=True, backend="aot_eager")
    mask = torch.rand(3, LENGTH) < torch.tensor([0.5, 0.9, 1.1])[:, None]
    mask[0, :PROMPT] = torch.arange(PROMPT) >= 9
    x = torch.randn(3, LENGTH, 16, dtype=torch.float64)
    with torch.no_grad():
        expected = layer(x, padding_mask=mask)
    found = _steps(layer, step, x, layer.new_cache(LENGTH, static=True), mask)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_too_many_positions_stop_the_program_and_write_nowhere_else() -> None:
    layer = SelfAttention(16, 4, FixedPattern(8, 2), 2)
    step = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(1, LENGTH, 16)
    cache = layer.new_cache(LENGTH, static=True)
    _steps(layer, step, x, cache)
    with torch.no_grad(), pytest.raises(RuntimeError, match="room for max_seq_len=40 positions"):
        step(x[:, :1], cache)


def test_a_prompt_breaks_the_graph_or_says_what_to_do() -> None:
    layer = SelfAttention(16, 4, FixedPattern(8, 2), 2)
    x = torch.randn(2, 21, 16)
    with torch.no_grad():
        whole = torch.compile(layer, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match="Call the model or layer uncompiled with a prompt"):
            whole(x, layer.new_cache(21, static=True))
        broken = torch.compile(layer, backend="eager")
        cache = layer.new_cache(21, static=True)
        found = torch.cat([broken(part, cache) for part in x.split([9, 1, 1, 5, 1, 4], 1)], 1)
        torch.testing.assert_close(found, layer(x), rtol=0, atol=2e-6)


@pytest.mark.plain
def test_caches_of_several_sizes_compile() -> None:
    """For the second size a compiler takes it for a symbol, which no text can hold."""
    torch.compiler.reset()
    pattern = FixedPattern(4, 1)
    query, key, value = torch.randn(3, 1, 2, 8, 4)

    def step(cache: KVCache, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return cache.attend(query, key, value)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for room in (12, 17, 21):
            cache, growing = KVCache(pattern, room, static=True), KVCache(pattern)
            for either in (cache, growing):
                either.attend(query[:, :, :6], key[:, :, :6], value[:, :, :6])
            for position in (6, 7):
                last = [t[:, :, position : position + 1] for t in (query, key, value)]
                torch.testing.assert_close(compiled(cache, *last), growing.attend(*last))
