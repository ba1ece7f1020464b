"""Drawn calls of the public operations against the definition: `make fuzz`, or

    python -m tests.fuzz --calls 10000 --seed 1

Every call has its own seed, made of the run's seed and its number, so that `--only NUMBER` repeats
one alone. What is right is computed in float64 from the oracle's sets, with plain products; how far
a result may be off is worked out from rounding.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from colonnade import (
    FixedPattern,
    FullPattern,
    LocalPattern,
    Pattern,
    StridedPattern,
    attention,
    attention_varlen,
    backends,
)
from tests.cases import PARTS, Case, Inputs, Results, backpropagate, mask_of
from tests.rounding import bounds

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "heads last", "width first", "every second", "misaligned", "expanded")
SCALES = (0.0, -0.6, 1e-3, 0.25, 0.25, 0.5, 1.0, 30.0)


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


def draw_pattern(rng: random.Random, longest: int) -> Pattern:
    """Any pattern; fixed and causal ones most often."""
    stride = rng.choice((1, 2, 3, 4, 7, 8, 16, 31, 64, rng.randint(1, longest)))
    kind = rng.choice(("fixed",) * 5 + ("both ways", "strided", "local", "full"))
    if kind in ("fixed", "both ways"):
        summary = rng.randint(1, min(stride, rng.choice((1, 2, 8, stride))))
        subblocks = rng.randint(1, min(stride // summary, 4))
        return FixedPattern(stride, summary, subblocks, rng.choice(PARTS), kind == "fixed")
    if kind == "strided":
        return StridedPattern(stride, rng.choice(PARTS))
    if kind == "local":
        return LocalPattern(stride)
    return FullPattern(rng.random() < 0.5)


def draw(seed: int, number: int) -> Call:
    """Call `number` of a run."""
    rng = random.Random(f"{seed} {number}")
    longest = rng.choice((6, 20, 20, 60, 60, 300))
    kv_len = rng.randint(0 if rng.random() < 0.1 else 1, longest)
    q_len = kv_len if rng.random() < 0.5 else rng.randint(0, kv_len)
    batch = rng.choice((0, 1, 1, 1, 2, 2, 3)) if longest < 300 else 1
    lengths = None
    if rng.random() < 0.3:
        batch, q_len = 1, kv_len
        cuts = sorted(rng.randint(0, kv_len) for _ in range(rng.randint(0, 5)))
        ends = [*cuts, kv_len]
        lengths = tuple(b - a for a, b in zip([0, *ends], ends, strict=False))
    usable = [name for name, why in backends().items() if why is None]
    backend = rng.choice(["auto", *usable, *usable])
    types = (torch.float32, torch.bfloat16) if backend == "native" else DTYPES
    pattern = draw_pattern(rng, longest)
    if backend == "native" and not (isinstance(pattern, FixedPattern) and pattern.causal):
        backend = "eager"
    qk_dim = rng.choice((1, 3, 8, 16, 17, 33, 64))
    case = Case(
        pattern,
        batch,
        rng.randint(1, 3),
        rng.choice((1, 1, 2, 3)),
        q_len,
        kv_len,
        qk_dim,
        qk_dim if rng.random() < 0.4 else rng.choice((1, 5, 8, 16, 24, 65)),
        rng.choice(SCALES),
        rng.randint(0, 2**30),
    )
    kind = rng.choice(("numbers",) * 8 + ("large", "equal", "bad", "dropout"))
    return Call(
        case,
        backend,
        rng.choice(types),
        rng.choice(LAYOUTS),
        lengths,
        rng.random() < 0.6,
        rng.random() < 0.6,
        kind,
    )


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same numbers, in memory as a user may have them."""
    if layout == "heads last":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "width first":
        return tensor.mT.contiguous().mT
    if layout == "every second":
        room = tensor.new_zeros(*tensor.shape[:3], 2 * tensor.shape[3])
        room[..., ::2] = tensor
        return room[..., ::2]
    if layout == "misaligned":
        room = tensor.new_empty(tensor.numel() + 1)
        return room[1:].view(tensor.shape).copy_(tensor)
    return tensor


def make_inputs(call: Call) -> Inputs:
    """Drawn numbers; some calls have large ones, or equal ones, or one that is not finite."""
    inputs = call.case.inputs(call.dtype)
    if call.kind == "large":
        inputs = inputs._replace(query=inputs.query * 50)
    if call.kind == "equal":
        inputs = inputs._replace(key=inputs.key[:, :, :1].expand_as(inputs.key).contiguous())
    if call.layout == "expanded":
        inputs = inputs._replace(
            key=inputs.key[:1, :1].expand_as(inputs.key) if len(inputs.key) else inputs.key,
            grad_out=torch.ones((), dtype=call.dtype).expand_as(inputs.grad_out),
        )
    return Inputs(*(laid_out(t, call.layout) for t in inputs[:4]), inputs.grad_lse)


