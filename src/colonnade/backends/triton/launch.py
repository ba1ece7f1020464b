"""From tensors and a plan to launches of the kernels.

This file and the kernels import Triton, so nothing imports them before the first call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from colonnade.backends.tracing.memo import for_every_call
from colonnade.backends.triton import work
from colonnade.backends.triton.backward import (
    grad_of_own_keys,
    grad_of_slots,
    grad_query_of_pieces,
)
from colonnade.backends.triton.configurations import (
    Configuration,
    Kernel,
    configuration,
    power_of_two,
)
from colonnade.backends.triton.forward import attend_pieces
from colonnade.backends.triton.tiles import Array, Shape
from colonnade.plan.table import Plan

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether Triton interprets kernels, on the CPU, as TRITON_INTERPRET=1 asks for."""
LOG2_E = 1.4426950408889634
PROGRAMS = 1024
"""Programs of a kernel that keep any GPU busy."""


class Group(NamedTuple):
    """Key heads that share a plan."""

    heads: range
    plan: Plan

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

    def listed(self, make: Callable[..., Any], *sizes: int) -> Any:
        """Return what a function makes of the plan, on the device; it is kept for the next call."""
        return _listed(make, self.plan, self.device, *sizes)

    def config(self, kernel: Kernel) -> Configuration:
        """Return the configuration of a kernel."""
        width = max(t.shape[3] for t in self.own)
        return configuration(kernel, self.query.dtype, width, self.longest)

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
            precision=_precision(self.device),
            lift=INTERPRETED and self.query.dtype == torch.bfloat16,
        )
        programs *= self.batch * self.heads
        if programs == 0:
            return
        with _on(self.device):
            kernel[(programs,)](*arguments, shape, num_warps=config.warps, num_stages=config.stages)


@functools.lru_cache(maxsize=64)
def _listed(make: Callable[..., Any], plan: Plan, device: torch.device, *sizes: int) -> Any:
    with for_every_call(), torch.device("cpu"):
        made = make(plan, *sizes)
    return made.to(device)


def _precision(device: torch.device) -> str:
    """Return how PyTorch is asked to multiply float32."""
    asked = torch.backends.cuda.matmul.fp32_precision
    return "tf32" if asked == "tf32" and device.type == "cuda" and not torch.version.hip else "ieee"


def _on(device: torch.device) -> AbstractContextManager[object]:
    """Return a context in which kernels are launched on a device."""
    if device.type == "cpu":  # Interpreted.
        return nullcontext()
    context: AbstractContextManager[object] = torch.get_device_module(device).device(device)
    return context


def _arrays(*tensors: Tensor) -> list[Array]:
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
        config = run.config("forward")
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
        )
    return out, lse


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
        delta = _grad_query(run, saved, group.of_queries(grad_query, key.shape[1]), scale)
        sums, shares = _grad_slots(run, saved, delta, scale)
        grads = [group.of(t) for t in (grad_key, grad_value)]
        _grad_own_keys(run, saved, delta, sums, shares, grads, scale)
    return grad_query, grad_key, grad_value


def _grad_query(run: _Run, saved: list[Tensor], grad_query: Tensor, scale: float) -> Tensor:
    """Write the gradients of queries, and return delta [batch, heads, members, q_len]."""
    out, lse, grad_out, grad_lse = saved
    delta = torch.empty_like(lse, memory_format=torch.contiguous_format)
    config = run.config("query")
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
    )
    return delta


def _grad_slots(
    run: _Run, saved: list[Tensor], delta: Tensor, scale: float
) -> tuple[list[Tensor], Tensor]:
    """Return the gradients of slots, a sum for each share of queries, and each slot's shares.

    The sums are [shares, batch, heads, slots, …] in float32.
    """
    _, lse, grad_out, _ = saved
    config = run.config("slots")
    found = run.listed(work.slot_tiles, config.keys, config.queries, _most_shares(run, config))
    sums = [
        torch.empty((found.most, *t.shape), dtype=torch.float32, device=t.device) for t in run.slots
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
    )
    return sums, found.shares


def _most_shares(run: _Run, config: Configuration) -> int:
    """Return how many shares keep a GPU busy, in half of the memory of inputs and output."""
    tiles = run.slots[0].shape[:3].numel() // config.keys
    sums = 4 * sum(t.numel() for t in run.slots)
    given = 2 * run.query.numel() + sum(t.numel() for t in run.own)
    return max(
        1, min(PROGRAMS // max(tiles, 1), given * run.query.element_size() // max(2 * sums, 1))
    )


def _grad_own_keys(
    run: _Run,
    saved: list[Tensor],
    delta: Tensor,
    sums: list[Tensor],
    shares: Tensor,
    grads: list[Tensor],
    scale: float,
) -> None:
    """Write the gradients of keys and values: what they have as own keys, and the sums of slots."""
    _, lse, grad_out, _ = saved
    config, num_keys = run.config("own"), run.own[0].shape[2]
    tiles = run.listed(work.own_tiles, num_keys, config.keys)
    run.launch(
        grad_of_own_keys,
        config,
        len(tiles),
        *_arrays(run.query, *run.own, lse, grad_out, delta, *sums, *grads),
        tiles,
        shares,
        run.listed(work.partner, num_keys),
        run.shift,
        len(tiles),
        num_keys,
        run.heads,
        scale,
        run.plan.own_from_slots,
    )
