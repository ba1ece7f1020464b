"""Bits per byte of held-out text by position, and the entries that a decoder keeps."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedConfig, PreTrainedModel

from colonnade.cost import num_kept
from colonnade.hf.settings import of_layer, patterns_of
from colonnade.hf.windows import window_of
from colonnade.ops.heads import head_groups
from colonnade.train.distillation import evaluating
from colonnade.train.logits import Head, few, find_head, in_float
from colonnade.train.tokens import HELD_OUT, TokenCorpus

FIRST_EDGE = 128
"""Where the second group of positions begins; each later group is as long as all before it."""


@dataclass(frozen=True)
class Score:
    """Bits and bytes of held-out text by the position of a token in its window.

    Attributes:
        bits: [context], the bits that the tokens at each position took, in all windows. Position 0
            is not predicted, and took none.
        num_bytes: [context], the bytes of text that these tokens stand for.
        windows: Number of windows.
    """

    bits: NDArray[np.float64]
    num_bytes: NDArray[np.int64]
    windows: int

    def per_byte(self, begin: int = 1, end: int | None = None) -> float:
        """Return bits per byte of the tokens at positions begin … end - 1 of their windows."""
        return float(self.bits[begin:end].sum() / max(int(self.num_bytes[begin:end].sum()), 1))

    def as_results(self) -> dict[str, Any]:
        """Return what is written down: whole windows, their second halves, and by position."""
        context = len(self.bits)
        edges = [1, *(FIRST_EDGE << power for power in range(context.bit_length())), context]
        edges = sorted({min(edge, context) for edge in edges})
        return {
            "bits_per_byte": self.per_byte(),
            "second_half": self.per_byte(context // 2),
            "by_position": [
                [begin, end, self.per_byte(begin, end)] for begin, end in pairwise(edges)
            ],
            "windows": self.windows,
            "tokens": context,
            "bytes": int(self.num_bytes[1:].sum()),
        }


def held_out_windows(corpus: TokenCorpus, context: int, most: int) -> list[tuple[int, int]]:
    """Return at most that many windows (first token, token after the last) of the held-out text.

    Every document is cut into windows from its beginning. Windows of `context` tokens are taken,
    evenly spread over the text; where no document has as many, the longest ones are.

    Raises:
        ValueError: No held-out document has two tokens.
    """
    windows = [
        (at, min(at + context, end))
        for begin, end in corpus.documents(*corpus.split(HELD_OUT))
        for at in range(begin, end, context)
    ]
    longest = max((end - begin for begin, end in windows), default=0)
    if longest < 2:
        begin, end = corpus.split(HELD_OUT)
        raise ValueError(
            f"the held-out text must have a document of at least 2 tokens, got {end - begin} "
            f"tokens of {len(corpus)}. Use more text."
        )
    windows = [(begin, end) for begin, end in windows if end - begin == longest]
    taken = min(most, len(windows))
    return [windows[len(windows) * i // taken] for i in range(taken)]


def score(
    model: PreTrainedModel,
    corpus: TokenCorpus,
    windows: list[tuple[int, int]],
    progress: Callable[[int], object] = lambda tokens: None,
) -> Score:
    """Return the bits of each window's tokens, given those before them in the window.

    Args:
        model: A causal model.
        corpus: The text.
        windows: Windows of one length; see `held_out_windows`.
        progress: Called with the number of tokens that were scored since the last call.
    """
    context = windows[0][1] - windows[0][0]
    bits, num_bytes = np.zeros(context), np.zeros(context, np.int64)
    head = find_head(model)
    with evaluating(model):
        for begin, end in windows:
            tokens = torch.from_numpy(corpus.read(begin, end)).long().to(model.device)
            bits[1:] += token_bits(head, tokens).cpu().numpy()
            num_bytes[1:] += corpus.num_bytes(begin, end)[1:]
            progress(context)
    return Score(bits, num_bytes, len(windows))


@torch.inference_mode()
def token_bits(head: Head, tokens: Tensor) -> Tensor:
    """Return -log2 p(token t | tokens before it) for t = 1 … length - 1, in float64."""
    states = head.states(input_ids=tokens[None])[0, :-1]
    pieces = few(states, tokens[1:])
    nats = [
        F.cross_entropy(in_float(head.logits(piece)), targets, reduction="none").double()
        for piece, targets in pieces
    ]
    return torch.cat(nats) / math.log(2)


def cache_entries(config: PreTrainedConfig, seq_len: int) -> int:
    """Return the most keys that have to be kept on the way through `seq_len` positions.

    It is the sum of `colonnade.cost.num_kept` over layers and key heads: the open block at its
    longest, summaries and sinks; and windows.
    """
    config = config.get_text_config(decoder=True)
    return sum(
        num_kept(group.pattern, seq_len, head)
        for layer in range(config.num_hidden_layers)
        for group in head_groups(patterns_of(config, layer), key_heads(config, layer))
        for head in range(group.stop - group.first)  # A group counts its sub-blocks from 0.
    )


def dense_entries(config: PreTrainedConfig, seq_len: int) -> int:
    """Return how many keys the dense model has to keep, in all layers and key heads.

    A layer with a sliding window keeps that much.
    """
    config = config.get_text_config(decoder=True)
    return sum(
        key_heads(config, layer) * min(seq_len, window_of(config, layer) or seq_len)
        for layer in range(config.num_hidden_layers)
    )


def key_heads(config: PreTrainedConfig, layer: int) -> int:
    """Return the number of key heads of a layer."""
    own = of_layer(config, layer)
    # Models without grouped queries have no other name for it.
    heads: int = getattr(own, "num_key_value_heads", None) or own.num_attention_heads
    return heads


def entry_bytes(config: PreTrainedConfig, dtype: torch.dtype) -> int:
    """Return the bytes of a key and its value in the type of a cache.

    It is that in which a model is saved and used, not the one in which it is measured.
    """
    config = config.get_text_config(decoder=True)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * int(width) * dtype.itemsize
