"""Run the command by `python -m colonnade.cli` too."""

from __future__ import annotations

from colonnade.cli import main

main()
