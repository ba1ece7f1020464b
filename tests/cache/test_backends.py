"""A cache asks the same backends as every other attention: by name, explained, with the lse."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import colonnade
from colonnade import FixedPattern, FullPattern, KVCache, LocalPattern, StridedPattern
from colonnade.nn import SelfAttention
from colonnade.ops.heads import Patterns
from tests.cache.common import (
    MERGED,
    Pair,
    Triple,
    alone,
    check_equal,
    draw,
    each,
    each_causal,
    parts,
    span,
    whole,
    whole_pair,
)

CHUNKS = [6, 1, 1, 5, 1, 3]
needs_native = pytest.mark.skipif(
    colonnade.backends()["native"] is not None, reason="native is not usable here"
)


def _decode(cache: KVCache, tensors: Triple) -> Pair:
    """Return output and log-sum-exp of all chunks."""
    pairs = [cache.attend(*chunk, return_lse=True) for chunk in parts(tensors, CHUNKS)]
    outs, lses = zip(*pairs, strict=True)
    return torch.cat(outs, 2), torch.cat(lses, 2)


@each_causal
@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
def test_every_way_gives_the_log_sum_exp(pattern: Patterns, backend: str) -> None:
    tensors = draw(sum(CHUNKS))
    pair = _decode(KVCache(pattern, backend=backend), tensors)
    for found, expected in zip(pair, whole_pair(pattern, tensors), strict=True):
        check_equal(found, expected)


@needs_native
@pytest.mark.parametrize("part", ["merged", "local", "summary"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_native_by_name(part: Any, dtype: torch.dtype) -> None:
    """Rounded once to the type; with bfloat16 the log-sum-exp comes from a quicker exponential.

    It is good to 1.1e-4. For the rest see the bound `rho` of tests/rounding.py; scores are below 8.
    """
    pattern = FixedPattern(5, 2, part=part)
    tensors = each(lambda t: t.to(dtype), draw(sum(CHUNKS)))
    out, lse = _decode(KVCache(pattern, backend="native"), tensors)
    true_out, true_lse = whole_pair(pattern, each(Tensor.double, tensors))
    assert out.dtype == dtype
    assert lse.dtype == torch.float32
    rho = torch.finfo(torch.float32).eps * (2 * (6 + 5) * 8 + 4 * sum(CHUNKS) + 16)
    rho += 1.1e-4 if dtype == torch.bfloat16 else 0.0
    torch.testing.assert_close(lse.double(), true_lse, rtol=0, atol=rho)
    largest = tensors[2].abs().max().item()
    half_an_ulp = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(
        out.double(), true_out, rtol=half_an_ulp, atol=(2 * rho + half_an_ulp) * largest
    )


def test_padding_has_no_log_sum_exp() -> None:
    tensors = draw(7, batch=2)
    mask = torch.tensor([[False] * 3 + [True] * 4, [True] * 7])
    cache = KVCache(MERGED)
    chunks = zip(parts(tensors, [5, 1, 1]), mask.split([5, 1, 1], 1), strict=True)
    lse = torch.cat([cache.attend(*c, padding_mask=m, return_lse=True)[1] for c, m in chunks], 2)
    assert (lse[0, :, :3] == -math.inf).all()
    for row, tokens in enumerate(mask):
        _, expected = whole_pair(MERGED, alone(tensors, row, tokens))
        check_equal(lse[row, None][:, :, tokens], expected)


@needs_native
def test_an_explanation_names_what_then_runs(backends_that_ran: list[str]) -> None:
    """Before the prompt and before a token, for every run of the layer's heads."""
    pattern = (MERGED, StridedPattern(4), FullPattern())
    cache = KVCache(pattern)
    tensors = each(Tensor.float, draw(9))
    for chunk in parts(tensors, [8, 1]):
        explained = cache.explain(*chunk)
        assert isinstance(explained, tuple)
        assert cache.seq_len in (0, 8)
        backends_that_ran.clear()
        cache.attend(*chunk)
        assert backends_that_ran == [explanation.backend for explanation in explained]
    assert "it has no gradients" in str(
        KVCache(MERGED).explain(*each(Tensor.requires_grad_, span(tensors, 0, 1)))
    )
    # What `append` and `read` would do.
    dropped = KVCache(MERGED).explain(*span(tensors, 0, 1), scale=0.5, dropout_p=0.1)
    assert "it has no dropout for a decoder's query, got dropout_p=0.1" in str(dropped)


