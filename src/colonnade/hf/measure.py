"""What a dense model's layers would keep and change under other patterns, from one pass.

A pass runs under an attention of its own, which gives what the dense model gives and looks at
queries and keys on the way. The model gets its own attention back whatever happens.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.masking_utils import causal_mask_function

from colonnade.hf.batch import refuse_unknown
from colonnade.hf.layer import in_type_of
from colonnade.hf.mask import read_mask_function
from colonnade.ops import attention
from colonnade.ops.sink_logits import with_sink_logits
from colonnade.pattern import FullPattern, LocalPattern, Pattern
from colonnade.shapes import Key, LogSumExp, Output, Query, Value

MEASURING = "colonnade_measuring"
"""The attn_implementation of a model while it is measured."""
FULL = FullPattern().as_fixed(128)
"""All earlier positions, in the form that the fast backends give a log-sum-exp of."""


@dataclass(frozen=True)
class CausalMask:
    """Stand for the mask of a pass: causal, of all positions or of a window.

    Attributes:
        window: Number of positions that are read, the reading one included; None: all.
        is_known: Whether it is one of the two. If not, no layer may read it.
    """

    window: int | None = None
    is_known: bool = True


@dataclass
class LayerSums:
    """What one layer would keep and how it would change, summed over the rows that were counted.

    Attributes:
        window: The layer's own window; None: it reads everything.
        num_heads: Number of query heads.
        num_kv_heads: Number of key heads.
        kept: [candidates, kv_heads] in float64: the share of its attention mass that each candidate
            keeps, summed over rows, a mean over the query heads of a key head. Empty if there is a
            window, and so are the others.
        moved: [candidates, kv_heads]: squared differences of the attention's outputs.
        change: [candidates]: squared differences of the layer's outputs, relative to these.
        num_rows: Number of rows: of all batch rows the second half.
    """

    window: int | None
    num_heads: int
    num_kv_heads: int
    kept: Float[Tensor, "candidates kv_heads"]
    moved: Float[Tensor, "candidates kv_heads"]
    change: Float[Tensor, " candidates"]
    num_rows: int = 0

    @property
    def mean_kept(self) -> Float[Tensor, "candidates kv_heads"]:
        """The share of its mass that a key head's queries keep."""
        return (self.kept / max(self.num_rows, 1)).cpu()

    @property
    def mean_change(self) -> Float[Tensor, "candidates kv_heads"]:
        """The change of the layer's output, apportioned to key heads by what each has moved."""
        whole = self.moved.sum(1, keepdim=True)
        share = torch.where(whole > 0, self.moved / whole, 1 / self.num_kv_heads)
        return (share * self.change[:, None] / max(self.num_rows, 1)).cpu()


class _Attended(NamedTuple):
    """A call of attention of the dense layer: who called, and what came out."""

    module: nn.Module
    window: int | None
    num_kv_heads: int
    out: Output
    lse: LogSumExp


@dataclass
class _Pass:
    """A pass of the model: where it is, and what was found of each layer."""

    candidates: Sequence[Pattern]
    owners: dict[int, nn.Module]
    """The layer that each module belongs to, by the module's id."""
    sums: dict[int, LayerSums] = field(default_factory=dict)
    tried: int | None = None
    """The candidate by which the layer attends now; None: it attends as the dense model does."""
    attended: _Attended | None = None
    """The last attention of the dense model, until the layer ends in which it was."""

    def of_layer(self, layer: int, seen: _Attended) -> LayerSums:
        """Return the layer's sums, which are zeros at first."""
        count = len(self.candidates) if seen.window is None else 0
        heads = seen.out.shape[1], seen.num_kv_heads
        zeros = seen.out.new_zeros(count, seen.num_kv_heads, dtype=torch.float64)
        empty = LayerSums(seen.window, *heads, zeros, zeros.clone(), zeros.new_zeros(count))
        return self.sums.setdefault(layer, empty)


