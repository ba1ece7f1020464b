"""Which devices backend "triton" takes, and what it says of others. Devices are played."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from colonnade import FixedPattern
from colonnade.backends import choice, triton
from colonnade.backends.choice import choose
from colonnade.backends.triton import configurations
from colonnade.ops.check import make_call

pytestmark = pytest.mark.plain  # A played tensor is no tensor to run-time type checks.
CUDA = torch.device("cuda", 0)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """An H100 with Triton, whose properties a test may change."""
    monkeypatch.setattr(configurations, "name_of", configurations.name_of.__wrapped__)
    monkeypatch.setattr(triton, "name_of", configurations.name_of)
    found = SimpleNamespace(major=9, minor=0, gcnArchName="gfx942:sramecc+:xnack-")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(
        torch.cuda, "get_device_capability", lambda device: (found.major, found.minor)
    )
    monkeypatch.setattr(triton, "reason_unusable", lambda build=True: None)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    return found


def _declined(dtype: torch.dtype, width: int) -> str | None:
    """What it says of a call on the GPU: the tensors have no numbers, but say where they are."""
    x = SimpleNamespace(shape=torch.Size((1, 1, 6, width)), dtype=dtype, device=CUDA)
    call = make_call(torch.zeros(1, 1, 6, width), FixedPattern(4, 1), 0.4)
    return triton.reason_declined(x, x, x, call)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", triton.DTYPES, ids=str)
@pytest.mark.parametrize("width", [1, 64, 128])
def test_it_takes_every_type_at_widths_up_to_128(
    gpu: SimpleNamespace, dtype: torch.dtype, width: int
) -> None:
    for gpu.major, gpu.minor in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0)):
        assert _declined(dtype, width) is None
        assert triton.reason_by_name_alone(CUDA) is None


def test_tiles_that_spill_are_declined_by_their_type_and_width(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _declined(torch.float32, 129) == (
        "has no tile for torch.float32 at a width of 129 that fits the registers of sm_90"
    )
    assert _declined(torch.bfloat16, 256) is None
    asked = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        assert _declined(torch.float32, 256) is None
    finally:
        torch.backends.cuda.matmul.fp32_precision = asked
    # AMD multiplies float32 in matrix instructions, and has no TF32.
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert _declined(torch.float32, 256) is None


def test_old_devices_are_declined_and_unchecked_ones_run_by_name_alone(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu.major, gpu.minor = 7, 5
    assert _declined(torch.float16, 64) == "needs a GPU of compute capability 8.0, got 7.5"
    gpu.major, gpu.minor = 8, 7
    assert _declined(torch.float16, 64) is None
    assert triton.reason_by_name_alone(CUDA) == (
        "runs if it is asked for by name alone: its machine code was not checked for sm_87"
    )
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert triton.reason_by_name_alone(CUDA) is None  # gfx942
    gpu.gcnArchName = "gfx1100"
    reason = triton.reason_by_name_alone(CUDA)
    assert reason is not None
    assert reason.endswith("gfx1100")


def test_auto_leaves_out_what_runs_by_name_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.zeros(1, 1, 6, 8, dtype=torch.float16)  # native does not take it.
    call = make_call(x, FixedPattern(4, 1), 0.4)
    monkeypatch.setattr(triton, "reason_declined", lambda *arguments: None)
    reasons: list[str | None] = []
    monkeypatch.setitem(choice.BY_NAME_ALONE, "triton", lambda device: reasons[-1])
    for reason, chosen in (("is new", "eager"), (None, "triton")):
        reasons.append(reason)
        assert choose(x, x, x, call, "auto") == chosen
        assert choose(x, x, x, call, "triton") == "triton"
