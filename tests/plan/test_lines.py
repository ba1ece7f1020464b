"""The one place that splits positions into blocks, against Python's own division."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from colonnade.plan.lines import block_and_offset


@given(
    positions=st.lists(st.integers(0, 10**6), min_size=1, max_size=5), stride=st.integers(1, 1000)
)
def test_block_and_offset(positions: list[int], stride: int) -> None:
    rows, columns = block_and_offset(torch.tensor([positions]), stride)
    assert rows.tolist() == [[divmod(i, stride)[0] for i in positions]]
    assert columns.tolist() == [[divmod(i, stride)[1] for i in positions]]
