"""Predict the time of the Triton kernels on a GPU that is not there.

A processor multiplies at its share of the rate of the whole, and holds as many programs at once as
its registers and shared memory allow. Programs start in the order of their lists, as soon as there
is room. The result is the least time that the products of whole tiles and the traffic with
memory allow; exponentials, addresses and masks come on top, here as for every other kernel. So the
prediction is one of ratios: the tiles of dense causal attention are counted too, as if they kept
every processor busy to the end.
"""

from __future__ import annotations

import heapq
from typing import NamedTuple

import torch
from torch import Tensor

from colonnade.backends.triton import work
from colonnade.backends.triton.configurations import Configuration, Kernel
from colonnade.pattern import FixedPattern
from colonnade.plan.table import Plan, fixed_plan

LAUNCH = 4e-6
"""Seconds from one kernel to the next: an assumption."""
DENSE_LAUNCHES = {False: 1, True: 4}
"""Kernels of dense attention, with backward or without: as in FlashAttention."""
DENSE = Configuration(128, 128, 8, 2)
"""Tiles of dense attention, as in FlashAttention."""


class Gpu(NamedTuple):
    """A GPU, by its maker's data sheet.

    Attributes:
        target: Its name among `configurations.CHECKED`.
        processors: Number of processors.
        rate: Operations a second in bfloat16 with matrix instructions, without sparsity.
        bandwidth: Bytes a second of its memory.
    """

    target: str
    processors: int
    rate: float
    bandwidth: float


GPUS = {
    "A100 SXM, 80 GB": Gpu("sm_80", 108, 312e12, 2.039e12),
    "H100 SXM": Gpu("sm_90", 132, 989e12, 3.35e12),
    "B200": Gpu("sm_100", 148, 2_250e12, 8e12),
}


class Prediction(NamedTuple):
    """Of one length, forward or with backward.

    Attributes:
        seconds: The least time of our kernels.
        dense: That of dense causal attention.
        pairs: How many times fewer pairs the pattern has than dense attention.
        wanted: Share of the pairs in the tiles that are wanted.
    """

    seconds: float
    dense: float
    pairs: float
    wanted: float


def predict(
    gpu: Gpu,
    length: int,
    width: int,
    heads: int,
    configurations: dict[Kernel, Configuration],
    blocks: dict[Kernel, int],
    backward: bool,
    pattern: FixedPattern,
) -> Prediction:
    """Predict the time in bfloat16 for as many key heads as query heads.

    Args:
        gpu: The GPU.
        length: Number of queries, and of keys.
        width: Entries of a query, and of a value.
        heads: Number of heads.
        configurations: The tiles of each kernel.
        blocks: The programs of each kernel that a processor holds at once.
        backward: Add the gradients.
        pattern: A causal pattern of one sub-block.
    """
    plan = fixed_plan(pattern, length, length, [0])
    forward_tiles = _tiles_of_pieces(plan, configurations["forward"])
    kernels: list[tuple[Kernel, Tensor, int]] = [("forward", forward_tiles, 4)]
    if backward:
        kernels += [
            ("query", _tiles_of_pieces(plan, configurations["query"]), 6),
            ("slots", _tiles_of_slots(plan, configurations["slots"], heads, length), 8),
            ("own", _tiles_of_own_keys(plan, configurations["own"], length), 8),
        ]
    rows = heads * length * width * 2
    slots = heads * plan.gather.shape[1] * width * 2
    # Each direction gathers keys and values, and the backward fills a gradient with zeros.
    seconds = (2 if backward else 1) * 2 * (2 * slots / gpu.bandwidth + LAUNCH)
    seconds += LAUNCH if backward else 0
    for kernel, tiles, flop in kernels:
        pair = flop * width * gpu.processors / gpu.rate
        busy = _makespan(tiles * pair, heads, gpu.processors, blocks[kernel])
        # Queries, keys, values, results, and in the backward their gradients.
        traffic = rows * (4 if kernel == "forward" else 6) / gpu.bandwidth
        seconds += max(busy, traffic) + LAUNCH
    square = heads * _dense_pairs(length)
    flop = square * width * (4 + (10 if backward else 0))
    dense = max(flop / gpu.rate, rows * (12 if backward else 4) / gpu.bandwidth)
    wanted = pattern.num_pairs(length)
    return Prediction(
        seconds,
        dense + LAUNCH * DENSE_LAUNCHES[backward],
        length * (length + 1) / 2 / wanted,
        wanted / float(forward_tiles.sum()),
    )


def _dense_pairs(length: int) -> int:
    """Return the pairs in the tiles that causal attention computes."""
    tiles = -(-length // DENSE.queries)
    return tiles * (tiles + 1) // 2 * DENSE.queries * DENSE.keys


def _tiles_of_pieces(plan: Plan, config: Configuration) -> Tensor:
    """Return the pairs that each program of a kernel over pieces computes, in their order."""
    pieces = work.pieces(plan, config.queries).long()
    q_begin, q_end, own_begin, own_end, lead, slot_begin, slot_end = pieces.unbind(1)
    seen = torch.minimum(q_end - q_begin + lead, own_end - own_begin)
    keys = _whole(slot_end - slot_begin, config.keys) + _whole(seen, config.keys)
    return config.queries * keys


def _tiles_of_slots(plan: Plan, config: Configuration, heads: int, length: int) -> Tensor:
    most = work.busy_shares(work.num_read(plan) * heads // config.keys)
    tiles = work.slot_tiles(plan, config.keys, config.queries, most).tiles.long()
    return config.keys * _whole(tiles[:, 3] - tiles[:, 2], config.queries)


def _tiles_of_own_keys(plan: Plan, config: Configuration, length: int) -> Tensor:
    tiles = work.own_tiles(plan, length, config.keys).long()
    key_begin, _, own_begin, lead, q_begin, q_end = tiles.unbind(1)
    queries = q_end - q_begin - (key_begin - own_begin - lead).clamp(min=0)
    return config.keys * _whole(queries.clamp(min=0), config.queries)


def _whole(count: Tensor, tile: int) -> Tensor:
    return -(-count // tile) * tile


def _makespan(seconds: Tensor, heads: int, processors: int, blocks: int) -> float:
    """Return when the last program ends, if each place takes the next one as it becomes free.

    Programs on one processor share its rate: with b of them each takes b times as long. There are
    no more of them than it takes to spread all programs evenly.
    """
    shared = min(blocks, -(-len(seconds) * heads // processors))
    places = [0.0] * (processors * max(shared, 1))
    for each in (seconds * shared).tolist() * heads:
        heapq.heapreplace(places, places[0] + each)
    return max(places)
