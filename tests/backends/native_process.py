"""Processes that try the native backend, and scripts that stand for a compiler."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from colonnade.backends.native import build
from tests.fresh import Fresh, start

TRY = """
import json, torch, colonnade
query = torch.randn(1, 1, 6, 4)
pattern = colonnade.FixedPattern(4, 1)
try:
    colonnade.attention(query, query, query, pattern, backend="native")
    asked = None
except NotImplementedError as error:
    asked = str(error)
why = colonnade.backends()["native"]
chosen = colonnade.explain(query, query, query, pattern).backend
colonnade.attention(query, query, query, pattern)
print(json.dumps({"why": why, "asked": asked, "chosen": chosen}))
"""


@dataclass(frozen=True)
class Report:
    """Findings of a process that tried the backend.

    Attributes:
        why: The reason in `backends()` why native does not run.
        asked: The error of a call that names it.
        chosen: The backend of a call that names none.
        said: Standard error.
    """

    why: str | None
    asked: str | None
    chosen: str
    said: str


def start_trying(cache: Path | str, before: str = "", **environment: str) -> Fresh:
    """Start a process that tries the backend with a folder for the library, after some code."""
    return start(before + TRY, environment={"COLONNADE_CACHE": str(cache)} | environment)


def report_of(process: Fresh) -> Report:
    """Wait for a process that tries the backend."""
    done = process.finish()
    assert done.returncode == 0, done.stderr
    return Report(**json.loads(done.stdout), said=done.stderr)


def try_native(cache: Path | str, before: str = "", **environment: str) -> Report:
    """Run a process that tries the backend."""
    return report_of(start_trying(cache, before, **environment))


def fake_compiler(folder: Path, what: str, version: str = "compiler 1.0") -> str:
    """Return a script instead of a compiler: it does `what` with "$out", the file to write.

    The shell's variable "$all" holds all arguments.
    """
    script = folder / "compiler"
    script.write_bytes(
        (
            "#!/bin/sh\n"
            f'if [ "$1" = --version ]; then echo "{version}"; exit; fi\n'
            'all="$*"; while [ "$1" != -o ]; do shift; done\n'
            f"out=$2\n{what}\n"
        ).encode("latin-1")
    )
    script.chmod(0o755)
    return str(script)


def copy_library() -> str:
    """Return the command that copies what the true compiler wrote before."""
    return f'cp "{build.library_path()}" "$out"'
