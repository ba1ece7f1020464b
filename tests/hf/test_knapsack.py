"""The choice of one option for each item within a capacity, against all choices there are."""

from __future__ import annotations

import itertools
import random

import pytest

from colonnade.hf.knapsack import choose


def _brute_force(
    costs: list[list[int]], losses: list[list[float]], capacity: int
) -> tuple[float, bool]:
    best = None
    for choice in itertools.product(*(range(len(each)) for each in costs)):
        if sum(c[i] for c, i in zip(costs, choice, strict=True)) <= capacity:
            loss = sum(x[i] for x, i in zip(losses, choice, strict=True))
            best = loss if best is None else min(best, loss)
    return (0.0, False) if best is None else (best, True)


@pytest.mark.plain
def test_the_choice_is_the_best_one() -> None:
    draw = random.Random(0)
    refused = 0
    for _ in range(300):
        costs = [[draw.randint(0, 9) for _ in range(draw.randint(1, 4))] for _ in range(5)]
        losses = [[draw.choice([0.0, 0.5, draw.random()]) for _ in each] for each in costs]
        capacity = draw.randint(10, 30)
        best, possible = _brute_force(costs, losses, capacity)
        if not possible:
            refused += 1
            with pytest.raises(ValueError, match="capacity must be at least"):
                choose(costs, losses, capacity)
            continue
        for tolerance in (0.0, 0.1):
            chosen = choose(costs, losses, capacity, tolerance)
            assert sum(c[i] for c, i in zip(costs, chosen, strict=True)) <= capacity
            loss = sum(x[i] for x, i in zip(losses, chosen, strict=True))
            assert best - 1e-12 <= loss <= best / (1 - tolerance) + 1e-9
    assert 0 < refused < 100


@pytest.mark.plain
def test_hundreds_of_alike_and_unlike_items_are_chosen_among() -> None:
    draw = random.Random(0)
    costs = [[250, 370, 610, 2048]] * 300
    unlike = [[draw.random(), draw.random() / 2, draw.random() / 4, 0.0] for _ in costs]
    for losses in (unlike, [unlike[0]] * 300):
        capacity = 300 * 2048 // 3
        chosen = choose(costs, losses, capacity, 1e-3)
        assert 0.99 * capacity < sum(costs[0][i] for i in chosen) <= capacity
