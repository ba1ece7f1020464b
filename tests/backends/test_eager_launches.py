"""What eager asks of a device: few operations, nothing that waits for it, no index from the CPU.

Meta tensors stand for those of a device. Everywhere else they only have shapes, and the operation
of PyTorch's dispatcher answers; here the functions run that would run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from colonnade import (
    FixedPattern,
    FullPattern,
    KVCache,
    LocalPattern,
    Pattern,
    StridedPattern,
    attention,
    attention_varlen,
)
from colonnade.backends.call import in_order, only_heads
from colonnade.backends.tracing import device as kept
from colonnade.backends.tracing import memo, operation
from tests.cases import each_pattern

pytestmark = pytest.mark.plain

PATTERN = FixedPattern(128, 8)
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


INDEXING = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)


def _waits(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an operation needs numbers of the device to go on; a mask as an index is counted."""
    if func.overloadpacket in INDEXING:
        return any(index is not None and index.dtype == torch.bool for index in args[1])
    return bool(WAITS & set(func.tags))


class Launches(TorchDispatchMode):
    """Counts the operations on meta tensors, views apart, and refuses what would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.launched = 0
        self.sent = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if any(t.is_meta for t in given):
            assert not _waits(func, args), f"{func} waits for the device"
        result = func(*args, **(kwargs or {}))
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        on_device = [t.is_meta for t in (*given, *made)]
        if not any(on_device):
            return result
        if all(on_device):
            alias = func._schema.returns[0].alias_info
            self.launched += alias is None or alias.is_write
            return result
        assert func in COPIES, f"{func} mixes devices"
        self.sent += 1
        return result


@pytest.fixture(autouse=True)
def _run_on_meta(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let functions run on meta tensors, and keep what they keep, although a mode looks on."""
    monkeypatch.setattr(operation, "_is_watched", lambda tensor: False)
    monkeypatch.setattr(memo, "is_tracing", lambda: False)


def _count(call: Callable[[], object]) -> Launches:
    """Count what a call launches after a first one, in which nothing may wait either."""
    with Launches():
        call()
    launches = Launches()
    with launches:
        call()
    return launches


def _step(
    pattern: Pattern, n: int, heads: int = 1, q_len: int | None = None, backward: bool = True
) -> Callable[[], object]:
    query, key, value = (
        torch.empty(1, heads, length, 64, device="meta", requires_grad=backward)
        for length in (q_len or n, n, n)
    )

    def run() -> None:
        out, lse = attention(query, key, value, pattern, return_lse=True, backend="eager")
        if backward:
            torch.autograd.grad(out.sum() + lse.sum(), (query, key, value))

    return run


@each_pattern
@pytest.mark.parametrize("q_len", [13, 1000])
def test_nothing_waits_and_nothing_is_sent_again(q_len: int, pattern: Pattern) -> None:
    launches = _count(_step(pattern, 1000, 6, q_len))
    assert launches.launched > 0
    assert launches.sent == 0


@each_pattern
def test_packed_documents(pattern: Pattern) -> None:
    """Their boundaries are on the CPU: meta tensors have no numbers to look at."""
    query, key, value = (
        torch.empty(100, 6, 16, device="meta", requires_grad=True) for _ in range(3)
    )
    cu_seqlens = torch.tensor([0, 20, 20, 57, 77, 100])

    def run() -> None:
        out = attention_varlen(query, key, value, cu_seqlens, pattern, backend="eager")
        assert isinstance(out, Tensor)
        torch.autograd.grad(out.sum(), (query, key, value))

    assert _count(run).sent == 0


def test_few_launches_whatever_the_length() -> None:
    """At most 650 forward and 1,400 with the backward, at 8 times the blocks not 3 times as many.

    A loop over the 1,024 blocks would launch more than 20,000 and 50,000.
    """
    forward, both = (
        [_count(_step(PATTERN, n, backward=backward)).launched for n in (16_384, 131_072)]
        for backward in (False, True)
    )
    print(f"at 16,384 and 131,072 positions, forward: {forward}; with the backward: {both}")
    assert forward[1] <= 650
    assert both[1] <= 1_400
    assert forward[1] < 3 * forward[0]
    assert both[1] < 3 * both[0]


