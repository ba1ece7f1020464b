"""The cost of a pattern: its pairs, the work of its matrix products, and a decoder's cache.

Everything follows from closed forms and no mask is built, so a length of 2^30 takes no longer than
one of 16. The patterns are those of Child et al. 2019 (arXiv:1904.10509), sections 4 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from colonnade.pattern import (
    FixedPattern,
    FullPattern,
    LocalPattern,
    Pattern,
    StridedPattern,
    check_count,
    check_counts,
    check_multiple,
)
from colonnade.plan.kept import kept_begin

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
"""Bytes of one number, by the name of its type."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a model around a pattern.

    Args:
        heads: Number of query heads.
        kv_heads: Number of key/value heads, a divisor of `heads`.
        width: Width of the values, summed over the query heads; a multiple of `heads`.
        qk_width: Width of the queries, summed over the query heads; a multiple of `heads`.
        layers: Number of layers that have the pattern.
        batch: Number of sequences at once.
        dtype: Type of the cached keys and values: float32, bfloat16, float16 or float64.

    Raises:
        TypeError: A count is not an integer.
        ValueError: A count is below 1, a count does not divide another as above, or `dtype` is
            unknown.
    """

    heads: int
    kv_heads: int
    width: int
    qk_width: int
    layers: int = 1
    batch: int = 1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        for name in ("heads", "kv_heads", "width", "qk_width", "layers", "batch"):
            check_count(name, getattr(self, name), minimum=1)
        for name, divisor in (("heads", "kv_heads"), ("width", "heads"), ("qk_width", "heads")):
            check_multiple(name, getattr(self, name), divisor, getattr(self, divisor))
        if self.dtype not in BYTES:
            raise ValueError(f"dtype must be one of {', '.join(BYTES)}, got dtype={self.dtype!r}.")

    @property
    def qk_dim(self) -> int:
        """Width of one head's queries and keys."""
        return self.qk_width // self.heads

    @property
    def v_dim(self) -> int:
        """Width of one head's values and outputs."""
        return self.width // self.heads


@dataclass(frozen=True)
class Cost:
    """The cost of a pattern, as `cost` returns it. FLOPs count a multiply-add as two.

    Attributes:
        pairs_per_kv_head: Number of pairs (i, j) that one query head reads, for each key/value
            head.
        pairs: Number of pairs of one layer and one sequence, over all query heads.
        share_of_full: `pairs` / (heads · n(n+1)/2), in [0, 1].
        forward_flops: 2 · pairs · (qk_dim + v_dim) · layers · batch, for the scores and their
            product with the values. The softmax, the projections and everything else are left out.
        backward_flops: 2 · pairs · (3 · qk_dim + 2 · v_dim) · layers · batch, for the scores once
            more and the gradients of weights, values, queries and keys. These are five products
            against two: 2.5 times the forward if qk_dim = v_dim.
        cache_entries: The most positions that a decoder keeps for a key/value head, see `num_kept`.
        cache_bytes: Bytes of the keys and values in these entries, over key/value heads, layers
            and batch: entries · (qk_dim + v_dim) · bytes of a number.
    """

    pairs_per_kv_head: tuple[int, ...]
    pairs: int
    share_of_full: float
    forward_flops: int
    backward_flops: int
    cache_entries: int
    cache_bytes: int

    def times_fewer_than(self, other: Cost) -> float:
        """Return `other.pairs` / `self.pairs`, which is below 1 if the other has fewer pairs."""
        return other.pairs / self.pairs


