"""Measure a dense model on sample tokens, and suggest which layers to convert to which patterns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import product
from typing import Any, SupportsIndex

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from colonnade.cost import num_kept
from colonnade.hf.check import check_model
from colonnade.hf.integers import Counts, as_int, as_ints, items
from colonnade.hf.measure import measure
from colonnade.hf.settings import has_settings
from colonnade.hf.suggestion import LayerScore, Suggestion, check_budget
from colonnade.pattern import FixedPattern, LocalPattern, check_count

_TOKENS = "tokens must be a tensor [batch, length] of int64 or int32, or an iterable of them"


def suggest(
    model: PreTrainedModel,
    tokens: Int[Tensor, "batch length"] | Iterable[Int[Tensor, "_ _"]],
    stride: Counts = 128,
    summary: Counts = (8, 16, 32),
    sinks: Counts = (0, 1, 4),
    windows: Counts | None = None,
    *,
    budget: float | None = None,
    per_head: bool = False,
    seq_len: SupportsIndex | None = None,
) -> Suggestion:
    """Measure what each layer would keep and change under other patterns, and choose among them.

    With p_ij the weights of a query head of the dense model, S_i the set of a candidate, and lse
    the logarithm of the softmax's denominator under either,

        kept = mean over i of Σ_{j in S_i} p_ij = mean over i of exp(lse_i(S) - lse_i(full)),

    so two log-sum-exps of `colonnade.attention` suffice, and no [n, n] tensor is made. Learnt sink
    logits count as mass that is kept. Mass says which tokens a layer looks at, but not whether it
    matters: where attention is spread over many alike values, much of it can go at little cost. So
    each layer also runs once more for each candidate, on the input that it has in the dense model,
    and with y_i the output of the layer (its residual stream),

        change = mean over i of |y_i(S) - y_i(full)|² / |y_i(full)|²,

    which the choice makes as small as the budget allows, summed over layers. Tables and pictures
    show its root, √change, in %. Both means are over batch rows and over the second half of each
    sample, i = n // 2 … n - 1, because the first rows read everything under every candidate. Key
    head h serves the query heads h · g … (h + 1) · g - 1, g = heads / kv_heads. Its `kept` is their
    mean, and its part in `change` is the part that it has in the squared change of the attention's
    output.

    The dense model reads each sample once, in evaluation mode, and is then as it was; it must not
    run in another thread meanwhile. Layers with a sliding window keep it, and are no candidates.

    Each layer is changed alone, on the text of the samples. That several layers lose sight of the
    same tokens is not measured, nor what a window cannot reach in longer texts, nor what tuning
    teaches a model to write into summaries. `windows=()` leaves windows out.

    Integers may be those of NumPy and PyTorch, in arrays too; a bool is none.

    Args:
        model: A dense causal model of transformers, as `retrofit` takes it.
        tokens: [batch, length] of token numbers without padding, or an iterable of several, whose
            lengths may differ.
        stride: Length of a block; or several to try.
        summary: Number of summary columns of a block; or several to try.
        sinks: Number of first positions that all later ones read; or several to try.
        windows: Windows to try, each with the most sinks of `sinks`. If None, for each stride and
            summary the window whose cache at `seq_len` is that of the fixed pattern.
        budget: The most that the cache may be, as a share of the dense model's, in entries summed
            over layers and key heads at `seq_len`, for example 0.33. None: choose nothing, only
            measure; `Suggestion.choose` chooses later.
        per_head: Choose a pattern for each key head instead of each layer.
        seq_len: Length in tokens at which caches are counted; that of the longest sample if None.

    Raises:
        TypeError: The model is not one of transformers, the tokens are not tensors of integers, or
            a count is neither an integer nor several.
        ValueError: A pattern does not exist; a sample is shorter than two blocks or longer than the
            model's positions, or holds a number that is no token; the budget lies outside (0, 1] or
            below what the candidates reach; or the model has a fixed pattern already, or a sliding
            window in every layer.
        NotImplementedError: The model attends in a way that has no pattern (capped scores,
            cross-attention, both directions, chunks), or not through transformers' attention
            interface.
    """
    config = _check_model(model)
    if budget is not None:
        check_budget(budget)
    strides, most = _several("stride", stride), _several("sinks", sinks)
    sizes = product(strides, _several("summary", summary), most)
    fixed = [FixedPattern(block, columns, sinks=first) for block, columns, first in sizes]
    samples = _samples(model, config, tokens, 2 * max(strides))
    length = max(sample.shape[1] for sample in samples) if seq_len is None else as_int(seq_len)
    if length is None:
        raise TypeError(f"seq_len must be an int, got seq_len={seq_len!r}.")
    check_count("seq_len", length, minimum=2 * max(strides))
    local = _windows(fixed, windows, max(most), length)
    candidates = tuple(dict.fromkeys((*fixed, *local)))
    decoder = next(
        each
        for each in model.modules()
        if isinstance(each, PreTrainedModel) and each.config is config
    )
    found = measure(model, decoder, samples, candidates)
    layers = tuple(
        LayerScore(
            layer,
            sums.num_heads,
            sums.num_kv_heads,
            sums.window,
            tuple(map(tuple, sums.mean_kept.tolist())),
            tuple(map(tuple, sums.mean_change.tolist())),
        )
        for layer, sums in found.items()
    )
    if all(layer.window is not None for layer in layers):
        raise ValueError(
            f"a layer must read everything to be converted, got a {type(model).__name__} whose "
            f"{len(layers)} layers all keep their sliding window."
        )
    suggestion = Suggestion(candidates, layers, length)
    return suggestion if budget is None else suggestion.choose(budget, per_head)


def _check_model(model: PreTrainedModel) -> PreTrainedConfig:
    """Return the configuration of the decoder of a model that can be measured."""
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers model, got a {type(model).__name__}. Measure it before "
            "you wrap it, in a PEFT model for example."
        )
    config = model.config.get_text_config(decoder=True)
    if has_settings(config):
        raise ValueError(
            f"model must be dense, got a {type(model).__name__} with a fixed pattern. Measure it "
            "before the retrofit."
        )
    check_model(model, config)
    return config


def _several(name: str, counts: Counts) -> list[int]:
    """Return one number or several, but not none, as a list without repetitions."""
    each = as_ints(name, counts)
    if not each:
        raise ValueError(f"{name} must be a number or several, got {name}={counts!r}.")
    check_count(name, min(each), minimum=0)
    return each


def _windows(
    fixed: Sequence[FixedPattern], windows: Counts | None, sinks: int, seq_len: int
) -> list[LocalPattern]:
    """Return the windows to try; by default those whose caches are as large as the fixed ones'."""
    if windows is None:
        rivals = [pattern for pattern in fixed if pattern.sinks == sinks]
        widths = [num_kept(pattern, seq_len) - sinks for pattern in rivals]
    else:
        widths = as_ints("windows", windows)
    return [LocalPattern(width, sinks=sinks) for width in widths]


