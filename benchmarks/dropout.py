"""Time dropout on the weights against the same attention without it: `make bench-dropout`.

It takes a few minutes, and nothing else may run at the same time. Writes benchmarks/dropout.json
and the section "dropout" of docs/performance.md. One sequence, 8 heads of width 64.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from colonnade import attention
from colonnade.backends import dropout
from colonnade.bench.sections import fill
from colonnade.bench.timing import Comparison, Contender, Sizes, compare
from colonnade.info import info

LENGTH = 8_192
PATTERNS = ((128, 8), (128, 3), (128, 1))
"""Strides and summaries: quads of summaries that follow one another, and those that do not."""
DROPOUT = 0.1
ROUNDS = 15
HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "performance.md"


def contenders(sizes: Sizes, backend: str) -> dict[str, Contender]:
    """Return the attention without dropout and with it, by one backend.

    "by PyTorch" computes the factors without the compiled library.
    """
    query, key, value, grad = sizes.inputs()

    def run(dropout_p: float) -> Tensor | tuple[Tensor, ...]:
        out = attention(query, key, value, sizes.pattern(), dropout_p=dropout_p, backend=backend)
        return torch.autograd.grad(out, (query, key, value), grad) if sizes.backward else out

    def by_pytorch() -> None:
        compiled = dropout._is_compiled
        dropout._is_compiled = lambda: False  # type: ignore[assignment]
        try:
            run(DROPOUT)
        finally:
            dropout._is_compiled = compiled

    found: dict[str, Contender] = {"without": partial(run, 0.0), "with": partial(run, DROPOUT)}
    return found if backend == "native" else {**found, "by PyTorch": by_pytorch}


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the table of the page: how many times as long it takes with dropout."""
    yield ""
    yield "| | l, c | without, ms | with dropout, times as long | factors by PyTorch alone |"
    yield "|---|---|---|---|---|"
    for row in rows:
        sizes, ratio = row["sizes"], row["ratio"]
        passes = "forward + backward" if sizes["backward"] else "forward"
        cells = [
            f"{ratio[name]['median']:.2f} ({ratio[name]['low']:.2f}–{ratio[name]['high']:.2f})"
            if name in ratio
            else ""
            for name in ("with", "by PyTorch")
        ]
        yield (
            f"| {row['backend']}, {sizes['dtype']}, {passes} | {sizes['stride']}, "
            f"{sizes['summary']} | {1e3 * row['seconds']['without']['median']:.3g} | "
            f"{' | '.join(cells)} |"
        )
    yield ""


def main() -> None:
    """Measure, print and write the comparisons."""
    rows = []
    for backend, dtype, backward in product(
        ("native", "eager"), ("float32", "bfloat16"), (False, True)
    ):
        for stride, summary in PATTERNS if backend == "native" else PATTERNS[:1]:
            sizes = Sizes(LENGTH, stride, summary, dtype=dtype, backward=backward)
            found: Comparison = compare(contenders(sizes, backend), ROUNDS)
            rows.append({"backend": backend, "sizes": asdict(sizes), **asdict(found)})
            print([*lines(rows)][-2], flush=True)
    machine = info(["torch"], build=True).for_measurement()
    (HERE / "dropout.json").write_text(json.dumps({"machine": machine, "rows": rows}, indent=1))
    PAGE.write_text(fill(PAGE.read_text(), "dropout", lines(rows)))


if __name__ == "__main__":
    main()
