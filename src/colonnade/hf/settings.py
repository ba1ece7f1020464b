"""The settings that say which pattern each layer of a model reads, in the model's configuration.

Any configuration may have them, for all layers or in `per_layer_config`; nothing else reads or
writes them:

- colonnade_pattern: "fixed" (if it is missing), "strided", "local" or "full";
- colonnade_stride, colonnade_summary, colonnade_subblocks: as of `FixedPattern`;
- colonnade_window: that of "local"; the stride, if it is missing;
- colonnade_sinks: the first positions, which "fixed" and "local" let everybody read;
- colonnade_scheme: how a layer uses the two factors of "fixed" or "strided";
- colonnade_heads: a list with the settings of each group of key heads, without their prefix, where
  they differ from those of the layer.

A setting of another name that begins like these is refused: a later version wrote it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedConfig

from colonnade.ops.heads import Patterns
from colonnade.pattern import (
    FixedPattern,
    FullPattern,
    LocalPattern,
    Pattern,
    StridedPattern,
    check_count,
)

NAME = "colonnade"
"""The attn_implementation under which transformers finds our functions."""
SCHEMES = ("merged", "interleaved", "multihead")
"""The three ways to use a factorization (Child et al. 2019, section 5.1)."""

_PREFIX = f"{NAME}_"
_OF_HEADS = ("pattern", "stride", "summary", "subblocks", "window", "sinks")
"""The settings that head groups may have of their own."""
_KNOWN = (*_OF_HEADS, "scheme", "heads")
_NEEDED = {
    "fixed": ("stride", "summary"),
    "strided": ("stride",),
    "local": ("window",),
    "full": (),
}
"""The patterns that there are, and the settings that each of them cannot do without."""


def of_layer(config: PreTrainedConfig, layer_idx: int) -> PreTrainedConfig:
    """Return the configuration of one layer; the whole one if layers have none of their own."""
    if getattr(config, "is_heterogeneous", False):
        return config.per_layer_config[layer_idx]
    return config


def has_settings(config: PreTrainedConfig) -> bool:
    """Whether the configuration itself, and not one inside of it, has our settings."""
    first = of_layer(config, 0)
    names = "stride", "pattern", "heads"
    return any(getattr(first, f"{_PREFIX}{name}", None) is not None for name in names)


def patterns_of(config: PreTrainedConfig, layer_idx: int) -> Patterns:
    """Return the pattern that layer `layer_idx` of a model reads, or one for each head group.

    Raises:
        TypeError: A setting is not of the type that it has to be.
        ValueError: The configuration lacks a setting that the pattern needs, the pattern that it
            asks for does not exist, or it has a setting that this version does not know.
    """
    config = of_layer(config, layer_idx)
    unknown = [
        name
        for name in vars(config)
        if name.startswith(_PREFIX) and name.removeprefix(_PREFIX) not in _KNOWN
    ]
    if unknown:
        known = ", ".join(f"{_PREFIX}{name}" for name in _KNOWN)
        raise ValueError(
            f"this version of colonnade knows the settings {known} only, got {unknown}. A later "
            "version may have written them: install that one."
        )
    found = {name: getattr(config, f"{_PREFIX}{name}", None) for name in _KNOWN}
    settings = {name: value for name, value in found.items() if value is not None}
    scheme = settings.get("scheme", "merged")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {SCHEMES}, got scheme={scheme!r}.")
    if (heads := settings.get("heads")) is not None:
        if scheme != "merged":
            raise ValueError(
                "scheme must be 'merged' where head groups have patterns of their own, got "
                f"scheme={scheme!r} and heads={heads!r}."
            )
        return tuple(_read(each, type(config).__name__) for each in _of_groups(heads, settings))
    pattern = _read(settings, type(config).__name__)
    if scheme == "merged":
        return pattern
    if not isinstance(pattern, FixedPattern | StridedPattern):
        raise ValueError(
            f"scheme must be 'merged' for a pattern without factors, "
            f"got scheme={scheme!r} and pattern={settings['pattern']!r}."
        )
    factors = pattern.factors()
    return factors[layer_idx % len(factors)] if scheme == "interleaved" else factors


def _of_groups(heads: Any, settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the settings of each head group: its own, and those of the layer."""
    is_list = isinstance(heads, list | tuple) and heads
    if not is_list or not all(isinstance(each, Mapping) for each in heads):
        raise ValueError(
            f"{_PREFIX}heads must be a list with a dict for each group of key heads, at least one, "
            f"got {_PREFIX}heads={heads!r}."
        )
    if unknown := sorted({name for each in heads for name in each if name not in _OF_HEADS}):
        raise ValueError(
            f"a dict in {_PREFIX}heads may have the settings {', '.join(_OF_HEADS)}, got {unknown}."
        )
    given = [{name: value for name, value in each.items() if value is not None} for each in heads]
    return [{**settings, **each} for each in given]


