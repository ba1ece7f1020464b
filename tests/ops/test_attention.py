"""Every pattern against the oracle: output, log-sum-exp and every gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from colonnade import (
    FixedPattern,
    FullPattern,
    LocalPattern,
    Pattern,
    StridedPattern,
)
from colonnade.backends import eager
from colonnade.backends.eager import full, stacked
from tests.cases import (
    Case,
    Inputs,
    Results,
    attend,
    attend_by_loops,
    attend_by_products,
    backpropagate,
    both,
    cases,
    each_pattern,
    output,
    patterns,
)
from tests.layouts import LAYOUTS, laid_out
from tests.rounding import check

BACKENDS = ("eager", "reference")


@settings(max_examples=120)
@given(case=cases())
def test_backends_equal_the_definition(case: Case) -> None:
    """Grouped heads, unlike widths, a start in mid-block, sub-blocks, parts: all are drawn."""
    inputs = case.inputs()
    expected = attend_by_products(case, inputs)
    for backend in BACKENDS:
        check(case, inputs, attend(case, inputs, backend), expected)


@each_pattern
@pytest.mark.parametrize("q_len", [10, 13])
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_kind_equals_the_definition(backend: str, q_len: int, pattern: Pattern) -> None:
    """Three key heads on two sub-blocks: those of one sub-block are no neighbours."""
    case = Case(pattern, batch=1, kv_heads=3, q_len=q_len)
    inputs = case.inputs()
    check(case, inputs, attend(case, inputs, backend), attend_by_loops(case, inputs))


@settings(max_examples=60)
@given(case=cases(160, patterns(40)))
def test_eager_equals_reference_over_many_blocks(case: Case) -> None:
    inputs = case.inputs()
    check(case, inputs, attend(case, inputs, "eager"), attend(case, inputs, "reference"))


@given(case=cases(), tile=st.integers(1, 6), scores=st.sampled_from((1, 50, 500)))
def test_the_size_of_eagers_tiles_does_not_matter(case: Case, tile: int, scores: int) -> None:
    """At the true sizes, short sequences are one tile, and rows of one shape are all stacked."""
    inputs = case.inputs()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "FULL_TILE", tile)
        patch.setattr(stacked, "STACKED_SCORES", scores)
        found = attend(case, inputs, "eager")
    check(case, inputs, found, attend_by_products(case, inputs))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q_len", [1, 4, 7, 11])
@pytest.mark.parametrize("causal", [True, False])
def test_full_pattern_is_aligned_at_the_bottom_right(
    causal: bool, q_len: int, backend: str
) -> None:
    """The queries are the last ones; PyTorch's own is_causal would align at the top left."""
    case = Case(FullPattern(causal), q_len=q_len, kv_len=11, v_dim=4)
    inputs = case.inputs()
    query, key, value = inputs[:3]
    expected = attend_by_loops(case, inputs)
    check(case, inputs, attend(case, inputs, backend), expected)
    alone = output(query, key, value, case.pattern, backend, case.scale)
    check(case, inputs, expected._replace(out=alone), expected)


def _for_the_dense_kernel(case: Case) -> Case:
    """Return it with values as wide as keys, and as many queries as keys."""
    return replace(case, q_len=case.kv_len, v_dim=case.qk_dim)


_full_cases = cases(pattern=st.builds(FullPattern, st.booleans()))


@given(case=_full_cases | _full_cases.map(_for_the_dense_kernel))
def test_full_attention_without_the_lse_equals_the_definition(case: Case) -> None:
    """PyTorch's own kernel runs where it keeps the contract; its gradients are PyTorch's too."""
    inputs = case.inputs()
    inputs = inputs._replace(grad_lse=torch.zeros_like(inputs.grad_lse))
    expected = attend_by_products(case, inputs)
    for backend in BACKENDS:
        leaves = inputs.leaves()
        out = output(*leaves, case.pattern, backend, case.scale)
        check(case, inputs, backpropagate((out, expected.lse), leaves, inputs), expected)