_RUNNING: ContextVar[_Pass | None] = ContextVar("_RUNNING", default=None)
_ONE_AT_A_TIME = threading.Lock()


def measure(
    model: PreTrainedModel,
    decoder: PreTrainedModel,
    samples: Iterable[Int[Tensor, "_ _"]],
    candidates: Sequence[Pattern],
) -> dict[int, LayerSums]:
    """Run a dense model over samples, and return what each layer that attends would do otherwise.

    Each layer runs once more for each candidate, on the input that it has in the dense model. Of a
    sample of n tokens the rows n // 2 … n - 1 are counted.

    Args:
        model: The model; its head is not run.
        decoder: The part of it that attends, and maybe itself.
        samples: Tokens without padding, on the model's device.
        candidates: Causal patterns.

    Raises:
        ValueError: A layer takes a mask that transformers did not make for it.
        NotImplementedError: A layer attends in a way that has no pattern.
    """
    owners: dict[int, nn.Module] = {}
    for part in decoder.modules():  # From the outside to the inside, so that the innermost stays.
        if isinstance(part, nn.ModuleList):
            owners |= {id(inside): layer for layer in part for inside in layer.modules()}
    running = _Pass(candidates, owners)
    hooks = [
        layer.register_forward_hook(_try_candidates, with_kwargs=True)
        for layer in dict.fromkeys(owners.values())
    ]
    token = _RUNNING.set(running)
    try:
        with _in_evaluation(model), _attends_by(decoder, MEASURING), torch.no_grad():
            for sample in samples:
                model.base_model(sample, use_cache=False)
    finally:
        _RUNNING.reset(token)
        for hook in hooks:
            hook.remove()
    return dict(sorted(running.sums.items()))


def _try_candidates(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
) -> None:
    """Run a layer that has just run once more under each candidate, and compare."""
    running = _RUNNING.get()
    seen = None if running is None else running.attended
    if running is None or seen is None or running.owners[id(seen.module)] is not layer:
        return
    sums = running.of_layer(seen.module.layer_idx, seen)  # type: ignore[arg-type]
    dense = _rows(output)
    try:
        for tried in range(len(running.candidates) if seen.window is None else 0):
            running.tried = tried
            moved = (_rows(layer.forward(*args, **kwargs)) - dense).square().sum(-1)
            sums.change[tried] += (moved / dense.square().sum(-1)).double().sum()
        sums.num_rows += dense.shape[0] * dense.shape[1]
    finally:
        running.tried = running.attended = None


