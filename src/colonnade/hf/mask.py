"""The mask function that transformers knows as "colonnade".

transformers passes a mask only to implementations that register a mask function under the same
name; without one a padded batch would arrive as None and silently be computed wrongly. Ours
returns a descriptor instead of a tensor, which tells the attention function that it was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import getclosurevars
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_overlay,
)

from colonnade.hf.batch import Batch, require, running_call
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
        dropped: Number of positions that the cache dropped, because they are outside of the window.
        window: That of a sliding window; None: every position so far may be read.
        given: [batch, positions], the mask of tokens that it was made of, if there was one.
        new: [batch, new positions], the end of that one, if there is padding in it.
        shape: (batch, 1, queries, keys), as of the mask that it stands for.
        unreadable: Why no layer may read it; None: layers may.
        is_of_call: Whether it was seen what the model was called with.
    """

    packing: Packing | None = None
    padding: Bool[Tensor, "batch positions"] | None = None
    cache: FixedCache | None = None
    filled: int | Tensor | None = None
    dropped: int = 0
    window: int | None = None
    given: Tensor | None = None
    new: Tensor | None = None
    shape: tuple[int, int, int, int] = (0, 1, 0, 0)
    unreadable: str | None = None
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
    local_size: int | None = None,
    **_: Any,
) -> PatternMask:
    """Return the descriptor of the mask of these sizes, never a [q_length, kv_length] tensor.

    Where documents begin was read from the call of the model, see `read_batch`. A mask that we
    cannot follow may be one that no layer reads, so it is the layer that refuses it.

    Raises:
        ValueError: The attention mask contradicts a `FixedCache`.
        NotImplementedError: The model makes the mask for other tokens than it was called with, and
            these are packed.
    """
    call = running_call()
    is_read = call is not None and call.batch is not None
    batch = call.batch if call is not None and call.batch is not None else Batch()
    compiling = torch.compiler.is_compiling()
    if isinstance(attention_mask, PatternMask):  # Made ahead, when nothing was known of the call.
        if attention_mask.unreadable is not None or _is_step_ahead(attention_mask, q_length):
            return of_this_call(attention_mask)
        attention_mask = attention_mask.given
    if compiling:
        window = local_size
        _require_known(mask_function, batch_size, q_length, kv_length, window, device)
    else:
        known, window = read_mask_function(mask_function, is_read)
        if not known:
            return PatternMask(unreadable=UNKNOWN)
    make = partial(
        PatternMask,
        window=window,
        given=attention_mask,
        shape=(batch_size, 1, q_length, kv_length),
        is_of_call=call is not None,
    )
    cache = kv_offset.cache if isinstance(kv_offset, CacheOffset) else None
    if compiling and call is not None and isinstance(call.cache, FixedCache) and call.cache.static:
        cache = call.cache
    if cache is not None:
        return make(cache=cache, new=cache.announce(q_length, attention_mask, batch.restarts))
    if batch.hidden:
        if attention_mask is None:
            attention_mask = torch.ones(
                batch_size, kv_offset + kv_length, dtype=torch.bool, device=device
            )
        place = torch.arange(attention_mask.shape[1], device=device)
        attention_mask = attention_mask & (place >= batch.hidden)
    if isinstance(q_offset, Tensor):  # A static cache: it counts on the device.
        return make(padding=attention_mask, filled=q_offset + q_length)
    held = q_offset + q_length - kv_offset
    # Without a window every earlier position is read, and with one the last few.
    needed_from = 0 if window is None else max(q_offset - window + 1, 0)
    if kv_offset > needed_from or kv_length < held:
        sizes = f"kv_length={kv_length}, kv_offset={kv_offset}"
        return PatternMask(
            unreadable=f"attn_implementation={NAME!r} needs a cache that holds every position "
            f"once, or a FixedCache; got {sizes} for q_offset={q_offset} and q_length={q_length}."
        )
    if kv_offset and attention_mask is not None:
        _check_dropped(attention_mask, kv_offset, held)
    make = partial(make, dropped=kv_offset)
    # A compiler cannot branch on a mask's contents.
    if attention_mask is not None and not compiling and bool(attention_mask.all()):
        attention_mask = None
    if kv_length > held:  # A static cache that is empty, or a window of one that is not full.
        return make(padding=attention_mask, filled=held)
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
    if q_length == kv_length and kv_offset == 0:
        return make(Packing.of_padded(attention_mask))
    return make(padding=attention_mask)


def _is_step_ahead(mask: PatternMask, q_length: int) -> bool:
    """Whether a mask that was made ahead is that of a compiled step over a cache of fixed size.

    It was looked at then. All of it would be a tensor that grows with every token.
    """
    return torch.compiler.is_compiling() and mask.cache is not None and q_length == 1


def of_this_call(mask: PatternMask) -> PatternMask:
    """Return a mask that was made ahead as one of the call that runs, with what its step brings."""
    if mask.unreadable is None:
        assert mask.cache is not None, "the caller looked"
        mask.cache.announce_checked(mask.shape[2], mask.new)
    called = running_call() is not None
    return PatternMask(
        cache=mask.cache,
        window=mask.window,
        shape=mask.shape,
        unreadable=mask.unreadable,
        is_of_call=called,
    )


