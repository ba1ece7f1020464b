"""Say in one message what `make gpu` lacks here, before it starts; `--small` prints what is small.

It runs before anything else does, so it needs nothing but Python.
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from importlib import metadata, util
from pathlib import Path

SMALL = (
    "accelerate",
    "execnet",
    "hypothesis",
    "iniconfig",
    "jaxtyping",
    "packaging",
    "pluggy",
    "psutil",
    "pygments",
    "pytest",
    "pytest-timeout",
    "pytest-xdist",
    "sortedcontainers",
    "wadler-lindig",
)
"""Packages that `make gpu-packages` collects."""
NEEDED = {
    "torch": "2.11",
    "triton": "",
    "numpy": "",
    "jaxtyping": "",
    "pytest": "9",
    "pytest-timeout": "",
    "hypothesis": "",
    "transformers": "5.15",
    "tokenizers": "",
    "safetensors": "",
    "accelerate": "",
}
"""What the tests import, with the oldest release that will do."""


def main() -> None:
    """Print what is small, or exit with what is missing."""
    if sys.argv[1:] == ["--small"]:
        print(*SMALL)
        return
    if missing := list(lacking()):
        sys.exit(
            f"colonnade: make gpu needs {', '.join(missing)}. It installs nothing: where there "
            "is a package index, `make gpu-packages` collects the small packages in "
            "build/gpu-packages; carry that folder here, or name another by GPU_PATH=."
        )
    import torch

    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        sys.exit("colonnade: make gpu needs a GPU, and PyTorch sees none.")
    for line in doubts():
        print(f"colonnade: {line}", file=sys.stderr)


def lacking() -> Iterator[str]:
    """Yield each package that is missing or too old."""
    for package, oldest in NEEDED.items():
        if util.find_spec(package.replace("-", "_")) is None:
            yield package
        elif oldest and _numbers(found := metadata.version(package)) < _numbers(oldest):
            yield f"{package} {oldest} or newer (here it is {found})"


def _numbers(version: str) -> tuple[int, ...]:
    """Return major and minor number."""
    return tuple(int(part) for part in version.split(".")[:2])


def doubts() -> Iterator[str]:
    """Yield what Triton compiles its launchers with, and what saves time, where it is not found."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        yield "Triton calls a C compiler, and there is neither gcc nor clang; CC may name one."
    if not Path(sysconfig.get_path("include"), "Python.h").exists():
        yield "Triton's launchers include Python.h, and this Python has none."
    if util.find_spec("xdist") is None:
        yield (
            "the tests compile several hundred kernels, and without pytest-xdist one after the "
            "other, which takes a quarter of an hour or more; `make gpu-packages` collects it."
        )


if __name__ == "__main__":
    main()
