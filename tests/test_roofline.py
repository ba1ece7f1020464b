"""The prediction of times on GPUs, and the pages that it is written to."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from colonnade import FixedPattern

pytest.importorskip("triton", reason="the tables are about Triton's kernels")

from colonnade.backends.triton.configurations import Configuration
from colonnade.bench import code_report, roofline
from colonnade.bench.roofline import GPUS, Gpu, predict

ROOT = Path(__file__).parents[1]
TILES: dict[Any, Configuration] = dict.fromkeys(
    ("forward", "query", "slots", "own"), Configuration(128, 64, 8, 2)
)
BLOCKS: dict[Any, int] = dict.fromkeys(TILES, 1)
PATTERN = FixedPattern(128, 8)


@pytest.mark.parametrize(("length", "wanted"), [(4_096, 0.67), (16_384, 0.86), (131_072, 0.98)])
def test_the_share_of_wanted_pairs(length: int, wanted: float) -> None:
    """Counted by hand: block b of n/128 has its triangle, and 8 b slots in tiles of 64."""
    found = predict(GPUS["H100 SXM"], length, 64, 1, TILES, BLOCKS, False, PATTERN)
    blocks = range(length // 128)
    in_tiles = sum(128 * (128 + -(-8 * block // 64) * 64) for block in blocks)
    assert found.wanted == pytest.approx(PATTERN.num_pairs(length) / in_tiles)
    assert found.wanted == pytest.approx(wanted, abs=0.005)


def test_one_processor_takes_one_program_after_the_other() -> None:
    """Slots are gathered by two launches before. Memory or products take no time, in turns."""
    alone = Gpu("sm_90", 1, 1e12, 1e30)
    found = predict(alone, 1_024, 64, 3, TILES, BLOCKS, False, PATTERN)
    in_tiles = PATTERN.num_pairs(1_024) / found.wanted
    assert found.seconds == pytest.approx(3 * in_tiles * 4 * 64 / 1e12 + 3 * roofline.LAUNCH)
    slow = predict(Gpu("sm_90", 1, 1e30, 1e6), 1_024, 64, 3, TILES, BLOCKS, False, PATTERN)
    slots = 7 * 8  # Keys and values of these are read and written.
    assert slow.seconds == pytest.approx(3 * (4 * 1_024 + 4 * slots) * 64 * 2 / 1e6, rel=1e-4)


def test_places_take_the_next_program_as_they_become_free() -> None:
    seconds = torch.tensor([3.0, 2.0, 2.0, 2.0])
    assert roofline._makespan(seconds, 1, processors=2, blocks=1) == 5.0
    assert roofline._makespan(seconds, 1, processors=1, blocks=2) == 10.0  # They share its rate.
    assert roofline._makespan(seconds[:1], 1, processors=1, blocks=2) == 3.0  # There is one.
    assert roofline._makespan(seconds[:0], 1, processors=1, blocks=1) == 0.0


def test_the_backward_adds_three_kernels_and_what_comes_before_them() -> None:
    once, both = (
        predict(GPUS["H100 SXM"], 16_384, 64, 16, TILES, BLOCKS, way, PATTERN)
        for way in (False, True)
    )
    # 4 products of a width forward, 22 at most with the backward, and more work in its own tiles.
    assert 2 < both.seconds / once.seconds < 22 / 4 * 1.5
    assert both.dense / once.dense == pytest.approx(14 / 4, rel=0.05)


def test_the_page_holds_what_was_recorded() -> None:
    """`make gpu-code` writes both; neither was edited."""
    page = (ROOT / "docs" / "gpu.md").read_text("utf-8")
    recorded = json.loads((ROOT / "benchmarks" / "gpu_code.json").read_text())
    assert code_report.fill(page, recorded) == page


def test_a_kernel_that_is_declined_is_listed_and_not_predicted() -> None:
    """`make gpu-code` says so after the tables, which have to be written before."""
    recorded = json.loads((ROOT / "benchmarks" / "gpu_code.json").read_text())
    for row in recorded["rows"]:
        if (row["kernel"], row["target"], row["dtype"]) == ("own", "sm_90", "bf16"):
            row.pop("code")
            row["declined"] = True
    assert any(
        line.startswith("| sm_90 | 64 | ") and line.endswith(" | declined |")
        for line in code_report.tables(recorded)
    )
    predicted = "\n".join(code_report.predictions(recorded))
    assert "| A100 SXM" in predicted
    assert "| H100 SXM" not in predicted


@pytest.mark.slow
@pytest.mark.plain
@pytest.mark.timeout(1_200)
def test_the_command_compiles_one_device(tmp_path: Path) -> None:
    """And leaves the page alone, which is about all devices."""
    out, page = tmp_path / "code.json", tmp_path / "none.md"
    command: list[str | Path] = [
        sys.executable,
        ROOT / "benchmarks" / "gpu_code.py",
        "--targets",
        "gfx942",
    ]
    command += ["--out", out, "--page", page]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "0 wrong" in said
    assert "| gfx942 | 128 | " in said
    assert not page.exists()
    assert len(json.loads(out.read_text())["rows"]) == 3 * 7 * 4 + 2 * 3 * 3 * 4
