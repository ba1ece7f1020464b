"""A slice of the fuzzing, and that it finds what is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from colonnade.backends import eager
from tests import fuzz

# What it draws is right by construction; the checks of types cost it half of its calls.
pytestmark = pytest.mark.plain


def test_a_few_hundred_drawn_calls(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.main(["--calls", "400", "--seed", "7"]) == 0, capsys.readouterr().out
    assert "400 distinct calls" in capsys.readouterr().out


def test_a_wrong_result_is_found_and_can_be_repeated(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A thousandth off in the output of one backend."""
    attend = eager.attend

    def wrong(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        out, lse = attend(*arguments)
        return out * 1.001, lse

    monkeypatch.setattr(eager, "attend", wrong)
    assert fuzz.main(["--calls", "60", "--seed", "7"]) == 1
    said = capsys.readouterr().out
    number = said.split("call ")[1].split(":")[0]
    assert fuzz.main(["--only", number, "--seed", "7"]) == 1
    again = capsys.readouterr().out
    assert again.splitlines()[1:3] == said.splitlines()[1:3]
