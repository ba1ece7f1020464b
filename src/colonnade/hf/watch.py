"""Hooks that read what a model is called with, before it makes masks and attends.

transformers shows neither the mask function nor the attention function all arguments of a call, so
a hook has to look: at caches, and at whatever says where padding and documents are.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import Cache

from colonnade.hf.batch import (
    NAMES,
    SAID,
    Batch,
    batch_of_call,
    check_mask_of_tokens,
    positions_in,
    refuse_unknown,
    set_batch_of_call,
    shape_of,
    tokens_of,
)
from colonnade.hf.continued import positions_behind
from colonnade.hf.documents import counted, read_batch
from colonnade.hf.mask import PatternMask
from colonnade.hf.names import give_one_name
from colonnade.hf.settings import NAME


def watch(model: PreTrainedModel) -> None:
    """Have every call of the model read, whoever calls it. A second time this does nothing.

    Some models call a part of their base, such as its decoder, so every model inside is watched.
    """
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and not any(
            isinstance(hook, _Before) for hook in part._forward_pre_hooks.values()
        ):
            part.register_forward_pre_hook(_Before(part), with_kwargs=True)
            part.register_forward_hook(_after, always_call=True)


class _Before:
    """Reads the arguments of one model's forward."""

    def __init__(self, model: nn.Module) -> None:
        self.names = tuple(inspect.signature(type(model).forward).parameters)[1:]

    def __call__(
        self, module: PreTrainedModel, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if module.config._attn_implementation != NAME:
            return None
        outer = _call_around(module)
        call = dict(zip(self.names, given, strict=False)) | named
        told = {name: call[name] for name in NAMES if call.get(name) is not None}
        # The hook behind the call takes it away again.
        set_batch_of_call(Batch(of=module, outer=outer, told=told, is_read=False))
        arguments = dict(call)
        give_one_name(arguments)
        # A model that does not know the newer name would swallow it.
        changed = "cache" in call and "cache" not in self.names
        call = dict(arguments) if changed else call
        for argument in call.values():
            if isinstance(argument, Cache):
                _check_cache(argument, module)
        if call.get("output_attentions", getattr(module.config, "output_attentions", False)):
            raise NotImplementedError(
                f"attn_implementation={NAME!r} never forms the weights that output_attentions=True "
                "asks for. Leave it out; where you need weights, compute them from queries and "
                "keys under pattern.mask(seq_len)."
            )
        refuse_unknown({key: named[key] for key in named if key not in self.names})
        # What is in a head reads for itself.
        if getattr(module, "base_model", module) is module:
            if outer is not None and not told:
                arguments |= outer.told  # Some heads keep to themselves what they are told.
            changes = self._read(module, arguments, outer)
            changed |= bool(changes)
            call |= changes
        return ((), call) if changed else None

    def _read(
        self, module: PreTrainedModel, arguments: dict[str, Any], outer: Batch | None
    ) -> dict[str, Any]:
        """Read the batch of a call, and return arguments that say what the caller left open."""
        tokens = tokens_of(arguments)
        if tokens is None:
            if unread := [name for name in NAMES if arguments.get(name) is not None]:
                raise NotImplementedError(
                    "arguments that say where documents begin need input_ids [batch, length] or "
                    f"inputs_embeds, got {unread} for a {type(module).__name__} without either."
                )
            return {}
        said = (tokens, *map(arguments.get, SAID))
        if outer is not None and _is_same(outer.said, said):
            set_batch_of_call(replace(outer, of=module, outer=outer))
            return {}
        cache, uses = arguments.get("past_key_values"), arguments.get("use_cache")
        keeps = cache is not None or bool(uses)
        if torch.compiler.is_compiling() and uses is None and not module.training:
            keeps |= bool(module.config.use_cache)  # It cannot see whether a row is packed.
        padding = _padding(arguments)
        batch = read_batch(arguments, padding, keeps)
        changes: dict[str, Any] = {}
        if batch.begins is not None and not keeps and "use_cache" in self.names:
            changes["use_cache"] = False
        if arguments.get("position_ids") is None and "position_ids" in self.names:
            if batch.begins is not None:
                changes["position_ids"] = counted(batch.begins, padding)
            elif (positions := positions_behind(cache, tokens, padding)) is not None:
                changes["position_ids"] = positions
        said = (tokens, *map((arguments | changes).get, SAID))
        set_batch_of_call(replace(batch, of=module, outer=outer, said=said))
        return changes


def _call_around(module: nn.Module) -> Batch | None:
    """Return what the call around that of a module says, if it is one of a model that has it.

    Any other is a foreign one, or was interrupted and left behind.
    """
    outer = batch_of_call()
    if outer is None or outer.of is None or module is outer.of:
        return None
    if getattr(outer.of, "base_model", None) is module:
        return outer
    return outer if any(part is module for part in outer.of.modules()) else None


def _is_same(said: tuple[Any, ...], again: tuple[Any, ...]) -> bool:
    """Whether a part of a model is called with what the model was called with."""
    return (
        bool(said)
        and said[0].shape[:2] == again[0].shape[:2]
        and all(map(operator.is_, said[1:], again[1:]))
    )


def _padding(arguments: Mapping[str, Any]) -> Tensor | None:
    """Return which of all positions are tokens; None: all are, or the mask says something else."""
    mask = arguments.get("attention_mask")
    if isinstance(mask, dict):  # One for each kind of layer.
        mask = next(iter(mask.values()), None)
    if isinstance(mask, PatternMask):  # Made ahead, of the caller's own.
        return mask.padding
    if mask is None or getattr(mask, "ndim", 0) == 4:  # Ours refuses what has four dimensions.
        return None
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        shape = getattr(mask, "shape", None)
        raise ValueError(
            "attention_mask must be a tensor [batch, positions], got "
            f"{f'one of shape {tuple(shape)}' if shape is not None else type(mask).__name__}."
        )
    mask = check_mask_of_tokens(mask, *shape_of(arguments), positions_in(arguments))
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask


def _after(module: PreTrainedModel, given: Any, output: Any) -> None:
    if module.config._attn_implementation == NAME:
        batch = batch_of_call()
        outer = None if batch is None else batch.outer
        # What a head was told is for one call of its base: the head may be interrupted after it.
        set_batch_of_call(None if outer is None else replace(outer, told={}))


# Earlier releases of transformers have only one kind.
_Quantized = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)


def _check_cache(cache: Cache, model: nn.Module) -> None:
    """Refuse caches that save memory on positions which the pattern never reads again.

    Raises:
        ValueError: Gradient checkpointing would drop the cache, but not the mask that counts on it.
        NotImplementedError: A quantised or an offloaded cache.
    """
    if model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules()):
        raise ValueError(
            "gradient checkpointing drops the cache of a model in training, got past_key_values="
            f"{type(cache).__name__}. Leave the cache out (use_cache=False), or call model.eval() "
            "first."
        )
    layers = getattr(cache, "layers", ())
    what = "an offloaded" if getattr(cache, "offloading", False) else None
    if any(isinstance(layer, _Quantized) for layer in layers):
        what = "a quantised"
    if what is not None:
        raise NotImplementedError(
            f"attn_implementation={NAME!r} takes no quantised and no offloaded cache, got {what} "
            f"{type(cache).__name__}. Use FixedCache(model.config), which is small and exact, or a "
            "DynamicCache or StaticCache as they are."
        )
