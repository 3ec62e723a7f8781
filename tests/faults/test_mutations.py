"""Nothing in a checkpoint is idle: what it would lack is missed, and what is changed in it is carried on.

Without this, the comparisons of the kill tests would prove nothing about it.
"""

import re
import shutil
import time
from pathlib import Path

import pytest
import torch

from common import distributed
from common.checkpoint import Folder, load, save
from common.config import ConfigError
from common.rng import rng_state, seed_all, set_rng_state
from common.run import Run
from common.session import Session
from tests import tiny
from tests.processes import PATIENCE, ranks

STOP, MORE = 25, 8                                  # of 60 steps; in the middle of the third of six epochs
CASES = {
    "moco": {"of": "moco"},
    "instdisc": {"of": "instdisc"},
    "fp16": {"of": "moco", "train": {"precision": "fp16"}},
}
FORGET = {                                          # item -> case, the places in the state that go back to the start
    "nothing": ("moco", "nothing"),
    "the step": ("moco", r"trainer\.step"),
    "the weights": ("moco", r"trainer\.method\.encoder\.(?!.*(running_|tracked)).*"),
    "the key encoder": ("moco", r"trainer\.method\.key_encoder\.(?!.*(running_|tracked)).*"),
    "the momentum of SGD": ("moco", r"trainer\.optimizer\.state\..*"),
    "the queue": ("moco", r"trainer\.method\.dictionary\.keys"),
    "the queue's images": ("moco", r"trainer\.method\.dictionary\.image"),
    "the queue's pointer": ("moco", r"trainer\.method\.dictionary\.head"),
    "the step of the key shuffle": ("moco", r"trainer\.method\.step"),
    "torch's generator": ("moco", r"rng\.0\.torch"),
    "NumPy's generator": ("moco", r"rng\.0\.numpy\..*"),
    "Python's generator": ("moco", r"rng\.0\.python\..*"),
    "the scale of fp16": ("fp16", r"trainer\.scaler\.(scale|_growth_tracker)"),
    "the bank": ("instdisc", r"trainer\.method\.dictionary\.v"),
    "the step of the negatives": ("instdisc", r"trainer\.method\.dictionary\.step"),
    "log Z": ("instdisc", r"trainer\.method\.log_z"),
}
AT_THE_END = r"trainer\.method\..*(running_.*|tracked)"     # no loss in training depends on these
ONLY_CARRIED = (                                            # idle in these short runs
    r"trainer\.(skipped|rollbacks)",                        # steps in a row that were not finite; ways back
    r"trainer\.lr_scale",                                   # 1 until then; tests/faults/test_numbers.py
    r"health\..*",                                          # what spikes and collapse are measured by; there, too
    r"trainer\.method\.dictionary\.filled",                 # shown in the log
    r"trainer\.scaler\..*",                                 # its constants
    r"trainer\.optimizer\.param_groups\..*",                # set anew at every step, from the config and the schedule
    "seconds", "measuring", "wandb_id",
)
COMPARED = ("digest", "data", "start")                      # the run must be of the same config, images, first weights
TOLD = ("config", r"facts\..*", r"versions\..*")            # what it was, for tools/evaluate.py, messages and readers


def leaves(tree, *path):
    """(place, value) of everything in a tree of dicts, lists and tuples; a place is a tuple of keys."""
    if isinstance(tree, (dict, list, tuple)):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from leaves(value, *path, key)
    else:
        yield path, tree


def dotted(path):
    return ".".join(map(str, path))


def same(a, b):
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def parent(tree, path):
    for key in path[:-1]:
        tree = tree[key]
    return tree


@pytest.fixture(scope="module")
def stopped(root, tmp_path_factory):
    """Of each case, the state at the start, and the checkpoint of a run that was asked to stop in its 25th step."""
    folder, states = tmp_path_factory.mktemp("stopped"), {}
    for case, settings in CASES.items():
        config = tiny.settings(root, folder / case, **settings)
        session = Session(Run(config))
        session.start()
        fresh = {"trainer": session.trainer.state(), "rng": [rng_state()]}
        save(folder / f"{case}-fresh.pt", fresh)
        states[case] = {"fresh": dict(leaves(load(folder / f"{case}-fresh.pt"))), "file": folder / f"{case}.pt"}
        tiny.train_and_stop(config.text(), STOP)
        state = load(Folder(folder / case / "checkpoints").files()[0][1])
        if case == "fp16":
            state["trainer"]["scaler"]["scale"] = 2.0**24       # as far as it may have grown in some thousand steps
        save(states[case]["file"], state)
        shutil.rmtree(folder / case)
    return states


def resumed(state, config):
    """A session that goes on from ``state``."""
    session = Session(Run(config))
    save(session.folder.path / f"step-{STOP:08d}.pt", state)
    session.start()
    return session


def forgotten(of_case, pattern):
    """The checkpoint with what ``pattern`` names as it was at the start, or gone if it was not there then."""
    state, fresh = load(of_case["file"]), of_case["fresh"]
    places = [(path, value) for path, value in leaves(state) if re.fullmatch(pattern, dotted(path))]
    assert pattern == "nothing" or any(path not in fresh or not same(value, fresh[path]) for path, value in places)
    for path, _ in places:
        if path in fresh:
            parent(state, path)[path[-1]] = fresh[path]
        else:
            del parent(state, path)[path[-1]]
    return state


