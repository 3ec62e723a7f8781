"""The table of losses: what each row trains, what is measured of it, and that nothing is trained twice."""

import json
import math

import pytest

from benchmarks import metric_table
from benchmarks.metric_runs import SETS, Case, Experiment, fit_classes, key, measure
from benchmarks.metric_table import append, read, spread, table
from common.data import digits
from common.run import Run
from common.sections import open_config

CLASSES = [str(digit) for digit in range(10)]


def experiment(weights="", seeds=1, **more):
    return Experiment(SETS["digits"], CLASSES, weights, ["contrastive"], seeds, ["train.epochs=1"], **more)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A run that may stand for a pretrained one."""
    config = experiment().config(Case("contrastive", "scratch", 5, False))
    config.set("run.dir", str(tmp_path_factory.mktemp("run")), "the test")
    config.set("evaluate.protocols", [], "the test")
    return str(max((Run(config).train().dir / "checkpoints").glob("*.pt")))


def test_the_last_three_classes_are_not_trained_on_and_alone_measured():
    config = experiment().config(Case("contrastive", "scratch", 0, True))
    assert config.get("data.of") == {"name": "common.data.digits"} and config.get("data.classes") == CLASSES[:7]
    values = measure(Case("raw pixels", "", 0, True), config, "", CLASSES)
    images = digits().test
    of = [(images.array[i].double().flatten() / 255 - 0.305, images.labels[i].item()) for i in range(len(images))
          if images.labels[i] >= 7]                                         # less the mean of the recipe
    near = [max((math.inf * -1 if i == j else (a @ b / (a.norm() * b.norm())).item(), y == z)
                for j, (b, z) in enumerate(of))[1] for i, (a, y) in enumerate(of)]
    assert values["nearest"] == pytest.approx(100 * sum(near) / len(near), abs=0.01) and values["seconds"] == 0


def test_every_row_is_there_for_each_seed_and_a_baseline_without_chance_once(weights):
    cases = [*experiment(weights, seeds=2).cases()]
    assert len(set(cases)) == len(cases)
    first = [(case.row, case.begins) for case in cases if not case.unseen and case.seed == 0]
    assert first == [("raw pixels", ""), ("untrained backbone", ""), ("pretrained backbone", ""),
                     ("contrastive", "scratch"), ("contrastive", "pretrained")]
    assert [(case.row, case.begins) for case in cases if case.unseen and case.seed == 1] == [
        ("untrained backbone", ""), ("contrastive", "scratch"), ("contrastive", "pretrained")]


@pytest.mark.parametrize("batch, each, count, wanted", [(64, 8, 7, 16), (60, 6, 7, 10), (64, 8, 8, 8), (64, 16, 7, 16)])
def test_a_step_takes_more_images_of_each_class_where_there_are_fewer(batch, each, count, wanted):
    order = f"method.order={{name: common.data.orders.Balanced, per_class: {each}}}"
    config = open_config("contrastive.yaml", overrides=[order, f"train.batch_size={batch}"])
    fit_classes(config, count)
    assert config.get("method.order.per_class") == wanted and config.get("train.batch_size") == batch


def test_a_record_is_of_its_settings_its_seed_and_its_weights(weights, tmp_path):
    begun, scratch = Case("contrastive", "pretrained", 0, False), Case("contrastive", "scratch", 0, False)
    plain, trial = experiment(weights), experiment(weights)._replace(overrides=["optimizer.lr=0.5"])
    other = tmp_path / "other.pt"
    other.write_bytes(b"other")
    keys = [key(begun, plain.config(begun), weights), key(begun, plain.config(begun), str(other)),
            key(scratch, plain.config(scratch), weights), key(begun, trial.config(begun), weights),
            key(begun._replace(seed=1), plain.config(begun._replace(seed=1)), weights)]
    assert len(set(keys)) == 5
    assert key(scratch, plain.config(scratch), "") == keys[2], "weights that it does not begin with"


def run(monkeypatch, out, *given):
    monkeypatch.setattr("sys.argv", ["metric_table", "--quick", "--out", str(out), *given])
    metric_table.main()


def test_what_is_there_is_not_trained_again(weights, monkeypatch, tmp_path, capsys):
    run(monkeypatch, tmp_path, "--weights", weights)
    said, records = capsys.readouterr().out, read(tmp_path / "metric_table.jsonl")
    assert len(records) == 10 and all(0 < record["auc"] <= 100 for record in records)
    assert [record["seconds"] > 0 for record in records] == 2 * [False, False, False, True, True]
    lines = (tmp_path / "metric_table.jsonl").read_text().splitlines()
    (tmp_path / "metric_table.jsonl").write_text("\n".join(lines)[:-20])           # the last is cut by a kill
    measured = []
    monkeypatch.setattr(metric_table, "measure", lambda *given: measured.append(given) or measure(*given))
    run(monkeypatch, tmp_path, "--weights", weights)
    assert [given[0] for given in measured] == [Case("contrastive", "pretrained", 0, True)]
    again = capsys.readouterr().out
    assert said.partition("all classes")[2].replace(" 0 ", " ") == again.partition("all classes")[2].replace(" 0 ", " ")


def test_a_table_holds_means_and_deviations_over_seeds():
    values = [(90.0, 80.0), (92.0, 84.0)]
    records = [{"row": "triplet", "begins": "scratch", "unseen": False, "nearest": nearest, "auc": auc, "seconds": 60.4}
               for nearest, auc in values]
    records.append({**records[0], "unseen": True})
    assert table(records, False).splitlines()[2:] == ["| triplet | scratch | 91.0 ± 1.4 | 82.0 ± 2.8 | 60 | 2 |"]
    assert table(records, True).splitlines()[2:] == ["| triplet | scratch | 90.0 | 80.0 | 60 | 1 |"]
    assert spread([1.0, 2.0, 3.0]) == "2.0 ± 1.0"


def test_a_record_after_a_cut_line_stands_on_a_line_of_its_own(tmp_path):
    file = tmp_path / "new" / "a.jsonl"
    append(file, {"a": 1})
    file.write_text(file.read_text() + '{"a": ')
    append(file, {"a": 2})
    assert read(file) == [{"a": 1}, {"a": 2}] and json.loads(file.read_text().splitlines()[-1]) == {"a": 2}


def test_a_set_that_is_not_known_is_refused(monkeypatch, tmp_path):
    with pytest.raises(SystemExit, match="--data: mnist given. Give one of fashion, cifar10, digits"):
        run(monkeypatch, tmp_path, "--data", "mnist")
