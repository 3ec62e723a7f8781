"""Each loss beside a loop over plain numbers, finite differences, and pytorch-metric-learning where it has one."""

import math

import pytest
import torch
import torch.nn.functional as F

from metric_learning import losses
from metric_learning.mining import Relation, relation

B, D, C = 8, 5, 4
LABELS = torch.tensor([0, 0, 3, -1, 7, 3, 0, -1])           # with gaps, a class of one image, two unlabelled
CLASSES = torch.tensor([0, 0, 3, -1, 2, 3, 0, -1])          # the same below C


@pytest.fixture
def peer():
    return pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")


def features(*shape):
    return torch.randn(*(shape or (B, D)), dtype=torch.float64)


def unit(*shape):
    return F.normalize(features(*shape), dim=1)


def dot(a, b):
    return sum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def euclidean(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)))


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def pairwise(a, b, same, margin):
    """Hadsell et al. 2006, Eq. 4, of one pair."""
    return 0.5 * euclidean(a, b) ** 2 if same else 0.5 * max(0, margin - euclidean(a, b)) ** 2


def minus_log_softmax(logits, label):
    return math.log(sum(math.exp(x) for x in logits.tolist())) - logits[label].item()


def sup_con(sim_BM, positive_BM, negative_BM, temperature):
    """Khosla et al. 2020, Eq. 2, one image after the other."""
    terms = []
    for sim, positive, negative in zip(sim_BM.tolist(), positive_BM.tolist(), negative_BM.tolist(), strict=True):
        total = sum(math.exp(s / temperature) for s, p, n in zip(sim, positive, negative) if p or n)
        of = [-math.log(math.exp(s / temperature) / total) for s, p in zip(sim, positive) if p]
        terms += [mean(of)] if of else []
    return mean(terms)


def ranked_by_loop(z, chosen, neg_num, pair_size, margin):
    total = 0
    for a, i in enumerate(range(0, len(z), pair_size)):
        for n in range(len(z)):
            if chosen[a, n]:
                total += max(0, dot(z[i], z[n]) - dot(z[i], z[i + 1]) + margin)
                total += max(0, dot(z[i + 1], z[n]) - dot(z[i], z[i + 1]) + margin)
    return total / (2 * neg_num * len(z) / pair_size)


@pytest.mark.parametrize("margin", [0.5, 3.0, 100.0])
def test_contrastive_is_hadsells_equation(margin):
    a, b, same = features(), features(), torch.tensor([True, False] * 4)
    expected = mean(pairwise(a[i], b[i], same[i], margin) for i in range(B))
    assert losses.contrastive(losses.distance(a, b), same, margin).item() == pytest.approx(expected, rel=1e-12)


def test_contrastive_is_half_the_square_of_the_peers_pair_losses(peer):
    from pytorch_metric_learning import distances, reducers
    from pytorch_metric_learning.losses import ContrastiveLoss

    x, label = features(), torch.arange(B) % 3
    plain = distances.LpDistance(normalize_embeddings=False)
    theirs = ContrastiveLoss(0, 2.5, reducer=reducers.DoNothingReducer(), distance=plain)
    found = torch.cat([part["losses"] for part in theirs(x, label).values()])        # both ways round, each pair once
    i, j = torch.ones(B, B).triu(1).nonzero(as_tuple=True)
    ours = losses.contrastive(losses.distance(x[i], x[j]), label[i] == label[j], 2.5)
    torch.testing.assert_close(ours, found.square().mean() / 2)


def test_equal_features_of_one_pair_give_no_nan():
    x = features(2, D).requires_grad_()
    for same in (True, False):
        loss = losses.contrastive(losses.distance(x[:1], x[:1].clone()), torch.tensor([same]), 1.0)
        (grad,) = torch.autograd.grad(loss, x)
        assert loss.item() == (0 if same else 0.5) and not grad.any()


@pytest.mark.parametrize("weights", [(0.5, 0.1), (1.0, 2.3)])
def test_softmax_and_contrastive_are_their_weighted_sum(weights):
    logits, x, label = (features(B, C), features(B, C)), (features(), features()), (CLASSES, CLASSES.roll(1))
    each = [mean(minus_log_softmax(z, y) for z, y in zip(logits[s], label[s]) if y >= 0) for s in (0, 1)]
    pairs = mean(pairwise(a, b, y == z, 2.0) for a, b, y, z in zip(*x, *label) if y >= 0 and z >= 0)
    found = losses.softmax_contrastive(logits, x, label, 2.0, *weights)
    assert found.loss.item() == pytest.approx(weights[0] * sum(each) + weights[1] * pairs, rel=1e-12)
    assert (found.softmax.item(), found.contrastive.item()) == pytest.approx((mean(each), pairs), rel=1e-12)


def test_centre_loss_is_wens_equation():
    x, centre = features(), features(C, D)
    expected = mean(0.5 * euclidean(a, centre[y]) ** 2 for a, y in zip(x, CLASSES) if y >= 0)
    assert losses.centre(x, centre, CLASSES).item() == pytest.approx(expected, rel=1e-12)


