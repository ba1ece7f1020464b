"""Compile every kernel of backend "triton" for GPUs that are not there: `make gpu-code`.

It takes 25 minutes on two cores. Each kernel × device × type × width is compiled at its
configuration of the table, some of them with dropout too, and held to the bounds of
`colonnade.bench.machine_code`. Writes benchmarks/gpu_code.json and the tables in docs/gpu.md, and
exits with 1 if a row of the table does not fit, or if half precision up to width 128 is declined on
compute capability 8.0, 9.0 or 10.0.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

try:
    import triton
except ModuleNotFoundError:
    sys.exit("colonnade: this needs the package triton; on Linux `pip install triton` gets it.")

from colonnade.backends.triton.configurations import CHECKED
from colonnade.bench.code_report import fill, tables
from colonnade.bench.machine_code import every_case, measure, wrong

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "gpu.md"


def main() -> int:
    """Compile everything, write what was found, and return 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--targets", nargs="+", choices=CHECKED, default=list(CHECKED))
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes side by side")
    parser.add_argument("--out", type=Path, default=HERE / "gpu_code.json")
    parser.add_argument("--page", type=Path, default=PAGE)
    arguments = parser.parse_args()
    cases = every_case(tuple(arguments.targets))
    started, rows = time.monotonic(), []
    with ProcessPoolExecutor(arguments.jobs) as pool:
        for done, row in enumerate(pool.map(measure, cases), start=1):
            rows.append(row)
            if why := wrong(row):
                print(why, flush=True)
            if done % 100 == 0:
                print(f"{done} of {len(cases)}, {time.monotonic() - started:.0f} s", flush=True)
    result = {"triton": triton.__version__, "targets": arguments.targets, "rows": rows}
    lines = ",\n".join(map(json.dumps, rows))
    head = json.dumps({key: result[key] for key in ("triton", "targets")})[1:-1]
    arguments.out.write_text(f'{{{head}, "rows": [\n{lines}\n]}}\n')
    if arguments.targets == list(CHECKED):
        arguments.page.write_text(fill(arguments.page.read_text("utf-8"), result), "utf-8")
    else:
        print("\n".join(tables(result)))
    faults = [row for row in rows if wrong(row)]
    declined = sum(bool(row.get("declined")) for row in rows)
    print(f"{len(rows)} kernels, {declined} declined, {len(faults)} wrong.")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
