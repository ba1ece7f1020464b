"""From tensors and a plan to launches of the kernels.

This file and the kernels import Triton, so nothing imports them before the first call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from colonnade.backends.dropout import Dropout
from colonnade.backends.tracing.device import is_capturing, kept_on_device
from colonnade.backends.triton import tuning, work
from colonnade.backends.triton.backward import (
    grad_of_own_keys,
    grad_of_slots,
    grad_query_of_pieces,
)
from colonnade.backends.triton.configurations import (
    Configuration,
    Kernel,
    Precision,
    Words,
    configuration,
    name_of,
    power_of_two,
    precision_of,
    reason_no_tile_fits,
)
from colonnade.backends.triton.dropout import Dropped
from colonnade.backends.triton.forward import attend_pieces
from colonnade.backends.triton.tiles import Array, Shape
from colonnade.plan.places import Places
from colonnade.plan.table import Plan

Result = TypeVar("Result")

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton interprets kernels, on the CPU, as TRITON_INTERPRET=1 asks for."""
LOG2_E = 1.4426950408889634


class Group(NamedTuple):
    """Key heads that share a plan, and which of their weights are dropped."""

    heads: range
    plan: Plan
    dropout: Dropout = Dropout()
    places: Places | None = None
    """Needed if weights are dropped."""
    words: Words = "none"

    def of(self, tensor: Tensor) -> Tensor:
        """Return a view of these heads of [batch, key heads, …]."""
        return tensor[:, self.heads.start :: self.heads.step]

    def of_queries(self, tensor: Tensor, num_kv_heads: int) -> Tensor:
        """Return a view [batch, key heads, query heads of each, …] of [batch, query heads, …]."""
        return self.of(tensor.unflatten(1, (num_kv_heads, -1)))


