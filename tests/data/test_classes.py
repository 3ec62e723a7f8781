"""A set of some classes only: which images are left, that their labels keep their numbers, and what is refused."""

import pytest
import torch

from common.config import ConfigError
from common.data import Splits, arrays, folder, only_classes, pair_list
from common.identity import of as identity
from common.measuring.pair_list import drawn
from common.run import Run
from tests.tiny import photos, settings

LABELS = torch.tensor([4, -1, 0, 2, 0, 4, 7, 2, -1, 7])
SEEN = ["0", "7"]


@pytest.fixture(scope="module")
def whole() -> Splits:
    """Image i has pixels of value i, in both splits; the test labels are those of training, reversed."""
    images = torch.arange(10, dtype=torch.uint8)[:, None, None].expand(10, 2, 3)
    return arrays(images, LABELS, images, LABELS.flip(0))


@pytest.mark.parametrize("test, tested", [("all", [*range(10)]), ("same", [0, 3, 5, 7]), ("others", [2, 4, 6, 9])])
def test_the_images_are_those_of_the_classes_in_their_order(whole, test, tested):
    left = only_classes(whole, SEEN, test)
    for images, before, rows in zip(left, whole, ([2, 4, 6, 9], tested), strict=True):
        assert images.labels.tolist() == before.labels[rows].tolist() and images.classes == before.classes
        assert images.keys == [before.keys[i] for i in rows]
        assert [int(images.read(i).max()) for i in range(len(images))] == rows
        assert images.array.amax(dim=(1, 2, 3)).tolist() == rows


def test_which_classes_are_named_and_not_their_order_tells_one_set_from_another(whole):
    prints = [only_classes(whole, names).train.fingerprint() for names in (["0", "7"], ["7", "0"], ["0", "4"])]
    assert prints[0] == prints[1] != prints[2] and whole.train.fingerprint() not in prints


def test_files_are_read_one_by_one_as_they_were(tmp_path):
    whole = folder(photos(tmp_path, count=9, classes=3), train=".", test=None)
    left = only_classes(whole, ["class0", "class2"])
    assert left.test is None and left.train.array is None and left.train.keys == whole.train.keys[:3] + \
        whole.train.keys[6:]
    assert torch.equal(left.train.read(3), whole.train.read(6)) and left.train.path(3) == whole.train.path(6)


def test_pairs_of_classes_not_seen_are_drawn_from_the_test_images(whole):
    pairs = drawn(only_classes(whole, SEEN, "others").test, 40)
    assert {*pairs.images.labels.tolist()} == {2, 4}


@pytest.mark.parametrize("classes, message", [
    ([], "classes: none given"), (["0", "7", "0"], "classes: 0 given twice"),
    (["0", "cat"], r"classes: train has no cat; it has 0, 1, 2"), (["3"], "train holds no image of 3"),
])
def test_classes_that_cannot_be_taken_are_refused(whole, classes, message):
    with pytest.raises(ValueError, match=message):
        only_classes(whole, classes)


def test_test_images_of_no_other_class_are_refused(whole):
    with pytest.raises(ValueError, match="test holds no image of 1, 3, 5, 6"):
        only_classes(whole, ["0", "2", "4", "7"], "others")


def test_a_list_of_pairs_is_refused(tmp_path):
    photos(tmp_path, count=4, classes=0)
    (tmp_path / "pairs.txt").write_text("000.png 001.png 1\n002.png 003.png 0\n")
    with pytest.raises(ValueError, match="is a list of pairs, whose labels are no classes"):
        only_classes(pair_list(tmp_path / "pairs.txt"), ["0"])


def config(place, *classes, of="common.data.digits"):
    sections = {"views": {"name": "common.data.recipes.digits"}, "train": {"epochs": 1, "batch_size": 64}}
    made = settings(place, place, **sections)
    made.set("data", {"name": "common.data.only_classes", "of": {"name": of}, "classes": [*classes]}, "test")
    return made


def test_a_config_holds_the_set_within_the_set(tmp_path):
    run = Run(config(tmp_path, "1", "3", "5"))
    assert {*run.splits.train.labels.tolist()} == {1, 3, 5} and len({*run.splits.test.labels.tolist()}) == 10
    assert run.facts["num_classes"] == 10
    other = Run(config(tmp_path, "1", "3"))
    assert identity(run)["data"] != identity(other)["data"] and identity(run)["digest"] != identity(other)["digest"]


@pytest.mark.parametrize("made, message", [
    (lambda place: config(place), "classes: none given"),
    (lambda place: config(place, "1", of="common.data.digitz"), "digits"),
    (lambda place: config(place, "1", of="common.schedule.constant"), "data.of"),
])
def test_a_mistake_in_the_config_is_said_with_its_place(tmp_path, made, message):
    with pytest.raises(ConfigError, match=message):
        Run(made(tmp_path))
