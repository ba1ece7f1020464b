"""Settings of all tests: one thread, a seed for each test, and draws that repeat themselves.

Nothing here imports colonnade: the type-checking plugin has to see that import first.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings

settings.register_profile(
    "colonnade", deadline=None, derandomize=True, print_blob=True, max_examples=60
)
settings.load_profile("colonnade")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Let every test draw the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def backends_that_ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list to which every backend adds its name when it runs."""
    from colonnade.backends import choice  # Not before the plugin has seen the import.

    ran: list[str] = []
    for name, module in choice.BACKENDS.items():

        def attend(*arguments: Any, name: str = name, module: Any = module.attend) -> Any:
            ran.append(name)
            return module(*arguments)

        monkeypatch.setattr(module, "attend", attend)
    return ran
