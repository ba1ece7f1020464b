"""Time PyTorch's FlexAttention as a contender against `native`, at several of its tiles.

It compiles for each tile, and in one process would soon meet the limit on recompilations. So each
tile gets a process, with the same rounds against `native`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from colonnade.bench.process import last_line_of
from colonnade.bench.timing import Comparison, Sizes, Spread, compare, contenders
from colonnade.plan.table import gathered_mask

TILES = ((128, 128), (128, 32), (128, 16), (128, 8))
"""Queries and keys of a tile; which is best depends on the pattern."""


def compare_tiles(
    sizes: Sizes, gathered: bool = False, rounds: int = 9
) -> dict[str, Comparison | str]:
    """Time FlexAttention against `native` at each of its tiles; the forward pass only.

    Args:
        sizes: The attention to time.
        gathered: Let FlexAttention read keys that are gathered as native's are, instead of all.
        rounds: Number of times that each of the two runs.

    Returns:
        For each tile the comparison, or the last line of what went wrong.
    """
    flags = ["--rounds", str(rounds), *(["--gathered"] if gathered else [])]
    found: dict[str, Comparison | str] = {}
    for queries, keys in TILES:
        name, tile = f"{queries} × {keys}", ["--tile", str(queries), str(keys)]
        try:
            found[name] = _read(last_line_of(__name__, json.dumps(asdict(sizes)), *tile, *flags))
        except NotImplementedError as error:
            found[name] = str(error)
    return found


def block_mask(
    reads: Callable[[Tensor, Tensor], Tensor],
    q_len: int,
    kv_len: int,
    tile: tuple[int, int],
    device: torch.device,
) -> BlockMask:
    """Make a block mask one row of tiles after the other: no more pairs at once than those of one.

    `create_block_mask` draws all pairs first, which are 16 GiB at 131,072 positions.
    """
    queries, keys = tile
    columns = -(-kv_len // keys)
    key = torch.arange(columns * keys, device=device)
    some, whole = [], []
    for begin in range(0, q_len, queries):
        query = torch.arange(begin, begin + queries, device=device)[:, None]
        seen = reads(query, key) & (key < kv_len) & (query < q_len)
        seen = seen.view(queries, columns, keys)
        some.append(seen.any(2).any(0))
        whole.append(seen.all(2).all(0))
    full = torch.stack(whole)
    lists = [_listed(tiles) for tiles in (torch.stack(some) & ~full, full)]
    return BlockMask.from_kv_blocks(
        *lists[0],
        *lists[1],
        BLOCK_SIZE=tile,
        mask_mod=lambda b, h, q, k: reads(q, k),
        seq_lengths=(q_len, kv_len),
    )


def _listed(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Return the number of tiles in each row and their columns first, as `BlockMask` has them."""
    order = tiles.int().argsort(dim=1, descending=True, stable=True)
    return tiles.sum(1)[None, None].int(), order[None, None].int()


def _read(line: str) -> Comparison:
    """Read a comparison from the line of JSON that this module prints."""
    return Comparison(
        **json.loads(line, object_hook=lambda read: Spread(**read) if "median" in read else read)
    )


def _compare_in_this_process(
    sizes: Sizes, tile: tuple[int, int], gathered: bool, rounds: int
) -> Comparison:
    query, key, value, _ = sizes.inputs()
    pattern = sizes.pattern()
    reads: Callable[[Tensor, Tensor], Tensor] = pattern.reads
    if gathered:
        slots, reads = gathered_mask(pattern, sizes.seq_len)
        key, value = (torch.cat([t[:, :, slots], t], 2) for t in (key, value))
    mask = create_block_mask(
        lambda b, h, q, k: reads(q, k),
        None,
        None,
        query.shape[2],
        key.shape[2],
        device="cpu",
        BLOCK_SIZE=tile,
    )
    run = partial(
        torch.compile(flex_attention, dynamic=False),
        query,
        key,
        value,
        block_mask=mask,
        enable_gqa=sizes.heads != sizes.kv_heads,
    )
    return compare({**contenders(sizes, ["native"]), "flex": run}, rounds)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m colonnade.bench.flex",
        description="Time FlexAttention at one tile against native; print the comparison as JSON.",
    )
    parser.add_argument("sizes", type=json.loads, help="fields of Sizes as a JSON object")
    parser.add_argument("--tile", type=int, nargs=2, default=TILES[0], help="queries and keys")
    parser.add_argument("--gathered", action="store_true", help="gather the keys as native does")
    parser.add_argument("--rounds", type=int, default=9, help="number of times that each runs")
    given = parser.parse_args()
    found = _compare_in_this_process(
        Sizes(**given.sizes), tuple(given.tile), given.gathered, given.rounds
    )
    print(json.dumps(asdict(found)))
