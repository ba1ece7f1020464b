"""Compilers that torch.compile cannot use, and runs that fail before their first step."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch._inductor.config

from colonnade.hf.model import SparseTransformerModel
from colonnade.train import run
from colonnade.train.data import standard_library
from colonnade.train.settings import SETTINGS_FILE, RunSettings
from tests.cli.common import SMALL, invoke, succeed

pytestmark = pytest.mark.plain  # A compiler cannot see through the checks.
COMPILED = [option for option in SMALL if option != "--no-compile"]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.py"
    file.write_bytes(standard_library().read(0, 30_000).tobytes())
    return file


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    """Make every test find out for itself whether torch.compile works."""
    run.reason_not_compiled.cache_clear()
    yield
    run.reason_not_compiled.cache_clear()
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ('echo "unrecognized -std=c++20" >&2; exit 1', "unrecognized -std=c++20"),
        ("printf 'Ger\\344t\\n'; printf 'Ger\\344t\\n' >&2; exit 1", "decode"),
        (None, "No working C++ compiler"),
    ],
)
def test_a_compiler_is_tried_out(what: str | None, said: str, tmp_path: Path) -> None:
    """One that is too old, one that speaks Latin-1, and none."""
    script = tmp_path / "compiler"
    if what is not None:
        script.write_text(f'#!/bin/sh\n[ "$1" = --version ] && exec g++ --version\n{what}\n')
        script.chmod(0o755)
    torch._dynamo.reset()
    with torch._inductor.config.patch({"cpp.cxx": (None, str(script)), "fx_graph_cache": False}):
        reason = run.reason_not_compiled()
    assert said in str(reason)
    assert "\n" not in str(reason)


def test_a_torch_for_gpus_is_tried_out_on_the_cpu_where_there_is_no_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with torch._inductor.config.patch({"cpp.cxx": (None, "none"), "fx_graph_cache": False}):
        assert "No working C++ compiler" in str(run.reason_not_compiled())


def test_without_a_usable_compiler_a_run_goes_on(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And says so in one line, when it is started and when it is resumed."""
    monkeypatch.setattr("colonnade.cli.training.has_compiler", lambda: True)
    monkeypatch.setattr(run, "reason_not_compiled", lambda: "g++ is too old")
    out = tmp_path / "run"
    said = succeed("train", "--data", text, "--out", out, "--steps", 1, *COMPILED)
    line = "not compiled, for torch.compile does not work here: g++ is too old\n"
    assert said.stdout.count(line) == 1
    assert not RunSettings.load(out).compile
    settings = RunSettings(**{**vars(RunSettings.load(out)), "compile": True})
    settings.save(out)
    assert succeed("train", "--resume", "--out", out).stdout.count(line) == 1


def test_compiling_that_was_asked_for_is_refused(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "reason_not_compiled", lambda: "g++ is too old")
    out = tmp_path / "run"
    found = invoke("train", "--data", text, "--out", out, "--steps", 1, *COMPILED, "--compile")
    assert found.exit_code == 2
    assert found.stderr == (
        "colonnade: --compile does not work here: g++ is too old. Use --no-compile.\n"
    )
    assert not out.exists()


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--steps", 2], ["--minutes", 0.05]])
def test_a_run_that_fails_before_its_first_step_is_none(
    options: list[object], text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In an empty folder, and where another run was to be replaced."""

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    out = tmp_path / "run"
    train = ["train", "--data", text, "--out", out, *options, *SMALL]
    for overwrite in ([], ["--overwrite"]):
        with monkeypatch.context() as patch:
            patch.setattr(SparseTransformerModel, "forward", fail)
            assert isinstance(invoke(*train, *overwrite).exception, RuntimeError)
        assert not (out / SETTINGS_FILE).exists()
        assert invoke("train", "--resume", "--out", out).stderr.endswith("no run.json in it.\n")
        succeed(*train)
