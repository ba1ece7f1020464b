"""Strided and local patterns in plain PyTorch: how backend "eager" runs them.

The sequence is laid out in lines as wide as the stride (or the window), its last position at the
end of the last line. With width 4 and 10 positions,

    . . 0 1
    2 3 4 5
    6 7 8 9

position 8 reads its **window** 5 6 7 8: of its own line what does not lie to its right, of the line
above what does. A strided query also reads its **column**, here 4 and 0, and one of a window with
sinks those that have left it. All are dense products, [l, 2l] a line, [lines, lines] a column and
[l, sinks], in one softmax; memory grows like q_len · (2l + kv_len/l), and no mask grows faster.
Queries that fit into one line are computed alone, without the rest of it. The backward computes the
scores again.

A value that is not finite makes the whole output of its readers NaN, and of nobody else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from colonnade.backends.call import Call, Seen
from colonnade.backends.documents import by_documents, lengths_to_count
from colonnade.backends.dropout import DROPOUT_SCHEMA, Dropout, multiply_
from colonnade.backends.eager.regions import Column, Keys, Region, Sinks, Window
from colonnade.backends.tracing.flops import Sizes
from colonnade.backends.tracing.operation import LSE, define_attention
from colonnade.pattern import LocalPattern, Part, StridedPattern
from colonnade.plan.kept import num_positions, num_slots
from colonnade.plan.lines import num_blocks
from colonnade.shapes import Key, LogSumExp, Output, Query, Value

Reads = Literal["window"] | Part
"""The parts of a strided pattern, or a window alone. As printed, "local" reads one key more."""


def attend(
    query: Query, key: Key, value: Value, pattern: StridedPattern | LocalPattern, call: Call
) -> tuple[Output, LogSumExp]:
    """softmax(scale · q kᵀ) v over windows and columns, and the log of its denominator."""
    return _attend(query, key, value, *_Options.of(pattern, call), *call.dropout)


class _Options(NamedTuple):
    """A strided or local pattern, and which keys there are: as an operation takes them, flat."""

    width: int
    reads: Reads
    sinks: int
    scale: float
    begin: int
    """Position before which the keys hold only sinks, see `call.Kept`."""
    cu_seqlens: Tensor | None

    @classmethod
    def of(cls, pattern: StridedPattern | LocalPattern, call: Call) -> _Options:
        assert not isinstance(call.keys, Seen)
        keys = call.scale, call.keys.begin, call.keys.cu_seqlens
        if isinstance(pattern, StridedPattern):
            return cls(pattern.stride, pattern.part, 0, *keys)
        return cls(pattern.window, "window", pattern.sinks, *keys)

    @property
    def pattern(self) -> StridedPattern | LocalPattern:
        """The pattern."""
        if self.reads == "window":
            return LocalPattern(self.width, sinks=self.sinks)
        return StridedPattern(self.width, self.reads)


OPTIONS_SCHEMA = "int width, str reads, int sinks, float scale, SymInt begin, Tensor? cu_seqlens"
"""`_Options` in the schema of an operation."""


class _Laid:
    """The operands in lines, in the type that is computed in."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, options: _Options) -> None:
        self.compute = torch.promote_types(query.dtype, torch.float32)
        self.q_len, self.kv_len, self.kv_heads = query.shape[2], key.shape[2], key.shape[1]
        reads, begin = options.reads, options.begin
        self.slots = num_slots(options.pattern, begin)
        # Sinks come first, wherever the tail begins.
        self.sinks = min(options.sinks, self.kv_len)
        tail_len = self.kv_len - self.slots
        # Lines longer than the sequence would be padding; they read what lines of its length do.
        self.width = max(min(options.width, tail_len), 1)
        bad = ~value.isfinite().all(-1, keepdim=True)
        self.q_lines = num_blocks(self.q_len, self.width)
        self.q_columns = self.q_len if self.q_lines == 1 else self.width
        self.q = self.queries(query) * options.scale
        self.k = self._keys(key[:, :, None].to(self.compute))
        self.v = self._keys(value.masked_fill(bad, 0.0)[:, :, None].to(self.compute))
        real = torch.ones(tail_len, 1, dtype=torch.bool, device=key.device)
        real, sizes = self._lines(real), (self.q_lines, self.q_columns)
        position = torch.arange(begin, begin + tail_len, device=key.device)[:, None]
        self.key_position = Keys(
            self._lines(position), position.new_tensor(range(self.sinks))[:, None]
        )
        self.q_position = self.queries_of(position[tail_len - self.q_len :])
        self.regions: list[Region] = []
        if reads != "summary":
            self.regions.append(Window(*sizes, real, as_printed=reads == "local"))
        if reads in ("merged", "summary"):
            self.regions.append(Column(*sizes, real, with_itself=reads == "summary"))
        if self.sinks > 0:
            self.regions.append(Sinks(self.q_position, self.sinks, options.width))
        marked = self._keys(bad[:, :, None])
        self.reached = torch.stack([region.reaches(marked) for region in self.regions]).any(0)

    def queries(self, tensor: Tensor) -> Tensor:
        """[B, Hq, Tq, D] as [B, Hkv, G, q_lines, q_columns, D]."""
        return self.queries_of(tensor.unflatten(1, (self.kv_heads, -1)).to(self.compute))

    def queries_of(self, tensor: Tensor) -> Tensor:
        """[…, Tq, D] as […, q_lines, q_columns, D]."""
        return tensor[..., None, :, :] if self.q_lines == 1 else self._lines(tensor)

    def _keys(self, tensor: Tensor) -> Keys:
        """[…, Tk, D] as lines of the tail, and sinks."""
        return Keys(self._lines(tensor[..., self.slots :, :]), tensor[..., : self.sinks, :])

    def gradient(self, keys: Keys) -> Tensor:
        """[B, Hkv, Tk, D], summed over query heads: what was spread over keys."""
        lines, sinks = (t.sum(2, keepdim=True) for t in keys)
        tail = self.unlaid(lines, self.kv_len - self.slots)
        whole = F.pad(tail, (0, 0, self.slots, 0))
        whole[:, :, : self.sinks] += sinks[:, :, 0]
        return whole

    def _lines(self, tensor: Tensor) -> Tensor:
        """[…, n, D] as […, lines, width, D], zeros in front of the first position."""
        length = tensor.shape[-2]
        lines = num_blocks(length, self.width)
        padded = F.pad(tensor, (0, 0, lines * self.width - length, 0))
        laid_out: Tensor = padded.unflatten(-2, (lines, self.width))
        return laid_out

    def unlaid(self, lines: Tensor, length: int) -> Tensor:
        """[B, Hkv, G, lines, width, D] as [B, Hkv·G, length, D]."""
        flat = lines.flatten(-3, -2)
        return flat[..., flat.shape[-2] - length :, :].flatten(1, 2).contiguous()

    def scores(self) -> Tensor:
        """q kᵀ of all regions side by side, -inf where a query does not read a key."""
        visible = [region.visible for region in self.regions]
        products = [region.products(self.q, self.k) for region in self.regions]
        masked = [
            p.masked_fill_(~seen, -math.inf) for p, seen in zip(products, visible, strict=True)
        ]
        return torch.cat(masked, -1)

    def factors(self, dropout: Dropout, numbers: Tensor) -> Tensor | None:
        """The factors of the weights of batch rows, or documents, of these numbers."""
        if dropout.p == 0:
            return None
        group, query = self.q.shape[2], self.q_position[None, None, ..., 0]
        heads = torch.arange(self.kv_heads * group, device=query.device)[None, :, None, None]
        row, position = numbers[:, None, None, None], self.key_position
        each = [region.factors(dropout, row, heads, query, position) for region in self.regions]
        by_head: Tensor = torch.cat(each, -1).unflatten(1, (self.kv_heads, group))
        return by_head

    def split(self, weights: Tensor) -> list[tuple[Region, Tensor]]:
        """Each region with its share of what lies side by side."""
        parts = weights.split([region.num_keys for region in self.regions], -1)
        return list(zip(self.regions, parts, strict=True))


