"""What the benchmark of a GPU found, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from colonnade.bench import sections
from colonnade.bench.rivals import DENSE, FLASH, FLEX

OTHERS = (*FLASH, "eager")
BARS = {16_384: 8.0, 131_072: 12.0}
"""At least how many times as fast as dense attention backend "triton" is to be, by length."""
Row = dict[str, Any]


def fill(page: str, result: dict[str, Any], picture: str | None) -> str:
    """Return a page of Markdown whose section "measured" holds what was found.

    Raises:
        ValueError: The page has no such section, or several.
    """
    shown = [f"![Speed relative to dense causal attention over the length]({picture})", ""]
    return sections.fill(page, "measured", [*(shown if picture else []), *lines(result)])


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of everything that was found: machine, bars, tables, and what failed."""
    machine = result["machine"]
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    yield f"On {gpus}, with {versions}."
    if result["matrix"]:
        rates = (f"{rate / 1e12:.4g}" for rate in result["matrix"].values())
        yield "A product of two large matrices in bfloat16 reaches {} ({}–{}) TFLOP/s.".format(
            *rates
        )
    rows = list(merged(result["rows"]))
    yield ""
    yield from _bars(rows)
    yield ""
    yield from _table(rows, result["matrix"])
    if any(row["replayed"].get("ratio") for row in rows):
        yield ""
        yield from _replays(rows)
    failed = sorted({(name, why) for row in rows for name, why in row["failed"].items()})
    if failed:
        yield ""
        yield from (f"- {name} did not run everywhere: {why}" for name, why in failed)


def fastest(row: Row, names: Iterator[str] | tuple[str, ...]) -> str | None:
    """Return which of some contenders took the least time, by its median; None if none ran."""
    ran = [name for name in names if name in row["ratio"]]
    return min(ran, key=lambda name: float(row["ratio"][name]["median"]), default=None)


def merged(rows: list[Row]) -> Iterator[Row]:
    """Yield one row for all jobs of one size; times are those of the job with dense attention."""
    by_sizes: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: row["kind"] != "attention"):
        known = by_sizes.setdefault(str(row["sizes"]), {**row, "ratio": {}, "failed": {}})
        known["ratio"] = {**row.get("ratio", {}), **known["ratio"]}
        known["failed"] = {**row["failed"], **known["failed"]}
    yield from sorted(by_sizes.values(), key=lambda row: _order(row["sizes"]))


def _order(sizes: dict[str, Any]) -> tuple[bool, int, int, int]:
    return sizes["backward"], sizes["head_dim"], -sizes["kv_heads"], sizes["seq_len"]


def _bars(rows: list[Row]) -> Iterator[str]:
    """Yield for each bar by how much it is met, at its worst."""
    yield "| n | at least, times dense | found, at its worst |"
    yield "|---|---|---|"
    compared = [(row["sizes"], row["ratio"][name]) for row in rows if (name := fastest_dense(row))]
    compared = [(s, ratio) for s, ratio in compared if s["kv_heads"] == s["heads"]]
    for length, bar in (*BARS.items(), (None, 1.0)):
        medians = [r["median"] for s, r in compared if length in (None, s["seq_len"])]
        least = f"{min(medians):.2f}" if medians else "not measured"
        shown = f"{length:,}" if length else "every length measured"
        yield f"| {shown} | {bar:g} | {least} |"


def fastest_dense(row: Row) -> str | None:
    """Return which of PyTorch's dense kernels took the least time; None if none ran."""
    return fastest(row, tuple(DENSE))


def _table(rows: list[Row], matrix: dict[str, float]) -> Iterator[str]:
    """Yield how many times as long as "triton" each contender takes, and what that one reaches."""
    columns = ["dense", *OTHERS, "flex", "flex, gathered"]
    yield f"| | width; Hkv | n | triton, ms | {' | '.join(columns)} | of the matrix rate | peak |"
    yield "|---" * (6 + len(columns)) + "|"
    for row in rows:
        sizes, seconds = row["sizes"], row.get("seconds", {}).get("triton")
        kind = "forward + backward" if sizes["backward"] else "forward"
        best = [
            fastest_dense(row),
            *(name if name in row["ratio"] else None for name in OTHERS),
            *(
                fastest(row, tuple(name for name in FLEX if name.startswith(f"{of} ")))
                for of in columns[-2:]
            ),
        ]
        found = [
            f"{_times(row['ratio'][name])}{_which(name, column)}" if name else ""
            for name, column in zip(best, columns, strict=True)
        ]
        reached = ""
        if seconds and matrix:
            reached = f"{row['flop'] / seconds['median'] / matrix['median']:.0%}"
        peak = row["peak_bytes"].get("triton")
        yield (
            f"| {kind} | {sizes['head_dim']}; {sizes['kv_heads']} | {sizes['seq_len']:,} | "
            f"{_milliseconds(seconds) if seconds else ''} | {' | '.join(found)} | "
            f"{reached} | {'' if peak is None else f'{peak / _unit(sizes):.2f}'} |"
        )


def _replays(rows: list[Row]) -> Iterator[str]:
    """Yield times and ratios of calls that were replayed from a graph."""
    yield "| replayed from a graph | width; Hkv | n | triton, ms | dense |"
    yield "|---|---|---|---|---|"
    for row in rows:
        replayed, sizes = row["replayed"], row["sizes"]
        if name := fastest({"ratio": replayed.get("ratio", {})}, tuple(DENSE)):
            kind = "forward + backward" if sizes["backward"] else "forward"
            yield (
                f"| {kind} | {sizes['head_dim']}; {sizes['kv_heads']} | {sizes['seq_len']:,} | "
                f"{_milliseconds(replayed['seconds']['triton'])} | "
                f"{_times(replayed['ratio'][name])}{_which(name, 'dense')} |"
            )


def _milliseconds(spread: dict[str, float]) -> str:
    return f"{1e3 * spread['median']:.4g}"


def _times(spread: dict[str, float]) -> str:
    return f"{spread['median']:.2f} ({spread['low']:.2f}–{spread['high']:.2f})"


def _which(name: str, column: str) -> str:
    """Return which of several contenders of a column it was, as in " flash"."""
    return name.removeprefix(column).replace(",", "")


def _unit(sizes: dict[str, Any]) -> int:
    """Return the bytes of q + k + v + out in bfloat16."""
    heads = 2 * (sizes["heads"] + sizes["kv_heads"])
    return 2 * int(sizes["batch"] * sizes["seq_len"] * heads * sizes["head_dim"])