def _read(settings: Mapping[str, Any], owner: str) -> Pattern:
    """Return the pattern that settings without their prefix ask for."""
    kind = settings.get("pattern", "fixed")
    if kind not in list(_NEEDED):
        raise ValueError(f"pattern must be one of {list(_NEEDED)}, got pattern={kind!r}.")
    values = {"window": settings.get("stride"), "subblocks": 1, "sinks": 0, **settings}
    if any(values.get(name) is None for name in _NEEDED[kind]):
        names = " and ".join(f"{_PREFIX}{name}" for name in _NEEDED[kind])
        raise ValueError(
            f"attn_implementation={NAME!r} needs {names} for pattern={kind!r}, which this {owner} "
            f"does not have. Use {NAME}.hf.retrofit(model, stride=…, summary=…), or "
            f"{NAME}.hf.load for a model that was saved after it."
        )
    sinks = values["sinks"]
    check_count("sinks", sinks, minimum=0)
    if kind == "fixed":
        return FixedPattern(values["stride"], values["summary"], values["subblocks"], sinks=sinks)
    if kind == "local":
        return LocalPattern(values["window"], sinks=sinks)
    if kind == "strided" and sinks != 0:
        raise ValueError(
            f"sinks must be 0 for pattern='strided', which has none, got sinks={sinks}. Use "
            f"pattern='fixed' or pattern='local', or set {_PREFIX}sinks=0 for this layer."
        )
    return StridedPattern(values["stride"]) if kind == "strided" else FullPattern()


def write_patterns(
    config: PreTrainedConfig, patterns: Sequence[Patterns], usual: Patterns | None = None
) -> None:
    """Write the pattern of each layer into a configuration, in place of what was written before.

    The settings of the usual pattern go to the configuration itself, and those of other layers into
    `per_layer_config`, whose other settings stay.

    Args:
        config: The configuration.
        patterns: One pattern for each layer, or a tuple of them for its head groups.
        usual: The pattern whose settings are those of all layers. If no layer has it, that is the
            most frequent one, of those that all heads of a layer share.

    Raises:
        ValueError: The settings cannot express a pattern.
    """
    if usual is None or usual not in patterns:
        plain = [each for each in patterns if not isinstance(each, tuple)]
        usual = Counter(plain or patterns).most_common(1)[0][0]
    of_layers = [as_settings(each) for each in patterns]
    names = {name for each in of_layers for name in each}
    # What layers differ in, the configuration has to have too.
    of_all = {name: None for name in _KNOWN if name in names} | as_settings(usual)
    others = config.to_dict().get("per_layer_config") or {}
    config.per_layer_config = None
    for name in _KNOWN:
        if hasattr(config, f"{_PREFIX}{name}"):
            delattr(config, f"{_PREFIX}{name}")
    config.update(_prefixed(of_all))
    overrides: dict[int | str, dict[str, Any]] = {
        int(layer): {name: value for name, value in each.items() if not name.startswith(_PREFIX)}
        for layer, each in others.items()
    }
    for layer, settings in enumerate(of_layers):
        if of_all.get("heads") is not None:
            settings.setdefault("heads", None)
        own = {name: value for name, value in settings.items() if of_all[name] != value}
        overrides.setdefault(layer, {}).update(_prefixed(own))
    # None, not {}: a configuration without overrides is not heterogeneous.
    config.per_layer_config = {layer: each for layer, each in overrides.items() if each} or None


def _prefixed(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {f"{_PREFIX}{name}": value for name, value in settings.items()}


def as_settings(patterns: Patterns) -> dict[str, Any]:
    """Return the settings, without their prefix, that ask for a pattern or for one of each group.

    Raises:
        ValueError: The settings cannot express it.
    """
    if isinstance(patterns, tuple):
        return {"heads": [as_settings(each) for each in patterns]}
    settings: dict[str, Any] = {}
    if isinstance(patterns, FixedPattern):
        settings = {
            "pattern": "fixed",
            "stride": patterns.stride,
            "summary": patterns.summary,
            "subblocks": patterns.subblocks,
            "sinks": patterns.sinks,
        }
    elif isinstance(patterns, StridedPattern):
        settings = {"pattern": "strided", "stride": patterns.stride, "sinks": 0}
    elif isinstance(patterns, LocalPattern):
        settings = {"pattern": "local", "window": patterns.window, "sinks": patterns.sinks}
    elif isinstance(patterns, FullPattern):
        settings = {"pattern": "full"}
    if not settings or _read(settings, "model") != patterns:
        raise ValueError(
            "the settings of a model express causal patterns that are fixed (merged), strided "
            f"(merged), local or full, got {patterns}."
        )
    return settings
