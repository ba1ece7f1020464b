"""Self-attention over a pattern: projections around `colonnade.attention`."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from colonnade.backends.choice import Explanation, check_backend
from colonnade.cache import KVCache
from colonnade.ops.attention import explain
from colonnade.ops.check import check_has_data, check_not_traced, check_padding, check_probability
from colonnade.ops.heads import Patterns, attention_in_groups, check_patterns, head_groups
from colonnade.ops.packing import Packing
from colonnade.pattern import check_counts, check_multiple
from colonnade.shapes import CuSeqlens, Hidden, Key, Output, Query, Rotary, Value


class SelfAttention(nn.Module):
    """y = W_p · concat_h(attention(W_q x, W_k x, W_v x)_h), every projection with a bias.

    The three ways to use a factorization (Child et al. 2019, section 5.1) are, with a merged
    pattern p: p itself, `p.factors()[r % 2]` in layer r (interleaved), and the tuple `p.factors()`
    (multi-head: in every layer some heads read A1, the others A2).

    Args:
        embed_dim: Width of x and y; a multiple of `num_heads`.
        num_heads: Number of query heads.
        pattern: The positions that each position reads. A tuple of p patterns splits the key heads
            into p head groups, the first ones longer by one where p does not divide their number;
            each head group counts its sub-blocks from 0.
        num_kv_heads: Number of key/value heads, a divisor of `num_heads`; `num_heads` if None.
        qk_dim: Width of the queries, summed over heads; `embed_dim` if None. The paper's
            "half-size" queries and keys are `embed_dim // 2`.
        dropout: Probability of dropping a weight of the attention, in training. The paper drops at
            the end of a residual branch only, see `ResidualBlock`.
        backend: "auto", or the backend that has to run, here and in caches from `new_cache`. It
            raises for a call that it does not take.

    Raises:
        TypeError: A count is not an integer, `dropout` is not a number, `backend` is not a str, or
            `pattern` is neither a pattern nor a tuple of them.
        ValueError: A width or a number of heads is below 1 or not a multiple as above, there are
            fewer key heads than patterns, `dropout` lies outside [0, 1], or no backend has that
            name.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: Patterns,
        num_kv_heads: int | None = None,
        qk_dim: int | None = None,
        dropout: float = 0.0,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        qk_dim = embed_dim if qk_dim is None else qk_dim
        check_counts(
            1, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, qk_dim=qk_dim
        )
        check_multiple("embed_dim", embed_dim, "num_heads", num_heads)
        check_multiple("qk_dim", qk_dim, "num_heads", num_heads)
        check_multiple("num_heads", num_heads, "num_kv_heads", num_kv_heads)
        check_patterns(pattern, num_kv_heads)
        check_probability("dropout", dropout)
        check_backend(backend)
        self.pattern = pattern
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.qk_head_dim = qk_dim // num_heads
        self.v_head_dim = embed_dim // num_heads
        self.dropout = dropout
        self.backend = backend
        self.query_proj = nn.Linear(embed_dim, qk_dim)
        self.key_proj = nn.Linear(embed_dim, num_kv_heads * self.qk_head_dim)
        self.value_proj = nn.Linear(embed_dim, num_kv_heads * self.v_head_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        x: Hidden,
        cache: KVCache | None = None,
        cu_seqlens: CuSeqlens | None = None,
        padding_mask: Bool[Tensor, "batch seq_len"] | None = None,
        rotary: Rotary | None = None,
    ) -> Hidden:
        """Attend from every position of x to the positions that the pattern lets it read.

        Args:
            x: [batch, seq_len, embed_dim].
            cache: A cache from `new_cache`. x then holds the positions that follow those in it, and
                they are appended; the result equals the same positions of one call over everything.
            cu_seqlens: [documents + 1]: the boundaries of documents that lie one after the other in
                x, whose batch is 1. See `attention_varlen`.
            padding_mask: [batch, seq_len], True at tokens. Each batch row gives what its tokens
                alone would give, and 0 at padding; blocks are counted from its first token.
            rotary: (cos, sin), each [batch or 1, seq_len, qk_dim / num_heads], applied to queries
                and keys: t · cos + rotate_half(t) · sin, rotate_half(a, b) = (-b, a) on the halves.

        Raises:
            TypeError: `cache` is not a KVCache, `padding_mask` is not a bool tensor, or
                `cu_seqlens` is not a tensor of integers.
            ValueError: Shapes do not fit, `cu_seqlens` comes with `padding_mask` or `cache`, or the
                cache is one of another pattern.
            NotImplementedError: A cache comes with dropout, or the named backend does not take this
                call.
        """
        _check_layout(x, cu_seqlens, padding_mask)
        dropout = self.dropout if self.training else 0.0
        if cache is not None:
            self._check_cache(cache, cu_seqlens, dropout)
            out = self.merge_heads(cache.attend(*self.project(x, rotary), None, padding_mask))
            if padding_mask is None:
                return out
            return out.masked_fill(~padding_mask[..., None].to(out.device), 0.0)
        if padding_mask is not None:
            packing = Packing.of_padded(padding_mask, x.device)
            if rotary is not None:
                cos, sin = (packing.pack(angle.expand(len(x), -1, -1)) for angle in rotary)
                rotary = (cos[None], sin[None])
            tokens = packing.pack(x)[None]
            # Not self(…): hooks on the layer belong to the padded batch, and run once.
            return packing.unpack(
                self.forward(tokens, None, packing.cu_seqlens, None, rotary).squeeze(0)
            )
        query, key, value = self.project(x, rotary)
        documents = None if cu_seqlens is None else Packing(1, x.shape[1], None, cu_seqlens)
        out = attention_in_groups(
            query, key, value, self.pattern, documents, dropout=dropout, backend=self.backend
        )
        return self.merge_heads(out)

    def explain(
        self,
        x: Hidden,
        cache: KVCache | None = None,
        cu_seqlens: CuSeqlens | None = None,
        padding_mask: Bool[Tensor, "batch seq_len"] | None = None,
    ) -> Explanation | tuple[Explanation, ...]:
        """Say which backend the same call would take, and why not each other one.

        It is the call as it would be now, in training with dropout. Nothing is computed.

        Args:
            x: [batch, seq_len, embed_dim].
            cache: As for the call, and so are the other arguments.
            cu_seqlens: [documents + 1].
            padding_mask: [batch, seq_len].

        Returns:
            One explanation, or with a tuple of patterns one for each.

        Raises:
            TypeError, ValueError, NotImplementedError: As the call.
        """
        _check_layout(x, cu_seqlens, padding_mask)
        dropout = self.dropout if self.training else 0.0
        query, key, value = self._projections_without_numbers(x)
        if cache is not None:
            self._check_cache(cache, cu_seqlens, dropout)
            return cache.explain(query, key, value, padding_mask)
        if padding_mask is not None:
            packing = Packing.of_padded(padding_mask, x.device)
            query, key, value = (packing.pack(t.transpose(1, 2)) for t in (query, key, value))
            cu_seqlens = packing.cu_seqlens
        elif cu_seqlens is not None:
            query, key, value = (t[0].transpose(0, 1) for t in (query, key, value))
        found = []
        for group in head_groups(self.pattern, self.num_kv_heads):
            q, k, v = (group.of(t, self.num_kv_heads) for t in (query, key, value))
            found.append(
                explain(
                    q,
                    k,
                    v,
                    group.pattern,
                    dropout_p=dropout,
                    cu_seqlens=cu_seqlens,
                    backend=self.backend,
                )
            )
        return tuple(found) if isinstance(self.pattern, tuple) else found[0]

    def _projections_without_numbers(self, x: Hidden) -> tuple[Query, Key, Value]:
        """Return uninitialised tensors like those of `project`."""
        weight = self.query_proj.weight
        needs_grad = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        )

        def empty(heads: int, width: int) -> Tensor:
            made = weight.new_empty(*x.shape[:2], heads, width, requires_grad=needs_grad)
            return made.transpose(1, 2)

        kv_heads = self.num_kv_heads
        return (
            empty(self.num_heads, self.qk_head_dim),
            empty(kv_heads, self.qk_head_dim),
            empty(kv_heads, self.v_head_dim),
        )

    def new_cache(self, max_seq_len: int | None = None, *, static: bool = False) -> KVCache:
        """Return an empty cache for this layer; see `KVCache`."""
        return KVCache(self.pattern, max_seq_len, self.backend, static=static)

    def _check_cache(self, cache: KVCache, cu_seqlens: CuSeqlens | None, dropout: float) -> None:
        if not isinstance(cache, KVCache):
            raise TypeError(f"cache must be a KVCache, got a {type(cache).__name__}.")
        if cache.pattern != self.pattern:
            raise ValueError(
                "cache must be of the layer's pattern (see new_cache), got "
                f"cache.pattern={cache.pattern} and pattern={self.pattern}."
            )
        if self.backend not in ("auto", cache.backend):
            raise ValueError(
                "cache must have the layer's backend (see new_cache), got "
                f"cache.backend={cache.backend!r} and backend={self.backend!r}."
            )
        if cu_seqlens is not None:
            raise ValueError(
                "give cache or cu_seqlens, not both: packed documents are not continued."
            )
        if dropout > 0:
            raise NotImplementedError(
                f"the layer takes no dropout with a cache, got dropout={dropout} in training. Call "
                "eval() first; cache.append and cache.read(…, dropout_p=) take it."
            )

    def project(self, x: Hidden, rotary: Rotary | None = None) -> tuple[Query, Key, Value]:
        """Return the queries, keys and values of x, [batch, heads, seq_len, head_dim] each."""
        query = self.query_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key = self.key_proj(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        value = self.value_proj(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        return query, key, value

    def merge_heads(self, out: Output) -> Hidden:
        """Put the heads' outputs side by side, and apply the output projection."""
        merged: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return merged


def rotate(
    tensor: Float[Tensor, "batch heads seq_len head_dim"], rotary: Rotary
) -> Float[Tensor, "batch heads seq_len head_dim"]:
    """Return t · cos + rotate_half(t) · sin, rotary positions (Su et al. 2021, arXiv:2104.09864).

    Entries i and i + head_dim/2 turn together, as in transformers' Llama.

    Raises:
        ValueError: head_dim is odd.
    """
    if tensor.shape[-1] % 2 != 0:
        raise ValueError(
            "rotary needs an even width of queries and keys per head, "
            f"got head_dim={tensor.shape[-1]}."
        )
    cos, sin = (angle[:, None] for angle in rotary)
    first, second = tensor.chunk(2, -1)
    return tensor * cos + torch.cat([-second, first], -1) * sin


def _check_layout(x: Tensor, cu_seqlens: Tensor | None, padding_mask: Tensor | None) -> None:
    check_not_traced()
    if cu_seqlens is not None and padding_mask is not None:
        raise ValueError(
            "give cu_seqlens or padding_mask, not both: packed documents have no padding."
        )
    if cu_seqlens is not None and x.shape[0] != 1:
        raise ValueError(
            "with cu_seqlens the documents lie in one row: x must be [1, total, embed_dim], "
            f"got x.shape={tuple(x.shape)}."
        )
    check_padding(padding_mask, "x", (x.shape[0], x.shape[1]))
    if padding_mask is not None:
        check_has_data("padding_mask", padding_mask, "x", x)
