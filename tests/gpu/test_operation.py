"""The operation under PyTorch's tools for GPUs: compiled, without a wait, and in a graph."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from colonnade import FixedPattern, attention
from tests.cases import Case
from tests.gpu.common import DEVICE, marks, needs_cuda, sized
from tests.packing import cu_seqlens_of, packed

pytestmark = [*marks, pytest.mark.plain]
N = sized(2_000, 70)
PATTERN = FixedPattern(128, 8)
LENGTHS = (N // 3, 1, N - N // 3 - 1)
Call = Callable[[Tensor, Tensor, Tensor], Tensor]


def _inputs(seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Return query, key and value that want gradients, and the gradient of the output."""
    case = Case(PATTERN, 1, 2, 2, N, N, 64, 64, seed=seed)
    *tensors, grad_out, _ = case.inputs(torch.bfloat16).to(DEVICE)
    return [t.requires_grad_() for t in tensors], grad_out


def _whole(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query, key, value, PATTERN, backend="triton")


def _dropped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    torch.manual_seed(7)
    return attention(query, key, value, PATTERN, backend="triton", dropout_p=0.3)


def _documents() -> Call:
    """Return attention within documents whose boundaries are on the device."""
    cu_seqlens = cu_seqlens_of(LENGTHS).to(DEVICE)
    options = {"backend": "triton", "return_lse": False}
    return lambda query, key, value: packed(query, key, value, cu_seqlens, PATTERN, **options)[0]


def _both_ways(call: Call, leaves: list[Tensor], grad_out: Tensor) -> list[Tensor]:
    out = call(*leaves)
    return [out, *torch.autograd.grad(out, leaves, grad_out)]


each_call = pytest.mark.parametrize("make", [lambda: _whole, _documents], ids=["whole", "packed"])


@each_call
def test_a_compiled_call_is_one_graph_with_the_same_bits(make: Callable[[], Call]) -> None:
    call = make()
    leaves, grad_out = _inputs()
    expected = _both_ways(call, leaves, grad_out)
    torch._dynamo.reset()
    found = _both_ways(torch.compile(call, fullgraph=True), leaves, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@contextmanager
def _no_waiting() -> Iterator[None]:
    """Let PyTorch raise where the host waits for the device."""
    with warnings.catch_warnings():
        # It says that this mode is a prototype.
        warnings.simplefilter("ignore")
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


@needs_cuda
def test_a_wait_would_be_seen() -> None:
    x = torch.ones(3, device=DEVICE)
    with _no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        x.sum().item()


@needs_cuda
@each_call
def test_a_second_call_never_waits_for_the_device(make: Callable[[], Call]) -> None:
    call = make()
    leaves, grad_out = _inputs()
    expected = _both_ways(call, leaves, grad_out)
    with _no_waiting():
        found = _both_ways(call, leaves, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_cuda
@each_call
def test_a_call_can_be_captured_in_a_graph(make: Callable[[], Call]) -> None:
    """Forward and backward, replayed with other numbers in the same memory."""
    call = make()
    leaves, grad_out = _inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # Whatever is compiled or listed once must not be in the graph.
        _both_ways(call, leaves, grad_out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _both_ways(call, leaves, grad_out)
    others, another = _inputs(seed=1)
    with torch.no_grad():
        for leaf, other in zip([*leaves, grad_out], [*others, another], strict=True):
            leaf.copy_(other)
    graph.replay()
    expected = _both_ways(call, others, another)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@needs_cuda
def test_a_second_call_with_dropout_never_waits_for_the_device() -> None:
    leaves, grad_out = _inputs()
    expected = _both_ways(_dropped, leaves, grad_out)
    with _no_waiting():
        found = _both_ways(_dropped, leaves, grad_out)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@needs_cuda
def test_a_graph_drops_other_weights_each_time() -> None:
    """Forward and backward of one replay drop the same: values are what the gradient says."""
    leaves, grad_out = _inputs()

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, PATTERN, backend="triton", dropout_p=0.5)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        _both_ways(call, leaves, grad_out)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = _both_ways(call, leaves, grad_out)
    found = []
    for _ in range(2):
        graph.replay()
        out, _, _, grad_value = (t.detach().clone() for t in captured)
        found.append(out)
        # Linear in values: Σ out · dO = Σ values · dV.
        one, other = (out.double() * grad_out).sum(), (leaves[2].double() * grad_value).sum()
        norm = (leaves[2].double() * grad_value).norm()
        assert (one - other).abs() < 0.01 * norm
    assert not torch.equal(*found)


@pytest.mark.skipif(torch.accelerator.device_count() < 2, reason="needs two devices")
def test_a_call_runs_where_its_tensors_are() -> None:
    """On a device that is not the current one."""
    leaves, grad_out = _inputs()
    expected = _both_ways(_whole, leaves, grad_out)
    there = torch.device(DEVICE.type, 1)
    moved = [t.detach().to(there).requires_grad_() for t in leaves]
    found = _both_ways(_whole, moved, grad_out.to(there))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.to(DEVICE), other)
