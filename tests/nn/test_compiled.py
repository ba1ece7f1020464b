"""Autocast, torch.compile and activation checkpointing through the layer: the same results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from colonnade import (
    FixedPattern,
    FullPattern,
    LocalPattern,
    Pattern,
    StridedPattern,
    attention_varlen,
)
from colonnade.nn import SelfAttention
from colonnade.ops.heads import Patterns
from tests.packing import cu_seqlens_of

pytestmark = pytest.mark.plain  # Type checks stand in a compiler's way.

PATTERNS: dict[str, Patterns] = {
    "fixed": FixedPattern(8, 2, subblocks=2, sinks=3),
    "bidirectional": FixedPattern(8, 2, subblocks=2, causal=False),
    "summary": FixedPattern(8, 2, part="summary", sinks=1),
    "strided": StridedPattern(8),
    "local": LocalPattern(8, sinks=2),
    "full": FullPattern(),
    "multihead": FixedPattern(8, 2).factors(),
}
QUICK = ("fixed", "strided")
"""One for each file that computes whole patterns; the others compile in the slow tests."""
OF_NATIVE = ("fixed", "summary", "multihead")
"""Those that the C++ takes, in float32 and bfloat16; the others take one way in every type."""


def _marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    return () if name in QUICK else (pytest.mark.slow,)


each_pattern = pytest.mark.parametrize(
    "pattern",
    [pytest.param(pattern, marks=_marks(name), id=name) for name, pattern in PATTERNS.items()],
)


def each_pattern_and_way(one: torch.dtype, other: torch.dtype) -> pytest.MarkDecorator:
    """Try every pattern in the type of `one`, and in `other` those that go another way there."""
    tried = [(name, one) for name in PATTERNS] + [(name, other) for name in OF_NATIVE]
    values = [
        pytest.param(PATTERNS[name], dtype, marks=_marks(name), id=f"{name}-{dtype}")
        for name, dtype in tried
    ]
    return pytest.mark.parametrize(("pattern", "dtype"), values)


LENGTHS = (*range(1, 34), *range(40, 101, 5))


class _Counting:
    """A compiler that counts the graphs it is given, and runs them as they are."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, module: torch.fx.GraphModule, example: list[Tensor]) -> Any:
        self.graphs += 1
        return module.forward


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _gradients(
    layer: SelfAttention, function: Any, x: Tensor, autocast: bool = False, **options: Any
) -> list[Tensor]:
    """Return output and gradients; the backward belongs outside of autocast, as PyTorch advises."""
    leaf = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = function(leaf, **options)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float32).view(y.shape)
    grads = torch.autograd.grad((y.float() * weight).sum(), [leaf, *layer.parameters()])
    return [y.detach(), *grads]


