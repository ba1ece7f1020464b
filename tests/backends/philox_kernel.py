"""A kernel that writes what `backends.triton.dropout.philox` computes; it imports Triton."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from colonnade.backends.triton.dropout import philox


@triton.jit  # type: ignore[untyped-decorator]  # Triton's.
def write_words(words: Any, counters: Any, seed: Any) -> None:
    """Write [4, 16] words for as many counters."""
    n = tl.arange(0, 16)
    one, two, three, four = philox(
        tl.load(seed),
        tl.load(counters + n).to(tl.uint32),
        tl.load(counters + 16 + n).to(tl.uint32),
        tl.load(counters + 32 + n).to(tl.uint32),
        tl.load(counters + 48 + n).to(tl.uint32),
    )
    tl.store(words + n, one.to(tl.int64))
    tl.store(words + 16 + n, two.to(tl.int64))
    tl.store(words + 32 + n, three.to(tl.int64))
    tl.store(words + 48 + n, four.to(tl.int64))
