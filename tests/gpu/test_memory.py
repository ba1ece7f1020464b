"""Peak memory on a GPU at n = 262,144: beyond inputs and results at most what those take."""

from __future__ import annotations

import pytest
import torch

from colonnade import FixedPattern, attention
from colonnade.bench.device import peak_bytes
from colonnade.bench.timing import Sizes
from tests.gpu.common import DEVICE, each_width, marks, sized

pytestmark = marks


@each_width
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("part", ["merged", "summary"])
def test_a_quarter_of_a_million_positions_fit(width: int, kv_heads: int, part: str) -> None:
    """Forward and backward, with the lists of work that the first call makes."""
    n = sized(262_144, 100)
    shape = Sizes(n, heads=4, kv_heads=kv_heads, head_dim=width, dtype="bfloat16", backward=True)
    query, key, value, grad_out = shape.inputs(DEVICE)
    pattern = FixedPattern(128, 8, part=part)  # type: ignore[arg-type]

    def run() -> tuple[torch.Tensor, ...]:
        out = attention(query, key, value, pattern, backend="triton")
        return out, *torch.autograd.grad(out, (query, key, value), grad_out)

    peak = peak_bytes(run, DEVICE)
    assert all(t.isfinite().all() for t in run())
    if peak is None:
        pytest.skip("a CPU does not say how much memory was allocated at most")
    unit = 2 * query.nbytes + key.nbytes + value.nbytes
    print(f"peak beyond inputs and results: {peak / unit:.2f} · (q + k + v + out)")
    assert peak <= unit