def run(call: Call, inputs: Inputs, dropout_p: float = 0.0) -> Results:
    """The call's output, log-sum-exp and gradients (zeros where not asked for)."""
    leaves = tuple(t.detach().requires_grad_(call.gradients) for t in inputs[:3])
    options: dict[str, Any] = {
        "scale": call.case.scale,
        "backend": call.backend,
        "return_lse": call.return_lse,
        "dropout_p": dropout_p,
    }
    if call.lengths is None:
        found = attention(*leaves, call.case.pattern, **options)
    else:
        cu_seqlens = torch.tensor([0, *call.lengths]).cumsum(0)
        packed = (t[0].transpose(0, 1) for t in leaves)
        found = attention_varlen(*packed, cu_seqlens, call.case.pattern, **options)
    out, lse = found if isinstance(found, tuple) else (found, None)
    if call.lengths is not None:
        out, lse = out.transpose(0, 1)[None], None if lse is None else lse[None]
    if lse is None:
        lse = torch.zeros(out.shape[:3], dtype=torch.promote_types(out.dtype, torch.float32))
    if not call.gradients:
        return Results(out, lse, *(torch.zeros_like(t) for t in leaves))
    return backpropagate((out, lse), leaves, inputs)


def truth(case: Case, inputs: Inputs) -> Results:
    """The definition in float64: plain products under the oracle's mask."""
    leaves = tuple(t.detach().double().requires_grad_() for t in inputs[:3])
    query, key, value = leaves
    mask = case.mask()[:, None]
    grouped = query.unflatten(1, (case.kv_heads, case.group))
    scores = case.scale * grouped @ key[:, :, None].mT
    empty = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~mask, -math.inf).masked_fill(empty, 0.0)
    weights = scores.softmax(-1).masked_fill(empty, 0.0)
    lse = scores.logsumexp(-1).masked_fill(empty[..., 0], -math.inf)
    out = (weights @ value[:, :, None]).flatten(1, 2)
    exact = Inputs(*(t.double() for t in inputs))
    return backpropagate((out, lse.flatten(1, 2)), leaves, exact)


def documents(call: Call) -> list[tuple[slice, Case]]:
    """The parts of the sequence that know nothing of one another."""
    if call.lengths is None:
        return [(slice(None), call.case)]
    found, begin = [], 0
    for length in call.lengths:
        part = slice(begin, begin + length)
        found.append((part, replace(call.case, q_len=length, kv_len=length)))
        begin += length
    return found


def check(call: Call) -> str | None:
    """What is wrong with a call, or None."""
    inputs = make_inputs(call)
    if call.kind == "dropout":
        return _check_dropout(call, inputs)
    if call.kind == "bad":
        return _check_bad(call, inputs)
    if not call.return_lse:
        inputs = inputs._replace(grad_lse=torch.zeros_like(inputs.grad_lse))
    found = run(call, inputs)
    for part, case in documents(call):
        if case.batch * case.q_len == 0:
            continue
        alone = Inputs(*(t[:, :, part] for t in inputs))
        of_document = Results(*(t[:, :, part] for t in found))
        problem = _compare(call, case, alone, of_document)
        if problem is not None:
            return problem
    return None


def _compare(call: Call, case: Case, inputs: Inputs, found: Results) -> str | None:
    expected, allowed = truth(case, inputs), bounds(case, inputs)
    loose = _operand_rounding(call, case, inputs)
    for name, actual, true, bound, more in zip(
        Results._fields, found, expected, allowed, loose, strict=True
    ):
        if (name == "lse" and not call.return_lse) or (name[:4] == "grad" and not call.gradients):
            continue
        info = torch.finfo(actual.dtype)
        rounding = info.eps / 2 * true.abs().nan_to_num(0.0, posinf=0.0, neginf=0.0)
        rounding = rounding + info.smallest_normal * info.eps
        error = (actual.double() - true).abs()
        good = (actual.double() == true) | (error <= 2 * bound + more + rounding)
        if not bool(good.all()):
            return f"{name} is off by {error[~good].max():.3g}"
    return None


