"""The plan of a call, kept for the next one."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from colonnade.backends.call import Call, Seen
from colonnade.backends.documents import Documents, documents_of
from colonnade.backends.tracing.flops import Sizes
from colonnade.backends.tracing.memo import for_every_call
from colonnade.backends.tracing.operation import contents
from colonnade.pattern import FixedPattern, Part
from colonnade.plan.places import Places, kept_places, last_places, packed_places
from colonnade.plan.table import Plan, fixed_plan, heads_by_plan, packed_plan


class PlanOptions(NamedTuple):
    """A fixed pattern, and which keys there are: as an operation takes them, flat."""

    stride: int
    summary: int
    subblocks: int
    part: Part
    causal: bool
    sinks: int
    begin: int
    """Position before which the keys hold only slots, see `call.Kept`."""
    cu_seqlens: Tensor | None
    """The boundaries of packed documents; None if nothing is packed."""

    @property
    def pattern(self) -> FixedPattern:
        """The pattern."""
        sizes = self.stride, self.summary, self.subblocks
        return FixedPattern(*sizes, self.part, self.causal, sinks=self.sinks)

    @classmethod
    def of(cls, call: Call) -> PlanOptions:
        """Return the options of a call, which is one of a fixed pattern."""
        p, keys = call.pattern, call.keys
        assert isinstance(p, FixedPattern)
        assert not isinstance(keys, Seen)
        sizes = p.stride, p.summary, p.subblocks, p.part, p.causal, p.sinks
        return cls(*sizes, keys.begin, keys.cu_seqlens)


PLAN_SCHEMA = (
    "int stride, int summary, int subblocks, str part, bool causal, int sinks, SymInt begin, "
    "Tensor? cu_seqlens"
)
"""`PlanOptions` in the schema of an operation."""


def make_plan(options: PlanOptions, q_len: int, kv_len: int, heads: Sequence[int]) -> Plan:
    """Return the plan of the last `q_len` of `kv_len` keys, or of documents, for some key heads.

    Raises:
        ValueError: The contents of cu_seqlens do not fit `kv_len`.
    """
    documents = None if options.cu_seqlens is None else documents_of(options.cu_seqlens, kv_len)
    return _kept(options._replace(cu_seqlens=None), q_len, kv_len, documents, tuple(heads))


def make_places(options: PlanOptions, q_len: int, kv_len: int, heads: Sequence[int]) -> Places:
    """Return the places of the queries and keys that `make_plan` is about."""
    documents = None if options.cu_seqlens is None else documents_of(options.cu_seqlens, kv_len)
    return _kept_places(options._replace(cu_seqlens=None), q_len, kv_len, documents, tuple(heads))


def count_pairs(sizes: Sizes, *options: Any) -> int:
    """Return the `tracing.flops.Pairs` of an operation whose first options are `PLAN_SCHEMA`.

    Documents whose boundaries nobody knows are counted as one, which has no fewer pairs.
    """
    asked = PlanOptions(*options[: len(PlanOptions._fields)])
    asked = asked._replace(cu_seqlens=contents(asked.cu_seqlens))
    plans = [
        make_plan(asked, sizes.q_len, sizes.kv_len, heads)
        for heads in heads_by_plan(asked.pattern, sizes.kv_heads)
    ]
    return sizes.batch * sum(plan.num_pairs() for plan in plans)


@functools.lru_cache(maxsize=16)
def _kept(
    options: PlanOptions,
    q_len: int,
    kv_len: int,
    documents: Documents | None,
    heads: tuple[int, ...],
) -> Plan:
    """A short sequence's plan takes longer than its attention, and layers share one."""
    with for_every_call(), torch.device("cpu"):
        if documents is None:
            plan = fixed_plan(options.pattern, q_len, kv_len, heads, options.begin)
        else:
            plan = packed_plan(options.pattern, documents.lengths, heads)
        return replace(plan, gather=plan.gather.contiguous())


@functools.lru_cache(maxsize=16)
def _kept_places(
    options: PlanOptions,
    q_len: int,
    kv_len: int,
    documents: Documents | None,
    heads: tuple[int, ...],
) -> Places:
    with for_every_call(), torch.device("cpu"):
        if documents is not None:
            return packed_places(documents.lengths, documents.numbers)
        if options.begin:
            return kept_places(options.pattern, q_len, kv_len, options.begin, len(heads))
        return last_places(q_len, kv_len)
