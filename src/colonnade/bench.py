"""Timing: alternatives side by side in one process, round after round, as medians and spreads.

Each round runs every contender once, so that a machine that changes its speed changes it for all.
FlexAttention compiles for each tile, and in one process would soon meet the limit on
recompilations: each of its tiles gets a process, with the same rounds against `native`.
"""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from colonnade.backends import native
from colonnade.ops import attention
from colonnade.pattern import FixedPattern, Part
from colonnade.plan.table import gathered_mask

Function = Callable[[], object]
FLEX_TILES = ((128, 128), (128, 32), (128, 16), (128, 8))
"""Queries and keys of a tile of FlexAttention; its best depends on the pattern."""
MASKED_LIMIT = 16_384
"""The longest sequence under a boolean mask: twice as many positions take 7 GiB."""
MASKED_SHARE = 0.7
"""Of this machine's memory, what attention under a boolean mask may take."""


@dataclass(frozen=True)
class Sizes:
    """One attention to be timed; `backward`: forward and backward together."""

    seq_len: int = 16_384
    stride: int = 128
    summary: int = 8
    part: Part = "merged"
    batch: int = 1
    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 64
    dtype: str = "float32"
    backward: bool = False

    def pattern(self) -> FixedPattern:
        """The pattern of these sizes."""
        return FixedPattern(self.stride, self.summary, part=self.part)

    def num_pairs(self) -> int:
        """Pairs of query and key over all query heads."""
        return self.batch * self.heads * self.pattern().num_pairs(self.seq_len)

    def inputs(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normal queries, keys, values, and a gradient of the output."""
        generator = torch.Generator().manual_seed(0)
        heads = self.heads, self.kv_heads, self.kv_heads, self.heads
        query, key, value, grad = (
            torch.randn(self.batch, h, self.seq_len, self.head_dim, generator=generator).to(
                getattr(torch, self.dtype)
            )
            for h in heads
        )
        if self.backward:
            query, key, value = (t.requires_grad_() for t in (query, key, value))
        return query, key, value, grad


@dataclass(frozen=True)
class Spread:
    """Of several measurements."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Spread:
        """Median, smallest and largest."""
        return cls(statistics.median(numbers), min(numbers), max(numbers))


@dataclass(frozen=True)
class Comparison:
    """What one comparison found.

    Attributes:
        seconds: Of each contender.
        ratio: How many times longer each other one took than the first, round by round.
        rounds: How often each ran.
    """

    seconds: dict[str, Spread]
    ratio: dict[str, Spread]
    rounds: int


def masked_bytes(sizes: Sizes) -> int:
    """What a boolean mask and attention under it allocate at their peak, about.

    7 bytes for a pair of positions, rounded up from what 8,192 and 16,384 positions took.
    """
    return 7 * sizes.seq_len**2


def masked_fits(sizes: Sizes) -> bool:
    """Whether attention under a boolean mask is to be timed: not too long, and it has room."""
    allowed = MASKED_SHARE * _memory()
    return sizes.seq_len <= MASKED_LIMIT and masked_bytes(sizes) <= allowed


def _memory() -> int:
    """Bytes of this machine's memory; 0 where the system does not tell."""
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def compare(contenders: Mapping[str, Function], rounds: int = 9) -> Comparison:
    """Run every contender once in each of `rounds` rounds, after one that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds + 1):
        for name, run in contenders.items():
            start = time.perf_counter()
            run()
            taken = time.perf_counter() - start
            if index > 0:
                seconds[name].append(taken)
    first, *others = contenders
    ratio = {
        name: Spread.of([s / f for s, f in zip(seconds[name], seconds[first], strict=True)])
        for name in others
    }
    return Comparison({name: Spread.of(s) for name, s in seconds.items()}, ratio, rounds)


def contenders(sizes: Sizes, names: Sequence[str]) -> dict[str, Function]:
    """Functions that run the attention: "native", "eager", "dense", "masked".

    "dense" is PyTorch's causal attention over all earlier keys, "masked" the same pattern as a
    boolean mask.
    """
    query, key, value, grad = sizes.inputs()
    pattern = sizes.pattern()
    grouped = sizes.heads != sizes.kv_heads

    def ours(backend: str) -> Callable[[], Tensor]:
        def run() -> Tensor:
            out = attention(query, key, value, pattern, backend=backend)
            assert isinstance(out, Tensor)
            return out

        return run

    def dense() -> Tensor:
        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)

    forward: dict[str, Callable[[], Tensor]] = {
        "native": ours("native"),
        "eager": ours("eager"),
        "dense": dense,
    }
    if "masked" in names:
        # [1, 1, n, n]: with fewer dimensions PyTorch takes a slower way, which keeps all scores.
        mask = pattern.mask(sizes.seq_len)[None]

        def masked() -> Tensor:
            return scaled_dot_product_attention(
                query, key, value, attn_mask=mask, enable_gqa=grouped
            )

        forward["masked"] = masked
    if not sizes.backward:
        return {name: forward[name] for name in names}
    return {name: _with_backward(forward[name], (query, key, value), grad) for name in names}


def _with_backward(
    forward: Callable[[], Tensor], inputs: tuple[Tensor, Tensor, Tensor], grad: Tensor
) -> Function:
    return lambda: torch.autograd.grad(forward(), inputs, grad)


def ceiling(sizes: Sizes) -> float:
    """Seconds that the products at the kernel's tiles and the exponentials take alone."""
    like = torch.empty(0, dtype=getattr(torch, sizes.dtype))
    forward, backward = native.ceiling(like, sizes.head_dim, sizes.head_dim)
    pair = forward + backward if sizes.backward else forward
    return sizes.num_pairs() * pair / torch.get_num_threads()


def flex(sizes: Sizes, gathered: bool = False, rounds: int = 9) -> dict[str, Comparison | str]:
    """FlexAttention against native at each of its tiles, each in a process; forward only.

    Args:
        sizes: What to time.
        gathered: Over keys that are gathered as native's are, in place of all.
        rounds: As for `compare`.

    Returns:
        For each tile what was found, or the last line of what went wrong.
    """
    found: dict[str, Comparison | str] = {}
    for tile in FLEX_TILES:
        argument = json.dumps([asdict(sizes), tile, gathered, rounds])
        command = [sys.executable, "-m", "colonnade.bench", argument]
        done = subprocess.run(command, capture_output=True, text=True)
        name = f"{tile[0]} × {tile[1]}"
        if done.returncode == 0:
            found[name] = _comparison(json.loads(done.stdout.splitlines()[-1]))
        else:
            found[name] = (done.stderr.splitlines() or ["it was killed"])[-1]
    return found


def _comparison(read: dict[str, Any]) -> Comparison:
    seconds, ratio = (
        {name: Spread(**spread) for name, spread in read[part].items()}
        for part in ("seconds", "ratio")
    )
    return Comparison(seconds, ratio, read["rounds"])


def _compare_flex(sizes: Sizes, tile: tuple[int, int], gathered: bool, rounds: int) -> Comparison:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    query, key, value, _ = sizes.inputs()
    pattern = sizes.pattern()
    kv_len = key.shape[2]
    reads: Callable[[Tensor, Tensor], Tensor] = pattern.reads
    if gathered:
        slots, reads = gathered_mask(pattern, sizes.seq_len)
        kv_len += len(slots)
        key, value = (torch.cat([t[:, :, slots], t], 2) for t in (key, value))
    mask = create_block_mask(
        lambda b, h, q, k: reads(q, k),
        None,
        None,
        sizes.seq_len,
        kv_len,
        device="cpu",
        BLOCK_SIZE=tile,
    )
    compiled = torch.compile(flex_attention, dynamic=False)
    grouped = sizes.heads != sizes.kv_heads

    def run() -> object:
        return compiled(query, key, value, block_mask=mask, enable_gqa=grouped)

    return compare({**contenders(sizes, ["native"]), "flex": run}, rounds)


def peak(sizes: Sizes, name: str) -> int:
    """Bytes beyond inputs and results that one run of a contender needs at its peak.

    In a process of its own, since what other code has allocated and freed would hide it.

    Raises:
        NotImplementedError: There is no /proc/self/clear_refs: not Linux, or not allowed.
    """
    command = [sys.executable, "-m", "colonnade.bench", json.dumps([asdict(sizes), name])]
    # Memory that is given back to the system at once cannot be mistaken for free.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode != 0:
        raise NotImplementedError((done.stderr.splitlines() or ["it was killed"])[-1])
    return int(done.stdout)


def _measure_peak(sizes: Sizes, name: str) -> int:
    small = Sizes(**{**asdict(sizes), "seq_len": min(1_024, sizes.seq_len)})
    contenders(small, [name])[name]()
    run = contenders(sizes, [name])[name]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, from what is there now
    before = _resident("VmRSS")
    results = run()
    tensors = results if isinstance(results, tuple) else (results,)
    held = sum(t.numel() * t.element_size() for t in tensors)
    return int(_resident("VmHWM") - before - held)


def _resident(entry: str) -> int:
    found = re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    kilobytes = int(found[1])
    return 1024 * kilobytes


def _main(argument: str) -> None:
    sizes, *rest = json.loads(argument)
    if len(rest) == 1:
        print(_measure_peak(Sizes(**sizes), *rest))
    else:
        tile, gathered, rounds = rest
        print(json.dumps(asdict(_compare_flex(Sizes(**sizes), tuple(tile), gathered, rounds))))


if __name__ == "__main__":
    _main(sys.argv[1])
