"""Functions that a compiler calls while it traces, instead of tracing them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])


def constant_when_compiled(function: Function) -> Function:
    """Mark a function whose result a compiled graph may keep, for arguments that are constants.

    torch.compiler.assume_constant_result does this too, but loads all of torch._dynamo.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
