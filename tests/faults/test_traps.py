"""Each trap of docs/reliability.md, sprung in a copy of the tree, turns the test red that is named beside it."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.traps import TRAPS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
ROWS = dict(re.findall(r"^\| (\d+|[a-e]) \| (.*) \|$", PAGE.partition("## Traps of other codebases")[2], re.MULTILINE))


@pytest.mark.parametrize("trap", TRAPS, ids=lambda trap: trap.number)
def test_each_trap_can_be_sprung_and_its_test_is_there(trap):
    assert (ROOT / trap.file).read_text(encoding="utf-8").count(trap.old) == 1
    file, name = trap.test.split("::")
    assert f"\ndef {name}(" in (ROOT / file).read_text(encoding="utf-8")


def test_the_page_names_every_trap_and_every_test():
    assert list(ROWS) == [*map(str, range(1, 45)), *"abcde"]
    assert {trap.number for trap in TRAPS} == ROWS.keys()
    for number, row in ROWS.items():
        named = set(re.findall(r"`(tests/.*?)`", row))
        assert named == {trap.test for trap in TRAPS if trap.number == number}, number


def test_a_sprung_trap_turns_its_test_red(soak, tmp_path):
    count = soak.count(1, len(TRAPS))
    command = [sys.executable, ROOT / "tests" / "spring.py", tmp_path, *map(str, range(count))]
    ended = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True,
                           env={**os.environ, "OMP_NUM_THREADS": "1"})
    none, *sprung = json.loads(ended.stdout)
    assert none == 0, (tmp_path / "none.out").read_text()
    unseen = [(trap.number, trap.test, status) for trap, status in zip(TRAPS, sprung) if status != 1]
    soak.report("traps", sprung=count, seen=count - len(unseen))
    assert unseen == []
