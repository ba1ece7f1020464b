"""Drawn patterns and inputs that the tests share."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import NamedTuple

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from colonnade import (
    FixedPattern,
    FullPattern,
    LocalPattern,
    Pattern,
    StridedPattern,
    attention,
)
from colonnade.pattern import Part
from tests import oracle

Leaves = tuple[Tensor, Tensor, Tensor]
PARTS: tuple[Part, ...] = ("merged", "local", "summary")

EXAMPLES: dict[str, Pattern] = {
    "merged": FixedPattern(4, 1),
    "local": FixedPattern(4, 1, part="local"),
    "summary": FixedPattern(4, 1, part="summary"),
    "sub-blocks": FixedPattern(5, 2, subblocks=2),
    "bidirectional": FixedPattern(4, 1, causal=False),
    "bidirectional sub-blocks": FixedPattern(5, 2, subblocks=2, causal=False),
    "bidirectional summary": FixedPattern(4, 1, part="summary", causal=False),
    "strided": StridedPattern(4),
    "strided local": StridedPattern(4, part="local"),
    "strided summary": StridedPattern(4, part="summary"),
    "window": LocalPattern(4),
    "full": FullPattern(),
    "full bidirectional": FullPattern(causal=False),
}
"""One of each kind, for tests that draw nothing."""
each_pattern = pytest.mark.parametrize("pattern", EXAMPLES.values(), ids=EXAMPLES.keys())


def set_of(pattern: Pattern, i: int, n: int, head: int = 0) -> set[int]:
    """The oracle's set for position i of n; fields of a pattern are named as in the oracle."""
    fields = asdict(pattern)
    if isinstance(pattern, FixedPattern):
        return oracle.fixed_set(i, n, head=head, **fields)
    sets = {
        StridedPattern: oracle.strided_set,
        LocalPattern: oracle.local_set,
        FullPattern: oracle.full_set,
    }
    return sets[type(pattern)](i, n, **fields)


def mask_of(pattern: Pattern, n: int, heads: int = 1) -> Tensor:
    """The oracle's mask [heads, n, n]."""
    return oracle.mask_of_sets(n, heads, lambda head, i: set_of(pattern, i, n, head))


class Inputs(NamedTuple):
    """What an attention reads, and the gradients that flow back into its two results."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    grad_lse: Tensor

    def leaves(self) -> Leaves:
        """Query, key and value as tensors of their own that collect gradients."""
        query, key, value = (t.detach().clone().requires_grad_() for t in self[:3])
        return query, key, value


class Results(NamedTuple):
    """What an attention gives, forward and backward."""

    out: Tensor
    lse: Tensor
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor


@dataclass(frozen=True)
class Case:
    """A pattern and the sizes of the tensors that it is tried on."""

    pattern: Pattern = field(default_factory=lambda: FixedPattern(4, 1))
    batch: int = 2
    kv_heads: int = 2
    group: int = 2
    q_len: int = 13
    kv_len: int = 13
    qk_dim: int = 4
    v_dim: int = 3
    scale: float = 0.7
    seed: int = 0

    def inputs(self, dtype: torch.dtype = torch.float64) -> Inputs:
        """Normal numbers, rounded to `dtype`; the lse's gradient in the type of the lse."""
        generator = torch.Generator().manual_seed(self.seed)

        def draw(heads: int, *shape: int) -> Tensor:
            numbers = torch.randn(
                self.batch, heads, *shape, generator=generator, dtype=torch.float64
            )
            return numbers.to(dtype)

        heads = self.kv_heads * self.group
        return Inputs(
            draw(heads, self.q_len, self.qk_dim),
            draw(self.kv_heads, self.kv_len, self.qk_dim),
            draw(self.kv_heads, self.kv_len, self.v_dim),
            draw(heads, self.q_len, self.v_dim),
            draw(heads, self.q_len).to(torch.promote_types(dtype, torch.float32)),
        )

    def mask(self) -> Tensor:
        """The oracle's mask [kv_heads, q_len, kv_len]: the last queries' rows."""
        return mask_of(self.pattern, self.kv_len, self.kv_heads)[:, self.kv_len - self.q_len :]


