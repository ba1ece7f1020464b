"""One query of each head in C++, over all that a cache keeps or a part of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import colonnade
from colonnade import FullPattern
from colonnade.backends import native
from colonnade.backends.call import Call, Seen
from tests.cases import Case, Inputs
from tests.layouts import LAYOUTS, laid_out
from tests.oracle import dense_attention
from tests.rounding import bounds

why_not = colonnade.backends()["native"]
pytestmark = pytest.mark.skipif(why_not is not None, reason=f"native {why_not}")

each_dtype = pytest.mark.parametrize("dtype", native.DTYPES, ids=str)


def _decode(
    query: Tensor, key: Tensor, value: Tensor, reads: Tensor | None, scale: float
) -> Tensor:
    """Return the output of backend "native" over all entries, or those that `reads` marks."""
    seen = Seen(None if reads is None else reads[:, :, None])
    return native.attend(query, key, value, Call(FullPattern(), scale, keys=seen))[0]


def _case(kept: int, group: int = 2, qk_dim: int = 24, v_dim: int = 16) -> Case:
    return Case(FullPattern(), 2, 2, group, 1, kept, qk_dim, v_dim, 0.3, seed=kept)


def _half(case: Case) -> Tensor:
    """Draw about half of the entries; none in the first row's first head."""
    generator = torch.Generator().manual_seed(case.seed)
    reads = torch.rand(case.batch, case.kv_heads, case.kv_len, generator=generator) < 0.5
    reads[0, 0] = False
    return reads


def _check(case: Case, dtype: torch.dtype, masked: bool) -> None:
    """Check each key head of each row by itself, with the entries that it reads and no others."""
    inputs = case.inputs(dtype)
    reads = _half(case) if masked else None
    whole = _decode(*inputs[:3], reads, case.scale)
    assert whole.dtype == dtype
    for row in range(case.batch):
        for head in range(case.kv_heads):
            queries = case.queries_of(head)
            read = slice(None) if reads is None else reads[row, head]
            query, grad_out, grad_lse = (inputs[at][row, None, queries] for at in (0, 3, 4))
            key, value = (t[row, None, head, None, read] for t in (inputs.key, inputs.value))
            alone = Inputs(query, key, value, grad_out, grad_lse)
            found = whole[row, None, queries].double()
            if key.shape[2] == 0:
                assert (found == 0).all()
                continue
            part = replace(case, batch=1, kv_heads=1, kv_len=key.shape[2])
            true, _ = dense_attention(*alone.double()[:3], part.mask(), part.scale)
            rounding = torch.finfo(dtype).eps / 2 * true.abs()
            assert ((found - true).abs() <= 2 * bounds(part, alone).out + rounding).all()


@settings(max_examples=200)
@given(
    kept=st.integers(0, 70),
    group=st.integers(1, 7),
    qk_dim=st.integers(1, 70),
    v_dim=st.integers(1, 70),
    dtype=st.sampled_from(native.DTYPES),
    masked=st.booleans(),
)
def test_few_entries(
    kept: int, group: int, qk_dim: int, v_dim: int, dtype: torch.dtype, masked: bool
) -> None:
    _check(_case(kept, group, qk_dim, v_dim), dtype, masked)


@each_dtype
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kept", [255, 256, 257, 1_100])
def test_more_than_one_run_of_entries(kept: int, masked: bool, dtype: torch.dtype) -> None:
    """Runs are weighted by themselves and merged."""
    _check(_case(kept, 3, 64, 96), dtype, masked)


@each_dtype
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_gives_the_same_bits(layout: str, dtype: torch.dtype) -> None:
    inputs = _case(300).inputs(dtype)
    found = _decode(*laid_out(inputs, layout)[:3], None, 0.3)
    assert torch.equal(found, _decode(*inputs[:3], None, 0.3))


