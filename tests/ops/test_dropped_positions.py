"""Which weights are dropped: a function of the seed and of where they are, wherever they run.

What was kept is read off the output: with unit vectors as values, a query's output is the row of
its weights. It is compared with Philox as NumPy computes it from the definition.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from colonnade import FixedPattern, FullPattern, KVCache, LocalPattern, Pattern, StridedPattern
from colonnade.backends import dropout as dropouts
from colonnade.backends.choice import backends
from colonnade.backends.dropout import Dropout
from colonnade.ops.attention import attend, attend_packed
from colonnade.ops.heads import attention_in_groups
from colonnade.ops.packing import Packing
from tests import philox
from tests.cases import EXAMPLES

SEED = -0x123456789ABCDEF0
"""All 64 bits count, and those of the sign."""
PATTERNS: dict[str, Pattern] = {
    **EXAMPLES,
    "stride below a quad": FixedPattern(3, 1),
    "paper": FixedPattern(16, 4),
    "strided": StridedPattern(5),
    "strided as printed": StridedPattern(4, "local"),
    "column": StridedPattern(6, "summary"),
    "window": LocalPattern(7),
    "full": FullPattern(),
    "both ways": FullPattern(causal=False),
}
each_pattern = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS.keys())
BACKENDS = ["reference", "eager", *(["native"] if backends()["native"] is None else [])]
each_backend = pytest.mark.parametrize("backend", BACKENDS)


CASES = [
    pytest.param(backend, pattern, id=f"{backend}-{name}")
    for backend in BACKENDS
    for name, pattern in PATTERNS.items()
    if backend != "native" or (isinstance(pattern, FixedPattern) and pattern.causal)
]
each_case = pytest.mark.parametrize(("backend", "pattern"), CASES)


def _drop(p: float = 0.4, **first: int) -> Dropout:
    return Dropout(p, torch.tensor([SEED]), **first)


def _tensors(
    batch: int, q_len: int, kv_len: int, backend: str, group: int = 2
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries and keys, two key heads, and unit vectors as values."""
    dtype = torch.float32 if backend == "native" else torch.float64
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(batch, 2 * group, q_len, 4, generator=generator, dtype=dtype)
    key = torch.randn(batch, 2, kv_len, 4, generator=generator, dtype=dtype)
    return query, key, torch.eye(kv_len, dtype=dtype).expand(batch, 2, -1, -1)


def _read(pattern: Pattern, q_len: int, kv_len: int, group: int = 2) -> Tensor:
    return pattern.mask(kv_len, 2)[:, kv_len - q_len :].repeat_interleave(group, 0)


