"""The watch of one rank by itself: what it counts as slow, as dead, and as its own fault."""

import json
import os
import sys
import time

import pytest
from torch.distributed import HashStore

from common import last_words, watch
from tests.processes import finish, start


@pytest.fixture
def watching():
    """Makes a watch that is alone; it ends with the test."""
    made = []

    def make(first_steps: int) -> watch.Watch:
        made.append(watch.Watch(HashStore(), True, 5.0, first_steps, lambda seconds: True))
        return made[-1]

    yield make
    for one in made:
        one.stop()


@pytest.mark.parametrize("world, timeout", [(2, 300.0), (2, 1.0), (256, 300.0), (257, 300.0), (1024, 9.0)])
def test_no_rank_is_dead_before_it_could_give_three_signs(world, timeout):
    interval, still = watch.rhythm(world, timeout)
    assert still >= 4 and still >= 3 * interval and interval <= timeout / 5
    assert interval >= min(world / 64, timeout / 5)


@pytest.mark.parametrize("first_steps, slow", [(1, 1), (watch.COMPILING, 21)])
def test_only_what_may_compile_has_the_longer_limit(first_steps, slow, watching, monkeypatch):
    monkeypatch.setattr(watch, "_mark", watch.Mark(0, "start", 0, 0.0, None))
    one, first = watching(first_steps), []
    for step in range(37, 70):
        watch.beat(step, "forward")
        one._give_sign()
        first.append(json.loads(one.store.get("sign0"))["first"])
    assert first == [True] * slow + [False] * (len(first) - slow)


def alone(folder: str, faults: int) -> None:
    """A watch whose looks fail so many times: it goes on after those, or ends the process."""
    look, calls = watch.Watch._look, []

    def fail(one):
        calls.append(one)
        if len(calls) <= faults:
            raise KeyError("a fault of the watch")
        look(one)

    watch.Watch._look, watch.STILL = fail, 1.0
    os.chdir(folder)
    one = watch.Watch(HashStore(), True, 1.0, 1, lambda seconds: True)
    time.sleep(5)
    print("alive", one._thread.is_alive())


@pytest.mark.parametrize("faults, code", [(2, 0), (10**6, 1)])
def test_a_fault_of_the_watch_leaves_no_process_without_one(faults, code, tmp_path):
    ended = finish(start(alone, str(tmp_path), faults, output=tmp_path / "said"), tmp_path / "said")
    assert ended.code == code and (ended.out == "alive True\n") == (not code)
    assert ("the watch of rank 0 over the others failed" in ended.err) == bool(code)


def full() -> None:
    sys.stdout = open("/dev/full", "w")         # noqa: SIM115
    print("this is lost")
    last_words.leave(3)


def test_output_that_fails_keeps_no_process_from_its_end(tmp_path):
    assert finish(start(full, output=tmp_path / "said"), tmp_path / "said").code == 3
