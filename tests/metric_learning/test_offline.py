"""Offline mining beside loops over plain numbers: which triplets, in which order, and their loss."""

from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from common.data.datasets import Images
from common.method import Batch
from metric_learning import OfflineTriplet, offline_mining
from metric_learning.offline_mining import mine_triplets
from metric_learning.triplet_table import Mined, Table
from tests.metric_cases import lengths

KEY, MARGIN = (5, 17), 0.3
LABELS = {
    "even": [0, 1, 2, 3] * 6,
    "gaps, one of a class, unlabelled": [4, 90, 4, -1, 7, 7, -1, 4, 90, 13, 7, -1, 4, 4, 90, 7],
}


@pytest.fixture(params=LABELS)
def label(request):
    return torch.tensor(LABELS[request.param])


def unit(rows, dim=3):
    return F.normalize(torch.randn(rows, dim, dtype=torch.float64), dim=1)


def images(labels, bad=()):
    found = Images("some", [str(i) for i in range(len(labels))], torch.tensor(labels), [str(c) for c in range(99)],
                   torch.zeros(len(labels), 3, 8, 8, dtype=torch.uint8))
    found.bad = dict.fromkeys(bad, "no image")
    return found


def others(label, a):
    return [n for n in range(len(label)) if -1 not in (label[a], label[n]) and label[n] != label[a]]


def allowed(d, label, a, p, negatives):
    """The negatives of which any may be chosen, by the definition."""
    far_enough = [n for n in others(label, a) if d[a, n] > d[a, p]]
    inside = [n for n in far_enough if d[a, n] < d[a, p] + MARGIN]
    nearest, farthest = (lambda among: min(among, key=lambda n: d[a, n])), max(others(label, a), key=lambda n: d[a, n])
    if negatives == "hardest":
        return [nearest(others(label, a))]
    return inside or [nearest(far_enough) if far_enough else farthest]


# which triplets

@pytest.mark.parametrize("negatives", ["hardest", "semi_hard"])
@pytest.mark.parametrize("block", [1, 20, 1 << 20])                     # one anchor, one or some at a time, all
def test_the_triplets_are_those_of_a_loop(label, negatives, block, monkeypatch):
    monkeypatch.setattr(offline_mining, "BLOCK", block)
    x = unit(len(label))
    found, d = mine_triplets(x, label, negatives, MARGIN, KEY), torch.cdist(x, x).square()
    rows = found.triplet_R3.tolist()
    assert sorted(a for a, _, _ in rows) == [a for a in range(len(label)) if label[a] >= 0 and
                                             (label == label[a]).sum() > 1]
    for (a, p, n), active, hard in zip(rows, found.active_R.tolist(), found.hard_R.tolist(), strict=True):
        assert p != a and label[p] == label[a] and n in allowed(d, label, a, p, negatives)
        assert (active, hard) == (bool(d[a, p] - d[a, n] + MARGIN > 0), bool(d[a, n] < d[a, p]))


def test_the_cases_of_a_semi_hard_negative_all_occur(label):
    """Or the loop above would not have tried them."""
    x, kinds = unit(len(label)), set()
    found = mine_triplets(x, label, "semi_hard", MARGIN, KEY)
    for (a, p, n) in found.triplet_R3.tolist():
        pos, neg = (x[a] - x[p]).square().sum(), (x[a] - x[n]).square().sum()
        kinds.add("all nearer" if neg < pos else "inside" if neg < pos + MARGIN else "outside")
    assert kinds == {"all nearer", "inside", "outside"}


def test_positives_and_semi_hard_negatives_are_drawn_evenly_and_anew():
    label, x = torch.tensor([0] * 4 + [1] * 3), torch.cat([torch.eye(3)[:1]] * 4 + [torch.eye(3)[1:2]] * 3)
    found = [mine_triplets(x, label, "semi_hard", 3.0, (5, step)).triplet_R3.tolist() for step in range(600)]
    positives, negatives = (Counter(triplets[0][place] for triplets in found) for place in (1, 2))
    assert [triplets[0][0] for triplets in found] == [0] * 600
    assert positives.keys() == {1, 2, 3} and min(positives.values()) > 150
    assert negatives.keys() == {4, 5, 6} and min(negatives.values()) > 150
    again = mine_triplets(x, label, "semi_hard", 3.0, (5, 7)).triplet_R3.tolist()
    assert again == found[7]


