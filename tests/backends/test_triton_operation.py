"""Backend "triton" as an operation of PyTorch: compilers, checkpoints, devices, and tuning.

In Triton's interpreter, as tests/backends/test_triton.py.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from colonnade import FixedPattern, attention, attention_varlen
from colonnade.backends import triton
from colonnade.backends.dropout import Dropout
from colonnade.backends.planning import PlanOptions
from colonnade.backends.triton.configurations import Configuration
from tests.backends.test_triton import each_type, pytestmark
from tests.cases import Case, attend, attend_by_products
from tests.packing import cu_seqlens_of
from tests.rounding import check

__all__ = ["pytestmark"]  # The same marks.

TABLE = Configuration(16, 32, 4, 1)
CASE = Case(FixedPattern(4, 1), 1, 1, 2, 5, 6, 8, 8, 0.4)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let kernels be counted instead of launched."""
    from colonnade.backends.triton.launch import _Run

    programs: list[int] = []
    monkeypatch.setattr(_Run, "launch", lambda run, kernel, config, n, *rest: programs.append(n))
    return programs


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Of opcheck, with torch 2.15.
@each_type
def test_its_operations_keep_the_compilers_rules(dtype: torch.dtype) -> None:
    """Schema, fake, autograd and a compiled program, as torch.library checks them."""
    inputs = CASE.inputs(dtype)
    leaves = [t.requires_grad_() for t in inputs[:3]]
    dropout = Dropout(0.5, torch.tensor([3])) if dtype == torch.float16 else Dropout()
    options = (4, 1, 1, "merged", True, 1, 0, None, 0.4, *dropout)
    operations = torch.ops.colonnade
    checks: list[str] = ["test_schema", "test_faketensor", "test_autograd_registration"]
    if dtype == torch.float32:
        checks.append("test_aot_dispatch_dynamic")
    forward, backward = operations.triton_forward.default, operations.triton_backward.default
    torch.library.opcheck(forward, (*leaves, *options), test_utils=checks)
    found = operations.triton_forward(*leaves, *options)
    tensors = (inputs.grad_out, inputs.grad_lse, *leaves, *found)
    constants = [t.detach() for t in tensors]
    torch.library.opcheck(backward, (*constants, *options), test_utils=checks)


def test_a_compiler_sees_one_program_for_all_lengths(launched: list[int]) -> None:
    """Forward and backward, whole sequences and documents; no more than 4 compilations each."""
    counter = CompileCounterWithBackend("aot_eager")
    pattern = FixedPattern(16, 2)

    @torch.compile(backend=counter, fullgraph=True)
    def step(x: Tensor) -> Tensor:
        return attention(x, x, x, pattern, backend="triton")

    for length in range(1, 101):
        x = torch.zeros(1, 2, length, 8, requires_grad=True)
        step(x).sum().backward()
    assert counter.frame_count <= 4
    assert len(launched) == 4 * 100

    @torch.compile(backend=counter, fullgraph=True)
    def packed(x: Tensor, cu_seqlens: Tensor) -> Tensor:
        return attention_varlen(x, x, x, cu_seqlens, pattern, backend="triton")

    counter.frame_count = 0
    for length in range(2, 40):
        x = torch.zeros(length + 5, 2, 8, requires_grad=True)
        packed(x, cu_seqlens_of((length, 5))).sum().backward()
    assert counter.frame_count <= 4


def _call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return attention(query, key, value, CASE.pattern, backend="triton", scale=0.4)


def test_a_compiled_call_has_the_same_bits() -> None:
    inputs = CASE.inputs(torch.float32)

    found = []
    for each in (_call, torch.compile(_call, backend="aot_eager", fullgraph=True)):
        leaves = inputs.leaves()
        out = each(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, inputs.grad_out)])
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    inputs = CASE.inputs(torch.float32)

    found = []
    for again in (False, True):
        leaves = inputs.leaves()
        out = checkpoint(_call, *leaves, use_reentrant=use_reentrant) if again else _call(*leaves)
        out.backward(inputs.grad_out)
        found.append([out, *(leaf.grad for leaf in leaves)])
    assert all(map(torch.equal, *found))


class _NoLook(TorchDispatchMode):
    """Refuses whatever makes a host wait for a device."""

    LOOKS = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "item", "unique")

    def __init__(self) -> None:
        self.made_on_cpu = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = any(t.is_meta for t in given)
        name = func._schema.name.removeprefix("aten::")
        assert not (on_device and name.startswith(self.LOOKS)), f"{name} waits for the device"
        found = func(*args, **(kwargs or {}))
        on_cpu = [t for t in tree_leaves(found) if isinstance(t, Tensor) and t.device.type == "cpu"]
        assert not (on_device and on_cpu), f"{name} copies from the device"
        self.made_on_cpu += len(on_cpu)
        return found


