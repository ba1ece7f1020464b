"""The attention function that transformers knows as "colonnade"."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from colonnade.backends.call import Seen
from colonnade.backends.choice import run
from colonnade.backends.dropout import Dropout
from colonnade.backends.tracing.autocast import cast_as_autocast_would
from colonnade.hf.batch import refuse_unknown
from colonnade.hf.layer import in_type_of
from colonnade.hf.mask import PatternMask, check_mask
from colonnade.hf.settings import NAME, of_layer, patterns_of
from colonnade.ops.check import as_dropout, make_call
from colonnade.ops.heads import Patterns, attention_in_groups, depends_on_head, in_head_groups
from colonnade.ops.kept import mask_of_positions
from colonnade.pattern import Pattern
from colonnade.shapes import Key, Output, Query, Value


class _Options(NamedTuple):
    """What is asked of attention, besides tensors and patterns."""

    scale: float | None
    dropout: Dropout


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
        NotImplementedError: The model asks for a window, capped scores, learnt sink logits or
            anything else that nobody here has heard of, a mask that is neither causal nor that of
            packed rows, or attention that is not causal self-attention; or a rank holds some of the
            heads where their numbers matter.
    """
    attention_mask = check_mask(attention_mask)
    query, key = in_type_of(value, query), in_type_of(value, key)
    refuse_unknown(others)
    _check_call(module, attention_mask, is_causal, others)
    # Modules of transformers that attend have both.
    patterns = patterns_of(module.config, module.layer_idx)  # type: ignore[arg-type]
    _check_heads(module, query.shape[1], patterns)
    options = _Options(scaling, as_dropout(dropout))
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
            out = attention_in_groups(query, key, value, patterns, packing, *options)
        else:
            out = _attend_padded(query, key, value, patterns, padding, options)
    return out.transpose(1, 2).contiguous(), None


def _check_call(
    module: nn.Module, mask: PatternMask, is_causal: bool | None, others: dict[str, Any]
) -> None:
    """Refuse calls that would be computed wrongly without a word."""
    if not mask.is_of_call:
        raise NotImplementedError(
            f"attn_implementation={NAME!r} has to see what a model is called with, got a "
            f"{type(module).__name__} whose model was not. Call the model itself, model(…), "
            "not its forward."
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


def _attend_filled(
    query: Query,
    key: Key,
    value: Value,
    patterns: Patterns,
    filled: int | Tensor,
    padding: Bool[Tensor, "batch positions"] | None,
    options: _Options,
) -> Output:
    """Attend with the last of `filled` positions of a static cache, without looking at `filled`."""
    batch, length = key.shape[0], key.shape[2]
    is_token = (torch.arange(length, device=key.device) < filled).expand(batch, -1)
    if padding is not None:
        is_token = is_token & F.pad(padding, (0, length - padding.shape[1]))
    position = is_token.cumsum(1) - 1
    last = filled - query.shape[2] + torch.arange(query.shape[2], device=key.device)

    def attend(pattern: Pattern, dropout: Dropout, query: Query, key: Key, value: Value) -> Output:
        mask = mask_of_positions(pattern, position[:, last], position, is_token, key.shape[1])
        keys = Seen(mask, position[:, last], position[:, None])
        call = make_call(query, pattern, options.scale, dropout, return_lse=False, keys=keys)
        return run(query, key, value, call, "auto")[0]

    return in_head_groups(attend, patterns, options.dropout, query, key, value)


def _attend_padded(
    query: Query,
    key: Key,
    value: Value,
    patterns: Patterns,
    padding: Bool[Tensor, "batch kv_len"],
    options: _Options,
) -> Output:
    """Attend with the last queries of padded rows: a token of all rows at once, a chunk by rows."""
    length = key.shape[2]
    if query.shape[2] == 1:
        return _attend_filled(query, key, value, patterns, length, padding, options)
    query, key, value = cast_as_autocast_would(query, key, value)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    dropout = options.dropout.drawn(query.device)
    for row, is_token in enumerate(padding):
        of_row = dropout._replace(first_row=row)
        queried = is_token[length - query.shape[2] :]
        k, v = (t[row, None, :, is_token] for t in (key, value))
        q = query[row, None, :, queried]
        out[row, :, queried] = attention_in_groups(q, k, v, patterns, None, options.scale, of_row)[
            0
        ]
    return out
