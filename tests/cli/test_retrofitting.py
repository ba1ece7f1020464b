"""The command `retrofit` as a user calls it: a table, JSON, and mistakes in one line."""

from __future__ import annotations

import errno
import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import LlavaConfig

from colonnade.hf import load
from colonnade.train import retrofitting, run
from tests.cli.common import invoke, succeed
from tests.train.tuned import write_model, write_texts

pytestmark = [
    pytest.mark.plain,  # A user's process has no type checks either.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`"),  # Of peft.
]

SMALL = ["--seq-len", "64", "--stride", "16", "--summary", "4", "--eval-windows", "2", "--no-bf16"]
SMALL += ["--steps", "2", "--batch-size", "1"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    """Write a model and texts, and return the arguments that name them."""
    folder = tmp_path_factory.mktemp("inputs")
    return [write_model(folder / "model"), "--data", write_texts(folder / "texts")]


def test_a_table_of_what_was_measured_and_a_model(inputs: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = succeed("retrofit", *inputs, "--out", out, *SMALL, "--tune-dense").stdout
    bits = r" +\d\.\d{3} │"
    for name, steps in [("dense", 0), ("converted", 0), ("tuned", 2), ("dense, tuned as long", 2)]:
        assert re.search(rf"│ {name} +│ +{steps} │{bits * 3}", said), name
    assert "2 windows of 64 tokens" in said
    assert f"results.jsonl in {out}" in said.replace("\n", "")
    assert load(out).config.colonnade_sinks == 1
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert [line["steps"] for line in lines] == [0, 0, 2, 2]
    again = succeed("retrofit", "--out", out, "--resume", "--json")
    assert json.loads(again.stdout) == {"folder": str(out), "results": lines}


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (["--data", "nowhere"], "data must be a file or a folder; nowhere does not exist."),
        (["--summary", "17"], "summary must be in [1, stride]"),
        (["--layers", "0-9"], "layers must be in [0, 2), for the model has 2, got layers='0-9'."),
        (["--layers", "suggest"], "--budget is for --layers suggest, which needs it"),
        (["--full", "--lora", "8"], "--full goes without --lora, got both."),
        (["--minutes", "8"], "--steps goes without --minutes, got both."),
        (["--lora", "0"], "--lora must be at least 1, got --lora 0. Use --full to tune all"),
        (["--eval-share", "0"], "eval_share must be between 0 and 1, got eval_share=0.0."),
        (["--seq-len", "100"], "seq_len must be at most the model's max_position_embeddings=64"),
        (["--distill", "2"], "distill must be in [0, 1], got distill=2.0."),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_folder(
    options: list[str], rule: str, inputs: list[object], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = invoke("retrofit", *inputs, "--out", out, *SMALL, *options)
    assert result.exit_code == 2
    assert rule in result.output
    assert result.output.count("\n") == 1
    assert not out.exists()


def test_what_is_missing_is_named(inputs: list[object], tmp_path: Path) -> None:
    out = tmp_path / "out"
    mistakes: list[tuple[list[object], str]] = [
        ([], "retrofit needs MODEL and --data, or --resume."),
        (inputs[:1], "retrofit needs MODEL and --data, or --resume."),
        ([tmp_path / "no model", *inputs[1:]], f"there is no folder {tmp_path / 'no model'}."),
        (["--resume"], f"{out} holds no retrofit: there is no retrofit.json in it."),
        ([*inputs, "--resume"], "leave out MODEL, --data."),
    ]
    for arguments, rule in mistakes:
        result = invoke("retrofit", *arguments, "--out", out)
        assert result.exit_code == 2
        assert rule in result.output
        assert result.output.count("\n") == 1
    assert not out.exists()


def test_a_folder_with_something_in_it_is_refused(inputs: list[object], tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    result = invoke("retrofit", *inputs, "--out", tmp_path, *SMALL)
    assert result.exit_code == 2
    assert "the folder of a retrofit must be empty" in result.output
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte."),
    ],
)
def test_a_lack_of_memory_is_one_line(
    error: Exception, inputs: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(retrofitting, "run", fail)
    result = invoke("retrofit", *inputs, "--out", tmp_path / "out", *SMALL)
    assert result.exit_code == 2
    assert "out of memory. Start again in another folder with --recompute" in result.output
    assert result.output.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "rule", "code"),
    [
        (KeyboardInterrupt(), "interrupted. ", 130),
        (OSError(errno.ENOSPC, "No space left on device"), "no space is left on the disk.", 2),
        (SafetensorError("I/O error: No space left on device (os error 28)"), "no space is", 2),
    ],
)
@pytest.mark.parametrize("command", ["retrofit", "train"])
def test_what_the_world_does_to_a_run_is_one_line(
    command: str,
    error: BaseException,
    rule: str,
    code: int,
    inputs: list[object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(retrofitting, "run", fail)
    monkeypatch.setattr(run, "start", fail)
    out = tmp_path / "out"
    result = invoke(command, *((*inputs, *SMALL) if command == "retrofit" else ()), "--out", out)
    assert result.exit_code == code
    assert rule in result.output
    resuming = f"colonnade {command} --resume --out {out} goes on from the last checkpoint."
    assert resuming in result.output
    assert result.output.count("\n") == 1


def test_other_errors_of_a_run_keep_their_traceback(
    inputs: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("a mistake of ours")

    monkeypatch.setattr(retrofitting, "run", fail)
    result = invoke("retrofit", *inputs, "--out", tmp_path / "out", *SMALL)
    assert isinstance(result.exception, RuntimeError)


def test_models_of_more_than_text_and_empty_texts_are_refused(
    inputs: list[object], tmp_path: Path
) -> None:
    seeing = tmp_path / "seeing"
    LlavaConfig().save_pretrained(seeing)
    empty = tmp_path / "empty.txt"
    empty.touch()
    mistakes: list[tuple[list[object], str]] = [
        ([seeing, *inputs[1:]], f"of text alone, got {seeing} of type 'llava'."),
        ([inputs[0], "--data", empty], f"got {empty}, which is empty."),
        ([*inputs, "--eval-data", empty], f"got {empty}, which is empty."),
    ]
    for arguments, rule in mistakes:
        result = invoke("retrofit", *arguments, "--out", tmp_path / "out", *SMALL)
        assert result.exit_code == 2
        assert rule in result.output
        assert result.output.count("\n") == 1


def test_the_help_shows_an_example() -> None:
    said = succeed("retrofit", "--help").stdout
    assert "Example: colonnade retrofit models/smollm" in said
    assert len(said.splitlines()) < 60