@needs_native
def test_a_backend_by_name_runs_or_raises_and_the_cache_stays() -> None:
    tensors = draw(8)
    cache = KVCache(MERGED, backend="native")
    with pytest.raises(NotImplementedError, match=r"backend 'native' computes in .*float64"):
        cache.attend(*tensors)
    assert cache.seq_lens == []
    floats = each(Tensor.float, tensors)
    cache.attend(*floats)
    cache = KVCache((MERGED, StridedPattern(4)), backend="native")
    with pytest.raises(NotImplementedError, match="runs FixedPattern only, got a StridedPattern"):
        cache.attend(*floats)
    assert cache.seq_lens == []
    assert cache.nbytes == 0


@pytest.mark.plain
@pytest.mark.parametrize(
    ("backend", "error"), [("cuda", ValueError), ("", ValueError), (None, TypeError)]
)
def test_an_unknown_backend_is_refused_at_once(backend: Any, error: type[Exception]) -> None:
    for make in (
        lambda: KVCache(MERGED, backend=backend),
        lambda: SelfAttention(16, 2, MERGED, backend=backend),
    ):
        with pytest.raises(error, match="backend must be"):
            make()


@needs_native
def test_a_layer_passes_its_backend_on() -> None:
    layer = SelfAttention(16, 2, (MERGED, LocalPattern(4)), backend="native")
    assert layer.new_cache().backend == "native"
    with pytest.raises(NotImplementedError, match="got a LocalPattern"):
        layer(torch.randn(1, 8, 16))
    layer = SelfAttention(16, 2, MERGED, backend="reference").double()
    x = torch.randn(1, 8, 16, dtype=torch.float64)
    check_equal(layer(x, layer.new_cache()), layer(x))


def test_entries_know_how_they_are_read() -> None:
    """With gradients entries are copies, so those of an earlier chunk can still be read."""
    pattern = MERGED.factors()
    tensors = each(Tensor.requires_grad_, draw(13))
    expected = whole(pattern, tensors)
    cache = KVCache(pattern)
    (q1, k1, v1), (q2, k2, v2) = parts(tensors, [6, 7])
    first = cache.append(k1, v1)
    second = cache.append(k2, v2)
    keys, values = second
    check_equal(cache.read(q1, first), expected[:, :, :6])
    check_equal(cache.read(q2, second), expected[:, :, 6:])
    check_equal(cache.read(q2, keys, values), expected[:, :, 6:])


def test_reading_before_anything_was_appended_is_refused() -> None:
    query, key, value = draw(3)
    with pytest.raises(ValueError, match="nothing was appended"):
        KVCache(MERGED).read(query, key, value)


READ_MISTAKES: dict[str, tuple[type[Exception], str, Any]] = {
    "batch": (ValueError, "must agree in batch", lambda q, k, v: (q.expand(3, -1, -1, -1), k, v)),
    "heads": (ValueError, "must be a multiple", lambda q, k, v: (q[:, :4], k, v)),
    "width": (ValueError, "in head width", lambda q, k, v: (q[..., :3], k, v)),
    "length": (ValueError, "in heads and length", lambda q, k, v: (q, k, v[:, :, 1:])),
    "type": (TypeError, "must have one dtype", lambda q, k, v: (q.float(), k, v)),
    "integers": (TypeError, "query must be one of", lambda q, k, v: (q.long(), k, v)),
    "fewer": (ValueError, "that append returned", lambda q, k, v: (q, k[:, :, 1:], v[:, :, 1:])),
    "more": (
        ValueError,
        "that append returned",
        lambda q, k, v: (q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1)),
    ),
    "key heads": (ValueError, "that append returned", lambda q, k, v: (q, k[:, :1], v[:, :1])),
    "queries": (ValueError, "those of the 3 positions", lambda q, k, v: (q[:, :, :2], k, v)),
}


