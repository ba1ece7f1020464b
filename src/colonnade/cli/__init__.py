"""The command `colonnade`: train, evaluate, sample; retrofit; patterns; time and machine.

A user's mistake gets one line on standard error and exit code 2. Whatever needs an extra is
imported inside the commands, so that an extra that is missing can be named.
"""

from __future__ import annotations

from colonnade.cli.common import app

# In the order in which the help names them.
from colonnade.cli import training, sampling, retrofitting, patterns, machine  # isort: skip

__all__ = ["app", "machine", "main", "patterns", "retrofitting", "sampling", "training"]


def main() -> None:
    """Run the command."""
    app()
