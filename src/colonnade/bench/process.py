"""Run a module in a process of its own, for measurements that others in a process would disturb."""

from __future__ import annotations

import os
import subprocess
import sys


def last_line_of(module: str, *arguments: str, **environment: str) -> str:
    """Run `python -m module arguments…` with additions to the environment; return its last line.

    Raises:
        NotImplementedError: It failed; the message is the last line of its standard error.
    """
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    if done.returncode != 0:
        raise NotImplementedError((done.stderr.splitlines() or ["it was killed"])[-1])
    return done.stdout.splitlines()[-1]
