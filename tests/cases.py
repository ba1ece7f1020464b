"""Patterns, inputs and results that the tests share, and the strategies that draw them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
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
    "sinks": FixedPattern(5, 1, subblocks=2, sinks=2),
    "sinks local": FixedPattern(4, 1, part="local", sinks=2),
    "sinks summary": FixedPattern(5, 2, part="summary", sinks=3),
    "sinks bidirectional": FixedPattern(4, 1, causal=False, sinks=1),
    "window": LocalPattern(4),
    "window with sinks": LocalPattern(4, sinks=2),
    "full": FullPattern(),
    "full bidirectional": FullPattern(causal=False),
}
"""One of each kind, for tests that draw nothing."""
each_pattern = pytest.mark.parametrize("pattern", EXAMPLES.values(), ids=EXAMPLES.keys())


def set_of(pattern: Pattern, i: int, n: int, head: int = 0) -> set[int]:
    """Return the oracle's set for position i of n; its arguments have the names of our fields."""
    match pattern:
        case FixedPattern():
            return oracle.fixed_set(i, n, head=head, **vars(pattern))
        case StridedPattern():
            return oracle.strided_set(i, n, **vars(pattern))
        case LocalPattern():
            return oracle.local_set(i, n, **vars(pattern))
        case FullPattern():
            return oracle.full_set(i, n, **vars(pattern))
    raise AssertionError(f"the oracle knows no {pattern}")


@lru_cache(maxsize=64)
def mask_of(pattern: Pattern, n: int, heads: int = 1) -> Tensor:
    """Return the oracle's mask [heads, n, n], which is kept for later calls: do not write to it."""
    return oracle.mask_of_sets(n, heads, lambda head, i: set_of(pattern, i, n, head))