def losses(session, steps=MORE):
    return [(step.number, float(step.logs["loss"]).hex(), step.skipped)
            for step in session.trainer.steps(session.trainer.step + steps)]


@pytest.fixture(scope="module")
def expected(root, stopped, tmp_path_factory):
    folder = tmp_path_factory.mktemp("expected")
    return {case: losses(resumed(load(stopped[case]["file"]), tiny.settings(root, folder / case, **settings)))
            for case, settings in CASES.items()}


@pytest.mark.parametrize("item", FORGET)
def test_what_a_checkpoint_would_lack_changes_the_losses_after_it(item, root, stopped, expected, straight, tmp_path):
    case, pattern = FORGET[item]
    session = resumed(forgotten(stopped[case], pattern), tiny.settings(root, tmp_path / "run", **CASES[case]))
    found = losses(session)
    assert (found == expected[case]) == (item == "nothing")
    if item == "nothing":
        assert [loss[:2] for loss in found] == tiny.losses(straight / "moco")[STOP:STOP + MORE]


def test_running_statistics_that_a_checkpoint_would_lack_are_missed_at_the_end(root, straight, stopped, tmp_path):
    session = resumed(forgotten(stopped["moco"], AT_THE_END), tiny.settings(root, tmp_path / "run", "moco"))
    for _ in session.trainer.steps():
        pass
    last, now = tiny.last_state(straight / "moco")["trainer"]["method"], session.run.method.state_dict()
    for name in last:
        missed = bool(re.fullmatch(AT_THE_END, f"trainer.method.{name}"))
        assert torch.equal(now[name], last[name]) != missed, name


def changed(value):
    """Another value of the same kind."""
    if isinstance(value, torch.Tensor):
        return value + 1 if value.dtype != torch.bool else ~value
    return value if value is None or isinstance(value, bool) else value + 1 if not isinstance(value, str) else "other"


def all_changed(state):
    """The checkpoint with every value changed that a resume takes over, and the places of these."""
    seed_all(99)
    state["rng"] = [rng_state()]                    # a generator's state is no set of free numbers
    draws = [path for path, _ in leaves(state) if path[0] == "rng"]
    keep = "|".join((*COMPARED, *TOLD, r"trainer\.optimizer\.param_groups\.\d+\.params\..*"))
    places = [path for path, _ in leaves(state) if path[0] != "rng" and not re.fullmatch(keep, dotted(path))]
    values = dict(leaves(state))
    for path in places:
        parent(state, path)[path[-1]] = changed(values[path])
    return state, [*places, *draws]


@pytest.mark.parametrize("case", CASES)
def test_a_value_that_is_changed_in_a_checkpoint_is_carried_on_to_the_next(case, root, stopped, tmp_path):
    state, places = all_changed(load(stopped[case]["file"]))
    session = resumed(state, tiny.settings(root, tmp_path / "run", **CASES[case]))
    session.save()
    path, until = session.folder.path / f"step-{STOP + 1:08d}.pt", time.monotonic() + PATIENCE
    while not path.exists() and time.monotonic() < until:
        time.sleep(0.01)
    then, now = dict(leaves(state)), dict(leaves(load(path)))
    assert [dotted(place) for place in places if place != ("seconds",) and not same(now[place], then[place])] == []
    assert now["seconds",] >= then["seconds",]


@pytest.mark.parametrize("key", COMPARED)
def test_a_checkpoint_of_another_config_other_images_or_other_first_weights_is_refused(key, root, stopped, tmp_path):
    state = load(stopped["moco"]["file"]) | {key: "other"}
    state["config"] = state["config"].replace("temperature: 0.2", "temperature: 0.3")
    with pytest.raises(ConfigError, match="belongs to (another config|other data|a run that began from weights)"):
        resumed(state, tiny.settings(root, tmp_path / "run", "moco"))


@pytest.mark.parametrize("case", CASES)
def test_every_value_of_a_checkpoint_stands_in_these_tables(case, stopped):
    """A new one joins them: FORGET if the loss depends on it, or else the table that says why it does not."""
    known = [pattern for _, pattern in FORGET.values()] + [AT_THE_END, *ONLY_CARRIED, *COMPARED, *TOLD]
    places = map(dotted, (path for path, _ in leaves(load(stopped[case]["file"]))))
    assert [place for place in places if not any(re.fullmatch(pattern, place) for pattern in known)] == []


def stop_and_go_on(text: str) -> None:
    """Print the losses after a stop: of two continuations, and of one where each rank got the other's generators."""
    tiny.train_and_stop(text, STOP)
    state, traces = tiny.last_state(Path(tiny.Config.parse(text, "tiny.yaml").get("run.dir"))), []
    for order in (1, 1, -1):
        session = Session(Run(tiny.Config.parse(text, "tiny.yaml")))
        session.start()
        set_rng_state(state["rng"][::order][distributed.rank()])
        traces.append(distributed.gather_objects(losses(session)))
    print("equal", traces[0] == traces[1], "and", traces[0] == traces[2])
    distributed.stop()


def test_the_other_ranks_generators_are_missed(root, tmp_path):
    text = tiny.settings(root, tmp_path / "run", "moco").text()
    ended = ranks(stop_and_go_on, text, output=tmp_path / "said")
    assert "equal True and False" in ended[0].out, ended[0].err + ended[1].err
