"""What transformers calls the cache of a model: past_key_values, and cache from 5.24 on.

`generate` passes it under that name, reads it from the outputs of a model under that name, and
warns of the other one.
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


def takes_either_name(forward: Forward) -> Forward:
    """Let a forward with an argument `past_key_values` take it as `cache` too, in every release.

    Raises:
        ValueError: Both are given.
    """

    @functools.wraps(forward)
    def with_one_name(*args: Any, **kwargs: Any) -> Any:
        if "cache" in kwargs:
            cache = kwargs.pop("cache")
            if cache is not None and kwargs.get("past_key_values") is not None:
                raise ValueError(
                    "past_key_values and cache are two names of one argument, got both. Give one."
                )
            if cache is not None:
                kwargs["past_key_values"] = cache
        return forward(*args, **kwargs)

    return with_one_name  # type: ignore[return-value]  # It takes one name more.
