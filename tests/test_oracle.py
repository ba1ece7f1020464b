"""The two ways in which the oracle computes attention, held to each other."""

from __future__ import annotations

from hypothesis import given

from tests.cases import Case, attend_by_loops, attend_by_products, cases
from tests.rounding import check


@given(case=cases())
def test_products_equal_loops(case: Case) -> None:
    """Output, log-sum-exp and gradients; rows that read nothing are drawn too."""
    inputs = case.inputs()
    check(case, inputs, attend_by_products(case, inputs), attend_by_loops(case, inputs))
