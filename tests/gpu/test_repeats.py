"""The same bits in every run: no result depends on which program of a kernel ends first.

Kernels without atomics promise this. A race shows in a small share of the launches, so there are
many, with many queries for each key.
"""

from __future__ import annotations

import pytest
import torch

from colonnade import FixedPattern
from tests.cases import Case, attend
from tests.gpu.common import DEVICE, each_width, equal_bits, marks, sized

pytestmark = marks
STRIDE = sized(128, 16)
REPEATS = sized(200, 1)
N = sized(16_384, 40)
PATTERNS = {
    "merged": FixedPattern(STRIDE, 8),
    "many summaries": FixedPattern(STRIDE, STRIDE // 4, subblocks=2),
    "long blocks": FixedPattern(8 * STRIDE, 16),
    "summary": FixedPattern(STRIDE, 8, part="summary"),
}


@each_width
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
def test_results_have_the_same_bits_every_time(pattern: FixedPattern, width: int) -> None:
    case = Case(pattern, 1, 2, sized(4, 1), N, N, width, width, width**-0.5)
    inputs = case.inputs(torch.bfloat16).to(DEVICE)
    first = attend(case, inputs, "triton")
    assert all(result.abs().sum() > 0 for result in first)
    equal = [equal_bits(attend(case, inputs, "triton"), first) for _ in range(REPEATS)]
    different = REPEATS - int(torch.stack(equal).sum())
    assert different == 0, f"{different} of {REPEATS} runs differ from the first"


@each_width
def test_results_are_those_of_each_row_and_head_alone(width: int) -> None:
    """Whatever else runs at the same time: output, log-sum-exp and gradients of queries."""
    n = sized(4_096, 60)
    case = Case(FixedPattern(STRIDE, 8), 2, 2, 2, n, n, width, width, width**-0.5)
    inputs = case.inputs(torch.bfloat16).to(DEVICE)
    together = attend(case, inputs, "triton")
    for row in range(case.batch):
        for head in range(case.kv_heads):
            queries, keys = case.queries_of(head), slice(head, head + 1)
            query, key, value, *grads = (t[row : row + 1] for t in inputs)
            query, *grads = (t[:, queries] for t in (query, *grads))
            alone = inputs._replace(
                query=query,
                key=key[:, keys],
                value=value[:, keys],
                grad_out=grads[0],
                grad_lse=grads[1],
            )
            found = attend(case, alone, "triton")
            for name in ("out", "lse", "grad_query"):
                whole = getattr(together, name)[row : row + 1, queries]
                assert torch.equal(getattr(found, name), whole), (name, row, head)
