"""Memory that grows with the length, not with the pairs: eager at 65,536 tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CLEAR_REFS = "/proc/self/clear_refs"


@pytest.mark.skipif(not os.access(CLEAR_REFS, os.W_OK), reason=f"needs Linux's {CLEAR_REFS}")
def test_eager_needs_three_times_its_inputs_and_output() -> None:
    """Beyond inputs, output and gradients, at most 3 · (q + k + v + out) = 201 MB.

    What must not be kept: the weights of all pairs, 553 MB, or a dense mask, 4.3 GB.
    """
    script = Path(__file__).with_name("eager_peak.py")
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    print(f"peak beyond results: {found['beyond'] / found['unit']:.2f} · (q + k + v + out)")
    assert found["unit"] == 4 * 65_536 * 64 * 4
    assert found["beyond"] <= 3 * found["unit"]
