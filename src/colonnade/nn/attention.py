"""Self-attention over a pattern: projections around `colonnade.attention`."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from colonnade.ops import attention
from colonnade.pattern import Pattern, check_count
from colonnade.shapes import Hidden, Key, Output, Query, Rotary, Value


class SelfAttention(nn.Module):
    """y = W_p · concat_h(attention(W_q x, W_k x, W_v x)_h), every projection with a bias.

    Args:
        embed_dim: Width of x and y; a multiple of `num_heads`.
        num_heads: Query heads.
        pattern: Which positions each position reads.
        num_kv_heads: Key/value heads, a divisor of `num_heads`; `num_heads` if None.
        qk_dim: Width of the queries, summed over heads; `embed_dim` if None. The paper's
            "half-size" queries and keys are `embed_dim // 2`.

    Raises:
        TypeError: A count is not an integer, or `pattern` is no pattern.
        ValueError: Widths and heads do not divide.
        NotImplementedError: A tuple of patterns.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        pattern: Pattern,
        num_kv_heads: int | None = None,
        qk_dim: int | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        qk_dim = embed_dim if qk_dim is None else qk_dim
        _check_sizes(embed_dim, num_heads, num_kv_heads, qk_dim)
        if isinstance(pattern, tuple):
            raise NotImplementedError(
                "a tuple of patterns (heads that read different factors) is not there yet, "
                f"got pattern={pattern}. Give one pattern."
            )
        if not isinstance(pattern, Pattern):
            raise TypeError(f"pattern must be a Pattern, got a {type(pattern).__name__}.")
        self.pattern = pattern
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.qk_head_dim = qk_dim // num_heads
        self.v_head_dim = embed_dim // num_heads
        self.query_proj = nn.Linear(embed_dim, qk_dim)
        self.key_proj = nn.Linear(embed_dim, num_kv_heads * self.qk_head_dim)
        self.value_proj = nn.Linear(embed_dim, num_kv_heads * self.v_head_dim)
        self.out_proj = nn.Linear(embed_dim, embed_dim)

    def forward(
        self,
        x: Hidden,
        cache: object = None,
        cu_seqlens: Tensor | None = None,
        padding_mask: Tensor | None = None,
        rotary: Rotary | None = None,
    ) -> Hidden:
        """Attend from every position of x to the positions that the pattern lets it read.

        Args:
            x: [batch, seq_len, embed_dim].
            cache: Not there yet; only None is taken.
            cu_seqlens: Not there yet; only None is taken.
            padding_mask: Not there yet; only None is taken.
            rotary: (cos, sin), each [batch or 1, seq_len, qk_dim / num_heads], applied to queries
                and keys: t · cos + rotate_half(t) · sin, rotate_half(a, b) = (-b, a) on the halves.

        Raises:
            NotImplementedError: An argument that is not there yet.
        """
        for name, given in (
            ("cache", cache),
            ("cu_seqlens", cu_seqlens),
            ("padding_mask", padding_mask),
        ):
            if given is not None:
                raise NotImplementedError(f"SelfAttention does not take {name} yet; leave it None.")
        query, key, value = self.project(x, rotary)
        out = attention(query, key, value, self.pattern)
        assert isinstance(out, Tensor)
        return self.merge_heads(out)

    def project(self, x: Hidden, rotary: Rotary | None = None) -> tuple[Query, Key, Value]:
        """Queries, keys and values of x, [batch, heads, seq_len, head_dim] each."""
        query = self.query_proj(x).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        key = self.key_proj(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        value = self.value_proj(x).unflatten(-1, (self.num_kv_heads, -1)).transpose(1, 2)
        if rotary is not None:
            query, key = rotate(query, rotary), rotate(key, rotary)
        return query, key, value

    def merge_heads(self, out: Output) -> Hidden:
        """The heads' outputs side by side, through the output projection."""
        merged: Tensor = self.out_proj(out.transpose(1, 2).flatten(2))
        return merged


def rotate(
    tensor: Float[Tensor, "batch heads seq_len head_dim"], rotary: Rotary
) -> Float[Tensor, "batch heads seq_len head_dim"]:
    """Rotary position embedding, t · cos + rotate_half(t) · sin (Su et al. 2021, arXiv:2104.09864).

    The pairs that turn together are (i, i + head_dim/2), as in transformers' Llama.

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


def _check_sizes(embed_dim: int, num_heads: int, num_kv_heads: int, qk_dim: int) -> None:
    for name, count in (
        ("embed_dim", embed_dim),
        ("num_heads", num_heads),
        ("num_kv_heads", num_kv_heads),
        ("qk_dim", qk_dim),
    ):
        check_count(name, count, minimum=1)
    for name, width in (("embed_dim", embed_dim), ("qk_dim", qk_dim)):
        if width % num_heads != 0:
            raise ValueError(
                f"{name} must be a multiple of num_heads, "
                f"got {name}={width} and num_heads={num_heads}."
            )
    if num_heads % num_kv_heads != 0:
        raise ValueError(
            "num_heads must be a multiple of num_kv_heads, "
            f"got num_heads={num_heads} and num_kv_heads={num_kv_heads}."
        )
