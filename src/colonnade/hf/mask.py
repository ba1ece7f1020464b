"""The mask function that transformers knows as "colonnade".

transformers passes a mask only to implementations that register a mask function under the same
name; without one a padded batch would arrive as None and silently be computed wrongly. Ours
returns a descriptor instead of a tensor, which tells the attention function that it was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from inspect import getclosurevars
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers.masking_utils import causal_mask_function, packed_sequence_mask_function

from colonnade.hf.batch import Batch, running_call
from colonnade.hf.cache import CacheOffset, FixedCache
from colonnade.hf.documents import last_true
from colonnade.hf.settings import NAME
from colonnade.ops.packing import Packing


@dataclass(frozen=True, eq=False)
class PatternMask:
    """Stand for a mask: say which positions are tokens, and where the keys are.

    Attributes:
        packing: Padded or packed batch rows with as many queries as keys; None: neither.
        padding: [batch, positions], True at tokens, if there are fewer queries than keys.
        cache: The cache that keeps what the queries read, if it does not keep everything.
        filled: Number of positions that the keys hold, if their length does not say so.
        given: [batch, positions], the mask of tokens that it was made of, if there was one.
        new: [batch, new positions], the end of that one, if there is padding in it.
        shape: (batch, 1, queries, keys), as of the mask that it stands for.
        is_known: Whether this is the mask of a pattern. If not, no layer may read it.
        is_of_call: Whether it was seen what the model was called with.
    """

    packing: Packing | None = None
    padding: Bool[Tensor, "batch positions"] | None = None
    cache: FixedCache | None = None
    filled: int | Tensor | None = None
    given: Tensor | None = None
    new: Tensor | None = None
    shape: tuple[int, int, int, int] = (0, 1, 0, 0)
    is_known: bool = True
    is_of_call: bool = False
    # `generate` makes the mask of a static cache ahead and passes it as an attention mask; one that
    # is not 4-D would be taken for the user's, and reshaped.
    ndim = 4

    def contiguous(self) -> PatternMask:
        """Return itself; transformers asks it of a tensor."""
        return self


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | PatternMask | None = None,
    device: torch.device | None = None,
    **_: Any,
) -> PatternMask:
    """Return the descriptor of the mask of these sizes, never a [q_length, kv_length] tensor.

    Where documents begin was read from the call of the model, see `read_batch`.

    Raises:
        ValueError: The attention mask contradicts a `FixedCache`.
        NotImplementedError: A cache that is no `FixedCache` drops positions; or the model makes the
            mask for other tokens than it was called with, and these are packed.
    """
    call = running_call()
    is_read = call is not None and call.batch is not None
    batch = call.batch if call is not None and call.batch is not None else Batch()
    compiling = torch.compiler.is_compiling()
    if isinstance(attention_mask, PatternMask):  # Made ahead, when nothing was known of the call.
        if not attention_mask.is_known:
            return attention_mask
        cache = attention_mask.cache
        if compiling and cache is not None and q_length == 1:
            # It was looked at then. All of it would be a tensor that grows with every token.
            cache.announce_checked(q_length, attention_mask.new)
            shape = batch_size, 1, q_length, kv_length
            return PatternMask(cache=cache, shape=shape, is_of_call=call is not None)
        attention_mask = attention_mask.given
    if compiling:
        _require_known(mask_function, batch_size, q_length, device)
    elif _is_unknown(mask_function, is_read):  # It may be one that no layer reads.
        return PatternMask(is_known=False)
    shape = batch_size, 1, q_length, kv_length
    make = partial(PatternMask, given=attention_mask, shape=shape, is_of_call=call is not None)
    cache = kv_offset.cache if isinstance(kv_offset, CacheOffset) else None
    if compiling and call is not None and isinstance(call.cache, FixedCache) and call.cache.static:
        cache = call.cache
    if cache is not None:
        return make(cache=cache, new=cache.announce(q_length, attention_mask, batch.restarts))
    if batch.hidden:
        if attention_mask is None:
            attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
        place = torch.arange(attention_mask.shape[1], device=device)
        attention_mask = attention_mask & (place >= batch.hidden)
    if isinstance(q_offset, Tensor):  # A static cache: it counts on the device.
        return make(padding=attention_mask, filled=q_offset + q_length)
    if kv_offset != 0 or kv_length < q_offset + q_length:
        raise NotImplementedError(
            f"attn_implementation={NAME!r} needs a cache that holds every position once, or a "
            f"FixedCache; got kv_length={kv_length}, kv_offset={kv_offset} for "
            f"q_offset={q_offset} and q_length={q_length}."
        )
    if kv_length > q_offset + q_length:  # A static cache that is empty.
        return make(padding=attention_mask, filled=q_length)
    # A compiler cannot branch on a mask's contents.
    if attention_mask is not None and not compiling and bool(attention_mask.all()):
        attention_mask = None
    if batch.begins is not None:
        if batch.begins.shape != (batch_size, q_length) or kv_length != q_length:
            raise NotImplementedError(
                "documents must begin among the tokens that a model is called with, got a model "
                f"that makes {q_length} of {batch.begins.shape[1]}. Leave position_ids out, or "
                "give it a document alone."
            )
        return make(Packing.of_documents(batch.begins, attention_mask))
    if attention_mask is None:
        return make()
    if q_length == kv_length:
        return make(Packing.of_padded(attention_mask))
    return make(padding=attention_mask)


def _is_unknown(mask_function: Callable[..., Any], packed_is_known: bool) -> bool:
    """Whether a mask is neither causal nor that of packed rows.

    transformers finds packed rows as well, and says so in a closure around the causal function.
    """
    others = [part for part in _parts(mask_function) if part is not causal_mask_function]
    return len(others) > packed_is_known or any(
        part.__code__ is not _PACKED_CODE for part in others
    )


def _require_known(
    mask_function: Callable[..., Any], batch_size: int, length: int, device: torch.device | None
) -> None:
    """Ask a mask function what it is where a compiler cannot look into a closure.

    A run begins where a token does not see the one before it. A token must see the first one of its
    run, and not the one after itself: else the mask is of a kind that we do not know.
    """
    if mask_function is causal_mask_function:
        return
    row = torch.arange(batch_size, device=device)[:, None]
    position = torch.arange(length, device=device)

    def sees(key: Tensor) -> Tensor:
        seen: Tensor = mask_function(row, torch.zeros_like(row), position, key)
        return seen.expand(batch_size, -1)

    begins = ~sees((position - 1).clamp(min=0))
    first = last_true(begins).clamp(min=0)
    after = (position + 1).clamp(max=length - 1)
    known = sees(first) & ~(sees(after) & (after > position))
    torch._assert_async(known.all(), UNKNOWN)


_PACKED_CODE = packed_sequence_mask_function(torch.zeros(1, 1)).__code__


def _parts(function: Callable[..., Any]) -> Iterator[Any]:
    """Yield the functions that a mask function was put together from."""
    inner = [
        each
        for found in getclosurevars(function).nonlocals.values()
        for each in (found if isinstance(found, tuple) else (found,))
        if callable(each)
    ]
    for each in inner:
        yield from _parts(each)
    if not inner:
        yield function


def check_mask(attention_mask: object) -> PatternMask:
    """Return a mask that came from our mask function and is of a pattern.

    Raises:
        ValueError: The mask came from elsewhere.
        NotImplementedError: It is neither causal nor that of packed rows.
    """
    if not isinstance(attention_mask, PatternMask):
        shape = getattr(attention_mask, "shape", None)
        found = attention_mask if shape is None else f"a mask of shape {tuple(shape)}"
        raise ValueError(
            f"attn_implementation={NAME!r} takes the mask of its own mask function only, got "
            f"{found}. Pass a 2-D attention_mask to the model, or none."
        )
    if not attention_mask.is_known:
        raise NotImplementedError(UNKNOWN)
    return attention_mask


UNKNOWN = (
    f"attn_implementation={NAME!r} knows causal masks, padding and packed rows only, got another "
    "mask (a sliding window, a prefix, both directions, or one of your own)."
)