def _forward(query: Tensor, key: Tensor, value: Tensor, *given: Any) -> tuple[Tensor, Tensor]:
    options, dropout = _options(given)

    def attend(numbers: Tensor, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        laid = _Laid(query, key, value, options)
        scores = laid.scores()
        lse = scores.logsumexp(-1, keepdim=True)
        weights = scores.sub_(lse).exp_()
        multiply_(weights, laid.factors(dropout, numbers))
        outs = [region.weigh(own, laid.v) for region, own in laid.split(weights)]
        # A value that is not finite reaches its readers, and nobody else as 0 · NaN.
        out = sum(outs[1:], outs[0]).masked_fill_(laid.reached, math.nan)
        out, lse = (laid.unlaid(t, laid.q_len) for t in (out, lse))
        return out.to(query.dtype), lse[..., 0].contiguous()

    out, lse = by_documents(attend, options.cu_seqlens, query, key, value)
    return out, lse


def _backward(
    grad_out: Tensor,
    grad_lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lse: Tensor,
    *given: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    options, dropout = _options(given)

    def differentiate(
        numbers: Tensor,
        grad_out: Tensor,
        grad_lse: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, ...]:
        laid = _Laid(query, key, value, options)
        d_out = laid.queries(grad_out)
        weights = laid.scores().sub_(laid.queries(lse[..., None])).exp_()
        kept = laid.factors(dropout, numbers)
        d_weights = torch.cat([region.products(d_out, laid.v) for region in laid.regions], -1)
        multiply_(d_weights, kept)
        delta = (weights * d_weights).sum(-1, keepdim=True) - laid.queries(grad_lse[..., None])
        d_scores = d_weights.sub_(delta).mul_(weights)
        d_query = [region.weigh(own, laid.k) for region, own in laid.split(d_scores)]
        d_key, d_value = (
            Keys(*(t.new_zeros(*laid.q.shape[:3], *t.shape[3:]) for t in keys))
            for keys in (laid.k, laid.v)
        )
        for (region, own_scores), (_, own_weights) in zip(
            laid.split(d_scores), laid.split(multiply_(weights, kept)), strict=True
        ):
            region.spread(own_scores, laid.q, d_key)
            region.spread(own_weights, d_out, d_value)
        scaled = sum(d_query[1:], d_query[0]).mul_(options.scale)
        return (
            laid.unlaid(scaled, laid.q_len).to(query.dtype),
            laid.gradient(d_key).to(key.dtype),
            laid.gradient(d_value).to(value.dtype),
        )

    tensors = grad_out, grad_lse, query, key, value, lse
    d_query, d_key, d_value = by_documents(differentiate, options.cu_seqlens, *tensors)
    return d_query, d_key, d_value


def _options(given: Sequence[Any]) -> tuple[_Options, Dropout]:
    """Tell apart the options of an operation."""
    num_options = len(_Options._fields)
    return _Options(*given[:num_options]), Dropout(*given[num_options:])


def _count_pairs(sizes: Sizes, *given: Any) -> int:
    options, _ = _options(given)
    pattern = options.pattern
    if options.cu_seqlens is None:
        lengths = [num_positions(pattern, sizes.kv_len, options.begin)]
    else:
        lengths = lengths_to_count(options.cu_seqlens, sizes.kv_len)
    of_earlier_queries = pattern.num_pairs(sum(lengths) - sizes.q_len)
    every = sum(map(pattern.num_pairs, lengths))
    return sizes.batch * sizes.kv_heads * (every - of_earlier_queries)


_attend = define_attention(
    "colonnade::windowed",
    f"{OPTIONS_SCHEMA}, {DROPOUT_SCHEMA}",
    _forward,
    _backward,
    LSE,
    _count_pairs,
)
