"""Lists of pairs: what they become, how they come, and what is said of those that are none."""

import pytest
import torch
from PIL import Image

from common.data import pair_list
from common.data.loader import Loader
from common.data.orders import Balanced, RandomPairs
from common.data.pairs import read_pairs
from common.data.recipes import small_color

VIEWS = small_color(8, num_views=1)
LABELS = [1, 0, 0, 1, 1, 0, 1, 0, 0]


@pytest.fixture
def place(tmp_path):
    """Ten pictures, of which number i has pixels of value i, and the lists of nine pairs (i, i + 1) in every form."""
    for i in range(10):
        Image.new("RGB", (8, 8), (i, i, i)).save(tmp_path / f"{i} it.png")
    lines = enumerate(LABELS)
    write(tmp_path, "train1.txt", [f"{i} it.png {same}" for i, same in enumerate(LABELS)])
    write(tmp_path, "train2.txt", [f"{i + 1} it.png\t{same}" for i, same in enumerate(LABELS)])
    write(tmp_path, "both.txt", [f"{i} it.png {i + 1} it.png {same}" for i, same in lines])
    write(tmp_path, "commas.txt", [f"{i} it.png,{i + 1} it.png,{same}" for i, same in enumerate(LABELS)])
    write(tmp_path, "tabs.txt", [f"{i} it.png\t{i + 1} it.png\t{same}" for i, same in enumerate(LABELS)])
    return tmp_path


def write(folder, name, lines):
    (folder / name).write_text("\n".join(lines) + "\n")
    return folder / name


@pytest.mark.parametrize("lists", [("train1.txt", "train2.txt"), ("both.txt",), ("commas.txt",), ("tabs.txt",)])
@pytest.mark.parametrize("in_memory", [True, False])
def test_lists_in_every_form_are_the_same_pairs(place, lists, in_memory):
    images = pair_list(*(place / name for name in lists), in_memory=in_memory).train
    assert [images.read(i).max() for i in range(18)] == [i + j for i in range(9) for j in (0, 1)]
    first_P, second_P = images.labels.view(-1, 2).T.tolist()
    assert [a == b for a, b in zip(first_P, second_P)] == [same == 1 for same in LABELS]
    assert all(len({*first_P[:i], *second_P[:i]} & {first_P[i], second_P[i]}) == 0 for i in range(9))
    assert len(images.classes) == images.labels.max() + 1 == 18 - sum(LABELS)


def test_both_splits_share_the_classes_and_none_of_them(place):
    train, test = pair_list(place / "train1.txt", place / "train2.txt", place / "both.txt")
    assert train.classes == test.classes
    assert not {*train.labels.tolist()} & {*test.labels.tolist()}


