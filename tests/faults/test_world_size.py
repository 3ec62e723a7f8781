"""A run saved by some number of processes goes on with another: the same images, losses, queue and bank."""

import json
from itertools import chain

import pytest
import torch

from common import distributed
from common.session import Session
from tests import tiny
from tests.processes import finish, ranks, start

STEPS, EPOCH = 15, 5                                # 40 images, 8 in a step
PLAIN = {"name": "common.backbones.encoder", "arch": "w4s1", "dim": 16}     # no dropout: each rank draws its own
CASES = {                                           # BatchNorm in 4 groups, whatever the number of processes
    "moco": {"of": "moco", "method": {"encoder": PLAIN, "bn_groups": 4}},
    "instdisc": {"of": "instdisc", "method": {"bn_groups": 4}},
}
PATHS = {                                           # (processes, until which step), one after another
    "2, 1": [(2, 7), (1, STEPS)],
    "2, 4": [(2, 7), (4, STEPS)],
    "2, 1, 2": [(2, 4), (1, 9), (2, STEPS)],
    "1, 2": [(1, 7), (2, STEPS)],
}


def config(root, run, case):
    return tiny.settings(root, run, **CASES[case], train={"epochs": 3, "batch_size": 8},
                         evaluate={"protocols": [], "every": 0})


def train_until(stop: int, *texts: str) -> None:
    """Each run goes on to step ``stop``; the images of each of its steps are added to images.jsonl."""
    start = Session.start

    def noting(session):
        start(session)
        after_step = session.run.method.after_step

        def noted(batches, outputs, progress):
            images = [i for batch in batches for i in distributed.gather(batch.index).tolist()]
            if distributed.is_main():
                with open(session.run.dir / "images.jsonl", "a") as file:
                    file.write(json.dumps(images) + "\n")
            after_step(batches, outputs, progress)

        session.run.method.after_step = noted

    Session.start = noting
    for text in texts:
        tiny.train_and_stop(text, stop if stop < STEPS else STEPS + 1)
    distributed.stop()


def train(folder, root, path):
    """Both runs in ``folder``, by the processes of each part of ``path`` in turn."""
    folder.mkdir(exist_ok=True)
    texts = [config(root, folder / case, case).text() for case in CASES]
    for world, stop in path:
        if world == 1:
            ended = [finish(start(train_until, stop, *texts, output=folder / "said"), folder / "said")]
        else:
            ended = ranks(train_until, stop, *texts, output=folder / "said", world=world)
        assert [rank.code for rank in ended] == world * [0], "\n".join(rank.err for rank in ended)


@pytest.fixture(scope="module")
def alone(root, tmp_path_factory):
    """Both runs by one process that nothing interrupts."""
    folder = tmp_path_factory.mktemp("alone")
    train(folder, root, [(1, STEPS)])
    return folder


@pytest.fixture(scope="module", params=PATHS)
def path(request, root, tmp_path_factory):
    folder = tmp_path_factory.mktemp("path")
    train(folder, root, PATHS[request.param])
    return folder, [world for world, _ in PATHS[request.param]]


def images(run):
    return [json.loads(line) for line in (run / "images.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("case", CASES)
def test_another_number_of_processes_goes_on_with_the_same_run(case, root, alone, path, soak):
    (folder, worlds), one = path, alone / case
    run = folder / case
    assert images(run) == images(one), "the images of each step, in order"
    for epoch in range(STEPS // EPOCH):
        seen = chain.from_iterable(images(run)[EPOCH * epoch:EPOCH * (epoch + 1)])
        assert sorted(seen) == list(range(40)), "each image once"
    found, expected = ([record["loss"] for record in tiny.records(of)] for of in (run, one))
    assert len(found) == STEPS and found == pytest.approx(expected, rel=0, abs=1e-5)
    state, other = (tiny.last_state(of)["trainer"]["method"] for of in (run, one))
    for name, value in other.items():
        if name.startswith("dictionary."):          # to rounding: in float64, tests/test_two_ranks.py asks for more
            torch.testing.assert_close(state[name], value, rtol=0, atol=1e-5 if value.is_floating_point() else 0)
    assert len(tiny.last_state(run)["rng"]) == worlds[-1]
    apart = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    keys = "keys" if case == "moco" else "v"
    soak.report("W1", method=case, processes=worlds, steps=STEPS, same_images=STEPS, largest_difference=apart,
                memory=float((state[f"dictionary.{keys}"] - other[f"dictionary.{keys}"]).abs().max()))
