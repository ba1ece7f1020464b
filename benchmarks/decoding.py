"""One more token, and a prompt: `KVCache` beside a full cache that is allocated ahead.

Run as `python benchmarks/decoding.py`; prints a table. B = 1, 8 heads of width 64, stride 128,
summary 8.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from colonnade import FixedPattern, KVCache
from colonnade.bench import Comparison, compare

PATTERN = FixedPattern(128, 8)
HEADS, HEAD_DIM = 8, 64
HELD = 65_536
PROMPT = 32_768
TOKENS = 64
"""That are timed together; the caches go back to where they were in between."""


def main() -> None:
    """Everything, a line each."""
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        for kv_heads in (HEADS, 2):
            name = f"{str(dtype).removeprefix('torch.')}, {kv_heads} key heads"
            for max_seq_len in (HELD, None):
                cache = _filled(dtype, kv_heads, max_seq_len)
                fewer = 2 * kv_heads * HELD * HEAD_DIM * dtype.itemsize / cache.nbytes
                print(f"{name}, max_seq_len={max_seq_len}: {fewer:.2f} times fewer bytes")
            _print(f"{name}, {TOKENS} tokens", compare(_token_by_token(dtype, kv_heads), 9))
            _print(f"{name}, prompt", compare(_prompt(dtype, kv_heads), 5))


def _print(name: str, found: Comparison) -> None:
    ours, ratio = found.seconds["cache"], found.ratio["dense"]
    print(
        f"{name}: {1e3 * ours.median:.2f} ms, dense takes {ratio.median:.1f} "
        f"({ratio.low:.1f}–{ratio.high:.1f}) times as long",
        flush=True,
    )


def _inputs(dtype: torch.dtype, kv_heads: int, length: int) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (
        torch.randn(1, heads, length, HEAD_DIM).to(dtype) for heads in (HEADS, kv_heads, kv_heads)
    )
    return query, key, value


def _filled(dtype: torch.dtype, kv_heads: int, max_seq_len: int | None) -> KVCache:
    cache = KVCache(PATTERN, max_seq_len)
    for _ in range(8):
        cache.append(*_inputs(dtype, kv_heads, HELD // 8)[1:])
    return cache


def _token_by_token(dtype: torch.dtype, kv_heads: int) -> dict[str, Callable[[], object]]:
    """Both append; the full cache attends as a user of PyTorch would."""
    cache = _filled(dtype, kv_heads, HELD + TOKENS)
    cache.evicting = False  # To be able to go back.
    keys, values = (torch.randn(1, kv_heads, HELD + TOKENS, HEAD_DIM).to(dtype) for _ in "kv")
    tokens = [_inputs(dtype, kv_heads, 1) for _ in range(TOKENS)]

    @torch.no_grad()
    def ours() -> None:
        for query, key, value in tokens:
            cache.attend(query, key, value)
        cache.crop(HELD)

    @torch.no_grad()
    def dense() -> None:
        for at, (query, key, value) in enumerate(tokens, start=HELD):
            keys[:, :, at] = key[:, :, 0]
            values[:, :, at] = value[:, :, 0]
            k, v = keys[:, :, : at + 1], values[:, :, : at + 1]
            scaled_dot_product_attention(query, k, v, enable_gqa=kv_heads != HEADS)

    return {"cache": ours, "dense": dense}


def _prompt(dtype: torch.dtype, kv_heads: int) -> dict[str, Callable[[], object]]:
    query, key, value = _inputs(dtype, kv_heads, PROMPT)

    @torch.no_grad()
    def ours() -> None:
        KVCache(PATTERN, max_seq_len=HELD).attend(query, key, value)

    @torch.no_grad()
    def dense() -> None:
        scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=kv_heads != HEADS
        )

    return {"cache": ours, "dense": dense}


if __name__ == "__main__":
    main()
