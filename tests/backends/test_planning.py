"""A plan that is kept serves every later call, whatever surrounded the call that made it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from colonnade import FixedPattern, backends
from colonnade.backends import planning
from tests.cases import Case, attend, attend_by_loops, output
from tests.rounding import check

pytestmark = pytest.mark.plain
CASE = Case(FixedPattern(8, 2), q_len=21, kv_len=23)


@pytest.fixture(params=["eager", "native"])
def backend(request: pytest.FixtureRequest) -> str:
    if why_not := backends()[request.param]:
        pytest.skip(f"{request.param} {why_not}")
    planning._kept.cache_clear()
    return str(request.param)


def _is_right(backend: str) -> None:
    inputs = CASE.inputs(torch.float32)
    check(CASE, inputs, attend(CASE, inputs, backend), attend_by_loops(CASE, inputs))


@pytest.mark.parametrize(
    "around", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")]
)
def test_the_first_call_may_come_under_any_mode(
    backend: str, around: Callable[[], AbstractContextManager[object]]
) -> None:
    inputs = CASE.inputs(torch.float32)
    with around():
        output(*inputs[:3], CASE.pattern, backend)
    _is_right(backend)


@pytest.mark.parametrize("kept", [False, True])
def test_fake_tensors_neither_meet_nor_leave_a_kept_plan(backend: str, kept: bool) -> None:
    if kept:
        _is_right(backend)
    query, key, value = CASE.inputs(torch.float32)[:3]
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake_query, fake_key, fake_value = (mode.from_tensor(t) for t in (query, key, value))
        out = output(fake_query, fake_key, fake_value, CASE.pattern, backend)
    assert isinstance(out, FakeTensor)
    assert out.shape == (*query.shape[:3], value.shape[3])
    _is_right(backend)


def test_a_trace_with_symbolic_lengths_holds_for_others(backend: str) -> None:
    def run(x: torch.Tensor) -> torch.Tensor:
        return output(x, x, x, CASE.pattern, backend)

    traced = make_fx(run, tracing_mode="symbolic")(torch.randn(1, 1, 30, 8))
    for n in (30, 41):
        x = torch.randn(1, 1, n, 8)
        assert torch.equal(traced(x), run(x))
