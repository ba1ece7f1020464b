"""The device under test, and a call there."""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

import colonnade
from tests.cases import Case, Inputs, Results, attend

INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
"""Whether these tests run on the CPU, to find mistakes in themselves."""


def _device() -> torch.device:
    # Unchecked, a build of torch for GPUs names one even where there is none.
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if INTERPRETED or found is None else found


DEVICE = _device()
WHY_NOT = colonnade.backends(build=False)["triton"]
marks = [
    pytest.mark.gpu,
    pytest.mark.skipif(WHY_NOT is not None, reason=f"triton {WHY_NOT}"),
]
"""For `pytestmark` of every file here."""
needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="asks CUDA's own tools")
HALF = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *HALF)
each_type = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_width = pytest.mark.parametrize("width", [64, 128])


def sized(on_gpu: int, interpreted: int) -> int:
    """Return a length or a count: much smaller where Triton is interpreted."""
    return interpreted if INTERPRETED else on_gpu


def attend_there(case: Case, inputs: Inputs, backend: str = "triton") -> Results:
    """Return the results of a backend on the device, brought back to where the inputs are."""
    return attend(case, inputs.to(DEVICE), backend).to(inputs.query.device)


def equal_bits(found: Results, expected: Results) -> Tensor:
    """Return on the device, without waiting for it, whether no result differs anywhere."""
    pairs = zip(found, expected, strict=True)
    return torch.stack([(a == b).all() for a, b in pairs]).all()
