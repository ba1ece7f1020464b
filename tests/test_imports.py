"""The law of the tree: which file may import which, read from the source.

pattern → plan → backends → ops → {cache, parallel} → nn → hf → train → cli, with shapes below
everything, and besides plot (patterns and shapes only), cost (these and plan), info (the public
names) and bench (whatever lies below hf).
"""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import colonnade
from colonnade.backends.tracing.constant import constant_when_compiled

ROOT = Path(colonnade.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

LEVELS = {
    "shapes": 0,
    "pattern": 1,
    "plan": 2,
    "backends": 3,
    "ops": 4,
    "cache": 5,
    "parallel": 5,
    "nn": 6,
    "__init__": 7,  # the public names
    "hf": 8,
    "train": 9,
    "cli": 10,
}
BESIDE = {
    "plot": {"shapes", "pattern"},
    "cost": {"shapes", "pattern", "plan"},
    "info": {"__init__"},
    "bench": {
        "shapes",
        "pattern",
        "plan",
        "backends",
        "ops",
        "cache",
        "parallel",
        "nn",
        "__init__",
        "bench",
    },
}
MAY_IMPORT = BESIDE | {
    part: {below for below, level in LEVELS.items() if level < LEVELS[part] or below == part}
    for part in LEVELS
}
MAY_IMPORT["hf"] |= {"cost", "plot"}
MAY_IMPORT["cli"] |= set(BESIDE)
MAY_IMPORT["train"] |= {"cost"}
OF_HF = {"transformers", "tokenizers", "accelerate", "safetensors"}
"""Packages of the extras, which no file below hf may need."""


def _part(file: Path) -> str:
    """Return the folder or file right under colonnade that a file belongs to."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def _is_module(name: str) -> bool:
    path = ROOT.parent.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def _imports(file: Path) -> Iterator[str]:
    """Yield every module that a file imports, anywhere in it; submodules by their full name."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import"
            assert node.module is not None
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in names if name.startswith("colonnade") and _is_module(name)}
            yield from modules
            if modules != names:
                yield node.module


def _parts_imported(file: Path) -> set[str]:
    ours = [name.split(".") for name in _imports(file) if name.split(".")[0] == "colonnade"]
    return {name[1] if len(name) > 1 else "__init__" for name in ours}


def _name(file: Path) -> str:
    return str(file.relative_to(ROOT))


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_imports_go_one_way(file: Path) -> None:
    part = _part(file)
    assert part in MAY_IMPORT, f"{part} has no place in the order of imports yet"
    assert _parts_imported(file) <= MAY_IMPORT[part]


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_only_the_upper_parts_import_transformers(file: Path) -> None:
    packages = {name.split(".")[0] for name in _imports(file)}
    if _part(file) not in ("hf", "train", "cli"):
        assert not packages & OF_HF
    if _part(file) != "plot":
        assert "matplotlib" not in packages


def test_the_law_sees_what_it_forbids(tmp_path: Path) -> None:
    """The reader of imports itself: inside functions, by `from`, of submodules and of names."""
    file = tmp_path / "example.py"
    file.write_text(
        "import transformers.utils\n"
        "from colonnade import nn, attention\n"
        "def f():\n"
        "    from colonnade.ops import check\n"
        "    from colonnade.ops.attention import attention\n"
    )
    assert set(_imports(file)) == {
        "transformers.utils",
        "colonnade.nn",
        "colonnade",
        "colonnade.ops.check",
        "colonnade.ops.attention",
    }
    assert _parts_imported(file) == {"nn", "__init__", "ops"}


@pytest.mark.parametrize("file", [f for f in FILES if _part(f) == "backends"], ids=_name)
def test_no_backend_imports_another(file: Path) -> None:
    """Neither the reference, which they are held to, nor one another."""
    own = file.relative_to(ROOT / "backends").parts[0].removesuffix(".py")
    if own in colonnade.backends():
        names = [name.split(".") for name in _imports(file)]
        ours = {name[2] for name in names if name[:2] == ["colonnade", "backends"]}
        assert not ours & {*colonnade.backends(), "choice"} - {own}


def _divides_by_stride(tree: ast.AST) -> bool:
    """Whether positions are split into block and offset somewhere: the index arithmetic."""
    for node in ast.walk(tree):
        match node:
            case ast.BinOp(op=ast.Mod() | ast.FloorDiv(), right=divisor):
                pass
            case ast.AugAssign(op=ast.Mod() | ast.FloorDiv(), value=divisor):
                pass
            case ast.Call(func=ast.Name(id="divmod"), args=[_, divisor]):
                pass
            case _:
                continue
        if "stride" in (getattr(divisor, "id", ""), getattr(divisor, "attr", "")):
            return True
    return False


@pytest.mark.parametrize(
    ("source", "divides"),
    [
        ("i % stride", True),
        ("i // self.stride", True),
        ("i %= pattern.stride", True),
        ("divmod(i, p.stride)", True),
        ("-(-n // stride)", True),
        ("i * stride + n // 2", False),
    ],
)
def test_the_search_sees_index_arithmetic(source: str, divides: bool) -> None:
    assert _divides_by_stride(ast.parse(source)) is divides


KNOW_BLOCKS = ("pattern.py", *(f"plan/{name}.py" for name in ("table", "kept", "static", "lines")))


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_only_pattern_and_plan_know_blocks(file: Path) -> None:
    """So an off-by-one can hide in a few files only; these must be seen to do this at all."""
    if _name(file) in KNOW_BLOCKS:
        assert _divides_by_stride(ast.parse(file.read_text()))
    else:
        assert not _divides_by_stride(ast.parse(file.read_text()))


LAID_OUT = {"nn/embedding.py", "backends/eager/windowed.py"}
"""Files that lay a sequence out in lines as wide as a stride, and so count its lines."""


@pytest.mark.parametrize("file", FILES, ids=_name)
def test_who_counts_blocks_is_named(file: Path) -> None:
    """A number of blocks times the stride is a division by it under another name."""
    counts = "colonnade.plan.lines" in set(_imports(file))
    assert counts == (_name(file) in LAID_OUT | {"plan/table.py"})


def test_importing_colonnade_loads_no_heavy_package() -> None:
    """In a fresh interpreter: neither the extras nor a compiler, which takes over a second."""
    code = "import colonnade, json, sys; print(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(json.loads(done.stdout))
    loaded = {name.split(".")[0] for name in modules}
    assert "colonnade" in loaded
    assert not loaded & (OF_HF | {"triton", "matplotlib", "typer", "rich"})
    assert not modules & {"torch._dynamo", "torch._inductor", "torch.utils.flop_counter"}


def test_a_function_is_marked_constant_as_the_compiler_does() -> None:
    """The mark is ours, because PyTorch's decorator loads all of torch._dynamo."""

    def marked() -> None: ...

    def ours() -> None: ...

    torch.compiler.assume_constant_result(marked)
    assert vars(marked)
    assert vars(constant_when_compiled(ours)) == vars(marked)


def test_all_names_are_there() -> None:
    """`__all__` promises nothing that is missing, in each package."""
    for module in (colonnade, colonnade.nn):
        assert len(set(module.__all__)) == len(module.__all__)
        assert all(hasattr(module, name) for name in module.__all__)
