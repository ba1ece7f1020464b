"""The plan of a call: kept for the next one, or an operation where something records operations.

To a compiler the sizes of an operation's results are unknown, so that any length may come.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._library.fake_impl import allocate_size

from colonnade.backends.call import Kept, Keys, Packed
from colonnade.backends.documents import Documents, documents_of
from colonnade.backends.tracing.memo import is_tracing
from colonnade.pattern import FixedPattern, Part
from colonnade.plan.table import Plan, Row, fixed_plan, own_from_slots, packed_plan


def make_plan(
    pattern: FixedPattern, q_len: int, kv_len: int, keys: Keys, heads: Sequence[int]
) -> Plan:
    """Return the plan of the last `q_len` of `kv_len` keys, or of documents, for some key heads.

    Raises:
        ValueError: The contents of cu_seqlens do not fit `kv_len`.
    """
    reduced = keys.reduced if isinstance(keys, Kept) else 0
    cu_seqlens = keys.cu_seqlens if isinstance(keys, Packed) else None
    if not is_tracing():
        documents = None if cu_seqlens is None else documents_of(cu_seqlens, kv_len)
        return _kept(pattern, q_len, kv_len, reduced, documents, tuple(heads))
    p = pattern
    sets = p.stride, p.summary, p.subblocks, p.part, p.causal
    gather, table, shift = _plan(*sets, q_len, kv_len, reduced, cu_seqlens, list(heads))
    return Plan(gather, table, shift, own_from_slots(pattern))


@functools.lru_cache(maxsize=8)
def _kept(
    pattern: FixedPattern,
    q_len: int,
    kv_len: int,
    reduced: int,
    documents: Documents | None,
    heads: tuple[int, ...],
) -> Plan:
    """A short sequence's plan takes longer than its attention, and layers share one.

    Whatever the mode or default device of the call that makes it, it serves all others.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        if documents is None:
            plan = fixed_plan(pattern, q_len, kv_len, heads, reduced)
        else:
            plan = packed_plan(pattern, documents.lengths, heads)
        return replace(plan, gather=plan.gather.contiguous())


# The schema is spelled out: read off annotations it would depend on who wraps the functions.
@torch.library.custom_op(
    "colonnade::plan",
    mutates_args=(),
    schema="(int stride, int summary, int subblocks, str part, bool causal, "
    "SymInt q_len, SymInt kv_len, SymInt reduced, Tensor? cu_seqlens, int[] heads) "
    "-> (Tensor, Tensor, Tensor)",
)
def _plan(
    stride: int,
    summary: int,
    subblocks: int,
    part: Part,
    causal: bool,
    q_len: int,
    kv_len: int,
    reduced: int,
    cu_seqlens: Tensor | None,
    heads: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    pattern = FixedPattern(stride, summary, subblocks, part, causal)
    documents = None if cu_seqlens is None else documents_of(cu_seqlens, kv_len)
    plan = _kept(pattern, q_len, kv_len, reduced, documents, tuple(heads))
    # A compiler may write into what an operation gave it.
    return plan.gather.clone(), plan.table.clone(), plan.shift.clone()


@_plan.register_fake
def _plan_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    # As new_dynamic_size, which refuses unless fullgraph=True and so breaks the graph.
    shapes = torch.library.get_ctx()._shape_env
    heads = len(arguments[-1])
    return (
        torch.empty(heads, allocate_size(shapes), dtype=torch.long),
        torch.empty(allocate_size(shapes), len(Row._fields), dtype=torch.long),
        torch.empty(heads, dtype=torch.long),
    )
