"""``make setup`` with a stand-in for Python, whose pip only notes that it was called and exits with $PIP_STATUS."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYTHON = f"""#!/bin/sh
case "$1 $2" in
    "-m venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
    "-m pip") [ "$3" = --version ] || {{ echo "$*" >> pip.log; exit $PIP_STATUS; }} ;;
    "-m benchmarks") echo "$*" >> bench.log ;;
    -c*) exec {sys.executable} -c "import sys; sys.version_info = ($VERSION); exec(sys.argv[1])" "$2" ;;
esac
"""


@pytest.fixture
def folder(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    for name in ("Makefile", "requirements.txt", "setup.py"):
        shutil.copy2(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    return tmp_path


def make_setup(folder: Path, *words, python="./python", version="3, 12", pip_status=0) -> subprocess.CompletedProcess:
    environment = os.environ | {"PIP_STATUS": str(pip_status), "VERSION": version}
    command = ["make", *(words or ["setup"]), f"PYTHON={python}"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def installations(folder: Path) -> int:
    return len((folder / "pip.log").read_text().splitlines())


def test_setup_installs_once(folder):
    assert make_setup(folder).returncode == 0
    assert make_setup(folder).returncode == 0
    assert installations(folder) == 1


@pytest.mark.parametrize("changed", ["requirements.txt", "setup.py"])
def test_setup_installs_again_when_what_is_needed_changes(folder, changed):
    make_setup(folder)
    later = (folder / ".venv/installed").stat().st_mtime + 10
    os.utime(folder / changed, (later, later))
    assert make_setup(folder).returncode == 0
    assert installations(folder) == 2


def test_setup_that_failed_is_taken_up_again(folder):
    assert make_setup(folder, pip_status=1).returncode != 0
    assert make_setup(folder).returncode == 0
    assert installations(folder) == 2


@pytest.mark.parametrize("version", ["3, 10", "2, 7"])
def test_setup_refuses_an_old_python(folder, version):
    run = make_setup(folder, version=version)
    assert run.returncode != 0
    assert "Python 3.11 or newer is needed; ./python is older" in run.stderr
    assert not (folder / ".venv").exists()


def test_setup_says_so_when_there_is_no_python(folder):
    run = make_setup(folder, python="no-such-python")
    assert run.returncode != 0
    assert "No 'no-such-python' here" in run.stderr


def test_bench_installs_what_it_compares_with_once_and_hands_on_the_data(folder):
    assert make_setup(folder, "bench").returncode == 0
    assert make_setup(folder, "bench", "IMAGES=my photos").returncode == 0
    installed = (folder / "pip.log").read_text().splitlines()
    assert len(installed) == 2 and installed[1].endswith("--editable .[bench]")
    called = (folder / "bench.log").read_text().splitlines()
    assert called == ["-m benchmarks --images  --root ", "-m benchmarks --images my photos --root "]


def test_help_names_every_target(folder):
    said = make_setup(folder, "help").stdout
    phony = next(line for line in (folder / "Makefile").read_text().splitlines() if line.startswith(".PHONY: "))
    assert [name for name in phony.split()[1:] if f"\n  {name} " not in said] == []
