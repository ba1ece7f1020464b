"""Print, as JSON, eager's peak memory over one forward and backward; run by test_memory.py.

Called with a pattern's name, the number of keys and that of queries.

A process of its own: what other code has allocated and freed would hide the peak.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from torch import Tensor

from colonnade import FixedPattern, LocalPattern, Pattern, StridedPattern, attention

WIDTH = 64
STRIDE = 128
PATTERNS: dict[str, Pattern] = {
    "fixed": FixedPattern(STRIDE, 8),
    "bidirectional": FixedPattern(STRIDE, 8, causal=False),
    "strided": StridedPattern(STRIDE),
    "window": LocalPattern(STRIDE),
    "wide window": LocalPattern(16_384),
}


def resident(entry: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak since the last reset)."""
    found = re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def run(pattern: Pattern, kv_len: int, q_len: int) -> tuple[int, list[Tensor]]:
    """The peak beyond what was there before, and the tensors that are left."""
    lengths = q_len, kv_len, kv_len, q_len
    query, key, value, grad_out = (torch.randn(1, 1, length, WIDTH) for length in lengths)
    leaves = [t.requires_grad_() for t in (query, key, value)]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, from what is there now
    before = resident("VmRSS")
    out = attention(query, key, value, pattern, backend="eager")
    assert isinstance(out, Tensor)
    out.backward(grad_out)
    grads = [t.grad for t in leaves if t.grad is not None]
    return resident("VmHWM") - before, [*leaves, out.detach(), *grads]


def main() -> None:
    """Warm up on a short sequence, then measure once."""
    name, kv_len, q_len = sys.argv[1:]
    torch.set_num_threads(1)
    run(PATTERNS[name], 1024, min(1024, int(q_len)))
    peak, tensors = run(PATTERNS[name], int(kv_len), int(q_len))
    sizes = [t.numel() * t.element_size() for t in tensors]
    assert len(sizes) == 7
    # Output and gradients are results, not working memory; the inputs were there before.
    print(json.dumps({"beyond": peak - sum(sizes[3:]), "unit": sum(sizes[:4])}))


if __name__ == "__main__":
    main()
