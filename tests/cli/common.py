"""The command as the tests call it: as a process, or within theirs."""

from __future__ import annotations

import os
import subprocess
import sys

from typer.testing import CliRunner, Result

from colonnade.cli import app

PICTURES = {".png": b"\x89PNG", ".svg": b"<?xml"}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
COMMAND = [sys.executable, "-m", "colonnade.cli"]
SMALL = ["--layers", "1", "--width", "32", "--heads", "2", "--context", "128", "--stride", "16"]
SMALL += ["--summary", "2", "--no-compile", "--no-bf16"]


def colonnade_process(*arguments: object) -> str:
    """Run the command as a user does, and return what it said."""
    done = subprocess.run(
        [*COMMAND, *map(str, arguments)], capture_output=True, text=True, env=ENVIRONMENT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def invoke(*arguments: object, stdin: bytes = b"") -> Result:
    """Run the command within this process; for a user it is the same."""
    return CliRunner(env={"NO_COLOR": "1", "COLUMNS": "100"}).invoke(
        app, [*map(str, arguments)], input=stdin
    )


def succeed(*arguments: object, stdin: bytes = b"") -> Result:
    """Run a command that has to work."""
    result = invoke(*arguments, stdin=stdin)
    assert result.exit_code == 0, (result.exception, result.stderr)
    return result
