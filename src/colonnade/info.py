"""Facts of this machine: versions, processor, compiler, GPUs, backends.

For bug reports, for measurements, and for defaults that depend on the machine. Nothing here names
a path or needs an extra.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import colonnade


@dataclass(frozen=True)
class Info:
    """Facts of this machine that a report should hold.

    Attributes:
        versions: Version of colonnade, Python and each package, or None if it is not installed.
        platform: Operating system and architecture.
        processor: Name of the processor.
        instructions: Extensions of the instruction set that torch finds, sorted.
        torch_kernels: Instruction set that torch's own kernels use, such as "AVX512".
        cores: Number of logical cores.
        threads: Number of threads that torch uses.
        compiler: Name and version of the C++ compiler that torch.compile uses, or None.
        python_headers: Whether Python.h is there, which torch.compile needs besides a compiler.
        gpus: Name, compute capability and memory in bytes of each GPU.
        backends: For each backend of `attention`, why it is not usable here, or None if it is.
    """

    versions: dict[str, str | None]
    platform: str
    processor: str
    instructions: list[str]
    torch_kernels: str
    cores: int | None
    threads: int
    compiler: str | None
    python_headers: bool
    gpus: list[dict[str, Any]]
    backends: dict[str, str | None]

    def for_measurement(self) -> dict[str, Any]:
        """Return the facts that a time on this machine depends on."""
        return {
            name: getattr(self, name)
            for name in ("versions", "processor", "instructions", "torch_kernels", "threads")
        }


def info(packages: Iterable[str], build: bool = False) -> Info:
    """Collect the facts, with the versions of `packages`.

    With `build`, backends that have to be compiled are, if they never were.
    """
    capabilities = torch.cpu.get_capabilities()
    return Info(
        versions={
            "colonnade": colonnade.__version__,
            "Python": platform.python_version(),
            **{package: _version(package) for package in packages},
        },
        platform=platform.platform(),
        processor=str(
            capabilities.get("cpu_name") or platform.processor() or platform.machine()
        ).strip(),
        instructions=sorted(name for name, has in capabilities.items() if has is True),
        torch_kernels=torch.backends.cpu.get_cpu_capability(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        compiler=_compiler_version(),
        python_headers=_has_python_headers(),
        gpus=[
            {
                "name": gpu.name,
                "compute_capability": f"{gpu.major}.{gpu.minor}",
                "memory_bytes": gpu.total_memory,
            }
            for gpu in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
        ],
        backends=colonnade.backends(build),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def has_compiler() -> bool:
    """Whether torch.compile finds what it needs on a CPU: a C++ compiler and Python's headers."""
    return _compiler_path() is not None and _has_python_headers()


def good_at_bf16() -> bool:
    """Whether the processor, or the GPU if there is one, multiplies bfloat16 in hardware."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def _compiler_path() -> str | None:
    """Return the path of the C++ compiler that torch.compile uses."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _has_python_headers() -> bool:
    return Path(sysconfig.get_path("include"), "Python.h").exists()


def _compiler_version() -> str | None:
    """Return the first line that the compiler says about itself, or its name."""
    path = _compiler_path()
    if path is None:
        return None
    try:
        said = subprocess.run(
            [path, "--version"],
            capture_output=True,
            encoding="ascii",
            errors="backslashreplace",  # Whatever the compiler and the locale speak.
            timeout=10,
        )
    except (OSError, subprocess.TimeoutExpired):
        return Path(path).name
    return (said.stdout.splitlines() or [Path(path).name])[0]