def test_centre_losss_gradient_is_x_minus_its_centre_and_goes_to_the_features_alone():
    x, centre = features().requires_grad_(), features(C, D).requires_grad_()
    grads = torch.autograd.grad(losses.centre(x, centre, CLASSES), [x, centre], allow_unused=True)
    known = (CLASSES >= 0)[:, None]
    torch.testing.assert_close(grads[0], torch.where(known, x - centre[CLASSES], 0).detach() / known.sum())    # Eq. 3
    assert grads[1] is None


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_centres_move_by_wens_rule(alpha):
    x, centre = features(), features(C, D)
    expected = centre.clone()
    for j in range(C):
        mine = [i for i in range(B) if CLASSES[i] == j]
        delta = sum((centre[j] - x[i] for i in mine), torch.zeros(D)) / (1 + len(mine))              # Eq. 4
        expected[j] = centre[j] - alpha * delta
    assert mine == [2, 5] and not (CLASSES == 1).any()
    losses.move_centres_(centre, x, CLASSES, alpha)
    torch.testing.assert_close(centre, expected)
    assert torch.equal(centre[1], expected[1])                                          # no image: not a bit of it


def test_triplet_is_facenets_and_the_peers(peer):
    from pytorch_metric_learning import distances, reducers
    from pytorch_metric_learning.losses import TripletMarginLoss

    x, (a, p, n) = unit(), torch.randint(B, (3, 20))
    pos, neg = ((x[a] - x[other]).square().sum(dim=1) for other in (p, n))
    loops = mean(max(0, euclidean(x[i], x[j]) ** 2 - euclidean(x[i], x[k]) ** 2 + 0.4) for i, j, k in zip(a, p, n))
    squared = distances.LpDistance(normalize_embeddings=False, power=2)
    theirs = TripletMarginLoss(0.4, reducer=reducers.MeanReducer(), distance=squared)
    found = losses.triplet(pos, neg, 0.4)
    torch.testing.assert_close(found, theirs(x, indices_tuple=(a, p, n)))
    assert found.item() == pytest.approx(loops, rel=1e-9)


def test_triplet_loss_of_features_that_are_one_is_the_margin():
    assert losses.triplet(torch.zeros(6), torch.zeros(6), 0.25).item() == 0.25


