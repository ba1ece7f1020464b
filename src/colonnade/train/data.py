"""Files as one memory-mapped sequence of bytes, its splits, and windows to train on."""

from __future__ import annotations

import platform
import sysconfig
from bisect import bisect_left, bisect_right
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

Bytes = NDArray[np.uint8]

SPLITS = {"train": (0.0, 0.90), "validation": (0.90, 0.95), "test": (0.95, 1.0)}
"""Shares of the bytes, in order: 90 / 5 / 5, which for enwik8 is the paper's split."""

IGNORED_LABEL = -100
"""Label that PyTorch's cross entropy ignores."""

_NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@runtime_checkable
class Readable(Protocol):
    """Documents that lie end to end, as bytes or as tokens, and are read by their places.

    Attributes:
        name: What it is called in messages.
        unit: What it consists of, in messages: "bytes" or "tokens".
    """

    name: str
    unit: str

    def __len__(self) -> int: ...

    def read(self, begin: int, end: int) -> NDArray[Any]:
        """Read the entries begin … end - 1."""
        ...

    def split(self, name: str) -> tuple[int, int]:
        """Return the first entry of a split, and the entry after its last."""
        ...

    def documents(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Return the documents as (first entry, entry after the last), cut to begin … end - 1."""
        ...


class Corpus:
    """Files laid end to end and read as bytes; a file is mapped into memory when it is read.

    Args:
        files: The files in order; empty ones are left out.
        name: Name of the corpus in messages.

    Raises:
        ValueError: The files do not hold a single byte.
        OSError: A file cannot be read.
    """

    unit = "bytes"

    def __init__(self, files: list[Path], name: str) -> None:
        self.name = name
        self._files = [(file, size) for file in files if (size := file.stat().st_size) > 0]
        self._ends = list(accumulate(size for _, size in self._files))
        if not self._files:
            raise ValueError(f"data must hold at least one byte, got {name}, which is empty.")
        self._map = lru_cache(maxsize=64)(lambda file: np.memmap(file, np.uint8, mode="r"))
        for file, _ in self._files:
            file.open("rb").close()  # Better to fail here than in the middle of a run.

    def __len__(self) -> int:
        return self._ends[-1]

    def read(self, begin: int, end: int) -> Bytes:
        """Read bytes begin … end - 1, across files."""
        assert 0 <= begin <= end <= len(self)
        first, last = bisect_right(self._ends, begin), bisect_left(self._ends, end)
        by_file = (self._read_file(index, begin, end) for index in range(first, last + 1))
        return np.concatenate([np.empty(0, np.uint8), *by_file])

    def split(self, name: str) -> tuple[int, int]:
        """Return the first byte of a split, and the byte after its last.

        Raises:
            ValueError: An unknown split.
        """
        if name not in SPLITS:
            raise ValueError(f"split must be one of {list(SPLITS)}, got split={name!r}.")
        begin, end = (round(share * len(self)) for share in SPLITS[name])
        return begin, end

    def documents(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Return the files as (first byte, byte after the last), cut to begin … end - 1."""
        return cut_documents(self._ends, begin, end)

    def _read_file(self, index: int, begin: int, end: int) -> Bytes:
        """Read what one file holds of bytes begin … end - 1 of the corpus."""
        file, size = self._files[index]
        # Reading a mapped page that the file no longer has would kill the process.
        if file.stat().st_size < size:
            raise ValueError(f"{file} has become shorter while it was in use.")
        before = self._ends[index] - size
        return self._map(file)[max(begin - before, 0) : min(end - before, size)]


def cut_documents(ends: list[int], begin: int, end: int) -> list[tuple[int, int]]:
    """Return the documents that end at `ends`, one after the other, cut to begin … end - 1."""
    begins = [0, *ends[:-1]]
    cut = ((max(b, begin), min(e, end)) for b, e in zip(begins, ends, strict=True))
    return [(b, e) for b, e in cut if b < e]


def open_corpus(path: Path) -> Corpus:
    """Open a file, or all files below a folder in the order of their paths.

    Raises:
        ValueError: The path does not exist, holds no byte, or is neither a file nor a folder.
    """
    return Corpus(files_of(path), str(path))


def files_of(path: Path) -> list[Path]:
    """Return a file, or all files below a folder in the order of their paths.

    Hidden files and folders (a dot in front) are left out, and links to folders are not followed.

    Raises:
        ValueError: The path does not exist, or is neither a file nor a folder.
    """
    if path.is_file():
        return [path]
    if path.is_dir():
        return [
            file
            for file in _files_below(path)
            if not any(name.startswith(".") for name in file.relative_to(path).parts)
        ]
    problem = "is neither" if path.exists() else "does not exist"
    raise ValueError(f"data must be a file or a folder; {path} {problem}.")


def standard_library() -> Corpus:
    """Open the source of Python's standard library without its tests: real text, always there.

    Raises:
        ValueError: This Python came without its source.
    """
    root = Path(sysconfig.get_path("stdlib"))
    sources = [
        file
        for file in _files_below(root)
        if file.suffix == ".py" and not _NOT_SOURCE & set(file.relative_to(root).parts[:-1])
    ]
    return Corpus(sources, f"the standard library of Python {platform.python_version()}")


def _files_below(folder: Path) -> list[Path]:
    """Return the regular files below a folder, sorted by their path from it."""
    # Opening a pipe or a socket could wait forever.
    return sorted(filter(Path.is_file, folder.rglob("*")), key=lambda file: file.parts)


class Windows(Dataset[dict[str, Tensor]]):
    """`num_windows` windows of `context` entries at random places of a split.

    Window i depends on the seed and i alone, so a resumed run sees what the unbroken run would.

    Raises:
        ValueError: The split is shorter than one window.
    """

    def __init__(
        self, corpus: Readable, split: str, context: int, num_windows: int, seed: int
    ) -> None:
        self.corpus = corpus
        self.begin, self.end = corpus.split(split)
        if self.end - self.begin < context:
            raise ValueError(
                f"the {split} split must hold at least one context of {context} {corpus.unit}, got "
                f"{self.end - self.begin} {corpus.unit} of {corpus.name} ({len(corpus)} "
                f"{corpus.unit})."
            )
        self.context = context
        self.num_windows = num_windows
        self.seed = seed

    def __len__(self) -> int:
        return self.num_windows

    def draw(self, index: int) -> int:
        """Draw the first entry of window `index`."""
        generator = np.random.default_rng((self.seed, index))
        return int(generator.integers(self.begin, self.end - self.context, endpoint=True))

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begin = self.draw(index)
        window = torch.from_numpy(self.corpus.read(begin, begin + self.context)).long()
        return {"input_ids": window, "labels": window}


class PackedWindows(Dataset[dict[str, Tensor]]):
    """`num_windows` windows of `context` entries, in which each file is a document.

    The files of a split are laid end to end in an order that depends on the seed, and windows are
    cut at random places, so every entry is equally likely. Positions restart at each document (and
    at the front of the window, which may cut one). The first entry of a document is no label, since
    it should not be predicted from the last entry of another. Nothing is padded.

    Raises:
        ValueError: The split is shorter than one window.
    """

    def __init__(
        self, corpus: Readable, split: str, context: int, num_windows: int, seed: int
    ) -> None:
        self._windows = Windows(corpus, split, context, num_windows, seed)
        begins, ends = (
            np.random.default_rng(seed).permutation(corpus.documents(*corpus.split(split))).T
        )
        self._ends = (ends - begins).cumsum()
        # Of each document the first entry and the end in the stream, and from there to the corpus.
        self._stream = np.stack([self._ends - (ends - begins), self._ends, ends - self._ends], 1)

    def __len__(self) -> int:
        return len(self._windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        begin = self._windows.draw(index) - self._windows.begin
        end = begin + self._windows.context
        first, last = self._ends.searchsorted([begin, end - 1], side="right")
        excerpts = [
            self._windows.corpus.read(shift + max(begin, start), shift + min(end, stop))
            for start, stop, shift in self._stream[first : last + 1].tolist()
        ]
        input_ids = torch.from_numpy(np.concatenate(excerpts)).long()
        position_ids = torch.cat([torch.arange(len(excerpt), device="cpu") for excerpt in excerpts])
        labels = input_ids.masked_fill(position_ids == 0, IGNORED_LABEL)
        return {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