class Inputs(NamedTuple):
    """The tensors that an attention reads, and the gradients that flow back into its results."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    grad_lse: Tensor

    def leaves(self) -> Leaves:
        """Return query, key and value as leaves that collect gradients, in the same memory.

        A copy would lie in memory in another way.
        """
        query, key, value = (t.detach().requires_grad_() for t in self[:3])
        return query, key, value

    def double(self) -> Inputs:
        """Return the same numbers, rounded as they are, in float64."""
        return Inputs(*[t.double() for t in self])

    def to(self, device: torch.device) -> Inputs:
        """Return the same numbers on a device."""
        return Inputs(*[t.to(device) for t in self])

    def part(self, positions: slice) -> Inputs:
        """Return the inputs of some positions, as many queries as keys."""
        return Inputs(*[t[:, :, positions] for t in self])


class Results(NamedTuple):
    """The results of an attention, forward and backward."""

    out: Tensor
    lse: Tensor
    grad_query: Tensor
    grad_key: Tensor
    grad_value: Tensor

    def to(self, device: torch.device) -> Results:
        """Return the same numbers on a device."""
        return Results(*[t.to(device) for t in self])

    def part(self, positions: slice) -> Results:
        """Return the results of some positions, as many queries as keys."""
        return Results(*[t[:, :, positions] for t in self])


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
        """Return normal numbers, rounded to `dtype`; the lse's gradient has the lse's type."""
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
        """Return the oracle's mask [kv_heads, q_len, kv_len]: the rows of the last queries."""
        return mask_of(self.pattern, self.kv_len, self.kv_heads)[:, self.kv_len - self.q_len :]

    def queries_of(self, head: int) -> slice:
        """Return the query heads that read key head `head`."""
        return slice(head * self.group, (head + 1) * self.group)

    def reach(self, head: int, j: int) -> Tensor:
        """Return [q_len], the queries that NaN in key j may touch: its whole block, its readers.

        Strided and local patterns have no blocks; a full pattern is one block.
        """
        readers = self.mask()[head, :, j]
        if isinstance(self.pattern, FixedPattern):
            positions = torch.arange(self.kv_len - self.q_len, self.kv_len)
            return readers | (positions // self.pattern.stride == j // self.pattern.stride)
        if isinstance(self.pattern, FullPattern):
            return torch.ones_like(readers)
        return readers


def fixed_patterns(
    max_stride: int = 8,
    causal: bool | None = None,
    strides: st.SearchStrategy[int] | None = None,
) -> st.SearchStrategy[FixedPattern]:
    """Draw any FixedPattern, with few columns, sub-blocks and sinks as often as with many.

    Args:
        max_stride: Strides go from 1 to this.
        causal: Draw only causal patterns, only bidirectional ones, or both if None.
        strides: Draws strides instead.
    """
    strides = st.integers(1, max_stride) if strides is None else strides
    directions = st.booleans() if causal is None else st.just(causal)
    parts = st.sampled_from(PARTS)
    limits = st.sampled_from((1, 2, 8, None, None, None))

    @st.composite
    def build(draw: st.DrawFn) -> FixedPattern:
        stride = draw(strides)
        summary = draw(st.integers(1, min(stride, draw(limits) or stride)))
        subblocks = draw(st.integers(1, min(stride // summary, draw(limits) or stride)))
        sinks = draw(_sinks(stride - subblocks * summary))
        return FixedPattern(stride, summary, subblocks, draw(parts), draw(directions), sinks=sinks)

    return build()


def _sinks(most: int) -> st.SearchStrategy[int]:
    """Draw no sinks as often as some."""
    return st.just(0) | st.integers(0, min(most, 2)) | st.integers(0, most)


def patterns(
    max_stride: int = 8, strides: st.SearchStrategy[int] | None = None
) -> st.SearchStrategy[Pattern]:
    """Draw any pattern: fixed in both directions, strided, local, full."""
    strides = st.integers(1, max_stride) if strides is None else strides
    return st.one_of(
        fixed_patterns(causal=True, strides=strides),
        fixed_patterns(causal=False, strides=strides),
        st.builds(StridedPattern, strides, st.sampled_from(PARTS)),
        st.builds(LocalPattern, strides, sinks=_sinks(max_stride)),
        st.builds(FullPattern, st.booleans()),
    )


def cases(
    max_len: int = 18,
    pattern: st.SearchStrategy[Pattern] | None = None,
    *,
    min_len: int = 1,
    batches: Sequence[int] = (1, 2),
    groups: Sequence[int] = (1, 2),
    widths: Sequence[int] = (1, 2, 3, 4, 5),
    scales: Sequence[float] = (0.5, 1.3, -0.6, 0.0),
) -> st.SearchStrategy[Case]:
    """Draw cases of every kind: grouped heads, widths alike and unlike, fewer queries than keys.

    Args:
        max_len: Most keys.
        pattern: Draws patterns; any of them if None.
        min_len: Fewest queries and keys.
        batches: Batch sizes, and so on for the other sequences; one that is there twice is drawn
            twice as often.
        groups: Query heads for each key head.
        widths: Of queries and keys, and of values.
        scales: Factors on the scores.
    """
    pattern = patterns() if pattern is None else pattern
    kv_lens, kv_heads, seeds = (
        st.integers(min_len, max_len),
        st.integers(1, 3),
        st.integers(0, 2**20),
    )
    batch, group, width = map(st.sampled_from, (batches, groups, widths))
    scale = st.sampled_from(scales)

    @st.composite
    def build(draw: st.DrawFn) -> Case:
        kv_len, qk_dim = draw(kv_lens), draw(width)
        return Case(
            pattern=draw(pattern),
            batch=draw(batch),
            kv_heads=draw(kv_heads),
            group=draw(group),
            q_len=kv_len if draw(st.booleans()) else draw(st.integers(min_len, kv_len)),
            kv_len=kv_len,
            qk_dim=qk_dim,
            v_dim=qk_dim if draw(st.booleans()) else draw(width),
            scale=draw(scale),
            seed=draw(seeds),
        )

    return build()


def both(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    backend: str = "auto",
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp."""
    return attention(
        query,
        key,
        value,
        pattern,
        scale=scale,
        dropout_p=dropout_p,
        return_lse=True,
        backend=backend,
    )


def output(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pattern: Pattern,
    backend: str = "auto",
    scale: float | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Return the output of a call that asks for no log-sum-exp."""
    return attention(query, key, value, pattern, scale=scale, dropout_p=dropout_p, backend=backend)


def backpropagate(pair: tuple[Tensor, Tensor], leaves: Leaves, inputs: Inputs) -> Results:
    """Return the pair with the gradients of sum(out · grad_out) + sum(lse · grad_lse).

    The gradient of a row's lse arrives even where the row reads nothing: it must be dropped there.
    """
    grads = (inputs.grad_out, inputs.grad_lse)
    wanted = [(t, grad) for t, grad in zip(pair, grads, strict=True) if t.requires_grad]
    found = torch.autograd.grad(
        [t for t, _ in wanted], leaves, [grad for _, grad in wanted], materialize_grads=True
    )
    return Results(pair[0].detach(), pair[1].detach(), *found)


def attend(case: Case, inputs: Inputs, backend: str) -> Results:
    """Return the results of a backend."""
    leaves = inputs.leaves()
    return backpropagate(both(*leaves, case.pattern, backend, case.scale), leaves, inputs)


def attend_by_loops(case: Case, inputs: Inputs) -> Results:
    """Return the results of the definition in float64, one query at a time."""
    inputs = inputs.double()
    leaves = inputs.leaves()
    pair = oracle.loop_attention(*leaves, case.mask(), case.scale)
    return backpropagate(pair, leaves, inputs)


def attend_by_products(case: Case, inputs: Inputs) -> Results:
    """Return the results of the definition in float64, by dense products: faster than loops."""
    inputs = inputs.double()
    leaves = inputs.leaves()
    pair = oracle.dense_attention(*leaves, case.mask(), case.scale)
    return backpropagate(pair, leaves, inputs)
