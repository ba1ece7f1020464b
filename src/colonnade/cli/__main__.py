"""So that python -m colonnade.cli is the command too."""

from __future__ import annotations

from colonnade.cli import main

main()
