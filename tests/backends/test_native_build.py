"""Building the C++: the cache, its key, and everything that may go wrong on the way."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

import colonnade
from colonnade.backends.native import build, compiler
from tests.backends.native_process import (
    Report,
    copy_library,
    fake_compiler,
    report_of,
    start_trying,
    try_native,
)

why_not = colonnade.backends()["native"]
pytestmark = pytest.mark.skipif(why_not is not None, reason=f"native {why_not}")


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"COLONNADE_NATIVE": "0"}, "switched off by COLONNADE_NATIVE=0"),
        ({"CXX": "no-such-compiler"}, "none by the name of no-such-compiler"),
        ({"COLONNADE_CACHE": "/dev/null/below"}, "/dev/null/below.*Set COLONNADE_CACHE"),
    ],
)
def test_where_it_cannot_run_it_says_why(
    environment: dict[str, str], reason: str, tmp_path: Path
) -> None:
    """In backends() and in the error of who asked for it by name; "auto" takes eager."""
    found = try_native(tmp_path, **environment)
    assert found.chosen == "eager"
    assert found.why is not None
    assert found.asked is not None
    for said in (found.why, found.asked):
        assert re.search(reason, said)
    assert found.asked.endswith("Use backend='eager'.")


def test_a_failing_compiler_is_quoted(tmp_path: Path) -> None:
    """Its last lines; only they are left in the cache."""
    script = fake_compiler(tmp_path, "echo 'error: no such header' >&2; exit 3")
    found = try_native(tmp_path / "cache", CXX=script)
    assert "ended with 3, saying\nerror: no such header" in str(found.why)
    assert found.chosen == "eager"
    (left,) = (tmp_path / "cache").iterdir()
    assert left.suffix == ".failed"


def test_a_library_that_does_not_load_is_named(tmp_path: Path) -> None:
    script = fake_compiler(tmp_path, 'echo "not a library" >"$out"')
    found = try_native(tmp_path / "cache", CXX=script)
    assert "could not load what it built" in str(found.why)
    assert "Delete" in str(found.why)
    assert found.chosen == "eager"


def test_it_is_built_once_and_says_so_in_one_line(tmp_path: Path) -> None:
    script = fake_compiler(tmp_path, copy_library())
    found = try_native(tmp_path / "cache", CXX=script)
    assert found == Report(why=None, asked=None, chosen="native", said=found.said)
    assert len(found.said.splitlines()) == 1
    assert "Compiling the native kernel" in found.said
    (library,) = (tmp_path / "cache").iterdir()
    again = try_native(tmp_path / "cache", CXX=script)
    assert again == Report(why=None, asked=None, chosen="native", said="")
    assert list((tmp_path / "cache").iterdir()) == [library]


def test_a_killed_builder_is_in_nobodys_way(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    slow = fake_compiler(tmp_path, 'echo half >"$out"; sleep 600')
    victim = start_trying(cache, CXX=slow)
    while not list(cache.glob("building-*/*.so")):
        assert victim.process.is_alive()
        time.sleep(0.05)
    victim.kill()
    found = try_native(cache, CXX=fake_compiler(tmp_path, copy_library()))
    assert found.chosen == "native"


def test_several_builders_at_once(tmp_path: Path) -> None:
    script = fake_compiler(tmp_path, f"sleep 1; {copy_library()}")
    started = [start_trying(tmp_path / "cache", CXX=script) for _ in range(4)]
    assert [report_of(process).chosen for process in started] == ["native"] * 4
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.slow
def test_eight_real_builders_at_once(tmp_path: Path) -> None:
    started = [start_trying(tmp_path / "cache") for _ in range(8)]
    assert [report_of(process).chosen for process in started] == ["native"] * 8
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.slow
def test_a_real_builder_killed_in_the_middle(tmp_path: Path) -> None:
    victim = start_trying(tmp_path / "cache")
    while not list(tmp_path.glob("cache/building-*")):
        time.sleep(0.05)
    time.sleep(3)
    victim.kill()
    assert try_native(tmp_path / "cache").chosen == "native"


def test_what_it_depends_on_is_in_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another flag, torch, processor or compiler means another library."""
    paths = [build.library_path()]
    with monkeypatch.context() as patch:
        patch.setenv("COLONNADE_CXXFLAGS", "-O1")
        paths.append(build.library_path())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9.9")
        paths.append(build.library_path())
    with monkeypatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", lambda: {"sse": True})
        paths.append(build.library_path())
    with monkeypatch.context() as patch:
        patch.setattr(compiler, "_version", lambda command: "another compiler")
        paths.append(build.library_path())
    assert len(set(paths)) == len(paths)
    assert build.library_path() == paths[0]


def test_the_cache_lies_where_users_keep_caches(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("COLONNADE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.cache_folder() == tmp_path / "colonnade"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert build.cache_folder() == Path.home() / ".cache" / "colonnade"
    monkeypatch.setenv("COLONNADE_CACHE", str(tmp_path / "mine"))
    assert build.cache_folder() == tmp_path / "mine"
    assert "info --build" in str(build.reason_unusable(build=False))
