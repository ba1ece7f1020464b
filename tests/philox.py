"""Which weights dropout keeps, worked out from the definition with NumPy's 64-bit integers."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

WORD = np.uint64(0xFFFFFFFF)


def words(counter: list[np.ndarray], seed: int, rounds: int = 7) -> list[np.ndarray]:
    """Return the four words of Philox-4x32 for counters of four words each (Salmon et al. 2011)."""
    a, b, c, d = (np.asarray(each, dtype=np.uint64) for each in counter)
    low, high = (np.uint64(seed >> shift & 0xFFFFFFFF) for shift in (0, 32))
    for _ in range(rounds):
        one, two = np.uint64(0xD2511F53) * a, np.uint64(0xCD9E8D57) * c
        shift = np.uint64(32)
        a, b, c, d = (two >> shift) ^ b ^ low, two & WORD, (one >> shift) ^ d ^ high, one & WORD
        low, high = low + np.uint64(0x9E3779B9) & WORD, high + np.uint64(0xBB67AE85) & WORD
    return [a, b, c, d]


def kept(seed: int, p: float, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Return True where a weight is kept; the numbers of where it is are broadcast together."""
    numbers = torch.broadcast_tensors(key, query, head, row)
    j, i, h, b = (each.numpy().astype(np.uint64) for each in numbers)
    found = words([j >> np.uint64(2), i, h, b], seed)
    word = np.choose((j & np.uint64(3)).astype(np.int64), found)
    return torch.from_numpy(word >= np.uint64(round(p * 2**32)))


def kept_whole(seed: int, p: float, batch: int, heads: int, q_len: int, kv_len: int) -> Tensor:
    """Return [batch, heads, q_len, kv_len] for the last `q_len` of `kv_len` positions."""
    row, head = torch.arange(batch)[:, None, None, None], torch.arange(heads)[:, None, None]
    query, key = torch.arange(kv_len - q_len, kv_len)[:, None], torch.arange(kv_len)
    return kept(seed, p, row, head, query, key)
