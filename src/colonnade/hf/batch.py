"""The batch that a model is called with: its tokens and its padding, and arguments to refuse.

Where documents begin is read in `documents`.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache
from transformers.utils.generic import TransformersKwargs

from colonnade.hf.settings import NAME

NAMES = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
"""Arguments that say where documents are, besides position_ids."""
HANDED_ON = ("position_ids", *NAMES)
"""Arguments that some heads keep to themselves, although they concern the model inside."""
SAID = ("attention_mask", "position_ids", "past_key_values", *NAMES)
"""All arguments that are read."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The tokens of a batch, as a call describes them.

    Attributes:
        begins: [batch, length], True at the first token of each document; None: each row is one,
            or goes on with the one in the cache.
        restarts: [batch], True where a row begins a document that does not read what its
            `FixedCache` holds; None: nowhere.
        hidden: Number of positions in another cache that belong to earlier documents.
        said: The tokens, and the arguments in `SAID`, as they were read.
        end: (positions that the cache then holds, where its rows end), if the call says positions.
    """

    begins: Bool[Tensor, "batch length"] | None = None
    restarts: Bool[Tensor, " batch"] | None = None
    hidden: int = 0
    said: tuple[Any, ...] = ()
    end: tuple[int, int] | None = None


@dataclass(eq=False)
class ModelCall:
    """A call of a model that runs in this thread.

    Attributes:
        model: The model that is called.
        told: Those arguments in `HANDED_ON` that it was given.
        outer: The call around this one, if the model is a part of that one's.
        before: The innermost call that ran when this one began.
        frame: The frame that runs it; None if a compiler traces it.
        batch: What it says of its tokens; None: nobody reads it, they come under other names.
        cache: The cache that it is given.
    """

    model: PreTrainedModel
    told: dict[str, Any]
    outer: ModelCall | None
    before: ModelCall | None
    frame: FrameType | None
    batch: Batch | None = None
    cache: Cache | None = None


# A subclass with a default would be shorter, but compilers read the default even after a change.
_HERE = threading.local()


def running_call() -> ModelCall | None:
    """Return the innermost call that runs in this thread; None outside of any.

    transformers hands the mask function neither the arguments nor the cache of a call. What a call
    left behind that was interrupted, by Ctrl-C for example, is dropped.
    """
    call: ModelCall | None = getattr(_HERE, "call", None)
    if torch.compiler.is_compiling():  # It sees no frames.
        return call
    while call is not None and not _runs(call.frame):
        call = _HERE.call = call.before
    return call


def _runs(frame: FrameType | None) -> bool:
    """Whether a frame is one of those that led here; None is not known, and taken for one."""
    here: FrameType | None = sys._getframe(1)
    while frame is not None and here is not None and here is not frame:
        here = here.f_back
    return here is not None


def set_running_call(call: ModelCall | None) -> None:
    """Say which call is the innermost from now on."""
    _HERE.call = call


def tokens_of(arguments: Mapping[str, Any]) -> Tensor | None:
    """Return the tokens of a call, or their embeddings; None if they come under another name.

    Both are [batch, length, …]: the tokens of some models for sound have a number in each codebook.
    """
    ids = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if ids is None else ids
    known = isinstance(tokens, Tensor) and tokens.ndim in ((3,) if ids is None else (2, 3))
    return tokens if known else None


def shape_of(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Return (batch, length) of the tokens of a call."""
    tokens = tokens_of(arguments)
    assert tokens is not None, "the caller looks whether there are any"
    batch, length = tokens.shape[:2]
    return batch, length


def positions_in(arguments: Mapping[str, Any]) -> int | Tensor:
    """Return how many positions the cache of a call holds; a compiled static cache counts alone."""
    cache = arguments.get("past_key_values")
    seen: int | Tensor = cache.get_seq_length() if isinstance(cache, Cache) else 0
    return int(seen) if isinstance(seen, Tensor) and not torch.compiler.is_compiling() else seen


def check_mask_of_tokens(
    mask: Tensor, batch: int, length: int, seen: int | Tensor
) -> Bool[Tensor, "batch positions"]:
    """Return a 2-D attention mask as booleans.

    Raises:
        ValueError: It does not have a row for each row of the batch and an entry for each position
            so far, or it has other numbers than 0 and 1.
    """
    known = not isinstance(seen, Tensor)
    if mask.shape[0] != batch or (known and mask.shape[1] != seen + length):
        raise ValueError(
            "attention_mask must be [batch, positions] and cover every position so far and the "
            f"new ones, got attention_mask.shape={tuple(mask.shape)} for {batch} rows of {length} "
            f"tokens{f' and {seen} positions in the cache' if known and seen else ''}."
        )
    token = mask.bool()
    if mask.dtype != torch.bool:
        require(
            (mask == token).all(),
            "attention_mask must be 1 at tokens and 0 at padding (seq_idx numbers documents)",
            lambda: f"attention_mask with {mask.unique().tolist()[:5]}",
        )
    return token


def require(condition: Tensor, rule: str, got: Callable[[], str]) -> None:
    """Refuse what breaks a rule; where a compiler cannot look, when the compiled program runs.

    Sizes in the rule itself would be compiled again for every size.
    """
    if torch.compiler.is_compiling():
        torch._assert_async(condition, f"{rule}.")
    elif not bool(condition):
        raise ValueError(f"{rule}, got {got()}.")


_HARMLESS = {
    *TransformersKwargs.__annotations__,
    *("use_cache", "past_key_values", "cache", "cache_params", "return_dict"),
    *("position_embeddings", "logits_to_keep", "token_type_ids", "deterministic"),
    *("ignore_index", "shift_labels"),
    "cache_position",  # Checked where it is read.
    # Where a forward was replaced by one that takes anything.
    *("input_ids", "inputs_embeds", "attention_mask", "labels"),
}
"""Arguments without a place of their own that models pass on, and that change no attention."""


def refuse_unknown(others: Mapping[str, Any]) -> None:
    """Refuse arguments that may ask for something, and that nobody here has heard of.

    Raises:
        NotImplementedError: There is one.
    """
    for name, value in others.items():
        if value is not None and name not in _HARMLESS:
            shown = (
                f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else value
            )
            raise NotImplementedError(
                f"attn_implementation={NAME!r} has no {name}, got {name}={shown}. Leave it out if "
                "the model can do without."
            )
