"""Time packed documents against a batch of as many tokens, both by "native": `make bench-packed`.

It takes a minute or two, and nothing else may run at the same time. Writes benchmarks/packed.json
and prints a table. 65,536 tokens, 8 heads of width 64, l = 128, c = 8.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colonnade import attention, attention_varlen
from colonnade.bench.timing import Sizes, compare
from colonnade.info import info

DOCUMENTS, LENGTH = 64, 1_024
SHORTEST, LONGEST = 512, 1_536
SHORT = 20
ROUNDS = 9
HERE = Path(__file__).parent


def lengths() -> dict[str, list[int]]:
    """Return the lengths of documents for each way to divide the tokens, by its name."""
    total = DOCUMENTS * LENGTH
    rng = random.Random(0)
    ragged: list[int] = []
    for _ in range(DOCUMENTS // 2):  # In pairs, so that the total is right.
        one = rng.randint(SHORTEST, LONGEST)
        ragged += [one, 2 * LENGTH - one]
    short = [SHORT] * (total // SHORT)
    return {
        f"{DOCUMENTS} of {LENGTH:,}": [LENGTH] * DOCUMENTS,
        f"{DOCUMENTS} of {SHORTEST:,} to {LONGEST:,}": ragged,
        f"{len(short):,} of {SHORT}": short,
    }


def contenders(dtype: str, backward: bool) -> dict[str, Callable[[], object]]:
    """Return functions that run a batch, and its tokens as documents one after another."""
    sizes = Sizes(LENGTH, batch=DOCUMENTS, dtype=dtype, backward=backward)
    query, key, value, grad = sizes.inputs()
    pattern = sizes.pattern()

    def finish(out: object, leaves: tuple[Tensor, ...], of_out: Tensor) -> None:
        assert isinstance(out, Tensor)
        if backward:
            torch.autograd.grad(out, leaves, of_out)

    def batch() -> None:
        out = attention(query, key, value, pattern, backend="native")
        finish(out, (query, key, value), grad)

    def packed(documents: list[int]) -> Callable[[], None]:
        total = sum(documents)
        cu_seqlens = torch.tensor([0, *documents]).cumsum(0)
        *leaves, of_out = (
            t.detach().transpose(1, 2).flatten(0, 1)[:total].clone()
            for t in (query, key, value, grad)
        )
        q, k, v = (t.requires_grad_(backward) for t in leaves)

        def run() -> None:
            out = attention_varlen(q, k, v, cu_seqlens, pattern, backend="native")
            finish(out, (q, k, v), of_out)

        return run

    return {"batch": batch, **{name: packed(each) for name, each in lengths().items()}}


def main() -> None:
    """Measure, print and write the comparisons."""
    found: dict[str, Any] = {"machine": info(["torch"], build=True).for_measurement()}
    print("|", *(f"| {name}" for name in lengths()), "|")
    print("|---" * (1 + len(lengths())) + "|")
    for dtype in ("float32", "bfloat16"):
        for backward in (False, True):
            kind = dtype + (", forward + backward" if backward else ", forward")
            compared = compare(contenders(dtype, backward), ROUNDS)
            found[kind] = asdict(compared)
            ratios = (
                f"| {r.median:.2f} ({r.low:.2f}–{r.high:.2f})" for r in compared.ratio.values()
            )
            print(f"| {kind}", *ratios, "|", flush=True)
    (HERE / "packed.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
