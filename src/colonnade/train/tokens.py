"""Texts as tokens of a model's tokenizer, in which each file is a document."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from colonnade.train.data import cut_documents, files_of

TRAIN, HELD_OUT = "train", "held-out"
"""The two splits of a `TokenCorpus`."""


class Tokens(NamedTuple):
    """A text as tokens.

    Attributes:
        ids: [tokens], the number of each token.
        num_bytes: [tokens], the number of bytes of UTF-8 that each token stands for: from where it
            begins to where the next one does. They add up to the bytes of the text, whatever a
            tokenizer makes of white space and of characters that several tokens share.
    """

    ids: NDArray[np.int32]
    num_bytes: NDArray[np.int32]


class TokenCorpus:
    """Texts laid end to end as tokens, some to train on and the others held out.

    It is read as a `Corpus` is, so `PackedWindows` takes it.

    Args:
        documents: The texts in order; empty ones are left out.
        num_train: Number of tokens, from the first on, that are for training.
        name: Name of the corpus in messages.
    """

    unit = "tokens"

    def __init__(self, documents: Iterable[Tokens], num_train: int, name: str) -> None:
        self.name = name
        kept = [each for each in documents if len(each.ids)]
        empty = np.empty(0, np.int32)
        self._ids = np.concatenate([empty, *(each.ids for each in kept)])
        self._num_bytes = np.concatenate([empty, *(each.num_bytes for each in kept)])
        self._ends = list(accumulate(len(each.ids) for each in kept))
        assert 0 <= num_train <= len(self)
        self._num_train = num_train

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, begin: int, end: int) -> NDArray[np.int32]:
        """Return the tokens begin … end - 1, across documents."""
        return self._ids[begin:end]

    def num_bytes(self, begin: int, end: int) -> NDArray[np.int32]:
        """Return how many bytes of text each of the tokens begin … end - 1 stands for."""
        return self._num_bytes[begin:end]

    def split(self, name: str) -> tuple[int, int]:
        """Return the first token of a split, and the token after its last.

        Raises:
            ValueError: An unknown split.
        """
        splits = {TRAIN: (0, self._num_train), HELD_OUT: (self._num_train, len(self))}
        if name not in splits:
            raise ValueError(f"split must be one of {list(splits)}, got split={name!r}.")
        return splits[name]

    def documents(self, begin: int, end: int) -> list[tuple[int, int]]:
        """Return the documents as (first token, token after the last), cut to begin … end - 1."""
        return cut_documents(self._ends, begin, end)

    def fingerprint(self) -> str:
        """Return a hash of the tokens, of where documents end, and of the split."""
        digest = hashlib.sha256(self._ids.tobytes())
        digest.update(np.array([*self._ends, self._num_train], np.int64).tobytes())
        return digest.hexdigest()


def open_tokens(
    tokenizer: PreTrainedTokenizerBase,
    data: Path,
    held_out: Path | None = None,
    held_out_share: float = 0.1,
) -> TokenCorpus:
    """Tokenize a file, or every file of a folder, each as a document.

    Args:
        tokenizer: A tokenizer that says where in the text each token lies.
        data: The text; a hidden file of a folder is left out.
        held_out: The text that is held out; if None, the last tokens of `data` are.
        held_out_share: Share of the tokens of `data` that is held out, without `held_out`.

    Raises:
        ValueError: A path is neither a file nor a folder, a text is empty, not UTF-8 or comes in
            both places, `held_out_share` lies outside (0, 1), or the tokenizer is a slow one.
        OSError: A file cannot be read.
    """
    if not 0 < held_out_share < 1:
        raise ValueError(
            f"held_out_share must be between 0 and 1, got held_out_share={held_out_share}."
        )
    files = files_of(data)
    others = [] if held_out is None else files_of(held_out)
    if both := sorted({f.resolve() for f in files} & {f.resolve() for f in others}):
        raise ValueError(
            f"no text may be trained on and held out, got {both[0]} in both {data} and {held_out}."
        )
    documents = [tokenize_file(tokenizer, file) for file in files]
    num_train = _num_tokens(documents, data)
    if held_out is None:
        num_train = round(num_train * (1 - held_out_share))
    else:
        apart = [tokenize_file(tokenizer, file) for file in others]
        _num_tokens(apart, held_out)
        documents += apart
    return TokenCorpus(documents, num_train, str(data))


def _num_tokens(documents: list[Tokens], path: Path) -> int:
    """Return the number of tokens in the documents of a path, and refuse one without any."""
    total = sum(len(each.ids) for each in documents)
    if not total:
        raise ValueError(f"a text must hold at least one token, got {path}, which is empty.")
    return total


def tokenize_file(tokenizer: PreTrainedTokenizerBase, file: Path) -> Tokens:
    """Tokenize the text of a file.

    Raises:
        ValueError: It is not UTF-8, or the tokenizer is a slow one.
        OSError: It cannot be read.
    """
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"a text must be UTF-8, got {file} with byte {error.object[error.start]:#x} at "
            f"{error.start}. Convert it, or leave it out."
        ) from None
    return tokenize(tokenizer, text)


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tokens:
    """Tokenize a text, without the special tokens that a tokenizer puts around it.

    Raises:
        ValueError: The tokenizer is a slow one, which does not say where a token lies.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            "bits per byte need a tokenizer that says where in the text a token lies (a fast one), "
            f"got a {type(tokenizer).__name__}. Convert it to the format of tokenizers."
        )
    # It warns of texts longer than the model's context, which are cut into rows here.
    found: Any = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True, verbose=False
    )
    places = np.array(found["offset_mapping"], np.int64).reshape(-1, 2)
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    of_characters = 1 + (codes >= 1 << 7) + (codes >= 1 << 11) + (codes >= 1 << 16)
    before = np.concatenate([np.zeros(1, np.int64), of_characters.cumsum(dtype=np.int64)])
    begins = np.concatenate([before[places[:, 0]], before[-1:]])
    begins[0] = 0  # What a tokenizer drops in front belongs to the first token.
    return Tokens(np.array(found["input_ids"], np.int32), np.diff(begins).astype(np.int32))
