"""What `make gpu` says before it starts, where it cannot run. These tests need no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.gpu import needs

ROOT = Path(__file__).parents[2]
HAS_GPU = torch.cuda.is_available() or torch.xpu.is_available()


def _says(*options: str, **environment: str) -> tuple[int, str]:
    """Return the exit status of the check, and what it said on standard error."""
    command = [sys.executable, *options, needs.__file__]
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}
    )
    assert not done.stdout
    return done.returncode, done.stderr


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU here")
@pytest.mark.skipif(any(needs.lacking()), reason="packages are missing here")
def test_without_a_gpu_it_stops_in_one_line() -> None:
    assert _says() == (1, "colonnade: make gpu needs a GPU, and PyTorch sees none.\n")


def test_missing_packages_are_named_together() -> None:
    """Without the folder of packages, Python finds none of them."""
    status, said = _says("-S", PYTHONPATH="")
    assert status == 1
    assert said.count("\n") == 1
    assert f"needs {', '.join(needs.NEEDED)}. " in said


def test_an_old_package_is_named_with_both_releases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", {"pytest": "8.4.1"}.get)
    monkeypatch.setattr(needs, "NEEDED", {"pytest": "9", "torch": "", "no_such_package": "1"})
    assert list(needs.lacking()) == ["pytest 9 or newer (here it is 8.4.1)", "no_such_package"]


def test_what_takes_long_or_fails_later_is_said_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """But it stops nothing."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    said = "\n".join(needs.doubts())
    assert "neither gcc nor clang" in said
    assert "without pytest-xdist" in said


def test_what_is_collected_is_pinned() -> None:
    """Each by its name in constraints.txt, and none of the large ones."""
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().split("\n")}
    assert set(needs.SMALL) <= pinned
    assert not {"torch", "triton", "transformers", "numpy"} & set(needs.SMALL)
