"""Settings of all tests: one thread, a seed for each test, and draws that repeat themselves.

Nothing here imports colonnade: the type-checking plugin has to see that import first.
"""

from __future__ import annotations

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
