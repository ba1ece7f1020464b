"""Hooks that read what a model is called with, before it makes masks and attends.

transformers shows neither the mask function nor the attention function all arguments of a call, so
a hook has to look: at caches, and at whatever says where padding and documents are.
"""

from __future__ import annotations

import inspect
import operator
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, cache_utils
from transformers.cache_utils import Cache

from colonnade.backends.tracing.operation import is_mapped
from colonnade.hf.batch import (
    HANDED_ON,
    NAMES,
    SAID,
    ModelCall,
    check_mask_of_tokens,
    positions_in,
    refuse_unknown,
    running_call,
    set_running_call,
    shape_of,
    tokens_of,
)
from colonnade.hf.continued import has_documents, positions_behind, remember_end
from colonnade.hf.documents import counted, read_batch
from colonnade.hf.mask import PatternMask, masks_of_this_call
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
        told = {name: call[name] for name in HANDED_ON if call.get(name) is not None}
        running = ModelCall(module, told, outer, running_call(), _frame_of_call())
        set_running_call(running)  # The hook behind the call takes it away again.
        arguments = dict(call)
        give_one_name(arguments)
        # A model that does not know the newer name would swallow it.
        changed = "cache" in call and "cache" not in self.names
        call = dict(arguments) if changed else call
        for argument in call.values():
            if isinstance(argument, Cache):
                _check_cache(argument, module)
        cache = arguments.get("past_key_values")
        if cache is not None and not isinstance(cache, Cache):
            raise TypeError(
                f"past_key_values must be a Cache of transformers or a FixedCache, got a "
                f"{type(cache).__name__}."
            )
        running.cache = cache
        if call.get("output_attentions", getattr(module.config, "output_attentions", False)):
            raise NotImplementedError(
                f"attn_implementation={NAME!r} never forms the weights that output_attentions=True "
                "asks for. Leave it out; where you need weights, compute them from queries and "
                "keys under pattern.mask(seq_len)."
            )
        refuse_unknown({key: named[key] for key in named if key not in self.names})
        # What is in a head reads for itself.
        if getattr(module, "base_model", module) is module:
            kept = _kept_by_head(outer, arguments)
            arguments |= kept
            changes = self._read(running, arguments)
            if "position_ids" in kept and "position_ids" in self.names:
                changes.setdefault("position_ids", kept["position_ids"])
            changed |= bool(changes)
            call |= changes
        return ((), call) if changed else None

    def _read(self, running: ModelCall, arguments: dict[str, Any]) -> dict[str, Any]:
        """Read the batch of a call, and return arguments that say what the caller left open."""
        module, outer = running.model, running.outer
        tokens = tokens_of(arguments)
        if tokens is None:
            if unread := [name for name in NAMES if arguments.get(name) is not None]:
                raise NotImplementedError(
                    "arguments that say where documents begin need input_ids [batch, length] or "
                    f"inputs_embeds, got {unread} for a {type(module).__name__} without either."
                )
            return {}
        for name in SAID:
            if isinstance(given := arguments.get(name), Tensor) and is_mapped(given):
                raise NotImplementedError(
                    f"torch.vmap may map tokens, but nothing that says where padding and documents "
                    f"are, got a mapped {name}. Call the model with the whole batch."
                )
        said = (tokens, *map(arguments.get, SAID))
        if outer is not None and outer.batch is not None and _is_same(outer.batch.said, said):
            running.batch = outer.batch
            return {}
        cache, uses = arguments.get("past_key_values"), arguments.get("use_cache")
        if torch.compiler.is_compiling() and has_documents(cache):
            never = torch.zeros((), dtype=torch.bool, device=tokens.device)
            torch._assert_async(never, _COMPILED_BEHIND_DOCUMENTS)
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
        if isinstance(masks := arguments.get("attention_mask"), dict):
            running.batch = batch  # What masks are made of.
            changes["attention_mask"] = masks_of_this_call(masks)
        said = (tokens, *map((arguments | changes).get, SAID))
        running.batch = replace(batch, said=said)
        return changes


