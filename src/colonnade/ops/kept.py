"""Attention of new queries over what a cache keeps: [slots | tail].

A decoder's one query reads entries without a gap in nearly all cases, and else those under a mask:
keys that are `Seen`. Chunks of queries go through the plan, over keys that are `Kept`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from colonnade.backends.call import Call, Kept, Seen
from colonnade.backends.choice import SKIP_UNMARKED, choose, run
from colonnade.backends.tracing.device import on_device
from colonnade.ops.heads import HeadGroup, join_heads
from colonnade.pattern import Pattern
from colonnade.plan.kept import RowGroup, kept_positions, last_reads
from colonnade.shapes import KeptMask, Key, LogSumExp, Output, Positions, Query, SeenMask, Value


class KeptHeads(NamedTuple):
    """One head group, with what is kept of each batch row, and its number of entries."""

    heads: HeadGroup
    rows: list[RowGroup]
    """The queries are the new positions of these batch rows."""
    width: int
    reads: KeptMask | None = None
    """Marks what one new position of each batch row reads, in a cache of fixed size."""
    places: Callable[[], tuple[Positions, Positions]] | None = None
    """Gives the positions of the new ones there, and of all entries."""


class Layout(NamedTuple):
    """The way in which the queries of the positions that came last read entries."""

    groups: list[KeptHeads]
    is_token: Bool[Tensor, "batch q_len"] | None
    """False at queries that are padding; None: all are tokens."""
    q_len: int
    """Number of positions that came last, padding included."""


def attend_kept(
    query: Query,
    entries: Sequence[tuple[Tensor, Tensor]],
    layout: Layout,
    call: Call,
    backend: str = "auto",
) -> tuple[Output, LogSumExp | None]:
    """Attend with the queries of the positions that came last, over what is kept.

    A query that is no token, or that reads nothing, gives 0 and a log-sum-exp of -inf.

    Args:
        query: [batch, heads, q_len, qk_dim].
        entries: (keys, values) of each head group, [batch, kv_heads of the group, kept, …]: the
            summaries of the blocks before a batch row's tail, then the tail; finite numbers behind
            the entries of shorter rows.
        layout: Of the entries.
        call: The options; each head group reads its own causal pattern.
        backend: "auto", or the backend that has to run.
    """
    call = call._replace(dropout=call.dropout.drawn(query.device))
    if len(entries) == 1:
        (key, value), (kept,) = entries[0], layout.groups
        return _attend_heads(query, key, value, kept, layout.is_token, call, backend)
    kv_heads = layout.groups[-1].heads.stop
    each = query.shape[1] // kv_heads
    found = []
    for pair, kept in zip(entries, layout.groups, strict=True):
        of_group = call._replace(dropout=kept.heads.part_of(call.dropout, each))
        q = kept.heads.of(query, kv_heads)
        found.append(_attend_heads(q, *pair, kept, layout.is_token, of_group, backend))
    lses = [lse for _, lse in found if lse is not None]
    lse = join_heads(lses) if call.return_lse else None
    return join_heads([out for out, _ in found]), lse


def _attend_heads(
    query: Query,
    key: Key,
    value: Value,
    kept: KeptHeads,
    is_token: Bool[Tensor, "batch q_len"] | None,
    call: Call,
    backend: str,
) -> tuple[Output, LogSumExp | None]:
    q_len, rows = query.shape[2], kept.rows
    if kept.reads is not None:
        mask = kept.reads[:, :, None]
        keys = Seen(mask)
        if call.dropout.p > 0:
            assert kept.places is not None
            keys = Seen(mask, *kept.places())
        call = call._replace(pattern=kept.heads.pattern, keys=keys)
        return _attend_marked(query, key, value, mask, call, backend)
    if not _marks(kept, is_token, q_len):
        call, span = kept_call(call, kept.heads.pattern, rows[0], q_len, key.shape[1])
        if span is not None and span.stop - span.start < key.shape[2]:
            key, value = key[:, :, span.start : span.stop], value[:, :, span.start : span.stop]
        return run(query, key, value, call, backend)
    if is_token is None:
        is_token = torch.ones(query.shape[0], q_len, dtype=torch.bool, device="cpu")
    is_token = on_device(is_token, query.device)
    if q_len == 1:
        mask = _last_mask(kept, query.shape[0], key) & is_token[:, None, None]
        keys = Seen(mask) if call.dropout.p == 0 else Seen(mask, *_last_places(kept, key))
        call = call._replace(pattern=kept.heads.pattern, keys=keys)
        return _attend_marked(query, key, value, mask, call, backend)
    compute = torch.promote_types(query.dtype, torch.float32)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    lse = query.new_full(query.shape[:3], -torch.inf, dtype=compute)
    for group in rows:
        of_group, _ = kept_call(call, kept.heads.pattern, group, q_len, key.shape[1])
        for row in group.rows:
            of_row = of_group.dropout._replace(first_row=of_group.dropout.first_row + row)
            q = query[row, None, :, is_token[row]]
            k, v = (t[row, None, :, : group.width] for t in (key, value))
            out_of_row, lse_of_row = run(q, k, v, of_group._replace(dropout=of_row), backend)
            out[row, :, is_token[row]] = out_of_row[0]
            if lse_of_row is not None:
                lse[row, :, is_token[row]] = lse_of_row[0]
    return out, lse


def _marks(kept: KeptHeads, is_token: Bool[Tensor, "batch q_len"] | None, q_len: int) -> bool:
    """Whether batch rows differ, or one query reads entries with a gap between them."""
    is_alike = len(kept.rows) == 1 and is_token is None
    return not is_alike or (q_len == 1 and kept.rows[0].span is None)


def _attend_marked(
    query: Query, key: Key, value: Value, mask: SeenMask, call: Call, backend: str
) -> tuple[Output, LogSumExp | None]:
    """Attend to marked entries, whatever is in the others: NaN would come through a mask."""
    if choose(query, key, value, call, backend) not in SKIP_UNMARKED:
        key, value = (t.masked_fill(~mask.mT, 0) for t in (key, value))
    return run(query, key, value, call, backend)


def kept_call(
    call: Call, pattern: Pattern, group: RowGroup, q_len: int, num_kv_heads: int
) -> tuple[Call, range | None]:
    """Return the call of the last queries of some batch rows, and the entries that it is over.

    None instead of the entries means all of them.
    """
    call = call._replace(pattern=pattern)
    if q_len == 1:
        assert group.span is not None, "else entries are marked"
        keys = Seen(None)
        if call.dropout.p > 0:
            places = kept_positions(pattern, group.seq_len + 1, group.begin, num_kv_heads)
            keys = Seen(
                None,
                torch.tensor([[group.seq_len]], device="cpu"),
                places[None, :, group.span.start : group.span.stop],
            )
        return call._replace(keys=keys), group.span
    if group.slots:
        return call._replace(keys=Kept(group.begin)), None
    # Blocks and windows do not notice that positions before the tail are gone.
    return call._replace(dropout=call.dropout._replace(first_position=group.begin)), None


def expected_call(
    call: Call, kept: KeptHeads, is_token: Bool[Tensor, "batch q_len"] | None, q_len: int
) -> Call:
    """Return the call that `attend_kept` would make for a head group, but for the mask in it."""
    if not _marks(kept, is_token, q_len):
        return kept_call(call, kept.heads.pattern, kept.rows[0], q_len, 1)[0]
    return call._replace(pattern=kept.heads.pattern, keys=Seen(None) if q_len == 1 else call.keys)


def _last_mask(kept: KeptHeads, batch: int, key: Key) -> Bool[Tensor, "batch kv_heads 1 kept"]:
    """Mark the entries that each batch row's last position reads."""
    of_row = {row: group for group in kept.rows for row in group.rows}
    ends, begins = (
        torch.tensor(numbers, dtype=torch.long, device="cpu")
        for numbers in (
            [of_row[row].seq_len + of_row[row].num_new for row in range(batch)],
            [of_row[row].begin for row in range(batch)],
        )
    )
    mask = last_reads(kept.heads.pattern, ends, begins, key.shape[2], key.shape[1])
    return on_device(mask, key.device)[:, :, None]


def _last_places(kept: KeptHeads, key: Key) -> tuple[Positions, Positions]:
    """Return the positions of each batch row's last query, and of its entries."""
    query = torch.zeros(key.shape[0], 1, dtype=torch.long, device="cpu")
    entries = torch.zeros(key.shape[:3], dtype=torch.long, device="cpu")
    for group in kept.rows:
        seq_len = group.seq_len + group.num_new
        places = kept_positions(kept.heads.pattern, seq_len, group.begin, key.shape[1])
        query[group.rows] = seq_len - 1
        entries[group.rows, :, : group.width] = places
    return query, entries


def mask_of_positions(
    pattern: Pattern,
    query_position: Int[Tensor, "batch q_len"],
    key_position: Int[Tensor, "batch kv_len"],
    is_token: Bool[Tensor, "batch kv_len"],
    num_kv_heads: int,
) -> SeenMask:
    """Mark the keys that queries read whose positions are known as numbers only.

    For a buffer whose size does not say how much of it is filled, where a compiler may not look.
    """
    q, k = query_position[:, :, None], key_position[:, None]
    of_heads = [pattern.reads(q, k, head) & is_token[:, None] for head in range(num_kv_heads)]
    return torch.stack(of_heads, 1)