def fixed_patterns(
    max_stride: int = 8, causal: bool | None = None
) -> st.SearchStrategy[FixedPattern]:
    """Any FixedPattern of small stride; only causal ones, or both kinds if `causal` is None."""

    @st.composite
    def build(draw: st.DrawFn) -> FixedPattern:
        stride = draw(st.integers(1, max_stride))
        summary = draw(st.integers(1, stride))
        return FixedPattern(
            stride=stride,
            summary=summary,
            subblocks=draw(st.integers(1, stride // summary)),
            part=draw(st.sampled_from(PARTS)),
            causal=draw(st.booleans()) if causal is None else causal,
        )

    return build()


def patterns(max_stride: int = 8) -> st.SearchStrategy[Pattern]:
    """Any pattern: fixed in both directions, strided, local, full."""
    strides = st.integers(1, max_stride)
    return st.one_of(
        fixed_patterns(max_stride, causal=True),
        fixed_patterns(max_stride, causal=False),
        st.builds(StridedPattern, strides, st.sampled_from(PARTS)),
        st.builds(LocalPattern, strides),
        st.builds(FullPattern, st.booleans()),
    )


def cases(
    max_len: int = 18, pattern: st.SearchStrategy[Pattern] | None = None
) -> st.SearchStrategy[Case]:
    """Cases of every kind: grouped heads, unlike widths, fewer queries than keys, any scale.

    Of any pattern, unless a strategy is given.
    """
    pattern = patterns() if pattern is None else pattern

    @st.composite
    def build(draw: st.DrawFn) -> Case:
        kv_len = draw(st.integers(1, max_len))
        return Case(
            pattern=draw(pattern),
            batch=draw(st.integers(1, 2)),
            kv_heads=draw(st.integers(1, 3)),
            group=draw(st.integers(1, 2)),
            q_len=draw(st.integers(1, kv_len)),
            kv_len=kv_len,
            qk_dim=draw(st.integers(1, 5)),
            v_dim=draw(st.integers(1, 5)),
            scale=draw(st.sampled_from((1 / math.sqrt(4), 1.3, -0.6, 0.0))),
            seed=draw(st.integers(0, 2**20)),
        )

    return build()


def both(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    backend: str = "auto",
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp."""
    pair = attention(query, key, value, pattern, scale=scale, return_lse=True, backend=backend)
    assert isinstance(pair, tuple)
    return pair


def backpropagate(pair: tuple[Tensor, Tensor], leaves: Leaves, inputs: Inputs) -> Results:
    """The pair with the gradients of sum(out · grad_out) + sum(lse · grad_lse).

    The gradient of a row's lse arrives even where the row reads nothing: it must be dropped there.
    """
    grads = (inputs.grad_out, inputs.grad_lse)
    wanted = [(t, grad) for t, grad in zip(pair, grads, strict=True) if t.requires_grad]
    found = torch.autograd.grad(
        [t for t, _ in wanted], leaves, [grad for _, grad in wanted], materialize_grads=True
    )
    return Results(pair[0].detach(), pair[1].detach(), *found)


def attend(case: Case, inputs: Inputs, backend: str) -> Results:
    """What a backend makes of the inputs, forward and backward."""
    leaves = inputs.leaves()
    return backpropagate(both(*leaves, case.pattern, backend, case.scale), leaves, inputs)


def attend_by_loops(case: Case, inputs: Inputs) -> Results:
    """What the definition makes of the inputs, forward and backward."""
    leaves = inputs.leaves()
    pair = oracle.loop_attention(*leaves, case.mask(), case.scale)
    return backpropagate(pair, leaves, inputs)
