"""What a pattern costs: pairs, work of the attention products, and the cache of a decoder.

Closed forms only: no mask is built, so a length of 2^30 takes no longer than one of 16. The
patterns are those of Child et al. 2019 (arXiv:1904.10509), sections 4 and 5.
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
)
from colonnade.plan.lines import num_blocks

BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float64": 8}
"""Of one number, by the name of its type."""


@dataclass(frozen=True)
class Sizes:
    """The model around a pattern.

    Args:
        heads: Query heads.
        kv_heads: Key/value heads, a divisor of `heads`.
        width: Width of the values, summed over the query heads; a multiple of `heads`.
        qk_width: Width of the queries, summed over them; a multiple of `heads`.
        layers: Layers that have the pattern.
        batch: Sequences at once.
        dtype: Type of the cached keys and values: float32, bfloat16, float16 or float64.

    Raises:
        TypeError: A count is not an integer.
        ValueError: A count is below 1, heads and widths do not divide, or another `dtype`.
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
            many, few = getattr(self, name), getattr(self, divisor)
            if many % few != 0:
                raise ValueError(
                    f"{name} must be a multiple of {divisor}, got {name}={many} and "
                    f"{divisor}={few}; {name}={num_blocks(many, few) * few} would be."
                )
        if self.dtype not in BYTES:
            raise ValueError(f"dtype must be one of {', '.join(BYTES)}, got dtype={self.dtype!r}.")

    @property
    def qk_dim(self) -> int:
        """Width of a query and of a key, per head."""
        return self.qk_width // self.heads

    @property
    def v_dim(self) -> int:
        """Width of a value and of an output, per head."""
        return self.width // self.heads


@dataclass(frozen=True)
class Cost:
    """What `cost` finds. FLOPs count a multiply-add as two.

    Attributes:
        pairs_per_kv_head: For each key/value head, how many pairs (i, j) one query head reads.
        pairs: All pairs of one layer and one sequence, over the query heads.
        share_of_full: `pairs` / (heads · n(n+1)/2), in [0, 1].
        forward_flops: 2 · pairs · (qk_dim + v_dim) · layers · batch: scores, and their product
            with the values. The softmax, the projections and all else are left out.
        backward_flops: 2 · pairs · (3 · qk_dim + 2 · v_dim) · layers · batch: the scores once
            more, and the gradients of weights, values, queries and keys. Five products against
            two: 2.5 times the forward if qk_dim = v_dim.
        cache_entries: The most positions that a decoder holds for a key/value head: `num_kept`.
        cache_bytes: Of keys and values: their entries · (qk_dim + v_dim) · bytes of a number, over
            key/value heads, layers and batch.
    """

    pairs_per_kv_head: tuple[int, ...]
    pairs: int
    share_of_full: float
    forward_flops: int
    backward_flops: int
    cache_entries: int
    cache_bytes: int

    def times_fewer_than(self, other: Cost) -> float:
        """How many times the pairs of this one the other has; below 1 where it has fewer."""
        return other.pairs / self.pairs


def cost(pattern: Pattern, seq_len: int, sizes: Sizes) -> Cost:
    """Pairs, work and cache of a causal `pattern` over `seq_len` positions.

    Raises:
        TypeError: `seq_len` is not an integer, or `pattern` is none of this package's.
        ValueError: `seq_len` is below 1, the pattern is bidirectional, or it reads nothing.
    """
    check_count("seq_len", seq_len, minimum=1)
    kept = [num_kept(pattern, seq_len, head) for head in range(sizes.kv_heads)]
    read = tuple(pattern.num_pairs(seq_len, head) for head in range(sizes.kv_heads))
    pairs = sum(read) * (sizes.heads // sizes.kv_heads)
    if pairs == 0:
        raise ValueError(f"the pattern must read something, got seq_len={seq_len} for {pattern}.")
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
    """The most positions that a decoder must hold while it goes through `seq_len` of them.

    At step i it holds {j <= i : some i' >= i reads j}, however long the sequence goes on; this is
    the largest of these counts for i < n = `seq_len`. With B = ceil(n/l) blocks, or rows:

    - fixed, merged: the open block up to i and c summaries of every closed block, so at the end of
      the last block but one c·(B-2) + l, at the last position c·(B-1) + n - (B-1)·l: the larger;
    - fixed, "local": min(n, l). "summary": the summary columns among n positions;
    - strided: n, for a query of every later row reads the column of j. "local": min(n, l + 1);
    - local: min(n, window). Full: n.

    Args:
        pattern: A causal pattern.
        seq_len: Positions that are decoded, the prompt among them.
        head: The key/value head.

    Raises:
        TypeError: A count is not an integer, or `pattern` is none of this package's.
        ValueError: A count is below 0, or the pattern is bidirectional.
    """
    check_count("seq_len", seq_len, minimum=0)
    check_count("head", head, minimum=0)
    match pattern:
        case FixedPattern(causal=False) | FullPattern(causal=False):
            raise ValueError(f"a bidirectional pattern has no decoder, got {pattern}.")
        case FixedPattern():
            return _num_kept_fixed(pattern, seq_len, head)
        case LocalPattern(window=window):
            return min(seq_len, window)
        case StridedPattern(stride=stride, part="local"):
            return min(seq_len, stride + 1)
        case StridedPattern() | FullPattern():
            return seq_len
    raise TypeError(f"pattern must be one of this package's, got {type(pattern).__name__}.")


def _num_kept_fixed(pattern: FixedPattern, seq_len: int, head: int) -> int:
    stride, summary = pattern.stride, pattern.summary
    closed = max(num_blocks(seq_len, stride) - 1, 0)
    of_open_block = seq_len - closed * stride
    if pattern.part == "local":
        return min(seq_len, stride)
    if pattern.part == "summary":
        seen = of_open_block - pattern.summary_columns(head).start
        return closed * summary + min(max(seen, 0), summary)
    at_last_position = closed * summary + of_open_block
    return max(at_last_position, (closed - 1) * summary + stride) if closed else at_last_position


def comparison(
    pattern: FixedPattern, window: int, seq_len: int
) -> dict[str, FixedPattern | StridedPattern | LocalPattern | FullPattern]:
    """What `pattern` is set beside: others at the same stride, and itself at the best stride.

    The best stride is `FixedPattern.best_stride`, but never one too short for the sub-blocks.
    """
    columns = pattern.summary * pattern.subblocks
    best = FixedPattern.best_stride(seq_len, min(pattern.summary, seq_len))
    return {
        "fixed": pattern,
        "fixed_at_best_stride": replace(pattern, stride=max(best, columns)),
        "strided": StridedPattern(pattern.stride),
        "local": LocalPattern(window),
        "full": FullPattern(),
    }
