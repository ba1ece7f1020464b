"""The environment variables that all backends share, and their folder for what is kept."""

from __future__ import annotations

import os
from pathlib import Path

SWITCH = {"1": True, "true": True, "yes": True, "on": True}
SWITCH |= {"0": False, "false": False, "no": False, "off": False}
"""Values of a variable that switches something, in any case."""


def is_on(variable: str, default: bool) -> bool:
    """Return what a variable switches; `default` where it is not set, or empty.

    Raises:
        ValueError: It is neither on nor off.
    """
    value = os.environ.get(variable, "")
    word = value.strip().lower()
    if not word:
        return default
    if word not in SWITCH:
        raise ValueError(f"{variable} must be 0 or 1, got {variable}={value!r}")
    return SWITCH[word]


def cache_folder() -> Path:
    """COLONNADE_CACHE, or colonnade in the user's folder for caches.

    Raises:
        RuntimeError: There is no home, or none of the user that ~ names.
    """
    if named := os.environ.get("COLONNADE_CACHE"):
        return Path(named).expanduser()
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "colonnade"
    )
