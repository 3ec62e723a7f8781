"""The harness of the benchmarks, by a clock that the sides turn themselves; and that each benchmark runs."""

import importlib
import itertools
import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import __main__ as driver
from benchmarks import harness, knn, time_to_result
from benchmarks.harness import Report, arguments, figure, interleaved, number, peak_megabytes
from common.evaluate.evaluator import Evaluator


class Clock:
    """CPU time that passes only in the sides, and the order in which they were called."""

    def __init__(self, monkeypatch):
        self.now, self.calls = 0.0, []
        monkeypatch.setattr(time, "process_time", lambda: self.now)

    def side(self, name: str, seconds):
        def call():
            self.calls.append(name)
            self.now += seconds() if callable(seconds) else seconds
        return call


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


def test_every_side_is_called_once_a_round_and_the_order_turns(clock):
    interleaved({name: clock.side(name, 1) for name in "abc"}, rounds=3)
    rounds = ["".join(clock.calls[i:i + 3]) for i in range(0, 12, 3)]
    assert [sorted(order) for order in rounds] == [["a", "b", "c"]] * 4             # one more, to warm up
    assert {order[0] for order in rounds[1:]} == {"a", "b", "c"}


def test_the_first_round_does_not_count(clock):
    seconds = itertools.chain([1000.0], itertools.repeat(2.0))
    found = interleaved({"a": clock.side("a", lambda: next(seconds)), "b": clock.side("b", 1)}, rounds=4)
    assert found == {"a": [2.0] * 4, "b": [1.0] * 4}


def test_a_side_beside_itself_is_as_fast_as_itself_while_the_machine_slows_down(clock, tmp_path):
    """Each call takes 3 % longer than the one before: a fixed order would make the second side 3 % slower."""
    pace = itertools.count()
    sides = {name: clock.side(name, lambda: 1.03 ** next(pace)) for name in ("one", "the same")}
    report = Report("noise", folder=tmp_path)
    report.compare("noise", sides, rounds=20)
    assert report.figures[-1].value == pytest.approx(1, abs=0.001)


def test_a_ratio_is_of_the_two_sides_of_one_round(clock, tmp_path):
    base, own = itertools.cycle([1.0, 10.0]), itertools.cycle([0.5, 2.0])           # 2 and 5 times as fast
    report = Report("ratios", folder=tmp_path)
    sides = {"base": clock.side("base", lambda: next(base)), "own": clock.side("own", lambda: next(own))}
    report.compare("ratios", sides, rounds=4, at_least={"own": 3})
    ratio = report.figures[-1]
    assert (ratio.low, ratio.value, ratio.high, ratio.n) == (2, 3.5, 5, 4)
    assert ratio.baseline == "base" and ratio.goal == "at least 3" and ratio.met


@pytest.mark.parametrize("goal, met", [({"at_least": 2}, True), ({"at_least": 2.1}, False), ({"at_most": 2}, True),
                                       ({"at_most": 1.9}, False), ({}, None)])
def test_a_goal_is_met_or_missed_by_the_median(goal, met):
    assert figure("what", "side", [1, 2, 9], "x", "base", **goal).met is met


def test_the_report_is_printed_in_100_columns_and_written_with_its_machine(tmp_path, capsys, clock):
    report = Report("tidy", folder=tmp_path)
    sides = {name: clock.side(name, 12.0) for name in ("a baseline", "a side whose name is far too long for a row")}
    report.compare("a comparison", sides, rounds=3, at_least={list(sides)[1]: 2.5})
    report.add(figure("memory", "a side", [12_345.6], "MB", at_most=40))
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 100
    assert "MISSED >= 2.5" in said and "MISSED <= 40" in said
    written = json.loads((tmp_path / "tidy.json").read_text())
    assert {"cpu", "cores", "gpu", "threads", "load", "date", "commit", "versions"} <= written.keys()
    assert written["versions"]["torch"] == torch.__version__.partition("+")[0]
    assert [f["value"] for f in written["figures"]] == [12_000, 12_000, 1, 12_345.6]


