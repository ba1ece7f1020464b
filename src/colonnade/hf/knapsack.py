"""Choose one option of each item, so that the costs stay within a capacity and the loss is least.

This is the multiple-choice knapsack problem (Kellerer, Pferschy and Pisinger 2004, "Knapsack
Problems", chapter 11), solved exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Option(NamedTuple):
    """What an option costs, what it loses, and its place among those of its item."""

    cost: int
    loss: float
    place: int


def choose(
    costs: Sequence[Sequence[int]],
    losses: Sequence[Sequence[float]],
    capacity: int,
    tolerance: float = 0.0,
) -> list[int]:
    """Return for each item the option that minimises the sum of losses, Σ cost <= `capacity`.

    Items are added one after the other to all states (cost, loss) that may still lead to the best
    choice: those that no other state beats in both, and whose Lagrangian bound

        loss + Σ_rest min (loss + λ · cost) - λ · (capacity - cost)

    does not exceed the loss of a choice that is known. λ is the price at which the cheapest choices
    fit.

    Args:
        costs: The cost of each option of each item, an integer of at least 0.
        losses: The loss of each option of each item, at least 0.
        capacity: The most that all costs may add up to.
        tolerance: Share of the least loss by which that of the result may be larger. At 0 the
            result is the best one, but the search may take minutes for hundreds of items.

    Raises:
        ValueError: Even the cheapest options cost more than the capacity.
    """
    items = [
        _without_dominated(
            [Option(c, loss, i) for i, (c, loss) in enumerate(zip(*each, strict=True))]
        )
        for each in zip(costs, losses, strict=True)
    ]
    least = sum(options[0].cost for options in items)
    if least > capacity:
        raise ValueError(f"capacity must be at least {least}, got capacity={capacity}.")
    price = _price(items, capacity)
    if price == 0:
        return [options[-1].place for options in items]
    return [option.place for option in _best(items, capacity, price, tolerance)]


def _without_dominated(options: list[Option]) -> list[Option]:
    """Sort by cost, and drop what costs no less than another option and loses no less."""
    kept: list[Option] = []
    for option in sorted(options):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def _cheapest(options: list[Option], price: float) -> Option:
    """Return the option with the least loss + price · cost; of several the one of least cost."""
    return min(options, key=lambda option: (option.loss + price * option.cost, option.cost))


def _price(items: list[list[Option]], capacity: int) -> float:
    """Return the least price, up to rounding, at which the cheapest options of all items fit."""

    def fits(price: float) -> bool:
        return sum(_cheapest(options, price).cost for options in items) <= capacity

    if fits(0.0):
        return 0.0
    # Costs are integers: at this price nothing is worth one more.
    low, high = 0.0, 1.0 + max(options[0].loss for options in items)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _filled(items: list[list[Option]], capacity: int, price: float) -> list[Option]:
    """Return the cheapest options at a price, with what is left spent where it saves most."""
    chosen = [_cheapest(options, price) for options in items]
    left = capacity - sum(option.cost for option in chosen)
    while True:
        steps = [
            ((old.loss - new.loss) / (new.cost - old.cost), number, new)
            for number, old in enumerate(chosen)
            for new in items[number]
            if old.cost < new.cost <= old.cost + left
        ]
        if not steps:
            return chosen
        _, number, new = max(steps)
        left -= new.cost - chosen[number].cost
        chosen[number] = new


def _best(items: list[list[Option]], capacity: int, price: float, tolerance: float) -> list[Option]:
    """Search the states, and return the best options."""
    known = _filled(items, capacity, price)
    most = sum(option.loss for option in known)
    # Far above the rounding of sums.
    most += 1e-12 * sum(options[0].loss for options in items) - tolerance * most
    bounds, least = [0.0], [0]  # Of the items from each one on.
    for options in reversed(items):
        cheapest = _cheapest(options, price)
        bounds.append(bounds[-1] + cheapest.loss + price * cheapest.cost)
        least.append(least[-1] + options[0].cost)
    cost = torch.zeros(1, dtype=torch.long, device="cpu")
    loss = torch.zeros(1, dtype=torch.double, device="cpu")
    parents: list[Tensor] = []
    for number, options in enumerate(items, start=1):
        new_cost = torch.tensor([o.cost for o in options], device="cpu")
        new_loss = torch.tensor([o.loss for o in options], dtype=torch.double, device="cpu")
        cost, loss = (cost[:, None] + new_cost).flatten(), (loss[:, None] + new_loss).flatten()
        # A float times integers would be rounded to float32.
        bound = loss + bounds[-1 - number] - price * (capacity - cost).double()
        may = (cost + least[-1 - number] <= capacity) & (bound <= most)
        states = may.nonzero().flatten()
        states = states[_pareto(cost[states], loss[states])]
        if len(states) == 0:
            return known
        cost, loss = cost[states], loss[states]
        parents.append(states)
    state = int(loss.argmin())
    # With capacity left, a state may lose more than its bound; under a tolerance more than `known`.
    if float(loss[state]) >= sum(option.loss for option in known):
        return known
    chosen: list[Option] = []
    for options, states in zip(reversed(items), reversed(parents), strict=True):
        state, option = divmod(int(states[state]), len(options))
        chosen.append(options[option])
    return chosen[::-1]


def _pareto(cost: Tensor, loss: Tensor) -> Tensor:
    """Return the indices of the states that no other one beats, by ascending cost."""
    order = loss.argsort(stable=True)
    order = order[cost[order].argsort(stable=True)]
    loss = loss[order]
    best = loss.cummin(0).values
    first = torch.ones_like(loss, dtype=torch.bool)
    first[1:] = loss[1:] < best[:-1]
    return order[first]
