"""``tools/verify.py``: on drawn pairs, on lists, on two files, on one subject; and its answers to bad lists."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.data import digits, pair_list
from common.data.datasets import Images
from common.evaluate.knn import KNN
from common.evaluate.subject import Normal, probability
from common.evaluate.verification import area, at_far, best_threshold, roc
from common.measuring.embedding import Rows, Sides, comparing, embedded, score
from common.measuring.pair_list import drawn, listed
from common.measuring.roc_picture import round_ticks
from common.trained import load_trained
from tests import tiny
from tests.processes import ranks
from tools import evaluate, verify


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run's folder: digits, five steps."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    tiny.digits_run(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The first 60 test digits as PNG files, KIND/number.png, and their labels by path."""
    folder, test = tmp_path_factory.mktemp("digits"), digits(300).test
    labels = {}
    for i in range(60):
        label = int(test.labels[i])
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(test.array[i, 0].numpy()).save(folder / str(label) / f"{i}.png")
        labels[f"{label}/{i}.png"] = label
    return folder, labels


@pytest.fixture(scope="module")
def pairs(files):
    """Lines of (path, path, mark): 60 of the same digit and 60 of different ones, mixed."""
    paths, labels = list(files[1]), files[1]
    every = [(a, b, int(labels[a] == labels[b])) for i, a in enumerate(paths) for b in paths[i + 1:]]
    same, different = ([pair for pair in every if pair[2] == kind] for kind in (1, 0))
    return [pair for both in zip(same[:60], different[::20][:60]) for pair in both]


def pixels(file):
    """[1, 8, 8]"""
    return torch.tensor(np.array(Image.open(file)))[None]


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def verified(run, folder, *words):
    """The records, by metric (TAR: the last), and the rows of the CSV, of one call."""
    results, scores = folder / "results.jsonl", folder / "scores.csv"
    results.unlink(missing_ok=True)
    verify.main(["--checkpoint", str(run), "--results", str(results), "--scores", str(scores), *words])
    with open(scores, newline="") as file:
        return {line["metric"]: line for line in lines(results)}, list(csv.DictReader(file))


def write(file, rows, separator=" "):
    file.write_text("".join(separator.join(map(str, row)) + "\n" for row in rows))
    return str(file)


def test_the_values_are_those_of_the_scores_in_the_csv(run, tmp_path, capsys):
    picture = tmp_path / "curve.png"
    found, rows = verified(run, tmp_path, "--draw", "400", "--far", "0.1", "--picture", str(picture))
    value = torch.tensor([float(row["score"]) for row in rows], dtype=torch.float64)
    same = torch.tensor([row["same"] == "1" for row in rows])
    assert (len(rows), int(same.sum())) == (400, 200)
    curve = roc(value, same)
    assert found["AUC"]["value"] == pytest.approx(100 * area(curve))
    assert found["TAR"]["value"] == pytest.approx(100 * at_far(curve, 0.1).tar)
    assert found["TAR"]["protocol"]["far"] == 0.1
    assert found["verification"]["threshold"] == best_threshold(value, same)
    assert [row["accepted"] for row in rows] == [str(int(v >= best_threshold(value, same))) for v in value]
    assert found["verification"]["protocol"] | {"pairs": 400, "same": 200, "left_out": 0, "folds": 10} == \
        found["verification"]["protocol"]
    assert "200 same and 200 different pairs" in capsys.readouterr().out
    assert Image.open(picture).size[0] > 900


@pytest.mark.parametrize("low, high", [(0.206, 0.994), (0, 0.068), (-7.3, -0.2), (0, 1), (-1e-4, 1e-4), (3e5, 9e5)])
def test_the_marks_of_an_axis_are_few_round_and_where_they_say(low, high):
    ticks = round_ticks(low, high)
    assert 2 <= len(ticks) <= 7
    for place, text in ticks.items():
        assert 0 <= place <= 1 and low + place * (high - low) == pytest.approx(float(text), abs=1e-9 * (high - low))
        assert len(text.strip("-").replace(".", "").strip("0")) <= 6