# in which order

def table(rows, size=None):
    made = Table(size or len(rows))
    made.write_(torch.tensor(rows), torch.tensor([row[0] % 2 == 0 for row in rows]))
    return made


def stretch(made, every=4, batch=6, number=0, size=40):
    flat = Mined(made, every)(images([0] * size), batch, 3, number).tolist()
    return [tuple(flat[at:at + 3]) for at in range(0, len(flat), 3)]


def test_a_stretch_takes_active_triplets_first_and_each_once_before_any_again():
    rows = [(a, a + 10, a + 20) for a in range(6)]                      # 0, 2 and 4 are active; 8 places
    few = Counter(stretch(table(rows, size=9)))
    assert len(few) == 6 and few.total() == 8
    assert {row for row, times in few.items() if times == 2} < set(rows[0::2])
    assert set(stretch(table(rows), every=1, batch=9)) == set(rows[0::2])


def test_the_order_changes_with_the_stretch_and_mixes_the_active_with_the_others():
    rows = [(a, a + 40, a + 80) for a in range(40)]
    first, second = (stretch(table(rows), every=10, batch=12, number=number, size=120) for number in (0, 1))
    assert sorted(first) == sorted(second) == rows and first != second
    assert stretch(table(rows), 10, 12, size=120) == first
    assert {row[0] % 2 for row in first[:10]} == {0, 1}


def test_a_table_forgets_what_it_held():
    made = table([(0, 1, 2), (3, 4, 5)], size=4)
    made.write_(torch.tensor([[6, 7, 8]]), torch.tensor([True]))
    triplet, active = made.read()
    assert triplet.tolist() == [[6, 7, 8]] and active.tolist() == [True] and made.triplet[1:].unique().tolist() == [-1]


@pytest.mark.parametrize("rows", [[(0, 1, 40)], [(0, -2, 3)], [(-1, -1, -1)]])
def test_rows_of_a_checkpoint_that_are_no_images_are_refused(rows):
    """Out of range they would end in a crash, on a GPU in one of the device; below zero, count from the end."""
    with pytest.raises(ValueError, match="the triplets of the checkpoint are none, or not all of images of some, of .* "
                                         "40. Go back"):
        stretch(table(rows))


@pytest.mark.parametrize("labels, share, said", [
    ([0, 1, 0, 1], 8, "8 images of a process' micro-batch are no triplets"),
    ([0, 1, 2, -1], 6, "two classes, one of two images at least; some has 3 labelled images in 3 classes"),
    ([5, 5, -1, -1], 6, "some has 2 labelled images in 1 class."),
])
def test_what_gives_no_triplets_is_refused(labels, share, said):
    with pytest.raises(ValueError, match=said):
        Mined(Table(4), 4).check(images(labels), share, share)


def test_steps_whose_order_no_memory_holds_are_refused():
    with pytest.raises(ValueError, match="every: 99999999999 steps of 6 images are ordered at once"):
        Mined(Table(4), 99999999999).check(images([0, 0, 1, 1, 2, 2]), 6, 6)


# the method

def method(encoder, num_samples=16, **settings):
    return OfflineTriplet(encoder, num_samples, **{"margin": MARGIN, "every": 4, "pool": None, **settings})


def test_the_table_is_of_the_pool_that_labels_and_readable_images_give(small_encoder):
    labels = LABELS["gaps, one of a class, unlabelled"]
    some, asked = images(labels, bad=[0, 4]), []

    def embed(index):
        asked.append(index.tolist())
        return features[index]

    made, features = method(small_encoder(), pool=9, seed=2), unit(16)
    for step in (0, 4):
        said = made.mine(embed, some, step)
        triplet, active = made.table.read()
        assert len(asked[-1]) == 9 and asked[-1] == sorted(asked[-1]) and not {0, 4} & set(asked[-1])
        assert set(triplet.flatten().tolist()) <= set(asked[-1]) and min(labels[i] for i in asked[-1]) >= 0
        assert said["triplets"] == len(triplet) and said["active"] == pytest.approx(active.float().mean())
        for a, p, n in triplet.tolist():
            assert labels[a] == labels[p] != labels[n] and a != p
    assert asked[0] != asked[1], "each pool is drawn anew"
    before = triplet
    made.mine(embed, some, 4)
    assert torch.equal(made.table.read()[0], before), "a function of weights, seed and step"


