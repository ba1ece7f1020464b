"""Bits per byte by position against their formula, and the entries that a cache keeps."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from colonnade import FixedPattern, FullPattern, LocalPattern
from colonnade.hf import byte_tokenizer, retrofit
from colonnade.train.scores import (
    Score,
    cache_entries,
    dense_entries,
    entry_bytes,
    held_out_windows,
    score,
)
from colonnade.train.tokens import TokenCorpus, Tokens, open_tokens
from tests.hf.models import dense_model
from tests.train.tuned import CONTEXT, write_model, write_texts


@pytest.fixture
def model(tmp_path: Path) -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "model"))
    return found.double()


@torch.no_grad()
def test_bits_per_byte_are_those_of_the_formula(model: PreTrainedModel, tmp_path: Path) -> None:
    """Each token given all before it in its window, one forward for each."""
    corpus = open_tokens(byte_tokenizer(), write_texts(tmp_path / "data"), held_out_share=0.3)
    windows = held_out_windows(corpus, CONTEXT, 3)
    bits, num_bytes = np.zeros(CONTEXT), np.zeros(CONTEXT)
    for begin, end in windows:
        ids = torch.from_numpy(corpus.read(begin, end)).long()
        for t in range(1, CONTEXT):
            p = model(ids[None, :t]).logits[0, -1].softmax(-1)[ids[t]]
            bits[t] -= math.log2(p)
            num_bytes[t] += corpus.num_bytes(begin, end)[t]
    told: list[int] = []
    model.train()
    found = score(model, corpus, windows, told.append)
    assert model.training
    assert np.abs(found.bits - bits).max() < 1e-10
    assert (found.num_bytes == num_bytes).all()
    assert told == [CONTEXT] * 3
    results = found.as_results()
    assert results["bits_per_byte"] == pytest.approx(bits.sum() / num_bytes.sum(), rel=1e-12)
    half = bits[32:].sum() / num_bytes[32:].sum()
    assert results["second_half"] == pytest.approx(half, rel=1e-12)
    assert (results["windows"], results["tokens"], results["bytes"]) == (3, 64, num_bytes.sum())


def test_positions_are_grouped_by_doubling() -> None:
    bits = np.arange(600, dtype=float)
    results = Score(bits, np.full(600, 2), 1).as_results()
    edges = [each[:2] for each in results["by_position"]]
    assert edges == [[1, 128], [128, 256], [256, 512], [512, 600]]
    for begin, end, found in results["by_position"]:
        assert found == pytest.approx(bits[begin:end].mean() / 2)


def corpus_of(*lengths: int) -> TokenCorpus:
    documents = [np.zeros(length, np.int32) for length in lengths]
    return TokenCorpus([Tokens(d, d) for d in documents], 0, "zeros")


def test_windows_lie_within_documents_and_are_spread() -> None:
    corpus = corpus_of(25, 7, 12)
    assert held_out_windows(corpus, 10, 9) == [(0, 10), (10, 20), (32, 42)]
    assert held_out_windows(corpus, 10, 2) == [(0, 10), (10, 20)]
    assert held_out_windows(corpus, 6, 3) == [(0, 6), (12, 18), (25, 31)]
    assert held_out_windows(corpus, 100, 9) == [(0, 25)]
    with pytest.raises(ValueError, match="at least 2 tokens, got 3 tokens of 3"):
        held_out_windows(corpus_of(1, 1, 1), 10, 9)


@pytest.mark.parametrize("length", [1, 15, 16, 17, 64, 70])
def test_entries_are_the_most_that_a_position_reads(length: int) -> None:
    """Of layers and heads of several kinds; groups of heads count their sub-blocks from 0."""
    model = dense_model("llama", num_attention_heads=8, num_key_value_heads=4, hidden_size=64)
    assert dense_entries(model.config, length) == 3 * 4 * length
    fixed, full = FixedPattern(16, 4, 2, sinks=3), FullPattern()
    mixed = (LocalPattern(5, sinks=2), FixedPattern(8, 2, sinks=1), full)
    retrofit(model, patterns={0: fixed, 1: mixed})
    heads = [(fixed, 4), (mixed[0], 2), (mixed[1], 1), (full, 1), (full, 4)]
    most = sum(
        max(len(pattern.indices(i, head)) for i in range(length))
        for pattern, count in heads
        for head in range(count)
    )
    assert cache_entries(model.config, length) == most
    assert entry_bytes(model.config, torch.bfloat16) == 2 * 8 * 2


def test_windows_of_the_dense_model_count_as_what_they_keep() -> None:
    """In two layers of three."""
    layers = ["sliding_attention", "full_attention", "sliding_attention"]
    model = dense_model("qwen2", use_sliding_window=True, sliding_window=8, layer_types=layers)
    assert dense_entries(model.config, 50) == 2 * (8 + 50 + 8)
    assert dense_entries(model.config, 5) == 3 * 2 * 5
    retrofit(model, 16, 4, layers=[1], sinks=1)
    assert cache_entries(model.config, 50) == 2 * (8 + (1 + 2 * 4 + 16) + 8)
