"""Compile the Triton kernels for GPUs that are not there, and read what the machine code needs.

Triton brings the compilers of NVIDIA and AMD along. `Target` holds the limits of a processor: an SM
of NVIDIA's compute capabilities (CUDA C++ Programming Guide, table "Technical Specifications per
Compute Capability"), or a CU of AMD's CDNA.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from colonnade.backends.triton.backward import (
    grad_of_own_keys,
    grad_of_slots,
    grad_query_of_pieces,
)
from colonnade.backends.triton.configurations import (
    CHECKED,
    DROPS,
    KERNELS,
    Configuration,
    Kernel,
    Precision,
    Words,
    configuration,
    power_of_two,
)
from colonnade.backends.triton.dropout import Dropped
from colonnade.backends.triton.forward import attend_pieces
from colonnade.backends.triton.tiles import Array, Shape

SPILLED = 64
"""The most bytes that a thread may keep in memory for want of registers."""
WIDTHS = (32, 64, 80, 96, 128, 192, 256)
DTYPES: dict[str, Precision] = {
    "bf16": "half",
    "fp16": "half",
    "fp32 as TF32": "tf32",
    "fp32": "ieee",
}
"""What is multiplied in each type, by the name that the tables have for it."""
DROPPING_TARGETS, DROPPING_WIDTHS = ("sm_80", "sm_90", "sm_100", "gfx942"), (64, 128, 256)
"""Where kernels are compiled with dropout too; everywhere it would take three times as long."""
MUST_RUN = ("sm_80", "sm_90", "sm_100")
"""Devices where half precision may not be declined, at widths up to 128."""
LONGEST = 1_024
"""Queries of a row: no tile of the table is cut."""
FUNCTIONS: dict[Kernel, Any] = {
    "forward": attend_pieces,
    "query": grad_query_of_pieces,
    "slots": grad_of_slots,
    "own": grad_of_own_keys,
}
# The arguments of kernels by what they are: tensors of the input's type and others, and their axes.
_INPUTS = {
    **dict.fromkeys(("query", "out", "grad_out", "grad_query"), 5),
    **dict.fromkeys(("key", "value", "slot_key", "slot_value", "grad_key", "grad_value"), 4),
}
_FLOATS = {
    **dict.fromkeys(("lse", "grad_lse", "delta"), 4),
    **dict.fromkeys(("key_sums", "value_sums"), 5),
}
_INTEGERS = {"partner": 3}
_LISTS = ("pieces", "tiles", "shift", "slots_seen", "shares_of_slot")
_QUERIES, _KEYS = (Array("*i32", ("i32",) * last + ("constexpr",)) for last in (0, 2))
_DROPPED = Dropped("*i64", _QUERIES, _QUERIES, _KEYS, _KEYS, "i32", "fp32", *["i32"] * 4)
# Where it has strides of 1.
_ONES_OF_DROPPED = ((1, 1, 0), (2, 1, 0), (3, 1, 2), (4, 1, 2))
_ALIGNED = [["tt.divisibility", 16]]
_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Target:
    """A device, and what its processors hold.

    Attributes:
        gpu: As Triton names it.
        shared: Bytes of shared memory of a processor.
        shared_of_block: The most that one block may have, in bytes.
        warps: The most warps that a processor holds.
        blocks: The most blocks.
        tf32: Whether float32 may be multiplied as TF32.
    """

    gpu: GPUTarget
    shared: int
    shared_of_block: int
    warps: int
    blocks: int
    tf32: bool = True


def _nvidia(capability: int, shared_kib: int, warps: int, blocks: int) -> Target:
    """A block leaves 1 KiB of shared memory to the system."""
    size = shared_kib * 1024
    return Target(GPUTarget("cuda", capability, 32), size, size - 1024, warps, blocks)


def _amd(name: str, shared_kib: int) -> Target:
    """A processor has 4 units with 8 waves each."""
    size = shared_kib * 1024
    return Target(GPUTarget("hip", name, 64), size, size, 32, 32, tf32=False)


TARGETS = {
    "sm_80": _nvidia(80, 164, 64, 32),
    "sm_86": _nvidia(86, 100, 48, 16),
    "sm_89": _nvidia(89, 100, 48, 24),
    "sm_90": _nvidia(90, 228, 64, 32),
    "sm_100": _nvidia(100, 228, 64, 32),
    "sm_103": _nvidia(103, 228, 64, 32),
    "sm_120": _nvidia(120, 100, 48, 24),
    "gfx942": _amd("gfx942", 64),
    "gfx950": _amd("gfx950", 160),
}
assert set(TARGETS) == set(CHECKED)


class Code(NamedTuple):
    """What the machine code of one kernel needs.

    Attributes:
        registers: Of each thread.
        spilled: Bytes of each thread in memory, for want of registers.
        shared: Bytes of shared memory.
        matrix: Number of matrix instructions.
        blocks: Programs that a processor holds at once.
    """

    registers: int
    spilled: int
    shared: int
    matrix: int
    blocks: int


class Case(NamedTuple):
    """A kernel to compile."""

    kernel: Kernel
    target: str
    dtype: str
    width: int
    words: Words = "none"

    def configuration(self) -> Configuration | None:
        """Return its configuration by the table."""
        return configuration(
            self.kernel, DTYPES[self.dtype], self.width, self.target, LONGEST, self.words
        )


def every_case(targets: tuple[str, ...] = CHECKED) -> list[Case]:
    """Return every kernel × device × type × width, leaving out types that a device lacks.

    Those without dropout come first, then some of them with it.
    """
    every = [
        Case(kernel, target, dtype, width)
        for target, dtype, width, kernel in product(targets, DTYPES, WIDTHS, KERNELS)
        if TARGETS[target].tf32 or DTYPES[dtype] != "tf32"
    ]
    dropping = [c for c in every if c.target in DROPPING_TARGETS and c.width in DROPPING_WIDTHS]
    return every + [case._replace(words=words) for case in dropping for words in DROPS]


def complaint(case: Case, code: Code) -> str | None:
    """Return why the machine code is not good enough, as a clause, or None."""
    most = TARGETS[case.target].shared_of_block
    if code.spilled > SPILLED:
        return f"spills {code.spilled:,} B"
    if code.shared > most:
        return f"takes {code.shared:,} B of shared memory, of {most:,}"
    if code.matrix == 0 and DTYPES[case.dtype] != "ieee":
        return "has no matrix instruction"
    return None


def measure(case: Case) -> dict[str, Any]:
    """Compile a kernel at its configuration of the table; return what it needs, as JSON."""
    found: dict[str, Any] = case._asdict()
    config = case.configuration()
    if config is None:
        return {**found, "declined": True}
    found["configuration"] = config._asdict()
    try:
        code = compile_case(case, config)
    except (RuntimeError, TritonError) as error:
        why = (str(error).splitlines() or [type(error).__name__])[0]
        return {**found, "code": None, "complaint": f"does not compile: {why}"}
    return {**found, "code": code._asdict(), "complaint": complaint(case, code)}


def wrong(row: dict[str, Any]) -> str | None:
    """Return what is wrong with a row, or None."""
    name = f"{row['kernel']}, {row['target']}, {row['dtype']}, width {row['width']}"
    name += "" if row["words"] == "none" else f", dropout by {row['words']}"
    must_run = row["target"] in MUST_RUN and DTYPES[row["dtype"]] == "half" and row["width"] <= 128
    if row.get("declined"):
        return f"{name}: declined" if must_run else None
    return f"{name}: {row['complaint']}" if row["complaint"] else None


def compile_case(case: Case, config: Configuration) -> Code:
    """Compile a kernel, and read what it needs."""
    target = TARGETS[case.target]
    options = {"num_warps": config.warps, "num_stages": config.stages}
    built = triton.compile(_source(case, config), target=target.gpu, options=options)
    shared = built.metadata.shared
    if target.gpu.backend == "cuda":
        registers, spilled = _usage_of_cubin(built.asm["cubin"])
        matrix = len(re.findall(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", built.asm["ptx"]))
    else:
        text = built.asm["amdgcn"]
        registers, spilled = (
            int(re.findall(rf"\.{name}:?\s+(\d+)", text)[0])
            for name in ("vgpr_count", "private_segment_fixed_size")
        )
        matrix = text.count("v_mfma")
    tensor_columns = getattr(built.metadata, "tmem_size", 0) or 0
    blocks = _blocks(target, config.warps, registers, shared, tensor_columns)
    return Code(registers, spilled, shared, matrix, blocks)


def _source(case: Case, config: Configuration) -> ASTSource:
    """Return a kernel as it is called for contiguous tensors, with one query head a key head."""
    function = FUNCTIONS[case.kernel]
    of_input = case.dtype.split(" ")[0]
    wide = power_of_two(case.width)
    precision = "tf32" if DTYPES[case.dtype] == "tf32" else "ieee"
    shape = Shape(
        1,
        case.width,
        case.width,
        wide,
        wide,
        config.queries,
        config.keys,
        precision,
        lift=False,
        quads=case.words == "quads",
    )
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for index, name in enumerate(function.arg_names):
        for kind, axes in ((of_input, _INPUTS), ("fp32", _FLOATS), ("i32", _INTEGERS)):
            if name in axes:
                last = axes[name] - 1
                signature[name] = Array(f"*{kind}", ("i32",) * last + ("constexpr",))
                constants[index, 1, last] = 1
                attributes |= {(index, 1, axis): _ALIGNED for axis in range(last)}
                attributes[index, 0] = _ALIGNED
        if name == "dropped" and case.words != "none":
            signature[name] = _DROPPED
            constants |= {(index, *at): 1 for at in _ONES_OF_DROPPED}
        elif name == "dropped":
            signature[name], constants[(index,)] = "constexpr", None
        elif name in _LISTS:
            signature[name], attributes[(index,)] = "*i32", _ALIGNED
        elif name == "S":
            signature[name], constants[(index,)] = "constexpr", shape
        elif name == "OWN_FROM_SLOTS":
            signature[name], constants[(index,)] = "constexpr", False
        else:
            signature.setdefault(name, "fp32" if name.startswith("scale") else "i32")
    return ASTSource(function, signature, constexprs=constants, attrs=attributes)


def _usage_of_cubin(cubin: bytes) -> tuple[int, int]:
    """Return the registers and the bytes of stack of each thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listed = subprocess.run(
            [_NVIDIA_TOOLS / "cuobjdump", "-res-usage", file.name],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", listed)
    assert found is not None, listed
    return int(found[1]), int(found[2])


def _blocks(target: Target, warps: int, registers: int, shared: int, tensor_columns: int) -> int:
    """Return how many programs a processor holds at once."""
    if target.gpu.backend == "cuda":
        # Registers come in units of 256 a warp; tensor memory has 512 columns.
        of_warp = -(-registers * 32 // 256) * 256
        by_registers = 65_536 // (of_warp * warps)
        by_shared = target.shared // (shared + 1024)
        by_columns = 512 // tensor_columns if tensor_columns else target.blocks
        return min(target.blocks, target.warps // warps, by_registers, by_shared, by_columns)
    # A unit of four has 512 registers for each lane, in units of 8.
    waves = 4 * min(8, 512 // (-(-registers // 8) * 8))
    by_shared = target.shared // shared if shared else target.blocks
    return min(target.blocks, waves // warps, by_shared)
