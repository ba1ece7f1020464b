"""Check the documentation: its Python runs, its comments are true, and its links lead to files.

The Python blocks of a file run in order, in one namespace and in an empty folder, as if a reader
typed them in. A comment at the end of a line that prints must be exactly the text printed.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
WITH_CODE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WITH_LINKS = [
    *WITH_CODE,
    *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "DESIGN")),
]


def _name(file: Path) -> str:
    return str(file.relative_to(ROOT))


def _blocks(file: Path) -> Iterator[str]:
    """Yield the Python blocks, each after as many empty lines as the file has lines before it."""
    text = file.read_text()
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    assert len(blocks) == text.count("```python"), f"{file.name}: a block is indented or open"
    for block in blocks:
        yield "\n" * text.count("\n", 0, block.start(1)) + block[1]


def _comments(source: str) -> dict[int, str]:
    """Return the comment on each line, without its mark."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return {t.start[0]: t.string.lstrip("# ") for t in tokens if t.type == tokenize.COMMENT}


def _run(file: Path) -> None:
    """Run the blocks of a file as a reader would, and hold them to what they say they print."""
    namespace: dict[str, Any] = {"__name__": "__main__"}
    for source in _blocks(file):
        comments = _comments(source)
        for statement in ast.parse(source, str(file)).body:
            out = io.StringIO()
            with redirect_stdout(out):
                exec(compile(ast.Module([statement], []), str(file), "exec"), namespace)
            line = statement.end_lineno
            if ast.unparse(statement).startswith("print(") and line in comments:
                printed, claimed = out.getvalue().rstrip("\n"), comments[line]
                assert printed == claimed, f"{file.name}:{line} prints {printed!r}, not {claimed!r}"


# A compiler does not follow run-time checks of types.
@pytest.mark.parametrize(
    "file",
    [
        pytest.param(each, marks=[pytest.mark.plain] * ("compile_config(" in each.read_text()))
        for each in WITH_CODE
    ],
    ids=_name,
)
def test_python_runs_and_prints_what_it_says(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    _run(file)


def test_a_mistake_is_found_at_its_line(tmp_path: Path) -> None:
    """Later blocks see earlier names; a false comment and an exception are reported at a line."""
    file = tmp_path / "page.md"
    first = "# Page\n\n```python\nx = [1, 2]\nprint(x)  # [1, 2]\n```\n\n"
    file.write_text(first + "```python\nprint(len(x))  # 2\n```\n")
    _run(file)
    file.write_text(first + "```python\nprint(len(x))  # 3\n```\n")
    with pytest.raises(AssertionError, match=r"page\.md:9 prints '2', not '3'"):
        _run(file)
    file.write_text(first + "```python\n\ny\n```\n")
    with pytest.raises(NameError) as raised:
        _run(file)
    assert (raised.traceback[-1].path, raised.traceback[-1].lineno + 1) == (file, 10)


@pytest.mark.parametrize("file", WITH_LINKS, ids=_name)
def test_links_lead_to_files(file: Path) -> None:
    links = re.findall(r"\]\(([^()\s]+)\)|\b(?:src|href)=\"([^\"]+)\"", file.read_text())
    paths = [(link or attribute).split("#")[0] for link, attribute in links]
    missing = [path for path in paths if "://" not in path and not (file.parent / path).exists()]
    assert not missing
