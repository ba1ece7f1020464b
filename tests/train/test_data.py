"""The corpus of bytes: order, edges between files, splits, and what it refuses."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from colonnade.train.data import (
    IGNORED_LABEL,
    Corpus,
    PackedWindows,
    Windows,
    open_corpus,
    standard_library,
)


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


def test_documents_are_the_files_cut_to_a_range(tmp_path: Path) -> None:
    files = {"a": b"aaa", "b": b"", "c": b"cc", "d": b"dddd"}
    corpus = open_corpus(folder_of(tmp_path, files))
    assert corpus.documents(0, 9) == [(0, 3), (3, 5), (5, 9)]
    assert corpus.documents(2, 6) == [(2, 3), (3, 5), (5, 6)]
    assert corpus.documents(3, 3) == []


def _packed(tmp_path: Path, num_windows: int = 400) -> PackedWindows:
    """25 files of 1 to 25 bytes, all bytes of a file alike; 292 of them train."""
    files = {f"{n:02}": bytes([n]) * n for n in range(1, 26)}
    return PackedWindows(open_corpus(folder_of(tmp_path, files)), "train", 40, num_windows, seed=3)


def test_packed_windows_hold_documents_whose_positions_restart(tmp_path: Path) -> None:
    """A run of equal bytes is one file, and is counted from its start or from the window's."""
    seen = set()
    packed = _packed(tmp_path)
    for window in (packed[i] for i in range(400)):
        ids, positions = window["input_ids"].tolist(), window["position_ids"].tolist()
        assert len(ids) == 40
        begins = [t for t in range(40) if t == 0 or ids[t] != ids[t - 1]]
        for begin, end in zip(begins, [*begins[1:], 40], strict=True):
            assert positions[begin:end] == list(range(end - begin))
            whole = begin > 0 and end < 40
            if whole and ids[begin] != 24:  # The split cuts file 24.
                assert end - begin == ids[begin]
        seen.update(ids)
    assert seen == set(range(1, 25))


def test_no_documents_first_byte_is_a_label(tmp_path: Path) -> None:
    packed = _packed(tmp_path)
    for window in (packed[i] for i in range(50)):
        first = window["position_ids"] == 0
        assert (window["labels"][first] == IGNORED_LABEL).all()
        assert torch.equal(window["labels"][~first], window["input_ids"][~first])


def test_a_packed_window_depends_on_seed_and_number_alone(tmp_path: Path) -> None:
    short, long = _packed(tmp_path, 5), _packed(tmp_path, 400)
    for i in range(5):
        assert all(torch.equal(short[i][name], long[i][name]) for name in short[i])
    assert not torch.equal(long[0]["input_ids"], long[1]["input_ids"])
