"""Dropout in backend "triton": the weights that are kept are those of the definition, one by one.

In Triton's interpreter, as tests/backends/test_triton.py. Which weights a call kept is read off its
output: with unit vectors as values, the output of a query is the row of its weights.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from colonnade import FixedPattern, attention
from colonnade.backends import dropout, triton
from colonnade.backends.call import Kept
from colonnade.backends.choice import run
from colonnade.backends.dropout import Dropout
from colonnade.ops.check import make_call
from tests.backends.test_triton import pytestmark
from tests.cases import Case, Inputs, Results, backpropagate, both
from tests.packing import cu_seqlens_of, documents, packed
from tests.rounding import check

__all__ = ["pytestmark"]  # The same marks.

SEED = 11
CASES = {
    # Keys in quads: a whole tile of slots and some left over; several pieces and tiles of a row.
    "quads": Case(FixedPattern(16, 12), 1, 1, 2, 10, 64, 8, 8),
    "long row": Case(FixedPattern(80, 4), 1, 1, 1, 75, 84, 8, 8),
    "sub-blocks": Case(FixedPattern(12, 4, subblocks=2), 2, 2, 1, 5, 27, 8, 8),
    "local": Case(FixedPattern(20, 3, part="local"), 1, 1, 1, 31, 50, 8, 8),
    "summary": Case(FixedPattern(12, 4, part="summary", subblocks=2), 1, 2, 1, 21, 21, 8, 8),
    "bidirectional": Case(FixedPattern(12, 4, subblocks=2, causal=False), 1, 2, 1, 9, 23, 8, 8),
    # And elsewhere.
    "each": Case(FixedPattern(15, 7), 1, 1, 2, 20, 34, 8, 8),
    "each, sub-blocks": Case(FixedPattern(9, 2, subblocks=2), 1, 2, 1, 11, 31, 8, 8),
    "each, summary": Case(FixedPattern(10, 3, part="summary"), 1, 1, 1, 23, 23, 8, 8),
    "each, bidirectional": Case(FixedPattern(10, 4, subblocks=2, causal=False), 1, 2, 1, 9, 26, 8),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def _units(case: Case, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the values with which an output is the row of its weights."""
    return torch.eye(case.kv_len, dtype=dtype).expand(case.batch, case.kv_heads, -1, -1)


def _results(case: Case, inputs: Inputs, backend: str, p: float) -> Results:
    leaves = inputs.leaves()
    torch.manual_seed(SEED)
    return backpropagate(both(*leaves, case.pattern, backend, case.scale, p), leaves, inputs)


def _check(case: Case, inputs: Inputs, found: Results, expected: Results, p: float) -> None:
    """Hold results to the bounds of rounding, which know values and nothing of factors."""
    inputs = inputs._replace(value=inputs.value / (1 - p))
    found, expected = (r._replace(grad_value=r.grad_value * (1 - p)) for r in (found, expected))
    half = inputs.query.dtype == torch.float16  # Here the product above rounds once more.
    check(case, inputs, found, expected, half, also_rounded=half)


def _check_kept(case: Case, dtype: torch.dtype, p: float) -> None:
    """Assert that the weights that are kept, and all gradients, are those of the reference."""
    case = replace(case, v_dim=case.kv_len)
    inputs = case.inputs(dtype)._replace(value=_units(case, dtype))
    found = _results(case, inputs, "triton", p)
    expected = _results(case, inputs.double(), "reference", p)
    assert torch.equal(found.out > 0, expected.out > 0)
    _check(case, inputs, found, expected, p)


@each_case
def test_the_weights_that_are_kept_are_those_of_the_reference(case: Case) -> None:
    _check_kept(case, torch.float32, 0.5)


def test_half_precision_and_few_dropped() -> None:
    _check_kept(replace(CASES["sub-blocks"], batch=1), torch.float16, 0.1)


def test_nothing_is_kept_with_p_of_1() -> None:
    """The log-sum-exp and its gradients are left."""
    case = replace(CASES["each"], q_len=9, kv_len=20)
    inputs = case.inputs(torch.float32)
    found = _results(case, inputs, "triton", 1.0)
    assert (found.out == 0).all()
    assert (found.grad_value == 0).all()
    expected = _results(case, inputs.double(), "reference", 1.0)
    check(case, inputs, found, expected)


def test_no_word_is_left_just_below_1() -> None:
    """Where p · 2³² rounds to all words that there are; a factor of 10¹² would show."""
    case = Case(FixedPattern(16, 4), 1, 1, 1, 20, 20, 8, 8)
    query, key = case.inputs(torch.float32)[:2]
    out = both(query, key, _units(case), case.pattern, "triton", None, 1 - 1e-12)[0]
    assert (out == 0).all()


def test_both_ways_of_computing_words_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CASES["sub-blocks"], batch=1)
    inputs = case.inputs(torch.float32)
    found = _results(case, inputs, "triton", 0.4)
    monkeypatch.setattr(triton, "lie_in_quads", lambda pattern: False)
    for one, other in zip(_results(case, inputs, "triton", 0.4), found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "pattern", [FixedPattern(8, 4, part="summary"), FixedPattern(7, 3)], ids=["quads", "each"]
)
def test_packed_documents(pattern: FixedPattern) -> None:
    """Documents are counted with the empty ones, and positions from where each begins."""
    lengths = (0, 9, 1, 0, 13)
    case = Case(pattern, 1, 1, 1, 23, 23, 8, 8, 0.4)
    inputs, results = case.inputs(torch.float32), []
    for backend in ("triton", "reference"):
        given = inputs if backend == "triton" else inputs.double()
        leaves = given.leaves()
        torch.manual_seed(SEED)
        out, lse = packed(
            *leaves, cu_seqlens_of(lengths), case.pattern, scale=0.4, dropout_p=0.4, backend=backend
        )
        assert lse is not None
        results.append(backpropagate((out, lse), leaves, given))
    for place, alone in documents(case, lengths):
        found, expected = (each.part(place) for each in results)
        _check(alone, inputs.part(place), found, expected, 0.4)