@pytest.mark.parametrize("pair_size, margin", [(2, 0.1), (2, 0.9), (4, 0.5), (8, 0.5)])
def test_ranked_loss_is_its_loop(pair_size, margin):
    z, chosen = unit(), torch.rand(B // pair_size, B) < 0.5
    found = losses.ranked(-losses.products(z, z), chosen, 3, pair_size, margin)
    assert found.item() == pytest.approx(ranked_by_loop(z, chosen, 3, pair_size, margin), rel=1e-12)


@pytest.mark.parametrize("l2", [0.0, 0.02])
def test_n_pair_is_the_mean_of_its_tuplets(l2):
    x, other = features(), features()
    terms = []
    for i in range(B):
        if LABELS[i] < 0:
            continue
        excess = [dot(x[i], other[j]) - dot(x[i], other[i]) for j in range(B) if LABELS[j] not in (-1, LABELS[i])]
        length = (dot(x[i], x[i]) + dot(other[i], other[i])) / 2
        terms.append(math.log(1 + sum(math.exp(e) for e in excess)) + l2 * length)
    assert losses.n_pair(x, other, LABELS, l2).item() == pytest.approx(mean(terms), rel=1e-12)


def test_n_pair_is_the_peers_with_its_l2_regulariser(peer):
    from pytorch_metric_learning import distances, reducers, regularizers
    from pytorch_metric_learning.losses import NPairsLoss

    x, other, label = features(), features(), torch.arange(B)
    plain = distances.DotProductSimilarity(normalize_embeddings=False)
    theirs = NPairsLoss(reducer=reducers.MeanReducer(), distance=plain)
    both, rows = torch.cat([x, other]), torch.arange(B)
    nothing = rows[:0]
    found = theirs(both, label.repeat(2), (rows, rows + B, nothing, nothing))
    torch.testing.assert_close(losses.n_pair(x, other, label), found)
    length = regularizers.LpRegularizer(p=2, power=2, reducer=reducers.MeanReducer())(both)
    torch.testing.assert_close(losses.n_pair(x, other, label, 0.02), found + 0.02 * length)


def test_a_tuplet_is_the_softmax_of_its_positive():
    x, positive, negatives = features(1, D), features(1, D), features(6, D)
    logits = torch.cat([x @ positive.T, x @ negatives.T], dim=1)
    found = losses.tuplet(logits[:, 0], logits[:, 1:], torch.ones(1, 6, dtype=torch.bool))
    torch.testing.assert_close(found, F.cross_entropy(logits, torch.tensor([0]))[None])


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("extra", [0, 5])                                               # a memory behind the batch
def test_supervised_contrastive_is_khoslas_equation(temperature, extra):
    z = unit(B + extra, D)
    related = relation(LABELS, torch.cat([LABELS, torch.tensor([7, 0, -1, 2, 2])[:extra]]))
    sim = losses.products(z[:B], z)
    found = losses.supervised_contrastive(sim, *related, temperature)
    assert found.item() == pytest.approx(sup_con(sim, *related, temperature), rel=1e-9)


def test_supervised_contrastive_is_the_peers(peer):
    from pytorch_metric_learning import reducers
    from pytorch_metric_learning.losses import SupConLoss

    z, label = unit(), torch.arange(B) % 3
    ours = losses.supervised_contrastive(losses.products(z, z), *relation(label, label), 0.1)
    torch.testing.assert_close(ours, SupConLoss(0.1, reducer=reducers.MeanReducer())(z, label))


def all_losses(x, other, label):
    """One value of each loss of the features ``x`` (and ``other``), by name."""
    related = relation(label, label)
    d = -losses.products(x, x)
    return {
        "contrastive": losses.contrastive(losses.distance(x, other), label == label.roll(1), 2.0),
        "joint": losses.softmax_contrastive((x, other), (other, x), (label, label.roll(1)), 2.0).loss,
        "centre": losses.centre(x, torch.ones(C, x.shape[1], dtype=x.dtype), label),
        "triplet": losses.triplet((x - other).square().sum(1), (x - other.roll(1, 0)).square().sum(1), 0.7),
        "ranked": losses.ranked(d, related.negative_BM[::2], 3, 2, 0.7),
        "n_pair": losses.n_pair(x, other, label, 0.01),
        "supervised": losses.supervised_contrastive(losses.products(x, other), *related, 0.5),
    }


@pytest.mark.parametrize("name", all_losses(features(), features(), CLASSES))
def test_gradients_are_those_of_finite_differences(name):
    x, other = features().requires_grad_(), features().requires_grad_()
    assert torch.autograd.gradcheck(lambda *given: all_losses(*given, CLASSES)[name], (x, other))


@pytest.mark.parametrize("label", [-1, 2])                                  # no label at all; one class only
def test_where_nothing_can_be_compared_the_loss_is_a_number_and_so_is_its_gradient(label):
    x, other = features().requires_grad_(), features().requires_grad_()
    values = all_losses(x, other, torch.full((B,), label))
    for name, value in values.items():
        grads = torch.autograd.grad(value, [x, other], allow_unused=True, retain_graph=True)
        assert value.isfinite() and all(g.isfinite().all() for g in grads if g is not None), name
    nothing = {"ranked"} | ({"joint", "centre", "n_pair", "supervised"} if label < 0 else set())
    assert {name: values[name].item() for name in nothing} == dict.fromkeys(nothing, 0)


def test_no_pair_and_no_triplet_are_a_loss_of_zero():
    x = features(0, D).requires_grad_()
    pair = losses.contrastive(losses.distance(x, x), torch.zeros(0, dtype=torch.bool), 1.0)
    three = losses.triplet(x.sum(1), x.sum(1), 1.0)
    (pair + three).backward()
    assert pair.item() == three.item() == 0 and x.grad.shape == (0, D)


def test_an_image_without_any_candidate_adds_nothing():
    sim, none = features(2, 3).requires_grad_(), torch.zeros(2, 3, dtype=torch.bool)
    some = none.clone()
    some[0, :2] = True
    loss = losses.supervised_contrastive(sim, *Relation(some, none), 0.1)
    (grad,) = torch.autograd.grad(loss, sim)
    assert loss.isfinite() and grad[0, :2].any() and not grad[1].any()


def test_autocast_leaves_the_features_their_precision():
    x, other = features().float(), features().float()
    outside = all_losses(x, other, CLASSES)
    with torch.autocast("cpu", torch.bfloat16):
        inside = all_losses(x, other, CLASSES)
    assert {name: value.item() for name, value in inside.items()} == {name: v.item() for name, v in outside.items()}


@pytest.mark.parametrize("call, message", [
    (lambda: losses.contrastive(torch.ones(3), torch.ones(2) > 0, 1.0), "same_P: 2 values for 3 distances"),
    (lambda: losses.contrastive(torch.ones(3), torch.ones(3) > 0, 0.0), "margin: 0.0 is not a positive number"),
    (lambda: losses.triplet(torch.ones(3), torch.ones(3), math.nan), "margin: nan is not"),
    (lambda: losses.ranked_losses(torch.ones(6, 6), 4, 1.0), "pair_size: 4 given for 6 images"),
    (lambda: losses.ranked_losses(torch.ones(6, 6), 1, 1.0), "pair_size: 1 given"),
    (lambda: losses.move_centres_(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4), 1.5), "alpha: 1.5 given"),
    (lambda: losses.supervised_contrastive(torch.ones(B, B), *relation(LABELS, LABELS), 0.0), "temperature: 0"),
])
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