def _operand_rounding(call: Call, case: Case, inputs: Inputs) -> tuple[Tensor | float, ...]:
    """What rounding the operands of products to bfloat16 adds, in `native` alone.

    Weights and score gradients have a relative error of 2^-8 each, delta is taken from a rounded
    output, and the exponential is off by 1.2e-4: four times the first covers all of them.
    """
    if call.dtype != torch.bfloat16 or call.backend not in ("native", "auto"):
        return (0.0,) * 5
    doubled = Inputs(*(t.double() for t in inputs))
    mask = case.mask()[:, None]
    query, key, value = doubled[:3]
    grouped = query.unflatten(1, (case.kv_heads, case.group))
    scores = (case.scale * grouped @ key[:, :, None].mT).masked_fill(~mask, -math.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    grad = doubled.grad_out.unflatten(1, (case.kv_heads, case.group))
    products = grad.abs() @ value[:, :, None].mT.abs()
    mean = (weights * products).sum(-1, keepdim=True)
    grad_lse = doubled.grad_lse.unflatten(1, (case.kv_heads, case.group)).abs()[..., None]
    d_scores = abs(case.scale) * weights * (products + mean + grad_lse)
    error = 4 * 2.0**-8
    return (
        error * (weights @ value[:, :, None].abs()).flatten(1, 2),
        2e-4,
        error * (d_scores @ key[:, :, None].abs()).flatten(1, 2),
        error * (d_scores.mT @ grouped.abs()).sum(2),
        error * (weights.mT @ grad.abs()).sum(2),
    )


def _check_dropout(call: Call, inputs: Inputs) -> str | None:
    """The same seed drops the same weights; everything stays finite; the lse is untouched."""
    if call.backend in ("native", "auto"):
        call = replace(call, backend="eager")
    results = []
    for _ in range(2):
        torch.manual_seed(call.case.seed)
        results.append(run(call, inputs, 0.3))
    for name, one, other in zip(Results._fields, *results, strict=True):
        if not torch.equal(one, other):
            return f"{name} differs under one seed"
        if name != "lse" and not bool(one.isfinite().all()):
            return f"{name} is not finite under dropout"
    plain = run(call, inputs)
    if call.return_lse and not torch.equal(plain.lse, results[0].lse):
        return "the log-sum-exp depends on dropout"
    return None


def _check_bad(call: Call, inputs: Inputs) -> str | None:
    """NaN in one key or query stays where the contract says."""
    if call.backend == "reference" or call.case.batch * call.case.q_len == 0:
        return None
    rng = random.Random(call.case.seed)
    of = rng.choice(("query", "key", "value"))
    tensor = getattr(inputs, of).clone()
    head, position = rng.randrange(tensor.shape[1]), rng.randrange(tensor.shape[2])
    tensor[0, head, position] = rng.choice((math.nan, math.inf, -math.inf))
    # A product may round by where its operands lie: both calls get them alike.
    tensor = laid_out(tensor, call.layout)
    before, after = (
        run(replace(call, gradients=False), each)
        for each in (inputs, inputs._replace(**{of: tensor}))
    )
    touched = torch.zeros(before.out.shape[:3], dtype=torch.bool)
    if of == "query":
        touched[0, head, position] = True
    else:
        group = slice(head * call.case.group, (head + 1) * call.case.group)
        for part, case in documents(call):
            begin = part.start or 0
            if not begin <= position < begin + case.kv_len:
                continue
            inside = position - begin
            pattern = case.pattern
            rows = torch.arange(case.kv_len - case.q_len, case.kv_len)
            reach = mask_of(pattern, case.kv_len, case.kv_heads)[head, rows, inside]
            if isinstance(pattern, FixedPattern):
                reach |= rows // pattern.stride == inside // pattern.stride
            if isinstance(pattern, FullPattern):
                reach |= True
            touched[0, group, part] = reach
    for name, one, other in (("out", before.out, after.out), ("lse", before.lse, after.lse)):
        if not torch.equal(one[~touched], other[~touched]):
            return f"{name} of a row that may not be touched by a bad {of} changed"
    return None


def main(arguments: list[str] | None = None) -> int:
    """Run the calls, and say what was wrong with which."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(10**9))
    parser.add_argument("--only", type=int, help="the number of one call to repeat")
    chosen = parser.parse_args(arguments)
    print(f"seed {chosen.seed}", flush=True)
    numbers = range(chosen.calls) if chosen.only is None else [chosen.only]
    seen: set[str] = set()
    wrong = 0
    by_backend: Counter[str] = Counter()
    started = time.monotonic()
    for done, number in enumerate(numbers):
        call = draw(chosen.seed, number)
        seen.add(repr(call))
        by_backend[call.backend] += 1
        try:
            problem = check(call)
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem is not None:
            wrong += 1
            print(f"call {number}: {problem}\n  {call}", flush=True)
        if (done + 1) % 1_000 == 0:
            taken = time.monotonic() - started
            print(f"{done + 1} calls, {wrong} wrong, {taken:.0f} s", flush=True)
    backends_used = ", ".join(f"{name} {count}" for name, count in sorted(by_backend.items()))
    print(f"{len(seen)} distinct calls ({backends_used}), {wrong} wrong")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