def masks_of_this_call(
    masks: Mapping[str, PatternMask],
) -> Mapping[str, PatternMask] | Tensor | None:
    """Return what a model is to be given instead of masks for each kind of layer, made ahead.

    The model takes these as they are. So it gets what they were made of, and makes them again.
    """
    if any(each.unreadable is not None or each.is_of_call for each in masks.values()):
        return masks
    if all(_is_step_ahead(each, each.shape[2]) for each in masks.values()):
        return {kind: of_this_call(each) for kind, each in masks.items()}
    given: Tensor | None = next((each.given for each in masks.values()), None)
    return given


def _check_dropped(padding: Tensor, dropped: int, held: int) -> None:
    """Refuse padding behind a row's first token, where the cache dropped positions.

    A window counts tokens, and such a cache positions: it dropped tokens that are still read.

    Raises:
        ValueError: There is such padding.
    """
    begun = padding[:, :dropped].any(1)
    whole = padding[:, dropped : dropped + held].all(1)
    require(
        ~(begun & ~whole).any(),
        "padding must be on the left where a cache drops positions outside of a window; use "
        "FixedCache(model.config)",
        lambda: f"padding behind tokens in rows {(begun & ~whole).nonzero()[:, 0].tolist()}",
    )


def read_mask_function(
    mask_function: Callable[..., Any], packed_is_known: bool
) -> tuple[bool, int | None]:
    """Read off a mask function what it is, by the functions that it was put together from.

    transformers finds packed rows as well, and says so in a closure around the causal function.

    Returns:
        Whether it is causal, within a sliding window or not, maybe inside of packed rows; and the
        window, or None.
    """
    windows: list[int] = []
    is_causal = packed = False
    rest = [mask_function]
    while rest:
        each = rest.pop()
        code = getattr(each, "__code__", None)
        if code in _INTERSECTIONS:
            rest += _inner(each)
        elif code is _WINDOW_CODE:
            windows.append(getclosurevars(each).nonlocals["sliding_window"])
        elif code is _PACKED_CODE and packed_is_known and not packed:
            packed = True
        elif each is causal_mask_function:
            is_causal = True
        else:
            return False, None
    if not is_causal or len(windows) > 1:
        return False, None
    return True, windows[0] if windows else None


def _require_known(
    mask_function: Callable[..., Any],
    batch_size: int,
    length: int,
    kv_length: int,
    window: int | None,
    device: torch.device | None,
) -> None:
    """Ask a mask function what it is where a compiler cannot look into a closure.

    A run begins where a token does not see the one before it. A token must see the first one of its
    run, or of its window, and neither the one before its window, nor the one after itself, nor the
    first one of all from another run: else the mask is of a kind that we do not know.
    """
    if mask_function is causal_mask_function:
        return
    row = torch.arange(batch_size, device=device)[:, None]
    position = torch.arange(length, device=device)

    def sees(key: Tensor, query: Tensor = position) -> Tensor:
        seen: Tensor = mask_function(row, torch.zeros_like(row), query, key)
        return seen.expand(batch_size, -1)

    if window is not None and length == 1 and kv_length > 1:  # Behind others, it says nothing here.
        behind = torch.tensor([window], device=device)
        known = sees(behind.new_tensor([1]), behind) & ~sees(behind.new_tensor([0]), behind)
        torch._assert_async(known.all(), UNKNOWN)
    begins = ~sees((position - 1).clamp(min=0))
    first = last_true(begins).clamp(min=0)
    after = (position + 1).clamp(max=length - 1)
    known = ~(sees(after) & (after > position))
    known = known & ~(sees(torch.zeros_like(position)) & (first > 0))
    if window is None:
        known = known & sees(first)
    else:
        known = known & sees(torch.maximum(first, position - window + 1))
        outside = (position - window).clamp(min=0)
        known = known & ~(sees(outside) & (position - window >= first))
    torch._assert_async(known.all(), UNKNOWN)


_PACKED_CODE = packed_sequence_mask_function(torch.zeros(1, 1)).__code__
_WINDOW_CODE = sliding_window_overlay(1).__code__
# Earlier releases of transformers do not count anew in each document.
_remap = getattr(masking_utils, "remap_positions_for_packed_sequence", None)
_INTERSECTIONS = [and_masks().__code__]
"""Functions that hide a pair where one of the functions inside of them does."""
if _remap is not None:
    _INTERSECTIONS.append(_remap(causal_mask_function, torch.zeros(1, 1)).__code__)


def _inner(function: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Return the functions that a mask function was put together from."""
    found = getclosurevars(function).nonlocals.values()
    inner = [each for value in found for each in (value if isinstance(value, tuple) else (value,))]
    return [each for each in inner if callable(each)]


def check_mask(attention_mask: object) -> PatternMask:
    """Return a mask that came from our mask function and is of a pattern.

    Raises:
        ValueError: The mask came from elsewhere.
        NotImplementedError: It is of another kind, or a cache dropped positions that it needs.
    """
    if not isinstance(attention_mask, PatternMask):
        shape = getattr(attention_mask, "shape", None)
        found = attention_mask if shape is None else f"a mask of shape {tuple(shape)}"
        raise ValueError(
            f"attn_implementation={NAME!r} takes the mask of its own mask function only, got "
            f"{found}. Pass a 2-D attention_mask to the model, or none."
        )
    if attention_mask.unreadable is not None:
        raise NotImplementedError(attention_mask.unreadable)
    return attention_mask


UNKNOWN = (
    f"attn_implementation={NAME!r} knows causal masks, sliding windows, padding and packed rows "
    "only, got another mask (chunks, a prefix, both directions, or one of your own)."
)