@pytest.mark.parametrize("measure", ["cosine", "euclidean"])
def test_both_kinds_of_list_give_each_pair_the_score_of_its_images(run, files, pairs, tmp_path, measure):
    """One image at a time through the encoder is the oracle."""
    one = write(tmp_path / "pairs.txt", pairs)
    two = [write(tmp_path / f"{side}.txt", [(pair[side], pair[2]) for pair in pairs]) for side in (0, 1)]
    words = ["--root", str(files[0]), "--measure", measure, "--no-picture", "--layer", "head"]
    (_, rows), (_, again) = (verified(run, tmp_path, "--pairs", *given, *words) for given in ([one], two))
    assert rows == again and [(row["first"], row["second"], int(row["same"])) for row in rows] == pairs
    trained = load_trained(run)
    for row in rows[:3]:
        x, y = (trained.encoder(trained.views.evaluation_batch(image[None]))[0] for image in (
            pixels(files[0] / row[side]) for side in ("first", "second")))
        expected = (x @ y).item() if measure == "cosine" else -(x - y).norm().item()
        assert float(row["score"]) == pytest.approx(expected, abs=1e-5)


def test_pairs_of_an_image_that_cannot_be_read_are_left_out_and_counted(run, files, pairs, tmp_path, capsys):
    broken = files[0] / "broken.png"
    broken.write_bytes(b"no picture")
    extra = [("broken.png", pairs[0][0], 1), (pairs[0][0], "broken.png", 0)]
    path = write(tmp_path / "pairs.txt", [*pairs[:40], *extra], ",")
    found, rows = verified(run, tmp_path, "--pairs", path, "--root", str(files[0]), "--no-picture")
    assert found["AUC"]["protocol"]["left_out"] == 2 and len(rows) == 40
    assert "2 more could not be read" in capsys.readouterr().out


def test_drawn_pairs_are_what_they_are_called_and_depend_on_nothing_else():
    images = digits(300).test
    pairs = drawn(images, 1000)
    label, first, second = pairs.images.labels, pairs.first_P, pairs.second_P
    assert torch.equal(label[first] == label[second], pairs.same_P) and int(pairs.same_P.sum()) == 500
    assert not (first == second).any() and len(set(torch.cat([first, second]).tolist())) == len(pairs.images)
    again, other = drawn(images, 1000), drawn(images, 1000, seed=1)
    assert torch.equal(again.first_P, first) and not torch.equal(other.first_P[:500], first[:500])


def test_labels_of_pairs_are_not_taken_for_classes(run, files, pairs, tmp_path, capsys):
    """They are numbers of pairs: images of one kind in two of them would count as different."""
    file = write(tmp_path / "list.txt", pairs)
    splits = pair_list(Path(file), root=files[0], channels=1)
    with pytest.raises(ValueError, match="is a list of pairs, and others are not drawn .*--pairs FILE"):
        drawn(splits.train, 100)
    with pytest.raises(SystemExit):
        evaluate.main(["knn", "--checkpoint", str(run), f"data={{name: common.data.pair_list, train: {file}, "
                       f"root: {files[0]}, channels: 1}}"])
    assert "whose labels are no classes to be told. Measure by tools/verify.py" in capsys.readouterr().err
    trained = load_trained(run)
    assert [trained.evaluator(of, [KNN([1])]).possible for of in (splits, trained.splits())] == [False, True]


def test_the_records_say_which_images_pairs_were_drawn_from(run, files, tmp_path):
    """Without test images, from those of the training."""
    for kind in ("0", "1"):
        shutil.copytree(files[0] / kind, tmp_path / "images" / kind)
    found, _ = verified(run, tmp_path, "--data", str(tmp_path / "images"), "--draw", "20")
    assert found["AUC"]["protocol"]["from"] == "drawn from train"
    found, _ = verified(run, tmp_path, "--draw", "20")
    assert found["AUC"]["protocol"]["from"] == "drawn from test"


