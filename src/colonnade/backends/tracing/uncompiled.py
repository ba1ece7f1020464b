"""Calls that a compiler does not follow."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch


@functools.cache
def caller_without_compiler() -> Callable[..., Any]:
    """Return a function that calls another one with its arguments, where no compiler follows.

    In a full graph that is an error, which says what to do. Ask for it before anything is traced:
    it loads the compiler.
    """
    caller: Callable[..., Any] = torch.compiler.disable(
        _call,
        reason="a cache with static=True is compiled for steps of one position, once it holds "
        "some. Call the model or layer uncompiled with a prompt, or compile without fullgraph=True",
    )
    return caller


def _call(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    return function(*arguments, **options)
