"""Contrastive loss as a method: each of its modes beside a loop over pairs, and pytorch-metric-learning."""

import pytest
import torch

from common.data.datasets import Images
from common.data.orders import Balanced, RandomPairs
from metric_learning import Contrastive, Memory, Siamese
from metric_learning.triplet_table import Mined, Table
from tests.metric_learning import loops
from tests.metric_learning.loops import batch, compared, euclidean, mean, past

MIXED = [0, 1, 5, 20, 21, 2, 8, 16]             # three of a class; others alone in theirs; one not labelled
SIDE_BY_SIDE = [0, 1, 5, 8, 21, 9, 14, 15, 22, 23]


def features(method, given):
    return method.encoder(given.views[0]).detach()


def pull(d):
    return d ** 2 / 2                                                                   # Hadsell et al. 2006, Eq. 4


def push(d, margin):
    return max(0, margin - d) ** 2 / 2


def adjacent(method, given):
    """The loss, the mean distance of similar and of other pairs, the share of these inside the margin."""
    x, label = features(method, given), given.label.tolist()
    known = [i for i in range(0, len(x), 2) if -1 not in (label[i], label[i + 1])]
    d = {i: euclidean(x[i], x[i + 1]) for i in known}
    similar, others = ([d[i] for i in known if (label[i] == label[i + 1]) == same] for same in (True, False))
    loss = mean([pull(d) for d in similar] + [push(d, method.margin) for d in others])
    return loss, mean(similar), mean(others), mean(d < method.margin for d in others)


def every(method, given):
    """The same of all pairs, those with the memory, too."""
    x, similar, others = features(method, given), [], []
    for i in range(len(x)):
        positives, negatives = compared(i, x, given, past(method))
        similar += [euclidean(x[i], z) for z in positives]
        others += [euclidean(x[i], z) for z in negatives]
    pulls, pushes, share = [pull(d) for d in similar], [push(d, method.margin) for d in others], method.similar
    loss = mean(pulls + pushes) if share is None else share * mean(pulls) + (1 - share) * mean(pushes)
    return loss, mean(similar), mean(others), mean(d < method.margin for d in others)


def said(output):
    return tuple(output.logs[name].item() for name in ("loss", "d_pos", "d_neg", "active"))


@pytest.fixture(params=[False, True], ids=["plain", "unit"])
def unit(request, encoder):
    encoder.unit = request.param
    return request.param


@pytest.fixture
def encoder(small_encoder):
    """Whose features lie about as far apart as a margin."""
    encoder = small_encoder(False)
    with torch.no_grad():
        encoder.head.weight.mul_(20)
        encoder.head.bias.zero_()
    return encoder


@pytest.mark.parametrize("margin", [0.3, 1.0, 4.0])
def test_adjacent_pairs_are_their_loop(margin, unit, encoder):
    method, given = Contrastive(encoder, margin=margin), batch(SIDE_BY_SIDE)
    assert said(method(given)) == pytest.approx(adjacent(method, given))


@pytest.mark.parametrize("similar", [None, 0.5, 0.2])
@pytest.mark.parametrize("size", [0, 12, 100])                          # no memory; one that wraps around; one not full
def test_all_pairs_are_their_loop(similar, size, unit, encoder):
    memory = Memory(size, 5).double() if size else None
    method = Contrastive(encoder, margin=0.8, pairs="all", similar=similar, dictionary=memory)
    loops.remember(method)
    given = batch(MIXED)
    assert said(method(given)) == pytest.approx(every(method, given))


def test_top_1_of_adjacent_pairs_is_the_share_that_half_the_margin_decides_rightly(unit, encoder):
    """Also of a list of pairs, whose labels are no classes."""
    method, given = Contrastive(encoder, margin=1.2), batch(SIDE_BY_SIDE)
    x, label = features(method, given), given.label.tolist()
    found = [(euclidean(x[i], x[i + 1]) < 0.6) == (label[i] == label[i + 1]) for i in range(0, len(x), 2)
             if -1 not in (label[i], label[i + 1])]
    assert 0 < mean(found) < 1
    assert method(given).logs["top1"].item() == pytest.approx(mean(found))


@pytest.mark.parametrize("size", [0, 12])
def test_top_1_of_all_pairs_is_the_share_of_images_whose_nearest_is_of_their_class(size, unit, encoder):
    method = Contrastive(encoder, pairs="all", dictionary=Memory(size, 5).double() if size else None)
    loops.remember(method)
    given, found = batch(SIDE_BY_SIDE), []
    x = features(method, given)
    for i in range(len(x)):
        positives, negatives = compared(i, x, given, past(method))
        if positives:
            nearest = min(euclidean(x[i], z) for z in positives)
            found.append(all(euclidean(x[i], z) > nearest for z in negatives))
    assert method(given).logs["top1"].item() == pytest.approx(mean(found))