def test_drawn_pairs_are_even_and_respect_classes_gaps_and_missing_labels():
    labels = torch.tensor([7] * 3 + [2] * 2 + [-1] * 4 + [5])               # one of class 5: never in a same pair
    images = Images("gaps", [str(i) for i in range(10)], labels, [f"c{i}" for i in range(8)],
                    torch.zeros(10, 1, 2, 2, dtype=torch.uint8))
    pairs = drawn(images, 4000)
    firsts, seconds = ([pairs.images.keys[i] for i in side] for side in (pairs.first_P, pairs.second_P))
    keys = list(zip(firsts, seconds))
    same, different = ([pair for pair, kind in zip(keys, pairs.same_P.tolist()) if kind is of] for of in (True, False))
    assert {first for first, _ in same} == set("01234") and {first for first, _ in different} == set("012349")
    for first in "01234":
        share = sum(a == first for a, _ in same) / len(same)
        assert share == pytest.approx(1 / 5, abs=0.03)
    for second, expected in {"3": 1 / 3, "4": 1 / 3, "9": 1 / 3}.items():
        of_first = [b for a, b in different if a == "0"]
        assert of_first.count(second) / len(of_first) == pytest.approx(expected, abs=0.06)
    only = drawn(images, 100, ["c7", "c2"])
    assert set(only.images.labels.tolist()) == {2, 7}
    with pytest.raises(ValueError, match="has no c9"):
        drawn(images, 100, ["c9"])
    with pytest.raises(ValueError, match="two classes"):
        drawn(images, 100, ["c7"])


def test_two_files_are_compared_by_the_threshold_that_was_last_found(run, files, tmp_path, capsys):
    verified(run, tmp_path, "--draw", "200", "--no-picture", "--far", "0.2", "0.01")
    best, _, _, lenient, strict = [line["threshold"] for line in lines(tmp_path / "results.jsonl")]
    assert len({best, lenient, strict}) == 3
    a, b = (str(files[0] / name) for name in list(files[1])[:2])
    capsys.readouterr()
    base = ["--checkpoint", str(run), "--results", str(tmp_path / "results.jsonl"), "--image", a, "--image"]
    for threshold, words in ((best, []), (lenient, ["--far", "0.2"]), (strict, ["--far", "0.01"]),
                             (0.3, ["--threshold", "0.3"])):
        verify.main([*base, b, *words])
        out = capsys.readouterr().out
        similarity = float(out.split()[1])
        assert ("same:" in out) == (similarity >= threshold) and f"threshold {threshold:.4f}" in out
        assert ("(given)" in out) == (words[:1] == ["--threshold"])
    verify.main([*base, a])
    out = capsys.readouterr().out
    assert "similarity 1.0000" in out and "distance 0 " in out and "same:" in out
    verify.main([*base, b, "--layer", "head"])
    assert "no threshold is known" in capsys.readouterr().out


def test_records_that_are_none_are_passed_over(run, files, tmp_path, capsys):
    """A line that a full disk cut off, or another's: nothing of it is a threshold, and nothing of it ends the command.
    """
    verified(run, tmp_path, "--draw", "200", "--no-picture")
    best, file = lines(tmp_path / "results.jsonl")[0], tmp_path / "results.jsonl"
    a, b = (str(files[0] / name) for name in list(files[1])[:2])
    words = ["--checkpoint", str(run), "--results", str(file), "--image", a, "--image", b]
    with file.open("ab") as end:
        end.write(b'\xff{\nnull\n{"metric": "verification", "protocol": null}\n' + b"[" * 100_000 + b"\n")
    verify.main(words)
    assert f"threshold {best['threshold']:.4f}" in capsys.readouterr().out
    with file.open("a") as end:
        end.write(json.dumps(best | {"threshold": "\x1b[31m"}) + "\n")
    verify.main(words)
    assert "no threshold is known" in capsys.readouterr().out


def test_an_image_is_judged_against_one_subject(run, files, capsys):
    folder, labels = files
    of = {digit: sorted(str(folder / name) for name, label in labels.items() if label == digit) for digit in range(10)}
    asked = [of[0][0], of[6][0]]
    verify.main(["--checkpoint", str(run), "--subject", *of[0][1:], "--impostors", str(folder / "1"), str(folder / "4"),
                 "--image", asked[0], "--image", asked[1], "--shrinkage", "0.9"])
    out = capsys.readouterr().out.splitlines()
    trained = load_trained(run)
    subject, impostors, images = (
        torch.cat([trained.encoder.backbone(trained.views.evaluation_batch(pixels(file)[None])).detach()
                   for file in group]) for group in (of[0][1:], of[1] + of[4], asked))
    expected = probability(Normal.fit(subject, 0.9), impostors, images).tolist()
    assert [line.split()[1] for line in out[:2]] == asked
    assert [float(line.split()[0]) for line in out[:2]] == pytest.approx(expected, rel=0.02) and max(expected) > 1e-30
    assert f"the subject of {len(of[0]) - 1} images, against {len(of[1] + of[4])} of others" in out[2]


