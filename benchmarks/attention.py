"""Time attention against everything it is compared with on this machine: `make bench`.

It takes hours, and nothing else may run at the same time. Writes benchmarks/attention.json and
docs/performance.svg, and prints Markdown tables. `colonnade.bench` does the measuring and says how.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from colonnade import FixedPattern
from colonnade.bench.flex import compare_tiles
from colonnade.bench.memory import masked_fits, peak
from colonnade.bench.timing import Comparison, Sizes, ceiling, compare, contenders
from colonnade.info import info

HERE = Path(__file__).parent
LENGTHS = (1_024, 2_048, 4_096, 8_192, 16_384, 32_768, 65_536, 131_072)
DTYPES = ("float32", "bfloat16")


def rows(quick: bool) -> Iterator[Sizes]:
    """Yield what to time: lengths, then strides and summaries, parts and grouped heads."""
    for backward in (False, True):
        for dtype in DTYPES:
            base = Sizes(dtype=dtype, backward=backward)
            for length in LENGTHS[:3] if quick else LENGTHS:
                yield replace(base, seq_len=length)
            middle = replace(base, seq_len=4_096 if quick else 8_192)
            yield replace(middle, summary=32)
            yield replace(middle, stride=256, summary=16)
            yield replace(middle, stride=FixedPattern.best_stride(middle.seq_len, 8))
            yield replace(middle, part="local")
            yield replace(middle, part="summary")
            yield replace(middle, kv_heads=2)


def measure(sizes: Sizes, dense_limit: int) -> dict[str, Any]:
    """Measure a row: all contenders that fit, the ceiling, and native's peak memory."""
    names = ["native", "eager"]
    if sizes.seq_len <= dense_limit:
        names.append("dense")
    if masked_fits(sizes):
        names.append("masked")
    rounds = 3 if sizes.seq_len >= 65_536 else 9
    found = compare(contenders(sizes, names), rounds)
    return {
        "sizes": asdict(sizes),
        **asdict(found),
        "ceiling": ceiling(sizes),
        "peak_bytes": peak(sizes, "native"),
        "pairs": sizes.num_pairs(),
    }


def measure_flex(length: int) -> list[dict[str, Any]]:
    """Time FlexAttention at its tiles against native, over all keys and over gathered ones."""
    found = []
    for dtype in DTYPES:
        for gathered in (False, True):
            sizes = Sizes(seq_len=length, dtype=dtype)
            tiles = {
                tile: asdict(each) if isinstance(each, Comparison) else each
                for tile, each in compare_tiles(sizes, gathered).items()
            }
            found.append({"sizes": asdict(sizes), "gathered": gathered, "tiles": tiles})
    return found


def lines(result: dict[str, Any]) -> Iterator[str]:
    """Yield the lines of the Markdown tables."""
    yield "| | n | l, c | native ms | eager | dense | masked | ceiling | peak |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for row in result["rows"]:
        sizes, ratio = row["sizes"], row["ratio"]
        seconds = row["seconds"]["native"]
        kind = sizes["dtype"] + (", with backward" if sizes["backward"] else "")
        if sizes["part"] != "merged":
            kind += f", {sizes['part']}"
        if sizes["kv_heads"] != sizes["heads"]:
            kind += f", {sizes['kv_heads']} key heads"
        times = [
            f"{ratio[name]['median']:.2f} ({ratio[name]['low']:.2f}–{ratio[name]['high']:.2f})"
            if name in ratio
            else ""
            for name in ("eager", "dense", "masked")
        ]
        share = row["ceiling"] / seconds["median"]
        unit = _unit(sizes)
        yield (
            f"| {kind} | {sizes['seq_len']:,} | {sizes['stride']}, {sizes['summary']} | "
            f"{1e3 * seconds['median']:.4g} | {' | '.join(times)} | {share:.0%} | "
            f"{row['peak_bytes'] / unit:.2f} |"
        )
    for each in result["flex"]:
        kind = each["sizes"]["dtype"] + (", gathered keys" if each["gathered"] else "")
        for tile, found in each["tiles"].items():
            if isinstance(found, str):
                yield f"FlexAttention {kind}, tile {tile}: {found}"
            else:
                spread = found["ratio"]["flex"]
                yield (
                    f"FlexAttention {kind}, n = {each['sizes']['seq_len']:,}, tile {tile}: "
                    f"{spread['median']:.1f} ({spread['low']:.1f}–{spread['high']:.1f}) "
                    "times native"
                )


def _unit(sizes: dict[str, Any]) -> int:
    """Return the bytes of q + k + v + out."""
    heads = 2 * (sizes["heads"] + sizes["kv_heads"])
    width = 2 if sizes["dtype"] == "bfloat16" else 4
    return int(sizes["batch"] * sizes["seq_len"] * heads * sizes["head_dim"] * width)


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the speed-up over dense attention against the length, and what the pairs allow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    plain = asdict(Sizes())
    series: dict[str, list[tuple[int, float]]] = {}
    fewer: dict[int, float] = {}
    for row in result["rows"]:
        sizes = row["sizes"]
        shape = {name: sizes[name] for name in ("stride", "summary", "part", "kv_heads")}
        if "dense" not in row["ratio"] or any(shape[name] != plain[name] for name in shape):
            continue
        n = sizes["seq_len"]
        name = sizes["dtype"] + (", forward + backward" if sizes["backward"] else ", forward")
        series.setdefault(name, []).append((n, row["ratio"]["dense"]["median"]))
        fewer[n] = sizes["heads"] * n * (n + 1) / 2 / row["pairs"]
    for name, points in series.items():
        axes.plot(*zip(*sorted(set(points)), strict=True), marker="o", label=name)
    axes.plot(*zip(*sorted(fewer.items()), strict=True), "k--", label="fewer pairs than dense")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("length")
    axes.set_ylabel("times faster than dense causal attention")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Measure every row that is not measured yet, write the results and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="time short lengths only, to try it out"
    )
    parser.add_argument(
        "--dense-limit",
        type=int,
        default=131_072,
        help="longest sequence to time dense attention on",
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that an interrupted benchmark wrote"
    )
    parser.add_argument("--out", type=Path, default=HERE / "attention.json")
    parser.add_argument("--plot", type=Path, default=HERE.parent / "docs" / "performance.svg")
    arguments = parser.parse_args()
    machine = info(["torch"], build=True).for_measurement()
    result: dict[str, Any] = {"machine": machine, "rows": [], "flex": []}
    if arguments.resume:
        earlier = json.loads(arguments.out.read_text())
        if earlier["machine"] != machine:
            parser.error(f"--resume: {arguments.out} was measured on another machine or version")
        result["rows"] = earlier["rows"]
    done = [row["sizes"] for row in result["rows"]]
    for sizes in rows(arguments.quick):
        if asdict(sizes) in done:
            continue
        start = time.monotonic()
        result["rows"].append(measure(sizes, arguments.dense_limit))
        print(f"{sizes} took {time.monotonic() - start:.0f} s", flush=True)
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    result["flex"] = measure_flex(2_048 if arguments.quick else 8_192)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    draw(result, arguments.plot)
    print("\n".join(lines(result)))


if __name__ == "__main__":
    main()
