"""Measuring: the right functions run, in turns. No test here looks at a clock."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from typer.testing import CliRunner

import colonnade
from colonnade import FixedPattern
from colonnade.bench import device, flex, memory, report, rivals, rows, timing
from colonnade.bench.sections import marks
from colonnade.bench.timing import Contender, Sizes, Spread
from colonnade.cli import app
from colonnade.plan.table import gathered_mask
from tests.cli.common import PICTURES
from tests.oracle import fixed_mask

BEGIN, END = marks("measured")
SMALL = Sizes(seq_len=40, stride=8, summary=2, heads=2, kv_heads=1, head_dim=16)
needs_native = pytest.mark.skipif(
    colonnade.backends()["native"] is not None, reason="native is not usable here"
)


def test_a_spread_is_median_and_extremes() -> None:
    assert Spread.of([3.0, 1.0, 2.0, 10.0]) == Spread(2.5, 1.0, 10.0)


def test_contenders_take_turns_and_the_first_round_does_not_count() -> None:
    """Ratios are to the first contender, within a round."""
    ran: list[str] = []
    names = ["one", "two", "three"]
    found = timing.compare({name: partial(ran.append, name) for name in names}, rounds=4)
    assert ran == names * 5
    assert list(found.seconds) == names
    assert list(found.ratio) == ["two", "three"]
    assert found.rounds == 4
    for spread in found.seconds.values():
        assert 0 < spread.low <= spread.median <= spread.high


@needs_native
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_that_run_the_pattern_give_the_same(dtype: str) -> None:
    """And dense attention, which is what they are compared with, gives something else."""
    sizes = replace(SMALL, dtype=dtype)
    outs = {name: run() for name, run in _all(sizes).items()}
    for name in ("eager", "masked"):
        torch.testing.assert_close(outs["native"], outs[name], rtol=0.02, atol=0.02)
    assert (outs["dense"] - outs["eager"]).abs().max() > 0.1


def _all(sizes: Sizes) -> dict[str, Contender]:
    return timing.contenders(sizes, ["native", "eager", "dense", "masked"])


@needs_native
def test_with_the_backward_they_give_the_same_gradients() -> None:
    grads = {name: run() for name, run in _all(replace(SMALL, backward=True)).items()}
    for name in ("eager", "masked"):
        for one, other in zip(grads["native"], grads[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seq_len", [1, 7, 8, 9, 40, 43])
def test_gathered_keys_behind_a_mask_are_the_pattern(seq_len: int) -> None:
    """[slots ; keys]: every key that is read is read once."""
    slots, reads = gathered_mask(FixedPattern(8, 2), seq_len)
    positions = torch.cat([slots, torch.arange(seq_len)])
    columns = torch.arange(len(positions))
    found = reads(torch.arange(seq_len)[:, None], columns)
    count = torch.zeros(seq_len, seq_len, dtype=torch.long)
    count.index_add_(1, positions, found.long())
    assert torch.equal(count, fixed_mask(seq_len, 1, stride=8, summary=2)[0].long())


@needs_native
def test_the_ceiling_grows_with_the_pairs() -> None:
    """It is a time for each pair, and the backward's five products come on top of two."""
    short, long = (replace(SMALL, seq_len=n) for n in (40, 4_000))
    assert long.num_pairs() == 2 * FixedPattern(8, 2).num_pairs(4_000)
    assert 0 < timing.ceiling(short) < timing.ceiling(long)


@needs_native
def test_the_ceiling_needs_no_attention_before_it() -> None:
    """A fresh process: nothing has loaded the library."""
    code = "from colonnade.bench.timing import Sizes, ceiling; print(ceiling(Sizes(40, stride=8)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) > 0


@needs_native
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_native_needs_at_most_twice_its_inputs_and_output(dtype: str) -> None:
    """Beyond inputs, output and gradients: packed slots, their gradients, and scratch.

    What must not be kept: the weights of all pairs.
    """
    sizes = Sizes(seq_len=16_384, heads=4, kv_heads=4, dtype=dtype, backward=True)
    width = torch.finfo(getattr(torch, dtype)).bits // 8
    unit = 4 * sizes.heads * sizes.seq_len * sizes.head_dim * width
    peak = memory.peak(sizes, "native")
    print(f"peak beyond results: {peak / unit:.2f} · (q + k + v + out)")
    assert peak <= 2 * unit < sizes.num_pairs() * width