def _same(found: list[Tensor], expected: list[Tensor]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


@each_pattern_and_way(torch.float32, torch.float64)
def test_all_lengths_take_at_most_four_compilations(pattern: Patterns, dtype: torch.dtype) -> None:
    """One graph each, without a break: the same bits as uncompiled, gradients too.

    In float32 backend "auto" may choose the C++, in float64 it does not.
    """
    layer = SelfAttention(16, 4, pattern, 2).to(dtype)
    counting = _Counting()
    compiled = torch.compile(layer, fullgraph=True, backend=counting)
    for seq_len in LENGTHS:
        x = torch.randn(1, seq_len, 16, dtype=dtype)
        if seq_len % 10 == 0:
            _same(_gradients(layer, compiled, x), _gradients(layer, layer, x))
        else:
            compiled(x.requires_grad_())
    print(f"{counting.graphs} compilations over {len(LENGTHS)} lengths")
    assert counting.graphs <= 4


@each_pattern
def test_packed_documents_compile_once_for_all_lengths(pattern: Patterns) -> None:
    layer = SelfAttention(16, 4, pattern, 2).double()
    counting = _Counting()
    compiled = torch.compile(layer, fullgraph=True, backend=counting)
    generator = torch.Generator().manual_seed(0)
    for number in range(1, 30, 2):
        lengths = torch.randint(0, 20, (number,), generator=generator).tolist()
        cu_seqlens = cu_seqlens_of(lengths)
        x = torch.randn(1, sum(lengths), 16, dtype=torch.float64)
        _same([compiled(x, cu_seqlens=cu_seqlens)], [layer(x, cu_seqlens=cu_seqlens)])
    print(f"{counting.graphs} compilations over 15 packed batches")
    assert counting.graphs <= 4


@pytest.mark.parametrize("pattern", [FixedPattern(8, 2), StridedPattern(8), FullPattern()], ids=str)
def test_the_packed_operation_compiles(pattern: Pattern) -> None:
    """One pattern for each file that computes; the layer above compiles it for all of them."""
    counting = _Counting()

    def run(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor) -> Tensor:
        out = attention_varlen(query, key, value, cu_seqlens, pattern)
        assert isinstance(out, Tensor)
        return out

    compiled = torch.compile(run, fullgraph=True, backend=counting)
    for total in range(10, 40, 2):
        query, key, value = torch.randn(3, total, 2, 8)
        cu_seqlens = cu_seqlens_of((4, 0, total - 4))
        found = compiled(query, key, value, cu_seqlens)
        assert torch.equal(found, run(query, key, value, cu_seqlens))
    assert counting.graphs <= 4


@each_pattern
def test_padded_rows_run_compiled(pattern: Patterns) -> None:
    """The number of tokens is known only at run time: outside of one full graph."""
    layer = SelfAttention(16, 4, pattern, 2).double()
    compiled = torch.compile(layer, backend="eager")
    mask = torch.arange(30) >= torch.tensor([[0], [17], [29]])
    x = torch.randn(3, 30, 16, dtype=torch.float64)
    expected = _gradients(layer, layer, x, padding_mask=mask)
    for one, other in zip(_gradients(layer, compiled, x, padding_mask=mask), expected, strict=True):
        torch.testing.assert_close(one, other)


@each_pattern_and_way(torch.bfloat16, torch.float16)
def test_autocast_is_projections_and_attention_in_half_precision(
    pattern: Patterns, dtype: torch.dtype
) -> None:
    """Equal to the layer in that type on rounded inputs; gradients come in float32."""
    layer = SelfAttention(16, 4, pattern, 2)
    x = torch.randn(2, 30, 16)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")(x)
    assert y.dtype == dtype
    torch.testing.assert_close(compiled, y)
    half = SelfAttention(16, 4, pattern, 2).to(dtype)
    half.load_state_dict(layer.state_dict())
    assert torch.equal(y, half(x.to(dtype)))
    grads = torch.autograd.grad(y.float().sum(), list(layer.parameters()))
    assert all(grad.dtype == torch.float32 for grad in grads)


@pytest.mark.parametrize(
    ("pattern", "autocast"),
    [
        pytest.param(
            PATTERNS[name],
            autocast,
            marks=_marks(name) if autocast else pytest.mark.slow,
            id=f"{name}-{autocast}",
        )
        for autocast in (False, True)
        for name in (PATTERNS if autocast else ("fixed", "bidirectional", "strided", "full"))
    ],
)
def test_recomputation_inside_and_outside_of_the_compiler(
    pattern: Patterns, autocast: bool
) -> None:
    layer = SelfAttention(16, 4, pattern, 2)
    x = torch.randn(2, 30, 16)

    def recomputed(x: Tensor) -> Tensor:
        y = checkpoint(layer, x, use_reentrant=False)
        assert isinstance(y, Tensor)
        return y

    expected = _gradients(layer, layer, x, autocast)
    _same(_gradients(layer, recomputed, x, autocast), expected)
    compiled = torch.compile(recomputed, fullgraph=True, backend="aot_eager")
    for one, other in zip(_gradients(layer, compiled, x, autocast), expected, strict=True):
        # The compiler joins the three casts of x, and so rounds their gradients' sum as well.
        roundings = 4 * torch.finfo(torch.bfloat16 if autocast else torch.float32).eps
        torch.testing.assert_close(one, other, rtol=0, atol=roundings * float(other.abs().max()))
