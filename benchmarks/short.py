"""Time short sequences by "native" against dense causal attention: `make bench-short`.

It takes a few minutes, and nothing else may run at the same time. Writes benchmarks/short.json and
prints, for each kind, the smallest median of all its comparisons. Sizes at which the pattern has
more than half of the pairs of dense attention are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from typing import Any

from colonnade.bench.timing import Comparison, Sizes, compare, contenders
from colonnade.info import info

LENGTHS = (256, 512, 1_024)
PATTERNS = ((16, 4), (64, 8), (128, 8), (128, 32))
"""Strides and summaries."""
BATCHES = ((1, 1), (1, 8), (8, 8))
"""Sequences in a batch, and their heads."""
ROUNDS = 31
HERE = Path(__file__).parent


def rows(kind: Sizes) -> Iterator[Sizes]:
    """Yield every combination that has at most half of the pairs of dense attention."""
    for seq_len, (stride, summary), (batch, heads) in product(LENGTHS, PATTERNS, BATCHES):
        sizes = replace(
            kind,
            seq_len=seq_len,
            stride=stride,
            summary=summary,
            batch=batch,
            heads=heads,
            kv_heads=heads,
        )
        if sizes.pattern().density(seq_len) <= 1 / 2:
            yield sizes


def main() -> None:
    """Measure, print and write the comparisons."""
    result: dict[str, Any] = {"machine": info(["torch"], build=True).for_measurement(), "rows": []}
    print("| | smallest median | (its spread) | at n; l, c; batch, heads | its ms | comparisons |")
    print("|---" * 6 + "|")
    for dtype, backward in product(("float32", "bfloat16"), (False, True)):
        found: list[tuple[Sizes, Comparison]] = []
        for sizes in rows(Sizes(dtype=dtype, backward=backward)):
            compared = compare(contenders(sizes, ["native", "dense"]), ROUNDS)
            found.append((sizes, compared))
            result["rows"].append({"sizes": asdict(sizes), **asdict(compared)})
        sizes, least = min(found, key=lambda each: each[1].ratio["dense"].median)
        ratio, seconds = least.ratio["dense"], least.seconds["native"].median
        print(
            f"| {dtype}, {'forward + backward' if backward else 'forward'} | {ratio.median:.2f} "
            f"| ({ratio.low:.2f}–{ratio.high:.2f}) | {sizes.seq_len}; {sizes.stride}, "
            f"{sizes.summary}; {sizes.batch}, {sizes.heads} | {1e3 * seconds:.3g} | {len(found)} |",
            flush=True,
        )
    (HERE / "short.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
