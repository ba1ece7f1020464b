"""transformers' own common model tests, run against our model.

They are in the source distribution on the package index, not in the wheel, and without two of the
files that they import: those are stubs here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import warnings
from pathlib import Path

import pytest
import transformers

STUBS = {
    "generation/test_utils.py": "class GenerationTesterMixin: ...\n",
    "exporters/test_export.py": "class ExportTesterMixin: ...\n",
    "utils/test_configuration_utils.py": "config_common_kwargs = {}\n",
}
OURS = Path(__file__).with_name("common_model.py")


def _source_distribution(folder: Path) -> Path:
    """Fetch the sources of the transformers that is installed.

    Skips the test, loudly, where the package index cannot be reached, and for no other reason.
    """
    wanted = f"transformers=={transformers.__version__}"
    pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--no-deps"]
    pip += ["--no-build-isolation", "--no-binary", ":all:", "--dest", str(folder), wanted]
    done = subprocess.run(pip, capture_output=True, text=True, timeout=240)
    found = list(folder.glob("transformers-*.tar.gz"))
    if found:  # pip may still have failed to read its metadata, which we do not need.
        return found[0]
    unreachable = "NewConnectionError|ConnectTimeoutError|NameResolutionError|ProxyError"
    if re.search(unreachable, done.stdout + done.stderr):
        warnings.warn("the package index was not reached: NO COMMON MODEL TEST RAN", stacklevel=2)
        pytest.skip("the package index was not reached: NO COMMON MODEL TEST RAN")
    raise AssertionError(done.stderr)


def _lay_out(archive: Path, folder: Path) -> None:
    """Fill a folder `tests` with the common tests, the stubs and ours."""
    tests = folder / "tests"
    with tarfile.open(archive) as content:
        for member in content:
            parts = Path(member.name).parts
            if parts[1:2] == ("tests",) and len(parts) == 3 and member.isfile():
                member.name = parts[2]
                content.extract(member, tests, filter="data")
    for name, text in STUBS.items():
        (tests / name).parent.mkdir()
        (tests / name).write_text(text)
        (tests / name).with_name("__init__.py").touch()
    (tests / "__init__.py").touch()
    shutil.copy(OURS, tests / "test_sparse_transformer.py")
    (folder / "pytest.ini").write_text("[pytest]\npythonpath = .\n")


@pytest.mark.slow
@pytest.mark.plain
@pytest.mark.timeout(600)
@pytest.mark.filterwarnings("default:the package index")
def test_the_common_model_tests_pass(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _lay_out(_source_distribution(tmp_path), tmp_path)
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "--disable-warnings", "tests/test_sparse_transformer.py"],
        cwd=tmp_path,
        env={**os.environ, "RUN_SLOW": "1"},
        capture_output=True,
        text=True,
    )
    with capsys.disabled():
        skips = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED")]
        print("", *skips, done.stdout.splitlines()[-1], sep="\n")
    assert done.returncode == 0, done.stdout
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= 75, done.stdout
    assert sum("ours: " in line for line in skips) == OURS.read_text().count("unittest.skip(") == 2
