"""Fresh processes that try backend "native", forked from one that has loaded colonnade already.

To load it takes seconds; a process in which nothing was built or loaded yet takes none this way.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["colonnade"])


@dataclass(frozen=True)
class Report:
    """The findings of a process, and its words on standard error.

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


@dataclass(frozen=True)
class Trial:
    """A process that tries the backend, in a process group of its own."""

    process: ForkServerProcess
    receiver: Connection

    def report(self, seconds: float = 240) -> Report:
        """Wait for its report."""
        assert self.receiver.poll(seconds), "it takes too long"
        report: Report = self.receiver.recv()
        self.process.join()
        assert self.process.exitcode == 0
        return report

    def kill(self) -> None:
        """End it and its compiler at once."""
        assert self.process.pid is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.join()


def start(cache: Path, **environment: str) -> Trial:
    """Start a process with a folder for the library and additions to the environment."""
    receiver, sender = FORKS.Pipe(duplex=False)
    arguments = (sender, {"COLONNADE_CACHE": str(cache)} | environment)
    process = FORKS.Process(target=_try_native, args=arguments, daemon=True)
    process.start()
    sender.close()
    return Trial(process, receiver)


def _try_native(sender: Connection, environment: dict[str, str]) -> None:
    import torch

    import colonnade

    os.setsid()
    os.environ.update(environment)
    with tempfile.TemporaryFile() as said:
        os.dup2(said.fileno(), 2)
        query = torch.randn(1, 1, 6, 4)
        pattern = colonnade.FixedPattern(4, 1)
        asked = None
        try:
            colonnade.attention(query, query, query, pattern, backend="native")
        except NotImplementedError as error:
            asked = str(error)
        why = colonnade.backends()["native"]
        chosen = colonnade.explain(query, query, query, pattern).backend
        colonnade.attention(query, query, query, pattern)
        said.seek(0)
        sender.send(Report(why, asked, chosen, said.read().decode()))
