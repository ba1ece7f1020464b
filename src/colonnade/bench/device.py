"""Time and memory on a GPU or another accelerator: rounds, peaks and the matrix rate.

A device runs behind the host, so times are taken from events there, one before and one after
each call. Before each call its cache is overwritten, which also gives the host a head start
of about a tenth of a millisecond: of a call that hands over its kernels faster than that, the
time is the device's alone. `captured` leaves the host out altogether.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from colonnade.bench.timing import Comparison, Contender, Spread

FLUSHED = 256 * 2**20
"""Bytes that are overwritten before each call: more than the cache of any GPU holds."""


def failures() -> tuple[type[Exception], ...]:
    """Return how a contender may fail without ending a measurement."""
    # A RuntimeError is also: no memory, PyTorch's compilers, and whatever a kernel did wrong.
    known = RuntimeError, ValueError, TypeError, AssertionError, ImportError, OSError
    try:
        from triton.errors import TritonError
    except ImportError:
        return known
    return (*known, TritonError)


def reason_of(error: Exception) -> str:
    """Return the last line of what an error says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no reason given'}"


def compare_on_device(
    contenders: Mapping[str, Contender], device: torch.device, rounds: int
) -> Comparison:
    """Run every contender once in each of `rounds` rounds, after two rounds that do not count."""
    flush = _Flush(device)
    counted = []
    for number in range(rounds + 2):
        timers = {name: _timed(run, device, flush) for name, run in contenders.items()}
        if number >= 2:
            counted.append({name: seconds() for name, seconds in timers.items()})
    first, *others = contenders
    return Comparison(
        {name: Spread.of([each[name] for each in counted]) for name in contenders},
        {name: Spread.of([each[name] / each[first] for each in counted]) for name in others},
        rounds,
    )


class _Flush:
    """Overwrites the cache of a device; a CPU's is left alone."""

    def __init__(self, device: torch.device) -> None:
        size = 0 if device.type == "cpu" else FLUSHED
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)

    def __call__(self) -> None:
        self.memory.zero_()


def _timed(run: Contender, device: torch.device, flush: Callable[[], None]) -> Callable[[], float]:
    """Run a contender; return a function that waits for its end and returns its seconds."""
    flush()
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        seconds = time.perf_counter() - start
        return lambda: seconds
    module = torch.get_device_module(device)
    begin, end = (module.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()

    def wait() -> float:
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return wait


def captured(run: Contender) -> Contender:
    """Return a function that replays a call from a CUDA graph, which no host delays.

    Raises:
        RuntimeError: The call cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()

    def replay(kept: Any = results) -> None:  # The graph writes there, as long as it lives.
        graph.replay()

    return replay


def peak_bytes(run: Callable[[], Tensor | tuple[Tensor, ...]], device: torch.device) -> int | None:
    """Return the bytes beyond what is there before and the results that one call allocates.

    None on a CPU, which does not count them.
    """
    if device.type == "cpu":
        run()
        return None
    module = torch.get_device_module(device)
    gc.collect()
    module.synchronize()
    module.reset_peak_memory_stats()
    before = module.memory_allocated()
    results = run()
    module.synchronize()
    peak = module.max_memory_allocated()
    returned = results if isinstance(results, tuple) else (results,)
    return int(peak - before - sum(t.untyped_storage().nbytes() for t in returned))


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int, rounds: int) -> Spread:
    """Return the FLOP/s of a product of two square matrices: what there is to reach."""
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = compare_on_device({"matrix": lambda: left @ right}, device, rounds).seconds["matrix"]
    flop = 2 * size**3
    return Spread(flop / seconds.median, flop / seconds.high, flop / seconds.low)