@pytest.mark.parametrize(
    ("changes", "dtype", "return_lse", "dense"),
    [
        ({}, torch.float32, False, True),
        ({}, torch.float64, False, True),
        ({"group": 1}, torch.float32, False, True),
        ({"pattern": FullPattern(causal=False), "q_len": 5}, torch.float32, False, True),
        ({"q_len": 1}, torch.float32, False, True),
        ({"q_len": 1}, torch.bfloat16, False, True),
        ({"q_len": 5}, torch.float32, False, True),
        ({"q_len": 5}, torch.bfloat16, False, True),
        ({"v_dim": 3}, torch.float32, False, False),
        ({}, torch.bfloat16, False, False),
        ({}, torch.float32, True, False),
    ],
    ids=[
        *("float32", "float64", "no groups", "both ways", "one query", "one in half precision"),
        *("fewer", "fewer in half precision", "widths", "half", "lse"),
    ],
)
def test_where_the_dense_kernel_runs(
    changes: dict[str, Any],
    dtype: torch.dtype,
    return_lse: bool,
    dense: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without this, the tests of its results would pass if it never ran."""
    runs = []

    def record(*args: Any, **kwargs: Any) -> Tensor:
        runs.append(kwargs)
        return scaled_dot_product_attention(*args, **kwargs)

    monkeypatch.setattr(full, "scaled_dot_product_attention", record)
    case = replace(Case(FullPattern(), v_dim=4), **changes)
    run = both if return_lse else output
    run(*case.inputs(dtype)[:3], case.pattern, "eager")
    assert len(runs) == dense


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("q_len", [2, 7, 8, 9, 20, 36])
def test_the_last_queries_of_a_full_pattern(
    q_len: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without gradients PyTorch's kernel takes some of them at a time, with scores in float32."""
    monkeypatch.setattr(full, "MASKED_TILE", 8)
    case = Case(FullPattern(), q_len=q_len, kv_len=37, v_dim=4)
    inputs = case.inputs(dtype)
    found = output(*inputs[:3], case.pattern, "eager", case.scale)
    expected = attend_by_products(case, inputs)
    check(case, inputs, Results(found, *expected[1:]), expected)


@pytest.mark.parametrize(
    ("pattern", "same"),
    [
        (StridedPattern(1), FullPattern()),
        (StridedPattern(1, part="summary"), FullPattern()),
        (StridedPattern(1, part="local"), LocalPattern(2)),
        (StridedPattern(13), FullPattern()),
        (StridedPattern(100), FullPattern()),
        (StridedPattern(12, part="local"), FullPattern()),
        (StridedPattern(100, part="local"), FullPattern()),
        (StridedPattern(13, part="summary"), LocalPattern(1)),
        (StridedPattern(100, part="summary"), LocalPattern(1)),
        (LocalPattern(13), FullPattern()),
        (LocalPattern(10**12), FullPattern()),
        (FixedPattern(100, 1), FullPattern()),
        (FixedPattern(100, 1, causal=False), FullPattern(causal=False)),
        (FixedPattern(1, 1, causal=False), FullPattern(causal=False)),
    ],
    ids=str,
)
@pytest.mark.parametrize("q_len", [1, 6, 13])
def test_at_the_ends_of_the_range_of_sizes(pattern: Pattern, same: Pattern, q_len: int) -> None:
    """A stride of 1, and strides and windows as long as the sequence or longer."""
    case = Case(pattern, q_len=q_len)
    inputs = case.inputs()
    expected = attend_by_products(replace(case, pattern=same), inputs)
    check(case, inputs, attend(case, inputs, "eager"), expected)


def test_a_window_of_one_gives_the_values() -> None:
    case = Case(LocalPattern(1))
    query, key, value = case.inputs()[:3]
    out, lse = both(query, key, value, case.pattern, "eager", 1.0)
    key, value = (t.repeat_interleave(case.group, 1) for t in (key, value))
    assert torch.equal(out, value)
    torch.testing.assert_close(lse, (query * key).sum(-1))


def test_scale_defaults_to_one_over_the_root_of_the_query_width() -> None:
    """The width is the queries', here 4, not the values', here 3."""
    case = Case()
    query, key, value = case.inputs()[:3]
    for backend in BACKENDS:
        out, _ = both(query, key, value, case.pattern, backend)
        half, _ = both(query, key, value, case.pattern, backend, scale=0.5)
        assert torch.equal(out, half)


@each_pattern
def test_without_return_lse_the_output_comes_alone(pattern: Pattern) -> None:
    case = Case(pattern)
    query, key, value = case.inputs()[:3]
    for backend in BACKENDS:
        out = output(query, key, value, pattern, backend)
        pair = both(query, key, value, pattern, backend)
        assert torch.equal(out, pair[0])
        assert out.shape == (2, 4, 13, 3)
        assert pair[1].shape == (2, 4, 13)


# Hundreds of calls of one kind: checks of types would only repeat themselves.
@pytest.mark.plain
@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, q_len=7, kv_len=7, qk_dim=2, v_dim=2, group=1),
        Case(FixedPattern(4, 1, subblocks=2), batch=1, q_len=5, kv_len=8, qk_dim=3, v_dim=1),
        Case(FixedPattern(3, 1, part="summary"), batch=1, q_len=7, kv_len=7, qk_dim=2, v_dim=2),
        Case(FixedPattern(3, 2, part="local"), batch=1, q_len=4, kv_len=8, qk_dim=1, v_dim=2),
        Case(FixedPattern(4, 1, 2, causal=False), batch=1, q_len=5, kv_len=7, qk_dim=2, v_dim=1),
        Case(StridedPattern(3), batch=1, q_len=6, kv_len=8, qk_dim=2, v_dim=1, group=1),
        Case(StridedPattern(3, part="summary"), batch=1, q_len=4, kv_len=7, qk_dim=1, v_dim=2),
        Case(LocalPattern(3), batch=1, q_len=5, kv_len=8, qk_dim=2, v_dim=1),
        Case(FullPattern(), batch=1, q_len=4, kv_len=4, qk_dim=2, v_dim=2),
    ],
    ids=[
        "merged",
        "subblocks mid-block",
        "summary",
        "local mid-block",
        "bidirectional",
        "strided",
        "strided summary",
        "window",
        "full",
    ],
)
def test_gradients_equal_differences(case: Case) -> None:
    """The derivative of the formula is not taken from any formula here: PyTorch's finite ones."""

    def run(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = both(query, key, value, case.pattern, "eager", 0.7)
        return out, lse.masked_fill(lse.isinf(), 0.0)  # -inf minus -inf is no difference

    assert torch.autograd.gradcheck(run, case.inputs().leaves())


@each_pattern
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_result_alone_can_be_differentiated(backend: str, pattern: Pattern) -> None:
    """A loss of the output only, or of the lse only, is that part of the sum."""
    case = Case(pattern)
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


each_layout = pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"contiguous"}))


