"""Commands that need no run: show, cost, info and help, and what they need installed.

What must not have imported anything yet runs in a process of its own.
"""

from __future__ import annotations

import json
import re
import sys
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner

import colonnade
from colonnade.cli import app
from tests.cli.common import PICTURES, succeed
from tests.fresh import run

pytestmark = pytest.mark.plain  # A user's process has no type checks either.


def test_show_writes_text_and_pictures(tmp_path: Path) -> None:
    shown = succeed(
        "show", "--stride", 4, "--summary", 1, "--length", 8, "--row", 6, "--heads", 2
    ).stdout
    assert "···████· ← 6 reads 4 of 7" in shown
    assert "head 1" in shown
    for suffix, start in PICTURES.items():
        out = tmp_path / f"pattern{suffix}"
        succeed("show", "--out", out, "--heads", 2, "--subblocks", 2, "--row", 20)
        assert out.read_bytes().startswith(start)


def test_cost_counts_the_patterns() -> None:
    table = succeed("cost").stdout
    for number in ("9,379,840", "134,225,920", "6.99 %", "14.3 ×"):
        assert number in table
    assert re.search(r"fixed, stride 128 +│ +19.21 GFLOP │ 48.02 GFLOP │ +3.00 ×", table)
    assert re.search(r"fixed, stride 128 +│ +1,144 │ +4.47 MiB", table)
    arguments = ["--heads", 6, "--kv-heads", 2, "--width", 96, "--qk-width", 48, "--subblocks", 2]
    arguments += ["--length", 4096, "--stride", 64, "--layers", 3, "--batch", 5]
    got = json.loads(succeed("cost", *arguments, "--dtype", "bfloat16", "--json").stdout)
    assert (got["length"], got["kv_heads"], got["dtype"]) == (4096, 2, "bfloat16")
    fixed, strided = got["patterns"]["fixed"], got["patterns"]["strided"]
    assert fixed["pairs"] == 6 * sum(i % 64 + 1 + i // 64 * 8 for i in range(4096))
    assert fixed["forward_flops"] == 2 * fixed["pairs"] * (8 + 16) * 15
    assert fixed["cache_bytes"] == (64 + 8 * 63) * 2 * (8 + 16) * 2 * 15
    assert strided["pairs_per_kv_head"] == [389_152, 389_152]
    assert fixed["times_fewer_than_strided"] == strided["pairs"] / fixed["pairs"]
    assert got["patterns"]["local"]["window"] == 64
    assert got["best_stride"] == got["patterns"]["fixed_at_best_stride"]["stride"] == 181


def test_cost_fits_a_terminal_at_any_length() -> None:
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["cost", "--length", str(2**30)])
    assert "576,460,752,840,294,400" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


def test_info_names_what_runs_here() -> None:
    table = succeed("info").stdout
    for name in (
        colonnade.__version__,
        metadata.version("torch"),
        "GPU",
        "backend eager",
        "usable here",
    ):
        assert name in table
    got = json.loads(succeed("info", "--json").stdout)
    assert got["versions"]["colonnade"] == colonnade.__version__
    assert got["versions"]["typer"] is not None
    assert got["threads"] == torch.get_num_threads()
    assert got["backends"] == colonnade.backends()
    for text in (table, json.dumps(got)):
        assert str(Path.home()) not in text
        assert sys.prefix not in text


def test_info_of_another_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU and a backend that does not run; without a compiler and two extras."""
    gpu = SimpleNamespace(name="A GPU", major=9, minor=0, total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpu)
    monkeypatch.setattr(colonnade, "backends", lambda build: {"native": "it needs a compiler"})
    monkeypatch.setenv("CXX", "no-such-compiler")
    version = metadata.version

    def without_extras(package: str) -> str:
        if package in ("transformers", "matplotlib"):
            raise metadata.PackageNotFoundError(package)
        return version(package)

    monkeypatch.setattr(metadata, "version", without_extras)
    table = succeed("info").stdout
    for said in (
        "A GPU, compute capability 9.0, 80.00 GiB",
        "it needs a compiler",
        "none found; CXX may name one",
        "not installed: pip install 'colonnade[train]'",
        "not installed: pip install 'colonnade[plot]'",
    ):
        assert said in table
    got = json.loads(succeed("info", "--json").stdout)
    assert got["versions"]["transformers"] is None
    assert got["compiler"] is None
    assert got["gpus"][0]["memory_bytes"] == 80 * 2**30


@pytest.mark.parametrize("command", ["cost", "info"])
def test_counting_needs_no_extra_but_the_command_line(command: str) -> None:
    """Neither is even imported."""
    without = ["transformers", "accelerate", "tokenizers", "safetensors", "matplotlib"]
    code = f"import sys; sys.modules.update(dict.fromkeys({without})); "
    code += "from colonnade.cli import main; main()"
    done = run(code, command, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)


@pytest.mark.parametrize(
    ("missing", "arguments", "extra"),
    [
        ("matplotlib", ["show", "--out", "x.png"], "'plot'"),
        ("transformers", ["train"], "'train'"),
        ("accelerate", ["train"], "'train'"),
        ("typer", ["show"], "'train' or 'plot'"),
    ],
)
def test_a_missing_extra_is_named(
    missing: str, arguments: list[str], extra: str, tmp_path: Path
) -> None:
    blocked = f"import sys; sys.modules[{missing!r}] = None; from colonnade.cli import main; main()"
    done = run(blocked, *arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert extra in done.stderr
    assert done.stderr.count("\n") == 1


def test_every_command_has_help() -> None:
    said = succeed("--help").stdout
    for command in ("train", "eval", "sample", "show", "cost", "info"):
        assert command in said
        assert "Usage" in succeed(command, "--help").stdout


def test_version_is_one() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", colonnade.__version__)


def test_info_of_a_compiler_that_speaks_latin_1(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "compiler"
    script.write_bytes("#!/bin/sh\necho 'g++ Gerät'\n".encode("latin-1"))
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    assert json.loads(succeed("info", "--json").stdout)["compiler"] == r"g++ Ger\xe4t"


def test_info_build_tries_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It forgets the failures that are remembered, and nothing else."""
    monkeypatch.setenv("COLONNADE_CACHE", str(tmp_path))
    monkeypatch.setattr(colonnade, "backends", lambda build: {"native": None})
    failed, library = tmp_path / "native-0.failed", tmp_path / "native-0.so"
    for file in (failed, library):
        file.touch()
    succeed("info")
    assert failed.exists()
    succeed("info", "--build")
    assert not failed.exists()
    assert library.exists()
    monkeypatch.setenv("COLONNADE_CACHE", "/dev/null/below")
    succeed("info", "--build")
