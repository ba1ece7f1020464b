"""Which models of transformers may have a pattern: what they are is read off their source."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache

from transformers import PreTrainedConfig, PreTrainedModel

from colonnade.hf.settings import of_layer


def check_model(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Refuse a model whose layers cannot have a pattern.

    Args:
        model: The model.
        config: The configuration of its text decoder.

    Raises:
        ValueError: It is a Sparse Transformer.
        NotImplementedError: It attends in a way that has no fixed pattern.
    """
    name = type(model).__name__
    if config.model_type == "sparse_transformer":
        raise ValueError(
            f"{name} has a fixed pattern already. Set stride, summary and subblocks in its "
            "configuration instead."
        )
    # The decoder of a composite model is a model of its own, with the configuration of the text.
    decoders = [
        each
        for each in model.modules()
        if isinstance(each, PreTrainedModel) and each.config is config
    ]
    if not all(
        each._supports_attention_backend and each._can_set_attn_implementation()
        for each in decoders
    ):
        decoders = []
    layers = [each for decoder in decoders for each in decoder.modules() if _attends(type(each))]
    if not layers:
        raise NotImplementedError(
            f"a model must attend through transformers' attention interface, which {name} does "
            "not, so its pattern cannot be changed."
        )
    crosses = ("is_encoder_decoder", "add_cross_attention", "cross_attention_layers")
    if any(getattr(config, setting, None) for setting in crosses):
        raise NotImplementedError(
            f"a fixed pattern is for causal decoders, got {name}, which has cross-attention."
        )
    for layer in layers:
        if not getattr(layer, "is_causal", True):
            raise NotImplementedError(
                f"a fixed pattern is for causal decoders, got {name}, whose "
                f"{type(layer).__name__} reads in both directions."
            )
        if _looks_into_mask(type(layer)):
            raise NotImplementedError(
                f"a layer must pass its mask on as it is, got {name}, whose "
                f"{type(layer).__name__} looks into it."
            )
    for index in range(config.num_hidden_layers):
        if cap := getattr(of_layer(config, index), "attn_logit_softcapping", None):
            raise NotImplementedError(
                "a fixed pattern cannot have capped scores: no backend computes the tanh between "
                f"scores and softmax, got attn_logit_softcapping={cap!r} for {name}. Load it with "
                "attn_logit_softcapping=None if it can do without."
            )


@cache
def _source(kind: type) -> ast.Module | None:
    """Return the parsed source of a class of modules; None if there is none to read."""
    try:
        return ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError):
        return None


def _attends(kind: type) -> bool:
    """Whether modules of a class call the attention function that the configuration names."""
    return any(
        isinstance(node, ast.Name) and node.id == "ALL_ATTENTION_FUNCTIONS" for node in _nodes(kind)
    )


def _looks_into_mask(kind: type) -> bool:
    """Whether modules of a class use an attention mask other than by passing it on."""
    return any(
        isinstance(node, ast.Subscript | ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "attention_mask"
        for node in _nodes(kind)
    )


def _nodes(kind: type) -> list[ast.AST]:
    source = _source(kind)
    return [] if source is None else list(ast.walk(source))
