"""Build the C++ of this folder once, keep it, and load it.

There is no lock that a killed builder could leave behind. What the compiler wrote under a temporary
name becomes the library in one step, so that a library is whole or not there, and several builders
at once do no harm. Its name is a hash of everything that it depends on. A failure is stored next to
it, under the same hash, so the next process does not compile again or repeat the warning.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from colonnade.backends import environment
from colonnade.backends.environment import is_on
from colonnade.backends.native.compiler import (
    FOR_PROCESSOR,
    FOR_THREADS,
    STANDARD,
    BuildError,
    compile_library,
    find_compiler,
    flags,
    identity,
)

SOURCES = Path(__file__).with_name("csrc")
MAIN = "library.cpp"
FAILED = ".failed"
"""Suffix of the files that remember a reason."""

log = logging.getLogger(__name__)
_one_at_a_time = threading.Lock()


def reason_unusable(build: bool = True) -> str | None:
    """Return why the C++ operations cannot be called in this process, as a clause; None: they can.

    They are built at the first call, unless `build` is False. The answer stays what it is then.
    """
    with _one_at_a_time:
        if not build and not _is_settled():
            return "is not built yet: its first use builds it, or colonnade info --build"
        return _load()


def forget_failures() -> None:
    """Forget the reasons that earlier processes met, so that they are tried and told again."""
    with suppress(BuildError, OSError):
        for file in cache_folder().glob(f"native-*{FAILED}"):
            file.unlink(missing_ok=True)


def _is_settled() -> bool:
    """Whether there is nothing to be built: it is in the cache, failed before, or cannot be."""
    try:
        if not _switched_on():
            return True
        path = library_path()
        with _one_error("cannot look for what it built"):
            return path.exists() or _failed_before(path) is not None
    except BuildError:
        return True


@functools.cache
def _load() -> str | None:
    try:
        if not _switched_on():
            return f"is switched off by COLONNADE_NATIVE={os.environ['COLONNADE_NATIVE']}"
        path = library_path()
        with _one_error("cannot look for what it built"):
            built = path.exists()
        if not built:
            if reason := _failed_before(path):
                return f"{reason}\n(met before; colonnade info --build tries again)"
            build(path)
        with _one_error(
            f"could not load what it built. Delete {path} to build it again, or set "
            "COLONNADE_CACHE to a folder whose files may be loaded"
        ):
            torch.ops.load_library(path)
    except BuildError as error:
        _tell_once(str(error), path if error.lasting else None)
        return str(error)
    return None


@contextmanager
def _one_error(doing: str) -> Iterator[None]:
    """Turn whatever files, folders, names and locales give rise to into a BuildError."""
    try:
        yield
    except (OSError, RuntimeError, ValueError) as error:
        raise BuildError(f"{doing}: {error}") from error


def _switched_on() -> bool:
    try:
        return is_on("COLONNADE_NATIVE", default=True)
    except ValueError as error:
        raise BuildError(str(error)) from error


@_one_error("cannot work out where its library belongs")
def library_path() -> Path:
    """Return where the library belongs; its name tells source, torch, compiler, flags, processor.

    Raises:
        BuildError: There is no compiler, no C++ or no folder.
    """
    depends_on = [
        *_sources(),
        torch.__version__,
        str(torch.version.git_version),
        *identity(find_compiler()),
        *(str(options) for options in (STANDARD, FOR_PROCESSOR, FOR_THREADS)),
        *flags(),
        *(f"{name}={has}" for name, has in sorted(torch.cpu.get_capabilities().items())),
    ]
    return cache_folder() / f"native-{_hash(depends_on)}.so"


def _sources() -> list[str]:
    """Return name and contents of each file of C++; whatever else lies there is nothing to us."""
    if not (SOURCES / MAIN).is_file():
        raise BuildError(
            f"needs its C++, and {SOURCES / MAIN} is not there; install colonnade again, or let "
            "what packs your application take the package's data files along"
        )
    ours = [
        file
        for file in sorted(SOURCES.iterdir())
        if file.suffix in (".cpp", ".h") and not file.name.startswith(".") and file.is_file()
    ]
    return [f"{file.name}\n{file.read_text('utf-8', 'surrogateescape')}" for file in ours]


def _hash(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="surrogateescape")).hexdigest()[:16]


@_one_error("has no folder for its library; set COLONNADE_CACHE to one that can be written")
def cache_folder() -> Path:
    """Return the folder of all backends.

    Raises:
        BuildError: There is no home, or none of the user that ~ names.
    """
    return environment.cache_folder()


def build(path: Path) -> None:
    """Compile the library to `path`.

    Raises:
        BuildError: The compiler fails or hangs, or the folder cannot be written.
    """
    started = time.monotonic()
    with _one_error(
        f"could not be built in {path.parent}. Set COLONNADE_CACHE to a folder that can be written"
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        # A folder of its own: what a killed builder leaves behind is in nobody's way.
        with tempfile.TemporaryDirectory(
            dir=path.parent, prefix="building-", ignore_cleanup_errors=True
        ) as folder:
            log.warning("Compiling the native kernel to %s, once; it takes 20 seconds.", path)
            unfinished = Path(folder, path.name)
            compile_library(SOURCES / MAIN, unfinished)
            unfinished.replace(path)
    log.info("Compiled in %.0f seconds.", time.monotonic() - started)


def _failed_before(path: Path) -> str | None:
    """Return the reason why an earlier process could not build what belongs at `path`, if any."""
    with suppress(OSError):
        return path.with_suffix(FAILED).read_text("ascii", "backslashreplace") or None
    return None


def _tell_once(reason: str, path: Path | None) -> None:
    """Warn that there is no native backend, and remember it, so that it is not said again.

    Where nothing can be remembered, every process says it.

    Args:
        reason: The reason, which is kept under its own hash,
        path: or under that of the library that is not to be built again.
    """
    with suppress(BuildError, OSError):
        if path is None:
            path = cache_folder() / f"native-{_hash([reason])}"
            if path.with_suffix(FAILED).exists():
                return
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_suffix(FAILED).write_text(reason, "ascii", "backslashreplace")
    log.warning(
        "Backend 'native' %s.\nBackend 'eager' runs instead, which is slower. This is said once; "
        "colonnade info says it again, and colonnade info --build tries again.",
        reason,
    )
