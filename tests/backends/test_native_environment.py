"""Environments in which there is no native backend: eager runs, and one warning says why."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import colonnade
from colonnade.backends.native import build, compiler
from tests.backends.native_process import TRY, Report, copy_library, fake_compiler, try_native

why_not = colonnade.backends()["native"]
needs_library = pytest.mark.skipif(why_not is not None, reason=f"native {why_not}")

NO_HOME = """
import pathlib
def no_home(cls): raise RuntimeError("Could not determine home directory.")
pathlib.Path.home = classmethod(no_home)
"""
FAIL = "echo 'error: no such header' >&2; exit 1"


def runs_eager(found: Report, *words: str) -> None:
    """The reason is in backends() and in the error of who asked by name."""
    assert found.chosen == "eager"
    for word in words:
        assert word in str(found.why)
        assert word in str(found.asked)


def one_warning(found: Report) -> bool:
    return found.said.count("Backend 'eager' runs instead") == 1


def test_without_a_home(tmp_path: Path) -> None:
    found = try_native("", NO_HOME, XDG_CACHE_HOME="")
    runs_eager(found, "set COLONNADE_CACHE", "home")
    assert one_warning(found)
    kept = try_native(tmp_path, NO_HOME, XDG_CACHE_HOME="", CXX=fake_compiler(tmp_path, FAIL))
    runs_eager(kept, "no such header")


@pytest.mark.parametrize("cache", ["/dev/null/below", "~nobody-of-that-name/cache", "/proc/none"])
def test_a_folder_that_is_none(cache: str) -> None:
    """Nothing can be remembered there, so each process says it."""
    for _ in range(2):
        found = try_native(cache)
        runs_eager(found, "COLONNADE_CACHE")
        assert one_warning(found)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read and write everything")
@pytest.mark.parametrize("mode", [0o000, 0o500])
def test_a_folder_that_may_not_be_used(mode: int, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir(mode=mode)
    runs_eager(try_native(cache), "Set COLONNADE_CACHE")


def test_the_home_may_be_written_as_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("COLONNADE_CACHE", "~/mine")
    assert build.cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("COLONNADE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "~/caches")
    assert build.cache_folder() == tmp_path / "caches" / "colonnade"


@needs_library
@pytest.mark.parametrize("version", ["g++ Gerät", "\\\\377\\\\376", ""])
def test_a_compiler_may_say_anything(version: str, tmp_path: Path) -> None:
    """In an encoding of its own, and nothing at all."""
    script = fake_compiler(tmp_path, copy_library(), version)
    assert try_native(tmp_path / "cache", CXX=script).chosen == "native"


def test_a_locale_of_ascii(tmp_path: Path) -> None:
    """From the very start of Python; the name of the library is that of any other locale."""
    script = fake_compiler(tmp_path, "echo 'Fehler: ungültig' >&2; exit 1")
    cache = tmp_path / "Gerät"
    locale = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    environment = os.environ | locale | {"CXX": script, "COLONNADE_CACHE": str(cache)}
    done = subprocess.run(
        [sys.executable, "-c", TRY], env=environment, capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["chosen"] == "eager"
    assert r"Fehler: ung\xfcltig" in done.stderr
    assert try_native(cache, CXX=script).said == ""


def test_a_package_without_its_sources(tmp_path: Path) -> None:
    """As an application that was frozen without data files, or with some of them."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for place in ("nowhere", "empty", "file"):
        change = f"""
import pathlib
from colonnade.backends.native import build
build.SOURCES = pathlib.Path({str(tmp_path / place)!r})
"""
        runs_eager(try_native(tmp_path / "cache", change), "library.cpp is not there")


def test_stray_files_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(build.SOURCES, tmp_path / "csrc")
    monkeypatch.setattr(build, "SOURCES", tmp_path / "csrc")
    before = build.library_path()
    (tmp_path / "csrc" / ".DS_Store").write_bytes(b"\x00\xff")
    (tmp_path / "csrc" / "library.cpp.orig").write_bytes(b"\xff")
    (tmp_path / "csrc" / "__pycache__").mkdir()
    (tmp_path / "csrc" / "folder.h").mkdir()
    (tmp_path / "csrc" / ".#forward.h").symlink_to("someone@somewhere.1234")
    assert build.library_path() == before
    (tmp_path / "csrc" / "forward.h").write_bytes(b"// \xff, in no encoding\n")
    assert build.library_path() != before


@pytest.mark.parametrize("value", ["0", "false", "False", "no", "OFF"])
def test_it_is_switched_off_in_any_words(value: str, tmp_path: Path) -> None:
    """Without a warning: the user knows."""
    found = try_native(tmp_path, COLONNADE_NATIVE=value)
    runs_eager(found, f"switched off by COLONNADE_NATIVE={value}")
    assert found.said == ""


def test_a_switch_that_is_neither(tmp_path: Path) -> None:
    found = try_native(tmp_path, COLONNADE_NATIVE="perhaps")
    runs_eager(found, "COLONNADE_NATIVE must be 0 or 1, got COLONNADE_NATIVE='perhaps'")
    assert one_warning(found)


@needs_library
@pytest.mark.parametrize("value", ["1", "true", "", "ON"])
def test_it_is_switched_on_in_any_words(value: str) -> None:
    assert try_native(build.cache_folder(), COLONNADE_NATIVE=value).chosen == "native"