class _Run:
    """The launches of one group: what all of its kernels are handed.

    Attributes:
        query: [batch, heads, query heads of each, q_len, qk_dim].
        own: Keys and values [batch, heads, positions, …] that own keys count: all, or the slots.
        slots: Keys and values of the slots, gathered.
        dropped: Which weights are dropped, as kernels take it; None if none are.
    """

    def __init__(
        self, group: Group, query: Tensor, key: Tensor, value: Tensor, longest: int
    ) -> None:
        self.plan, self.device, self.longest = group.plan, query.device, longest
        self.query = group.of_queries(query, key.shape[1])
        self.batch, self.heads, self.members = self.query.shape[:3]
        keys, values = group.of(key), group.of(value)
        index = self.listed(work.gather)[None, :, :, None]
        self.slots = [
            t.gather(2, index.expand(self.batch, -1, -1, t.shape[3])) for t in (keys, values)
        ]
        self.own = self.slots if group.plan.own_from_slots else [keys, values]
        self.shift = self.listed(work.shift)
        self.words, self.dropped = group.words, self._dropped(group)

    def _dropped(self, group: Group) -> Dropped | None:
        dropout = group.dropout
        if dropout.p == 0:
            return None
        placed = self.listed(work.placed, group.places)
        own, slot = (t.expand(self.batch, self.heads, -1) for t in (placed.own, placed.slot))
        documents, queries, own_keys, slots = _arrays(placed.document, placed.query, own, slot)
        threshold, factor = dropout.threshold, dropout.factor
        if threshold == 2**32:  # Nothing is kept, and 32 bits have no room for that.
            threshold, factor = 0, 0.0
        return Dropped(
            seed=dropout.seed,
            document=documents,
            query=queries,
            own=own_keys,
            slot=slots,
            # With a sign: Triton takes the type of a number from its size.
            threshold=threshold - 2**32 if threshold >= 2**31 else threshold,
            factor=factor,
            first_row=dropout.first_row,
            first_head=dropout.first_head + group.heads.start * self.members,
            heads_apart=group.heads.step * self.members,
            first_position=dropout.first_position,
        )

    def listed(self, make: Callable[..., Any], *sizes: Any) -> Any:
        """Return what a function makes of the plan, on the device; it is kept for the next call."""
        return kept_on_device(self.device, make, self.plan, *sizes)

    def at_best(self, kernel: Kernel, launch: Callable[[Configuration], Result]) -> Result:
        """Return what `launch` gives at the configuration of a kernel.

        Raises:
            NotImplementedError: No tile fits the device.
        """
        width, target = max(t.shape[3] for t in self.own), name_of(self.device)
        precision = precision_of(self.query.dtype, self.device)
        found = configuration(kernel, precision, width, target, self.longest, self.words)
        if found is None:
            reason = reason_no_tile_fits(self.query.dtype, width, self.device)
            raise NotImplementedError(f"backend 'triton' {reason}.")
        works = self.query.numel() > 0 and (kernel != "slots" or self.slots[0].numel() > 0)
        if works and tuning.is_asked_for():
            sizes = self._sizes(kernel, target, precision)
            # Nothing runs while a graph is captured, and a wait would end the capture.
            timed = None if is_capturing(self.device) else launch
            with _on(self.device):  # Times are taken on the current device.
                found = tuning.tuned(sizes, found, timed)
        return launch(found)

    def _sizes(self, kernel: Kernel, target: str, precision: Precision) -> tuning.Sizes:
        """Return what the fastest configuration of a kernel depends on."""
        return tuning.Sizes(
            device=target,
            kernel=kernel,
            dtype=str(self.query.dtype),
            precision=precision,
            qk_dim=self.own[0].shape[3],
            v_dim=self.own[1].shape[3],
            members=self.members,
            heads=power_of_two(self.batch * self.heads),
            q_len=power_of_two(self.query.shape[3]),
            slots=power_of_two(self.slots[0].shape[2]),
            longest=power_of_two(self.longest),
            words=self.words,
        )

    def launch(self, kernel: Any, config: Configuration, programs: int, *arguments: Any) -> None:
        """Launch a kernel with that many programs for each batch row and key head."""
        qk_dim, v_dim = (t.shape[3] for t in self.own)
        shape = Shape(
            self.members,
            qk_dim,
            v_dim,
            power_of_two(qk_dim),
            power_of_two(v_dim),
            config.queries,
            config.keys,
            precision="tf32" if precision_of(self.query.dtype, self.device) == "tf32" else "ieee",
            lift=INTERPRETED and self.query.dtype == torch.bfloat16,
            quads=self.words == "quads",
        )
        programs *= self.batch * self.heads
        if programs == 0:
            return
        with _on(self.device):
            kernel[(programs,)](*arguments, shape, num_warps=config.warps, num_stages=config.stages)


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which kernels are launched on a device."""
    if device.type == "cpu":  # Interpreted.
        return nullcontext()
    context: AbstractContextManager[object] = torch.get_device_module(device).device(device)
    return context


def _arrays(*tensors: Tensor) -> list[Array]:
    # A kernel reads memory, and knows nothing of a negation that PyTorch has put off.
    tensors = tuple(tensor.resolve_neg() for tensor in tensors)
    return [Array(tensor, tensor.stride()) for tensor in tensors]


def forward(
    groups: Sequence[Group], query: Tensor, key: Tensor, value: Tensor, scale: float, longest: int
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp; no row of a plan has more than `longest` queries."""
    out = query.new_empty(*query.shape[:3], value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    for group in groups:
        run = _Run(group, query, key, value, longest)
        results = [group.of_queries(t, key.shape[1]) for t in (out, lse)]
        run.at_best("forward", partial(_forward, run, results, scale))
    return out, lse


def _forward(run: _Run, results: list[Tensor], scale: float, config: Configuration) -> None:
    """Write output and log-sum-exp."""
    pieces = run.listed(work.pieces, config.queries)
    run.launch(
        attend_pieces,
        config,
        len(pieces) * run.members,
        *_arrays(run.query, *run.own, *run.slots, *results),
        pieces,
        run.shift,
        len(pieces),
        run.heads,
        scale * LOG2_E,
        run.dropped,
    )


def backward(
    groups: Sequence[Group],
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of query, key and value."""
    grad_query = query.new_empty(query.shape)
    # Where own keys are slots, nothing is written to keys that fill none.
    make = key.new_zeros if groups[0].plan.own_from_slots else key.new_empty
    grad_key, grad_value = make(key.shape), make(value.shape)
    for group in groups:
        run = _Run(group, query, key, value, longest)
        saved = [group.of_queries(t, key.shape[1]) for t in (out, lse, grad_out, grad_lse)]
        of_queries = group.of_queries(grad_query, key.shape[1])
        delta = run.at_best("query", partial(_grad_query, run, saved, of_queries, scale))
        sums = run.at_best("slots", partial(_grad_slots, run, saved, delta, scale))
        grads = [group.of(t) for t in (grad_key, grad_value)]
        run.at_best("own", partial(_grad_own_keys, run, saved, delta, sums, grads, scale))
    return grad_query, grad_key, grad_value


def _grad_query(
    run: _Run, saved: list[Tensor], grad_query: Tensor, scale: float, config: Configuration
) -> Tensor:
    """Write the gradients of queries, and return delta [batch, heads, members, q_len]."""
    out, lse, grad_out, grad_lse = saved
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    pieces = run.listed(work.pieces, config.queries)
    run.launch(
        grad_query_of_pieces,
        config,
        len(pieces) * run.members,
        *_arrays(run.query, *run.own, *run.slots, out, lse, grad_out, grad_lse, grad_query, delta),
        pieces,
        run.shift,
        len(pieces),
        run.heads,
        scale,
        run.dropped,
    )
    return delta


class _Sums(NamedTuple):
    """The gradients of slots, a sum for each share of the queries behind them.

    Attributes:
        sums: Those of keys and of values, [shares, batch, heads, slots, …] in float32, of as many
            slots as `work.num_read` says.
        shares: [slots], the number of shares of each slot.
    """

    sums: list[Tensor]
    shares: Tensor


def _grad_slots(
    run: _Run, saved: list[Tensor], delta: Tensor, scale: float, config: Configuration
) -> _Sums:
    """Return the gradients of slots."""
    _, lse, grad_out, _ = saved
    num_read = run.listed(work.num_read)
    most = _most_shares(run, config, num_read)
    found = run.listed(work.slot_tiles, config.keys, config.queries, most)
    sizes = found.most, run.batch, run.heads, num_read
    sums = [
        torch.empty((*sizes, t.shape[3]), dtype=torch.float32, device=t.device) for t in run.slots
    ]
    run.launch(
        grad_of_slots,
        config,
        len(found.tiles),
        *_arrays(run.query, *run.slots, lse, grad_out, delta, *sums),
        found.tiles,
        found.seen,
        len(found.tiles),
        run.heads,
        scale,
        run.dropped,
    )
    return _Sums(sums, found.shares)


def _most_shares(run: _Run, config: Configuration, num_read: int) -> int:
    """Return how many shares keep a GPU busy, in half of the memory of inputs and output."""
    slots = run.batch * run.heads * num_read
    tiles = slots // config.keys
    sums = 4 * slots * sum(t.shape[3] for t in run.slots)
    given = 2 * run.query.numel() + sum(t.numel() for t in run.own)
    in_memory = given * run.query.element_size() // max(2 * sums, 1)
    return max(1, min(work.busy_shares(tiles), in_memory))


def _grad_own_keys(
    run: _Run,
    saved: list[Tensor],
    delta: Tensor,
    of_slots: _Sums,
    grads: list[Tensor],
    scale: float,
    config: Configuration,
) -> None:
    """Write the gradients of keys and values: what they have as own keys, and the sums of slots."""
    _, lse, grad_out, _ = saved
    num_keys = run.own[0].shape[2]
    tiles = run.listed(work.own_tiles, num_keys, config.keys)
    partner = run.listed(work.partner, num_keys).expand(run.batch, run.heads, -1)
    run.launch(
        grad_of_own_keys,
        config,
        len(tiles),
        *_arrays(run.query, *run.own, lse, grad_out, delta, *of_slots.sums, *grads, partner),
        tiles,
        of_slots.shares,
        run.shift,
        len(tiles),
        run.heads,
        scale,
        run.dropped,
        run.plan.own_from_slots,
    )