@needs_native
@pytest.mark.plain
def test_the_command_prints_what_it_measured() -> None:
    options = "bench --length 40 --stride 8 --summary 2 --heads 2 --head-dim 16 --rounds 2"
    result = CliRunner().invoke(app, [*options.split(), "--backward", "--json"])
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    assert set(found["seconds"]) == {"native", "eager", "dense", "masked"}
    assert set(found["ratio"]) == {"eager", "dense", "masked"}
    assert found["sizes"]["backward"] is True
    table = CliRunner(env={"COLUMNS": "100"}).invoke(app, options.split()).stdout
    for name in ("native", "eager", "dense", "masked", "ceiling"):
        assert name in table


@needs_native
@pytest.mark.plain
def test_what_memory_cannot_hold_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask grows with the square of the length; the system kills who asks for too much."""
    monkeypatch.setattr(memory, "physical_memory", lambda: 2**19)
    options = "bench --stride 8 --summary 2 --heads 2 --head-dim 16 --rounds 1"
    for length, fits in ((200, True), (300, False)):
        command = [*options.split(), "--length", str(length)]
        result = CliRunner(env={"COLUMNS": "100"}).invoke(app, command)
        assert result.exit_code == 0, result.stderr
        assert ("masked │" in result.stdout.replace("┃", "│")) == fits
        assert ("is left out: it takes 0.0 GiB" in result.stdout) == (not fits)


def test_masks_are_timed_where_they_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    for gib, length, fits in ((24, 16_384, True), (24, 16_385, False), (2, 16_384, False)):
        monkeypatch.setattr(memory, "physical_memory", lambda gib=gib: gib * 2**30)
        assert memory.masked_fits(Sizes(length)) == fits


@needs_native
def test_a_mask_goes_the_fast_way_of_pytorch() -> None:
    """Our rival runs as fast as it can: without keeping every score."""
    run = _all(Sizes(seq_len=64, stride=8, summary=2, heads=2, kv_heads=2, head_dim=16))["masked"]
    # Without acc_events torch 2.11 warns that it forgets what it saw in an earlier cycle.
    with torch.profiler.profile(acc_events=True) as profile:
        run()
    assert any("flash_attention" in event.key for event in profile.key_averages())


@pytest.mark.slow
@pytest.mark.plain
@needs_native
@pytest.mark.parametrize("gathered", [False, True])
def test_flex_attention_is_timed_at_each_tile(gathered: bool) -> None:
    sizes = Sizes(seq_len=512, stride=64, summary=8, heads=2, kv_heads=2)
    for tile, found in flex.compare_tiles(sizes, gathered, rounds=2).items():
        assert isinstance(found, timing.Comparison), (tile, found)
        assert set(found.ratio) == {"flex"}


def test_tensors_are_those_of_the_sizes() -> None:
    query, key, value, grad = replace(SMALL, batch=3, dtype="bfloat16").inputs()
    assert query.shape == grad.shape == (3, 2, 40, 16)
    assert key.shape == value.shape == (3, 1, 40, 16)
    assert all(isinstance(t, Tensor) and t.dtype == torch.bfloat16 for t in (query, key, value))


def _of_positions(
    reads: Callable[[Tensor, Tensor], Tensor], b: Tensor, h: Tensor, q: Tensor, k: Tensor
) -> Tensor:
    return reads(q, k)


def test_block_masks_are_those_that_pytorch_makes() -> None:
    """Lists of tiles, whole and in part; lengths that are no multiples of a tile."""
    pattern, n = FixedPattern(8, 2), 43
    slots, gathered = gathered_mask(pattern, n)
    for reads, keys in ((pattern.reads, n), (gathered, len(slots) + n)):
        for tile in ((8, 8), (16, 8), (16, 4)):
            found = flex.block_mask(reads, n, keys, tile, torch.device("cpu"))
            mask = partial(_of_positions, reads)
            expected = create_block_mask(mask, None, None, n, keys, "cpu", tile)
            assert found.shape == expected.shape
            for name in ("kv", "full_kv", "q", "full_q"):
                counts, others = (getattr(m, f"{name}_num_blocks") for m in (found, expected))
                assert torch.equal(counts, others), (name, tile)
                lists = [getattr(m, f"{name}_indices") for m in (found, expected)]
                for row, count in enumerate(counts[0, 0].tolist()):
                    one, other = (each[0, 0, row, :count] for each in lists)
                    assert torch.equal(one, other), (name, tile, row)


@pytest.mark.plain
@pytest.mark.parametrize("kv_heads", [2, 1])
@pytest.mark.parametrize("backward", [False, True])
def test_rivals_on_a_gpu_give_the_same(kv_heads: int, backward: bool) -> None:
    """As far as they run on a CPU; what cannot run says so when it is made."""
    sizes = replace(SMALL, kv_heads=kv_heads, backward=backward)
    here = rivals.Rivals(sizes, torch.device("cpu"))
    dense, pinned, eager = (here.make(name)() for name in ("dense", "dense, flash", "eager"))
    assert len(dense) == len(pinned) == len(eager) == (4 if backward else 1)
    for one, other in zip(dense, pinned, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    expected = timing.contenders(sizes, ["eager"])["eager"]()
    for one, other in zip(eager[1:] if backward else [eager[0]], expected, strict=True):
        torch.testing.assert_close(one, other.reshape(one.shape))
    for name in (*rivals.FLASH, *rivals.FLEX):
        with pytest.raises(NotImplementedError, match="it needs a GPU"):
            here.make(name)
    with pytest.raises(ValueError, match="a contender is one of"):
        here.make("sparse")


def test_the_first_rows_are_those_that_most_depends_on() -> None:
    """And every size comes once."""
    every = list(rows.jobs())
    first = every[:8]
    assert {job.sizes.seq_len for job in first} == {16_384, 131_072}
    assert {(job.kind, job.sizes.kv_heads) for job in first} == {("attention", 16)}
    # What takes long to compile comes last: time may run out.
    kinds = [job.kind for job in every]
    assert kinds == sorted(kinds)
    assert len(set(every)) == len(every) == 2 * 2 * 2 * 2 * len(rows.LENGTHS)


def test_a_failure_is_told_in_one_line() -> None:
    assert device.reason_of(RuntimeError("one\n  two \n\n")) == "RuntimeError: two"
    assert device.reason_of(AssertionError()) == "AssertionError: no reason given"


def _made_up(n: int, backward: bool, **ratios: float) -> dict[str, Any]:
    """Return a row in which "triton" takes a millisecond, and others as many as they are given."""
    sizes = Sizes(n, heads=16, kv_heads=16, dtype="bfloat16", backward=backward)
    row = {
        "kind": "attention",
        "sizes": asdict(sizes),
        "pairs": sizes.num_pairs(),
        "flop": rows.needed_flop(sizes),
        "failed": {"flash-attn 3": "ModuleNotFoundError: No module named 'flash_attn_interface'"},
        "peak_bytes": {"triton": 2 * n * 16 * 64},
        "replayed": {},
        "seconds": {"triton": asdict(Spread(1e-3, 9e-4, 2e-3))},
        "ratio": {name: asdict(Spread(r, r - 0.5, r + 0.5)) for name, r in ratios.items()},
    }
    if n == 1_024:
        row["replayed"] = {key: row[key] for key in ("seconds", "ratio")}
    return row


@pytest.fixture
def made_up() -> dict[str, Any]:
    """Return a result whose every number is known."""
    flex_row = _made_up(16_384, False, **{"flex 128 × 64": 3.0, "flex, gathered 128 × 128": 1.5})
    return {
        "machine": {"versions": {"torch": "2.11"}, "gpus": [{"name": "Some GPU"}]},
        "matrix": asdict(Spread(2e14, 1e14, 3e14)),
        "rows": [
            {**flex_row, "kind": "flex", "failed": {"flex 128 × 16": "ValueError: no"}},
            _made_up(16_384, False, **{"dense": 12.0, "dense, flash": 9.0, "eager": 30.0}),
            _made_up(16_384, True, **{"dense": 7.5, "dense, cuDNN": 8.5}),
            _made_up(1_024, False, dense=1.25),
        ],
    }


def test_a_report_has_the_fastest_dense_kernel_and_every_number(made_up: dict[str, Any]) -> None:
    text = "\n".join(report.lines(made_up))
    assert "On Some GPU, with torch 2.11." in text
    assert "reaches 200 (100–300) TFLOP/s" in text
    # 4 · 64 FLOPs for each of 16 · 9,379,840 pairs, in a millisecond.
    assert (
        "| forward | 64; 16 | 16,384 | 1 | 9.00 (8.50–9.50) flash |  |  | 30.00 (29.50–30.50) | "
        "3.00 (2.50–3.50) 128 × 64 | 1.50 (1.00–2.00) 128 × 128 | 19% | 0.25 |"
    ) in text
    assert "| forward + backward | 64; 16 | 16,384 | 1 | 7.50 (7.00–8.00) |" in text
    assert "| forward | 64; 16 | 1,024 | 1 | 1.25 (0.75–1.75) |\n" in text
    assert "| 16,384 | 8 | 7.50 |" in text
    assert "| 131,072 | 12 | not measured |" in text
    assert "| every length measured | 1 | 1.25 |" in text
    assert "- flex 128 × 16 did not run everywhere: ValueError: no" in text


def test_only_the_marked_section_of_a_page_is_replaced(made_up: dict[str, Any]) -> None:
    page = f"# GPUs\n\nbefore\n{BEGIN}\nold\n{END}\nafter\n"
    filled = report.fill(page, made_up, "gpu.svg")
    assert filled.startswith(f"# GPUs\n\nbefore\n{BEGIN}\n![Speed")
    assert filled.endswith(f"\n{END}\nafter\n")
    assert "old" not in filled
    assert "(gpu.svg)" in filled
    assert report.fill(filled, made_up, "gpu.svg") == filled
    assert "svg" not in report.fill(filled, made_up, None)
    for wrong in ("nothing", page + page, f"{END}\n{BEGIN}"):
        with pytest.raises(ValueError, match="must have one section"):
            report.fill(wrong, made_up, None)


@pytest.mark.plain
def test_the_page_of_a_run_that_was_killed_can_be_written_later(
    made_up: dict[str, Any], tmp_path: Path
) -> None:
    """And on a machine without a GPU."""
    out, page = tmp_path / "gpu.json", tmp_path / "gpu.md"
    out.write_text(json.dumps(made_up))
    page.write_text(f"# GPUs\n{BEGIN}\n{END}\n")
    files: list[str | Path] = ["--out", out, "--page", page]
    command = [sys.executable, "benchmarks/gpu.py", "--report", *files]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[1])
    assert page.read_text() == report.fill(page.read_text(), made_up, "gpu.svg")
    assert "On Some GPU, with torch 2.11." in page.read_text()
    assert json.loads(out.read_text()) == made_up


@pytest.mark.slow
@pytest.mark.plain
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or torch.cuda.is_available(),
    reason="needs triton, and no GPU to time",
)
def test_the_benchmark_of_a_gpu_goes_on_where_it_ended(tmp_path: Path) -> None:
    """In Triton's interpreter, at toy sizes: it writes rows, the page and its picture."""
    out, page = tmp_path / "gpu.json", tmp_path / "gpu.md"
    page.write_text(f"# GPUs\n{BEGIN}\n{END}\n")
    toy = ["--lengths", "20", "--widths", "8", "--heads", "2", "--rounds", "1", "--matrix", "16"]
    files = ["--out", str(out), "--page", str(page)]
    command = [sys.executable, "benchmarks/gpu.py", *toy, *files]
    for options, count in (("--seconds 0", 0), ("--kinds attention", 4), ("--resume", 8)):
        subprocess.run(
            [*command, *options.split()],
            check=True,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"TRITON_INTERPRET": "1"},
        )
        assert not count or len(json.loads(out.read_text())["rows"]) == count
    kinds = [row["kind"] for row in json.loads(out.read_text())["rows"]]
    assert kinds == ["attention"] * 4 + ["flex"] * 4
    assert "| forward + backward | 8; 1 | 20 |" in page.read_text()
    assert "](gpu.svg)" in page.read_text()
    assert (tmp_path / "gpu.svg").read_bytes().startswith(PICTURES[".svg"])
