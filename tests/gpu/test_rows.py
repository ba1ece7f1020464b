"""The benchmark's own code, before it is run for long."""

from __future__ import annotations

import json

import pytest
import torch

from colonnade.bench import rivals
from colonnade.bench.device import failures, reason_of
from colonnade.bench.rows import Job, measure
from colonnade.bench.timing import Sizes
from tests.gpu.common import DEVICE, marks, needs_cuda, sized

pytestmark = [*marks, pytest.mark.plain]
SIZES = Sizes(sized(1_024, 20), heads=4, kv_heads=2, dtype="bfloat16")


@pytest.mark.interpreted
def test_a_row_has_times_and_reasons() -> None:
    found = measure(Job("attention", SIZES), DEVICE, rounds=1)
    assert "triton" not in found["failed"], found["failed"]
    assert set(found["ratio"]) >= {"dense", "eager"}
    for spread in found["seconds"].values():
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    for name in rivals.FLASH:
        assert name in found["failed"] or name in found["ratio"]
    assert json.loads(json.dumps(found)) == found


@needs_cuda
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_what_runs_on_a_gpu_is_measured_there(kv_heads: int, backward: bool) -> None:
    """Dense attention and FlexAttention run, peaks are counted, and calls are replayed."""
    sizes = Sizes(1_024, heads=4, kv_heads=kv_heads, dtype="bfloat16", backward=backward)
    found = measure(Job("attention", sizes), DEVICE, rounds=2)
    assert {"triton", "dense", "eager"} <= set(found["seconds"]), found["failed"]
    assert all(peak >= 0 for peak in found["peak_bytes"].values())
    assert {"triton", "dense"} <= set(found["replayed"]["seconds"]), found["failed"]
    flex = measure(Job("flex", sizes), DEVICE, rounds=2)
    for kind in ("flex ", "flex, gathered "):
        assert any(name.startswith(kind) for name in flex["ratio"]), flex["failed"]


@pytest.mark.parametrize("name", ["dense, flash", "dense, cuDNN", *rivals.FLASH, *rivals.FLEX])
def test_rivals_compute_what_they_stand_for(name: str) -> None:
    """Dense attention as PyTorch chooses it, or the pattern as "eager" has it."""
    here = rivals.Rivals(SIZES, DEVICE)
    expected = here.make("eager" if name in rivals.FLEX else "dense")()[0]
    try:
        found = here.make(name)()[0]
    except failures() as error:
        pytest.skip(reason_of(error))
    if name in rivals.FLASH:
        found = found.transpose(1, 2)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)
