"""Print how the code reads, as numbers: the files that a call goes through, and statements.

    python benchmarks/structure.py [--src FOLDER] [--files]

A **walk** is the list of the package's files that one call enters, in order, with consecutive
repeats merged:

    stays     number of entries in the list
    climbs    steps to a file that stands higher in the order of imports
    returns   steps to a file that the call has been in before

A file stands higher than everything it imports. Statements are those of the syntax tree, without
docstrings. `--src` takes the `src` folder of another checkout, so that two can be compared.
"""

from __future__ import annotations

import argparse
import ast
import functools
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from types import FrameType
from typing import Any

PACKAGE = "colonnade"


def statements(file: Path) -> int:
    """Count the statements of a file; docstrings and comments are none."""
    return sum(
        isinstance(node, ast.stmt) and not _is_docstring(node)
        for node in ast.walk(ast.parse(file.read_text()))
    )


def _is_docstring(node: ast.stmt) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


class Heights:
    """Heights of a package's files: each file stands above every file that it imports."""

    def __init__(self, src: Path) -> None:
        self.src = src

    @functools.cache  # noqa: B019  # Lives as long as the script.
    def of(self, file: Path) -> int:
        """Return 0 if a file imports none of the package, else 1 more than the highest import."""
        return max((self.of(each) + 1 for each in self._imported(file) - {file}), default=0)

    def _imported(self, file: Path) -> set[Path]:
        """Return the package's files that the top level of a file imports."""
        files = set()
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.Import):
                files |= {self._file(alias.name) for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                for alias in node.names:  # A submodule, or a name in the module.
                    submodule = self._file(f"{node.module}.{alias.name}")
                    files.add(submodule or self._file(node.module))
        return {file for file in files if file is not None}

    def _file(self, name: str) -> Path | None:
        path = self.src.joinpath(*name.split("."))
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if name.split(".")[0] == PACKAGE and file.is_file():
                return file
        return None


def walk(call: Callable[[], object], src: Path) -> list[Path]:
    """Return the package's files that a call enters, in order, consecutive repeats merged."""
    entered: list[Path] = []
    home = f"{src / PACKAGE}/"

    def watch(frame: FrameType, event: str, _: Any) -> None:
        name = frame.f_code.co_filename
        if event == "call" and name.startswith(home) and entered[-1:] != [Path(name)]:
            entered.append(Path(name))

    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return entered


def calls() -> dict[str, Callable[[], object]]:
    """Return the calls to walk, each made ready: plans are kept and caches are filled."""
    import torch

    import colonnade as col

    torch.set_grad_enabled(False)
    pattern = col.FixedPattern(128, 8)
    query, key, value = torch.randn(3, 1, 4, 1000, 32)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    cu_seqlens = torch.tensor([0, 300, 1000])
    cache = col.KVCache(pattern)
    cache.attend(query, key, value)
    token = [t[:, :, :1] for t in (query, key, value)]
    return {
        "KVCache.attend, one token": lambda: cache.attend(*token),
        "attention": lambda: col.attention(query, key, value, pattern),
        "attention_varlen": lambda: col.attention_varlen(q, k, v, cu_seqlens, pattern),
    }


def main() -> None:
    """Print walks and statements."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--src",
        type=Path,
        default=Path(__file__).parents[1] / "src",
        help="folder that holds the package; by default that of this checkout",
    )
    parser.add_argument("--files", action="store_true", help="list the files of each walk too")
    options = parser.parse_args()
    src = options.src.resolve()
    sys.path.insert(0, str(src))
    heights = Heights(src)
    print(f"{'walk':28}{'stays':>8}{'climbs':>8}{'returns':>8}")
    for name, call in calls().items():
        call()
        files = walk(call, src)
        climbs = sum(heights.of(after) > heights.of(before) for before, after in pairwise(files))
        returns = sum(file in files[:index] for index, file in enumerate(files))
        print(f"{name:28}{len(files):8}{climbs:8}{returns:8}")
        for file in files if options.files else ():
            print(f"    {heights.of(file):3} {file.relative_to(src)}")
    total = sum(statements(file) for file in sorted((src / PACKAGE).rglob("*.py")))
    print(f"{total:,} statements in {PACKAGE}")


if __name__ == "__main__":
    main()