def test_scores_do_not_depend_on_the_order_that_images_were_embedded_in(run):
    trained = load_trained(run)
    pairs = drawn(trained.splits().test, 50)
    x, row = embedded(trained, pairs.images, "backbone")
    turned = torch.randperm(len(row))
    straight, other = Rows(x, row), Rows(x[turned], row[turned])
    scores = [score(Sides(pairs, first, second), comparing(trained, "cosine")).score_P
              for first, second in ((straight, straight), (other, other), (straight, other))]
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[0], scores[2])


def test_two_processes_score_as_one_does(run, files, pairs, tmp_path):
    (tmp_path / "two").mkdir()
    words = ["--pairs", write(tmp_path / "pairs.txt", pairs), "--root", str(files[0]), "--no-picture"]
    _, rows = verified(run, tmp_path, *words)
    two = ["--results", str(tmp_path / "two" / "results.jsonl"), "--scores", str(tmp_path / "two" / "scores.csv")]
    ended = ranks(verify.main, ["--checkpoint", str(run), *words, *two], output=tmp_path / "said")
    assert [rank.code for rank in ended] == [0, 0], ended[0].err + ended[1].err
    assert ended[1].out == "" and ended[0].out.count("added to") == 1
    with open(tmp_path / "two" / "scores.csv", newline="") as file:
        other = list(csv.DictReader(file))
    assert [row | {"score": ""} for row in rows] == [row | {"score": ""} for row in other]
    assert [float(row["score"]) for row in rows] == pytest.approx([float(row["score"]) for row in other], abs=1e-5)
    assert [line["metric"] for line in lines(tmp_path / "two" / "results.jsonl")] == \
        ["verification", "AUC", "EER", "TAR", "TAR"]


def test_thresholds_chosen_on_other_pairs_are_judged_by_these(run, files, pairs, tmp_path):
    """The oracle: both lists scored by themselves, the thresholds counted by a loop."""
    val, test = (write(tmp_path / f"{name}.txt", part) for name, part in (("val", pairs[:60]), ("test", pairs[60:])))
    words = ["--root", str(files[0]), "--no-picture", "--far", "0.1"]
    (chosen, _), (_, rows) = (verified(run, tmp_path, "--pairs", path, *words) for path in (val, test))
    _, again = verified(run, tmp_path, "--pairs", test, "--threshold-from", val, *words)
    found = [line for line in lines(tmp_path / "results.jsonl") if "threshold" in line["protocol"]]
    best, lenient = chosen["verification"]["threshold"], chosen["TAR"]["threshold"]
    assert [line["threshold"] for line in found] == [best] * 3 + [lenient] * 3
    assert [line["protocol"]["threshold"] for line in found] == ["most accurate"] * 3 + ["FAR<=0.1"] * 3
    expected = []
    for threshold in (best, lenient):
        said = [(float(row["score"]) >= threshold, row["same"] == "1") for row in rows]
        accepted = {same: [yes for yes, kind in said if kind == same] for same in (True, False)}
        expected += [sum(yes == same for yes, same in said) / len(said),
                     *(sum(accepted[same]) / len(accepted[same]) for same in (False, True))]
    assert [line["value"] for line in found] == pytest.approx([100 * share for share in expected])
    assert [row["accepted"] for row in again] == [str(int(float(row["score"]) >= best)) for row in rows]


def test_thresholds_come_from_the_training_images_or_the_command_line(run, files, tmp_path, capsys):
    verified(run, tmp_path, "--draw", "200", "--threshold-from", "train", "--no-picture", "--far", "0.1")
    found = [line for line in lines(tmp_path / "results.jsonl") if "threshold" in line["protocol"]]
    trained = load_trained(run)
    pairs = drawn(trained.splits().train, 200)
    rows = embedded(trained, pairs.images, "backbone")
    own = score(Sides(pairs, rows, rows), comparing(trained, "cosine"))
    assert found[0]["threshold"] == pytest.approx(best_threshold(own.score_P, own.pairs.same_P), abs=1e-6)
    assert found[0]["protocol"]["threshold_from"] == "drawn from train"
    verified(run, tmp_path, "--draw", "200", "--threshold", "0.5", "--no-picture")
    found = [line for line in lines(tmp_path / "results.jsonl") if "threshold" in line["protocol"]]
    assert [(line["metric"], line["threshold"]) for line in found] == [
        ("accuracy", 0.5), ("false accepts", 0.5), ("true accepts", 0.5)]
    a, b = (str(files[0] / name) for name in list(files[1])[:2])
    capsys.readouterr()
    verify.main(["--checkpoint", str(run), "--image", a, "--image", b, "--threshold-from", "train", "--draw", "200"])
    assert f"threshold {best_threshold(own.score_P, own.pairs.same_P):.4f} (most accurate" in capsys.readouterr().out


