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
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from colonnade.hf.batch import (
    NAMES,
    SAID,
    Batch,
    batch_of_call,
    check_mask_of_tokens,
    counted,
    positions_in,
    read_batch,
    refuse_unknown,
    set_batch_of_call,
    shape_of,
    tokens_of,
)
from colonnade.hf.cache import check_cache
from colonnade.hf.mask import PatternMask
from colonnade.hf.names import CACHE
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
        self, module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if module.config._attn_implementation != NAME:  # type: ignore[union-attr]  # Of a PreTrainedModel.
            return None
        outer = batch_of_call()
        call = dict(zip(self.names, given, strict=False)) | named
        told = {name: call[name] for name in NAMES if call.get(name) is not None}
        # The hook behind the call takes it away again.
        set_batch_of_call(Batch(outer=outer, told=told, is_read=False))
        for argument in call.values():
            if isinstance(argument, Cache):
                check_cache(argument, module)
        if call.get("output_attentions", getattr(module.config, "output_attentions", False)):
            raise NotImplementedError(
                f"attn_implementation={NAME!r} never forms the weights that output_attentions=True "
                "asks for. Leave it out; where you need weights, compute them from queries and "
                "keys under pattern.mask(seq_len)."
            )
        refuse_unknown({key: named[key] for key in named if key not in self.names})
        tokens = tokens_of(call)
        if getattr(module, "base_model", module) is not module or tokens is None:
            return None  # What is in it reads for itself.
        arguments = call
        if call.get("past_key_values") is None:
            arguments = call | {"past_key_values": call.get(CACHE)}
        if outer is not None and outer.told and not told:
            arguments = outer.told | arguments  # Some heads keep to themselves what they are told.
        said = (tokens, *map(arguments.get, SAID))
        if outer is not None and _is_same(outer.said, said):
            set_batch_of_call(replace(outer, outer=outer))
            return None
        batch, changes = self.read(arguments)
        said = (tokens, *map((arguments | changes).get, SAID))
        set_batch_of_call(replace(batch, outer=outer, said=said))
        return ((), call | changes) if changes else None

    def read(self, arguments: Mapping[str, Any]) -> tuple[Batch, dict[str, Any]]:
        """Return the batch, and arguments that say what the caller left open."""
        keeps = arguments.get("past_key_values") is not None or bool(arguments.get("use_cache"))
        padding = _padding(arguments)
        batch = read_batch(arguments, padding, keeps)
        changes: dict[str, Any] = {}
        if batch.begins is not None:
            if not keeps and "use_cache" in self.names:
                changes["use_cache"] = False
            if arguments.get("position_ids") is None and "position_ids" in self.names:
                changes["position_ids"] = counted(batch.begins, padding)
        return batch, changes


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
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        return None
    mask = check_mask_of_tokens(mask, *shape_of(arguments), positions_in(arguments))
    return None if not torch.compiler.is_compiling() and bool(mask.all()) else mask


def _after(module: nn.Module, given: Any, output: Any) -> None:
    if module.config._attn_implementation == NAME:  # type: ignore[union-attr]  # Of a PreTrainedModel.
        batch = batch_of_call()
        set_batch_of_call(None if batch is None else batch.outer)