def test_all_pairs_are_half_the_squares_of_the_peers(encoder, unit):
    peer = pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
    from pytorch_metric_learning.losses import ContrastiveLoss

    given = batch([0, 1, 5, 6, 8, 20, 2, 14])
    method = Contrastive(encoder, margin=0.8, pairs="all", similar=None)
    plain = peer.distances.LpDistance(normalize_embeddings=False)
    theirs = ContrastiveLoss(0, 0.8, reducer=peer.reducers.DoNothingReducer(), distance=plain)
    parts = theirs(features(method, given), given.label).values()
    torch.testing.assert_close(method(given).loss, torch.cat([part["losses"] for part in parts]).square().mean() / 2)


@pytest.mark.parametrize("method, index", [
    ({"pairs": "adjacent"}, [21, 22, 23, 0]), ({"pairs": "all"}, [21, 22, 23, 21]),
    ({"pairs": "all", "similar": None}, [21, 22, 23, 21]), ({"pairs": "all"}, [0]), ({"pairs": "all"}, [0, 21]),
])
def test_where_nothing_can_be_compared_the_loss_is_zero_and_so_is_its_gradient(method, index, unit, encoder):
    loss, gradients = loops.gradient(Contrastive(encoder, **method), batch(index))
    assert loss == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


@pytest.mark.parametrize("method", [{"pairs": "adjacent"}, {"pairs": "all"}, {"pairs": "all", "similar": None}])
def test_a_batch_without_a_positive_pair_is_pushed_apart(method, unit, encoder):
    method, given = Contrastive(encoder, margin=4.0, **method), batch([0, 4, 8, 12, 16, 20])
    loss, gradients = loops.gradient(method, given)
    assert loss > 0 and all(g is None or g.isfinite().all() for g in gradients) and gradients[0].any()
    assert said(method(given)) == pytest.approx((adjacent if method.in_pairs else every)(method, given))


def test_the_same_image_twice_gives_a_finite_gradient(unit, encoder):
    """Two equal features: a distance of 0, whose own gradient is not defined."""
    for pairs in ("adjacent", "all"):
        _, gradients = loops.gradient(Contrastive(encoder, pairs=pairs), batch([0, 0, 4, 4]))
        assert all(g is None or g.isfinite().all() for g in gradients)


@pytest.mark.parametrize("settings", [{}, {"pairs": "all"}, {"pairs": "all", "similar": None}])
def test_its_gradient_is_that_of_finite_differences(settings, unit, encoder):
    memory = Memory(12, 5).double() if settings else None
    method = Contrastive(encoder, margin=0.8, dictionary=memory, **settings)
    loops.remember(method)
    assert torch.autograd.gradcheck(loops.of_head(method, batch(SIDE_BY_SIDE)), (encoder.head.weight,))


@pytest.mark.parametrize("settings, message", [
    ({"margin": 0.0}, "margin: 0.0 is not a positive"), ({"margin": float("nan")}, "margin: nan"),
    ({"similar": 0.0}, "similar: 0.0 given. Give a share between 0 and 1"), ({"similar": 1.0}, "similar: 1.0"),
    ({"dictionary": Memory(4, 5)}, "dictionary: a memory with pairs: adjacent"),
])
def test_settings_that_mean_nothing_are_refused(settings, message, encoder):
    with pytest.raises(ValueError, match=message):
        Contrastive(encoder, order=RandomPairs(), **settings)


@pytest.mark.parametrize("order, message", [
    (Balanced(4), "order: Balanced puts images of one class side by side, and .* compares images 2i and 2i . 1"),
    (Mined(Table(4), 2), "order: Mined is of images that the method itself has chosen, and .* chooses none"),
])
@pytest.mark.parametrize("of", [Contrastive, Siamese])
def test_orders_that_leave_pairs_of_one_kind_or_none_are_refused(of, order, message, small_encoder):
    images = Images("some", list("abcdefgh"), torch.arange(8) // 4, ["x", "y"], torch.zeros(8, 2, 5, 5).byte())
    with pytest.raises(ValueError, match=message):
        of(small_encoder(), order=order).check_images(images)
    Contrastive(small_encoder(), order=Balanced(4), pairs="all").check_images(images)
