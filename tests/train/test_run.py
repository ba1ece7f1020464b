"""Settings of a run on disk, its folder, and the checkpoint that it resumes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from colonnade.train.folder import last_checkpoint, prepare_folder
from colonnade.train.settings import SETTINGS_FILE, RunSettings


def checkpoint(folder: Path, step: int | str, state: str | None) -> Path:
    path = folder / f"checkpoint-{step}"
    path.mkdir()
    if state is not None:
        (path / "trainer_state.json").write_text(state)
    return path


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    checkpoint(tmp_path, 4, "{}")
    whole = checkpoint(tmp_path, 12, "{}")
    checkpoint(tmp_path, 100, None)
    checkpoint(tmp_path, 104, '{"log_history": [')
    checkpoint(tmp_path, "best", "{}")
    assert last_checkpoint(tmp_path) == whole


def test_without_a_whole_checkpoint_there_is_nothing_to_resume(tmp_path: Path) -> None:
    checkpoint(tmp_path, 100, None)
    with pytest.raises(ValueError, match="holds no checkpoint to resume from"):
        last_checkpoint(tmp_path)


def test_settings_survive_the_disk(tmp_path: Path) -> None:
    settings = RunSettings(data="text", num_bytes=5, steps=7, optimizer="muon", bf16=True)
    settings.save(tmp_path)
    assert RunSettings.load(tmp_path) == settings


@pytest.mark.parametrize("content", ["", "{", '{"stepz": 1}', "[1]"])
def test_damaged_settings_are_named(tmp_path: Path, content: str) -> None:
    (tmp_path / SETTINGS_FILE).write_text(content)
    with pytest.raises(ValueError, match=r"run\.json is damaged"):
        RunSettings.load(tmp_path)


def test_data_of_another_length_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(100))
    settings = RunSettings(data=str(file), num_bytes=100)
    assert len(settings.corpus()) == 100
    file.write_bytes(bytes(101))
    with pytest.raises(ValueError, match="has 101 bytes, but the run was started on 100"):
        settings.corpus()


def test_overwriting_removes_what_the_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    RunSettings().save(tmp_path)
    old = checkpoint(tmp_path, 4, "{}")
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="--overwrite replaces it"):
        prepare_folder(tmp_path, overwrite=False)
    assert old.exists()
    prepare_folder(tmp_path, overwrite=True)
    assert not old.exists()
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "notes.txt").read_text() == "mine"
