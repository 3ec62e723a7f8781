"""Orders of an epoch against what they promise, counted one by one."""

from collections import Counter

import pytest
import torch

from common import counter
from common.config import TRUSTED, Config, ConfigError
from common.data.datasets import Images
from common.data.loader import Loader
from common.data.orders import Balanced, Classes, Order, RandomPairs, Shuffled, Streams, Tuplets, groups
from common.data.recipes import small_color
from common.encoder import Encoder
from common.method import Method, Output
from common.run import Run
from common.sections import check_early
from tests import tiny

SEED = 5
VIEWS = small_color(8, num_views=1)
GAPS = [0] * 9 + [3] * 4 + [-1] * 5 + [7] * 12 + [8] + [9] * 6          # 37 images; class 8 has one, five have no label


def images(labels):
    """In memory, of 8 pixels, mixed."""
    labels_n = torch.tensor(labels)[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    array = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8).clone()
    return Images("some", [str(i) for i in range(len(labels))], labels_n, [str(c) for c in range(10)], array)


def steps(order, some, batch_size, epoch):
    """The labels and images of each step."""
    found = order(some, batch_size, SEED, epoch).tolist()
    assert len(found) >= len(some) // batch_size * batch_size
    rows = [found[at : at + batch_size] for at in range(0, len(found) - batch_size + 1, batch_size)]
    return [([some.labels[i].item() for i in row], row) for row in rows]


def loader(some, order, **options):
    return Loader(some, VIEWS, seed=SEED, order=order, **options)


# groups and classes

def test_members_all_come_before_any_comes_again():
    members = torch.tensor([4, 7, 9, 20, 31])
    flat = groups(members, 1, 12, SEED, 0).flatten().tolist()
    assert sorted(flat[:5]) == sorted(flat[5:10]) == members.tolist() and flat[:5] != flat[5:10]
    twos = groups(members, 2, 7, SEED, 0).tolist()
    assert all(len(set(row)) == 2 for row in twos)
    assert all(len({*twos[i], *twos[i + 1]}) == 4 for i in (0, 2, 4))           # two of two, and one left in each round
    assert groups(members, 2, 0, SEED, 0).shape == (0, 2)


def test_classes_are_those_of_which_there_are_images():
    some = images(GAPS)
    classes = Classes.of(some.labels)
    members = [part.tolist() for part in classes.members()]
    assert members == [[i for i in range(37) if some.labels[i] == c] for c in (0, 3, 7, 8, 9)]
    assert classes.holding(6).tolist() == [0, 2, 4]
    assert len(Classes.of(torch.full((4,), -1))) == 0


# P x K

@pytest.mark.parametrize("labels, batch_size, per_class", [(GAPS, 6, 3), (GAPS, 12, 4), (GAPS, 4, 2), (GAPS, 8, 2),
                                                           ([0, 1] * 20, 8, 4), ([*range(7)] * 5, 10, 2)])
def test_a_step_holds_k_images_of_each_of_p_classes(labels, batch_size, per_class):
    some = images(labels)
    for epoch in range(3):
        for of, index in steps(Balanced(per_class), some, batch_size, epoch):
            assert len(set(index)) == batch_size and -1 not in of
            assert set(Counter(of).values()) == {per_class}
            assert all(len(set(of[at : at + per_class])) == 1 for at in range(0, batch_size, per_class))


