"""Memory that grows with the length, not with the pairs: eager."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.backends.eager_peak import STRIDE, WIDTH

FLOAT = torch.float32.itemsize
N = 16_384
CLEAR_REFS = "/proc/self/clear_refs"


pytestmark = pytest.mark.skipif(
    not os.access(CLEAR_REFS, os.W_OK), reason=f"needs Linux's {CLEAR_REFS}"
)


def _peak(pattern: str, kv_len: int, q_len: int | None = None) -> int:
    """Bytes beyond inputs, output and gradients, over one forward and backward."""
    q_len = kv_len if q_len is None else q_len
    script = Path(__file__).with_name("eager_peak.py")
    done = subprocess.run(
        [sys.executable, str(script), pattern, str(kv_len), str(q_len)],
        capture_output=True,
        text=True,
        check=False,
        # Memory that is given back to the system at once cannot be mistaken for free.
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["unit"] == 2 * (kv_len + q_len) * WIDTH * FLOAT
    return int(found["beyond"])


def test_eager_needs_three_times_its_inputs_and_output() -> None:
    """Beyond inputs, output and gradients, at most 3 · (q + k + v + out) = 201 MB.

    What must not be kept: the weights of all pairs, 553 MB, or a dense mask, 4.3 GB.
    """
    unit = 4 * 65_536 * WIDTH * FLOAT
    peak = _peak("fixed", 65_536)
    print(f"peak beyond results: {peak / unit:.2f} · (q + k + v + out)")
    assert peak <= 3 * unit


@pytest.mark.parametrize(
    ("pattern", "keys"), [("strided", 2 * STRIDE + N // STRIDE), ("window", 2 * STRIDE)]
)
def test_windows_and_columns_make_nothing_square(pattern: str, keys: int) -> None:
    """At most 7 tensors [n, 2l + n/l], or [n, 2l] for a window: 176 MB and 117 MB.

    Scores, weights and their gradients, before and after a mask. What must not be made: n × n
    scores, 1.1 GB, or a dense mask, 268 MB.
    """
    unit = N * keys * FLOAT
    peak = _peak(pattern, N)
    print(f"peak beyond results: {peak / unit:.2f} · n · {keys}")
    assert peak <= 7 * unit < N * N


def test_reading_both_ways_makes_nothing_square() -> None:
    """Beyond inputs, output and gradients, at most 4 · (q + k + v + out) = 67 MB.

    What must not be made: a dense mask, 268 MB.
    """
    unit = 4 * N * WIDTH * FLOAT
    peak = _peak("bidirectional", N)
    print(f"peak beyond results: {peak / unit:.2f} · (q + k + v + out)")
    assert peak <= 4 * unit < N * N


def test_one_query_needs_no_whole_line() -> None:
    """Of a window of 16,384 keys among 65,536: six copies of the keys and values, 201 MB.

    What must not be made: the scores of a whole line of queries, 2.1 GB.
    """
    unit = 2 * 65_536 * WIDTH * FLOAT
    peak = _peak("wide window", 65_536, 1)
    print(f"peak beyond results: {peak / unit:.2f} · (k + v)")
    assert peak <= 6 * unit
