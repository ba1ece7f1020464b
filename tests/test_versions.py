"""The oldest releases that the package accepts are those that `make test-oldest` installs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def _found(pattern: str, file: str) -> str:
    found: list[str] = re.findall(pattern, (ROOT / file).read_text())
    assert len(found) == 1, (pattern, file)
    return found[0]


@pytest.mark.parametrize("package", ["torch", "transformers"])
def test_the_oldest_release_is_the_lower_bound(package: str) -> None:
    bound = _found(rf'"{package}>=([\d.]+)"', "pyproject.toml")
    assert _found(rf"(?m)^{package}==([\d.]+)$", "constraints-oldest.txt") == f"{bound}.0"


def test_make_and_the_readme_know_the_oldest_torch() -> None:
    bound = _found(r'"torch>=([\d.]+)"', "pyproject.toml")
    assert _found(r">= \((\d+, \d+)\)\n", "Makefile").replace(", ", ".") == bound
    assert _found(r"PyTorch ([\d.]+) or newer", "README.md") == bound
