"""Where a model's logits come from, so that they can be computed a few positions at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

AT_ONCE = 512
"""Positions whose logits are in memory together; with 50,000 tokens they take 100 MB in float32."""


@dataclass(frozen=True)
class Head:
    """A model in two parts: states of its positions, and the logits of these.

    Attributes:
        states: Takes what the model takes, and returns [batch, length, width].
        logits: Takes [positions, width], and returns [positions, vocabulary].
        is_split: Whether the two are the decoder and its output embedding; otherwise the states are
            the logits already, all of which are then in memory.
    """

    states: Callable[..., Tensor]
    logits: Callable[[Tensor], Tensor]
    is_split: bool


@torch.no_grad()
def find_head(model: PreTrainedModel) -> Head:
    """Split a causal model into its decoder and its output embedding.

    Some models change the logits behind the output embedding: they scale or cap them. So the two
    parts are tried out on a few tokens, and where they give other logits, the states are the logits
    of the whole model.
    """
    decoder = model.base_model
    # Tables, whatever the annotations of transformers say.
    output: Any = model.get_output_embeddings()

    def states(**inputs: Any) -> Tensor:
        hidden: Tensor = decoder(**inputs, use_cache=False).last_hidden_state
        return hidden

    def whole(**inputs: Any) -> Tensor:
        logits: Tensor = model(**inputs, use_cache=False).logits
        return logits

    if output is not None and decoder is not model:
        tokens = torch.arange(4, device=model.device)[None] % output.weight.shape[0]
        was_training = model.training
        model.eval()
        same = torch.equal(output(states(input_ids=tokens)), whole(input_ids=tokens))
        model.train(was_training)
        if same:
            return Head(states, output, is_split=True)
    return Head(whole, nn.Identity(), is_split=False)


def few(*tensors: Tensor, at_once: int = AT_ONCE) -> Iterator[tuple[Tensor, ...]]:
    """Yield a few positions after another of tensors [positions, …] of one length."""
    yield from zip(*(tensor.split(at_once) for tensor in tensors), strict=True)


def in_float(logits: Tensor) -> Tensor:
    """Return logits in float32, or in float64 if they are."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