@pytest.mark.parametrize(
    ("rounds", "ones", "expected"),
    [
        (7, False, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, True, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (10, False, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, True, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ],
)
def test_the_oracle_gives_the_published_words(rounds: int, ones: bool, expected: str) -> None:
    """Known answers of Random123, the authors' own library; 10 rounds are what others use."""
    word = np.array([0xFFFFFFFF if ones else 0])
    found = philox.words([word] * 4, 2**64 - 1 if ones else 0, rounds)
    assert " ".join(f"{int(each[0]):08x}" for each in found) == expected


@each_case
@pytest.mark.parametrize("q_len", [1, 29, 41])
def test_what_is_kept_follows_from_seed_and_positions(
    q_len: int, backend: str, pattern: Pattern
) -> None:
    query, key, value = _tensors(2, q_len, 41, backend)
    out, _ = attend(query, key, value, pattern, dropout=_drop(), backend=backend)
    read = _read(pattern, q_len, 41)
    assert torch.equal(out != 0, philox.kept_whole(SEED, 0.4, 2, 4, q_len, 41) & read)


@each_case
def test_the_gradient_follows_the_same_factors(backend: str, pattern: Pattern) -> None:
    """The gradient of values for unit vectors as output gradients is the row of weights again."""
    query, key, value = _tensors(1, 37, 37, backend, group=1)
    value = value.clone().requires_grad_()
    out, _ = attend(query, key, value, pattern, dropout=_drop(), backend=backend)
    unit = torch.eye(37, dtype=out.dtype).expand_as(out)
    (grad,) = torch.autograd.grad(out, value, unit)
    assert torch.equal(
        grad.mT != 0, philox.kept_whole(SEED, 0.4, 1, 2, 37, 37) & _read(pattern, 37, 37, 1)
    )


@each_case
def test_documents_count_from_their_own_beginning(backend: str, pattern: Pattern) -> None:
    """Their number takes the place of the batch row's, empty ones included."""
    lengths = [9, 0, 17, 1, 9, 0]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    query, key, value = (t[0].transpose(0, 1) for t in _tensors(1, 36, 36, backend))
    out, _ = attend_packed(query, key, value, cu_seqlens, pattern, dropout=_drop(), backend=backend)
    for number, length in enumerate(lengths):
        begin = int(cu_seqlens[number])
        found = out[begin : begin + length, :, begin : begin + length].transpose(0, 1) != 0
        kept = philox.kept_whole(SEED, 0.4, 6, 4, length, length)[number]
        assert torch.equal(found, kept & _read(pattern, length, length))


@each_case
def test_a_part_of_a_call_drops_what_the_call_drops(backend: str, pattern: Pattern) -> None:
    """A batch row alone, and some of the heads where their numbers do not say what they read."""
    query, key, value = _tensors(3, 21, 41, backend)
    out, _ = attend(query, key, value, pattern, dropout=_drop(), backend=backend)
    last = query[2:], key[2:], value[2:]
    alone, _ = attend(*last, pattern, dropout=_drop(first_row=2), backend=backend)
    assert torch.equal(alone != 0, out[2:] != 0)
    if getattr(pattern, "subblocks", 1) > 1:
        return
    some = query[:, 2:], key[:, 1:], value[:, 1:]
    alone, _ = attend(*some, pattern, dropout=_drop(first_head=2), backend=backend)
    assert torch.equal(alone != 0, out[:, 2:] != 0)


@pytest.mark.parametrize(
    ("pattern", "backend"),
    [(FixedPattern(4, 1, part="local"), each) for each in BACKENDS] + [(LocalPattern(4), "eager")],
    ids=str,
)
def test_keys_may_begin_in_the_middle_of_a_sequence(pattern: Pattern, backend: str) -> None:
    query, key, value = _tensors(1, 8, 40, backend)
    whole, _ = attend(query, key, value, pattern, dropout=_drop(), backend=backend)
    last = query, key[:, :, 28:], value[:, :, 28:]
    part, _ = attend(*last, pattern, dropout=_drop(first_position=28), backend=backend)
    assert torch.equal(part != 0, whole != 0)


@each_backend
def test_head_groups_count_heads_of_all_groups(backend: str) -> None:
    patterns = FixedPattern(8, 2).factors()
    query, key, value = _tensors(2, 41, 41, backend)
    out = attention_in_groups(query, key, value, patterns, dropout=_drop(), backend=backend)
    read = torch.cat([_read(patterns[0], 41, 41)[:2], _read(patterns[1], 41, 41)[2:]])
    assert torch.equal(out != 0, philox.kept_whole(SEED, 0.4, 2, 4, 41, 41) & read)


@pytest.mark.parametrize(
    ("pattern", "backend"),
    [(FixedPattern(8, 2), each) for each in BACKENDS]
    + [(StridedPattern(5), "eager"), (FullPattern(), "eager")],
    ids=str,
)
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_equals_its_pack(side: str, backend: str, pattern: Pattern) -> None:
    """A row of padding keeps its number, and a compiler numbers documents in the same way."""
    lengths = torch.tensor([[19], [0], [11], [25]])
    place = torch.arange(25)
    mask = place >= 25 - lengths if side == "left" else place < lengths
    query, key, value = _tensors(4, 25, 25, backend)
    packing = Packing.of_padded(mask)
    out = attention_in_groups(query, key, value, pattern, packing, None, _drop(), backend)
    kept = philox.kept_whole(SEED, 0.4, 4, 4, 25, 25)
    for row, length in enumerate(lengths[:, 0].tolist()):
        is_token = mask[row]
        found = out[row][:, is_token][:, :, is_token] != 0
        assert torch.equal(found, kept[row, :, :length, :length] & _read(pattern, length, length))
    with torch._subclasses.FakeTensorMode():
        fake = Packing.of_padded(torch.ones(4, 25, dtype=torch.bool))
    assert fake.cu_seqlens.shape == (1 + 4 + 100,)


@pytest.mark.plain
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("sizes", [[41], [1] * 41, [8] * 5 + [1], [17, 1, 1, 3, 19]], ids=str)
@pytest.mark.parametrize(
    "patterns",
    [*(p for p in PATTERNS.values() if p.causal), FixedPattern(8, 2).factors()],
    ids=str,
)
def test_chunks_through_a_cache_drop_what_the_whole_drops(
    patterns: Any, sizes: list[int], static: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    query, key, value = _tensors(2, 41, 41, "eager")
    whole = attention_in_groups(query, key, value, patterns, dropout=_drop())
    monkeypatch.setattr(Dropout, "drawn", lambda self, device: self._replace(seed=_drop().seed))
    cache, found, begin = KVCache(patterns, 41, static=static), [], 0
    for size in sizes:
        q, k, v = (t[:, :, begin : begin + size] for t in (query, key, value))
        found.append(cache.read(q, cache.append(k, v), dropout_p=0.4))
        begin += size
    torch.testing.assert_close(torch.cat(found, 2), whole)


@pytest.mark.plain
@pytest.mark.parametrize(
    "patterns", [FixedPattern(4, 1, 2), StridedPattern(4), LocalPattern(5)], ids=str
)
@pytest.mark.parametrize("static", [False, True])
def test_rows_of_different_lengths_in_a_cache(
    static: bool, patterns: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows alone in chunks, and under one mask with single tokens."""
    lengths = torch.tensor([[23], [14], [30]])
    mask = torch.arange(30) >= 30 - lengths
    query, key, value = _tensors(3, 30, 30, "eager")
    expected = attention_in_groups(
        query, key, value, patterns, Packing.of_padded(mask), None, _drop()
    )
    monkeypatch.setattr(Dropout, "drawn", lambda self, device: self._replace(seed=_drop().seed))
    cache, found, begin = KVCache(patterns, 30, static=static), [], 0
    for size in [9, 6, *[1] * 10, 5]:
        some = slice(begin, begin + size)
        entries = cache.append(key[:, :, some], value[:, :, some], mask[:, some])
        found.append(cache.read(query[:, :, some], entries, dropout_p=0.4))
        begin += size
    torch.testing.assert_close(torch.cat(found, 2), expected)


@pytest.mark.skipif("native" not in BACKENDS, reason="needs native")
@each_pattern
def test_pytorch_computes_the_factors_that_the_compiled_library_computes(
    pattern: Pattern, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parts, too, which bound the memory in between."""
    query, key, value = _tensors(2, 33, 41, "eager")
    compiled, _ = attend(query, key, value, pattern, dropout=_drop(), backend="eager")
    monkeypatch.setattr(dropouts, "_is_compiled", lambda: False)
    monkeypatch.setattr(dropouts, "MOST_FACTORS", 100)
    found, _ = attend(query, key, value, pattern, dropout=_drop(), backend="eager")
    assert torch.equal(found, compiled)


@each_backend
@pytest.mark.parametrize(
    ("p", "share"), [(1e-11, 1.0), (2.0**-33, 1.0), (1 - 2.0**-34, 0.0), (1.0, 0.0)]
)
def test_probabilities_that_words_cannot_tell_apart(backend: str, p: float, share: float) -> None:
    """A word has 32 bits: nothing is dropped, or everything, and nothing is infinite."""
    query, key, value = _tensors(1, 20, 20, backend)
    pattern = FixedPattern(8, 2)
    out, _ = attend(query, key, value, pattern, dropout=_drop(p), backend=backend)
    assert out.isfinite().all()
    assert ((out != 0) == (_read(pattern, 20, 20) & (share > 0))).all()


@pytest.mark.skipif("native" not in BACKENDS, reason="needs native")
@pytest.mark.plain
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_bit_depends_on_the_number_of_threads(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 4, 300, 16), (2, 2, 300, 16), (2, 2, 300, 16)
    tensors = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    threads, results = torch.get_num_threads(), []
    for backend in ("native", "eager"):
        for number in (1, 7):
            torch.set_num_threads(number)
            leaves = [t.clone().requires_grad_() for t in tensors]
            try:
                query, key, value = leaves
                out, lse = attend(
                    query,
                    key,
                    value,
                    FixedPattern(32, 5),
                    dropout=_drop(),
                    return_lse=True,
                    backend=backend,
                )
                assert lse is not None
                grads = torch.autograd.grad(out.float().sin().sum() + lse.sum(), leaves)
            finally:
                torch.set_num_threads(threads)
            results.append([out.detach(), lse.detach(), *grads])
    for one, other in zip(results[0], results[1], strict=True):
        assert torch.equal(one, other)
    torch.testing.assert_close(results[2][0], results[3][0])


@pytest.mark.plain
@pytest.mark.parametrize(
    "backend",
    [
        each if each == BACKENDS[-1] else pytest.param(each, marks=pytest.mark.slow)
        for each in BACKENDS
    ],
)
def test_a_compiler_drops_the_same_weights(backend: str) -> None:
    """In plain calls, packs and padded batches; one program for all lengths and probabilities."""
    pattern, lengths = FixedPattern(8, 2, 2), [9, 0, 17, 15]

    def run(
        query: Tensor, key: Tensor, value: Tensor, mask: Tensor, ends: Tensor, dropout: Dropout
    ) -> list[Tensor]:
        packing = Packing.of_padded(mask)
        q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
        options: Any = {"dropout": dropout, "backend": backend}
        return [
            attend(query, key, value, pattern, **options)[0],
            attend_packed(q, k, v, ends, pattern, **options)[0],
            attention_in_groups(query, key, value, pattern, packing, **options),
        ]

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for size, p in ((41, 0.4), (50, 0.4), (50, 0.7)):
        query, key, value = _tensors(3, size, size, backend)
        mask = torch.arange(size) < torch.tensor([[size], [0], [11]])
        ends = torch.tensor([0, *lengths[:3], size - 26]).cumsum(0)
        arguments = query, key, value, mask, ends, _drop(p)
        for found, expected in zip(compiled(*arguments), run(*arguments), strict=True):
            torch.testing.assert_close(found, expected)


@pytest.mark.slow
@pytest.mark.plain
@pytest.mark.parametrize("seed", [4282876139, 2**31, -1, SEED, 7])
def test_inductor_computes_the_same_words(seed: int) -> None:
    """Products that overflow came out otherwise where its C++ is not vectors, for some seeds."""
    torch.compiler.reset()
    query, key, value = _tensors(2, 33, 33, "reference")
    dropout = Dropout(0.3, torch.tensor([seed]))

    def run(query: Tensor, dropout: Dropout) -> Tensor:
        return attend(query, key, value, FixedPattern(8, 4), dropout=dropout, backend="reference")[
            0
        ]

    found = torch.compile(run, fullgraph=True)(query, dropout)
    torch.testing.assert_close(found, run(query, dropout))
