"""Values, log-sum-exps and gradients against float64 and against other backends.

Every shape and type is compiled for itself, a second or two for each of four kernels: hence the
few widths of what is drawn.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

import colonnade
from colonnade import FixedPattern, KVCache
from colonnade.backends.triton.configurations import reason_no_tile_fits
from tests.cases import (
    Case,
    attend,
    attend_by_products,
    backpropagate,
    both,
    cases,
    fixed_patterns,
)
from tests.gpu.common import (
    DEVICE,
    HALF,
    INTERPRETED,
    attend_there,
    each_type,
    each_width,
    marks,
    sized,
)
from tests.layouts import LAYOUTS, expanded, laid_out
from tests.packing import attend_packed, cu_seqlens_of, documents, packed_case
from tests.rounding import check

pytestmark = marks
in_every_suite = pytest.mark.interpreted

N = sized(1_000, 120)
CASES = {
    "merged": Case(FixedPattern(128, 8), 1, 2, 2, N, N, 64, 64, 0.125),
    "width 128": Case(FixedPattern(128, 8), 2, 1, 4, N, N, 128, 128, 0.09),
    "sub-blocks, mid-block": Case(FixedPattern(64, 16, 4), 1, 4, 1, N - 70, N, 64, 64, -0.2),
    "fewer queries than a block": Case(FixedPattern(128, 32), 1, 1, 2, 37, N, 64, 64, 0.125),
    "a stride beyond the sequence": Case(FixedPattern(2 * N, 9), 1, 1, 1, N, N, 64, 64, 0.125),
    "a stride of 5, a sink": Case(FixedPattern(5, 2, sinks=1), 1, 2, 1, 150, 150, 16, 16, 0.3),
    "summary": Case(
        FixedPattern(64, 20, 2, "summary", sinks=4), 1, 2, 2, N // 2, N // 2, 64, 32, 0.2
    ),
    "local": Case(
        FixedPattern(100, 8, part="local", sinks=3), 1, 2, 1, N // 2 - 9, N // 2, 64, 64, 0.2
    ),
    "bidirectional": Case(
        FixedPattern(64, 8, 2, causal=False, sinks=5), 1, 2, 1, 300, 300, 64, 64, 0.2
    ),
    "bidirectional summary": Case(
        FixedPattern(64, 8, part="summary", causal=False), 1, 1, 2, 200, 330, 32, 64, 0.2
    ),
    "bidirectional local": Case(
        FixedPattern(64, 8, part="local", causal=False), 1, 1, 1, 200, 330, 64, 64, 0.2
    ),
    "width 1": Case(FixedPattern(32, 8), 1, 1, 1, 90, 90, 1, 1, 0.9),
    "unlike widths": Case(FixedPattern(64, 9), 1, 2, 1, 170, 170, 33, 200, 0.2),
    "unlike widths, keys": Case(FixedPattern(64, 9), 1, 1, 2, 170, 170, 129, 7, 0.1),
    "width 256": Case(FixedPattern(64, 16), 1, 1, 2, 300, 300, 256, 256, 0.06),
    "shares of queries": Case(FixedPattern(300, 16), 1, 1, 1, 1_400, 1_400, 16, 16, 0.25),
    "large scores": Case(FixedPattern(64, 8), 1, 1, 1, 200, 200, 16, 16, 30.0),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
FEW = [CASES["merged"], CASES["width 128"], CASES["sub-blocks, mid-block"], CASES["summary"]]
each_of_few = pytest.mark.parametrize("case", FEW, ids=lambda case: str(case.pattern))
native_runs = colonnade.backends()["native"]


@pytest.fixture
def tf32() -> Iterator[None]:
    """Ask PyTorch, and so backend "triton", for products of float32 in TF32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@each_type
@each_case
def test_every_result_against_float64(case: Case, dtype: torch.dtype) -> None:
    """By the reference, on the CPU. What no tile fits is refused: wide float32 on NVIDIA's GPUs."""
    inputs = case.inputs(dtype)
    if why := reason_no_tile_fits(dtype, max(case.qk_dim, case.v_dim), DEVICE):
        assert dtype == torch.float32
        with pytest.raises(NotImplementedError, match=re.escape(why)):
            attend_there(case, inputs)
        pytest.skip(f"triton {why}")
    expected = attend(case, inputs.double(), "reference")
    check(case, inputs, attend_there(case, inputs), expected, dtype in HALF)


