"""Peak memory of attention, forward and backward; Linux only.

`peaks` runs this file as a process of its own, for memory that other code has allocated and freed
would hide the peak. The process prints, for each of `MEASURED`, the bytes beyond inputs, output and
gradients as JSON.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from colonnade import FixedPattern, LocalPattern, Pattern, StridedPattern, attention

CLEAR_REFS = Path("/proc/self/clear_refs")
WIDTH = 64
STRIDE = 128


class Measured(NamedTuple):
    """A pattern and the lengths that its peak is measured at."""

    pattern: Pattern
    kv_len: int
    q_len: int


MEASURED = {
    "fixed": Measured(FixedPattern(STRIDE, 8), 32_768, 32_768),
    "bidirectional": Measured(FixedPattern(STRIDE, 8, causal=False), 16_384, 16_384),
    "strided": Measured(StridedPattern(STRIDE), 16_384, 16_384),
    "window": Measured(LocalPattern(STRIDE), 16_384, 16_384),
    "one query of a wide window": Measured(LocalPattern(16_384), 65_536, 1),
}


def peaks(backend: str) -> dict[str, int]:
    """Return the bytes beyond inputs, output and gradients for each of `MEASURED`."""
    done = subprocess.run(
        [sys.executable, __file__, backend],
        capture_output=True,
        text=True,
        check=False,
        # Memory that is returned to the system at once cannot be mistaken for free memory.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, int] = json.loads(done.stdout)
    return found


def _resident(entry: str) -> int:
    """Return the bytes of VmRSS (now) or VmHWM (the peak since the last reset)."""
    found = re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def _run(backend: str, pattern: Pattern, kv_len: int, q_len: int) -> int:
    """Return the peak beyond what was there before and what is left."""
    lengths = q_len, kv_len, kv_len, q_len
    query, key, value, grad_out = (torch.randn(1, 1, length, WIDTH) for length in lengths)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    CLEAR_REFS.write_text("5")  # The peak restarts from what is there now.
    before = _resident("VmRSS")
    out = attention(query, key, value, pattern, backend=backend)
    out.backward(grad_out)
    peak = _resident("VmHWM") - before
    left = [out, *(t.grad for t in leaves if t.grad is not None)]
    assert len(left) == 4
    return peak - sum(t.numel() * t.element_size() for t in left)


def _main(backend: str) -> None:
    """Warm up on short sequences, then measure each once."""
    torch.set_num_threads(1)
    for pattern, kv_len, q_len in MEASURED.values():
        _run(backend, pattern, min(1024, kv_len), min(1024, q_len))
    print(json.dumps({name: _run(backend, *measured) for name, measured in MEASURED.items()}))


if __name__ == "__main__":
    _main(*sys.argv[1:])