@each_layout
@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=15)
@given(case=cases())
def test_layout_in_memory_does_not_matter(backend: str, layout: str, case: Case) -> None:
    inputs = case.inputs()
    laid = laid_out(inputs, layout)
    query, key, value = (t.detach().requires_grad_() for t in laid[:3])
    pair = both(query, key, value, case.pattern, backend, case.scale)
    found = backpropagate(pair, (query, key, value), laid)
    check(case, inputs, found, attend(case, inputs, backend))


@each_layout
@pytest.mark.parametrize("causal", [True, False])
def test_layout_in_memory_does_not_matter_without_the_lse(causal: bool, layout: str) -> None:
    """PyTorch's own kernels ask for a dense width."""
    case = Case(FullPattern(causal), v_dim=4)
    inputs = case.inputs()
    out = output(*laid_out(inputs, layout)[:3], case.pattern, scale=case.scale)
    expected = attend_by_loops(case, inputs)
    check(case, inputs, expected._replace(out=out), expected)


@each_pattern
@pytest.mark.parametrize("backend", BACKENDS)
def test_expanded_inputs_and_gradients(backend: str, pattern: Pattern) -> None:
    """One tensor seen twice, as by expand: its gradient is the sum over the copies."""
    case = Case(pattern, batch=2)
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
