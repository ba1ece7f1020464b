"""Continuing bytes: which windows are read, and that each new byte is that of its window."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import colonnade
from colonnade.train import sample
from colonnade.train.sample import continue_bytes, windows
from tests.hf.models import random_model


@pytest.mark.parametrize(
    ("prompt_len", "num_bytes", "limit", "expected"),
    [
        (3, 5, 8, [(3, 5)]),
        (3, 6, 8, [(3, 6)]),
        (3, 7, 8, [(3, 6), (4, 1)]),
        (8, 1, 8, [(8, 1)]),
        (8, 8, 8, [(8, 1), (4, 5), (4, 2)]),
        (9, 6, 8, [(4, 5), (4, 1)]),
        (1, 3, 1, [(1, 1), (1, 1), (1, 1)]),
        (5, 2, 1, [(1, 1), (1, 1)]),
    ],
)
def test_windows(
    prompt_len: int, num_bytes: int, limit: int, expected: list[tuple[int, int]]
) -> None:
    """The last byte of a window is written and not read."""
    assert list(windows(prompt_len, num_bytes, limit)) == expected


@pytest.mark.parametrize("prompt", [b"x", b"0123456789abcdefghijklm", bytes(range(40))])
@pytest.mark.plain
def test_every_byte_is_the_likeliest_after_its_window(prompt: bytes) -> None:
    model = random_model()
    written: list[bytes] = []
    report = continue_bytes(model, prompt, 60, written.append, do_sample=False)
    assert [len(each) for each in written] == [1] * 60
    text = list(prompt + b"".join(written))
    at = len(prompt)
    for read, new in windows(len(prompt), 60, 29):
        for index in range(at, at + new):
            window = torch.tensor([text[at - read : index]])
            assert int(model(window, use_cache=False).logits[0, -1].argmax()) == text[index]
        at += new
    assert at == len(text)
    assert report.seen == read + new - 1
    assert report.kept <= report.seen
    assert report.num_bytes == 60 - len(list(windows(len(prompt), 60, 29)))


@pytest.mark.slow
@pytest.mark.plain
def test_many_bytes_are_those_of_a_compiled_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one graph for all windows."""
    model = random_model().float()
    texts = []
    for compile_from in (61, 60):
        torch.compiler.reset()
        monkeypatch.setattr(sample, "COMPILE_FROM", compile_from)
        torch._dynamo.utils.counters.clear()
        written: list[bytes] = []
        report = continue_bytes(model, bytes(range(40)), 60, written.append, do_sample=False)
        texts.append(b"".join(written))
    assert texts[0] == texts[1]
    assert report.num_bytes == 60 - len(list(windows(40, 60, 29)))
    # The other one tries out whether a compiler works.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert not torch._dynamo.utils.counters["graph_break"]


def test_the_help_says_from_when_on() -> None:
    text = (Path(colonnade.__file__).parent / "cli" / "sampling.py").read_text()
    assert re.search(rf"For {sample.COMPILE_FROM:,} bytes and more", text)
