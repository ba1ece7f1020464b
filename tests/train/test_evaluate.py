"""Bits per byte against sums written out by hand."""

from __future__ import annotations

import gzip
import lzma
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from colonnade.hf import SparseTransformerConfig, SparseTransformerForCausalLM
from colonnade.train import evaluate
from colonnade.train.data import open_corpus


@given(
    length=st.integers(1, 200), context=st.integers(1, 50), share=st.floats(0, 1, exclude_max=True)
)
def test_every_byte_is_scored_once_with_enough_before_it(
    length: int, context: int, share: float
) -> None:
    min_context = int(share * context)
    scored: list[int] = []
    for window in evaluate.windows(length, context, min_context):
        assert 0 <= window.begin <= window.end <= length
        assert window.end - window.begin == min(context, length)
        if window.begin > 0:
            assert window.score_from - window.begin >= min_context
        scored += range(window.score_from, window.end)
    assert scored == list(range(1, length))


def test_model_bits_equal_the_sum_over_positions() -> None:
    config = SparseTransformerConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
        stride=4,
        summary=1,
    )
    model = SparseTransformerForCausalLM(config).double().eval()
    torch.nn.init.normal_(model.lm_head.weight)
    data = np.random.default_rng(0).integers(0, 256, 45, dtype=np.uint8)
    context, min_context = 16, 11
    got = list(evaluate.model_bits(model, data, context, min_context, batch_size=3))
    assert sum(count for count, _ in got) == 45
    expected = 8.0
    for position in range(1, 45):
        # The window that scores it: the first, or the step of 5 bytes that it falls into.
        step_begin = 16 + (position - 16) // 5 * 5
        begin = 0 if position < 16 else min(step_begin + 5, 45) - 16
        tokens = torch.tensor(data[begin:position][None].astype(np.int64))
        logits = model(tokens).logits[0, -1].double()
        expected -= (logits.log_softmax(0)[int(data[position])] / math.log(2)).item()
    # Scored in float32: 45 sums of numbers up to some tens.
    assert sum(bits for _, bits in got) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("chunk", [7, 1 << 24])
def test_tables_equal_counting_by_hand(
    tmp_path: Path, order: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "COUNTED_AT_ONCE", chunk)
    text = b"abracadabra, abracadabra; " * 20
    file = tmp_path / "text"
    file.write_bytes(text)
    corpus = open_corpus(file)
    begin, end = corpus.split("test")
    train = text[: corpus.split("train")[1]]
    seen = Counter(train[i : i + order + 1] for i in range(len(train) - order))
    before: Counter[bytes] = Counter()
    for gram, count in seen.items():
        before[gram[:-1]] += count
    held_out = text[begin:end]
    bits = 8.0 * order
    for i in range(order, len(held_out)):
        gram = held_out[i - order : i + 1]
        bits -= math.log2((seen[gram] + 1 / 256) / (before[gram[:-1]] + 1))
    got = evaluate.table_bits(corpus, "train", corpus.read(begin, end), order)
    assert got == pytest.approx(bits / len(held_out), rel=1e-12)


def test_compressors_are_gzip_and_xz_at_nine() -> None:
    raw = b"what a compressor needs " * 50
    got = evaluate.compressor_bits(np.frombuffer(raw, np.uint8))
    assert got == {
        "gzip -9": 8 * len(gzip.compress(raw, 9, mtime=0)) / len(raw),
        "xz -9": 8 * len(lzma.compress(raw, preset=9)) / len(raw),
    }
