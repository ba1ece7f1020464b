"""Measuring: the right functions run, in turns. No test here looks at a clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import colonnade
from colonnade import FixedPattern
from colonnade.bench import flex, memory, timing
from colonnade.bench.timing import Contender, Sizes, Spread
from colonnade.cli import app
from colonnade.plan.table import gathered_mask
from tests.oracle import fixed_mask

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