@pytest.mark.parametrize("in_memory", [True, False])
def test_both_images_of_a_pair_come_in_one_step_and_one_share(place, in_memory):
    images = pair_list(place / "both.txt", in_memory=in_memory).train
    seen = []
    for rank in range(2):
        loader = Loader(images, VIEWS, batch_size=8, seed=0, rank=rank, world=2)
        for _, (batch,), _ in loader.stream(0, 2):
            assert (batch.index[0::2] % 2 == 0).all() and torch.equal(batch.index[0::2] + 1, batch.index[1::2])
            assert (batch.label[0::2] == batch.label[1::2]).tolist() == [LABELS[i // 2] == 1 for i in batch.index[0::2]]
            seen += batch.index.tolist()
    assert len(set(seen)) == 16                                                 # of 18: two steps of eight
    orders = [loader.order(epoch).tolist() for epoch in range(2)]
    assert orders[0] != orders[1] and all(sorted(order) == [*range(18)] for order in orders)


@pytest.mark.parametrize("in_memory", [True, False])
def test_a_pair_with_an_image_that_cannot_be_read_has_no_label(in_memory, place):
    """Its substitute may be the very image that the other one is paired with."""
    (place / "4 it.png").write_bytes(b"no image")
    images = pair_list(place / "both.txt", in_memory=in_memory).train
    loader = Loader(images, VIEWS, batch_size=18, seed=0, max_unreadable=0.2, report=None)
    for epoch, (batch,), _ in loader.stream(0, 5):
        whole = (batch.index == loader.order(epoch)).view(-1, 2).all(dim=1)
        known = (batch.label >= 0).view(-1, 2)
        assert whole.sum() == 7 and torch.equal(known, whole[:, None].expand(-1, 2))


@pytest.mark.parametrize("order", [Balanced(2), RandomPairs()])
def test_a_list_of_pairs_takes_no_other_order(place, order):
    with pytest.raises(ValueError, match="is a list of pairs, .* Leave the order out"):
        Loader(pair_list(place / "both.txt").train, VIEWS, batch_size=4, seed=0, order=order)


def test_a_share_that_cuts_a_pair_is_refused(place):
    with pytest.raises(ValueError, match="3 images of a process' micro-batch are no pairs"):
        Loader(pair_list(place / "both.txt").train, VIEWS, batch_size=6, seed=0, rank=0, world=2)


def test_paths_start_at_the_root_and_stay_below_it(place):
    lists = place / "lists"
    lists.mkdir()
    write(lists, "both.txt", ["0 it.png 1 it.png 1", "0 it.png 2 it.png 0"])
    assert len(pair_list(lists / "both.txt", root=place).train) == 4
    write(lists, "both.txt", ["both.txt.png both.txt.png 1", "both.txt.png ../0 it.png 0"])
    with pytest.raises(ValueError, match=r"both.txt:2: ../0 it.png leads out of"):
        pair_list(lists / "both.txt")


def test_pairs_are_read_with_their_lines(place):
    write(place, "both.txt", ["", "0 it.png 1 it.png 1", "", "0 it.png 2 it.png 0"])
    folder, pairs = read_pairs("pairs", place / "both.txt")
    assert folder == place and [(p.first.key, p.second.key, p.similar, p.first.line) for p in pairs] == \
        [("0 it.png", "1 it.png", True, 2), ("0 it.png", "2 it.png", False, 4)]


ONE, TWO = ["0 it.png 1", "1 it.png 0"], ["2 it.png 1", "3 it.png 0"]


@pytest.mark.parametrize("first, second, message", [
    (ONE, TWO[:1], r"train_second: .*b.txt lists 1 images, and .*a.txt 2\. Line i of both is a pair"),
    (ONE, [TWO[0], "3 it.png 1"], r"b.txt:2: label 1, but 0 in .*a.txt:2\. .* give the same label"),
    ([*ONE, "4 it.png 2"], [*TWO, "5 it.png 2"], r"a.txt:3: label '2' of a pair\. Give 1 .* 0"),
    (["0 it.png", "1 it.png"], TWO, r"a.txt:1: label '' of a pair"),
    (["0 it.png cat", "1 it.png dog"], TWO, r"a.txt:1: label 'cat' of a pair\. .* common.data.file_list"),
    ([ONE[0]] * 3, [TWO[0]] * 3, r"train: all 3 pairs of .*a.txt are similar \(1\)\. Give pairs of both kinds"),
    ([ONE[1]] * 3, [TWO[1]] * 3, r"train: all 3 pairs of .* are dissimilar \(0\)"),
    (ONE, ["2 it.png 1", "gone.png 0"], r"b.txt: 1 of its files is not below .*: gone.png \(line 2\)\. Repair"),
    (["gone.png 1", "0 it.png 0", *["away.png 0"] * 3], [TWO[0], *[TWO[1]] * 4],
     r"a.txt: 2 of its files are not below .*: gone.png \(line 1\), away.png \(line 3\)\. Repair"),
    (ONE, None, r"a.txt:1: holds no second path after '0 it.png'\. Give two paths and a label"),
    (["0 it.png 1 it.png 1", "0 it.png 1 it.png 2"], None, r"a.txt:2: label '2' of a pair"),
    (["0 it.png 1 it.png"], None, r"a.txt:1: label '' of a pair"),
    ([], None, "lists no images"),
])
def test_lists_that_are_no_pairs_are_refused_before_an_image_is_read(place, first, second, message):
    lists = [write(place, name, lines) for name, lines in (("a.txt", first), ("b.txt", second)) if lines is not None]
    with pytest.raises(ValueError, match=message) as caught:
        pair_list(*lists)
    assert "\n" not in str(caught.value)


def test_lists_that_are_not_there_or_alone_are_named(place):
    with pytest.raises(ValueError, match="train: cannot read the list .*gone.txt: there is no such file"):
        pair_list(place / "gone.txt")
    with pytest.raises(ValueError, match="train_second: cannot read the list .*gone.txt: No such file"):
        pair_list(place / "train1.txt", place / "gone.txt")
    with pytest.raises(ValueError, match="test_second: given without test"):
        pair_list(place / "both.txt", test_second=place / "train2.txt")
    with pytest.raises(ValueError, match="train_second: .*train1.txt is the first list, too"):
        pair_list(place / "train1.txt", place / "train1.txt")
    (place / "other").mkdir()
    other = write(place / "other", "b.txt", ["2 it.png 1", "3 it.png 0"])
    with pytest.raises(ValueError, match="root: .* lie in two folders. Give the folder where their paths start"):
        pair_list(write(place, "a.txt", ONE), other)
