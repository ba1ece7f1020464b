"""Build the C++ of this folder once, keep it, and load it.

The compiler is called directly: one file, no lock that a killed builder could leave behind. What
it wrote under a temporary name becomes the library in one step, so that a library is whole or not
there, and several builders at once do no harm. Its name is a hash of everything that it depends on.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch

SOURCES = Path(__file__).with_name("csrc")
MAIN = SOURCES / "library.cpp"
MINUTES = 10
"""After so long a compiler counts as hanging; it needs about a quarter of one."""

log = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()


class BuildError(Exception):
    """There is no library; the text is a clause that may follow the backend's name."""


def reason_unusable(build: bool = True) -> str | None:
    """Return why the C++ operations cannot be called in this process, as a clause; None: they can.

    They are built at the first call, unless `build` is False. The answer stays what it is then.
    """
    with _one_at_a_time:
        if not build and not _is_built():
            return "is not built yet: its first use builds it, or colonnade info --build"
        return _load()


def _is_built() -> bool:
    """Whether there is nothing to be built: it is in the cache, or cannot be."""
    if os.environ.get("COLONNADE_NATIVE") == "0":
        return True
    try:
        return library_path().exists()
    except BuildError:
        return True


@functools.cache
def _load() -> str | None:
    if os.environ.get("COLONNADE_NATIVE") == "0":
        return "is switched off by COLONNADE_NATIVE=0"
    try:
        path = library_path()
        if not path.exists():
            build(path)
        torch.ops.load_library(path)
    except BuildError as error:
        return str(error)
    except OSError as error:
        return f"could not load what it built: {error}. Delete {path} to build it again"
    return None


def library_path() -> Path:
    """Return where the library belongs; its name tells source, torch, compiler, flags, processor.

    Raises:
        BuildError: There is no compiler.
    """
    compiler = _compiler()
    depends_on = [
        *(f"{file.name}\n{file.read_text()}" for file in sorted(SOURCES.iterdir())),
        torch.__version__,
        str(torch.version.git_version),
        _version(compiler),
        *_flags(),
        *(f"{name}={has}" for name, has in sorted(torch.cpu.get_capabilities().items())),
    ]
    name = hashlib.sha256("\0".join(depends_on).encode()).hexdigest()[:16]
    return cache_folder() / f"native-{name}.so"


def cache_folder() -> Path:
    """COLONNADE_CACHE, or colonnade in the user's folder for caches."""
    if named := os.environ.get("COLONNADE_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "colonnade"


def build(path: Path) -> None:
    """Compile the library to `path`.

    Raises:
        BuildError: The compiler fails or hangs, or the folder cannot be written.
    """
    started = time.monotonic()
    log.warning("Compiling the native kernel to %s, once; this takes about 20 seconds.", path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder of its own: what a killed builder leaves behind is in nobody's way.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix="building-") as folder:
            unfinished = Path(folder, path.name)
            command = [_compiler(), *_flags(), str(MAIN), "-o", str(unfinished), *_libraries()]
            _run(command)
            unfinished.replace(path)
    except OSError as error:
        raise BuildError(
            f"could not be built in {path.parent}: {error.strerror}. "
            "Set COLONNADE_CACHE to a folder that can be written"
        ) from error
    log.info("Compiled in %.0f seconds.", time.monotonic() - started)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60 * MINUTES)
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"could not be built: {command[0]} ran {MINUTES} minutes") from error
    if done.returncode != 0:
        last = "\n".join(done.stderr.splitlines()[-5:])
        raise BuildError(
            f"could not be built: {command[0]} ended with {done.returncode}, saying\n{last}"
        )


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        if found := shutil.which(name):
            return found
    raise BuildError(
        f"needs a C++ compiler, and there is none by the name of {' or '.join(names)}; "
        "install g++ or clang, or set CXX"
    )


@functools.cache
def _version(compiler: str) -> str:
    try:
        done = subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"needs a C++ compiler, and {compiler} does not run: {error}") from error
    return done.stdout


def _flags() -> list[str]:
    # The macros choose the vectors of PyTorch's headers; without OpenMP its loops are serial.
    capability = torch.backends.cpu.get_cpu_capability()
    include = Path(torch.__file__).with_name("include")
    return [
        "-std=c++20",
        "-O3",
        "-march=native",
        "-fopenmp",
        "-fPIC",
        "-shared",
        f"-DCPU_CAPABILITY={capability}",
        f"-DCPU_CAPABILITY_{capability}",
        f"-I{include}",
        *os.environ.get("COLONNADE_CXXFLAGS", "").split(),
    ]


def _libraries() -> list[str]:
    if sys.platform == "darwin":
        return ["-undefined", "dynamic_lookup"]
    return [f"-L{Path(torch.__file__).with_name('lib')}", "-lc10", "-ltorch_cpu"]
