"""Two processes of which one is killed, and started again, are the run of two processes that was left alone."""

import random

import pytest

from tests import tiny
from tests.kills import assert_same_run
from tests.processes import finish, ranks, run_tool, start_ranks

PARTNER = 5             # seconds for the other process to notice; one that is still waiting for it is killed, too


@pytest.fixture(scope="module")
def together(root, tmp_path_factory):
    """The folder of the runs of two processes with two workers each that nothing interrupted, by method."""
    folder = tmp_path_factory.mktemp("together")
    for method in tiny.METHODS:
        train(config_in(folder / f"of-{method}", root, folder / method, method), folder / "said")
    return folder


def config_in(folder, root, run, method):
    folder.mkdir()
    config = tiny.settings(root, run, method, train={"workers": 2, "epochs": 3},
                           checkpoint={"minutes": 1e-4})
    (folder / "tiny.yaml").write_text(config.text())
    return folder / "tiny.yaml"


def train(file, said):
    ended = ranks(run_tool, "train", "--config", str(file), output=said)
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err


def kill_one(file, draw, span, said):
    """Start both, and kill one at a moment drawn from their life. Returns whether it was killed, and the other too."""
    started = start_ranks(run_tool, "train", "--config", str(file), output=said)
    victim = draw.choice(started)
    victim.join(draw.uniform(0, span))
    victim.kill()
    other, = (process for process in started if process is not victim)
    other.join(PARTNER)
    other.kill()
    codes = [finish(process, f"{said}{rank}").code for rank, process in enumerate(started)]
    return -9 in codes, codes == [-9, -9]


@pytest.mark.parametrize("method", tiny.METHODS)
def test_one_of_two_processes_is_killed_at_any_moments_and_both_go_on(method, root, together, soak, tmp_path):
    draw, span, wanted = random.Random(method), 1.2 * tiny.summary(together / method)["seconds"] + 1, soak.count(1, 10)
    kills = runs = waited = 0
    while kills < wanted:
        run, going = tmp_path / f"run{runs}", True
        file = config_in(tmp_path / f"of{runs}", root, run, method)
        while going and kills < wanted:
            going, both = kill_one(file, draw, span, tmp_path / "said")
            kills, waited = kills + going, waited + both
        train(file, tmp_path / "said")
        assert_same_run(run, together / method)
        runs += 1
    soak.report("R2", method=method, kills=kills, runs=runs, equal=runs, other_had_to_be_killed=waited)


@pytest.mark.parametrize("method", tiny.METHODS)
def test_two_processes_again_are_the_same_run(method, root, together, tmp_path):
    train(config_in(tmp_path / "of", root, tmp_path / "run", method), tmp_path / "said")
    assert_same_run(tmp_path / "run", together / method)
