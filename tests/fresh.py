"""Fresh interpreters, forked from one that has imported torch and nothing else.

To import torch takes seconds; each of these processes begins right behind that, and has imported
nothing of ours.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from subprocess import CompletedProcess

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo"])


@dataclass(frozen=True)
class Fresh:
    """An interpreter that runs some code, in a process group of its own."""

    process: ForkServerProcess
    folder: tempfile.TemporaryDirectory[str]

    def finish(self, seconds: float = 240) -> CompletedProcess[str]:
        """Wait for its end, and return its exit status and what it printed."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, "it takes too long"
        with self.folder as folder:
            out, err = (Path(folder, name).read_text() for name in ("out", "err"))
        return CompletedProcess([], self.process.exitcode, out, err)

    def kill(self) -> None:
        """End it and the processes that it started at once."""
        assert self.process.pid is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()
        self.folder.cleanup()


def start(
    code: str,
    *arguments: str,
    cwd: Path | None = None,
    environment: dict[str, str] | None = None,
) -> Fresh:
    """Start an interpreter with arguments, in a folder, with additions to the environment."""
    folder = tempfile.TemporaryDirectory()
    given = (code, arguments, str(cwd or Path.cwd()), environment or {}, folder.name)
    process = FORKS.Process(target=_run, args=given, daemon=True)
    process.start()
    return Fresh(process, folder)


def run(code: str, *arguments: str, cwd: Path | None = None) -> CompletedProcess[str]:
    """Run an interpreter to its end."""
    return start(code, *arguments, cwd=cwd).finish()


def _run(
    code: str, arguments: tuple[str, ...], cwd: str, environment: dict[str, str], folder: str
) -> None:
    os.setsid()
    os.chdir(cwd)
    os.environ.update(environment)
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_CREAT | os.O_WRONLY), descriptor)
    sys.argv = ["-c", *arguments]
    exec(code, {"__name__": "__main__"})
