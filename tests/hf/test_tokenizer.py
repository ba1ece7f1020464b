"""Bytes as tokens, also after saving and loading without any code of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from colonnade.hf import byte_tokenizer

TOKENIZER = byte_tokenizer()

AWKWARD = [
    "",
    "plain text",
    " spaces  at both ends ",
    "\x00\t\n\r\x7f",
    "Āÿ",  # The symbols that stand for bytes 0 and 255 inside the vocabulary.
    "<pad></s>[PAD]<|endoftext|>",
    "你好, мир, 🏛️",
]


@pytest.mark.parametrize("text", AWKWARD)
def test_ids_are_the_bytes(text: str) -> None:
    ids = TOKENIZER(text)["input_ids"]
    assert ids == list(text.encode())
    assert TOKENIZER.decode(ids) == text


@given(st.text())
def test_any_text(text: str) -> None:
    assert TOKENIZER(text)["input_ids"] == list(text.encode())


def test_every_byte_has_one_id() -> None:
    assert len(TOKENIZER) == 256
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(256))


def test_padding_is_told_by_the_mask() -> None:
    batch = TOKENIZER(["ab", "abcd"], padding=True)
    assert batch["attention_mask"] == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert [len(ids) for ids in batch["input_ids"]] == [4, 4]


def test_saved_and_loaded_without_our_code(tmp_path: Path) -> None:
    assert isinstance(TOKENIZER, PreTrainedTokenizerFast)
    TOKENIZER.save_pretrained(tmp_path)
    (tmp_path / "texts.json").write_text(json.dumps(AWKWARD))
    script = f"""
import json, sys
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained({str(tmp_path)!r})
assert not any(name.startswith("colonnade") for name in sys.modules)
texts = json.load(open({str(tmp_path / "texts.json")!r}))
print(json.dumps([tokenizer(text)["input_ids"] for text in texts]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [list(text.encode()) for text in AWKWARD]