def test_few_launches_for_many_documents() -> None:
    """A thousand documents of all lengths up to 256: at most 16 tiles, at 30 launches each."""
    lengths = torch.randint(0, 257, (1_000,))
    cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    q = torch.empty(int(cu_seqlens[-1]), 1, 64, device="meta")
    launches = _count(lambda: attention_varlen(q, q, q, cu_seqlens, PATTERN, backend="eager"))
    print(f"{launches.launched} launches")
    assert launches.sent == 0
    assert launches.launched <= 16 * 30


@pytest.mark.parametrize("pattern", [StridedPattern(128), LocalPattern(128)], ids=str)
def test_windows_and_columns_are_no_loop(pattern: Pattern) -> None:
    counts = [_count(_step(pattern, n)).launched for n in (1_024, 16_384)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    "pattern",
    [FixedPattern(4, 1), FixedPattern(4, 1, 2, "summary"), LocalPattern(4), FullPattern()],
)
def test_a_cache_does_not_wait(pattern: Pattern) -> None:
    """Not for a prompt, and not for tokens; what is sent when a block ends is not waited for."""
    cache = KVCache(pattern, 64, backend="eager")
    query = torch.empty(2, 4, 11, 16, device="meta")
    key = torch.empty(2, 2, 11, 16, device="meta")
    with torch.no_grad(), Launches():
        cache.attend(query, key, key)
        for _ in range(6):
            cache.attend(query[:, :, :1], key[:, :, :1], key[:, :, :1])


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("xpu", True), ("mps", False)])
def test_a_copy_to_a_gpu_is_not_waited_for(
    device: str, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a copy out of pinned memory goes on by itself."""
    calls: list[object] = []

    def to(tensor: Tensor, *arguments: object, **options: object) -> Tensor:
        calls.append((*arguments, options))
        return tensor

    def pin_memory(tensor: Tensor) -> Tensor:
        calls.append("pinned")
        return tensor

    monkeypatch.setattr(Tensor, "to", to)
    monkeypatch.setattr(Tensor, "pin_memory", pin_memory)
    kept.on_device(torch.arange(3), torch.device(device))
    options = {"non_blocking": True} if pinned else {}
    assert calls == ["pinned"] * pinned + [(torch.device(device), options)]


def test_the_mode_sees_what_it_forbids() -> None:
    """Reading a number, a size that depends on numbers, and an index of the CPU.

    A copy back PyTorch refuses itself.
    """
    device, cpu = torch.ones(3, device="meta"), torch.arange(3)
    forbidden: list[tuple[Callable[[], object], str]] = [
        (lambda: device.sum().item(), "waits"),
        (lambda: device.nonzero(), "waits"),
        (lambda: torch.equal(device, device), "waits"),
        (lambda: device[device > 0], "waits"),
        (lambda: device[cpu], "mixes devices"),
    ]
    for call, message in forbidden:
        with Launches(), pytest.raises(AssertionError, match=message):
            call()
    with Launches(), pytest.raises(NotImplementedError, match="no data"):
        device.cpu()
    launches = Launches()
    with launches:
        cpu.to("meta")
        device.add(1).view(3, 1)
    assert (launches.sent, launches.launched) == (1, 1)


@pytest.mark.parametrize("kv_heads", [2, 3, 5])
def test_heads_are_taken_and_put_back_without_an_index(kv_heads: int) -> None:
    tensor = torch.randn(2, 2 * kv_heads, 3)
    heads = [range(first, kv_heads, 2) for first in range(2)]
    parts = [only_heads(tensor, of_part, kv_heads) for of_part in heads]
    for part, of_part in zip(parts, heads, strict=True):
        assert torch.equal(part, tensor.unflatten(1, (kv_heads, 2))[:, list(of_part)].flatten(1, 2))
    assert torch.equal(in_order(parts, heads), tensor)
    assert torch.equal(only_heads(tensor, range(kv_heads), kv_heads), tensor)
