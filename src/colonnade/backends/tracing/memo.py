"""Results that were worked out from a tensor's contents, kept until the contents change."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor

from colonnade.backends.tracing.operation import contents, is_tracing

Result = TypeVar("Result")

KEPT = 8
"""Results that each function keeps: those of the layers of one step, or of a few in turn."""


PINNED = ("cuda", "xpu")
"""Devices to which a copy out of pinned memory goes on by itself."""


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, without waiting for the device where that can be."""
    pins = tensor.device.type == "cpu" and device.type in PINNED
    if not pins or torch.compiler.is_compiling():
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


@contextmanager
def for_every_call() -> Iterator[None]:
    """Make tensors that serve every other call, whatever the call that makes them is under.

    That is inference mode, or a transformation of torch.func, which wraps what is made inside of it
    in tensors that are of no use after it.
    """
    with torch.inference_mode(False), torch._C._DisableFuncTorch():
        yield


def remembered(make: Callable[..., Result]) -> Callable[..., Result]:
    """Let a function of a tensor (and of hashable arguments) keep its last results.

    All layers of a step are handed the same tensor, such as cu_seqlens. On a CPU it is recognised
    by its contents, so that edits through NumPy are seen as well. On a device, where a look would
    synchronise, it is recognised by being the same object in the same version, and by its contents
    only where it has no version, in inference mode.
    """
    known: list[tuple[Callable[[Tensor], bool], tuple[Any, ...], Result]] = []

    @functools.wraps(make)
    def call(tensor: Tensor, *arguments: Any) -> Result:
        plain = None if is_tracing() else contents(tensor)
        if plain is None:
            return make(tensor, *arguments)
        for is_it, of_arguments, result in tuple(known):
            if of_arguments == arguments and is_it(plain):
                return result
        with for_every_call():
            result = make(plain, *arguments)
            known.insert(0, (_recogniser(plain), arguments, result))
        del known[KEPT:]
        return result

    return call


def _recogniser(tensor: Tensor) -> Callable[[Tensor], bool]:
    """Return a function that tells whether a tensor is this one, as it is now."""
    sizes = tensor.device, tensor.dtype, tensor.shape
    if tensor.device.type == "cpu" or tensor.is_inference():
        contents = tensor.detach().clone()
        return lambda other: (
            (other.device, other.dtype, other.shape) == sizes
            and (other.device.type == "cpu" or other.is_inference())
            and torch.equal(contents, other)
        )
    reference, version = weakref.ref(tensor), tensor._version
    return lambda other: reference() is other and other._version == version
