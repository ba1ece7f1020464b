"""Bits per byte that a model, count tables, gzip and xz need for the same data."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable, Iterator
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from colonnade.train.data import Bytes, Corpus

COUNTED_AT_ONCE = 1 << 24
"""Bytes whose counts are added to a table in one pass."""


class Window(NamedTuple):
    """Bytes begin … end - 1 go through the model; those from `score_from` on are scored."""

    begin: int
    end: int
    score_from: int


def check_min_context(min_context: int, context: int) -> None:
    """Refuse a minimum context that leaves nothing of a window to score.

    Raises:
        ValueError: `min_context` lies outside [0, context).
    """
    if not 0 <= min_context < context:
        raise ValueError(
            "min_context must be in [0, context), "
            f"got min_context={min_context} and context={context}."
        )


def windows(length: int, context: int, min_context: int) -> Iterator[Window]:
    """Yield windows, all of one length, that score every byte but the very first once.

    Each is `context` long and scores its last context - min_context bytes, so that these have at
    least `min_context` bytes before them; the first window scores all of its bytes (paper, section
    7.2 and Table 3). The last is moved back to end with the data, and data shorter than `context`
    is one window.
    """
    scored = min(context, length)
    yield Window(0, scored, 1)
    while scored < length:
        end = min(scored + context - min_context, length)
        yield Window(end - context, end, scored)
        scored = end


def compare(
    model: PreTrainedModel,
    corpus: Corpus,
    data: Bytes,
    min_context: int,
    batch_size: int,
    progress: Callable[[int], None],
) -> dict[str, float]:
    """Return bits per byte of `data` by name, for a model and for what it competes with.

    These are tables that are counted over the training bytes of the corpus, gzip and xz.

    Args:
        model: A byte model.
        corpus: The data that the model was trained on.
        data: Bytes to score.
        min_context: Number of bytes that every scored byte has before it; see `windows`.
        batch_size: Number of windows that go through the model at once.
        progress: Called with the number of bytes that the model has scored since the last call.
    """
    context = model.config.max_position_embeddings
    count, bits = 0, 0.0
    for new_count, new_bits in model_bits(model, data, context, min_context, batch_size):
        count, bits = count + new_count, bits + new_bits
        progress(new_count)
    assert count == len(data), "every byte is scored once"
    return {
        f"model, min context {min_context}": bits / count,
        **{
            f"order-{order} table of the training bytes": table_bits(corpus, "train", data, order)
            for order in range(3)
        },
        **compressor_bits(data),
    }


def model_bits(
    model: PreTrainedModel, data: Bytes, context: int, min_context: int, batch_size: int
) -> Iterator[tuple[int, float]]:
    """Yield (bytes, bits) for one batch of windows after another, over all of `data`.

    The very first byte has nothing before it and costs 8 bits.
    """
    yield 1, 8.0
    left = windows(len(data), context, min_context)
    while batch := list(islice(left, batch_size)):
        yield _score(model, data, batch)


@torch.inference_mode()
def _score(model: PreTrainedModel, data: Bytes, batch: list[Window]) -> tuple[int, float]:
    """Return the number of bytes that a batch of windows scores, and their bits."""
    texts = [data[w.begin : w.end] for w in batch]
    tokens = torch.from_numpy(np.stack(texts)).long().to(model.device)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    nats: Tensor = functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
    position = torch.arange(1, tokens.shape[1], device="cpu")
    scored = torch.stack([position >= w.score_from - w.begin for w in batch]).to(model.device)
    return int(scored.sum()), float(nats.double()[scored].sum()) / math.log(2)


def table_bits(corpus: Corpus, split: str, data: Bytes, order: int) -> float:
    """Return bits per byte of p(b | the `order` bytes before), counted over a split of the corpus.

    p(b | s) = (count(s, b) + 1/256) / (count(s) + 1): one byte's worth of doubt, spread evenly.
    The first `order` bytes of `data` have no s and cost 8 bits each.
    """
    counts = np.zeros(256 ** (order + 1), np.int64)
    begin, end = corpus.split(split)
    for start in range(begin, end, COUNTED_AT_ONCE):
        read = corpus.read(max(start - order, begin), min(start + COUNTED_AT_ONCE, end))
        counts += np.bincount(_codes(read, order), minlength=len(counts))
    totals = counts.reshape(-1, 256).sum(1)
    codes = _codes(data, order)
    bits = np.log2(totals[codes // 256] + 1.0) - np.log2(counts[codes] + 1 / 256)
    return float((bits.sum() + 8 * (len(data) - len(codes))) / len(data))


def _codes(data: Bytes, order: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Encode every order + 1 consecutive bytes as one number, the last byte lowest."""
    length = max(len(data) - order, 0)
    digits = [data[at : at + length].astype(np.int64) for at in range(order + 1)]
    return np.polyval(digits, 256)


def compressor_bits(data: Bytes) -> dict[str, float]:
    """Return bits per byte of `gzip -9` and `xz -9`."""
    raw = data.tobytes()
    return {
        "gzip -9": 8 * len(gzip.compress(raw, 9, mtime=0)) / len(raw),
        "xz -9": 8 * len(lzma.compress(raw, preset=9)) / len(raw),
    }
