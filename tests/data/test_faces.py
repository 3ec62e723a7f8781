"""The Olivetti faces: a file in scikit-learn's own form is read as it stands, and people are split, not images."""

import joblib
import numpy as np
import pytest
import torch

from common.data import olivetti
from common.measuring.pair_list import drawn

FILE = "olivetti_py3.pkz"                           # what scikit-learn calls it


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("SCIKIT_LEARN_DATA", str(tmp_path))
    return tmp_path


@pytest.fixture
def faces(home):
    """Noise in place of faces, each image stored by columns, as scikit-learn's file has them."""
    pixels = np.random.default_rng(0).integers(0, 256, (400, 64, 64)).astype(np.uint8)
    pixels[0, 0, :2] = 0, 255                       # it stretches what is there to the whole range
    joblib.dump(pixels.transpose(0, 2, 1).reshape(400, -1), home / FILE, compress=6)
    return torch.from_numpy(pixels)


def number(key: str) -> int:
    return int(key.removeprefix("olivetti/"))


def test_images_are_those_of_the_file_ten_of_each_person(faces):
    train, test = olivetti(test=0)
    assert test is None and torch.equal(train.array[:, 0], faces)
    assert train.labels.tolist() == [i // 10 for i in range(400)] and len(train.classes) == 40


def test_people_are_split_and_not_their_images(faces):
    train, test = olivetti(test=12)
    assert not {*train.labels.tolist()} & {*test.labels.tolist()} and train.classes == test.classes
    assert (len(train), len(test)) == (280, 120)
    for images in (train, test):
        rows = [number(key) for key in images.keys]
        assert images.labels.tolist() == [row // 10 for row in rows] and torch.equal(images.array[:, 0], faces[rows])
    assert olivetti(test=12).test.fingerprint() == test.fingerprint() != olivetti(12, split_seed=1).test.fingerprint()


def test_pairs_of_people_not_seen_can_be_drawn(faces):
    pairs = drawn(olivetti().test, 100)
    label_n = pairs.images.labels
    assert torch.equal(label_n[pairs.first_P] == label_n[pairs.second_P], pairs.same_P) and pairs.same_P.sum() == 50


def test_where_they_are_not_on_the_disk_the_way_to_get_them_is_said(home):
    with pytest.raises(ValueError, match=rf"{home} holds no Olivetti faces. Get them once .*fetch_olivetti_faces"):
        olivetti()


def test_a_damaged_file_is_said(home):
    (home / FILE).write_bytes(b"no faces")
    with pytest.raises(ValueError, match="are damaged: .* Remove olivetti_py3.pkz"):
        olivetti()


@pytest.mark.parametrize("test", [-1, 39])
def test_fewer_than_two_people_to_train_on_are_refused(test):
    with pytest.raises(ValueError, match=f"test: {test} of 40 people. Give 0 to 38"):
        olivetti(test)
