"""Dropout on the device: the weights that are kept are those of the definition on the CPU."""

from __future__ import annotations

import pytest
import torch

from colonnade import FixedPattern, Pattern, attention
from colonnade.backends.choice import run
from colonnade.backends.dropout import Dropout
from colonnade.ops.check import make_call
from tests.cases import Case, Inputs, Results, backpropagate
from tests.gpu.common import DEVICE, HALF, each_type, marks, sized
from tests.rounding import check

pytestmark = marks
N = sized(250, 40)
P = 0.5
PATTERNS = {
    "quads": FixedPattern(sized(64, 16), 8, sinks=4),
    "quads, sub-blocks": FixedPattern(sized(40, 12), 4, subblocks=2),
    "quads, bidirectional": FixedPattern(sized(64, 16), 4, subblocks=2, causal=False),
    "each": FixedPattern(sized(50, 15), 7),
    "each, summary": FixedPattern(sized(30, 10), 5, part="summary", sinks=2),
}
each_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())


def _attend(case: Case, inputs: Inputs, backend: str) -> Results:
    """Return the results under one seed, on the inputs' device, brought back to the CPU."""
    leaves = query, key, value = inputs.leaves()
    seed = torch.tensor([2**61 + 5], device=query.device)
    call = make_call(query, case.pattern, case.scale, Dropout(P, seed))
    out, lse = run(query, key, value, call, backend)
    assert lse is not None
    return backpropagate((out, lse), leaves, inputs).to(torch.device("cpu"))


@each_pattern
@each_type
def test_weights_and_gradients_are_those_of_the_reference(
    pattern: Pattern, dtype: torch.dtype
) -> None:
    """With unit vectors as values an output is the row of its weights; P is a power of 2."""
    case = Case(pattern, 1, 2, 2, N - 3, N, 16, N, 0.3)
    unit = torch.eye(N, dtype=dtype).expand(1, 2, -1, -1)
    inputs = case.inputs(dtype)._replace(value=unit)
    expected = _attend(case, inputs.double(), "reference")
    found = _attend(case, inputs.to(DEVICE), "triton")
    assert torch.equal(found.out > 0, expected.out > 0)
    inputs = inputs._replace(value=unit / (1 - P))
    found, expected = (r._replace(grad_value=r.grad_value * (1 - P)) for r in (found, expected))
    check(case, inputs, found, expected, dtype in HALF, also_rounded=dtype in HALF)


@pytest.mark.interpreted
def test_the_seed_comes_from_the_generator_of_the_device() -> None:
    x = torch.ones(1, 1, N, 16, device=DEVICE)
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(attention(x, x, x, PATTERNS["quads"], dropout_p=P, backend="triton"))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
