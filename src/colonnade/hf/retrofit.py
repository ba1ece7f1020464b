"""Give a transformers model that you have already fixed attention, through its configuration.

The weights stay as they are and no module is replaced, so expect to fine-tune. With `layers=[]`
the model gives what it gave before.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import SupportsIndex, TypeVar

from transformers import PreTrainedConfig, PreTrainedModel

from colonnade.hf.check import check_model
from colonnade.hf.checkpoint import write_name
from colonnade.hf.integers import as_int
from colonnade.hf.settings import NAME, of_layer, write_patterns
from colonnade.hf.windows import window_of
from colonnade.ops.heads import Patterns, check_patterns
from colonnade.pattern import FixedPattern, FullPattern, LocalPattern

Model = TypeVar("Model", bound=PreTrainedModel)


def retrofit(
    model: Model,
    stride: int | None = None,
    summary: int | None = None,
    subblocks: int = 1,
    layers: Iterable[SupportsIndex] | None = None,
    *,
    sinks: int = 0,
    patterns: Mapping[int, Patterns] | None = None,
) -> Model:
    """Give layers of a loaded causal model the pattern S_i = A1_i ∪ A2_i; see `FixedPattern`.

    This works for transformers models that attend through the attention interface, such as Llama,
    Qwen, Mistral, Gemma 3, gpt-oss, GPT-2 and GPT-NeoX; of a vision-language model the text decoder
    alone changes.
    The settings and the name of the attention are written into `model.config` and saved with it, so
    after `import colonnade.hf` whatever loads the checkpoint gives fixed attention.
    `set_attn_implementation` changes the model in memory alone, not what is saved of it. For the
    small cache, pass `past_key_values=FixedCache(model.config)` to `generate`.

    The layers that get no pattern attend as they always did, through the same attention function:
    to everything, or within their sliding window. A second call begins with the model as it was
    before the first one.

    Args:
        model: The model, which is changed in place.
        stride: Length l of a block, in tokens.
        summary: Number c of columns of every block that all later positions read.
        subblocks: Number of sub-blocks; key/value head h reads the summary columns of sub-block
            h mod subblocks.
        layers: Indices of the layers that get the pattern, integers of any kind. All layers with
            full attention if None. A layer with a sliding window keeps it.
        sinks: Number of positions at the start of a sequence that all later positions read.
        patterns: Instead of all these, the pattern of each layer that gets one, by its index: a
            merged FixedPattern or StridedPattern, a LocalPattern or a FullPattern; or a tuple of
            them, one for each group of key heads, as `nn.SelfAttention` takes it.

    Returns:
        `model`.

    Raises:
        TypeError: `model` is not a transformers model, a count is not an integer, or there are
            neither `stride` and `summary` nor `patterns`.
        ValueError: The pattern does not exist or cannot be written into a configuration, the model
            lacks a layer in `layers` or `patterns`, `patterns` come with other arguments, or the
            model is a Sparse Transformer, which has a pattern already.
        NotImplementedError: A layer with a sliding window is to get another pattern, or no layer
            is without one; or the model attends in a way that has no pattern here (in chunks, with
            capped scores, cross-attention, both directions), looks into its mask, or does not
            attend through transformers' attention interface.
    """
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers model, got a {type(model).__name__}. Retrofit before "
            "you wrap it, in a PEFT model for example."
        )
    usual = _usual_pattern(stride, summary, subblocks, layers, sinks, patterns)
    config = model.config.get_text_config(decoder=True)
    check_model(model, config)
    windows = [window_of(config, layer) for layer in range(config.num_hidden_layers)]
    own: list[Patterns] = [FullPattern() if w is None else LocalPattern(w) for w in windows]
    chosen = _chosen(usual, layers, patterns, windows)
    for layer, pattern in chosen.items():
        _check_heads(of_layer(config, layer), pattern, layer)
    _check_windows(chosen, own)
    write_patterns(config, [chosen.get(layer, own[layer]) for layer in range(len(own))], usual)
    inside = [key for key in model.config.sub_configs if getattr(model.config, key, None) is config]
    model.set_attn_implementation({inside[0]: NAME} if inside else NAME)
    write_name(model.config)
    # An adapter that is trained on this model must not name the dense checkpoint as its base.
    model.name_or_path = ""
    return model


def _usual_pattern(
    stride: int | None,
    summary: int | None,
    subblocks: int,
    layers: Iterable[SupportsIndex] | None,
    sinks: int,
    patterns: Mapping[int, Patterns] | None,
) -> FixedPattern | None:
    """Return the one pattern that is asked for; None if each layer has its own."""
    if patterns is None:
        if stride is None or summary is None:
            raise TypeError(
                "retrofit needs stride and summary, or patterns, got "
                f"stride={stride} and summary={summary}."
            )
        return FixedPattern(stride, summary, subblocks, sinks=sinks)
    others = {"stride": stride, "summary": summary, "layers": layers}
    given = {name: value for name, value in others.items() if value is not None}
    given |= {"subblocks": subblocks} if subblocks != 1 else {}
    given |= {"sinks": sinks} if sinks != 0 else {}
    if given:
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise ValueError(
            f"patterns say everything about each layer, so nothing else may, got patterns and "
            f"{shown}. Put it into the patterns."
        )
    if not isinstance(patterns, Mapping):
        raise TypeError(
            f"patterns must be a dict of layer indices and patterns, got a "
            f"{type(patterns).__name__}."
        )
    return None


def _chosen(
    usual: Patterns | None,
    layers: Iterable[SupportsIndex] | None,
    patterns: Mapping[int, Patterns] | None,
    windows: Sequence[int | None],
) -> dict[int, Patterns]:
    """Return the patterns that are asked for, by layer."""
    name, named = "layers", layers
    if patterns is not None:
        name, named = "patterns", patterns
    elif layers is None:
        named = [layer for layer, window in enumerate(windows) if window is None]
        if not named:
            raise NotImplementedError(
                f"every layer has a sliding window, got sliding_window={windows[0]}, and such "
                "layers stay as they are. Set model.config.sliding_window=None if the model can "
                "do without; layers=[] has it run as it is."
            )
    assert named is not None, "one of them is given"
    indices = [_layer_index(layer, name) for layer in named]
    if any(layer not in range(len(windows)) for layer in indices):
        raise ValueError(
            f"{name} must be in [0, num_hidden_layers), got {name}={indices} and "
            f"num_hidden_layers={len(windows)}."
        )
    if usual is not None:
        return dict.fromkeys(indices, usual)
    assert patterns is not None, "one of the two is given"
    if len(set(indices)) < len(indices):
        raise ValueError(f"patterns must name a layer once, got layers {indices}.")
    return dict(zip(indices, patterns.values(), strict=True))


def _check_windows(chosen: Mapping[int, Patterns], own: Sequence[Patterns]) -> None:
    """Refuse another pattern for a layer with a sliding window: its mask hides what is outside."""
    for layer, pattern in chosen.items():
        if isinstance(own[layer], LocalPattern) and pattern != own[layer]:
            full = [index for index, each in enumerate(own) if isinstance(each, FullPattern)]
            raise NotImplementedError(
                "a layer with a sliding window keeps it, for the model hides from it what is "
                f"outside, got {pattern} for layer {layer}, which has {own[layer]}. Name layers "
                f"with full attention, here {full}."
            )


def _check_heads(config: PreTrainedConfig, patterns: Patterns, layer: int) -> None:
    """Refuse what is no pattern, or more of them than the layer has key heads."""
    # Of a model that names its heads otherwise, the attention says it.
    most = len(patterns) if isinstance(patterns, tuple) else 1
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        most = heads if isinstance(heads, int) else most
    try:
        check_patterns(patterns, most)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{error} It stands in patterns for layer {layer}.") from None


def _layer_index(layer: SupportsIndex, name: str) -> int:
    """Return an integer of Python, NumPy or PyTorch as an int; a bool is none."""
    index = as_int(layer)
    if index is None:
        raise TypeError(f"layers must be integers, got {layer!r} in {name}.")
    return index
