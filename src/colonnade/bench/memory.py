"""Measure the peak memory of a contender, and judge whether a boolean mask has room."""

from __future__ import annotations

import argparse
import json
import os
import re
from dataclasses import asdict, replace
from pathlib import Path

from colonnade.bench.process import last_line_of
from colonnade.bench.timing import CONTENDERS, Sizes, contenders

MASKED_LIMIT = 16_384
"""Longest sequence under a boolean mask; twice as many positions take 7 GiB."""
MASKED_SHARE = 0.7
"""Largest share of this machine's memory that attention under a boolean mask may take."""
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""Memory that is returned to the system at once cannot be mistaken for free memory."""


def masked_bytes(sizes: Sizes) -> int:
    """Estimate what a boolean mask and attention under it allocate at their peak.

    7 bytes for each pair of positions, rounded up from what 8,192 and 16,384 positions took.
    """
    return 7 * sizes.seq_len**2


def masked_fits(sizes: Sizes) -> bool:
    """Whether attention under a boolean mask is short enough to be timed and has room."""
    return sizes.seq_len <= MASKED_LIMIT and masked_bytes(sizes) <= MASKED_SHARE * physical_memory()


def physical_memory() -> int:
    """Return the bytes of this machine's memory, or 0 where the system does not tell."""
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def peak(sizes: Sizes, contender: str) -> int:
    """Return the bytes beyond inputs and results that one run of a contender needs at its peak.

    It is measured in a process of its own: memory that other code has allocated and freed would
    hide it.

    Raises:
        NotImplementedError: There is no /proc/self/clear_refs: not Linux, or not allowed.
    """
    return int(last_line_of(__name__, json.dumps(asdict(sizes)), contender, **ENVIRONMENT))


def _peak_of_this_process(sizes: Sizes, contender: str) -> int:
    contenders(replace(sizes, seq_len=min(1_024, sizes.seq_len)), [contender])[contender]()
    run = contenders(sizes, [contender])[contender]
    Path("/proc/self/clear_refs").write_text("5")  # The peak restarts from what is there now.
    before = _resident("VmRSS")
    results = run()
    returned = sum(t.nbytes for t in (results if isinstance(results, tuple) else (results,)))
    return int(_resident("VmHWM") - before - returned)


def _resident(entry: str) -> int:
    """Return an entry of /proc/self/status in bytes."""
    found = re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m colonnade.bench.memory",
        description="Print the bytes beyond inputs and results that one run needs at its peak.",
        epilog=f"Correct only in an environment with {ENVIRONMENT}.",
    )
    parser.add_argument("sizes", type=json.loads, help="fields of Sizes as a JSON object")
    parser.add_argument("contender", choices=CONTENDERS)
    given = parser.parse_args()
    print(_peak_of_this_process(Sizes(**given.sizes), given.contender))
