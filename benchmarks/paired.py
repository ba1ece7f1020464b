"""Time the package in two checkouts, alternating in one run, to see what a change costs.

    python benchmarks/paired.py --old /path/to/old/src --new src --rounds 9
    python benchmarks/paired.py --old src --new src --sinks 1    # what a sink costs

Each checkout has one worker process, which imports its own copy of the package and times a row when
it is told to. In every round both time the row, one after the other, and the order is swapped from
round to round. Printed are the median of the ratios new/old of the rounds, with the smallest and
the largest. A row whose median is above --bar is run once more; if it still is, the exit code is 1.

8 heads of width 64, stride 128, summary 8, by the backend that "auto" chooses. `make bench-paired`
takes a few minutes, and nothing else may run at the same time.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:  # Each worker imports its own copy.
    from colonnade import KVCache

HEADS, HEAD_DIM, STRIDE, SUMMARY = 8, 64, 128, 8
LENGTHS = (256, 4_096, 16_384)
DOCUMENTS, DOCUMENT_LENGTH = 16, 256
CACHED, TOKENS = 4_000, 64
"""Positions in a decoder's cache, and tokens that are timed together; no block ends in between."""
SECONDS = 0.25
"""Time that one measurement takes about, in as many calls as fit, but at least 3."""


class Row(NamedTuple):
    """An operation to time."""

    operation: str
    length: int
    dtype: str
    backward: bool = False

    def __str__(self) -> str:
        passes = "forward + backward" if self.backward else "forward"
        return f"{self.operation}, n = {self.length:,}, {self.dtype}, {passes}"


TOKEN = "KVCache.attend of a token"
DTYPES = ("float32", "bfloat16")
ROWS = {
    str(row): row
    for row in (
        *(Row("attention", *each) for each in product(LENGTHS, DTYPES, (False, True))),
        *(Row(TOKEN, CACHED, dtype) for dtype in DTYPES),
        *(
            Row("attention_varlen", DOCUMENTS * DOCUMENT_LENGTH, *each)
            for each in product(DTYPES, (False, True))
        ),
    )
}


def serve(src: Path, sinks: int) -> None:
    """Time rows of the package in `src`: for each line "row<tab>calls" print the seconds of a call.

    They are the median of the calls, after one that does not count.
    """
    sys.path.insert(0, str(src))
    import colonnade

    assert Path(colonnade.__file__).is_relative_to(src), f"{colonnade.__file__} is not below {src}"
    for line in sys.stdin:
        name, calls = line.rstrip("\n").split("\t")
        measure = prepare(ROWS[name], sinks)
        measure()
        print(statistics.median(measure() for _ in range(int(calls))), flush=True)


@functools.cache
def prepare(row: Row, sinks: int) -> Callable[[], float]:
    """Draw the inputs of a row, and return what times one call of it."""
    import colonnade

    pattern = colonnade.FixedPattern(STRIDE, SUMMARY)
    if sinks > 0:  # An old checkout knows none.
        pattern = colonnade.FixedPattern(STRIDE, SUMMARY, sinks=sinks)
    torch.manual_seed(0)
    query, key, value, grad = (
        torch.randn(1, HEADS, row.length, HEAD_DIM).to(getattr(torch, row.dtype)) for _ in range(4)
    )
    if row.operation == TOKEN:
        return _prepare_token(colonnade.KVCache(pattern, CACHED + TOKENS), query, key, value)
    if row.operation == "attention_varlen":
        query, key, value, grad = (
            t[0].transpose(0, 1).contiguous() for t in (query, key, value, grad)
        )
    inputs = [t.requires_grad_(row.backward) for t in (query, key, value)]
    cu_seqlens = torch.arange(0, row.length + 1, DOCUMENT_LENGTH)

    def run() -> None:
        q, k, v = inputs
        if row.operation == "attention":
            out = colonnade.attention(q, k, v, pattern)
        else:
            out = colonnade.attention_varlen(q, k, v, cu_seqlens, pattern)
        assert isinstance(out, torch.Tensor)
        if row.backward:
            torch.autograd.grad(out, inputs, grad)

    return lambda: _seconds(run)


def _prepare_token(
    cache: KVCache, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> Callable[[], float]:
    """Fill a cache, and return what times one token: several are appended, then taken back."""
    with torch.no_grad():
        cache.attend(query, key, value)
    tokens = [tuple(t[:, :, i : i + 1].clone() for t in (query, key, value)) for i in range(TOKENS)]

    @torch.no_grad()
    def run() -> None:
        for q, k, v in tokens:
            cache.attend(q, k, v)

    def measure() -> float:
        seconds = _seconds(run)
        cache.crop(CACHED)
        return seconds / TOKENS

    return measure


def _seconds(run: Callable[[], None]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


class Worker:
    """The process that times rows of one checkout."""

    def __init__(self, src: Path, sinks: int = 0) -> None:
        self.src = src
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--serve", str(src), "--sinks", str(sinks)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def seconds(self, name: str, calls: int) -> float:
        """Return the median time of some calls of a row."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(name, calls, sep="\t", file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            print(f"the worker of {self.src} ended; its error is above", file=sys.stderr)
            sys.exit(2)
        return float(answer)


def compare(name: str, old: Worker, new: Worker, rounds: int) -> float:
    """Time a row in both checkouts, print the ratios new/old, and return their median."""
    tokens = TOKENS if ROWS[name].operation == TOKEN else 1
    calls = max(3, int(SECONDS / tokens / old.seconds(name, 1)))
    rounds_of: dict[Worker, list[float]] = {old: [], new: []}
    for index in range(rounds):
        for worker in (old, new) if index % 2 == 0 else (new, old):
            rounds_of[worker].append(worker.seconds(name, calls))
    ratios = [n / o for o, n in zip(rounds_of[old], rounds_of[new], strict=True)]
    milliseconds, ratio = 1e3 * statistics.median(rounds_of[old]), statistics.median(ratios)
    print(
        f"{name:58}{milliseconds:10.4g}{ratio:9.3f} ({min(ratios):.3f}–{max(ratios):.3f})",
        flush=True,
    )
    return ratio


def main() -> None:
    """Compare every row, and once more those that are above the bar."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--old", type=Path, help="src folder of the old checkout")
    parser.add_argument("--new", type=Path, help="src folder of the new checkout")
    parser.add_argument("--rounds", type=int, default=9, help="number of rounds of each row")
    parser.add_argument("--bar", type=float, default=1.03, help="largest median that passes")
    parser.add_argument("--only", default="", help="compare only rows whose name contains this")
    parser.add_argument("--sinks", type=int, default=0, help="sinks of the new checkout's pattern")
    parser.add_argument("--serve", type=Path, help="be the worker of this src folder")
    given = parser.parse_args()
    if given.serve is not None:
        serve(given.serve, given.sinks)
        return
    for option in ("old", "new"):
        src = getattr(given, option)
        if src is None or not (src / "colonnade" / "__init__.py").is_file():
            parser.error(f"--{option} must be a src folder that holds colonnade, got {src}")
    old, new = Worker(given.old.resolve()), Worker(given.new.resolve(), given.sinks)
    print(f"{'row':58}{'old, ms':>10}{'new/old':>9}")
    names = [name for name in ROWS if given.only in name]
    above = [name for name in names if compare(name, old, new, given.rounds) > given.bar]
    if above:
        print(f"above {given.bar}, once more:")
        above = [name for name in above if compare(name, old, new, given.rounds) > given.bar]
    if above:
        sys.exit(f"slower than {given.bar} times: {'; '.join(above)}")


if __name__ == "__main__":
    main()
