"""Results that were worked out from a tensor's contents, kept until the contents change."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

Result = TypeVar("Result")

KEPT = 8
"""Results that each function keeps: those of the layers of one step, or of a few in turn."""


def is_tracing() -> bool:
    """Whether something records operations or runs them in its own way, with its own lengths."""
    return torch.compiler.is_compiling() or is_in_torch_dispatch_mode()


def remembered(make: Callable[..., Result]) -> Callable[..., Result]:
    """Let a function of a tensor (and of hashable arguments) keep its last results.

    All layers of a step are handed the same tensor, such as cu_seqlens. On a CPU it is recognised
    by its contents, so that edits through NumPy are seen as well. On a device, where a look would
    synchronise, it is recognised by being the same object in the same version, and by its contents
    only where it has no version, in inference mode.
    """
    known: list[_Known[Result]] = []

    @functools.wraps(make)
    def call(tensor: Tensor, *arguments: Any) -> Result:
        if is_tracing():
            return make(tensor, *arguments)
        for each in tuple(known):
            if each.arguments == arguments and each.came_from(tensor):
                return each.result
        # Whatever mode the first call is in, the result serves calls in every other mode.
        with torch.inference_mode(False):
            result = make(tensor, *arguments)
            known.insert(0, _Known(tensor, arguments, result))
        del known[KEPT:]
        return result

    return call


class _Known(Generic[Result]):
    """One result, and what is needed to recognise the tensor that it came from."""

    def __init__(self, tensor: Tensor, arguments: tuple[Any, ...], result: Result) -> None:
        self.arguments = arguments
        self.result = result
        self.contents: Tensor | None = None
        if tensor.device.type == "cpu" or tensor.is_inference():
            self.contents = tensor.detach().clone()
        else:
            self.tensor = weakref.ref(tensor)
            self.version = tensor._version

    def came_from(self, tensor: Tensor) -> bool:
        """Whether the result is that of `tensor` as it is now."""
        then = self.contents
        if then is None:
            return self.tensor() is tensor and self.version == tensor._version
        return (
            (then.device, then.dtype, then.shape) == (tensor.device, tensor.dtype, tensor.shape)
            and (then.device.type == "cpu" or tensor.is_inference())
            and torch.equal(then, tensor)
        )
