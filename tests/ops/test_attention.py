"""Both backends against plain loops over the sets: output, log-sum-exp and every gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from colonnade import FixedPattern, FullPattern, attention
from tests import oracle
from tests.cases import Case, Inputs, attend, attend_by_loops, backpropagate, both, cases
from tests.rounding import check

BACKENDS = ("eager", "reference")


@given(case=cases())
def test_backends_equal_the_definition(case: Case) -> None:
    """Grouped heads, unlike widths, a start in mid-block, sub-blocks, parts: all are drawn."""
    inputs = case.inputs()
    expected = attend_by_loops(case, inputs)
    for backend in BACKENDS:
        check(case, inputs, attend(case, inputs, backend), expected)


@settings(max_examples=30)
@given(case=cases(max_len=12, causal=False))
def test_reference_equals_the_definition_for_bidirectional_patterns(case: Case) -> None:
    inputs = case.inputs()
    check(case, inputs, attend(case, inputs, "reference"), attend_by_loops(case, inputs))


@settings(max_examples=30)
@given(case=cases(max_len=160, max_stride=40))
def test_eager_equals_reference_over_many_blocks(case: Case) -> None:
    inputs = case.inputs()
    check(case, inputs, attend(case, inputs, "eager"), attend(case, inputs, "reference"))


@pytest.mark.parametrize("q_len", [1, 4, 7, 11])
@pytest.mark.parametrize("causal", [True, False])
def test_full_pattern_is_aligned_at_the_bottom_right(causal: bool, q_len: int) -> None:
    """The queries are the last ones; PyTorch's own is_causal would align at the top left."""
    inputs = Case(q_len=q_len, kv_len=11).inputs()
    every = torch.ones(11, 11, dtype=torch.bool)
    mask = (every.tril() if causal else every)[11 - q_len :].expand(2, -1, -1)
    out, lse = both(*inputs[:3], FullPattern(causal=causal), scale=0.7)
    expected_out, expected_lse = oracle.loop_attention(*inputs[:3], mask, 0.7)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


def test_scale_defaults_to_one_over_the_root_of_the_query_width() -> None:
    """The width is the queries', here 4, not the values', here 3."""
    case = Case()
    query, key, value = case.inputs()[:3]
    for backend in BACKENDS:
        out, _ = both(query, key, value, case.pattern, backend)
        half, _ = both(query, key, value, case.pattern, backend, scale=0.5)
        assert torch.equal(out, half)


def test_without_return_lse_the_output_comes_alone() -> None:
    case = Case()
    query, key, value = case.inputs()[:3]
    for backend in BACKENDS:
        out = attention(query, key, value, case.pattern, backend=backend)
        pair = both(query, key, value, case.pattern, backend)
        assert isinstance(out, Tensor)
        assert torch.equal(out, pair[0])
        assert out.shape == (2, 4, 13, 3)
        assert pair[1].shape == (2, 4, 13)


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, q_len=7, kv_len=7, qk_dim=2, v_dim=2, group=1),
        Case(FixedPattern(4, 1, subblocks=2), batch=1, q_len=5, kv_len=8, qk_dim=3, v_dim=1),
        Case(FixedPattern(3, 1, part="summary"), batch=1, q_len=7, kv_len=7, qk_dim=2, v_dim=2),
        Case(FixedPattern(3, 2, part="local"), batch=1, q_len=4, kv_len=8, qk_dim=1, v_dim=2),
    ],
    ids=["merged", "subblocks mid-block", "summary", "local mid-block"],
)
def test_gradients_equal_differences(case: Case) -> None:
    """The derivative of the formula is not taken from any formula here: PyTorch's finite ones."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = both(query, key, value, case.pattern, "eager", 0.7)
        return out, lse.masked_fill(lse.isinf(), 0.0)  # -inf minus -inf is no difference

    assert torch.autograd.gradcheck(run, case.inputs().leaves())


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_result_alone_can_be_differentiated(backend: str) -> None:
    """A loss of the output only, or of the lse only, is that part of the sum."""
    case = Case()
    inputs = case.inputs()
    only_out = inputs._replace(grad_lse=torch.zeros_like(inputs.grad_lse))
    only_lse = inputs._replace(grad_out=torch.zeros_like(inputs.grad_out))
    for index, (grad, rest) in enumerate(
        [(inputs.grad_out, only_out), (inputs.grad_lse, only_lse)]
    ):
        leaves = inputs.leaves()
        pair = both(*leaves, case.pattern, backend, case.scale)
        alone = torch.autograd.grad(pair[index], leaves, grad, materialize_grads=True)
        for found, expected in zip(alone, attend(case, rest, backend)[2:], strict=True):
            torch.testing.assert_close(found, expected)


def _transposed(tensor: Tensor) -> Tensor:
    """Equal numbers that lie in memory as [batch, seq, heads, width], as projections leave them."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _spread(tensor: Tensor) -> Tensor:
    """Equal numbers with gaps between them in memory, along the width too."""
    return tensor.repeat_interleave(2, 3)[..., ::2]


@pytest.mark.parametrize("lay_out", [_transposed, _spread])
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=10)
@given(case=cases())
def test_layout_in_memory_does_not_matter(
    backend: str, lay_out: Callable[[Tensor], Tensor], case: Case
) -> None:
    inputs = case.inputs()
    tensors = (lay_out(t).detach().requires_grad_() for t in inputs[:3])
    query, key, value = tensors
    moved = Inputs(query, key, value, lay_out(inputs.grad_out), inputs.grad_lse)
    pair = both(query, key, value, case.pattern, backend, case.scale)
    found = backpropagate(pair, (query, key, value), moved)
    check(case, inputs, found, attend(case, inputs, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs_and_gradients(backend: str) -> None:
    """One tensor seen twice, as by expand: its gradient is the sum over the copies."""
    case = Case(batch=2)
    one = replace(case, batch=1).inputs()
    inputs = Inputs(*(t.expand(2, *t.shape[1:]) for t in one))
    leaves = one.leaves()
    query, key, value = (t.expand(2, -1, -1, -1) for t in leaves)
    pair = both(query, key, value, case.pattern, backend, case.scale)
    found = backpropagate(pair, leaves, inputs)
    expected = attend_by_loops(case, inputs)
    torch.testing.assert_close(found[:2], expected[:2])
    for grad, grads in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(grad, grads.sum(0, keepdim=True))
