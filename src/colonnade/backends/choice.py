"""The choice of the backend that runs a call, and its reasons."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from colonnade.backends import eager, native, reference, triton
from colonnade.backends.call import Call
from colonnade.backends.tracing.autocast import without_autocast
from colonnade.backends.tracing.constant import constant_when_compiled
from colonnade.backends.tracing.operation import has_tangent, is_functionalized
from colonnade.shapes import Key, LogSumExp, Output, Query, Value


@runtime_checkable
class Backend(Protocol):
    """The three functions that make a module or folder here a backend."""

    def reason_unusable(self, build: bool = True) -> str | None:
        """Return why it runs nothing in this process, as a clause after its name; None: it runs.

        It is built first where that is needed, unless `build` is False.
        """

    def reason_declined(self, query: Tensor, key: Tensor, value: Tensor, call: Call) -> str | None:
        """Return why it does not take this call, as a clause after its name; None: it does."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, call: Call
    ) -> tuple[Tensor, Tensor | None]:
        """Compute output and log-sum-exp; the latter may be None only where nobody asked for it."""


BACKENDS: dict[str, Backend] = {
    "native": native,
    "triton": triton,
    "eager": eager,
    "reference": reference,
}
"""In the order in which "auto" tries them."""
BY_NAME_ALONE = {"triton": triton.reason_by_name_alone}
"""Those that "auto" leaves out on some devices, with a function that says why, or None."""

SKIP_UNMARKED = ("native",)
"""Those that do not touch keys which a mask leaves out; the others multiply them by 0."""


def run(
    query: Query, key: Key, value: Value, call: Call, backend: str
) -> tuple[Output, LogSumExp | None]:
    """Run a call in the backend that `choose` finds for it: the one door to every kernel."""
    chosen = BACKENDS[choose(query, key, value, call, backend)]
    call = call._replace(dropout=call.dropout.drawn(query.device))
    # Inside, float32 means float32: autocast would run the products in half precision after all.
    with without_autocast(query.device.type):
        return chosen.attend(query, key, value, call)


def choose(query: Query, key: Key, value: Value, call: Call, backend: str) -> str:
    """Return the name of the backend that runs: the one asked for, or the first that takes a call.

    Raises:
        TypeError, ValueError: See `check_backend`.
        NotImplementedError: The named backend does not take the call.
    """
    check_backend(backend)
    if backend == "auto":
        return _first_that_takes(query, key, value, call)
    declined = _reason_declined(backend, query, key, value, call)
    if declined is not None:
        other = _first_that_takes(query, key, value, call)
        raise NotImplementedError(f"backend {backend!r} {declined}. Use backend={other!r}.")
    return backend


def _first_that_takes(query: Query, key: Key, value: Value, call: Call) -> str:
    for name in BACKENDS:
        declined = _reason_declined(name, query, key, value, call)
        if declined is None and name in BY_NAME_ALONE:
            declined = BY_NAME_ALONE[name](query.device)
        if declined is None:
            return name
    raise AssertionError("the reference takes everything")


def _reason_declined(name: str, query: Query, key: Key, value: Value, call: Call) -> str | None:
    """Return why a backend does not take a call, or None if it does."""
    if name != "reference":  # It is plain PyTorch, which every mode knows.
        # Outside of every dual level, which is nearly always, there is nothing to look at.
        if forward_ad._current_level >= 0 and has_tangent(query, key, value):
            return "has no derivatives in forward mode, and one was asked for"
        if torch._C._are_functorch_transforms_active():
            if torch.compiler.is_compiling():
                return "runs in torch.func's transformations, but not where they are compiled"
            if is_functionalized() and torch._C._functorch.get_dynamic_layer_stack_depth() > 1:
                return "runs in torch.func.functionalize, but not together with other transforms"
        if torch.compiler.is_compiling() and _is_for_onnx():
            return "is made of operations that ONNX does not have"
    return BACKENDS[name].reason_declined(query, key, value, call)


@constant_when_compiled  # A compiler would take the question itself for False.
def _is_for_onnx() -> bool:
    return torch.onnx.is_in_onnx_export()


def check_backend(backend: str) -> None:
    """Refuse anything but "auto" and the names of backends."""
    if not isinstance(backend, str):
        raise TypeError(f"backend must be a str, got backend={backend!r}.")
    if backend != "auto" and backend not in BACKENDS:
        names = ["auto", *sorted(BACKENDS)]
        raise ValueError(f"backend must be one of {names}, got backend={backend!r}.")


def backends(build: bool = True) -> dict[str, str | None]:
    """Return each backend's name with the reason why it is not usable here, None if it is.

    Args:
        build: Compile "native" if it never was compiled. Only then it is known for sure.
    """
    return {name: BACKENDS[name].reason_unusable(build) for name in sorted(BACKENDS)}


@dataclass(frozen=True)
class Explanation:
    """The backend that runs for some inputs, and the reasons.

    Attributes:
        backend: Name of the backend that runs.
        others: Each other backend with the reason why it does not run.
    """

    backend: str
    others: dict[str, str]

    def __str__(self) -> str:
        lines = [f"{name} does not run: {why}." for name, why in self.others.items()]
        return "\n".join([f"{self.backend} runs.", *lines])


def explain_call(
    query: Query, key: Key, value: Value, call: Call, backend: str = "auto"
) -> Explanation:
    """Name the backend that runs a call, and say why each other one does not."""
    chosen = choose(query, key, value, call, backend)
    others = {}
    for name in BACKENDS:
        if name != chosen:
            why = _reason_declined(name, query, key, value, call)
            asked = f"{chosen} comes first" if backend == "auto" else f"{chosen} was asked for"
            if why is None and name in BY_NAME_ALONE:
                why = BY_NAME_ALONE[name](query.device)
            others[name] = f"it {why}" if why else f"{asked} and takes these inputs"
    return Explanation(chosen, others)