@pytest.mark.plain
@pytest.mark.parametrize("name", READ_MISTAKES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_reading_checks_what_it_is_given(name: str, dtype: torch.dtype) -> None:
    """As every other attention: the native kernel would read past the end of a tensor."""
    error, message, change = READ_MISTAKES[name]
    query, key, value = (t.to(dtype) for t in draw(8))
    cache = KVCache(FixedPattern(4, 1, subblocks=2))
    cache.append(key[:, :, :5], value[:, :, :5])
    keys, values = cache.append(key[:, :, 5:], value[:, :, 5:])
    with pytest.raises(error, match=message):
        cache.read(*change(query[:, :, 5:], keys, values))


@pytest.mark.plain
def test_entries_come_alone_and_survive_being_rebuilt() -> None:
    query, key, value = draw(6)
    cache = KVCache(MERGED)
    entries = cache.append(key, value)
    with pytest.raises(ValueError, match="scale and dropout_p by name"):
        cache.read(query, entries, 0.1)  # type: ignore[call-overload]
    again = entries._replace(keys=entries.keys * 1)
    assert torch.equal(cache.read(query, again), cache.read(query, entries))


def test_a_mask_that_changes_later_does_not_change_entries() -> None:
    query, key, value = draw(6, batch=2)
    mask = torch.tensor([[True] * 6, [False, False, True, True, True, True]])
    cache = KVCache(MERGED)
    expected = KVCache(MERGED).attend(query, key, value, padding_mask=mask)
    entries = cache.append(key, value, mask)
    mask[:] = True
    torch.testing.assert_close(cache.read(query, entries), expected, rtol=0, atol=1e-12)


def test_a_cache_of_another_backend_than_the_layers_is_refused() -> None:
    layer = SelfAttention(16, 2, MERGED, backend="reference")
    with pytest.raises(ValueError, match=r"cache.backend='auto' and backend='reference'"):
        layer(torch.randn(1, 3, 16), KVCache(MERGED))


@pytest.mark.plain
@pytest.mark.parametrize(
    "pattern", [MERGED, pytest.param(LocalPattern(4), marks=pytest.mark.slow)], ids=str
)
def test_decoding_in_a_compiled_function(pattern: Any) -> None:
    """The cache breaks the graph, and the results are those without a compiler."""
    tensors = tuple(t.float() for t in draw(16))
    torch.compiler.reset()
    compiled_cache, cache = KVCache(pattern), KVCache(pattern)
    step = torch.compile(lambda q, k, v: compiled_cache.attend(q, k, v), backend="eager")
    with torch.no_grad():
        for chunk in zip(*(t.split([13, 1, 1, 1], 2) for t in tensors), strict=True):
            torch.testing.assert_close(step(*chunk), cache.attend(*chunk))


def test_autocast_casts_what_a_cache_is_given() -> None:
    query, key, value = (t.float() for t in draw(5, batch=2))
    mask = torch.tensor([[True] * 5, [False, False, True, True, True]])
    cache = KVCache(MERGED)
    with torch.autocast("cpu", torch.bfloat16):
        out = cache.read(query, cache.append(key, value, mask))
    q, k, v = (t.bfloat16() for t in (query, key, value))
    assert torch.equal(out, KVCache(MERGED).attend(q, k, v, padding_mask=mask))


@pytest.mark.plain
@pytest.mark.parametrize("pattern", [MERGED, FullPattern()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_cache_may_be_mapped(dtype: torch.dtype, pattern: Patterns) -> None:
    """Without a loop of PyTorch's over the mapped rows."""
    x = torch.randn(3, 1, 2, 7, 8, dtype=dtype)

    def decode(x: Tensor, backend: str = "auto") -> Tensor:
        cache = KVCache(pattern, backend=backend)
        cache.append(x[:, :, :6].sin(), x[:, :, :6].cos())
        x = x[:, :, 6:]
        out = cache.attend(x, x.sin(), x.cos())
        assert isinstance(out, Tensor)
        return out

    expected = torch.stack([decode(row) for row in x])
    fallback = "_set_vmap_fallback_enabled"  # PyTorch's stubs do not have it.
    getattr(torch._C._functorch, fallback)(False)
    try:
        torch.testing.assert_close(torch.vmap(decode)(x), expected)
    finally:
        getattr(torch._C._functorch, fallback)(True)
    if dtype == torch.float32 and colonnade.backends()["native"] is None:
        with pytest.raises(NotImplementedError, match=r"'native' does not map.*'eager'"):
            torch.vmap(lambda x: decode(x, "native"))(x)
