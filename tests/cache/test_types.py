"""Half precision, autocast, and NaN that stays where it is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from colonnade import FixedPattern, KVCache
from colonnade.backends import native
from colonnade.ops.heads import Patterns
from tests.cache.common import (
    MERGED,
    alone,
    decode,
    decode_padded,
    draw,
    each,
    each_causal,
    read_by,
    whole,
)


@pytest.fixture(params=["native", "without native"])
def perhaps_native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute a token in C++, where that runs, and by PyTorch."""
    if request.param == "without native":
        monkeypatch.setattr(native, "reason_declined", lambda *_: "is switched off")


@pytest.mark.usefixtures("perhaps_native")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_other_types(dtype: torch.dtype) -> None:
    """Held to one rounding of each operand, of weights that add up to 1, and of the result."""
    tensors = each(lambda t: t.to(dtype), draw(19))
    found = decode(KVCache(MERGED), tensors, [6, *[1] * 8, 5])
    assert found.dtype == dtype
    want = whole(MERGED, each(Tensor.double, tensors))
    largest = float(tensors[2].double().abs().max())
    tolerance = 8 * torch.finfo(dtype).eps * largest
    torch.testing.assert_close(found.double(), want, rtol=0, atol=tolerance)


@pytest.mark.usefixtures("perhaps_native")
@pytest.mark.parametrize("kv_heads", [2, 6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_token_in_half_precision_for_rows_of_different_lengths(
    dtype: torch.dtype, kv_heads: int
) -> None:
    """With one query a key head, and with several: a product of one row goes another way."""
    pattern, lengths = FixedPattern(8, 2), (21, 9)
    drawn = draw(22, batch=2, kv_heads=kv_heads, group=6 // kv_heads)
    tensors = each(lambda t: t.to(dtype), drawn)
    tokens = torch.stack([torch.arange(22) >= 21 - n for n in lengths])
    found = decode_padded(KVCache(pattern), tensors, tokens, [21, 1])[:, :, -1:]
    for row, mask in enumerate(tokens):
        exact = each(Tensor.double, alone(tensors, row, mask))
        expected = whole(pattern, exact, first=exact[0].shape[2] - 1)
        # The weights and the output are rounded once each.
        tolerance = 2 * torch.finfo(dtype).eps * exact[2].abs().max().item()
        torch.testing.assert_close(found[row, None].double(), expected, rtol=0, atol=tolerance)


def test_autocast_decides_the_type() -> None:
    tensors = each(Tensor.float, draw(9))
    cache = KVCache(MERGED)
    with torch.autocast("cpu", torch.bfloat16):
        found = decode(cache, tensors, [5, 1, 3])
    assert found.dtype == torch.bfloat16
    assert cache.nbytes == (2 + 4) * 3 * (6 + 4) * 2


@pytest.mark.usefixtures("perhaps_native")
@pytest.mark.parametrize("padding", [0, 2])
@each_causal
def test_nan_reaches_the_tokens_that_read_it(pattern: Patterns, padding: int) -> None:
    """Token by token, and in rows of different lengths; whatever an entry next to it is."""
    clean = each(Tensor.float, draw(24, batch=2))
    tokens = torch.ones(2, 24, dtype=torch.bool)
    tokens[1, :padding] = False
    steps = [3, *[1] * 21]
    for bad in (3, 5, 9):
        query, key, value = each(Tensor.clone, clean)
        key[1, :, bad] = value[1, :, bad] = torch.nan
        found = decode_padded(KVCache(pattern), (query, key, value), tokens, steps)
        expected = decode_padded(KVCache(pattern), clean, tokens, steps)
        touched = found.isnan().any(-1)
        reads = torch.nn.functional.pad(read_by(pattern, bad - padding), (padding, 0))[:, :24]
        assert torch.equal(touched[1], reads.repeat_interleave(2, 0))
        assert not touched[0].any()
        torch.testing.assert_close(found[~touched], expected[~touched])


def test_nan_stays_in_its_block_and_its_row() -> None:
    """In a column of a closed block that is no summary, with rows of different lengths."""
    query, key, value = draw(20, batch=2)
    tokens = torch.ones(2, 20, dtype=torch.bool)
    tokens[1, :3] = False
    clean = decode_padded(KVCache(MERGED), (query, key, value), tokens, [1] * 20)
    key, value = key.clone(), value.clone()
    key[1, :, 4] = value[1, :, 4] = float("nan")  # position 1 of its row
    found = decode_padded(KVCache(MERGED), (query, key, value), tokens, [1] * 20)
    assert found[1, :, 4].isnan().all()
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[1, :, 7:], clean[1, :, 7:])