@each_dtype
def test_a_part_of_a_longer_buffer(dtype: torch.dtype) -> None:
    """Nothing behind it is read, not even to be thrown away."""
    query, key, value = _case(300).inputs(dtype)[:3]
    expected = _decode(query, key[:, :, :201].clone(), value[:, :, :201].clone(), None, 0.3)
    key[:, :, 201:] = value[:, :, 201:] = math.nan
    found = _decode(query, key[:, :, :201], value[:, :, :201], None, 0.3)
    assert torch.equal(found, expected)


@each_dtype
def test_bits_do_not_depend_on_the_number_of_threads(dtype: torch.dtype) -> None:
    inputs = _case(2_000).inputs(dtype)[:3]
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 3, 7):
            torch.set_num_threads(number)
            found.append(_decode(*inputs, None, 0.3))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0], other) for other in found[1:])


@each_dtype
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("of", ["query", "key", "value"])
@pytest.mark.parametrize("at", [3, 290])
def test_bad_numbers_reach_who_reads_them(of: str, bad: float, dtype: torch.dtype, at: int) -> None:
    """Batch row 1, key head 1: its two queries and no others; none where it is not read."""
    inputs = _case(300).inputs(dtype)
    reads = _half(_case(300))
    reads[1, 1, at] = True
    clean = _decode(*inputs[:3], reads, 0.3)
    marked = getattr(inputs, of).clone()
    if of == "query":
        marked[1, 2] = bad
    else:
        marked[1, 1, at] = bad
    changed = inputs._replace(**{of: marked})
    found = _decode(*changed[:3], reads, 0.3)
    touched = torch.zeros(2, 4, dtype=torch.bool)
    touched[1, 2:] = True
    assert torch.equal(found[~touched], clean[~touched])
    assert not found[1, 2].isfinite().any()
    if of != "query":
        reads[1, 1, at] = False
        without = _decode(*inputs[:3], reads, 0.3)
        assert torch.equal(_decode(*changed[:3], reads, 0.3), without)


@each_dtype
@pytest.mark.parametrize("scale", [1e4, -1e4, 0.0])
def test_extreme_scores(scale: float, dtype: torch.dtype) -> None:
    """The largest score takes everything, or all are equal."""
    case = replace(_case(600), scale=scale)
    inputs = case.inputs(dtype)
    query, key, value = inputs.double()[:3]
    expected, _ = dense_attention(query, key, value, case.mask(), scale)
    scores = scale * query @ key.repeat_interleave(case.group, 1).mT
    found = _decode(*inputs[:3], None, scale).double()
    apart = scores.topk(2).values.diff().flatten() < -scores.abs().amax() * 1e-4
    assert scale == 0 or apart.all()
    tolerance = 4 * torch.finfo(dtype).eps * value.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.plain
@pytest.mark.parametrize("masked", [False, True])
def test_the_operation_keeps_the_compilers_rules(masked: bool) -> None:
    case = _case(40)
    operation = torch.ops.colonnade.native_decode.default
    arguments = (*case.inputs(torch.float32)[:3], _half(case) if masked else None, 0.3)
    torch.library.opcheck(operation, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("dtype", "q_len", "wants_grad", "takes"),
    [
        (torch.float32, 1, False, True),
        (torch.bfloat16, 1, False, True),
        (torch.float16, 1, False, False),
        (torch.float64, 1, False, False),
        (torch.float32, 2, False, False),
        (torch.float32, 1, True, False),
    ],
)
def test_what_it_takes(dtype: torch.dtype, q_len: int, wants_grad: bool, takes: bool) -> None:
    """It has no gradients."""
    query, key, value = replace(_case(9), q_len=q_len).inputs(dtype)[:3]
    value.requires_grad_(wants_grad)
    call = Call(FullPattern(), 1.0, keys=Seen(None))
    assert (native.reason_declined(query, key, value, call) is None) == takes
    with torch.no_grad():
        assert (native.reason_declined(query, key, value, call) is None) == (takes or wants_grad)
