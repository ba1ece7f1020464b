"""Any file or folder as one run of bytes, memory-mapped; its split; windows to train on."""

from __future__ import annotations

import os
import platform
import sysconfig
from bisect import bisect_right
from collections.abc import Iterator
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

Bytes = NDArray[np.uint8]

SPLITS = {"train": (0.0, 0.90), "validation": (0.90, 0.95), "test": (0.95, 1.0)}
"""Shares of the bytes, in order: 90 / 5 / 5, which for enwik8 is the paper's split."""

IGNORED_LABEL = -100
"""What PyTorch's cross entropy leaves out."""

_NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


class Corpus:
    """Files laid end to end, read as bytes; only what is asked for is mapped into memory.

    Args:
        files: The files, in order; empty ones are left out.
        name: What the corpus is called in messages.

    Raises:
        ValueError: There is not a single byte.
        OSError: A file cannot be read.
    """

    def __init__(self, files: list[Path], name: str) -> None:
        sizes = [(file, file.stat().st_size) for file in files]
        self.name = name
        self._files = [(file, size) for file, size in sizes if size > 0]
        self._ends = list(accumulate(size for _, size in self._files))
        if not self._files:
            raise ValueError(f"data must hold at least one byte, got {name}, which is empty.")
        self._map = lru_cache(maxsize=64)(self._open)
        for index in range(len(self._files)):
            with self._files[index][0].open("rb"):
                pass  # An unreadable file should be known now, not in the middle of a run.

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, begin: int, end: int) -> Bytes:
        """Bytes begin … end - 1, across files."""
        assert 0 <= begin <= end <= len(self)
        return np.concatenate([np.empty(0, np.uint8), *self._pieces(begin, end)])

    def split(self, name: str) -> tuple[int, int]:
        """First byte of a split, and the byte after its last.

        Raises:
            ValueError: An unknown split.
        """
        if name not in SPLITS:
            raise ValueError(f"split must be one of {list(SPLITS)}, got split={name!r}.")
        begin, end = (round(share * len(self)) for share in SPLITS[name])
        return begin, end

    def documents(self, begin: int, end: int) -> list[tuple[int, int]]:
        """The files, as (first byte, byte after the last), cut to begin … end - 1."""
        begins = [0, *self._ends[:-1]]
        cut = ((max(b, begin), min(e, end)) for b, e in zip(begins, self._ends, strict=True))
        return [(b, e) for b, e in cut if b < e]

    def _pieces(self, begin: int, end: int) -> Iterator[Bytes]:
        while begin < end:
            index = bisect_right(self._ends, begin)
            file_begin = self._ends[index] - self._files[index][1]
            stop = min(end, self._ends[index])
            yield self._checked(index)[begin - file_begin : stop - file_begin]
            begin = stop

    def _checked(self, index: int) -> Bytes:
        # Reading a mapped page that the file no longer has would kill the process.
        file, size = self._files[index]
        if file.stat().st_size < size:
            raise ValueError(f"{file} has become shorter while it was in use.")
        return self._map(index)

    def _open(self, index: int) -> Bytes:
        return np.memmap(self._files[index][0], dtype=np.uint8, mode="r")


def open_corpus(path: Path) -> Corpus:
    """A file, or all files below a folder in the order of their paths.

    Hidden files and folders (a dot in front) are left out, and links to folders are not followed.

    Raises:
        ValueError: Nothing there, nothing in it, or neither a file nor a folder.
    """
    if path.is_file():
        return Corpus([path], str(path))
    if path.is_dir():
        return Corpus(_files_below(path, hidden=False), str(path))
    problem = "is neither" if path.exists() else "does not exist"
    raise ValueError(f"data must be a file or a folder; {path} {problem}.")


def standard_library() -> Corpus:
    """The Python standard library's own source text, without its tests: real text, always there.

    Raises:
        ValueError: This Python came without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sources = [
        file
        for file in _files_below(root, hidden=True)
        if file.suffix == ".py" and not _NOT_SOURCE & set(file.relative_to(root).parts[:-1])
    ]
    return Corpus(sources, f"the standard library of Python {platform.python_version()}")


def _files_below(folder: Path, hidden: bool) -> list[Path]:
    """Regular files below a folder, sorted by their path from it."""
    found = []
    for place, folders, files in os.walk(folder):
        if not hidden:
            folders[:] = [name for name in folders if not name.startswith(".")]
            files = [name for name in files if not name.startswith(".")]
        found += [Path(place, name) for name in files]
    # A pipe or a socket would be waited for until the end of days.
    return sorted(
        (file for file in found if file.is_file()), key=lambda f: f.relative_to(folder).parts
    )


class Windows(Dataset[dict[str, Tensor]]):
    """`num_windows` windows of `context` bytes at random places of a split.

    Window i depends on the seed and i alone, so a run that is resumed sees what it would have seen.

    Raises:
        ValueError: The split is shorter than one window.
    """

    def __init__(
        self, corpus: Corpus, split: str, context: int, num_windows: int, seed: int
    ) -> None:
        self.corpus = corpus
        self.begin, self.end = corpus.split(split)
        if self.end - self.begin < context:
            raise ValueError(
                f"the {split} split must hold at least one context of {context} bytes, "
                f"got {self.end - self.begin} bytes of {corpus.name} ({len(corpus)} bytes)."
            )
        self.context = context
        self.num_windows = num_windows
        self.seed = seed

    def __len__(self) -> int:
        return self.num_windows

    def draw(self, index: int) -> int:
        """Where window `index` begins."""
        draw = np.random.default_rng((self.seed, index))
        return int(draw.integers(self.begin, self.end - self.context + 1))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begin = self.draw(index)
        window = torch.from_numpy(self.corpus.read(begin, begin + self.context)).long()
        return {"input_ids": window, "labels": window}


class PackedWindows(Dataset[dict[str, Tensor]]):
    """`num_windows` windows of `context` bytes, each file in them a document of its own.

    The files of a split are laid end to end in an order that depends on the seed, and windows are
    cut at random places, so every byte is equally likely. Positions restart at each document (and
    at the front of the window, which may cut one), and no document's first byte is a label: it is
    not to be predicted from another's last. Nothing is padded.

    Raises:
        ValueError: The split is shorter than one window.
    """

    def __init__(
        self, corpus: Corpus, split: str, context: int, num_windows: int, seed: int
    ) -> None:
        self._windows = Windows(corpus, split, context, num_windows, seed)
        documents = np.array(corpus.documents(*corpus.split(split)))
        self._documents = np.random.default_rng(seed).permutation(documents)
        self._ends = (self._documents[:, 1] - self._documents[:, 0]).cumsum()

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        corpus, context = self._windows.corpus, self._windows.context
        begin = self._windows.draw(index) - self._windows.begin
        document = int(self._ends.searchsorted(begin, side="right"))
        pieces = []
        missing = context
        while missing > 0:
            _, end = self._documents[document]
            first = int(end - (self._ends[document] - begin))
            piece = corpus.read(first, min(int(end), first + missing))
            pieces.append(piece)
            missing -= len(piece)
            begin += len(piece)
            document += 1
        input_ids = torch.from_numpy(np.concatenate(pieces)).long()
        position_ids = torch.cat([torch.arange(len(piece)) for piece in pieces])
        labels = input_ids.masked_fill(position_ids == 0, IGNORED_LABEL)
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
