"""The C++ compiler of this machine: found, asked for its version, and called.

It is called directly, in English and with a folder of its own for temporary files. Its options are
the best ones; only where they fail, each is tried alone and replaced or left out.
"""

from __future__ import annotations

import functools
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import torch

MINUTES = 10.0
"""Time after which a compiler counts as hanging; it needs about a quarter of a minute."""

STANDARD = ("-std=c++20",)
FOR_PROCESSOR: tuple[tuple[str, ...], ...] = (("-march=native",), ("-mcpu=native",), ())
FOR_THREADS: tuple[tuple[str, ...], ...] = (("-fopenmp",), ("-Xclang", "-fopenmp"), ())
"""Options in the order in which they are tried; Apple's clang lacks the first ones."""

PASSES = re.compile(r"Killed|No space left|Cannot allocate memory|memory exhausted|out of memory")
"""Words of a compiler that had too little memory or disk, where another try may do better."""

log = logging.getLogger("colonnade.backends.native")


class BuildError(Exception):
    """There is no library; the text is a clause that may follow the backend's name.

    Attributes:
        lasting: Whether the compiler would say the same again, as long as nothing changes.
    """

    def __init__(self, reason: str, lasting: bool = False) -> None:
        super().__init__(reason)
        self.lasting = lasting


def find_compiler() -> list[str]:
    """Return the command that CXX names, such as "ccache g++", or the compiler on the path.

    Raises:
        BuildError: There is none.
    """
    named = os.environ.get("CXX", "").strip()
    if found := shutil.which(named):  # A path may hold spaces.
        return [found]
    words = _words("CXX")
    names = words[:1] or ["c++", "g++", "clang++"]
    for name in names:
        if found := shutil.which(name):
            return [found, *words[1:]]
    raise BuildError(
        f"needs a C++ compiler, and there is none by the name of {' or '.join(names)}; "
        "install g++ or clang, or set CXX"
    )


def identity(command: list[str]) -> list[str]:
    """Return what tells this compiler from another, or from a later state of the same file."""
    return [*command, str(Path(command[0]).stat().st_mtime_ns), _version(tuple(command))]


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    try:
        return _call([*command, "--version"], timeout=60.0).stdout
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"needs a C++ compiler, and {command[0]} does not run: {error}") from error


def flags() -> list[str]:
    """Return the options that are the same for every compiler, and the user's own."""
    # The macros choose the vectors of PyTorch's headers.
    capability = torch.backends.cpu.get_cpu_capability()
    return [
        "-O3",
        "-fPIC",
        "-shared",
        f"-DCPU_CAPABILITY={capability}",
        f"-DCPU_CAPABILITY_{capability}",
        f"-I{Path(torch.__file__).with_name('include')}",
        *_words("COLONNADE_CXXFLAGS"),
    ]


def compile_library(source: Path, out: Path) -> None:
    """Compile one file to a library, with the best options that the compiler takes.

    Raises:
        BuildError: The compiler fails or hangs, or knows no C++20.
    """
    best = FOR_PROCESSOR[0], FOR_THREADS[0]
    said = _failure(source, out, [*STANDARD, *best[0], *best[1], *flags()])
    if said is None:
        return
    probe = out.with_name("probe.cpp")
    probe.write_text("int colonnade_probe() { return 0; }\n")
    refused = _failure(probe, out, ["-fPIC", "-shared", *STANDARD])
    if refused is not None:
        if _failure(probe, out, ["-fPIC", "-shared"]) is None:
            said = f"needs a compiler that knows C++20, as g++ 10 and clang 10 do: {refused}"
        raise BuildError(said, lasting=True)
    processor = _first_taken(FOR_PROCESSOR, probe, out)
    probe.write_text("#include <omp.h>\nint colonnade_probe() { return omp_get_max_threads(); }\n")
    threads = _first_taken(FOR_THREADS, probe, out)
    if (processor, threads) != best:
        said = _failure(source, out, [*STANDARD, *processor, *threads, *flags()])
    if said is not None:
        raise BuildError(said, lasting=True)
    if not threads:  # PyTorch's loops are serial then.
        log.warning(
            "The compiler has no OpenMP, so the native kernel runs on one thread. Install its "
            "header omp.h, delete %s and start again.",
            out.name,
        )


def _first_taken(choices: tuple[tuple[str, ...], ...], probe: Path, out: Path) -> tuple[str, ...]:
    """Return the first choice that makes a library of `probe`, and the last without trying."""
    return next(
        options
        for options in choices
        if not options or _failure(probe, out, ["-fPIC", "-shared", *options]) is None
    )


def _failure(source: Path, out: Path, options: list[str]) -> str | None:
    """Compile, and return a clause with the compiler's errors, or last words, if it fails.

    Raises:
        BuildError: It hangs, was killed, or lacks memory or disk, which may pass.
    """
    out.unlink(missing_ok=True)
    command = find_compiler()
    arguments = [*options, str(source), "-o", str(out), *_libraries()]
    try:
        done = _call([*command, *arguments], timeout=60 * MINUTES, TMPDIR=str(out.parent))
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"could not be built: {command[0]} ran {MINUTES:g} minutes") from error
    if done.returncode == 0 and out.exists():
        return None
    lines = done.stderr.splitlines()
    quoted = "\n".join([line for line in lines if "error" in line.lower()][:5] or lines[-5:])
    said = (
        f"could not be built: {shlex.join(command)} ended with {done.returncode}, saying\n{quoted}"
    )
    if done.returncode < 0 or PASSES.search(done.stderr):
        raise BuildError(said)
    return said


def _call(
    command: list[str], timeout: float, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Call a program in English; what is not ASCII is escaped, so that any locale prints it."""
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="ascii",
        errors="backslashreplace",
        timeout=timeout,
        env=os.environ | {"LC_ALL": "C"} | environment,
    )


def _words(variable: str) -> list[str]:
    """Split an environment variable as a shell would, so that quotes keep spaces."""
    value = os.environ.get(variable, "")
    try:
        return shlex.split(value)
    except ValueError as error:
        raise BuildError(f"cannot read {variable}={value!r}: {error}. Set it again") from error


def _libraries() -> list[str]:
    if sys.platform == "darwin":
        return ["-undefined", "dynamic_lookup"]
    return [f"-L{Path(torch.__file__).with_name('lib')}", "-lc10", "-ltorch_cpu"]