@pytest.mark.parametrize("sizes", [(8, 4), (5, 2)], ids=["quads", "each"])
def test_blocks_of_which_only_the_summaries_are_kept(sizes: tuple[int, int]) -> None:
    """Chunks behind a cache drop what the whole sequence drops."""
    pattern, reduced, n, q_len = FixedPattern(*sizes, subblocks=2), 2, 27, 7
    case = Case(pattern, 1, 2, 2, q_len, n, 8, 8, 0.4)
    query, key = case.inputs(torch.float32)[:2]
    value, given = _units(case), Dropout(0.4, torch.tensor([SEED]))
    expected = run(query, key, value, make_call(query, pattern, 0.4, given), "reference")[0]
    whole = pattern.stride * reduced
    kept = torch.tensor(
        [
            [pattern.stride * block + column for block in range(reduced) for column in columns]
            + list(range(whole, n))
            for columns in (pattern.summary_columns(0), pattern.summary_columns(1))
        ]
    )
    k, v = (torch.stack([t[:, head, kept[head]] for head in (0, 1)], 1) for t in (key, value))
    call = make_call(query, pattern, 0.4, given, keys=Kept(whole))
    torch.testing.assert_close(run(query, k, v, call, "triton")[0], expected)


@pytest.mark.parametrize("stride", [8, 6], ids=["quads", "each"])
def test_a_part_of_a_call_drops_what_the_whole_drops(stride: int) -> None:
    """Some rows, heads and blocks of it; blocks know nothing of one another in this pattern."""
    case = Case(FixedPattern(stride, 1, part="local"), 2, 2, 2, 2 * stride, 2 * stride, 8, 8)
    query, key = case.inputs(torch.float32)[:2]
    seed = torch.tensor([SEED])

    def weights(q: Tensor, k: Tensor, v: Tensor, given: Dropout) -> Tensor:
        call = make_call(q, case.pattern, 0.4, given)
        return run(q, k, v, call, "triton")[0]

    value = _units(case)
    whole = weights(query, key, value, Dropout(0.5, seed))
    k, v = (t[1:, 1:, stride:] for t in (key, value))
    found = weights(query[1:, 2:, stride:], k, v, Dropout(0.5, seed, 1, 2, stride))
    torch.testing.assert_close(found, whole[1:, 2:, stride:])


@pytest.mark.parametrize("first", [(3, 5, 6), (2**20, 1, 2**31 - 64)], ids=str)
def test_numbers_of_the_first_ones_are_added(first: tuple[int, int, int]) -> None:
    case = CASES["sub-blocks"]
    query, key = case.inputs(torch.float32)[:2]
    given = Dropout(0.5, torch.tensor([2**62 - 1]), *first)
    call = make_call(query, case.pattern, 0.4, given)
    found, expected = (
        run(query, key, _units(case), call, backend)[0] for backend in ("triton", "reference")
    )
    torch.testing.assert_close(found, expected)


def test_a_seed_is_read_when_a_kernel_runs() -> None:
    """As in a graph that was captured: other contents of the tensor drop other weights."""
    case = CASES["sub-blocks"]
    query, key = case.inputs(torch.float32)[:2]
    seed = torch.tensor([1])
    call = make_call(query, case.pattern, None, Dropout(0.5, seed))
    outputs = {}
    for number in (1, 1 - 2**63):
        seed.fill_(number)
        outputs[number] = run(query, key, _units(case), call, "triton")[0]
        expected = run(query, key, _units(case), call, "reference")[0]
        assert torch.equal(outputs[number] > 0, expected > 0)
    assert not torch.equal(outputs[1], outputs[1 - 2**63])


def test_words_are_those_of_the_definition() -> None:
    """At the ends of 32 bits, too."""
    from tests.backends.philox_kernel import write_words

    counters = torch.randint(2**32, (4, 16))
    counters[:, :3] = torch.tensor([0, 1, 2**32 - 1])
    for number in (0, SEED, 2**62 - 1, -1):
        seed, words = torch.tensor([number]), torch.zeros(4, 16, dtype=torch.int64)
        write_words[(1,)](words, counters, seed)
        assert torch.equal(words, torch.stack(dropout.philox(tuple(counters), seed)))


def test_a_compiled_or_checkpointed_call_drops_the_same() -> None:
    case = replace(CASES["quads"], group=1, q_len=5, kv_len=20)
    inputs = case.inputs(torch.float32)

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attention(query, key, value, case.pattern, backend="triton", dropout_p=0.4)

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    found = []
    for each in (call, compiled, lambda *leaves: checkpoint(call, *leaves, use_reentrant=False)):
        leaves = inputs.leaves()
        torch.manual_seed(SEED)
        out = each(*leaves)
        found.append([out, *torch.autograd.grad(out, leaves, inputs.grad_out)])
    for other in found[1:]:
        assert all(map(torch.equal, found[0], other))
