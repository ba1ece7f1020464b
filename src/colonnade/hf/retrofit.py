"""Fixed attention for a model that exists: set in its configuration, run by our function.

No weight changes and no module is replaced. With no layer chosen the model gives what it gave
before; with a fixed pattern it has to be fine-tuned to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import Any, TypeVar

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache

from colonnade.hf.cache import check_cache
from colonnade.hf.settings import NAME, patterns_of
from colonnade.pattern import FixedPattern, check_count

Model = TypeVar("Model", bound=PreTrainedModel)


def retrofit(
    model: Model,
    stride: int,
    summary: int,
    subblocks: int = 1,
    layers: Sequence[int] | None = None,
) -> Model:
    """Give layers of a loaded causal model the pattern S_i = A1_i ∪ A2_i; see `FixedPattern`.

    For models of transformers that attend through its attention interface, such as Llama, Qwen,
    Mistral, GPT-2 and GPT-NeoX. The settings stand in `model.config` and are saved with it; that
    attention is "colonnade" is not, so reload with `colonnade.hf.load`: `from_pretrained` gives a
    dense model. `generate` takes `past_key_values=FixedCache(model.config)` for the small cache.

    Args:
        model: Is changed, and returned.
        stride: Length l of a block, in tokens.
        summary: Columns c of every block that all later positions read.
        subblocks: Key/value head h reads the summary columns of sub-block h mod subblocks.
        layers: Which layers get the pattern; the others go on reading everything, through the same
            function. None: all.

    Raises:
        TypeError: `model` is no model of transformers, or a count is no integer.
        ValueError: A pattern that does not exist, or layers that the model does not have.
        NotImplementedError: The model attends in a way that has no fixed pattern: windows, capped
            scores, cross-attention, or outside of transformers' attention interface.
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
    for layer in () if layers is None else layers:
        check_count("layers", layer, minimum=0)
        if layer not in every:
            raise ValueError(
                f"layers must be in [0, num_hidden_layers), got layers={list(layers or ())} and "
                f"num_hidden_layers={len(every)}."
            )
    dense = [] if layers is None else [layer for layer in every if layer not in layers]
    _write_settings(config, stride, summary, subblocks, dense)
    model.set_attn_implementation(NAME)
    return _watched(model)


def load(path: str | PathLike[str], **options: Any) -> Any:
    """A causal model that was saved after `retrofit`, with its fixed attention.

    Args:
        path: Folder or name, as for `AutoModelForCausalLM.from_pretrained`.
        **options: To `from_pretrained`.

    Raises:
        ValueError: The configuration lacks our settings, or another attention is asked for.
    """
    if options.get("attn_implementation", NAME) != NAME:
        raise ValueError(
            f"load gives attn_implementation={NAME!r}, got "
            f"attn_implementation={options['attn_implementation']!r}. Use from_pretrained."
        )
    names = ("revision", "cache_dir", "token", "trust_remote_code", "local_files_only", "subfolder")
    shared = {name: options[name] for name in names if name in options}
    config = options.get("config") or AutoConfig.from_pretrained(path, **shared)
    patterns_of(config.get_text_config(decoder=True), 0)
    options["attn_implementation"] = NAME
    return _watched(AutoModelForCausalLM.from_pretrained(path, **options))


def _watched(model: Model) -> Model:
    """The model, which will refuse caches that the pattern has no use for.

    Neither the mask function nor the attention function is shown the cache.
    """
    base = model.base_model
    if _check_cache_of_call not in base._forward_pre_hooks.values():  # Retrofitted before.
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
    config.per_layer_config = None
    config.colonnade_stride = stride
    config.colonnade_summary = summary
    config.colonnade_subblocks = subblocks
    config.colonnade_pattern = "fixed"
    overrides: dict[int | str, dict[str, Any]] = {
        int(layer): {name: value for name, value in of_layer.items() if not name.startswith(NAME)}
        for layer, of_layer in others.items()
    }
    for layer in dense:
        overrides.setdefault(layer, {})["colonnade_pattern"] = "full"
    overrides = {layer: of_layer for layer, of_layer in overrides.items() if of_layer}
    if overrides:
        config.per_layer_config = overrides


def _check_model(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    name = type(model).__name__
    if config.model_type == "sparse_transformer":
        raise ValueError(
            f"{name} has a fixed pattern already: set stride, summary and subblocks in its "
            "configuration."
        )
    if not model._supports_attention_backend:
        raise NotImplementedError(
            f"{name} does not attend through transformers' attention interface, so its pattern "
            "cannot be changed."
        )
    if config.is_encoder_decoder or getattr(config, "add_cross_attention", False):
        raise NotImplementedError(
            f"{name} has cross-attention; only causal decoders have a pattern."
        )
    of_layers = config.per_layer_config if getattr(config, "is_heterogeneous", False) else [config]
    for of_layer in of_layers:
        for setting, what in _CHANGES_THE_RESULT.items():
            value = getattr(of_layer, setting, None)
            if value:
                raise NotImplementedError(
                    f"{name} has {what}, got {setting}={value!r}; a fixed pattern has none. Set "
                    f"model.config.{setting}=None if the model can do without."
                )
    other = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if other:
        raise NotImplementedError(
            f"{name} has layers of other kinds than full attention, got layer_types with {other}."
        )


_CHANGES_THE_RESULT = {
    "sliding_window": "a sliding window",
    "attention_chunk_size": "chunked attention",
    "attn_logit_softcapping": "capped scores",
}
