"""The attention function and the mask function that transformers knows as "colonnade".

transformers hands a mask only to implementations that register a mask function under the same
name; without one a padded batch would arrive as None and be computed wrongly in silence. Ours
returns a marker in place of a tensor, so that the attention function can tell that it was asked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import causal_mask_function

from colonnade.ops import attention
from colonnade.pattern import FixedPattern
from colonnade.shapes import Key, Query, Value

NAME = "colonnade"


@dataclass(frozen=True)
class PatternMask:
    """Says that the pattern alone is the mask: no padding, no packing, positions from 0."""


def register() -> None:
    """Make attn_implementation="colonnade" known to transformers."""
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)


def pattern_of(config: PreTrainedConfig) -> FixedPattern:
    """The pattern that a configuration asks for.

    Raises:
        ValueError: The configuration lacks `colonnade_stride` or `colonnade_summary`.
    """
    stride = getattr(config, "colonnade_stride", None)
    summary = getattr(config, "colonnade_summary", None)
    if stride is None or summary is None:
        raise ValueError(
            f"attn_implementation={NAME!r} needs colonnade_stride and colonnade_summary, "
            f"which {type(config).__name__} does not have. Only the Sparse Transformer runs so far."
        )
    return FixedPattern(stride, summary, getattr(config, "colonnade_subblocks", 1))


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> PatternMask:
    """The descriptor that stands for the mask of these sizes; never a [q_length, kv_length] tensor.

    Raises:
        NotImplementedError: A padded batch, packed rows, an overlay over the causal mask, or a
            cache that holds more or fewer entries than there are positions.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise NotImplementedError(
            f"attn_implementation={NAME!r} has no padding yet, got an attention_mask with "
            f"{int((~attention_mask.bool()).sum())} padded entries. Run rows of one length."
        )
    if mask_function is not causal_mask_function:
        raise NotImplementedError(
            f"attn_implementation={NAME!r} has no packed rows (position_ids that restart) and no "
            "masks over the causal one yet. Run one document a row."
        )
    if kv_offset != 0 or kv_length != int(q_offset) + q_length:
        raise NotImplementedError(
            f"attn_implementation={NAME!r} needs a cache that holds every position once, got "
            f"kv_length={kv_length}, kv_offset={kv_offset} for q_offset={int(q_offset)} and "
            f"q_length={q_length}. Use a DynamicCache."
        )
    return PatternMask()


def attention_function(
    module: nn.Module,
    query: Query,
    key: Key,
    value: Value,
    attention_mask: PatternMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Float[Tensor, "batch q_len heads v_dim"], None]:
    """`colonnade.attention` with the pattern of `module.config`, in transformers' layout.

    Raises:
        ValueError: `attention_mask` did not come from our mask function, so padding may be lost.
    """
    if not isinstance(attention_mask, PatternMask):
        found = (
            tuple(attention_mask.shape)
            if isinstance(attention_mask, torch.Tensor)
            else attention_mask
        )
        raise ValueError(
            f"attn_implementation={NAME!r} takes the mask of its own mask function only, got "
            f"attention_mask={found}. Pass a 2-D attention_mask to the model, or none."
        )
    pattern = pattern_of(module.config)  # type: ignore[arg-type]  # modules of transformers have one
    out = attention(query, key, value, pattern, scale=scaling, dropout_p=dropout)
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).contiguous(), None
