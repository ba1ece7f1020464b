"""The rows of the benchmark of a GPU: in which order, and what is measured of each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import torch

from colonnade.bench.device import captured, compare_on_device, failures, peak_bytes, reason_of
from colonnade.bench.rivals import DENSE, FLASH, FLEX, LONGEST_EAGER, Rival, Rivals
from colonnade.bench.timing import Contender, Sizes

LENGTHS = tuple(1_024 * 2**power for power in range(8))
WIDTHS = (64, 128)
HEADS = 16
LONGEST_REPLAYED = 8_192
"""Longest sequence that is replayed from a graph too: in longer ones launches do not show."""


@dataclass(frozen=True)
class Job:
    """A comparison to measure.

    Attributes:
        kind: "attention", or "flex" for FlexAttention at its tiles, which takes long to compile.
        sizes: The attention.
    """

    kind: str
    sizes: Sizes

    def names(self) -> list[str]:
        """Return the contenders; ratios are to the first."""
        if self.kind == "flex":
            # PyTorch's backward drops smaller tiles, whatever it is asked for.
            least = 64 if self.sizes.backward else 0
            return ["triton", *(name for name, (_, tile) in FLEX.items() if tile[1] >= least)]
        eager = ["eager"] if self.sizes.seq_len <= LONGEST_EAGER else []
        return ["triton", *DENSE, *FLASH, *eager]


class DeviceLostError(RuntimeError):
    """A contender has left the device in a state in which nothing runs any more.

    Attributes:
        row: What is known of the job.
    """

    def __init__(self, row: dict[str, Any]) -> None:
        super().__init__("nothing runs on the device any more; a new process has to go on.")
        self.row = row


def jobs(
    lengths: Iterable[int] = LENGTHS, widths: Iterable[int] = WIDTHS, heads: int = HEADS
) -> Iterator[Job]:
    """Yield all jobs, those first that most depends on.

    That is dense attention at 16,384 and 131,072, then at the other lengths, and with grouped
    heads; then FlexAttention, which takes long to compile for each of its jobs.
    """
    lengths = sorted(lengths, key=lambda n: (n not in (16_384, 131_072), n))
    first = [n for n in lengths if n in (16_384, 131_072)] or lengths[:1]
    rest = [n for n in lengths if n not in first]
    grouped = max(1, heads // 4)
    for kind, among, kv_heads in (
        ("attention", first, heads),
        ("attention", rest, heads),
        ("attention", first, grouped),
        ("attention", rest, grouped),
        ("flex", first, heads),
        ("flex", rest, heads),
        ("flex", lengths, grouped),
    ):
        for n, width, backward in product(among, widths, (False, True)):
            sizes = Sizes(n, heads=heads, kv_heads=kv_heads, head_dim=width, dtype="bfloat16")
            yield Job(kind, replace(sizes, backward=backward))


def measure(job: Job, device: torch.device, rounds: int | None = None) -> dict[str, Any]:
    """Measure a job: times in turns, peaks, and why contenders failed.

    Args:
        job: What to measure.
        device: Where.
        rounds: Number of times that each contender runs; None: 31, and 9 beyond 32,768.

    Raises:
        DeviceLostError: A contender failed, and nothing runs on the device any more.
    """
    sizes = job.sizes
    rounds = rounds or (31 if sizes.seq_len <= 32_768 else 9)
    row: dict[str, Any] = {
        "kind": job.kind,
        "sizes": asdict(sizes),
        "pairs": sizes.num_pairs(),
        "flop": needed_flop(sizes),
        "failed": {},
        "peak_bytes": {},
        "replayed": {},
    }
    if job.kind == "flex":
        torch._dynamo.reset()  # A function is compiled for a few shapes only.
    running: dict[str, Rival] = {}
    with _recorded("the inputs", device, row):
        running = _those_that_run(Rivals(sizes, device), job.names(), row)
    with _recorded("the comparison", device, row):
        row |= asdict(compare_on_device(running, device, rounds)) if running else {}
    if "triton" not in running:
        row["ratio"] = {}  # To something else.
    elif job.kind == "attention" and sizes.seq_len <= LONGEST_REPLAYED and device.type == "cuda":
        replays: dict[str, Contender] = {}
        for name in ("triton", *DENSE):
            if name in running:
                with _recorded(f"{name}, replayed", device, row):
                    replays[name] = captured(running[name])
        if "triton" in replays:
            with _recorded("the comparison of replays", device, row):
                row["replayed"] = asdict(compare_on_device(replays, device, rounds))
    return row


def needed_flop(sizes: Sizes) -> int:
    """Return the FLOPs of the pairs that are read: two products forward, and five backward."""
    products = 7 if sizes.backward else 2
    return 2 * products * sizes.num_pairs() * sizes.head_dim


def _those_that_run(rivals: Rivals, names: list[str], row: dict[str, Any]) -> dict[str, Rival]:
    """Return the contenders that run, with their peaks in the row."""
    running = {}
    for name in names:
        with _recorded(name, rivals.device, row):
            run = rivals.make(name)
            run()  # What it compiles or keeps is no part of its peak.
            row["peak_bytes"][name] = peak_bytes(run, rivals.device)
            running[name] = run
    return running


@contextmanager
def _recorded(name: str, device: torch.device, row: dict[str, Any]) -> Iterator[None]:
    """Write a failure into a row, and go on if the device does."""
    try:
        yield
    except failures() as error:
        row["failed"][name] = reason_of(error)
    if name in row["failed"] and not _still_runs(device):
        raise DeviceLostError(row)


def _still_runs(device: torch.device) -> bool:
    """Whether a device runs anything; what failed is forgotten, and its memory is free again."""
    try:
        if device.type != "cpu":
            torch.get_device_module(device).empty_cache()
        return int(torch.ones(1, device=device).sum()) == 1
    except RuntimeError:
        return False
