"""The attention function and the mask function that transformers knows as "colonnade".

transformers hands a mask only to implementations that register a mask function under the same
name; without one a padded batch would arrive as None and be computed wrongly in silence. Ours
returns a marker in place of a tensor, so that the attention function can tell that it was asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from inspect import getclosurevars
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.masking_utils import causal_mask_function, packed_sequence_mask_function

from colonnade.ops.heads import Patterns, attend
from colonnade.ops.packing import Packing
from colonnade.pattern import FixedPattern, FullPattern, LocalPattern, Pattern, StridedPattern
from colonnade.shapes import Key, Output, Positions, Query, Value

NAME = "colonnade"
SCHEMES = ("merged", "interleaved", "multihead")
"""The three ways to use a factorization (Child et al. 2019, section 5.1)."""


@dataclass(frozen=True, eq=False)
class PatternMask:
    """Stands for a mask: the pattern, and which tokens there are.

    Attributes:
        packing: Padded or packed rows with as many queries as keys; None: neither.
        padding: [batch, keys], True at tokens, where there are fewer queries than keys.
    """

    packing: Packing | None = None
    padding: Bool[Tensor, "batch kv_len"] | None = None

    @property
    def is_packed(self) -> bool:
        """Whether rows hold several documents; padded rows hold one each."""
        return self.packing is not None and self.packing.index is None


def register() -> None:
    """Make attn_implementation="colonnade" known to transformers."""
    AttentionInterface.register(NAME, attention_function)
    AttentionMaskInterface.register(NAME, mask_function)


def patterns_of(config: PreTrainedConfig, layer_idx: int) -> Patterns:
    """What layer `layer_idx` of a model reads, from its configuration.

    Raises:
        ValueError: The configuration lacks `colonnade_stride` or `colonnade_summary`, or what it
            asks for does not exist.
    """
    stride = getattr(config, "colonnade_stride", None)
    summary = getattr(config, "colonnade_summary", None)
    if stride is None or summary is None:
        raise ValueError(
            f"attn_implementation={NAME!r} needs colonnade_stride and colonnade_summary, "
            f"which {type(config).__name__} does not have. Only the Sparse Transformer runs so far."
        )
    kind = getattr(config, "colonnade_pattern", "fixed")
    scheme = getattr(config, "colonnade_scheme", "merged")
    patterns: dict[str, Callable[[], Pattern]] = {
        "fixed": lambda: FixedPattern(stride, summary, getattr(config, "colonnade_subblocks", 1)),
        "strided": lambda: StridedPattern(stride),
        "local": lambda: LocalPattern(stride),
        "full": FullPattern,
    }
    if kind not in patterns:
        raise ValueError(f"pattern must be one of {list(patterns)}, got pattern={kind!r}.")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {SCHEMES}, got scheme={scheme!r}.")
    pattern = patterns[kind]()
    if scheme == "merged":
        return pattern
    if not isinstance(pattern, FixedPattern | StridedPattern):
        raise ValueError(
            f"scheme must be 'merged' for a pattern without factors, "
            f"got scheme={scheme!r} and pattern={kind!r}."
        )
    factors = pattern.factors()
    return factors[layer_idx % len(factors)] if scheme == "interleaved" else factors


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
        NotImplementedError: A mask other than the causal one and that of packed rows, or a cache
            that holds more or fewer entries than there are positions.
    """
    if kv_offset != 0 or kv_length != int(q_offset) + q_length:
        raise NotImplementedError(
            f"attn_implementation={NAME!r} needs a cache that holds every position once, got "
            f"kv_length={kv_length}, kv_offset={kv_offset} for q_offset={int(q_offset)} and "
            f"q_length={q_length}. Use a DynamicCache."
        )
    document = _packed_documents(mask_function)
    if document is not None:
        return PatternMask(Packing.of_documents(document))
    if attention_mask is None or bool(attention_mask.all()):
        return PatternMask()
    if q_length == kv_length:
        return PatternMask(Packing.of_padded(attention_mask))
    return PatternMask(padding=attention_mask)


def _packed_documents(mask_function: Callable[..., Any]) -> Positions | None:
    """Which document each token belongs to, from the function that transformers makes of it.

    transformers finds packed rows by position_ids that restart, and says so in a closure around
    the causal function only.
    """
    parts = list(_parts(mask_function))
    packed = [p for p in parts if p.__code__ is _PACKED_CODE]
    if len(packed) > 1 or any(p not in (causal_mask_function, *packed) for p in parts):
        raise NotImplementedError(
            f"attn_implementation={NAME!r} knows causal masks, padding and packed rows only, got a "
            "mask over them (a sliding window, a prefix, or one of your own)."
        )
    if not packed:
        return None
    document: Tensor = getclosurevars(packed[0]).nonlocals["packed_sequence_mask"]
    return document if bool((document != document[:, :1]).any()) else None


_PACKED_CODE = packed_sequence_mask_function(torch.zeros(1, 1)).__code__


def _parts(function: Callable[..., Any]) -> Iterator[Any]:
    """The functions that a mask function was put together from."""
    inner = []
    for held in getclosurevars(function).nonlocals.values():
        inner += [f for f in (held if isinstance(held, tuple) else (held,)) if callable(f)]
    for held in inner:
        yield from _parts(held)
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
    **_: Any,
) -> tuple[Float[Tensor, "batch q_len heads v_dim"], None]:
    """`colonnade.attention` with the pattern of `module.config`, in transformers' layout.

    Raises:
        ValueError: `attention_mask` did not come from our mask function, so padding may be lost.
    """
    if not isinstance(attention_mask, PatternMask):
        found = (
            f"a mask of shape {tuple(attention_mask.shape)}"
            if isinstance(attention_mask, Tensor)
            else repr(attention_mask)
        )
        raise ValueError(
            f"attn_implementation={NAME!r} takes the mask of its own mask function only, got "
            f"{found}. Pass a 2-D attention_mask to the model, or none."
        )
    # Modules of transformers that attend have both.
    patterns = patterns_of(module.config, module.layer_idx)  # type: ignore[arg-type]
    options = {"scale": scaling, "dropout_p": dropout}
    if attention_mask.padding is None:
        out = attend(query, key, value, patterns, attention_mask.packing, **options)
    else:
        out = _attend_rows(query, key, value, patterns, attention_mask.padding, options)
    return out.transpose(1, 2).contiguous(), None


def _attend_rows(
    query: Query,
    key: Key,
    value: Value,
    patterns: Patterns,
    padding: Bool[Tensor, "batch kv_len"],
    options: dict[str, Any],
) -> Output:
    """The last queries of padded rows, each row's tokens by themselves."""
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    for row, is_token in enumerate(padding):
        queried = is_token[-query.shape[2] :]
        q, k, v = (
            query[row, None, :, queried],
            key[row, None, :, is_token],
            value[row, None, :, is_token],
        )
        out[row, :, queried] = attend(q, k, v, patterns, **options)[0]
    return out
