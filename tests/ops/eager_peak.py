"""Print, as JSON, eager's peak memory over one forward and backward; run by test_memory.py.

A process of its own: what other code has allocated and freed would hide the peak.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import Tensor

from colonnade import FixedPattern, attention

SEQ_LEN = 65_536
PATTERN = FixedPattern(stride=128, summary=8)


def resident(entry: str) -> int:
    """Bytes of VmRSS (now) or VmHWM (the peak since the last reset)."""
    found = re.search(rf"{entry}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


def run(seq_len: int) -> tuple[int, list[Tensor]]:
    """The peak beyond what was there before, and the tensors that are left."""
    query, key, value, grad_out = (torch.randn(1, 1, seq_len, 64) for _ in range(4))
    leaves = [t.requires_grad_() for t in (query, key, value)]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew, from what is there now
    before = resident("VmRSS")
    out = attention(query, key, value, PATTERN, backend="eager")
    assert isinstance(out, Tensor)
    out.backward(grad_out)
    grads = [t.grad for t in leaves if t.grad is not None]
    return resident("VmHWM") - before, [*leaves, out.detach(), *grads]


def main() -> None:
    """Warm up on a short sequence, then measure once."""
    torch.set_num_threads(1)
    run(1024)
    peak, tensors = run(SEQ_LEN)
    sizes = [t.numel() * t.element_size() for t in tensors]
    assert len(sizes) == 7
    # Output and gradients are results, not working memory; the inputs were there before.
    print(json.dumps({"beyond": peak - sum(sizes[3:]), "unit": sum(sizes[:4])}))


if __name__ == "__main__":
    main()
