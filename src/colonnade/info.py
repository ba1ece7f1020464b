"""What colonnade runs on here: versions, processor, compiler, GPUs, backends.

For a report of a mistake or of a measurement. It holds no path, and needs no extra.
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
    """What `info` finds.

    Attributes:
        versions: Of colonnade, Python and each package; None: it is not installed.
        platform: Operating system and architecture.
        processor: Its name.
        instructions: Extensions of the instruction set that torch finds, sorted.
        torch_kernels: The instruction set that torch's own kernels take, such as "AVX512".
        cores: Logical cores.
        threads: How many of them torch uses.
        compiler: Name and version of the C++ compiler; None: there is none.
        python_headers: Whether Python.h is there, which torch.compile needs beside a compiler.
        gpus: Name, compute capability and memory in bytes of each.
        backends: Each backend of `attention`, and why it is not usable here; None: it is.
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
        """What a time on this machine depends on."""
        names = ("versions", "processor", "instructions", "torch_kernels", "threads")
        return {name: getattr(self, name) for name in names}


def info(packages: Iterable[str], build: bool = False) -> Info:
    """What is installed of `packages`, and what the machine has.

    `build` compiles what a backend needs compiled, if it never was.
    """
    capabilities = torch.cpu.get_capabilities()
    name = capabilities.get("cpu_name") or platform.processor() or platform.machine()
    return Info(
        versions={
            "colonnade": colonnade.__version__,
            "Python": platform.python_version(),
            **{package: _version(package) for package in packages},
        },
        platform=platform.platform(),
        processor=str(name).strip(),
        instructions=sorted(name for name, has in capabilities.items() if has is True),
        torch_kernels=torch.backends.cpu.get_cpu_capability(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        compiler=_compiler(),
        python_headers=Path(sysconfig.get_path("include"), "Python.h").exists(),
        gpus=_gpus(),
        backends=colonnade.backends(build),
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _compiler() -> str | None:
    """What the compiler that torch.compile would take calls itself."""
    path = shutil.which(os.environ.get("CXX", "g++"))
    if path is None:
        return None
    try:
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return Path(path).name
    return (said.stdout.splitlines() or [Path(path).name])[0]


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    every = map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
    return [
        {
            "name": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "memory_bytes": gpu.total_memory,
        }
        for gpu in every
    ]
