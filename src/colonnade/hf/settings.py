"""The pattern that each layer of a model reads, from the model's configuration.

Any configuration may have these settings, for all layers or in `per_layer_config`:
colonnade_stride, colonnade_summary, colonnade_subblocks, colonnade_pattern and colonnade_scheme.
"""

from __future__ import annotations

from collections.abc import Callable

from transformers import PreTrainedConfig

from colonnade.ops.heads import Patterns
from colonnade.pattern import FixedPattern, FullPattern, LocalPattern, Pattern, StridedPattern

NAME = "colonnade"
"""The attn_implementation under which transformers finds our functions."""
SCHEMES = ("merged", "interleaved", "multihead")
"""The three ways to use a factorization (Child et al. 2019, section 5.1)."""


def of_layer(config: PreTrainedConfig, layer_idx: int) -> PreTrainedConfig:
    """Return the configuration of one layer; the whole one if layers have none of their own."""
    if getattr(config, "is_heterogeneous", False):
        return config.per_layer_config[layer_idx]
    return config


def has_settings(config: PreTrainedConfig) -> bool:
    """Whether the configuration itself, and not one inside of it, has our settings."""
    return getattr(of_layer(config, 0), "colonnade_stride", None) is not None


def patterns_of(config: PreTrainedConfig, layer_idx: int) -> Patterns:
    """Return the pattern that layer `layer_idx` of a model reads, or one for each head group.

    Raises:
        ValueError: The configuration lacks `colonnade_stride` or `colonnade_summary`, or the
            pattern that it asks for does not exist.
    """
    config = of_layer(config, layer_idx)
    stride = getattr(config, "colonnade_stride", None)
    summary = getattr(config, "colonnade_summary", None)
    if stride is None or summary is None:
        raise ValueError(
            f"attn_implementation={NAME!r} needs colonnade_stride and colonnade_summary, which "
            f"this {type(config).__name__} does not have. Use colonnade.hf.retrofit(model, "
            "stride=…, summary=…), or colonnade.hf.load for a model that was saved after it."
        )
    kind = getattr(config, "colonnade_pattern", "fixed")
    scheme = getattr(config, "colonnade_scheme", "merged")
    subblocks = getattr(config, "colonnade_subblocks", 1)
    patterns: dict[str, Callable[[], Pattern]] = {
        "fixed": lambda: FixedPattern(stride, summary, subblocks),
        "strided": lambda: StridedPattern(stride),
        "local": lambda: LocalPattern(stride),
        "full": FullPattern,
    }
    if kind not in patterns:
        raise ValueError(f"pattern must be one of {list(patterns)}, got pattern={kind!r}.")
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {SCHEMES}, got scheme={scheme!r}.")
    pattern = patterns[kind]()
    if scheme == "merged":
        return pattern
    if not isinstance(pattern, FixedPattern | StridedPattern):
        raise ValueError(
            f"scheme must be 'merged' for a pattern without factors, "
            f"got scheme={scheme!r} and pattern={kind!r}."
        )
    factors = pattern.factors()
    return factors[layer_idx % len(factors)] if scheme == "interleaved" else factors