@needs_library
def test_a_compiler_with_words_before_and_behind(tmp_path: Path) -> None:
    """Such as CXX="ccache g++"; and in a folder with a space in its name."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    script = fake_compiler(folder, copy_library())
    launcher = tmp_path / "launcher"
    launcher.write_text('#!/bin/sh\nexec "$@"\n')
    launcher.chmod(0o755)
    for number, command in enumerate([script, f"{launcher} '{script}'", f"'{script}' -Wall"]):
        assert try_native(tmp_path / f"cache{number}", CXX=command).chosen == "native"


def test_words_that_cannot_be_read(tmp_path: Path) -> None:
    runs_eager(try_native(tmp_path, CXX="g++ '"), "CXX=", "No closing quotation")
    runs_eager(try_native(tmp_path, COLONNADE_CXXFLAGS='-D"'), "COLONNADE_CXXFLAGS=")
    runs_eager(try_native(tmp_path, CXX="no-such-launcher g++"), "no-such-launcher")


def test_flags_may_hold_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLONNADE_CXXFLAGS", "-O1 -DNAME='a b' \"-I/a folder\"")
    assert compiler.flags()[-3:] == ["-O1", "-DNAME=a b", "-I/a folder"]


def test_a_failure_is_met_once(tmp_path: Path) -> None:
    """Neither compiled nor told again; in backends() it stays, with what may be done."""
    script = fake_compiler(tmp_path, f"echo >>{tmp_path / 'calls'}; {FAIL}")
    first = try_native(tmp_path / "cache", CXX=script)
    calls = (tmp_path / "calls").read_text()
    again = try_native(tmp_path / "cache", CXX=script)
    assert one_warning(first)
    assert "no such header" in first.said
    assert again.said == ""
    assert (tmp_path / "calls").read_text() == calls
    runs_eager(again, "no such header", "colonnade info --build tries again")


@needs_library
def test_a_change_ends_what_is_remembered(tmp_path: Path) -> None:
    """Another flag, the same compiler mended, or a wish to try again."""
    cache = tmp_path / "cache"
    script = fake_compiler(tmp_path, FAIL)
    assert one_warning(try_native(cache, CXX=script))
    assert one_warning(try_native(cache, CXX=script, COLONNADE_CXXFLAGS="-O1"))
    forget = "from colonnade.backends.native.build import forget_failures; forget_failures()\n"
    assert one_warning(try_native(cache, forget, CXX=script))
    os.utime(fake_compiler(tmp_path, copy_library()), ns=(0, 0))
    assert try_native(cache, CXX=script).chosen == "native"


@pytest.mark.parametrize(
    "what",
    [
        "echo 'g++: fatal error: Killed signal' >&2; exit 1",
        "kill -9 $$",
        "echo 'No space left on device' >&2; exit 1",
    ],
)
def test_what_may_pass_is_tried_again(what: str, tmp_path: Path) -> None:
    script = fake_compiler(tmp_path, f"[ -e {tmp_path / 'well'} ] && {{ {FAIL}; }}; {what}")
    runs_eager(try_native(tmp_path / "cache", CXX=script), "could not be built")
    (tmp_path / "well").touch()
    runs_eager(try_native(tmp_path / "cache", CXX=script), "no such header")


def test_a_compiler_that_hangs_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", fake_compiler(tmp_path, "exec sleep 60"))
    monkeypatch.setattr(compiler, "MINUTES", 1 / 600)
    with pytest.raises(compiler.BuildError, match="minutes") as error:
        build.build(tmp_path / "cache" / "native.so")
    assert not error.value.lasting
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_reason_without_a_compiler_is_told_once(tmp_path: Path) -> None:
    first, again = (try_native(tmp_path, CXX="no-such-compiler") for _ in range(2))
    assert one_warning(first)
    assert again.said == ""
    runs_eager(again, "none by the name of no-such-compiler")
    assert one_warning(try_native(tmp_path, CXX="another-that-is-not-there"))


@needs_library
@pytest.mark.parametrize(
    ("lacking", "threads"),
    [
        ("-march=native", True),
        ("[^g] -fopenmp", True),
        ("-march=native|-mcpu=native", True),
        ("openmp", False),
    ],
)
def test_options_that_a_compiler_lacks_are_left_out(
    lacking: str, threads: bool, tmp_path: Path
) -> None:
    """As Apple's clang lacks them; `-Xclang -fopenmp` stands behind `-fopenmp`."""
    refuse = f"echo \"$all\" | grep -Eqe '{lacking}' && {{ echo unsupported >&2; exit 1; }}"
    script = fake_compiler(tmp_path, f"{refuse}; {copy_library()}")
    found = try_native(tmp_path / "cache", CXX=script)
    assert found.chosen == "native"
    assert ("one thread" in found.said) == (not threads)


@pytest.mark.parametrize("said", ["unrecognized command line option '-std=c++20'", "invalid value"])
def test_a_compiler_without_the_standard_is_refused_in_words(said: str, tmp_path: Path) -> None:
    what = f'case "$all" in *c++20*) echo "{said}" >&2; exit 1;; esac; touch "$out"'
    found = try_native(tmp_path / "cache", CXX=fake_compiler(tmp_path, what))
    runs_eager(found, "C++20, as g++ 10 and clang 10 do", said)


def test_a_compiler_that_writes_nothing(tmp_path: Path) -> None:
    found = try_native(tmp_path / "cache", CXX=fake_compiler(tmp_path, "true"))
    runs_eager(found, "ended with 0")
