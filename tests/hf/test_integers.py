"""Integers of Python, NumPy and PyTorch are taken, one or several, and nothing else is."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from colonnade.hf.integers import as_int, as_ints, items


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (40, [40]),
        (np.int64(40), [40]),
        (np.array(40), [40]),
        (torch.tensor(40), [40]),
        ([40, np.uint8(50), torch.tensor(40)], [40, 50]),
        (np.array([40, 50]), [40, 50]),
        (torch.tensor([40, 50]), [40, 50]),
        (range(40, 42), [40, 41]),
        ([], []),
        ((), []),
        (np.array([]), []),
    ],
    ids=repr,
)
def test_integers_are_those_of_numpy_and_pytorch(given: Any, expected: list[int]) -> None:
    found = as_ints("windows", given)
    assert found == expected
    assert all(type(each) is int for each in found)


@pytest.mark.plain
@pytest.mark.parametrize(
    "given",
    [
        "32",
        b"32",
        {32: 1},
        None,
        True,
        [True],
        np.bool_(True),
        np.array([True, False]),
        torch.tensor(True),
        32.0,
        np.float64(32),
        np.array(32.0),
        torch.tensor(32.0),
        [32.0],
        [[32, 40]],
        np.array([[32, 40]]),
    ],
    ids=repr,
)
def test_what_is_no_integer_is_refused(given: Any) -> None:
    with pytest.raises(TypeError, match="stride must be an int or several, got stride="):
        as_ints("stride", given)
    assert as_int(given) is None


def test_what_a_generator_raises_is_its_own() -> None:
    def fail() -> Any:
        yield 1
        raise TypeError("mine")

    with pytest.raises(TypeError, match="mine"):
        items(fail())
    assert items(5) is None