@pytest.mark.parametrize("part", ["merged", "local", "summary"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("sinks", "p"), [(0, 0.0), (3, 0.5)])
def test_no_call_waits_for_the_device(
    part: Any, causal: bool, sinks: int, p: float, launched: list[int]
) -> None:
    """And one that was made before works nothing out again on the host; nobody reads a seed."""
    query = torch.empty(1, 4, 1_000, 64, dtype=torch.bfloat16, device="meta")
    key = torch.empty(1, 2, 1_000, 64, dtype=torch.bfloat16, device="meta")
    lse = torch.empty(1, 4, 1_000, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta") if p else None
    options = *PlanOptions(48, 5, 2, part, causal, sinks, 0, None), 0.1, *Dropout(p, seed)
    for is_first in (True, False):
        with _NoLook() as looks:
            triton._forward(query, key, key, *options)
            triton._backward(query, lse, query, key, key, query, lse, *options)
        assert (looks.made_on_cpu > 0) is is_first
    assert len(launched) == 2 * (4 if causal else 8)


def test_boundaries_of_documents_are_looked_at_once(
    launched: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[torch.Size] = []
    to = Tensor.to

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if args[:1] == ("cpu",):
            looks.append(tensor.shape)
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", counted)
    cu_seqlens = cu_seqlens_of((30, 0, 21))
    for _ in range(3):
        x = torch.zeros(51, 2, 8, requires_grad=True)
        out = attention_varlen(x, x, x, cu_seqlens, FixedPattern(8, 2), backend="triton")
        out.sum().backward()
    assert len(looks) == 1


@pytest.fixture
def tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Switch tuning on, in an empty folder; tiles of 16 keys are the fastest."""
    from colonnade.backends.triton import tuning

    def milliseconds(launch: Any, config: Any) -> float:
        return float(config.keys + config.queries / 100 + config.warps / 1_000 + config.stages)

    monkeypatch.setenv("COLONNADE_CACHE", str(tmp_path))
    monkeypatch.setenv("COLONNADE_AUTOTUNE", "1")
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    monkeypatch.setattr(tuning, "_known", {})
    return tuning


@pytest.fixture
def sizes(tuning: Any) -> Any:
    return tuning.Sizes("gpu", "forward", "torch.float16", "half", 8, 8, 1, 1, 16, 16, 16)


def test_what_was_tuned_is_kept(
    tuning: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = CASE.inputs(torch.float32)
    found = attend(CASE, inputs, "triton")
    check(CASE, inputs, found, attend_by_products(CASE, inputs))
    files = sorted(tmp_path.glob("triton-*.json"))
    assert [file.name.split("-")[1] for file in files] == ["forward", "own", "query", "slots"]
    kept = json.loads(files[0].read_text())
    assert kept["configuration"] == {"queries": 16, "keys": 16, "warps": 4, "stages": 1}
    assert len(kept["milliseconds"]) > 3
    # A later process times nothing.
    monkeypatch.setattr(tuning, "_known", {})
    monkeypatch.setattr(tuning, "_milliseconds", None)
    again = attend(CASE, inputs, "triton")
    assert all(map(torch.equal, again, found))


@pytest.mark.parametrize(
    "damaged",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"configuration": 3}',
        '{"configuration": {"queries": 16}}',
        '{"configuration": {"queries": 17, "keys": 16, "warps": 4, "stages": 1}}',
        '{"configuration": {"queries": 16, "keys": 64, "warps": 0, "stages": 1}}',
        '{"configuration": {"queries": 16, "keys": 64, "warps": 4, "stages": 1.5}}',
    ],
)
def test_a_damaged_file_is_written_again(tuning: Any, sizes: Any, damaged: str) -> None:
    sizes.path().write_text(damaged)
    assert tuning.tuned(sizes, TABLE, lambda config: None).keys == 16
    assert json.loads(sizes.path().read_text())["configuration"]["keys"] == 16


def test_nothing_is_timed_while_a_graph_is_captured(
    tuning: Any, sizes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from colonnade.backends.triton import launch

    inputs = CASE.inputs(torch.float32)
    monkeypatch.setattr(launch, "is_capturing", lambda device: True)
    with monkeypatch.context() as patch:
        patch.setattr(tuning, "_milliseconds", None)
        attend(CASE, inputs, "triton")
    assert tuning._known == {}
    monkeypatch.setattr(launch, "is_capturing", lambda device: False)
    attend(CASE, inputs, "triton")
    known = dict(tuning._known)
    assert len(known) == 4
    monkeypatch.setattr(launch, "is_capturing", lambda device: True)
    attend(CASE, inputs, "triton")
    assert tuning._known == known


def test_times_are_taken_on_the_device_of_the_tensors(
    tuning: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from colonnade.backends.triton import launch

    current: list[torch.device] = []

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def milliseconds(launch: Any, config: Any) -> float:
        assert current == [torch.device("cpu")]
        return float(config.keys)

    monkeypatch.setattr(launch, "_on", on)
    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    attend(CASE, CASE.inputs(torch.float32), "triton")
    assert len(tuning._known) == 4


def test_what_does_not_fit_is_passed_over(
    tuning: Any, sizes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile that the device does not hold, and one that Triton's passes fail on."""
    from triton.runtime.errors import OutOfResources

    def milliseconds(launch: Any, config: Any) -> float:
        if config.keys < 32:
            raise OutOfResources(2, 1, "shared memory")
        if config.keys > 32:
            raise RuntimeError("PassManager::run failed")
        return float(config.warps)

    monkeypatch.setattr(tuning, "_milliseconds", milliseconds)
    assert tuning.tuned(sizes, TABLE, lambda config: None) == TABLE


def test_a_folder_that_cannot_be_written_is_named(
    tuning: Any, sizes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("COLONNADE_CACHE", str(tmp_path / "file"))
    with caplog.at_level(logging.WARNING):
        assert tuning.tuned(sizes, TABLE, lambda config: None).keys == 16
    assert "Cannot keep the configuration that was tuned" in caplog.text


def test_the_switch_is_on_or_off(tuning: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLONNADE_AUTOTUNE", "maybe")
    with pytest.raises(ValueError, match="COLONNADE_AUTOTUNE must be 0 or 1"):
        attend(CASE, CASE.inputs(torch.float32), "triton")
