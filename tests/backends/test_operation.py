"""Operations as tools see them: by name in a profile, and by shapes alone without data."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from colonnade import (
    FixedPattern,
    FullPattern,
    KVCache,
    LocalPattern,
    Pattern,
    StridedPattern,
    attention_varlen,
    backends,
)
from colonnade.nn import SelfAttention
from tests.cases import Case, backpropagate, both, each_pattern, output


def _names(call: Callable[[], object]) -> dict[str, int]:
    """Return the operations of ours that a profile shows, and how often each was called."""
    # acc_events: else PyTorch 2.11 warns that a second cycle would clear what is found.
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        call()
    return {e.key: e.count for e in profiled.key_averages() if e.key.startswith("colonnade::")}


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(
    ("pattern", "name"),
    [
        (FixedPattern(4, 1), "eager"),
        (StridedPattern(4), "windowed"),
        (LocalPattern(4), "windowed"),
    ],
    ids=str,
)
def test_a_profile_names_what_runs(pattern: Pattern, name: str, grad: bool) -> None:
    inputs = Case(pattern).inputs()

    def step() -> None:
        leaves = inputs.leaves()
        with torch.set_grad_enabled(grad):
            pair = both(*leaves, pattern, "eager")
        if grad:
            backpropagate(pair, leaves, inputs)

    expected = {f"colonnade::{name}_forward": 1}
    if grad:
        expected[f"colonnade::{name}_backward"] = 1
    assert _names(step) == expected


def test_a_profile_names_the_native_kernels() -> None:
    if why_not := backends()["native"]:
        pytest.skip(f"native {why_not}")
    leaves = Case().inputs(torch.float32).leaves()
    found = _names(lambda: output(*leaves, FixedPattern(4, 1), "native").sum().backward())
    for name in ("forward", "forward_kernel", "backward", "backward_kernel"):
        assert found[f"colonnade::native_{name}"] == 1
    cache = KVCache(FixedPattern(4, 1), backend="native")
    query, key, value = (t.detach()[:, :, :1] for t in leaves)
    assert "colonnade::native_decode" in _names(lambda: cache.attend(query, key, value))


def test_a_profile_changes_no_result() -> None:
    case = Case(q_len=11)
    inputs = case.inputs(torch.float32)

    def run() -> tuple[Tensor, ...]:
        leaves = inputs.leaves()
        return tuple(backpropagate(both(*leaves, case.pattern), leaves, inputs))

    expected = run()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True):
        found = run()
    assert all(map(torch.equal, found, expected))


@contextmanager
def _meta() -> Iterator[str]:
    yield "meta"


@contextmanager
def _fake() -> Iterator[str]:
    with FakeTensorMode():
        yield "cpu"


without_data = pytest.mark.parametrize("without_data", [_meta, _fake])
each_backend = pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
Without = Callable[[], AbstractContextManager[str]]


def _is_like(gradient: Tensor, tensor: Tensor) -> None:
    assert (gradient.shape, gradient.dtype, gradient.device) == (
        tensor.shape,
        tensor.dtype,
        tensor.device,
    )


@pytest.mark.parametrize("name", ["eager", "triton"])
@pytest.mark.parametrize("way", ["forward", "backward"])
def test_a_compiler_leaves_an_operation_out_of_its_graphs_of_a_device(name: str, way: str) -> None:
    """What stays on the device would lie in their memory, and cu_seqlens is looked into."""
    operation = getattr(torch.ops.colonnade, f"{name}_{way}").default
    assert torch.Tag.cudagraph_unsafe in operation.tags


@pytest.mark.plain
@without_data
@each_pattern
@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shapes_forward_and_backward(
    dtype: torch.dtype, backend: str, pattern: Pattern, without_data: Without
) -> None:
    with without_data() as device:
        query = torch.empty(2, 4, 11, 6, dtype=dtype, device=device, requires_grad=True)
        key = torch.empty(2, 2, 13, 6, dtype=dtype, device=device, requires_grad=True)
        value = torch.empty(2, 2, 13, 5, dtype=dtype, device=device, requires_grad=True)
        out, lse = both(query, key, value, pattern, backend)
        _is_like(out, query.new_empty(2, 4, 11, 5))
        _is_like(lse, query.new_empty(2, 4, 11, dtype=torch.float32))
        grads = torch.autograd.grad(out.float().sum() + lse.sum(), (query, key, value))
        for gradient, tensor in zip(grads, (query, key, value), strict=True):
            _is_like(gradient, tensor)


@pytest.mark.plain
@without_data
@each_pattern
@each_backend
def test_shapes_of_packed_documents(backend: str, pattern: Pattern, without_data: Without) -> None:
    """The lengths of the documents are not known."""
    with without_data() as device:
        query = torch.empty(13, 4, 6, device=device, requires_grad=True)
        key = torch.empty(13, 2, 6, device=device)
        cu_seqlens = torch.tensor([0, 5, 13], device=device)
        out = attention_varlen(query, key, key, cu_seqlens, pattern, backend=backend)
        _is_like(out, query)
        _is_like(torch.autograd.grad(out.sum(), query)[0], query)


@pytest.mark.plain
@without_data
@pytest.mark.parametrize("pattern", [FixedPattern(4, 1), StridedPattern(4), FullPattern()], ids=str)
def test_shapes_of_layers_and_caches(pattern: Pattern, without_data: Without) -> None:
    with without_data() as device:
        with torch.device(device):
            layer = SelfAttention(16, 4, pattern, 2)
            x = torch.empty(2, 9, 16, requires_grad=True)
            padding_mask = torch.ones(2, 9, dtype=torch.bool)
        for mask in (None, padding_mask):
            y = layer(x, padding_mask=mask)
            _is_like(y, x)
            _is_like(torch.autograd.grad(y.sum(), x)[0], x)
        cache = layer.new_cache()
        for part in (x, x[:, :1]):
            _is_like(layer(part, cache), part)
        assert cache.seq_len == 10
        with pytest.raises(NotImplementedError, match=r"padding_mask.*no contents"):
            layer(x, cache, padding_mask=padding_mask)
        assert cache.seq_len == 10


@pytest.mark.plain
def test_meta_tensors_take_no_time() -> None:
    """Half a million positions: no loop runs over rows of queries."""
    x = torch.empty(1, 8, 2**19, 64, device="meta", requires_grad=True)
    # acc_events: else PyTorch 2.11 warns that a second cycle would clear what is found.
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as profiled:
        output(x, x, x, FixedPattern(128, 8)).sum().backward()
    assert sum(e.count for e in profiled.key_averages()) < 200
