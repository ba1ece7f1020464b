"""Bytes as tokens, also after saving and loading without any code of ours."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

from colonnade.hf import SparseTransformerConfig, SparseTransformerForCausalLM, byte_tokenizer

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
    assert TOKENIZER.vocab_size == 256
    assert len(TOKENIZER) == 258
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(258))


def test_padding_is_told_by_the_mask() -> None:
    batch = TOKENIZER(["ab", "abcd"], padding=True)
    assert batch["attention_mask"] == [[1, 1, 0, 0], [1, 1, 1, 1]]
    assert [len(ids) for ids in batch["input_ids"]] == [4, 4]


def test_no_byte_is_special() -> None:
    """Decoding keeps each, whatever is skipped, and collators mask the labels of none."""
    for byte in (0x00, 0x0A, 0x80, 0xC0, 0xFE, 0xFF):
        assert TOKENIZER.decode([byte], skip_special_tokens=True) == TOKENIZER.decode([byte])
        assert TOKENIZER.decode([byte, 256, 257], skip_special_tokens=True)
    assert not set(TOKENIZER.all_special_ids) & set(range(256))
    every = {"input_ids": list(range(256)), "attention_mask": [1] * 256}
    short = {"input_ids": [0xFF], "attention_mask": [1]}
    batch = DataCollatorForLanguageModeling(TOKENIZER, mlm=False)([every, short])
    assert batch["labels"][0].tolist() == list(range(256))
    assert batch["labels"][1].tolist() == [0xFF] + [-100] * 255


@pytest.mark.parametrize("text", ["", *AWKWARD])
def test_an_end_token_can_be_appended(text: str) -> None:
    """As a text, which is how trainers do it, and as an id; it is learnt, not masked."""
    ids = TOKENIZER(text + TOKENIZER.eos_token)["input_ids"]
    assert ids == [*text.encode(), TOKENIZER.eos_token_id]
    assert TOKENIZER.decode(ids, skip_special_tokens=True) == text
    batch = DataCollatorForLanguageModeling(TOKENIZER, mlm=False)([{"input_ids": ids}])
    assert batch["labels"][0].tolist() == ids


def test_a_model_of_bytes_does_not_read_padding() -> None:
    """So 256 rows are enough for padded batches, though the pad token has another id."""
    config = SparseTransformerConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, stride=8, summary=2
    )
    model = SparseTransformerForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.weight)
    for side in ("left", "right"):
        batch = TOKENIZER(["ab", "abcd"], padding=True, padding_side=side, return_tensors="pt")
        there = batch["attention_mask"][0].bool()
        alone = model(**TOKENIZER("ab", return_tensors="pt")).logits
        torch.testing.assert_close(model(**batch).logits[0, there], alone[0])
    batch = TOKENIZER(["ab", "abcd"], padding=True, padding_side="left", return_tensors="pt")
    assert model.generate(**batch, max_new_tokens=3, do_sample=False).shape == (2, 7)


def test_an_end_token_without_a_row_is_refused() -> None:
    model = SparseTransformerForCausalLM(
        SparseTransformerConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    ids = torch.tensor([TOKENIZER("ab" + TOKENIZER.eos_token)["input_ids"]])
    with pytest.raises(ValueError, match=r"from 97 to 256 and vocab_size=256.*len\(tokenizer\)"):
        model(ids)
    with pytest.raises(ValueError, match="input_ids from -1"):
        model(ids * 0 - 1)


def test_an_end_token_is_learnt_with_a_row_for_it() -> None:
    config = SparseTransformerConfig(
        vocab_size=len(TOKENIZER),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        stride=8,
        summary=2,
    )
    model = SparseTransformerForCausalLM(config)
    texts = [{"input_ids": TOKENIZER(t + TOKENIZER.eos_token)["input_ids"]} for t in ("a", "bcd")]
    batch = DataCollatorForLanguageModeling(TOKENIZER, mlm=False)(texts)
    model(**batch).loss.backward()
    assert model.lm_head.weight.grad is not None
    assert model.lm_head.weight.grad[TOKENIZER.eos_token_id].abs().sum() > 0


@pytest.mark.parametrize("text", AWKWARD)
def test_the_file_alone_reads_the_same(text: str, tmp_path: Path) -> None:
    """Without transformers, which has settings of its own for special tokens."""
    TOKENIZER.save_pretrained(tmp_path)
    plain = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert plain.encode(text).ids == list(text.encode())
    assert plain.decode(list(text.encode())) == text


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
