"""What is kept on a device, and the order of its streams; a device that is played stands in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from colonnade.backends.tracing import device as kept
from colonnade.backends.tracing.device import kept_on_device

CUDA = torch.device("cuda", 0)


@dataclass(eq=False)
class _Stream:
    waited: list[str] = field(default_factory=list)

    def record_event(self) -> str:
        return "arrival"

    def wait_event(self, event: str) -> None:
        self.waited.append(event)


@dataclass
class _Module:
    """What torch.cuda is to a device."""

    stream: _Stream
    capturing: bool = False

    def current_stream(self, device: torch.device) -> _Stream:
        return self.stream

    def is_current_stream_capturing(self) -> bool:
        return self.capturing


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Module]:
    played = _Module(_Stream())
    monkeypatch.setattr(torch, "get_device_module", lambda device: played)
    monkeypatch.setattr(kept, "on_device", lambda tensor, device: tensor)
    monkeypatch.setattr(Tensor, "record_stream", lambda tensor, stream: None)
    monkeypatch.setattr(kept, "_IN_GRAPHS", set())
    yield played
    kept._sent.cache_clear()


def _make(size: int) -> tuple[Tensor, int]:
    return torch.arange(size), size


def test_it_is_made_once_on_the_cpu() -> None:
    device = torch.device("meta")
    with torch.device("meta"), torch.inference_mode():
        first = kept_on_device(device, _make, 3)
    assert first[0].is_meta
    assert not first[0].is_inference()
    assert first[1] == 3
    assert kept_on_device(device, _make, 3) is first


def test_a_stream_waits_once_for_what_another_one_sent(module: _Module) -> None:
    first, other = module.stream, _Stream()
    made: Any = kept_on_device(CUDA, _make, 4)
    module.stream = other
    assert all(kept_on_device(CUDA, _make, 4) is made for _ in range(3))
    assert (first.waited, other.waited) == ([], ["arrival"])


def test_what_a_graph_points_to_is_never_let_go(module: _Module) -> None:
    made = kept_on_device(CUDA, _make, 5)
    module.stream, module.capturing = _Stream(), True
    assert kept_on_device(CUDA, _make, 5) is made
    assert module.stream.waited == []  # A graph may not wait for what came before it.
    module.capturing = False
    for size in range(100, 100 + 2 * kept.KEPT):
        kept_on_device(CUDA, _make, size)
    assert [sent.made for sent in kept._IN_GRAPHS] == [made]


def test_a_capture_cannot_begin_with_new_lengths(module: _Module) -> None:
    module.capturing = True
    with pytest.raises(NotImplementedError, match="Make the same call once before the capture"):
        kept_on_device(CUDA, _make, 6)
    module.capturing = False
    assert kept_on_device(CUDA, _make, 6)[1] == 6
