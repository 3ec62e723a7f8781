"""The watch of one rank by itself: what it counts as slow, as dead, and as its own fault."""

import json

import pytest
from torch.distributed import HashStore

from common import watch


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
