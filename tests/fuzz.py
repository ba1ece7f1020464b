"""Drawn calls of the public operations against the definition: `make fuzz`, or

    python -m tests.fuzz --calls 10000 --seed 1
    TRITON_INTERPRET=1 python -m tests.fuzz --backend triton --calls 1000

Calls are drawn by the strategies of the suite and held to its bounds from rounding. Every call has
bytes of its own to be drawn from, made of the run's seed and its number, so that `--only NUMBER`
repeats one alone.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from colonnade import attention, backends
from tests.cases import (
    Case,
    Inputs,
    Results,
    attend_by_products,
    backpropagate,
    cases,
    fixed_patterns,
    patterns,
)
from tests.hf.drawn import check_draw as check_batch
from tests.hf.drawn import draw_call as draw_batch
from tests.layouts import LAYOUTS, expanded
from tests.packing import cu_seqlens_of, cuts, documents, packed, packed_case
from tests.rounding import check

BYTES = 2**12
"""More than any call is drawn from."""
USABLE = [name for name, why in backends().items() if why is None]
BACKENDS = st.sampled_from(["auto", *USABLE, *USABLE])
LONGEST = st.sampled_from((6, 20, 20, 60, 60, 300))
STRIDES = st.sampled_from((1, 2, 3, 4, 7, 8, 16, 31, 64))
BATCHES = (0, 1, 1, 1, 2, 2, 3)
GROUPS = (1, 1, 2, 3)
WIDTHS = (1, 3, 5, 8, 16, 17, 24, 33, 64, 65)
SCALES = (0.0, -0.6, 1e-3, 0.25, 0.25, 0.5, 1.0, 30.0)
DTYPES = st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16))
DTYPES_OF = {
    "native": st.sampled_from((torch.float32, torch.bfloat16)),
    # Its interpreter has no bfloat16.
    "triton": st.sampled_from((torch.float32, torch.float16)),
}
"""Types of the backends that do not compute in all of them, and run fixed patterns only."""
LONGEST_INTERPRETED = st.sampled_from((6, 20, 20, 60, 150))
KINDS = st.sampled_from((*["numbers"] * 8, "large", "equal", "bad", "dropout", "modes"))
ANY_LAYOUT = st.sampled_from((*LAYOUTS, "expanded"))
THREE_IN_FIVE = st.sampled_from((True, True, True, False, False))


@dataclass(frozen=True)
class Call:
    """One drawn call; its printed form tells it from every other."""

    case: Case
    backend: str
    dtype: torch.dtype
    layout: str
    lengths: tuple[int, ...] | None
    return_lse: bool
    gradients: bool
    kind: str


@cache
def _cases(longest: int, backend: str, fixed: bool) -> st.SearchStrategy[Case]:
    """Draw cases with empty tensors and the widths of kernels; fixed patterns, or any."""
    strides = STRIDES | st.integers(1, longest)
    causal = None if backend == "triton" else True
    return cases(
        longest,
        fixed_patterns(causal=causal, strides=strides) if fixed else patterns(strides=strides),
        min_len=0,
        batches=BATCHES if longest < 300 else (1,),
        groups=GROUPS,
        widths=WIDTHS,
        scales=SCALES,
    )


@st.composite
def calls(draw: st.DrawFn, backend: str | None) -> Call:
    """Draw any call; of causal fixed patterns most often, and three in ten of documents."""
    backend = draw(BACKENDS) if backend is None else backend
    longest = draw(LONGEST_INTERPRETED if backend == "triton" else LONGEST)
    case = draw(_cases(longest, backend, backend in DTYPES_OF or draw(st.booleans())))
    lengths = None
    if draw(st.integers(0, 9)) < 3:
        lengths = draw(cuts(case.kv_len))
        case = packed_case(case, lengths)
    return Call(
        case,
        backend,
        draw(DTYPES_OF.get(backend, DTYPES)),
        draw(ANY_LAYOUT),
        lengths,
        draw(THREE_IN_FIVE),
        draw(THREE_IN_FIVE),
        draw(KINDS),
    )


@cache
def _from_bytes(backend: str | None) -> Callable[[bytes], Call]:
    """Return a function that draws a call from bytes, by the way hypothesis has for fuzzers."""
    found: list[Call] = []

    @settings(database=None, deadline=None)
    @given(calls(backend))
    def keep(call: Call) -> None:
        found.append(call)

    take: Callable[[bytes], object] = vars(keep)["hypothesis"].fuzz_one_input

    def draw(source: bytes) -> Call:
        take(source)
        return found.pop()

    return draw


def drawn(seed: int, number: int, backend: str | None = None) -> Call:
    """Return call `number` of a run, of one backend or of any."""
    return _from_bytes(backend)(random.Random(f"{seed} {number}").randbytes(BYTES))


def make_inputs(call: Call) -> Inputs:
    """Return drawn numbers; some calls have large ones, or keys that are all equal."""
    inputs = call.case.inputs(call.dtype)
    if call.kind == "large":
        inputs = inputs._replace(query=inputs.query * 50)
    if call.kind == "equal":
        inputs = inputs._replace(key=inputs.key[:, :, :1].expand_as(inputs.key).contiguous())
    return expanded(inputs) if call.layout == "expanded" else inputs


def run(call: Call, inputs: Inputs, dropout_p: float = 0.0) -> Results:
    """Return output, log-sum-exp and gradients, in the call's layout; 0 where not asked for."""
    lay_out: Callable[[Tensor], Tensor] = LAYOUTS.get(call.layout, lambda t: t)
    inputs = inputs._replace(grad_out=lay_out(inputs.grad_out))
    query, key, value = (lay_out(t).detach().requires_grad_(call.gradients) for t in inputs[:3])
    out, lse = forward(call, query, key, value, dropout_p)
    if not call.gradients:
        return Results(out, lse, *(torch.zeros_like(t) for t in (query, key, value)))
    return backpropagate((out, lse), (query, key, value), inputs)


