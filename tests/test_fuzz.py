"""A slice of the fuzzing, and that it finds what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from colonnade.backends import eager
from colonnade.hf import documents
from colonnade.hf.batch import Batch
from tests import fuzz

# What it draws is right by construction; the checks of types cost it half of its calls.
pytestmark = pytest.mark.plain


def test_a_few_hundred_drawn_calls(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--calls", "300", "--seed", "7"]) == 0, capsys.readouterr().out
    assert "call: 300 distinct" in capsys.readouterr().out


def test_a_backend_that_is_not_usable_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fuzz, "backends", lambda: {"eager": None, "triton": "needs a GPU"})
    with pytest.raises(SystemExit):
        fuzz.main(["--backend", "triton"])
    assert "backend 'triton' needs a GPU." in capsys.readouterr().err


def test_a_hundred_drawn_batches(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--calls", "0", "--batches", "100", "--seed", "7"]
    assert fuzz.main(arguments) == 0, capsys.readouterr().out
    assert "batch: 100 distinct" in capsys.readouterr().out


MISTAKES: dict[str, Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]] = {
    "out": lambda out, lse: (out * 1.001, lse),
    "lse": lambda out, lse: (out, None if lse is None else lse + 0.001),
    "grad": lambda out, lse: (out + 0.001 * (out - out.detach()), lse),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_result_is_found_and_can_be_repeated(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A thousandth off in one result of one backend."""
    attend = eager.attend

    def wrong(*arguments: Any) -> tuple[Tensor, Tensor | None]:
        return MISTAKES[name](*attend(*arguments))

    monkeypatch.setattr(eager, "attend", wrong)
    assert fuzz.main(["--calls", "60", "--seed", "7"]) == 1
    said = capsys.readouterr().out
    assert f"AssertionError: {name}" in said
    number = said.split("call ")[1].split(":")[0]
    assert fuzz.main(["--only", number, "--seed", "7"]) == 1
    again = capsys.readouterr().out
    assert again.splitlines()[1:3] == said.splitlines()[1:3]


FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {
    "positions that jump": (
        "_restarts",
        lambda positions, *_: torch.nn.functional.pad(positions.diff() != 1, (1, 0)),
    ),
    "documents behind a cache": ("behind_cache", lambda *_: Batch()),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_batch_that_is_misread_is_found(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(documents, *FAULTS[name])
    assert fuzz.main(["--calls", "0", "--batches", "30", "--seed", "7"]) == 1
    assert "batch " in capsys.readouterr().out