def test_raw_pixels_are_scored_by_the_same_measure(run, files, pairs, tmp_path):
    one = write(tmp_path / "pairs.txt", pairs)
    words = ["--pairs", one, "--root", str(files[0]), "--no-picture", "--measure", "euclidean", "--pixels"]
    verified(run, tmp_path, *words)
    found = [line for line in lines(tmp_path / "results.jsonl") if line["metric"] == "AUC"]
    assert [line["features"] for line in found] == ["raw pixels", "trained backbone"]
    trained = load_trained(run)
    value = [-(x - y).norm().item() for x, y in ([trained.views.evaluation_batch(pixels(files[0] / name)[None])
                                                  for name in pair[:2]] for pair in pairs)]
    same = torch.tensor([pair[2] == 1 for pair in pairs])
    assert found[0]["value"] == pytest.approx(100 * area(roc(torch.tensor(value), same)), abs=0.01)
    assert found[0]["weights"] is None and found[0]["layer"] == "pixels"


@pytest.mark.parametrize("text, said", [
    ("{0} {1} 1\n{0} {2} 0\n{1} {2} 2\n", ":3: label '2' of a pair. Give 1"),
    ("{0} {1} 1\n{0} gone.png 0\n", "1 of its files is not below"),
    ("{0} {1} 1\n{0} {2} 1\n", "all 2 pairs of .* are similar"),
])
def test_a_bad_list_is_one_clear_error(text, said, files, tmp_path):
    file = tmp_path / "pairs.txt"
    file.write_text(text.format(*files[1]))
    with pytest.raises(ValueError, match=said):
        listed([file], files[0], 1)
    with pytest.raises(ValueError, match="3 files given"):
        listed([file] * 3, files[0], 1)


def test_two_lists_of_unequal_lengths_are_named_by_the_option(files, tmp_path):
    path = next(iter(files[1]))
    lists = [Path(write(tmp_path / f"{n}.txt", n * [(path, 1)])) for n in (3, 2)]
    with pytest.raises(ValueError, match=r"^--pairs: .*2\.txt lists 2 images, and .*3\.txt 3"):
        listed(lists, files[0], 1)


def test_the_help_names_every_default(capsys):
    with pytest.raises(SystemExit):
        verify.main(["--help"])
    assert "--layer" in (said := capsys.readouterr().out) and "None" not in said


@pytest.mark.parametrize("words, said", [
    (["--image", "a.png"], "1 given. Give two"),
    (["--subject", "a", "--image", "b"], "Give --subject, --impostors and --image"),
    (["--pairs", "a", "--classes", "b"], "a list is measured by itself"),
    (["--far", "2"], "from 0 to 1"),
    (["--folds", "1"], "at least 2 folds"),
    (["--draw", "99999999999"], "--draw: 99999999999 given. Give 10,000,000 pairs at most"),
    (["--threshold", "nan"], "--threshold: nan given. Give a finite score"),
    (["--image", ".", "--image", "a"], "--image: . is a folder. Give two image files"),
    (["--threshold-from", "a", "--threshold", "1"], "Leave out --threshold"),
    (["--threshold-from", "a", "--pairs", "a"], "not judged by the pairs that it was chosen on"),
    (["--image", "a", "--image", "b", "--far", "0.1", "0.2"], "with --image one of them"),
])
def test_what_cannot_be_meant_is_refused_before_a_checkpoint_is_read(words, said, capsys):
    with pytest.raises(SystemExit) as stopped:
        verify.main(["--checkpoint", "nowhere", *words])
    assert stopped.value.code == 2 and said in capsys.readouterr().err