def test_quick_figures_are_held_to_no_goal(tmp_path):
    report = Report("quick", quick=True, folder=tmp_path)
    report.add(figure("speed", "ours", [1.0], "x", "base", at_least=4))
    assert report.figures[0].met is None and json.loads((tmp_path / "quick.json").read_text())["quick"]


def options(monkeypatch, *given):
    monkeypatch.setattr("sys.argv", ["benchmark", *given])
    return arguments("what it does", quick={"size": 3}, size=300, images="", full=False)


def test_quick_takes_one_round_and_the_small_sizes_unless_others_are_given(monkeypatch):
    usual, quick = options(monkeypatch), options(monkeypatch, "--quick")
    assert (usual.rounds, usual.size, usual.full) == (harness.ROUNDS, 300, False)
    assert (quick.rounds, quick.size) == (1, 3)
    given = options(monkeypatch, "--quick", "--size", "7", "--full", "--images", "photos")
    assert (given.size, given.full, given.images) == (7, True, "photos")


def test_no_rounds_are_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        options(monkeypatch, "--rounds", "0")
    assert "give 1 or more" in capsys.readouterr().err


def test_a_picture_that_nothing_can_draw_is_refused_before_anything_is_measured(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)                            # not installed
    with pytest.raises(SystemExit):
        monkeypatch.setattr("sys.argv", ["benchmark", "--picture", "a.png"])
        arguments("what it does", picture="")
    assert "--picture: matplotlib, which draws it, is not installed" in capsys.readouterr().err


def test_a_race_that_is_stopped_leaves_its_curves(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "lightly", None)
    monkeypatch.setattr("sys.argv", ["race", "--quick", "--points", "2", "--out", str(tmp_path / "out")])
    measured, measure = itertools.count(), Evaluator.measure

    def stopped_at_the_second(self, encoder):
        if next(measured) == 1:
            raise KeyboardInterrupt
        return measure(self, encoder)

    monkeypatch.setattr(Evaluator, "measure", stopped_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        time_to_result.main()
    kept = json.loads((tmp_path / "out/time_to_result-curves.json").read_text())
    assert [len(marks) for marks in kept["marks"].values()] == [1]


@pytest.mark.parametrize("value, text", [(0.0123, "0.012"), (0.5, "0.50"), (4.321, "4.32"), (43.21, "43.2"),
                                         (432.1, "432"), (43210.0, "43,210"), (-4.321, "-4.32")])
def test_numbers_have_three_digits(value, text):
    assert number(value) == text


def test_memory_is_the_rise_to_the_highest_and_not_what_is_left():
    assert peak_megabytes(lambda: torch.ones(16 << 20).sum()) == pytest.approx(64, abs=16)


def test_a_call_that_fails_where_its_memory_is_measured_is_an_error(capfd):
    with pytest.raises(RuntimeError, match="the call whose memory is measured failed"):
        peak_megabytes(lambda: 1 / 0)
    assert "ZeroDivisionError" in capfd.readouterr().err


def modules() -> set[str]:
    """Those of benchmarks/ that can be run."""
    folder = Path(harness.__file__).parent
    return {path.stem for path in folder.glob("[!_]*.py") if "\ndef main() " in path.read_text(encoding="utf-8")}


def test_every_benchmark_is_run_by_the_driver_and_none_twice():
    listed = {s.name for slices in driver.SLICES.values() for s in slices}
    assert listed == modules()
    for slices in driver.SLICES.values():
        assert len({s.label for s in slices}) == len(slices)


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_benchmark_runs_and_writes_its_figures(name, tmp_path, monkeypatch, capsys):
    """As after ``make setup``, without the peers of ``make bench``; ``python -m benchmarks --quick`` has them, too."""
    for peer in ("lightly", "kornia", "matplotlib"):
        monkeypatch.setitem(sys.modules, peer, None)                            # not installed
    monkeypatch.chdir(tmp_path)                                                 # nothing is written elsewhere
    monkeypatch.setattr("sys.argv", [f"benchmarks.{name}", "--quick", "--out", str(tmp_path / "out")])
    importlib.import_module(f"benchmarks.{name}").main()
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if len(line) > 100] == []
    written = json.loads((tmp_path / f"out/{name}.json").read_text())
    assert written["quick"] and written["figures"]
    assert not (tmp_path / "build").exists()