def forward(
    call: Call, query: Tensor, key: Tensor, value: Tensor, dropout_p: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp, of zeros where the call does not ask for that."""
    options: dict[str, Any] = {
        "scale": call.case.scale,
        "backend": call.backend,
        "return_lse": call.return_lse,
        "dropout_p": dropout_p,
    }
    if call.lengths is None:
        found = attention(query, key, value, call.case.pattern, **options)
        out, lse = found if isinstance(found, tuple) else (found, None)
    else:
        cu_seqlens = cu_seqlens_of(call.lengths)
        out, lse = packed(query, key, value, cu_seqlens, call.case.pattern, **options)
    if lse is None:
        lse = torch.zeros(out.shape[:3], dtype=torch.promote_types(out.dtype, torch.float32))
    return out, lse


def parts(call: Call) -> list[tuple[slice, Case]]:
    """Return the parts of the sequence that know nothing of one another, each with its case."""
    if call.lengths is None:
        return [(slice(0, call.case.kv_len), call.case)]
    return list(documents(call.case, call.lengths))


def check_call(call: Call) -> None:
    """Assert that a call gives what it has to give."""
    inputs = make_inputs(call)
    if call.kind == "dropout":
        _check_dropout(call, inputs)
    elif call.kind == "bad":
        _check_bad(call, inputs)
    elif call.kind == "modes":
        _check_modes(call, inputs)
    else:
        _check_numbers(call, inputs)


def _check_numbers(call: Call, inputs: Inputs) -> None:
    """Assert that each part of the sequence has the results of the definition."""
    if not call.return_lse:
        inputs = inputs._replace(grad_lse=torch.zeros_like(inputs.grad_lse))
    found = run(call, inputs)
    for part, case in parts(call):
        if case.batch * case.q_len == 0:
            continue
        alone, actual = inputs.part(part), found.part(part)
        expected = attend_by_products(case, alone)
        if not call.return_lse:
            expected = expected._replace(lse=actual.lse.double())
        if not call.gradients:
            expected = Results(*expected[:2], *(t.double() for t in actual[2:]))
        check(case, alone, actual, expected, _rounds_operands(call))


def _rounds_operands(call: Call) -> bool:
    """Whether the backend may round operands of products, see tests/rounding.py."""
    return (call.dtype == torch.bfloat16 and call.backend in ("native", "auto")) or (
        call.dtype != torch.float32 and call.backend == "triton"
    )


def _check_dropout(call: Call, inputs: Inputs) -> None:
    """Assert that a seed drops what it drops in the reference, and leaves the lse as it is."""
    p = (0.1, 0.5, 0.9, 1.0)[call.case.seed % 4]
    exact = replace(call, backend="reference", layout="contiguous")
    results = []
    for of_call, numbers in ((call, inputs), (call, inputs), (exact, inputs.double())):
        torch.manual_seed(call.case.seed)
        results.append(run(of_call, numbers, p))
    found, again, expected = results
    for name, one, other in zip(Results._fields, found, again, strict=True):
        assert torch.equal(one, other), f"{name} differs under one seed"
    if call.backend != "triton":  # It may add up the keys of a tile in another order.
        lse = run(call, inputs).lse
        assert torch.equal(lse, found.lse), "the log-sum-exp depends on dropout"
    factor = 1 / (1 - p) if p < 1 else 1.0
    if not call.return_lse:
        inputs = inputs._replace(grad_lse=torch.zeros_like(inputs.grad_lse))
    for part, case in parts(call):
        if case.batch * case.q_len > 0:
            alone, actual, true = inputs.part(part), found.part(part), expected.part(part)
            rounded = Results(*(t.to(u.dtype) for t, u in zip(true, actual, strict=True)))
            # A factor on weights is one on values; and where the gradient of those is bounded, it
            # is one on that of the output.
            for scaled, some in (
                ("value", actual._replace(grad_value=rounded.grad_value)),
                ("grad_out", rounded._replace(grad_value=actual.grad_value)),
            ):
                bounded = alone._replace(**{scaled: getattr(alone, scaled) * factor})
                check(case, bounded, some, true, _rounds_operands(call))


def _check_bad(call: Call, inputs: Inputs) -> None:
    """Assert that NaN or infinity in one tensor stays where the contract says."""
    if call.backend == "reference" or call.case.batch * call.case.q_len == 0:
        return
    call = replace(call, gradients=False)
    rng = random.Random(call.case.seed)
    of = rng.choice(("query", "key", "value"))
    tensor = getattr(inputs, of).clone()
    head, position = rng.randrange(tensor.shape[1]), rng.randrange(tensor.shape[2])
    tensor[0, head, position] = rng.choice((math.nan, math.inf, -math.inf))
    before, after = run(call, inputs), run(call, inputs._replace(**{of: tensor}))
    touched = torch.zeros(before.lse.shape, dtype=torch.bool)
    if of == "query":
        touched[0, head, position] = True
    else:
        for part, case in parts(call):
            if part.start <= position < part.stop:
                touched[0, case.queries_of(head), part] = case.reach(head, position - part.start)
    for name, one, other in zip(Results._fields[:2], before, after, strict=False):
        same = torch.equal(one[~touched], other[~touched])
        assert same, f"{name} of a row that may not be touched by a bad {of} changed"


def _check_modes(call: Call, inputs: Inputs) -> None:
    """Assert that forward mode and second derivatives are right or refused, and never zeros.

    In forward mode: the tangent along v, weighted by g, is the gradient for g along v.
    """
    if call.backend not in DTYPES_OF:
        inputs = Inputs(*(t.double() for t in inputs))
    tangents: list[Tensor] = []
    leaves = tuple(t.detach().clone().requires_grad_() for t in inputs[:3])
    ways = tuple(torch.randn(t.shape, dtype=t.dtype) for t in leaves)

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out, lse = forward(call, query, key, value)
        lse = lse.masked_fill(lse == -math.inf, 0.0)
        return (out * inputs.grad_out).sum() + (lse * inputs.grad_lse).sum()

    grads = torch.autograd.grad(loss(*leaves), leaves, create_graph=True)
    along = torch.stack([(grad * way).sum() for grad, way in zip(grads, ways, strict=True)]).sum()
    refused = _refused(lambda: torch.autograd.grad(along, leaves, allow_unused=True))
    assert refused is (call.backend != "reference"), "second derivatives are not as expected"
    points = tuple(t.detach() for t in leaves)
    refused = _refused(lambda: tangents.append(torch.func.jvp(loss, points, ways)[1]))
    assert refused is (call.backend in ("eager", *DTYPES_OF)), "forward mode is not as expected"
    for tangent in tangents:
        torch.testing.assert_close(tangent, along.detach(), rtol=1e-8, atol=1e-8)


def _refused(differentiate: Callable[[], object]) -> bool:
    """Whether a derivative is refused in favour of the reference."""
    try:
        differentiate()
    except NotImplementedError as error:
        return "backend='reference'" in str(error)
    return False


def main(arguments: list[str] | None = None) -> int:
    """Check the calls and print which ones are wrong and why; return 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000, help="calls of the operations")
    parser.add_argument("--batches", type=int, default=0, help="batches given to whole models")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    every = backends()
    parser.add_argument("--backend", choices=every, help="draw calls of this one only")
    parser.add_argument("--only", type=int, help="the number of one of them to repeat")
    chosen = parser.parse_args(arguments)
    if (why := every.get(chosen.backend)) is not None:
        parser.error(f"backend {chosen.backend!r} {why}.")
    print(f"seed {chosen.seed}", flush=True)
    of_backend = partial(drawn, backend=chosen.backend)
    wrong = _search("call", chosen.calls, chosen, of_backend, check_call)
    wrong += _search("batch", chosen.batches, chosen, draw_batch, check_batch)
    return 1 if wrong else 0


def _search(
    name: str,
    count: int,
    chosen: argparse.Namespace,
    draw: Callable[[int, int], Any],
    check: Callable[[Any], object],
) -> int:
    """Return how many are wrong, and print them."""
    if count == 0:
        return 0
    numbers = range(count) if chosen.only is None else [chosen.only]
    seen: set[str] = set()
    wrong = 0
    by_kind: Counter[str] = Counter()
    started = time.monotonic()
    for done, number in enumerate(numbers, start=1):
        each = draw(chosen.seed, number)
        seen.add(repr(each))
        by_kind[each.kind] += 1
        try:
            check(each)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            wrong += 1
            print(f"{name} {number}: {type(error).__name__}: {error}\n  {each}", flush=True)
        if done % 1_000 == 0:
            taken = time.monotonic() - started
            print(f"{done} drawn, {wrong} wrong, {taken:.0f} s", flush=True)
    kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(by_kind.items()))
    print(f"{name}: {len(seen)} distinct ({kinds}), {wrong} wrong")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
