"""The two names of a model's cache: past_key_values, and since transformers 5.24 cache.

`generate` passes it under the name of its release, and reads it from a model's outputs under that
name; from 5.24 on it warns about the other one.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar

from transformers.masking_utils import create_causal_mask

Forward = TypeVar("Forward", bound=Callable[..., Any])

CACHE = next(
    name
    for name in ("cache", "past_key_values")
    if name in inspect.signature(create_causal_mask).parameters
)
"""The name in the installed release."""


def give_one_name(call: dict[str, Any]) -> None:
    """Let the arguments of a call have their cache as `past_key_values`, in place.

    Raises:
        ValueError: It is given under both names.
    """
    cache = call.pop("cache", None)
    if cache is not None:
        if call.get("past_key_values") is not None:
            raise ValueError(
                "past_key_values and cache are two names of one argument, got both. Give one."
            )
        call["past_key_values"] = cache


def takes_either_name(forward: Forward) -> Forward:
    """Let a forward with an argument `past_key_values` take it as `cache` too, in every release.

    Raises:
        ValueError: Both are given.
    """

    @functools.wraps(forward)
    def with_one_name(*args: Any, **kwargs: Any) -> Any:
        give_one_name(kwargs)
        return forward(*args, **kwargs)

    return with_one_name  # type: ignore[return-value]  # It takes one name more.
