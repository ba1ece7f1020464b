"""Give a transformers model that you have already fixed attention, through its configuration.

The weights stay as they are and no module is replaced, so expect to fine-tune. With `layers=[]`
the model gives what it gave before.
"""

from __future__ import annotations

import ast
import inspect
import operator
import textwrap
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from typing import Any, SupportsIndex, TypeVar

from transformers import PreTrainedConfig, PreTrainedModel

from colonnade.hf.checkpoint import write_name
from colonnade.hf.settings import NAME
from colonnade.pattern import FixedPattern

Model = TypeVar("Model", bound=PreTrainedModel)

_CHANGES_THE_RESULT = {
    "sliding_window": "a sliding window",
    "attention_chunk_size": "chunked attention",
    "attn_logit_softcapping": "capped scores",
}
"""Settings of other models that no fixed pattern can follow, and what each of them means."""
_OF_LAYER_TYPES = ("sliding_window", "attention_chunk_size")
"""Those of them that concern only the layers which `layer_types` names, where there is one."""


def retrofit(
    model: Model,
    stride: int,
    summary: int,
    subblocks: int = 1,
    layers: Iterable[SupportsIndex] | None = None,
) -> Model:
    """Give layers of a loaded causal model the pattern S_i = A1_i ∪ A2_i; see `FixedPattern`.

    This works for transformers models that attend through the attention interface, such as Llama,
    Qwen, Mistral, GPT-2 and GPT-NeoX; of a vision-language model the text decoder alone changes.
    The settings and the name of the attention are written into `model.config` and saved with it, so
    after `import colonnade.hf` whatever loads the checkpoint gives fixed attention.
    `set_attn_implementation` changes the model in memory alone, not what is saved of it. For the
    small cache, pass `past_key_values=FixedCache(model.config)` to `generate`.

    Args:
        model: The model, which is changed in place.
        stride: Length l of a block, in tokens.
        summary: Number c of columns of every block that all later positions read.
        subblocks: Number of sub-blocks; key/value head h reads the summary columns of sub-block
            h mod subblocks.
        layers: Indices of the layers that get the pattern, integers of any kind; the others still
            read everything, through the same attention function. All layers if None.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a transformers model, or a count is not an integer.
        ValueError: The pattern does not exist, the model lacks a layer in `layers`, or it is a
            Sparse Transformer, which has a pattern already.
        NotImplementedError: The model attends in a way that has no fixed pattern (windows, capped
            scores, cross-attention, both directions), looks into its mask, or does not attend
            through transformers' attention interface.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers model, got a {type(model).__name__}. Retrofit before "
            "you wrap it, in a PEFT model for example."
        )
    FixedPattern(stride, summary, subblocks)
    config = model.config.get_text_config(decoder=True)
    _check_model(model, config)
    every = range(config.num_hidden_layers)
    chosen = list(every) if layers is None else [_layer_index(layer) for layer in layers]
    if any(layer not in every for layer in chosen):
        raise ValueError(
            f"layers must be in [0, num_hidden_layers), got layers={chosen} and "
            f"num_hidden_layers={len(every)}."
        )
    dense = [layer for layer in every if layer not in chosen]
    _write_settings(config, stride, summary, subblocks, dense)
    inside = [key for key in model.config.sub_configs if getattr(model.config, key, None) is config]
    model.set_attn_implementation({inside[0]: NAME} if inside else NAME)
    write_name(model.config)
    # An adapter that is trained on this model must not name the dense checkpoint as its base.
    model.name_or_path = ""
    return model


def _layer_index(layer: SupportsIndex) -> int:
    """Return an integer of Python, NumPy or PyTorch as an int; a bool is none."""
    # NumPy 2.2, the newest on Python 3.10, takes its bool as an index, and only warns.
    is_bool = isinstance(layer, bool) or str(getattr(layer, "dtype", "")).endswith("bool")
    if not is_bool:
        with suppress(TypeError):
            return operator.index(layer)
    raise TypeError(f"layers must be integers, got {layer!r} in layers.")


def _write_settings(
    config: PreTrainedConfig, stride: int, summary: int, subblocks: int, dense: Sequence[int]
) -> None:
    others = config.to_dict().get("per_layer_config") or {}
    settings = {"stride": stride, "summary": summary, "subblocks": subblocks, "pattern": "fixed"}
    config.per_layer_config = None
    config.update({f"{NAME}_{name}": value for name, value in settings.items()})
    overrides: dict[int | str, dict[str, Any]] = {
        int(layer): {name: value for name, value in of_layer.items() if not name.startswith(NAME)}
        for layer, of_layer in others.items()
    }
    for layer in dense:
        overrides.setdefault(layer, {})[f"{NAME}_pattern"] = "full"
    # None, not {}: a configuration without overrides is not heterogeneous.
    config.per_layer_config = {layer: each for layer, each in overrides.items() if each} or None


def _check_model(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    name = type(model).__name__
    if config.model_type == "sparse_transformer":
        raise ValueError(
            f"{name} has a fixed pattern already. Set stride, summary and subblocks in its "
            "configuration instead."
        )
    # The decoder of a composite model is a model of its own, with the configuration of the text.
    decoders = [
        each
        for each in model.modules()
        if isinstance(each, PreTrainedModel) and each.config is config
    ]
    if not all(
        each._supports_attention_backend and each._can_set_attn_implementation()
        for each in decoders
    ):
        decoders = []
    layers = [each for decoder in decoders for each in decoder.modules() if _attends(type(each))]
    if not layers:
        raise NotImplementedError(
            f"a model must attend through transformers' attention interface, which {name} does "
            "not, so its pattern cannot be changed."
        )
    crosses = ("is_encoder_decoder", "add_cross_attention", "cross_attention_layers")
    if any(getattr(config, setting, None) for setting in crosses):
        raise NotImplementedError(
            f"a fixed pattern is for causal decoders, got {name}, which has cross-attention."
        )
    for layer in layers:
        if not getattr(layer, "is_causal", True):
            raise NotImplementedError(
                f"a fixed pattern is for causal decoders, got {name}, whose "
                f"{type(layer).__name__} reads in both directions."
            )
        if _looks_into_mask(type(layer)):
            raise NotImplementedError(
                f"a layer must pass its mask on as it is, got {name}, whose "
                f"{type(layer).__name__} looks into it."
            )
    of_layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    for of_layer in of_layers:
        for setting, meaning in _CHANGES_THE_RESULT.items():
            if setting in _OF_LAYER_TYPES and getattr(config, "layer_types", None):
                continue  # layer_types, below, says whether a layer reads it.
            if value := getattr(of_layer, setting, None):
                raise NotImplementedError(
                    f"a fixed pattern cannot have {meaning}, got {setting}={value!r} for {name}. "
                    f"Set model.config.{setting}=None if the model can do without."
                )
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"}):
        raise NotImplementedError(
            f"every layer must have full attention, got layer_types with {other} for {name}."
        )


@cache
def _source(kind: type) -> ast.Module | None:
    """Return the parsed source of a class of modules; None if there is none to read."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError):
        return None


def _attends(kind: type) -> bool:
    """Whether modules of a class call the attention function that the configuration names."""
    return any(
        isinstance(node, ast.Name) and node.id == "ALL_ATTENTION_FUNCTIONS" for node in _nodes(kind)
    )


def _looks_into_mask(kind: type) -> bool:
    """Whether modules of a class use an attention mask other than by passing it on."""
    return any(
        isinstance(node, ast.Subscript | ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "attention_mask"
        for node in _nodes(kind)
    )


def _nodes(kind: type) -> list[ast.AST]:
    source = _source(kind)
    return [] if source is None else list(ast.walk(source))
