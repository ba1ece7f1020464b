"""Tables of the machine code of the Triton kernels, and of the times predicted from it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby, product
from typing import Any

from colonnade.backends.triton.configurations import (
    DROPS,
    KERNELS,
    Configuration,
    Kernel,
    Words,
)
from colonnade.bench import sections
from colonnade.bench.machine_code import (
    DROPPING_TARGETS,
    DROPPING_WIDTHS,
    DTYPES,
    WIDTHS,
    Case,
    Code,
)
from colonnade.bench.roofline import GPUS, Gpu, Prediction, predict
from colonnade.pattern import FixedPattern

LENGTHS = tuple(1_024 << power for power in range(8))
PATTERN, HEADS = FixedPattern(128, 8), 16


def fill(page: str, result: dict[str, Any]) -> str:
    """Return a page of Markdown whose sections "machine code" and "prediction" hold the tables.

    Raises:
        ValueError: The page has no such section, or several.
    """
    page = sections.fill(page, "machine code", tables(result))
    return sections.fill(page, "prediction", predictions(result))


def tables(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the tables in Markdown: widths 64 and 128 in bfloat16, then the rest."""
    rows = _by_case(result)
    yield (
        f"By Triton {result['triton']}, in bfloat16. Each cell: registers of a thread, bytes "
        "spilled, KiB of shared memory, matrix instructions, programs that a processor holds at "
        "once."
    )
    yield ""
    yield "| device | width | forward | gradients of queries | of slots | of own keys |"
    yield "|---|---|---|---|---|---|"
    for target, width in product(result["targets"], (64, 128)):
        cells = (_cell(rows[Case(kernel, target, "bf16", width)]) for kernel in KERNELS)
        yield f"| {target} | {width} | {' | '.join(cells)} |"
    yield ""
    dropping = [t for t in result["targets"] if t in DROPPING_TARGETS]
    if dropping:
        yield "With dropout, where words are computed for four keys at once:"
        yield ""
        yield "| device | width | forward | gradients of queries | of slots | of own keys |"
        yield "|---|---|---|---|---|---|"
    for target, width in product(dropping, (64, 128)):
        cells = (_cell(rows[Case(kernel, target, "bf16", width, "quads")]) for kernel in KERNELS)
        yield f"| {target} | {width} | {' | '.join(cells)} |"
    if dropping:
        yield ""
    yield "Most bytes spilled by any kernel at widths " + ", ".join(map(str, WIDTHS)) + ":"
    yield ""
    yield f"| device | {' | '.join(DTYPES)} |"
    yield "|---" * (len(DTYPES) + 1) + "|"
    for target in result["targets"]:
        cells = (_spilled(_some(result, target, dtype, ("none",))) for dtype in DTYPES)
        yield f"| {target} | {' | '.join(cells)} |"
    if not dropping:
        return
    yield ""
    yield "With dropout, in either way, at widths " + ", ".join(map(str, DROPPING_WIDTHS)) + ":"
    yield ""
    yield f"| device | {' | '.join(DTYPES)} |"
    yield "|---" * (len(DTYPES) + 1) + "|"
    for target in dropping:
        cells = (_spilled(_some(result, target, dtype, DROPS)) for dtype in DTYPES)
        yield f"| {target} | {' | '.join(cells)} |"


def _by_case(result: dict[str, Any]) -> dict[Case, dict[str, Any]]:
    return {Case(*(row[name] for name in Case._fields)): row for row in result["rows"]}


def _some(
    result: dict[str, Any], target: str, dtype: str, words: tuple[Words, ...]
) -> list[dict[str, Any]]:
    return [
        row
        for row in result["rows"]
        if row["target"] == target and row["dtype"] == dtype and row["words"] in words
    ]


def _cell(row: dict[str, Any]) -> str:
    if row.get("code") is None:
        return "declined" if row.get("declined") else "does not compile"
    code = Code(**row["code"])
    return (
        f"{code.registers}, {code.spilled}, {code.shared / 1024:.0f}, {code.matrix}, {code.blocks}"
    )


def _spilled(rows: list[dict[str, Any]]) -> str:
    """Return the most bytes spilled at each width; or that some kernel has no code."""
    if not rows:
        return "no such instruction"
    words = []
    for _, of_width in groupby(rows, key=lambda row: row["width"]):
        some = list(of_width)
        without = [_cell(row) for row in some if row.get("code") is None]
        words.append(without[0] if without else str(max(row["code"]["spilled"] for row in some)))
    return ", ".join(words)


def predictions(result: dict[str, Any]) -> Iterator[str]:
    """Yield a table in Markdown of the predicted times, and what is to be compared with them."""
    rows = _by_case(result)
    columns = "GPU, width, n, wanted, forward: ms, × dense, with backward: ms, × dense, measured"
    yield f"| {columns.replace(', ', ' | ')} |"
    yield "|---" * (columns.count(",") + 1) + "|"
    for (name, gpu), width, length in product(GPUS.items(), (64, 128), LENGTHS):
        of_kernel = {kernel: rows[Case(kernel, gpu.target, "bf16", width)] for kernel in KERNELS}
        if any(row.get("code") is None for row in of_kernel.values()):
            continue
        once, both = (_predict(gpu, length, width, of_kernel, way) for way in (False, True))
        yield (
            f"| {name} | {width} | {length:,} | {once.wanted:.0%} | {1e3 * once.seconds:.3g} | "
            f"{once.dense / once.seconds:.1f} | {1e3 * both.seconds:.3g} | "
            f"{both.dense / both.seconds:.1f} | |"
        )


def _predict(
    gpu: Gpu, length: int, width: int, rows: dict[Kernel, dict[str, Any]], backward: bool
) -> Prediction:
    configurations = {kernel: Configuration(**row["configuration"]) for kernel, row in rows.items()}
    blocks = {kernel: int(row["code"]["blocks"]) for kernel, row in rows.items()}
    return predict(gpu, length, width, HEADS, configurations, blocks, backward, PATTERN)
