"""Spring traps: ``python tests/spring.py FOLDER NUMBER...`` prints, as JSON, how the tests of TRAPS[NUMBER] ended.

Each trap goes into a copy of the tree of its own, and its test runs in a process forked from this one, which has
imported what the tests need from others, and nothing of ours. First all of these tests run in a copy without a trap.
"""

import importlib
import json
import multiprocessing
import os
import shutil
import sys
import types
from collections.abc import Iterable
from pathlib import Path

from traps import TRAPS, Trap

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("common", "configs", "docs", "instdisc", "metric_learning", "moco", "tests", "tools")
NOT_OURS = ("PIL.Image", "_pytest.assertion.rewrite", "numpy", "pytest", "sklearn.datasets", "timm", "torch",
            "torch._dynamo", "torch.distributed", "torchvision", "yaml")
PATIENCE = 600          # seconds after which tests are held to hang


def main() -> None:
    folder, traps = Path(sys.argv[1]), [TRAPS[int(number)] for number in sys.argv[2:]]
    for name in NOT_OURS:
        importlib.import_module(name)
    statuses = [outcome({trap.test for trap in traps}, folder / "none", None)]
    print(json.dumps(statuses + [outcome({trap.test}, folder / str(i), trap) for i, trap in enumerate(traps)]))


def outcome(tests: Iterable[str], folder: Path, trap: Trap | None) -> int | None:
    """pytest's exit status: 0 where all passed, 1 where one failed. What it said is in ``folder``.out."""
    copy(folder, trap)
    process = multiprocessing.get_context("fork").Process(target=run, args=(sorted(tests), folder))
    process.start()
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        process.join()
    shutil.rmtree(folder)
    return process.exitcode


def copy(folder: Path, trap: Trap | None) -> None:
    """The tree in ``folder``, with the trap in it."""
    for part in PARTS:
        shutil.copytree(ROOT / part, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy2(ROOT / "pyproject.toml", folder)
    if trap:
        text = (folder / trap.file).read_text(encoding="utf-8")
        (folder / trap.file).write_text(text.replace(trap.old, trap.new), encoding="utf-8")


def run(tests: list[str], folder: Path) -> None:
    """In the forked process: pytest, as from the command line in ``folder``."""
    import pytest

    for number in (1, 2):
        os.dup2(os.open(f"{folder}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.modules["__main__"] = types.ModuleType("__main__")          # or processes that the tests start would read this
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path[:] = [place for place in sys.path if Path(place) not in (ROOT, ROOT / "tests")]
    sys.exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", *tests]))


if __name__ == "__main__":
    main()
