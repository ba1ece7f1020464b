"""Memory that grows with the length, not with the pairs: eager."""

from __future__ import annotations

import os

import pytest
import torch

from tests.peak import CLEAR_REFS, MEASURED, STRIDE, WIDTH, peaks

FLOAT = torch.float32.itemsize
N = 16_384

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not os.access(CLEAR_REFS, os.W_OK), reason=f"needs Linux's {CLEAR_REFS}"),
]


@pytest.fixture(scope="module")
def eager() -> dict[str, int]:
    """Measure the bytes beyond inputs, output and gradients, over one forward and backward."""
    return peaks("eager")


def test_eager_needs_three_times_its_inputs_and_output(eager: dict[str, int]) -> None:
    """Beyond inputs, output and gradients, at most 3 · (q + k + v + out) = 101 MB.

    Not kept: the weights of all pairs, 142 MB, or a dense mask, 1.1 GB.
    """
    measured = MEASURED["fixed"]
    assert measured.kv_len == measured.q_len == 2 * N
    unit = 4 * 2 * N * WIDTH * FLOAT
    print(f"peak beyond results: {eager['fixed'] / unit:.2f} · (q + k + v + out)")
    assert eager["fixed"] <= 3 * unit < measured.pattern.num_pairs(2 * N) * FLOAT


@pytest.mark.parametrize(
    ("pattern", "keys"), [("strided", 2 * STRIDE + N // STRIDE), ("window", 2 * STRIDE)]
)
def test_windows_and_columns_make_nothing_square(
    pattern: str, keys: int, eager: dict[str, int]
) -> None:
    """At most 7 tensors [n, 2l + n/l], or [n, 2l] for a window: 176 MB and 117 MB.

    Scores, weights and their gradients, before and after a mask. Not made: n × n scores, 1.1 GB, or
    a dense mask, 268 MB.
    """
    assert MEASURED[pattern].kv_len == MEASURED[pattern].q_len == N
    unit = N * keys * FLOAT
    print(f"peak beyond results: {eager[pattern] / unit:.2f} · n · {keys}")
    assert eager[pattern] <= 7 * unit < N * N


def test_reading_both_ways_makes_nothing_square(eager: dict[str, int]) -> None:
    """Beyond inputs, output and gradients, at most 4 · (q + k + v + out) = 67 MB.

    Not made: a dense mask, 268 MB.
    """
    assert MEASURED["bidirectional"].kv_len == MEASURED["bidirectional"].q_len == N
    unit = 4 * N * WIDTH * FLOAT
    print(f"peak beyond results: {eager['bidirectional'] / unit:.2f} · (q + k + v + out)")
    assert eager["bidirectional"] <= 4 * unit < N * N


def test_one_query_needs_no_whole_line(eager: dict[str, int]) -> None:
    """For a window of 16,384 keys among 65,536, six copies of the keys and values: 201 MB.

    Not made: the scores of a whole line of queries, 2.1 GB.
    """
    measured = MEASURED["one query of a wide window"]
    assert (measured.kv_len, measured.q_len) == (65_536, 1)
    unit = 2 * 65_536 * WIDTH * FLOAT
    peak = eager["one query of a wide window"]
    print(f"peak beyond results: {peak / unit:.2f} · (k + v)")
    assert peak <= 6 * unit