def cost(pattern: Pattern, seq_len: int, sizes: Sizes) -> Cost:
    """Return the pairs, the work and the cache of a causal `pattern` over `seq_len` positions.

    Raises:
        TypeError: `seq_len` is not an integer, or `pattern` is not one of this package's.
        ValueError: `seq_len` is below 1, the pattern is bidirectional, or it reads nothing.
    """
    check_count("seq_len", seq_len, minimum=1)
    kept = [num_kept(pattern, seq_len, head) for head in range(sizes.kv_heads)]
    read = tuple(pattern.num_pairs(seq_len, head) for head in range(sizes.kv_heads))
    pairs = sum(read) * (sizes.heads // sizes.kv_heads)
    if pairs == 0:
        raise ValueError(
            f"the pattern must read something, got seq_len={seq_len} for {pattern}. "
            "Use a longer sequence or another part of the pattern."
        )
    every = sizes.heads * FullPattern().num_pairs(seq_len)
    copies = sizes.layers * sizes.batch
    return Cost(
        pairs_per_kv_head=read,
        pairs=pairs,
        share_of_full=pairs / every,
        forward_flops=2 * pairs * (sizes.qk_dim + sizes.v_dim) * copies,
        backward_flops=2 * pairs * (3 * sizes.qk_dim + 2 * sizes.v_dim) * copies,
        cache_entries=max(kept),
        cache_bytes=sum(kept) * (sizes.qk_dim + sizes.v_dim) * BYTES[sizes.dtype] * copies,
    )


def num_kept(pattern: Pattern, seq_len: int, head: int = 0) -> int:
    """Return the most positions that a decoder must keep on its way through `seq_len` of them.

    At step i it keeps {j <= i : some i' >= i reads j}, however long the sequence goes on. The
    result is the largest of these counts for i < n = `seq_len`. Unless a strided pattern keeps its
    columns, step i reads all that is kept: |S_i| positions. With B = ceil(n/l) blocks:

    - fixed, merged: the open block up to i and the c summaries of every closed block. These are
      c·(B-2) + l positions at the end of the last block but one, and c·(B-1) + n - (B-1)·l at the
      last position; the larger counts. Sinks count behind block 0;
    - fixed, "local": min(n, l), and the sinks behind block 0; "summary": the summary columns and
      sinks among n positions;
    - strided: n, because in every later row some query reads the column of j; "local": min(n, l+1);
    - local: min(n, window + sinks); full: n.

    A `KVCache` may keep more: all of the open block under "summary", every position of a strided
    pattern, and up to `window` positions that have left a window and are moved away together.

    Args:
        pattern: A causal pattern.
        seq_len: Number of positions, prompt included.
        head: The key/value head.

    Raises:
        TypeError: A count is not an integer, or `pattern` is not one of this package's.
        ValueError: A count is below 0, or the pattern is bidirectional.
    """
    check_counts(0, seq_len=seq_len, head=head)
    match pattern:
        case FixedPattern(causal=False) | FullPattern(causal=False):
            raise ValueError(
                f"a bidirectional pattern has no decoder, got {pattern}. Use causal=True."
            )
        case StridedPattern(part="merged" | "summary"):
            return seq_len
        case FixedPattern() | StridedPattern() | LocalPattern() | FullPattern():
            # |S_i| grows up to the end of a block, where a fixed pattern's may fall.
            ends = [end for end in (seq_len, kept_begin(pattern, seq_len - 1)) if end > 0]
            rows = (pattern.num_pairs(n, head) - pattern.num_pairs(n - 1, head) for n in ends)
            return max(rows, default=0)
    raise TypeError(f"pattern must be one of this package's, got {type(pattern).__name__}.")


def comparison(
    pattern: FixedPattern, window: int, seq_len: int
) -> dict[str, FixedPattern | StridedPattern | LocalPattern | FullPattern]:
    """Return patterns to compare `pattern` with, by name, and itself as "fixed".

    They are the strided pattern of the same stride, a local one with the same sinks, the full one,
    and `pattern` at `FixedPattern.best_stride`, or at the smallest stride with room for its
    sub-blocks and sinks.
    """
    columns = pattern.summary * pattern.subblocks + pattern.sinks
    best = FixedPattern.best_stride(seq_len, min(pattern.summary, seq_len))
    return {
        "fixed": pattern,
        "fixed_at_best_stride": replace(pattern, stride=max(best, columns)),
        "strided": StridedPattern(pattern.stride),
        "local": LocalPattern(window, sinks=pattern.sinks),
        "full": FullPattern(),
    }