@each_of_few
def test_tf32_against_float64(case: Case, tf32: None) -> None:
    inputs = case.inputs(torch.float32)
    expected = attend(case, inputs.double(), "reference")
    check(case, inputs, attend_there(case, inputs), expected, tf32=True)


@each_type
@settings(max_examples=sized(25, 2))
@given(case=cases(40, fixed_patterns(20), batches=(1, 2), min_len=0, widths=(8,)))
def test_drawn_calls_against_the_definition(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    found = attend_there(case, inputs)
    if case.q_len * case.batch:
        check(case, inputs, found, attend_by_products(case, inputs), dtype in HALF)


@each_width
@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_long_sequences_against_float64(width: int, dtype: torch.dtype) -> None:
    """By the reference on the device, which is faster: many queries for each slot."""
    n = sized(4_096, 130)
    case = Case(FixedPattern(128, 8), 1, 1, 2, n, n, width, width, width**-0.5)
    inputs = case.inputs(dtype).to(DEVICE)
    expected = attend(case, inputs.double(), "reference")
    check(case, inputs, attend(case, inputs, "triton"), expected, rounded_operands=True)


@each_of_few
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.skipif(native_runs is not None, reason=f"native {native_runs}")
def test_it_agrees_with_native_on_the_cpu(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    expected = attend(case, inputs, "native")
    check(case, inputs, attend_there(case, inputs), expected, dtype in HALF, also_rounded=True)


@each_of_few
@each_type
def test_it_agrees_with_eager_on_the_device(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype)
    expected = attend_there(case, inputs, "eager")
    # On a GPU PyTorch may multiply float32 in its own way, but not below float32.
    check(case, inputs, attend_there(case, inputs), expected, dtype in HALF, also_rounded=True)


@pytest.mark.parametrize("part", ["merged", "local", "summary"])
@pytest.mark.parametrize("causal", [True, False])
@each_type
def test_packed_documents(part: Any, causal: bool, dtype: torch.dtype) -> None:
    """Some of them are empty. The boundaries may be on the CPU or on the device."""
    lengths = (0, 150, 1, 0, 263, 64)
    pattern = FixedPattern(64, 8, part=part, causal=causal)
    case = packed_case(Case(pattern, 1, 2, 2, 9, 9, 64, 64, 0.2), lengths)
    inputs = case.inputs(dtype)
    cu_seqlens = cu_seqlens_of(lengths, torch.int32)
    there = inputs.to(DEVICE)
    found = attend_packed(case, there, cu_seqlens.to(DEVICE), "triton").to(inputs.query.device)
    again = attend_packed(case, there, cu_seqlens, "triton").to(inputs.query.device)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    for place, alone in documents(case, lengths):
        own = inputs.part(place)
        expected = attend_by_products(alone, own)
        check(alone, own, found.part(place), expected, dtype in HALF)


@in_every_suite
@pytest.mark.parametrize("part", ["merged", "summary"])
def test_chunks_behind_a_cache(part: Any) -> None:
    """Of the blocks before a chunk there are the summaries alone, those of each sub-block."""
    pattern = FixedPattern(16, 4, subblocks=2, part=part)
    case = Case(pattern, 1, 2, 1, 83, 83, 16, 16, 0.3)
    query, key, value, *_ = case.inputs(torch.float32)
    expected = both(query.double(), key.double(), value.double(), pattern, "reference", 0.3)
    cache, outs, lses = KVCache(pattern, max_seq_len=83, backend="triton"), [], []
    with torch.no_grad():
        for begin, end in ((0, 37), (37, 39), (39, 83)):
            q, k, v = (t[:, :, begin:end].to(DEVICE) for t in (query, key, value))
            out, lse = cache.attend(q, k, v, 0.3, return_lse=True)
            outs.append(out.cpu())
            lses.append(lse.cpu())
    for found, true in zip((torch.cat(outs, 2), torch.cat(lses, 2)), expected, strict=True):
        torch.testing.assert_close(found, true.float(), rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_memory_layout(dtype: torch.dtype) -> None:
    """A compiler may add up in another order where memory lies in another way."""
    case = replace(CASES["merged"], batch=2, q_len=sized(200, 20), kv_len=sized(260, 30))
    case = replace(case, pattern=FixedPattern(sized(64, 8), 4), qk_dim=16, v_dim=16)
    inputs = case.inputs(dtype).to(DEVICE)
    expected = attend(case, inputs.double(), "reference")
    for layout in LAYOUTS:
        found = attend(case, laid_out(inputs, layout), "triton")
        check(case, inputs, found, expected, dtype in HALF)


def test_strides_of_zero() -> None:
    case = Case(FixedPattern(32, 4), 2, 2, 1, 80, 100, 16, 16, 0.4)
    inputs = expanded(case.inputs(torch.float32))
    there = expanded(case.inputs(torch.float32).to(DEVICE))
    found = attend(case, there, "triton").to(inputs.query.device)
    check(case, inputs, found, attend_by_products(case, inputs))


def test_offsets_beyond_two_to_the_31() -> None:
    """Each head lies more than 2³¹ entries behind the last; nothing else of the memory is used."""
    gap = 2**31 + 2**10
    case = Case(FixedPattern(8, 2), 1, 2, 1, 12, 12, 8, 8, 0.4)
    near = case.inputs(torch.float16).to(DEVICE)

    def far(tensor: Tensor) -> Tensor:
        room = tensor.new_empty(gap + 12 * 8)
        return room.as_strided(tensor.shape, (0, gap, 8, 1)).copy_(tensor)

    query, key, value = (far(t).requires_grad_() for t in near[:3])
    pair = both(query, key, value, case.pattern, "triton", case.scale)
    found = backpropagate(pair, (query, key, value), near)
    expected = attend(case, near, "triton")
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


@pytest.mark.skipif(INTERPRETED, reason="takes 17 GB and many programs")
def test_tensors_of_more_than_two_to_the_31_entries() -> None:
    """The last head has the bits that it has alone."""
    heads, n, width = 130, 2**18, 64
    need = 4 * 2 * heads * n * width
    if (free := torch.get_device_module(DEVICE).mem_get_info()[0]) < 1.2 * need:
        pytest.skip(f"needs {1.2 * need / 1e9:.0f} GB of memory, and {free / 1e9:.0f} GB are free")
    generator = torch.Generator(DEVICE).manual_seed(0)
    one = torch.randn(1, 1, n, width, generator=generator, device=DEVICE, dtype=torch.bfloat16)
    query, key, value = (one.roll(turn, 3).repeat(1, heads, 1, 1) for turn in range(3))
    pattern = FixedPattern(128, 8)
    out, lse = both(query, key, value, pattern, "triton")
    q, k, v = (t[:, -1:].clone() for t in (query, key, value))
    alone = both(q, k, v, pattern, "triton")
    assert torch.equal(out[:, -1:], alone[0])
    assert torch.equal(lse[:, -1:], alone[1])


@each_type
def test_rows_that_read_nothing(dtype: torch.dtype) -> None:
    """Output 0, log-sum-exp -inf and gradients of 0, whatever gradient arrives."""
    case = Case(FixedPattern(80, 3, part="summary"), 1, 1, 1, 130, 130, 16, 16, 0.4)
    found = attend_there(case, case.inputs(dtype))
    assert (found.out[:, :, :77] == 0).all()
    assert (found.lse[:, :, :77] == -math.inf).all()
    assert (found.grad_query[:, :, :77] == 0).all()
    assert all(grad.isfinite().all() for grad in found[2:])


@in_every_suite
@each_type
def test_sizes_of_zero(dtype: torch.dtype) -> None:
    for batch, q_len, kv_len in ((1, 0, 6), (0, 6, 6), (1, 0, 0)):
        case = Case(FixedPattern(4, 1), batch, 1, 2, q_len, kv_len, 8, 8, 0.4)
        found = attend_there(case, case.inputs(dtype))
        assert found.out.shape == (batch, 2, q_len, 8)
        assert all((grad == 0).all() for grad in found[2:])
