"""The attention function and the mask function that transformers knows as "colonnade".

transformers passes a mask only to implementations that register a mask function under the same
name; without one a padded batch would arrive as None and silently be computed wrongly. Ours
returns a descriptor instead of a tensor, which tells the attention function that it was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import getclosurevars
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from transformers.masking_utils import causal_mask_function, packed_sequence_mask_function

from colonnade.backends.call import Seen
from colonnade.backends.choice import run
from colonnade.backends.tracing.autocast import cast_as_autocast_would
from colonnade.hf.cache import CacheOffset, FixedCache, in_type_of
from colonnade.hf.settings import NAME, of_layer, patterns_of
from colonnade.ops.check import make_call
from colonnade.ops.heads import Patterns, attention_in_groups, depends_on_head, in_head_groups
from colonnade.ops.kept import mask_of_positions
from colonnade.ops.packing import Packing
from colonnade.pattern import Pattern
from colonnade.shapes import Key, Output, Positions, Query, Value


@dataclass(frozen=True, eq=False)
class PatternMask:
    """Stand for a mask: say which positions are tokens, and where the keys are.

    Attributes:
        packing: Padded or packed batch rows with as many queries as keys; None: neither.
        padding: [batch, positions], True at tokens, if there are fewer queries than keys.
        cache: The cache that keeps what the queries read, if it does not keep everything.
        filled: Number of positions that the keys hold, if their length does not say so.
        is_known: Whether this is the mask of a pattern. If not, no layer may read it.
    """

    packing: Packing | None = None
    padding: Bool[Tensor, "batch positions"] | None = None
    cache: FixedCache | None = None
    filled: int | Tensor | None = None
    is_known: bool = True
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

    Raises:
        ValueError: The attention mask contradicts a `FixedCache`.
        NotImplementedError: A cache that is no `FixedCache` drops positions.
    """
    if isinstance(attention_mask, PatternMask):  # Made ahead.
        return attention_mask
    if torch.compiler.is_compiling():
        document = _asked_documents(mask_function, batch_size, q_length, device)
    elif _is_unknown(mask_function):  # A model may make a mask that no layer reads.
        return PatternMask(is_known=False)
    else:
        document = _packed_documents(mask_function)
    if isinstance(kv_offset, CacheOffset):
        kv_offset.cache.announce(q_length, attention_mask)
        return PatternMask(cache=kv_offset.cache)
    if isinstance(q_offset, Tensor):  # A static cache: it counts on the device.
        return PatternMask(padding=attention_mask, filled=q_offset + q_length)
    if kv_offset != 0 or kv_length < q_offset + q_length:
        raise NotImplementedError(
            f"attn_implementation={NAME!r} needs a cache that holds every position once, or a "
            f"FixedCache; got kv_length={kv_length}, kv_offset={kv_offset} for "
            f"q_offset={q_offset} and q_length={q_length}."
        )
    if kv_length > q_offset + q_length:  # A static cache that is empty.
        return PatternMask(padding=attention_mask, filled=q_length)
    if document is not None:
        return PatternMask(Packing.of_documents(document))
    # A compiler cannot branch on a mask's contents.
    if attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all())):
        return PatternMask()
    if q_length == kv_length:
        return PatternMask(Packing.of_padded(attention_mask))
    return PatternMask(padding=attention_mask)


def _packed_documents(mask_function: Callable[..., Any]) -> Positions | None:
    """Return the number of each token's document, or None if no row is packed.

    transformers finds packed rows by position_ids that restart, and says so only in a closure
    around the causal function.
    """
    packed = [p for p in _parts(mask_function) if p.__code__ is _PACKED_CODE]
    if not packed:
        return None
    document: Tensor = getclosurevars(packed[0]).nonlocals["packed_sequence_mask"]
    return document if bool((document != document[:, :1]).any()) else None


def _is_unknown(mask_function: Callable[..., Any]) -> bool:
    """Whether a mask is neither causal nor that of packed rows."""
    others = [part for part in _parts(mask_function) if part is not causal_mask_function]
    return len(others) > 1 or any(part.__code__ is not _PACKED_CODE for part in others)


def _asked_documents(
    mask_function: Callable[..., Any], batch_size: int, length: int, device: torch.device | None
) -> Positions | None:
    """Return the documents where a compiler cannot look into a closure, by asking the function.

    A document begins where a token does not see the one before it. A token must see the first one
    of its document, and not the one after itself: else the mask is of a kind that we do not know.
    """
    if mask_function is causal_mask_function:
        return None
    row = torch.arange(batch_size, device=device)[:, None]
    position = torch.arange(length, device=device)

    def sees(key: Tensor) -> Tensor:
        seen: Tensor = mask_function(row, torch.zeros_like(row), position, key)
        return seen.expand(batch_size, -1)

    begins = ~sees((position - 1).clamp(min=0))
    document = begins.long().cumsum(-1)
    first = torch.zeros_like(document).scatter_reduce(
        1, document, position.expand_as(document), "amin", include_self=False
    )
    first = first.gather(1, document)  # No cumulative maximum: ONNX has none.
    after = (position + 1).clamp(max=length - 1)
    known = sees(first) & ~(sees(after) & (after > position))
    torch._assert_async(known.all(), _UNKNOWN)
    return document


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


