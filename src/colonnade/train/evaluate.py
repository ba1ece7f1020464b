"""Bits per byte: of a model, of count tables, of gzip and xz."""

from __future__ import annotations

import gzip
import lzma
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from colonnade.train.data import Bytes, Corpus

CHUNK = 1 << 24
"""Bytes that a table is counted over at once."""


class Window(NamedTuple):
    """Bytes begin … end - 1 go through the model; those from `score_from` on are scored."""

    begin: int
    end: int
    score_from: int


def check_min_context(min_context: int, context: int) -> None:
    """Refuse a least context that leaves a window nothing to score.

    Raises:
        ValueError: `min_context` lies outside [0, context).
    """
    if not 0 <= min_context < context:
        raise ValueError(
            "min_context must be in [0, context), "
            f"got min_context={min_context} and context={context}."
        )


def windows(length: int, context: int, min_context: int) -> Iterator[Window]:
    """Windows that score every byte but the first once, each with at least `min_context` before it.

    Every window is `context` long and scores its last context - min_context bytes; the first
    scores all (paper, section 7.2 and Table 3). The last is moved back to end with the data.
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
    """Bits per byte of `data` by name: the model, tables of the corpus's training bytes, gzip, xz.

    `progress` is called with the number of bytes that were scored since its last call.
    """
    count, bits = 0, 0.0
    context = model.config.max_position_embeddings
    for count_now, bits_now in model_bits(model, data, context, min_context, batch_size):
        count, bits = count + count_now, bits + bits_now
        progress(count_now)
    assert count == len(data), "every byte is scored once"
    tables = {
        f"order-{order} table of the training bytes": table_bits(corpus, "train", data, order)
        for order in range(3)
    }
    return {
        f"model, min context {min_context}": bits / count,
        **tables,
        **compressor_bits(data),
    }


def model_bits(
    model: PreTrainedModel, data: Bytes, context: int, min_context: int, batch_size: int
) -> Iterator[tuple[int, float]]:
    """(bytes, bits) of one batch of windows after another, over all of `data`.

    The very first byte has nothing before it, and costs 8 bits.
    """
    yield 1, 8.0
    batch: list[Window] = []
    for window in windows(len(data), context, min_context):
        if batch and (len(batch) == batch_size or _size(window) != _size(batch[0])):
            yield _score(model, data, batch)
            batch = []
        batch.append(window)
    yield _score(model, data, batch)


def _size(window: Window) -> int:
    return window.end - window.begin


@torch.inference_mode()
def _score(model: PreTrainedModel, data: Bytes, batch: list[Window]) -> tuple[int, float]:
    if _size(batch[0]) < 2:
        return 0, 0.0
    tokens = torch.from_numpy(np.stack([data[w.begin : w.end] for w in batch])).long()
    tokens = tokens.to(model.device)
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1].float()
    nats: Tensor = functional.cross_entropy(logits.mT, tokens[:, 1:], reduction="none")
    position = torch.arange(1, tokens.shape[1])
    scored = torch.stack([position >= w.score_from - w.begin for w in batch]).to(model.device)
    return int(scored.sum()), float(nats.double()[scored].sum()) / math.log(2)


def table_bits(corpus: Corpus, split: str, data: Bytes, order: int) -> float:
    """Bits per byte of p(b | the `order` bytes before) counted over a split of the corpus.

    p(b | s) = (count(s, b) + 1/256) / (count(s) + 1): one byte's worth of doubt, spread evenly.
    The first `order` bytes of `data` have no s, and cost 8 bits each.
    """
    counts = np.zeros(256 ** (order + 1), np.int64)
    begin, end = corpus.split(split)
    for start in range(begin, end, CHUNK):
        read = corpus.read(max(start - order, begin), min(start + CHUNK, end))
        counts += np.bincount(_codes(read, order), minlength=len(counts))
    table = counts.reshape(-1, 256)
    totals = table.sum(1)
    codes = _codes(data, order)
    doubt = 1 / 256
    bits = np.log2(totals[codes // 256] + 1.0) - np.log2(counts[codes] + doubt)
    return float((bits.sum() + 8 * (len(data) - len(codes))) / len(data))


def _codes(data: Bytes, order: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Each run of order + 1 bytes as one number, the last byte lowest."""
    length = max(len(data) - order, 0)
    codes = np.zeros(length, np.int64)
    for offset in range(order + 1):
        codes = codes * 256 + data[offset : offset + length]
    return codes


def compressor_bits(data: Bytes) -> dict[str, float]:
    """Bits per byte of `gzip -9` and `xz -9` for the same bytes."""
    raw = data.tobytes()
    sizes = {
        "gzip -9": len(gzip.compress(raw, 9, mtime=0)),
        "xz -9": len(lzma.compress(raw, preset=9)),
    }
    return {name: 8 * size / len(raw) for name, size in sizes.items()}
