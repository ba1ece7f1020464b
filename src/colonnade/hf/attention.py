"""The attention function that transformers knows as "colonnade"."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from colonnade.backends.call import Seen
from colonnade.backends.choice import run
from colonnade.backends.dropout import Dropout
from colonnade.backends.tracing.autocast import cast_as_autocast_would
from colonnade.hf.batch import refuse_unknown
from colonnade.hf.layer import in_type_of
from colonnade.hf.mask import PatternMask, check_mask
from colonnade.hf.settings import NAME, of_layer, patterns_of
from colonnade.hf.windows import window_of
from colonnade.ops.check import as_dropout, make_call
from colonnade.ops.heads import (
    HeadOptions,
    Patterns,
    attention_in_groups,
    check_patterns,
    depends_on_head,
    in_head_groups,
)
from colonnade.ops.kept import mask_of_positions
from colonnade.pattern import LocalPattern
from colonnade.shapes import Key, Output, Query, Value


class _Options(NamedTuple):
    """What is asked of attention, besides tensors and patterns."""

    scale: float | None
    dropout: Dropout
    sink_logits: Tensor | None

    def part(self, dropout: Dropout) -> tuple[float | None, Dropout, str, Tensor | None]:
        """Return the last arguments of `attention_in_groups`, of a part of the call."""
        return self.scale, dropout, "auto", self.sink_logits


def attention_function(
    module: nn.Module,
    query: Query,
    key: Key,
    value: Value,
    attention_mask: PatternMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "batch q_len heads v_dim"], None]:
    """`colonnade.attention` with the pattern of `module.config`, in transformers' layout.

    Args:
        module: The layer, which has a configuration and a number.
        query: [batch, heads, q_len, qk_dim].
        key: [batch, kv_heads, kv_len, qk_dim].
        value: [batch, kv_heads, kv_len, v_dim].
        attention_mask: What our mask function returned.
        scaling: Factor on the scores; 1/sqrt(qk_dim) if None.
        dropout: Share of the weights that is dropped.
        is_causal: Whether a query reads no later key; as the module says if None.
        sliding_window: That of the layer, if it has one.
        s_aux: Learnt sink logits, see `with_sink_logits`.
        **others: Refused, unless they change no attention.

    Raises:
        ValueError: `attention_mask` did not come from our mask function, so padding may be lost; or
            the cache was made for another pattern.
        NotImplementedError: The window of the mask, of the layer's configuration, of its pattern
            and `sliding_window` are not one; the model asks for capped scores or anything else that
            nobody here has heard of, a mask that is neither causal nor that of a window or packed
            rows, or attention that is not causal self-attention; or a rank holds some of the heads
            where their numbers matter.
    """
    attention_mask = check_mask(attention_mask)
    query, key = in_type_of(value, query), in_type_of(value, key)
    refuse_unknown(others)
    _check_call(module, attention_mask, is_causal, others)
    # Modules of transformers that attend have both.
    layer_idx: int = module.layer_idx  # type: ignore[assignment]
    config = of_layer(module.config, layer_idx)  # type: ignore[arg-type]
    patterns = patterns_of(config, layer_idx)
    _check_window(config, layer_idx, patterns, attention_mask.window, sliding_window)
    _check_heads(config, query.shape[1], patterns)
    check_patterns(patterns, key.shape[1])
    options = _Options(scaling, as_dropout(dropout), s_aux)
    if attention_mask.cache is None:
        out = _attend(query, key, value, patterns, attention_mask, options)
    else:
        layer = attention_mask.cache.layers[layer_idx]
        if layer.kv.pattern != patterns:
            raise ValueError(
                f"the cache was made for another pattern than layer {layer_idx} reads, got "
                f"{layer.kv.pattern} and {patterns}. Use FixedCache(model.config)."
            )
        out = layer.read(query, key, value, scaling, dropout, s_aux)
    return out.transpose(1, 2).contiguous(), None


def _attend(
    query: Query,
    key: Key,
    value: Value,
    patterns: Patterns,
    mask: PatternMask,
    options: _Options,
) -> Output:
    """Attend to keys among which every one is that its query may read."""
    padding, filled = mask.padding, mask.filled
    compiling = torch.compiler.is_compiling()
    if compiling and (filled is not None or padding is not None):
        held = key.shape[2] if filled is None else filled
        return _attend_filled(query, key, value, patterns, held, mask, options)
    if filled is not None:
        key, value = (t[:, :, : int(filled)] for t in (key, value))
        if padding is not None:
            padding = padding[:, : mask.dropped + int(filled)]
    if padding is None or bool(padding.all()):
        dropout = options.dropout._replace(first_position=mask.dropped)
        of_call = options.part(dropout)
        return attention_in_groups(query, key, value, patterns, mask.packing, *of_call)
    return _attend_padded(query, key, value, patterns, padding, mask, options)


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


def _check_window(
    config: PreTrainedConfig,
    layer_idx: int,
    patterns: Patterns,
    of_mask: int | None,
    of_call: int | None,
) -> None:
    """Refuse a layer whose window is not the same wherever one is said.

    Raises:
        NotImplementedError: It is not.
    """
    window = window_of(config, layer_idx)
    if of_mask != window or of_call not in (None, window):
        raise NotImplementedError(
            "a layer must have one sliding window, got "
            f"sliding_window={window} in the configuration of layer {layer_idx}, {of_mask} in the "
            f"mask that its model made for it, and {of_call} in its call."
        )
    if window is not None and patterns != LocalPattern(window):
        raise NotImplementedError(
            f"a layer with a sliding window must read within it, got sliding_window={window} and "
            f"{patterns} for layer {layer_idx}. retrofit writes a LocalPattern for such layers."
        )


def _check_heads(config: PreTrainedConfig, heads: int, patterns: Patterns) -> None:
    """Refuse to run only some of the heads on a rank if a head's number decides what it reads.

    Every rank counts its own heads from 0.

    Raises:
        NotImplementedError: This rank holds some of the heads, and they read different columns.
    """
    is_alone = not (distributed.is_available() and distributed.is_initialized())
    if is_alone or not depends_on_head(patterns):
        return
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
    mask: PatternMask,
    options: _Options,
) -> Output:
    """Attend with the last of `filled` positions of a static cache, without looking at `filled`."""
    batch, length = key.shape[0], key.shape[2]
    is_token = (torch.arange(length, device=key.device) < filled).expand(batch, -1)
    before: int | Tensor = mask.dropped
    if mask.padding is not None:
        here = mask.padding[:, mask.dropped :]
        is_token = is_token & F.pad(here, (0, length - here.shape[1]))
        before = mask.padding[:, : mask.dropped].sum(1, keepdim=True)
    position = before + is_token.cumsum(1) - 1
    last = filled - query.shape[2] + torch.arange(query.shape[2], device=key.device)

    def attend(of_heads: HeadOptions, query: Query, key: Key, value: Value) -> Output:
        reads = mask_of_positions(
            of_heads.pattern, position[:, last], position, is_token, key.shape[1]
        )
        keys = Seen(reads, position[:, last], position[:, None])
        needs_lse = of_heads.sink_logits is not None
        dropout = of_heads.dropout
        call = make_call(query, of_heads.pattern, options.scale, dropout, needs_lse, keys)
        return of_heads.finish(*run(query, key, value, call, "auto"))

    of_call = patterns, options.dropout, query, key, value, options.sink_logits
    return in_head_groups(attend, *of_call)


def _attend_padded(
    query: Query,
    key: Key,
    value: Value,
    patterns: Patterns,
    padding: Bool[Tensor, "batch positions"],
    mask: PatternMask,
    options: _Options,
) -> Output:
    """Attend with the last queries of padded rows: a token of all rows at once, a chunk by rows."""
    length = key.shape[2]
    if query.shape[2] == 1:
        return _attend_filled(query, key, value, patterns, length, mask, options)
    query, key, value = cast_as_autocast_would(query, key, value)
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    dropout = options.dropout.drawn(query.device)
    dropped: list[int] = padding[:, : mask.dropped].sum(1).tolist()
    for row, is_token in enumerate(padding[:, mask.dropped :]):
        of_row = options.part(dropout._replace(first_row=row, first_position=dropped[row]))
        queried = is_token[length - query.shape[2] :]
        k, v = (t[row, None, :, is_token] for t in (key, value))
        q = query[row, None, :, queried]
        out[row, :, queried] = attention_in_groups(q, k, v, patterns, None, *of_row)[0]
    return out