def _rows(output: Any) -> Float[Tensor, "batch half width"]:
    """Return the second half of what a layer gives, in float32 or float64."""
    out: Tensor = output[0] if isinstance(output, tuple) else output
    return out[:, out.shape[1] // 2 :].to(torch.promote_types(out.dtype, torch.float32))


@contextmanager
def _in_evaluation(model: nn.Module) -> Iterator[None]:
    """Switch dropout off, and on again where it was on."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _attends_by(decoder: PreTrainedModel, name: str) -> Iterator[None]:
    """Let a decoder attend by another function for a while, one decoder at a time.

    The name alone is changed: `set_attn_implementation` would look whether it could be loaded, and
    write it where it is saved.
    """
    found = [getattr(module, "config", None) for module in decoder.modules()]
    configs = {id(each): each for each in found if isinstance(each, PreTrainedConfig)}
    with _ONE_AT_A_TIME:
        before = [(each, each._attn_implementation) for each in configs.values()]
        try:
            for each in configs.values():
                each._attn_implementation = name
            yield
        finally:
            for each, its in before:
                each._attn_implementation = its


def measuring_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    **_: Any,
) -> CausalMask:
    """Return the descriptor of a mask, never a tensor.

    Raises:
        NotImplementedError: There is padding, or a cache.
    """
    if q_length != kv_length or (attention_mask is not None and not bool(attention_mask.all())):
        raise NotImplementedError(
            "a model is measured on whole samples, without padding and cache, got a mask of "
            f"{q_length} queries and {kv_length} keys."
        )
    is_known, window = read_mask_function(mask_function, packed_is_known=False)
    return CausalMask(window, is_known)  # An unknown one may be one that no layer reads.


def measuring_attention(
    module: nn.Module,
    query: Query,
    key: Key,
    value: Value,
    attention_mask: CausalMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    s_aux: Float[Tensor, " heads"] | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "batch q_len heads v_dim"], None]:
    """Give what the dense layer gives, and count what it would keep under each candidate.

    Raises:
        ValueError: `attention_mask` did not come from transformers' mask functions.
        NotImplementedError: The layer asks for capped scores or anything else that has no pattern.
    """
    window = _window_of(module, attention_mask, is_causal, sliding_window)
    refuse_unknown(others)
    query, key = in_type_of(value, query), in_type_of(value, key)
    running = _RUNNING.get()
    pattern: Pattern = FULL if window is None else LocalPattern(window)
    if running is not None and running.tried is not None:
        pattern = running.candidates[running.tried]
    out, lse = attention(query, key, value, pattern, scale=scaling, return_lse=True)
    if s_aux is not None:
        out = with_sink_logits(out, lse, s_aux)
    if running is not None:
        _count(running, _Attended(module, window, key.shape[1], out, _with_logit(lse, s_aux)))
    return out.transpose(1, 2).contiguous(), None


def _count(running: _Pass, now: _Attended) -> None:
    """Keep what the dense layer attended to, or compare with it."""
    layer, seen = getattr(now.module, "layer_idx", None), running.attended
    if layer is None or id(now.module) not in running.owners:
        raise NotImplementedError(
            "a layer that attends must have a number, layer_idx, and be one of a list of layers, "
            f"got a {type(now.module).__name__}."
        )
    if running.tried is None:
        if seen is not None:
            raise NotImplementedError(
                f"a layer must attend once, got a {type(now.module).__name__} after a "
                f"{type(seen.module).__name__} in layer {layer}."
            )
        running.attended = now
        return
    assert seen is not None, "candidates are tried after the dense layer has attended"
    sums = running.of_layer(layer, seen)
    half = now.lse.shape[2] // 2
    # A difference of two roundings may be above 0, but no share is above 1.
    kept = torch.exp(now.lse - seen.lse)[:, :, half:].clamp(max=1).double()
    moved = (now.out - seen.out)[:, :, half:].double().square().sum(-1)
    sums.kept[running.tried] += kept.unflatten(1, (now.num_kv_heads, -1)).mean(2).sum((0, 2))
    sums.moved[running.tried] += moved.unflatten(1, (now.num_kv_heads, -1)).sum((0, 2, 3))


def _with_logit(lse: LogSumExp, s_aux: Float[Tensor, " heads"] | None) -> LogSumExp:
    """Add a learnt sink logit, a term of every denominator that stands for no position."""
    return lse if s_aux is None else torch.logaddexp(lse, s_aux.to(lse.dtype)[:, None])


def _window_of(
    module: nn.Module, mask: object, is_causal: bool | None, sliding_window: int | None
) -> int | None:
    """Return the window of the mask that a layer is called with, or None if it reads everything."""
    name = type(module).__name__
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if not causal or getattr(module, "is_cross_attention", False):
        raise NotImplementedError(f"only causal self-attention is measured, got a {name}.")
    if not isinstance(mask, CausalMask):
        raise ValueError(
            "a layer must attend under a mask that transformers makes for it, got a "
            f"{type(mask).__name__} in a {name}."
        )
    if not mask.is_known or sliding_window not in (None, mask.window):
        raise NotImplementedError(
            "a layer must read all earlier positions or a window of them, got another mask in a "
            f"{name} (chunks, a prefix, both directions, or one of its own)."
        )
    return mask.window