def test_mining_changes_the_table_alone_and_draws_nothing(small_encoder):
    made, features = method(small_encoder()), unit(16)
    before, rng = {name: x.clone() for name, x in made.state_dict().items()}, torch.get_rng_state()
    made.mine(lambda index: features[index], images(LABELS["even"][:16]), 0)
    assert torch.equal(torch.get_rng_state(), rng)
    assert {name for name, x in made.state_dict().items() if not torch.equal(x, before[name])} == \
        {"table.triplet", "table.active"}


def test_a_pool_without_a_triplet_is_drawn_again(small_encoder):
    """Of 3 of 16 images, 15 of them of one class, one pool in five holds another: few are needed, no run ends."""
    made = method(small_encoder(), pool=3)
    for step in range(0, 80, 4):
        made.mine(lambda index: unit(len(index)), images([0] * 15 + [1]), step)
        assert 15 in made.table.read()[0][0].tolist()


def test_pools_that_cannot_hold_a_triplet_are_an_error(small_encoder):
    with pytest.raises(ValueError, match="method.pool: .* drawn from some at step 8 held no .* Give a larger pool"):
        method(small_encoder(), pool=3).mine(unit, images([0, 0, *range(1, 15)], bad=[1]), 8)


@pytest.mark.parametrize("mistake, said", [
    ({"every": 0}, "every: 0 given"), ({"pool": 2}, "pool: 2 given"), ({"margin": 0.0}, "margin: 0.0"),
])
def test_settings_that_mean_nothing_are_refused(mistake, said, small_encoder):
    with pytest.raises(ValueError, match=said):
        method(small_encoder(), **mistake)


def test_features_that_keep_their_lengths_are_refused(small_encoder):
    """Mining takes their inner products for distances."""
    with pytest.raises(ValueError, match="encoder.unit: false given"):
        method(lengths(small_encoder()))


def triplet_batch(labels, index=None):
    view = torch.randn(len(labels), 2, 5, 5, dtype=torch.float64)
    return Batch([view], torch.arange(len(labels)) if index is None else torch.tensor(index), torch.tensor(labels))


def test_the_loss_and_the_logs_are_those_of_a_loop(small_encoder):
    made = method(small_encoder())
    batch = triplet_batch([0, 0, 1, 2, 2, 0, 1, 1, 2, 3, 0, 1, 0, 0, -1, 1, -1, 0])     # the last three are not whole
    output, x = made(batch), made.encoder(batch.views[0]).detach()
    d = torch.cdist(x, x).square()
    losses = [max(0.0, float(d[t, t + 1] - d[t, t + 2]) + MARGIN) for t in (0, 3, 6)]
    assert float(output.loss.detach()) == pytest.approx(sum(losses) / 3)
    assert float(output.logs["active"]) == pytest.approx(sum(loss > 0 for loss in losses) / 3)
    for name, to in (("d_pos", 1), ("d_neg", 2)):
        assert float(output.logs[name]) == pytest.approx(sum(float(d[t, t + to]) for t in (0, 3, 6)) / 3)


def test_an_image_that_stands_twice_in_a_step_is_not_its_own_neighbour(small_encoder):
    """Image 4 is alone in its class: it has no positive, though it stands there twice."""
    made, labels, index = method(small_encoder()), [0, 1, 1, 0, 2, 2], [4, 5, 6, 4, 7, 8]
    batch = triplet_batch(labels, index)
    batch.views[0][3] = batch.views[0][0]
    x = made.encoder(batch.views[0]).detach()
    right = [labels[max((j for j in range(6) if j != i), key=lambda j, i=i: float(x[i] @ x[j]))] == labels[i]
             for i in (1, 2, 4, 5)]
    assert float(made(batch).logs["top1"]) == pytest.approx(sum(right) / 4)


def test_a_batch_without_a_whole_triplet_has_no_loss_and_no_gradient(small_encoder):
    made = method(small_encoder())
    output = made(triplet_batch([0, 1, 1, -1, -1, 2, 3, 3, 3]))
    output.loss.backward()
    assert float(output.loss.detach()) == 0 and all(float(x) == 0 for name, x in output.logs.items() if name != "top1")
    assert all(p.grad.abs().max() == 0 for p in made.parameters())