def _samples(
    model: PreTrainedModel,
    config: PreTrainedConfig,
    tokens: Tensor | Iterable[Tensor],
    least: int,
) -> list[Int[Tensor, "_ _"]]:
    """Return the samples, checked and on the model's device."""
    samples = [tokens] if isinstance(tokens, Tensor) else items(tokens)
    if samples is None:
        raise TypeError(f"{_TOKENS}, got a {type(tokens).__name__}.")
    if not samples:
        raise ValueError("tokens must hold at least one sample, got none.")
    most = getattr(config, "max_position_embeddings", None)
    embedding: Any = model.get_input_embeddings()
    size = embedding.weight.shape[0]
    for sample in samples:
        if not isinstance(sample, Tensor) or sample.dtype not in (torch.int32, torch.int64):
            found = sample.dtype if isinstance(sample, Tensor) else f"a {type(sample).__name__}"
            raise TypeError(f"{_TOKENS}, got {found}. Of a tokenizer's result take input_ids.")
        if sample.dim() != 2 or sample.shape[0] == 0:
            raise ValueError(
                f"tokens must be [batch, length], got tokens.shape={tuple(sample.shape)}."
            )
        _check_length(sample.shape[1], least, most if isinstance(most, int) else None)
        first, last = int(sample.min()), int(sample.max())
        if first < 0 or last >= size:
            raise ValueError(f"tokens must be in [0, {size}), got {first} … {last}.")
    return [sample.to(model.device) for sample in samples]


def _check_length(length: int, least: int, most: int | None) -> None:
    """Refuse a sample that shows nothing, or that the model cannot read."""
    if length < least:
        raise ValueError(
            f"tokens must be at least two blocks long, 2 · stride = {least}, got a sample of "
            f"{length}: in its first block a position reads everything and loses nothing. Use "
            "longer samples or a smaller stride."
        )
    if most is not None and length > most:
        raise ValueError(
            f"tokens must be at most max_position_embeddings={most} long, got a sample of "
            f"{length}. Use shorter samples."
        )