def test_classes_come_equally_often_whatever_they_hold():
    some = images([0] * 100 + [1] * 10 + [2] * 10 + [3] * 4)
    counts = Counter(label for of, _ in steps(Balanced(2), some, 8, 0) for label in of)
    assert set(counts.values()) == {2 * (124 // 8)}                             # four classes, all in each step
    some = images([0] * 90 + [1] * 10 + [2] * 10)
    counts = Counter(label for epoch in range(40) for of, _ in steps(Balanced(2), some, 4, epoch) for label in of)
    assert all(abs(count / (40 * 27 * 4) - 1 / 3) < 0.02 for count in counts.values())      # one of three left out


def test_the_images_of_a_class_all_come_before_any_comes_again():
    some = images([0] * 12 + [1] * 8 + [2] * 20)
    seen = {0: [], 1: [], 2: []}
    for of, index in steps(Balanced(2), some, 6, 0):                            # all three classes in each of 6 steps
        for label, i in zip(of, index):
            seen[label].append(i)
    assert len(set(seen[0])) == 12 and len(set(seen[2])) == 12
    assert len(set(seen[1][:8])) == 8 and len(seen[1]) == 12


def test_all_labelled_images_of_large_classes_come_in_some_epoch():
    some = images(GAPS)
    seen = {i for epoch in range(20) for _, index in steps(Balanced(4), some, 8, epoch) for i in index}
    assert seen == {i for i in range(37) if some.labels[i] in (0, 3, 7, 9)}


@pytest.mark.parametrize("order", [Balanced(2), RandomPairs(0.3), Shuffled(), Tuplets(4), Streams()])
def test_an_order_is_a_function_of_seed_and_epoch(order):
    some = images(GAPS)
    first = order(some, 8, SEED, 0)
    assert torch.equal(first, order(some, 8, SEED, 0))
    assert not torch.equal(first, order(some, 8, SEED, 1)) and not torch.equal(first, order(some, 8, SEED + 1, 0))


@pytest.mark.parametrize("order", [Balanced(2), RandomPairs(0.5), Tuplets(4), Streams()])
def test_ranks_and_micro_batches_are_slices_and_a_late_start_is_the_tail(order):
    some, options = images([*range(9), -1] * 5), {"batch_size": 16, "accumulate": 2}
    whole = [[batch.index for batch in batches] for _, batches, _ in loader(some, order, batch_size=16).stream(0, 6)]
    late = [batches[0].index for _, batches, _ in loader(some, order, batch_size=16).stream(3, 6)]
    assert all(torch.equal(a, b[0]) for a, b in zip(late, whole[3:], strict=True))
    ranks = [[[batch.index for batch in batches] for _, batches, _
              in loader(some, order, rank=rank, world=2, **options).stream(0, 6)] for rank in range(2)]
    for step, (index,) in enumerate(whole):
        assert torch.equal(index, torch.cat([ranks[rank][step][micro] for micro in range(2) for rank in range(2)]))


def test_labels_are_those_of_the_images_that_come():
    some = images(GAPS)
    for _, (batch,), _ in loader(some, Balanced(2), batch_size=8).stream(0, 4):
        assert torch.equal(batch.label, some.labels[batch.index])
        assert torch.equal(batch.label[0::2], batch.label[1::2])


def test_small_classes_are_left_out_aloud(caplog):
    loader(images(GAPS), Balanced(5), batch_size=10)
    assert caplog.messages == ["some: 2 of 5 classes hold fewer than 5 images and are left out"]


@pytest.mark.parametrize("labels, order, options, message", [
    (GAPS, Balanced(6), {"batch_size": 24}, "of each of 4 classes, and of the 5 classes of some 3 hold 6 labelled"),
    ([1] * 20, Balanced(2), {"batch_size": 4}, "of each of 2 classes, and of the 1 classes of some 1 hold 2"),
    ([-1] * 20, Balanced(2), {"batch_size": 4}, "of the 0 classes of some 0 hold 2"),
    (GAPS, Balanced(4), {"batch_size": 4}, "4 images of a process' micro-batch are not two or more classes of 4"),
    (GAPS, Balanced(4), {"batch_size": 12, "world": 2, "rank": 0}, "6 images of a process' micro-batch are not"),
    (GAPS, Balanced(4), {"batch_size": 20, "world": 2, "rank": 0}, "10 images of a process' micro-batch are not"),
    (GAPS, RandomPairs(), {"batch_size": 9}, "9 images of a process' micro-batch are no pairs"),
    ([1] * 20, RandomPairs(), {"batch_size": 4}, "two classes, one of two .* 20 labelled images in 1 class. Give"),
    ([-1] * 20, RandomPairs(), {"batch_size": 4}, "has 0 labelled images in 0 classes"),
    ([*range(10)], RandomPairs(), {"batch_size": 4}, "has 10 labelled images in 10 classes"),
    (GAPS, Tuplets(4), {"batch_size": 12, "world": 2, "rank": 0}, "6 images of a process' micro-batch are no tuplets"),
    (GAPS, Tuplets(6), {"batch_size": 6}, "takes 5 classes, and of the 5 classes of some 4 hold two labelled"),
    ([-1] * 20, Tuplets(3), {"batch_size": 3}, "takes 2 classes, and of the 0 classes of some 0 hold two"),
    (GAPS, Order(), {"batch_size": 4}, "Order says of no images how they are ordered. Give one of"),
    (GAPS, Streams(), {"batch_size": 6, "world": 2, "rank": 0}, "3 images of a process' micro-batch are no pairs"),
    ([1] * 20, Streams(), {"batch_size": 4}, "some has labelled images of 1. Give images of two classes or more"),
])
def test_images_that_cannot_be_ordered_so_are_refused(labels, order, options, message):
    with pytest.raises(ValueError, match=message):
        loader(images(labels), order, **options)


@pytest.mark.parametrize("make", [lambda: Balanced(1), lambda: RandomPairs(0), lambda: RandomPairs(1.0),
                                  lambda: Tuplets(2)])
def test_settings_that_mean_nothing_are_refused(make):
    with pytest.raises(ValueError, match="given. Give"):
        make()


# random pairs

@pytest.mark.parametrize("positive", [0.5, 0.3, 0.9])
def test_any_row_of_pairs_has_its_share_of_positives(positive):
    some = images(GAPS)
    for epoch in range(4):
        index = RandomPairs(positive)(some, 6, SEED, epoch)
        of = some.labels[index].view(-1, 2)
        same = (of[:, 0] == of[:, 1]).tolist()
        assert (of >= 0).all() and (index[0::2] != index[1::2]).all()
        for start in range(len(same)):
            for stop in range(start + 1, len(same) + 1):
                assert abs(sum(same[start:stop]) - positive * (stop - start)) < 1 + 1e-9


def test_partners_are_all_others_of_the_class_or_of_other_classes_equally_often():
    some = images([0] * 3 + [1] * 4 + [2] + [-1] * 2)
    index = torch.cat([RandomPairs()(some, 10, SEED, epoch) for epoch in range(2000)]).view(-1, 2)
    counts = Counter(map(tuple, index.tolist()))
    of = some.labels.tolist()
    for i in range(10):
        others = [j for j in range(10) if j != i and -1 not in (of[i], of[j])]
        for partners in ([j for j in others if of[j] == of[i]], [j for j in others if of[j] != of[i]]):
            found = [counts.pop((i, j)) for j in partners]
            assert not found or max(found) < 1.8 * min(found), (i, found)
    assert not counts                                                           # no unlabelled image, none with itself


# tuplets

@pytest.mark.parametrize("size", [3, 4, 5])
def test_a_tuplet_is_two_images_of_a_class_and_one_of_each_of_others(size):
    some = images(GAPS)
    for epoch in range(3):
        for of, index in steps(Tuplets(size), some, 2 * size, epoch):
            for at in (0, size):
                classes, chosen = of[at : at + size], index[at : at + size]
                assert classes[0] == classes[1] and len(set(classes)) == size - 1 and len(set(chosen)) == size
                assert not {-1, 8} & set(classes)                               # no label; alone in its class


def test_all_images_come_in_each_place_of_a_tuplet():
    some = images(GAPS)
    index = torch.cat([Tuplets(4)(some, 8, SEED, epoch) for epoch in range(200)]).view(-1, 4)
    for place in range(4):
        assert set(index[:, place].tolist()) == {i for i in range(37) if some.labels[i] not in (-1, 8)}
        of = Counter(some.labels[index[:, place]].tolist())
        assert all(abs(count / len(index) - 1 / 4) < 0.06 for count in of.values())
    counts = Counter(index.flatten().tolist())
    for one in (0, 3, 7, 9):
        found = [count for i, count in counts.items() if some.labels[i] == one]
        assert max(found) < 1.4 * min(found)


def test_small_classes_are_left_out_of_tuplets_aloud(caplog):
    loader(images(GAPS), Tuplets(4), batch_size=8)
    assert caplog.messages == ["some: 1 of 5 classes hold one image and are left out"]


# two streams

def test_two_streams_hold_every_image_once_and_pair_them_anew_each_epoch():
    some, pairs = images(GAPS), []
    for epoch in range(3):
        index = Streams()(some, 4, SEED, epoch)
        assert sorted(index.tolist()) == list(range(37))                        # those without a label, too
        pairs.append({frozenset(pair) for pair in index[:36].view(-1, 2).tolist()})
    assert len(pairs[0] & pairs[1]) < 4 and len(pairs[1] & pairs[2]) < 4


def test_of_ten_classes_of_one_size_a_tenth_of_the_pairs_is_of_one_class():
    some = images([*range(10)] * 400)
    of = some.labels[Streams()(some, 4, SEED, 0)].view(-1, 2)
    assert abs((of[:, 0] == of[:, 1]).double().mean() - 0.1) < 0.02             # 0.007 is the standard error


def test_a_list_of_pairs_is_no_two_streams():
    some = images(GAPS)
    some.together = 2
    with pytest.raises(ValueError, match="some is a list of pairs"):
        Streams().check(some, 4, 4)


# a run

class Ordered(Method):
    """Takes its images in an order."""

    def __init__(self, encoder: Encoder, order: Order | None = None):
        super().__init__()
        self.encoder, self.order = encoder, order

    def forward(self, batch):
        assert len(batch.label.unique()) == 2 and torch.equal(batch.label[0::2], batch.label[1::2])
        loss = self.encoder(batch.views[0]).sum(1).mean()
        return Output(loss, {"loss": loss.detach()}, {})


def settings(root, folder, batch_size, **order):
    method = {"name": "tests.data.test_orders.Ordered", "encoder": tiny.METHODS["instdisc"]["encoder"], "order": order}
    config = tiny.settings(root, folder, "instdisc", evaluate={"every": 0, "protocols": []},
                           train={"epochs": 1, "batch_size": batch_size})
    config.set("method", method, "the test")
    return Config.parse(config.text(), "tiny.yaml", trusted=(*TRUSTED, "tests"))


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    return tiny.photos(tmp_path_factory.mktemp("photos"))


def test_a_method_gets_its_images_in_its_order(photos, tmp_path):
    config = settings(photos, tmp_path, 4, name="common.data.orders.Balanced", per_class=2)
    check_early(config)
    Run(config).train()


def test_a_method_with_no_order_of_its_own_gets_them_shuffled():
    some = images(GAPS)
    assert torch.equal(loader(some, Method.order, batch_size=8).order(2),
                       counter.permutation(37, SEED, counter.stream("order"), 2))


def test_something_else_in_the_place_of_an_order_is_refused(photos, tmp_path):
    config = settings(photos, tmp_path, 4, name="common.evaluate.KNN")
    with pytest.raises(ConfigError, match="method.order: wants a Order .* common.evaluate.KNN gives a KNN"):
        Run(config)


def test_a_run_names_the_order_that_its_images_do_not_fill(photos, tmp_path):
    config = settings(photos, tmp_path, 8, name="common.data.orders.Balanced", per_class=2)
    with pytest.raises(ConfigError, match=r"tiny.yaml:\d+: method.order: a step takes 2 images of each of 4 classes"):
        Run(config)
