"""Texts as tokens: how many bytes each stands for, and which are held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from colonnade.hf import byte_tokenizer
from colonnade.train.data import IGNORED_LABEL, PackedWindows
from colonnade.train.tokens import HELD_OUT, TRAIN, TokenCorpus, Tokens, open_tokens, tokenize
from tests.train.tuned import write_texts

TEXT = "  Café, naïve: two  spaces,\n\nan emoji 😀😀 and 日本語.\r\n "


def small_tokenizer(drops_space: bool) -> PreTrainedTokenizerFast:
    """Return a tokenizer of several bytes a token, byte by byte or one that drops white space."""
    tokenizer = Tokenizer(models.BPE(unk_token="?"))
    space = pre_tokenizers.Whitespace() if drops_space else pre_tokenizers.ByteLevel()
    tokenizer.pre_tokenizer = space
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=["?"], show_progress=False)
    tokenizer.train_from_iterator([TEXT * 3, "plain words and more plain words"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize("text", [TEXT, "", "é", "plain"])
@pytest.mark.parametrize("kind", ["bytes", "pieces", "words"])
def test_the_tokens_bytes_add_up_to_the_text(kind: str, text: str) -> None:
    tokenizer = byte_tokenizer() if kind == "bytes" else small_tokenizer(kind == "words")
    tokens = tokenize(tokenizer, text)
    assert tokens.num_bytes.sum() == len(text.encode())
    assert tokens.num_bytes.min(initial=0) >= 0
    assert tokens.ids.shape == tokens.num_bytes.shape
    if kind == "bytes":
        assert bytes(tokens.ids.tolist()) == text.encode()


def corpus_of(*lengths: int, num_train: int) -> TokenCorpus:
    ids = iter(range(sum(lengths)))
    documents = [np.array([next(ids) for _ in range(n)], np.int32) for n in lengths]
    return TokenCorpus([Tokens(d, d * 0 + 2) for d in documents], num_train, "numbers")


def test_documents_and_splits_are_read_by_their_places() -> None:
    corpus = corpus_of(4, 0, 3, 5, num_train=9)
    assert len(corpus) == 12
    assert corpus.split(TRAIN) == (0, 9)
    assert corpus.split(HELD_OUT) == (9, 12)
    assert corpus.documents(0, 9) == [(0, 4), (4, 7), (7, 9)]
    assert corpus.documents(9, 12) == [(9, 12)]
    assert corpus.read(3, 8).tolist() == [3, 4, 5, 6, 7]
    assert corpus.num_bytes(3, 8).tolist() == [2] * 5
    with pytest.raises(ValueError, match=r"split must be one of .*got split='test'"):
        corpus.split("test")


def test_packed_windows_of_tokens_restart_at_each_document() -> None:
    windows = PackedWindows(corpus_of(4, 3, 5, 8, num_train=12), TRAIN, 9, 40, seed=3)
    begins = set()
    for window in (windows[i] for i in range(40)):
        ids, positions = window["input_ids"], window["position_ids"]
        assert ids.max() < 12
        assert (ids.diff()[positions[1:] > 0] == 1).all()
        assert {0, 4, 7} >= set(ids[1:][positions[1:] == 0].tolist())
        labels = window["labels"]
        assert ((labels == IGNORED_LABEL) == (positions == 0)).all()
        assert (labels[positions > 0] == ids[positions > 0]).all()
        begins.add(int(ids[0]))
    assert len(begins) > 2
    assert torch.equal(windows[7]["input_ids"], windows[7]["input_ids"])


def test_the_last_share_is_held_out_or_a_text_of_its_own(tmp_path: Path) -> None:
    data = write_texts(tmp_path / "data")
    tokenizer = byte_tokenizer()
    whole = sum(len(file.read_bytes()) for file in data.iterdir())
    corpus = open_tokens(tokenizer, data, held_out_share=0.25)
    assert corpus.split(TRAIN) == (0, round(0.75 * whole))
    other = tmp_path / "other.txt"
    other.write_text("other text")
    apart = open_tokens(tokenizer, data, other)
    assert apart.split(TRAIN) == (0, whole)
    assert bytes(apart.read(whole, len(apart)).tolist()) == b"other text"
    assert corpus.fingerprint() != apart.fingerprint()
    assert corpus.fingerprint() == open_tokens(tokenizer, data, None, 0.25).fingerprint()
    assert corpus.fingerprint() != open_tokens(tokenizer, data, None, 0.3).fingerprint()


def test_bad_texts_are_named(tmp_path: Path) -> None:
    data = write_texts(tmp_path / "data")
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=r"trained on and held out, got .*3\.txt in both"):
        open_tokens(tokenizer, data, data / "3.txt")
    with pytest.raises(ValueError, match=r"held_out_share must be between 0 and 1, got .*=1\.5"):
        open_tokens(tokenizer, data, held_out_share=1.5)
    with pytest.raises(ValueError, match=r"nowhere does not exist"):
        open_tokens(tokenizer, tmp_path / "nowhere")
    (data / "latin.txt").write_bytes("the café".encode("latin-1"))
    with pytest.raises(ValueError, match=r"UTF-8, got .*latin\.txt with byte 0xe9 at 7"):
        open_tokens(tokenizer, data)
