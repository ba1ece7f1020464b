"""Time backend "triton" against everything it is compared with on a GPU; `make gpu` runs it.

Nothing else may run on the GPU. Writes benchmarks/gpu.json after each row, those first that most
depends on, then docs/gpu.svg and the marked section of docs/gpu.md, and prints that section. Of a
run that was killed, `--report` writes these two, on any machine. `colonnade.bench.device` does the
timing and says how.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from colonnade.bench.device import matrix_rate
from colonnade.bench.report import fastest_dense, fill, lines, merged
from colonnade.bench.rows import HEADS, LENGTHS, WIDTHS, DeviceLostError, jobs, measure
from colonnade.info import info

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "gpu.md"
PACKAGES = ("torch", "triton", "flash_attn", "flash_attn_3")


def machine() -> dict[str, Any]:
    """Return what the times depend on."""
    found = info(PACKAGES)
    versions = {name: version for name, version in found.versions.items() if version}
    return {**found.for_measurement(), "versions": versions, "gpus": found.gpus}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="time 1,024 and 16,384 alone, in few rounds"
    )
    parser.add_argument("--lengths", type=int, nargs="+", help="lengths to time")
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, help="widths of a head")
    parser.add_argument("--heads", type=int, default=HEADS, help="number of query heads")
    parser.add_argument("--kinds", nargs="+", default=("attention", "flex"), help="kinds of jobs")
    parser.add_argument("--rounds", type=int, help="number of times that each contender runs")
    parser.add_argument("--matrix", type=int, default=8_192, help="rows of the large matrices")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="begin no row after that long"
    )
    parser.add_argument(
        "--resume", action="store_true", help="keep the rows that an earlier run wrote, if any"
    )
    parser.add_argument(
        "--report", action="store_true", help="measure nothing; write the page of an earlier run"
    )
    parser.add_argument("--out", type=Path, default=HERE / "gpu.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser.parse_args()


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw the speed-up over dense attention against the length, and what the pairs allow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.add_subplot()
    series: dict[str, list[tuple[int, float]]] = {}
    fewer: dict[int, float] = {}
    for row in merged(result["rows"]):
        sizes, name = row["sizes"], fastest_dense(row)
        n = sizes["seq_len"]
        fewer[n] = sizes["batch"] * sizes["heads"] * n * (n + 1) / 2 / row["pairs"]
        if name and sizes["kv_heads"] == sizes["heads"]:
            kind = "forward + backward" if sizes["backward"] else "forward"
            points = series.setdefault(f"width {sizes['head_dim']}, {kind}", [])
            points.append((n, row["ratio"][name]["median"]))
    for name, points in series.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", label=name)
    axes.plot(*zip(*sorted(fewer.items()), strict=True), "k--", label="fewer pairs than dense")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("length")
    axes.set_ylabel("times faster than dense causal attention")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(path)


def main() -> None:
    """Measure every row that is not measured yet, write the results and print them."""
    given = parse()
    if given.report:
        write(json.loads(given.out.read_text()), given.page)
        return
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    until = given.until or time.time() + given.seconds
    if device.type == "cpu" and given.page == PAGE:
        sys.exit(f"The times of a CPU are not for {PAGE}: name another --page.")
    result: dict[str, Any] = {"machine": machine(), "matrix": {}, "rows": []}
    if given.resume and given.out.exists():
        earlier = json.loads(given.out.read_text())
        if earlier["machine"] != result["machine"]:
            sys.exit(f"--resume: {given.out} was measured on another machine or version")
        result = earlier
    if not result["matrix"]:
        result["matrix"] = asdict(matrix_rate(device, torch.bfloat16, given.matrix, rounds=9))
    done = [(row["kind"], row["sizes"]) for row in result["rows"]]
    lengths = given.lengths or ((1_024, 16_384) if given.quick else LENGTHS)
    rounds = given.rounds or (5 if given.quick else None)
    for job in jobs(lengths, given.widths, given.heads):
        if job.kind not in given.kinds or (job.kind, asdict(job.sizes)) in done:
            continue
        if time.time() > until:
            print("The time is up. --resume goes on from here.", flush=True)
            break
        start = time.monotonic()
        try:
            row = measure(job, device, rounds)
        except DeviceLostError as lost:
            result["rows"].append(lost.row)
            save(result, given.out)
            print(f"{lost} {lost.row['failed']}", flush=True)
            again = [*sys.argv, "--resume", "--until", str(until)]
            os.execv(sys.executable, [sys.executable, *again])
        result["rows"].append(row)
        save(result, given.out)
        print(f"{job} took {time.monotonic() - start:.0f} s", flush=True)
    write(result, given.page)


def save(result: dict[str, Any], path: Path) -> None:
    """Write what was found in one step: whoever ends this process leaves a whole file."""
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps(result, indent=1) + "\n")
    unfinished.replace(path)


def write(result: dict[str, Any], page: Path) -> None:
    """Print what was found, and write it into a page with its picture, if there is one."""
    print("\n".join(lines(result)))
    if not page.exists():
        print(f"There is no {page}, so nothing was written there.")
        return
    picture = page.with_suffix(".svg")
    try:
        draw(result, picture)
    except ModuleNotFoundError as error:
        print(f"No picture: {error}.")
    page.write_text(fill(page.read_text(), result, picture.name if picture.exists() else None))


if __name__ == "__main__":
    main()
