"""Give a transformers model that you have already fixed attention, through its configuration.

The weights stay as they are and no module is replaced, so expect to fine-tune. With `layers=[]`
the model gives what it gave before.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from contextlib import suppress
from os import PathLike
from typing import Any, SupportsIndex, TypeVar

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from colonnade.hf.cache import check_cache
from colonnade.hf.settings import NAME, patterns_of
from colonnade.pattern import FixedPattern

Model = TypeVar("Model", bound=PreTrainedModel)

_CHANGES_THE_RESULT = {
    "sliding_window": "a sliding window",
    "attention_chunk_size": "chunked attention",
    "attn_logit_softcapping": "capped scores",
}
"""Settings of other models that no fixed pattern can follow, and what each of them means."""


def retrofit(
    model: Model,
    stride: int,
    summary: int,
    subblocks: int = 1,
    layers: Iterable[SupportsIndex] | None = None,
) -> Model:
    """Give layers of a loaded causal model the pattern S_i = A1_i ∪ A2_i; see `FixedPattern`.

    This works for transformers models that attend through the attention interface, such as Llama,
    Qwen, Mistral, GPT-2 and GPT-NeoX. The settings are written into `model.config` and saved with
    it, but transformers does not save the name of the attention: reload with `colonnade.hf.load`,
    because `from_pretrained` gives a dense model. For the small cache, pass
    `past_key_values=FixedCache(model.config)` to `generate`.

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
            scores, cross-attention), or not through transformers' attention interface.
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
    model.set_attn_implementation(NAME)
    return _watched(model)


def _layer_index(layer: SupportsIndex) -> int:
    """Return an integer of Python, NumPy or PyTorch as an int; a bool is none."""
    if not isinstance(layer, bool) and getattr(layer, "dtype", None) != torch.bool:
        with suppress(TypeError):
            return operator.index(layer)
    raise TypeError(f"layers must be integers, got {layer!r} in layers.")


def load(path: str | PathLike[str], **options: Any) -> Any:
    """Load a causal model that was saved after `retrofit`, with its fixed attention.

    Args:
        path: Folder or name, as for `AutoModelForCausalLM.from_pretrained`.
        **options: Passed on to `from_pretrained`.

    Returns:
        The model, in the class that `AutoModelForCausalLM` finds for it.

    Raises:
        ValueError: The configuration lacks the settings that `retrofit` writes, or
            `attn_implementation` names another attention.
    """
    if options.setdefault("attn_implementation", NAME) != NAME:
        raise ValueError(
            f"load takes no attn_implementation but {NAME!r}, got attn_implementation="
            f"{options['attn_implementation']!r}. Use from_pretrained for another attention."
        )
    names = ("revision", "cache_dir", "token", "trust_remote_code", "local_files_only", "subfolder")
    shared = {name: options[name] for name in names if name in options}
    config = options.get("config") or AutoConfig.from_pretrained(path, **shared)
    patterns_of(config.get_text_config(decoder=True), 0)
    return _watched(AutoModelForCausalLM.from_pretrained(path, **options))


def _watched(model: Model) -> Model:
    """Make the model refuse caches that would do nothing for the pattern, and return it.

    A hook has to look, because transformers shows neither the mask function nor the attention
    function the cache.
    """
    base = model.base_model
    if _check_cache_of_call not in base._forward_pre_hooks.values():  # A second retrofit finds it.
        base.register_forward_pre_hook(_check_cache_of_call, with_kwargs=True)
    return model


def _check_cache_of_call(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
    if module.config._attn_implementation == NAME:  # type: ignore[union-attr]  # Of a PreTrainedModel.
        for argument in (*given, *named.values()):
            if isinstance(argument, Cache):
                check_cache(argument)


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
    if not model._supports_attention_backend:
        raise NotImplementedError(
            f"a model must attend through transformers' attention interface, which {name} does "
            "not, so its pattern cannot be changed."
        )
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise NotImplementedError(
            f"a fixed pattern is for causal decoders, got {name}, which has cross-attention."
        )
    of_layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    for of_layer in of_layers:
        for setting, meaning in _CHANGES_THE_RESULT.items():
            if value := getattr(of_layer, setting, None):
                raise NotImplementedError(
                    f"a fixed pattern cannot have {meaning}, got {setting}={value!r} for {name}. "
                    f"Set model.config.{setting}=None if the model can do without."
                )
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"}):
        raise NotImplementedError(
            f"every layer must have full attention, got layer_types with {other} for {name}."
        )
