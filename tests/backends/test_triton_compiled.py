"""Backend "triton" compiled to machine code, by the way that a launch takes, and without a GPU.

The interpreter takes what the compiler refuses. Each kernel takes a second or two.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from colonnade import FixedPattern
from tests.cases import Case, backpropagate, both

pytestmark = [
    pytest.mark.plain,
    pytest.mark.skipif(
        importlib.util.find_spec("triton") is None or bool(os.environ.get("TRITON_INTERPRET")),
        reason="needs triton, which compiles",
    ),
    pytest.mark.skipif(sys.platform != "linux", reason="triton is there for Linux alone"),
]
KERNELS = ("attend_pieces", "grad_query_of_pieces", "grad_of_slots", "grad_of_own_keys")
ROOT = Path(__file__).parents[2]
Compiled = list[tuple[str, Any]]


class _Driver:
    """Tells Triton the target, as far as it asks for that before a launch."""

    def __init__(self, capability: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.get_current_target = lambda: GPUTarget("cuda", capability, 32)
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0


class _NotLaunched:
    """A kernel that is compiled where it would be launched."""

    def __init__(self, kernel: Any, compiled: Compiled) -> None:
        self.kernel = kernel
        self.compiled = compiled

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return partial(self._compile, grid)

    def _compile(self, grid: tuple[int], *arguments: Any, **options: Any) -> None:
        found = self.kernel.warmup(*arguments, grid=grid, **options)
        self.compiled.append((self.kernel.fn.__name__, found))


@pytest.fixture
def compile_for(
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[int, Case, torch.dtype, float], Compiled]:
    """Return a function that compiles all kernels of a case for a compute capability."""
    from triton.runtime import driver

    from colonnade.backends import triton as backend
    from colonnade.backends.triton import launch

    def compile_for(capability: int, case: Case, dtype: torch.dtype, dropout_p: float) -> Compiled:
        compiled: Compiled = []
        with monkeypatch.context() as patch:
            patch.setattr(driver, "_active", _Driver(capability))
            patch.setattr(backend, "_is_interpreted", lambda: True)  # It takes tensors of a CPU.
            for name in KERNELS:
                patch.setattr(launch, name, _NotLaunched(getattr(launch, name), compiled))
            inputs = case.inputs(dtype)
            leaves = inputs.leaves()
            pair = both(*leaves, case.pattern, "triton", dropout_p=dropout_p)
            backpropagate(pair, leaves, inputs)
        return compiled

    return compile_for


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        (Case(FixedPattern(128, 8), 1, 2, 2, 300, 300, 64, 64), torch.bfloat16),
        # Triton takes each number that is 1 for a constant.
        (Case(FixedPattern(1, 1), 1, 1, 1, 1, 1, 1, 1), torch.float32),
    ],
    ids=["as they are", "all sizes 1"],
)
@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
def test_the_compiler_takes_every_kernel(
    case: Case,
    dtype: torch.dtype,
    dropout_p: float,
    compile_for: Callable[[int, Case, torch.dtype, float], Compiled],
) -> None:
    compiled = compile_for(90, case, dtype, dropout_p)
    names = [name for name, _ in compiled]
    assert names == [name for name in KERNELS if name in names]
    assert {"attend_pieces", "grad_query_of_pieces", "grad_of_own_keys"} <= set(names)
    for name, kernel in compiled:
        assert len(kernel.asm["cubin"]) > 0, name
        products = kernel.asm["ptx"].count("wgmma.mma_async")
        assert (products > 0) == (dtype == torch.bfloat16), name


@pytest.mark.parametrize(
    ("kernel", "target", "dtype", "width", "words"),
    [
        ("forward", "sm_90", "bf16", 128, "none"),
        ("query", "sm_80", "bf16", 128, "none"),
        ("slots", "sm_100", "bf16", 64, "none"),
        ("own", "sm_90", "fp16", 96, "none"),
        ("forward", "sm_120", "fp32 as TF32", 64, "none"),
        ("own", "gfx942", "fp32", 64, "none"),
        ("query", "sm_80", "bf16", 64, "quads"),
        ("own", "sm_90", "fp16", 128, "each"),
    ],
)
def test_machine_code_keeps_what_it_computes_with_in_registers(
    kernel: Any, target: str, dtype: str, width: int, words: Any
) -> None:
    """A slice of `make gpu-code`, for the kernels as they are now."""
    from colonnade.bench.machine_code import Case, compile_case, complaint

    case = Case(kernel, target, dtype, width, words)
    config = case.configuration()
    assert config is not None
    code = compile_case(case, config)
    assert complaint(case, code) is None
    assert code.spilled == 0
    assert code.matrix > 0
    assert code.blocks >= 1


def test_too_large_a_tile_is_found_out() -> None:
    from colonnade.backends.triton.configurations import Configuration
    from colonnade.bench.machine_code import Case, compile_case, complaint

    case = Case("forward", "sm_80", "bf16", 256)
    why = complaint(case, compile_case(case, Configuration(64, 32, 4, 1)))
    assert why is not None
    assert why.startswith("spills ")


def test_the_recorded_machine_code_is_that_of_the_table() -> None:
    """Each row of benchmarks/gpu_code.json has today's configuration, and none is wrong."""
    from colonnade.bench.machine_code import Case, every_case, wrong

    recorded = json.loads((ROOT / "benchmarks" / "gpu_code.json").read_text())
    cases = [Case(*(row[name] for name in Case._fields)) for row in recorded["rows"]]
    assert cases == every_case()
    for case, row in zip(cases, recorded["rows"], strict=True):
        config = case.configuration()
        assert row.get("configuration") == (None if config is None else config._asdict())
        assert wrong(row) is None