def test_knn_is_measured_without_faiss(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)                                 # not installed
    assert knn._backends("cpu") == ["torch"]


def drive(monkeypatch, *given):
    monkeypatch.setattr("sys.argv", ["benchmarks", *given])
    return driver.main()


def test_the_driver_hands_on_what_a_benchmark_takes(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(driver.SLICES, "cpu", [driver.Slice("a", takes=("images",), options=("--full",)),
                                               driver.Slice("b", part="large")])
    (tmp_path / "my photos").mkdir()
    monkeypatch.chdir(tmp_path)
    assert drive(monkeypatch, "--list", "--images", "my photos") == 0
    assert capsys.readouterr().out.splitlines() == [
        "python -m benchmarks.a --full '--images=my photos' --out=build/bench",
        "python -m benchmarks.b --out=build/bench/large"]


def test_the_driver_says_which_goals_are_met_and_which_benchmark_failed(monkeypatch, capfd, tmp_path):
    monkeypatch.setattr(driver, "FOLDER", tmp_path)
    monkeypatch.setitem(driver.SLICES, "cpu", [driver.Slice("good"), driver.Slice("no_such_benchmark")])
    monkeypatch.setattr(driver, "run", lambda s, options, folder: s.name == "good")
    report = Report("good", folder=tmp_path)
    for value in (3.0, 5.0):
        report.add(figure("speed", "ours", [value], "x", "theirs", at_least=4))
    report.add(figure("speed", "theirs", [1.0], "ms"))
    assert drive(monkeypatch) == 1
    said = capfd.readouterr()
    assert "2 goals: 1 met, 1 missed. 3 figures" in said.out and "failed: no_such_benchmark" in said.err


def test_tables_hold_every_figure_and_the_ratio_in_the_row_of_its_time(monkeypatch, capsys, tmp_path, clock):
    monkeypatch.setattr(driver, "FOLDER", tmp_path)
    monkeypatch.setitem(driver.SLICES, "cpu", [driver.Slice("good"), driver.Slice("not run")])
    report = Report("good", folder=tmp_path)
    report.compare("speed", {"base": clock.side("base", 2), "own": clock.side("own", 1)}, rounds=3, at_least={"own": 3})
    report.add(figure("memory", "own", [7.0], "MB", at_most=40))
    capsys.readouterr()
    assert drive(monkeypatch, "--tables") == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert rows[1:3] == ["| base | 2,000 ms | 2,000 to 2,000 | 3 |  |  |",
                         "| own | 1,000 ms | 1,000 to 1,000 | 3 | 2.00 (2.00 to 2.00) | at least 3: missed |"]
    assert rows[4] == "| own | 7.00 MB |  | 1 |  | at most 40: met |"


def test_a_benchmark_that_takes_too_long_is_stopped_and_counts_as_failed(monkeypatch, capfd):
    monkeypatch.setattr(driver, "LIMIT", 0.01)
    assert drive(monkeypatch, "noise", "--quick") == 1
    assert "noise is stopped after" in capfd.readouterr().err


def test_without_a_gpu_its_benchmarks_say_so(monkeypatch, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    assert drive(monkeypatch, "--device", "cuda") == 1
    assert "torch sees no CUDA device here" in capsys.readouterr().err


def test_all_data_that_the_driver_can_be_given_is_taken_by_a_benchmark(monkeypatch):
    monkeypatch.setattr("sys.argv", ["benchmarks"])
    given = {name for name, value in vars(driver.parse()).items() if value == ""}
    assert given == {name for slices in driver.SLICES.values() for s in slices for name in s.takes}


@pytest.mark.parametrize("option", ["--images", "--root"])
def test_a_folder_that_is_not_there_is_refused_before_anything_is_measured(option, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        drive(monkeypatch, option, "no/such/folder")
    assert f"{option}: there is no folder no/such/folder." in capsys.readouterr().err


def test_an_unknown_benchmark_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        drive(monkeypatch, "nois")
    assert "nois: no such benchmark. There are " in capsys.readouterr().err