def _frame_of_call() -> FrameType | None:
    """Return the frame that runs the forward of a module and its hooks, from inside of a hook."""
    if torch.compiler.is_compiling():  # It sees no frames.
        return None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__") != nn.Module.__module__:
        frame = frame.f_back
    return frame


_COMPILED_BEHIND_DOCUMENTS = (
    "a compiled call cannot go on from a cache inside of which a document began. Call the model "
    "without compiling it, or begin with a new cache."
)


def _kept_by_head(outer: ModelCall | None, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a head was told about the tokens of a call, and kept to itself."""
    told = {} if outer is None else dict(outer.told)
    if any(arguments.get(name) is not None for name in NAMES):
        told = {"position_ids": told["position_ids"]} if "position_ids" in told else {}
    positions, tokens = told.pop("position_ids", None), tokens_of(arguments)
    if (
        isinstance(positions, Tensor)
        and arguments.get("position_ids") is None
        and tokens is not None
        # A head may put tokens of its own around those that it was called with.
        and positions.shape[-1:] == tokens.shape[1:2]
    ):
        told["position_ids"] = positions
    return told


def _call_around(module: nn.Module) -> ModelCall | None:
    """Return the call around that of a module, if it is one of a model that has it as a part."""
    outer = running_call()
    if outer is None or outer.model is module:
        return None
    if getattr(outer.model, "base_model", None) is module:
        return outer
    return outer if any(part is module for part in outer.model.modules()) else None


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
        if not all(isinstance(each, PatternMask) for each in mask.values()):
            kinds = sorted({type(each).__name__ for each in mask.values()})
            raise ValueError(
                "a dict as attention_mask must hold masks that create_masks_for_generate made, got "
                f"{kinds}. Pass a tensor [batch, positions]."
            )
        mask = next(iter(mask.values()), None)
    if isinstance(mask, PatternMask):  # Made ahead, of the caller's own.
        is_step = mask.cache is not None and mask.shape[2] == 1
        mask = mask.new if is_step and torch.compiler.is_compiling() else mask.given
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
    if module.config._attn_implementation != NAME:
        return
    running = running_call()
    if running is None or running.model is not module:
        return
    if running.batch is not None and running.batch.end is not None:
        # A cache that the model made itself is to be found in what it returns.
        parts = output.values() if isinstance(output, Mapping) else output
        for part in parts if isinstance(parts, Iterable) else ():
            if isinstance(part, Cache):
                remember_end(part, running.batch.end)
    set_running_call(running.before)


# Earlier releases of transformers have only one kind.
_Quantized = getattr(cache_utils, "BaseQuantizedLayer", cache_utils.QuantizedLayer)


def _check_cache(cache: Cache, model: PreTrainedModel) -> None:
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
    if not torch.compiler.is_compiling():
        _check_whole(cache, layers, model)
    what = "an offloaded" if getattr(cache, "offloading", False) else None
    if any(isinstance(layer, _Quantized) for layer in layers):
        what = "a quantised"
    if what is not None:
        raise NotImplementedError(
            f"attn_implementation={NAME!r} takes no quantised and no offloaded cache, got {what} "
            f"{type(cache).__name__}. Use FixedCache(model.config), which is small and exact, or a "
            "DynamicCache or StaticCache as they are."
        )


def _check_whole(cache: Cache, layers: Sequence[Any], model: PreTrainedModel) -> None:
    """Refuse a cache that an interrupted call left with more positions in its first layers.

    Raises:
        ValueError: It is such a cache.
    """
    # Some caches have more layers than their model.
    config = model.config.get_text_config(decoder=True)
    layers = layers[: getattr(config, "num_hidden_layers", None)]
    if len(layers) < 2 or any(type(layer) is not type(layers[0]) for layer in layers):
        return  # Those of several kinds may count in several ways.
    first, last = (int(layer.get_seq_length()) for layer in (layers[0], layers[-1]))
    if first != last:
        raise ValueError(
            f"all layers of a {type(cache).__name__} must hold the same positions, got {first} in "
            f"the first and {last} in the last. A call was interrupted: begin with a new cache."
        )
