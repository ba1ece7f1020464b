"""Copies to devices without waiting, and results that stay on a device for later calls."""

from __future__ import annotations

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from colonnade.backends.tracing.memo import for_every_call

Made = TypeVar("Made")

WITH_STREAMS = ("cuda", "xpu")
"""Devices that run behind the host, by streams of work."""
KEPT = 128
"""Results that stay on devices: several for each plan of a call, and each length."""


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, without waiting for the device where that can be.

    What a later call uses too belongs to `kept_on_device`: its stream may be another one.
    """
    waits = tensor.device.type != "cpu" or device.type not in WITH_STREAMS
    if waits or torch.compiler.is_compiling():
        return tensor.to(device)
    # From pageable memory the host would wait.
    return tensor.pin_memory().to(device, non_blocking=True)


def is_capturing(device: torch.device) -> bool:
    """Whether work for a device goes into a graph, and none of it runs."""
    if device.type not in WITH_STREAMS:
        return False
    module = torch.get_device_module(device)
    asks = getattr(module, "is_current_stream_capturing", None)
    return asks is not None and bool(asks())


@functools.lru_cache(maxsize=KEPT)
def _sent(device: torch.device, make: Callable[..., Any], *arguments: Any) -> _Sent:
    return _Sent(make, arguments, device)


def kept_on_device(device: torch.device, make: Callable[..., Made], *arguments: Any) -> Made:
    """Return what `make` makes of hashable arguments, on a device; it is kept for the next call.

    `make` runs on the CPU and gives tensors, or a tuple of tensors and numbers.

    Raises:
        NotImplementedError: It is not there yet, and a graph is being captured.
    """
    made: Made = _sent(device, make, *arguments).for_current_stream()
    return made


class _Sent:
    """A result on its way to a device, which every stream of the device may then use."""

    def __init__(
        self, make: Callable[..., Any], arguments: tuple[Any, ...], device: torch.device
    ) -> None:
        self.device = device
        if is_capturing(device):
            raise NotImplementedError(
                "lists of indices for these lengths cannot be sent to the device while a graph is "
                "captured. Make the same call once before the capture."
            )
        with for_every_call(), torch.device("cpu"):
            made = make(*arguments)
            self.made = tree_map_only(Tensor, partial(on_device, device=device), made)
        if device.type in WITH_STREAMS:
            stream = torch.get_device_module(device).current_stream(device)
            self.streams, self.arrival = {stream}, stream.record_event()

    def for_current_stream(self) -> Any:
        """Return the result; what the current stream does from now on comes after its arrival."""
        if self.device.type not in WITH_STREAMS:
            return self.made
        if is_capturing(self.device):
            # It has arrived: a capture begins by waiting for the device. From now on a graph knows
            # its address, and nobody is told how long that graph lives.
            _IN_GRAPHS.add(self)
            return self.made
        stream = torch.get_device_module(self.device).current_stream(self.device)
        if stream not in self.streams:
            stream.wait_event(self.arrival)
            for tensor in tree_leaves(self.made):
                if isinstance(tensor, Tensor):
                    tensor.record_stream(stream)
            self.streams.add(stream)
        return self.made


_IN_GRAPHS: set[_Sent] = set()
"""Results whose addresses a captured graph holds; they are never let go."""