def attention_function(
    module: nn.Module,
    query: Query,
    key: Key,
    value: Value,
    attention_mask: PatternMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "batch q_len heads v_dim"], None]:
    """`colonnade.attention` with the pattern of `module.config`, in transformers' layout.

    Raises:
        ValueError: `attention_mask` did not come from our mask function, so padding may be lost; or
            the cache was made for another pattern.
        NotImplementedError: The model asks for a window, capped scores, learnt sink logits, a mask
            that is neither causal nor that of packed rows, or attention that is not causal
            self-attention; or a rank holds some of the heads where their numbers matter.
    """
    check_mask(attention_mask)
    assert attention_mask is not None
    query, key = in_type_of(value, query), in_type_of(value, key)
    _check_call(module, is_causal, others)
    # Modules of transformers that attend have both.
    patterns = patterns_of(module.config, module.layer_idx)  # type: ignore[arg-type]
    _check_heads(module, query.shape[1], patterns)
    options = {"scale": scaling, "dropout_p": dropout}
    padding, filled = attention_mask.padding, attention_mask.filled
    if attention_mask.cache is not None:
        layer = attention_mask.cache.layers[module.layer_idx]  # type: ignore[index]
        if layer.kv.pattern != patterns:
            raise ValueError(
                f"the cache was made for another pattern than layer {module.layer_idx} reads, got "
                f"{layer.kv.pattern} and {patterns}. Use FixedCache(model.config)."
            )
        out = layer.read(query, key, value, scaling, dropout)
    elif filled is not None and torch.compiler.is_compiling():
        out = _attend_filled(query, key, value, patterns, filled, padding, options)
    else:
        if filled is not None:
            key, value = (t[:, :, : int(filled)] for t in (key, value))
            padding = None if padding is None else padding[:, : int(filled)]
        if padding is None or bool(padding.all()):
            packing = attention_mask.packing
            out = attention_in_groups(query, key, value, patterns, packing, **options)
        else:
            out = _attend_padded(query, key, value, patterns, padding, options)
    return out.transpose(1, 2).contiguous(), None


def check_mask(attention_mask: object) -> None:
    """Refuse a mask that did not come from our mask function, or that is not of a pattern.

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
        raise NotImplementedError(_UNKNOWN)


_UNKNOWN = (
    f"attn_implementation={NAME!r} knows causal masks, padding and packed rows only, got a mask "
    "over them (a sliding window, a prefix, or one of your own)."
)


def _check_call(module: nn.Module, is_causal: bool | None, others: dict[str, Any]) -> None:
    """Refuse calls that would be computed wrongly without a word."""
    for name in UNSUPPORTED:
        if others.get(name) is not None:
            raise NotImplementedError(
                f"attn_implementation={NAME!r} has no {name}, got {name}={others[name]} from "
                f"{type(module).__name__}."
            )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or getattr(module, "is_cross_attention", False):
        raise NotImplementedError(
            f"attn_implementation={NAME!r} is causal self-attention only, got a "
            f"{type(module).__name__} that is not."
        )


def _check_heads(module: nn.Module, heads: int, patterns: Patterns) -> None:
    """Refuse to run only some of the heads on a rank if a head's number decides what it reads.

    Every rank counts its own heads from 0.

    Raises:
        NotImplementedError: This rank holds some of the heads, and they read different columns.
    """
    is_alone = not (distributed.is_available() and distributed.is_initialized())
    if is_alone or not depends_on_head(patterns):
        return
    config = of_layer(module.config, module.layer_idx)  # type: ignore[arg-type]
    every = getattr(config, "num_attention_heads", heads)
    if isinstance(every, int) and heads < every and distributed.get_world_size() > 1:
        raise NotImplementedError(
            f"a rank must hold all heads where their numbers say what they read, got {heads} of "
            f"{every} heads and {patterns}. Use subblocks=1 and one pattern for all heads, or no "
            "tensor parallelism."
        )


UNSUPPORTED = ("softcap", "s_aux", "sliding_window", "sinks")
"""Arguments of other models' attention functions that change the result, and that we lack."""


def _attend_filled(
    query: Query,
    key: Key,
    value: Value,
    patterns: Patterns,
    filled: int | Tensor,
    padding: Bool[Tensor, "batch positions"] | None,
    options: dict[str, Any],
) -> Output:
    """Attend with the last of `filled` positions of a static cache, without looking at `filled`."""
    batch, length = key.shape[0], key.shape[2]
    is_token = (torch.arange(length, device=key.device) < filled).expand(batch, -1)
    if padding is not None:
        is_token = is_token & F.pad(padding, (0, length - padding.shape[1]))
    position = is_token.cumsum(1) - 1
    last = filled - query.shape[2] + torch.arange(query.shape[2], device=key.device)

    def attend(pattern: Pattern, query: Query, key: Key, value: Value) -> Output:
        mask = mask_of_positions(pattern, position[:, last], position, is_token, key.shape[1])
        call = make_call(query, pattern, **options, return_lse=False, keys=Seen(mask))
        return run(query, key, value, call, "auto")[0]

    return in_head_groups(attend, patterns, query, key, value)


def _attend_padded(
    query: Query,
    key: Key,
    value: Value,
    patterns: Patterns,
    padding: Bool[Tensor, "batch kv_len"],
    options: dict[str, Any],
) -> Output:
    """Attend with the last queries of padded rows: a token of all rows at once, a chunk by rows."""
    length = key.shape[2]
    if query.shape[2] == 1:
        return _attend_filled(query, key, value, patterns, length, padding, options)
    query, key, value = cast_as_autocast_would(query, key, value)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    for row, is_token in enumerate(padding):
        queried = is_token[length - query.shape[2] :]
        k, v = (t[row, None, :, is_token] for t in (key, value))
        q = query[row, None, :, queried]
        out[row, :, queried] = attention_in_groups(q, k, v, patterns, **options)[0]
    return out
