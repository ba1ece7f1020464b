"""The sliding window that a layer of a model has by itself, as transformers configures it."""

from __future__ import annotations

from transformers import PreTrainedConfig

from colonnade.hf.settings import of_layer


def full_layers(config: PreTrainedConfig) -> list[int]:
    """Return the layers that have no sliding window; raises as `window_of` does."""
    layers = range(config.num_hidden_layers)
    return [layer for layer in layers if window_of(config, layer) is None]


def window_of(config: PreTrainedConfig, layer_idx: int) -> int | None:
    """Return the number of positions that a layer's sliding window has, the reading one included.

    `layer_types` names the layers with a window. A configuration without it has a window in every
    layer if `sliding_window` is set, and in none if not.

    Returns:
        The window; None if the layer reads every position so far.

    Raises:
        ValueError: The layer has a window, and nothing says how long it is.
        NotImplementedError: The layer is of another kind.
    """
    kinds = getattr(config, "layer_types", None)
    kind = None if kinds is None else kinds[layer_idx]
    if kind == "full_attention":
        return None
    if kind not in (None, "sliding_attention"):
        raise NotImplementedError(
            f"a layer must have full attention or a sliding window, got layer_types with {kind!r} "
            f"for layer {layer_idx}."
        )
    config = of_layer(config, layer_idx)
    chunk: int | None = getattr(config, "attention_chunk_size", None)
    if kind is None and chunk:
        raise NotImplementedError(
            "a layer must have full attention or a sliding window, got attention_chunk_size="
            f"{chunk}. Set model.config.attention_chunk_size=None if the model can do without."
        )
    window: int | None = getattr(config, "sliding_window", None)
    if kind is not None and window is None:
        raise ValueError(
            "a layer with a sliding window needs sliding_window in the configuration, got "
            f"sliding_window=None and layer_types with {kind!r} for layer {layer_idx}."
        )
    return window
