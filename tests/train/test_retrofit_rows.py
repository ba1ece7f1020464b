"""The rows of benchmarks/retrofitting.py: what is compared with what, and what is refused."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.hf.models import dense_model

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "retrofitting.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("retrofitting_rows", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(what: str, windows: int, bits: float, text: str = "a") -> dict[str, Any]:
    score = {"tokens": 64, "windows": windows, "bytes": 60 * windows}
    return {
        "what": what,
        "layers": "all",
        "tuning": None,
        "sources": {"text": text},
        "score": {**score, "bits_per_byte": bits, "second_half": bits},
        "cache": {"64": {"share": 1}},
    }


def test_rows_are_compared_with_dense_ones_of_the_same_windows(script: ModuleType) -> None:
    dense = [row("dense", 2, 1.0), row("dense", 4, 2.0), row("dense", 2, 3.0, "b")]
    rows = [row("full", 2, 1.5), row("full", 8, 1.5), row("full", 2, 1.5, "b")]
    cells = [line.split(" | ")[6] for line in script.table(dense + rows).splitlines()[-3:]]
    assert cells == ["1.500", "", "0.500"]


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        (["row", "tuned"], "--run goes with tuned and dense-tuned, which need it, got tuned"),
        (["row", "full", "--suggest", "0.3"], "--suggest goes with suggest"),
        (["row", "suggest"], "--suggest goes with suggest, which needs it"),
        (["row", "dense", "--layers", "1"], "--layers goes with a conversion, got dense"),
        (["table", "--results", "nowhere.jsonl"], "there are no results in nowhere.jsonl"),
    ],
)
def test_what_would_be_ignored_or_is_missing_is_refused(
    arguments: list[str],
    rule: str,
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = ["--folder", "nowhere"] if arguments[0] == "row" else []
    monkeypatch.setattr(sys, "argv", ["retrofitting.py", *arguments, *folder])
    with pytest.raises(SystemExit):
        script.main()
    assert rule in capsys.readouterr().err


def test_the_bytes_of_a_cache_are_those_of_the_saved_type(script: ModuleType) -> None:
    model = dense_model("llama")
    half, whole = (script.cache_of(model, 64, d) for d in (torch.bfloat16, torch.float32))
    assert 2 * half["bytes"] == whole["bytes"]
