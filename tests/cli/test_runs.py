"""Training, evaluating and sampling end to end on a small real file.

What may die runs in a process of its own.
"""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from colonnade.train.data import standard_library
from colonnade.train.settings import RunSettings
from tests.cli.common import (
    COMMAND,
    ENVIRONMENT,
    PICTURES,
    SMALL,
    colonnade_process,
    invoke,
    succeed,
)

pytestmark = pytest.mark.plain  # A user's process has no type checks either.


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 30,000 bytes of real source text."""
    file = tmp_path_factory.mktemp("data") / "text.py"
    file.write_bytes(standard_library().read(0, 30_000).tobytes())
    return file


@pytest.fixture(scope="module")
def run(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a run of 20 steps to its end."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    succeed("train", "--data", text, "--out", folder, "--steps", 20, *SMALL)
    return folder


def losses(folder: Path, step: int) -> list[tuple[int, float]]:
    state = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return [(e["step"], e["loss"]) for e in state["log_history"] if "loss" in e]


@pytest.mark.parametrize("ranks", ["2", "16"])
def test_one_of_several_ranks_is_refused_in_one_line(
    ranks: str, text: Path, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", ranks)
    new = ["--data", text, "--out", tmp_path / "new", "--steps", 5, *SMALL]
    for arguments in (new, ["--out", run, "--resume"]):
        result = invoke("train", *arguments)
        assert result.exit_code == 2
        assert f"got WORLD_SIZE={ranks}" in result.output
        assert result.output.count("\n") == 1
    assert not (tmp_path / "new").exists()


def test_a_run_leaves_model_tokenizer_checkpoints_and_curve(run: Path) -> None:
    names = {path.name for path in run.iterdir()}
    assert {"model.safetensors", "tokenizer.json", "checkpoint-20", "run.json"} <= names
    assert (run / "loss.png").read_bytes().startswith(PICTURES[".png"])
    assert json.loads((run / "config.json").read_text())["use_cache"] is True
    first, last = losses(run, 20)[0], losses(run, 20)[-1]
    assert first == (1, pytest.approx(5.545, abs=1e-3))  # 8 bits
    assert last[1] < 4.5


def test_resuming_gives_the_losses_of_an_unbroken_run(
    run: Path, text: Path, tmp_path: Path
) -> None:
    """Killed after a checkpoint, in the middle of the next steps."""
    broken = tmp_path / "broken"
    process = subprocess.Popen(
        [*COMMAND, "train", "--data", text, "--out", broken, "--steps", "20", *SMALL],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=ENVIRONMENT,
    )
    seen = b""
    assert isinstance(process.stdout, io.BufferedReader)
    # A checkpoint is written every 4 steps; the 9th step's log comes after the second.
    while seen.count(b"bits_per_byte") < 9:
        piece = process.stdout.read1(4096)
        assert piece, seen.decode()
        seen += piece
    process.kill()
    process.wait()
    process.stdout.close()
    assert not (broken / "model.safetensors").exists()
    assert "resuming from" in colonnade_process("train", "--out", broken, "--resume")
    assert losses(broken, 20) == losses(run, 20)
    assert (broken / "model.safetensors").read_bytes() == (run / "model.safetensors").read_bytes()


def test_minutes_are_turned_into_steps(text: Path, tmp_path: Path) -> None:
    """With the other choices a user has: bfloat16, recomputation, AdamW."""
    out = tmp_path / "run"
    said = succeed(
        *("train", "--data", text, "--out", out, "--minutes", 0.05, *SMALL),
        *("--bf16", "--recompute", "--optimizer", "adamw"),
    )
    steps = json.loads((out / "run.json").read_text())["steps"]
    assert steps >= 1
    assert f"ms a step: {steps} steps fill the 0.05 minutes" in said.stdout
    assert losses(out, steps)[-1][0] <= steps


def test_a_folder_of_files_trains_packed(text: Path, tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(60):
        part = text.read_bytes()[300 * number :][: 40 + 5 * number]
        (folder / f"{number}.txt").write_bytes(part)
    for name, choice in {"fixed": ["--scheme", "interleaved"], "strided": []}.items():
        run = tmp_path / name
        options = ["--pattern", name, *choice, *SMALL]
        succeed("train", "--data", folder, "--pack", "--out", run, "--steps", 2, *options)
        config = json.loads((run / "config.json").read_text())
        assert config["scheme"] == (choice[-1] if choice else "merged")
        assert config["pattern"] == name
        assert RunSettings.load(run).pack


@pytest.mark.parametrize(
    "choice",
    [
        ["--sinks", "2", "--scheme", "multihead"],
        ["--pattern", "strided", "--scheme", "interleaved"],
        ["--pattern", "local", "--pack"],
        ["--pattern", "full"],
    ],
    ids=" ".join,
)
def test_any_pattern_and_scheme_trains_evaluates_and_samples(
    choice: list[str], text: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    succeed("train", "--data", text, "--out", out, "--steps", 1, *SMALL, *choice)
    config = json.loads((out / "config.json").read_text())
    assert config["pattern"] == (choice[1] if choice[0] == "--pattern" else "fixed")
    assert config["scheme"] == (choice[-1] if "--scheme" in choice else "merged")
    assert config["sinks"] == (2 if "--sinks" in choice else 0)
    assert RunSettings.load(out).pack == ("--pack" in choice)
    got = json.loads(succeed("eval", out, "--json", "--max-bytes", 300).stdout)
    assert got["bytes"] == 300
    assert 4 < got["bits_per_byte"]["model, min context 64"] < 12
    assert len(succeed("sample", out, "--prompt", "def ", "--bytes", 40).stdout_bytes) == 45


def test_eval_prints_the_model_beside_tables_and_compressors(run: Path) -> None:
    table = succeed("eval", run).stdout
    for name in ("model, min context 64", "order-2 table", "gzip -9", "xz -9"):
        assert name in table
    out = succeed("eval", run, "--json", "--min-context", 100, "--max-bytes", 700)
    got = json.loads(out.stdout)
    assert got["bytes"] == 700
    bits = got["bits_per_byte"]
    assert 1 < bits["model, min context 100"] < 8
    assert bits["order-2 table of the training bytes"] > 0


def test_eval_of_other_bytes(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.write_bytes(b"x")
    got = json.loads(succeed("eval", run, "--data", other, "--json").stdout)
    assert got["bytes"] == 1
    assert got["bits_per_byte"]["model, min context 64"] == 8.0


def test_sample_continues_a_prompt(run: Path) -> None:
    prompt = bytes([0xFF, 0x00]) + b"def "
    arguments = ("sample", run, "--prompt-file", "-", "--bytes", 50, "--seed", 3)
    first, second = (succeed(*arguments, stdin=prompt).stdout_bytes for _ in range(2))
    assert first == second
    assert first.startswith(prompt)
    assert len(first) == len(prompt) + 50 + 1
    greedy = succeed("sample", run, "--prompt", "é", "--bytes", 5, "--temperature", 0)
    assert len(greedy.stdout_bytes) == 2 + 5 + 1
    # One of the five is there when the prompt is read, and the last is not put into the cache.
    assert re.search(
        r"[\d,]+ bytes a second, after .* kept \d+ entries a head of 6 positions", greedy.stderr
    )
    assert "positions:" not in greedy.stderr


def test_sample_goes_on_past_the_last_position(run: Path) -> None:
    """Both a prompt that is too long and bytes that do not fit; it says what it reads."""
    prompt = bytes(range(200))
    found = succeed("sample", run, "--prompt-file", "-", "--bytes", 300, stdin=prompt)
    assert found.stdout_bytes.startswith(prompt)
    assert len(found.stdout_bytes) == 200 + 300 + 1
    assert "of the 200 bytes of the prompt it reads the last 64" in found.stderr
    assert "whenever they are used up, it continues from the last 64 bytes" in found.stderr


def test_sample_writes_each_byte_when_it_is_drawn(run: Path) -> None:
    """A reader gets the first one while the last is not there yet, and may leave."""
    command = [sys.executable, "-m", "colonnade.cli", "sample", str(run), "--bytes", "19000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        assert len(process.stdout.read(300)) == 300
        assert process.poll() is None
        process.stdout.close()
        assert process.wait(timeout=60) != 0


def mistakes(run: Path, text: Path, tmp_path: Path) -> dict[str, tuple[list[object], str]]:
    """Return mistakes of a user, and the words that the one line has to contain."""
    empty, file, small = tmp_path / "empty", tmp_path / "file", tmp_path / "small"
    empty.touch()
    file.write_text("in the way")
    small.write_bytes(b"too little")
    other = tmp_path / "other"
    other.mkdir()
    (other / "run.json").write_text((run / "run.json").read_text())
    (other / "config.json").write_text('{"model_type": "gpt2"}')
    (other / "model.safetensors").touch()
    started = tmp_path / "started"
    started.mkdir()
    (started / "run.json").write_text((run / "run.json").read_text())
    new = ["train", "--data", text, "--steps", 1, "--out", tmp_path / "new"]
    return {
        "no such file": (["train", "--data", "nothing", "--out", tmp_path / "new"], "nothing"),
        "empty file": (["train", "--data", empty, "--out", tmp_path / "new"], "empty"),
        "too little data": (["train", "--data", small, "--out", tmp_path / "new"], "1024 bytes"),
        "stride 0": ([*new, "--stride", 0], "stride must be at least 1, got stride=0"),
        "summary > stride": ([*new, "--summary", 65], "summary=65 and stride=64"),
        "heads": ([*new, "--heads", 3], "embed_dim=128 and num_heads=3"),
        "pattern": ([*new, "--pattern", "dilated"], "pattern='dilated'"),
        "scheme": ([*new, "--scheme", "mixed"], "scheme='mixed'"),
        "no factors": ([*new, "--pattern", "local", "--scheme", "multihead"], "without factors"),
        "no head for each": (
            [*new, "--scheme", "multihead", "--heads", 1],
            "len(pattern)=2 and num_kv_heads=1",
        ),
        "preset": ([*new, "--preset", "enwik9"], "preset='enwik9'"),
        "optimizer": ([*new, "--optimizer", "sgd"], "optimizer='sgd'"),
        "steps": ([*new, "--steps", 0], "steps=0"),
        "minutes": ([*new, "--minutes", "nan"], "minutes=nan"),
        "learning rate": ([*new, "--learning-rate", -1], "learning_rate=-1"),
        "out is a file": ([*new, "--out", file], "file"),
        "out cannot be made": ([*new, "--out", file / "run"], "file/run"),
        "run in the way": ([*new, "--out", run], "--overwrite"),
        "resume nothing": (["train", "--resume", "--out", tmp_path / "no"], "holds no run"),
        "resume too early": (["train", "--resume", "--out", started], "no checkpoint"),
        "resume and more": (["train", "--resume", "--out", run, "--seed", 1], "leave out --seed"),
        "eval no run": (["eval", tmp_path / "no"], "holds no run"),
        "eval other model": (["eval", other], "'gpt2'"),
        "min context": (["eval", run, "--min-context", 128], "min_context=128 and context=128"),
        "split": (["eval", run, "--split", "tests"], "split='tests'"),
        "sample other model": (["sample", other], "'gpt2'"),
        "sample nothing": (["sample", run, "--bytes", 0], "bytes=0"),
        "empty prompt": (["sample", run, "--prompt", ""], "at least one byte"),
        "two prompts": (["sample", run, "--prompt", "a", "--prompt-file", file], "not both"),
        "no prompt file": (["sample", run, "--prompt-file", "nothing"], "nothing"),
        "temperature": (["sample", run, "--temperature", -1], "temperature=-1"),
        "no temperature": (["sample", run, "--temperature", "nan"], "temperature=nan"),
        "context of 1": ([*new, "--context", 1], "context must be at least 2"),
        "seed too large": ([*new, "--seed", 2**32], f"below 2**32, got seed={2**32}"),
        "show stride 0": (["show", "--stride", 0], "stride=0"),
        "show part": (["show", "--part", "all"], "part='all'"),
        "show row": (["show", "--row", 32], "row=32 and seq_len=32"),
        "show to nowhere": (["show", "--out", file / "x.png"], "x.png"),
        "show to .xyz": (["show", "--out", tmp_path / "x.xyz"], "xyz"),
        "cost length": (["cost", "--length", 0], "length must be at least 1, got length=0"),
        "cost stride": (["cost", "--stride", 0], "stride=0"),
        "cost summary": (["cost", "--summary", 129], "summary=129 and stride=128"),
        "cost subblocks": (["cost", "--subblocks", 17], "subblocks=17"),
        "cost window": (["cost", "--window", 0], "window=0"),
        "cost heads": (["cost", "--heads", 3], "width=512 and heads=3; width=513 would be"),
        "cost kv heads": (["cost", "--kv-heads", 3], "heads=8 and kv_heads=3"),
        "cost widths": (["cost", "--qk-width", 4], "qk_width=4 and heads=8"),
        "cost layers": (["cost", "--layers", 0], "layers=0"),
        "cost dtype": (["cost", "--dtype", "int8"], "dtype='int8'"),
        "flex backward": (["bench", "--flex", "--backward"], "leave out --flex or --backward"),
        "no such option": (["show", "--strid", 4], "--strid"),
    }


def test_mistakes_get_one_line_and_exit_code_2(
    run: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    before = sorted(run.iterdir())
    for name, (arguments, expected) in mistakes(run, text, tmp_path).items():
        result = invoke(*arguments)
        assert result.exit_code == 2, (name, result.exception)
        assert expected in result.stderr, (name, result.stderr)
        assert result.stdout == "", name
        if name != "no such option":  # Framed by typer.
            assert result.stderr.startswith("colonnade: "), (name, result.stderr)
            assert result.stderr.count("\n") == 1, (name, result.stderr)
    assert not (tmp_path / "new").exists()
    assert sorted(run.iterdir()) == before
