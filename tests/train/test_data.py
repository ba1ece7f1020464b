"""The corpus of bytes: order, edges between files, splits, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from colonnade.train.data import Corpus, Windows, open_corpus, standard_library


def folder_of(tmp_path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path


def test_files_lie_end_to_end_in_the_order_of_their_paths(tmp_path: Path) -> None:
    folder = folder_of(
        tmp_path,
        {"b.txt": b"BB", "a/2.bin": b"\x00\xff", "a/1.bin": b"1", "c.empty": b"", ".hidden": b"no"},
    )
    corpus = open_corpus(folder)
    assert len(corpus) == 5
    assert corpus.read(0, 5).tobytes() == b"1\x00\xffBB"
    for begin in range(6):
        for end in range(begin, 6):
            assert corpus.read(begin, end).tobytes() == b"1\x00\xffBB"[begin:end]


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"a": b"text"})
    os.mkfifo(folder / "pipe")
    assert open_corpus(folder).read(0, 4).tobytes() == b"text"
    with pytest.raises(ValueError, match="is neither"):
        open_corpus(folder / "pipe")


def test_split_is_90_5_5_in_order(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(bytes(1000))
    corpus = open_corpus(file)
    assert [corpus.split(s) for s in ("train", "validation", "test")] == [
        (0, 900),
        (900, 950),
        (950, 1000),
    ]
    with pytest.raises(ValueError, match="split='tests'"):
        corpus.split("tests")


def test_what_is_no_data_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist"):
        open_corpus(tmp_path / "nothing")
    with pytest.raises(ValueError, match="empty"):
        open_corpus(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match="empty"):
        open_corpus(tmp_path / "empty")


def test_a_file_cut_short_while_in_use_raises(tmp_path: Path) -> None:
    """Reading the lost pages of a mapped file would kill the process."""
    file = tmp_path / "data"
    file.write_bytes(bytes(100_000))
    corpus = open_corpus(file)
    corpus.read(0, 10)
    file.write_bytes(b"short")
    with pytest.raises(ValueError, match="has become shorter"):
        corpus.read(90_000, 90_010)


def test_windows_depend_on_seed_and_number_alone(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(np.random.default_rng(0).bytes(2_000))
    corpus = open_corpus(file)
    few, many = Windows(corpus, "train", 64, 10, seed=3), Windows(corpus, "train", 64, 99, seed=3)
    other = Windows(corpus, "train", 64, 10, seed=4)
    text = file.read_bytes()[:1_800]
    for index in range(10):
        window = few[index]["input_ids"]
        assert window.shape == (64,)
        assert torch.equal(window, many[index]["input_ids"])
        assert bytes(window.tolist()) in text
    assert any(not torch.equal(few[i]["input_ids"], other[i]["input_ids"]) for i in range(10))


def test_every_place_is_drawn(tmp_path: Path) -> None:
    """The first and the last window of the split too."""
    corpus = Corpus([_counting_file(tmp_path)], "count")
    drawn = {int(Windows(corpus, "train", 88, 200, 0)[i]["input_ids"][0]) for i in range(200)}
    # Three places, 200 draws: the chance that one is never drawn is 3 · (2/3)^200 < 1e-34.
    assert drawn == {0, 1, 2}


def _counting_file(tmp_path: Path) -> Path:
    file = tmp_path / "count"
    file.write_bytes(bytes(range(100)))
    return file


def test_too_little_for_one_window_raises(tmp_path: Path) -> None:
    corpus = Corpus([_counting_file(tmp_path)], "count")
    with pytest.raises(ValueError, match=r"one context of 91 bytes, got 90 bytes of count"):
        Windows(corpus, "train", 91, 1, 0)


def test_the_standard_library_is_real_text() -> None:
    corpus = standard_library()
    assert len(corpus) > 5_000_000
    first = corpus.read(0, 100_000).tobytes()
    assert b"def " in first
    assert b"import " in first
