"""Each miner beside a loop over plain numbers, and pytorch-metric-learning where it has one."""

import pytest
import torch
import torch.nn.functional as F

from common import counter
from metric_learning import mining
from metric_learning.losses import products
from metric_learning.mining import positive_pairs, ranked_negatives, relation

KEY = (5, 17)
BATCHES = {
    "P x K": [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3],
    "gaps, one of a class, unlabelled": [4, 4, 4, 90, -1, 7, 7, 7, -1, 90, 13, 90],
    "one class": [2] * 6,
    "no positive pair": [0, 1, 2, 3, 4, 5],
    "unlabelled": [-1] * 6,
}


@pytest.fixture
def peer():
    return pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")


@pytest.fixture(params=BATCHES)
def label(request):
    return torch.tensor(BATCHES[request.param])


def unit(rows, dim=4):
    return F.normalize(torch.randn(rows, dim, dtype=torch.float64), dim=1)


def squared(x, y):
    return torch.cdist(x, y).square()


def rows(named):
    """(anchor, positive[, negative]) of what is valid; the anchor is counted as a row."""
    *columns_BR, valid_BR = (x.tolist() for x in named)
    return sorted((a, *each[:-1]) for a, of in enumerate(zip(*columns_BR, valid_BR)) for each in zip(*of) if each[-1])


def columns(mask_AM):
    return [row.nonzero().flatten().tolist() for row in mask_AM]


def loop_pairs(label, candidates, first=0, per_class=3):
    """Of blocks of ``per_class`` images; those of a balanced batch are all pairs of one class."""
    return [(a, first + p) for a in range(len(label)) for p in range(len(label))
            if p != a and p // per_class == a // per_class and label[a] == label[p] != -1]


def loop_negatives(label, candidates, a):
    return [n for n in range(len(candidates)) if label[a] != -1 and candidates[n] not in (-1, label[a])]


def loop_triplets(label, candidates, choose, first=0):
    """``choose(anchor, positive, negatives)`` -> the negative, or None."""
    found = [(a, p, choose(a, p, loop_negatives(label, candidates, a)))
             for a, p in loop_pairs(label, candidates, first)]
    return [each for each in found if each[2] is not None]


def hardest(d):
    return lambda a, p, negatives: min(negatives, key=lambda n: d[a, n].item(), default=None)


def semi_hard(d):
    """The nearest of those that are farther than the positive, or else the farthest."""
    def choose(a, p, negatives):
        farther = [n for n in negatives if d[a, n] > d[a, p]]
        return hardest(d)(a, p, farther) if farther else max(negatives, key=lambda n: d[a, n].item(), default=None)
    return choose


def test_pairs_are_all_of_one_class_in_a_block_both_ways_round(label):
    assert rows(positive_pairs(relation(label, label), 3)) == loop_pairs(label, label)


@pytest.mark.parametrize("per_class", [2, 3, 4])
def test_a_balanced_batch_has_all_its_pairs(per_class):
    label = torch.arange(4).repeat_interleave(per_class)
    found = rows(positive_pairs(relation(label, label), per_class))
    assert found == [(a, p) for a in range(len(label)) for p in range(len(label)) if a != p and label[a] == label[p]]
    assert len(found) == 4 * per_class * (per_class - 1)


def test_images_that_are_no_whole_blocks_are_refused():
    label = torch.arange(4)
    with pytest.raises(ValueError, match="per_class: 3 given for 4 images"):
        positive_pairs(relation(label, label), 3)


def test_negatives_are_those_of_another_class(label):
    found = columns(relation(label, label).negative_BM)
    assert found == [loop_negatives(label, label, a) for a in range(len(label))]


@pytest.mark.parametrize("first, extra", [(0, 0), (0, 5), (4, 0), (4, 5)])      # an earlier rank; a memory
def test_miners_are_their_loops(label, first, extra):
    candidates = torch.cat([torch.tensor([4, 2, 0, 1])[:first], label, torch.tensor([7, -1, 2, 0, 13])[:extra]])
    y = unit(len(candidates))
    d, related = squared(y[first:first + len(label)], y), relation(label, candidates, first)
    pairs = positive_pairs(related, 3, first)
    for mine, choose in ((mining.hardest_negatives, hardest(d)), (mining.semi_hard_negatives, semi_hard(d))):
        assert rows(mine(pairs, related, d)) == loop_triplets(label, candidates, choose, first)
    anything = rows(mining.random_negatives(pairs, related, KEY, first))
    some = [pair for pair in loop_pairs(label, candidates, first) if loop_negatives(label, candidates, pair[0])]
    assert [each[:2] for each in anything] == some
    assert all(n in loop_negatives(label, candidates, a) for a, _, n in anything)


@pytest.mark.parametrize("d, negative", [
    ([0, 5, 3, 4, 9], 4),               # one is farther, far outside the margin
    ([0, 2, 9, 4, 3], 4),               # all are: the nearest
    ([0, 9, 3, 8, 4], 3),               # none is: the farthest
    ([0, 3, 3, 3, 3], 2),               # as far as the positive is not farther; of equal ones, the first
])
def test_semi_hard_in_each_case(d, negative):
    related = relation(torch.tensor([0, 0]), torch.tensor([0, 0, 1, 2, 3]))
    d = torch.tensor([d, [1.0, 0, 1, 1, 1]])
    assert mining.semi_hard_negatives(positive_pairs(related, 2), related, d).negative_BR[0].tolist() == [negative]


def test_random_negatives_are_drawn_evenly_and_anew_for_each_key():
    label = torch.tensor([0, 0, 1, 2, -1, 3])
    related = relation(label, label)
    pairs = positive_pairs(related, 2)
    found = [rows(mining.random_negatives(pairs, related, (0, torch.tensor(step)))) for step in range(900)]
    assert {each[:2] for of in found for each in of} == {(0, 1), (1, 0)}
    for of_pair in zip(*found):
        drawn = [n for _, _, n in of_pair]
        assert [drawn.count(n) for n in (2, 3, 5)] == pytest.approx([300] * 3, abs=60)          # 4 standard deviations
    assert rows(mining.random_negatives(pairs, related, (0, 7))) == found[7]


def test_draws_do_not_depend_on_how_the_batch_is_shared():
    label, z = torch.arange(6).repeat_interleave(2), unit(12)
    d, whole = -products(z, z), relation(label, label)
    triplets, chosen = [], []
    for first in (0, 4, 8):                                                                     # three ranks
        related = relation(label[first:first + 4], label, first)
        found = mining.random_negatives(positive_pairs(related, 2, first), related, KEY, first)
        triplets += [(first + a, p, n) for a, p, n in rows(found)]
        chosen.append(ranked_negatives(d[first:first + 4], related, 3, 2, 0.5, 0.5, 0.9, KEY, first))
    assert triplets == rows(mining.random_negatives(positive_pairs(whole, 2), whole, KEY))
    assert torch.equal(torch.cat(chosen), ranked_negatives(d, whole, 3, 2, 0.5, 0.5, 0.9, KEY))


def test_semi_hard_negatives_inside_the_margin_are_the_peers(peer):
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.miners import TripletMarginMiner

    label, z = torch.arange(6).repeat_interleave(4), unit(24)
    miner = TripletMarginMiner(0.3, "semihard", distance=LpDistance(normalize_embeddings=False, power=2))
    theirs = sorted(zip(*(x.tolist() for x in miner(z, label)), strict=True))       # all such negatives of a pair
    d, related = squared(z, z), relation(label, label)
    ours = rows(mining.semi_hard_negatives(positive_pairs(related, 4), related, d))
    inside = {(a, p, n) for a, p, n in ours if d[a, p] < d[a, n] < d[a, p] + 0.3}
    nearest = {pair: min((t for t in theirs if t[:2] == pair), key=lambda t: d[t[0], t[2]].item())
               for pair in {each[:2] for each in theirs}}
    assert inside == set(nearest.values()) and 0 < len(inside) < len(ours) == 72


def test_hardest_negatives_are_the_peers(peer):
    from pytorch_metric_learning.distances import LpDistance
    from pytorch_metric_learning.miners import BatchHardMiner

    label, z = torch.arange(6).repeat_interleave(4), unit(24)
    anchor, _, negative = BatchHardMiner(distance=LpDistance(normalize_embeddings=False))(z, label)
    theirs = dict(zip(anchor.tolist(), negative.tolist(), strict=True))
    related = relation(label, label)
    ours = rows(mining.hardest_negatives(positive_pairs(related, 4), related, squared(z, z)))
    assert all(theirs[a] == n for a, _, n in ours) and {a for a, _, _ in ours} == theirs.keys()


def draw(name, i, among, n):
    """The ``n`` of ``among`` that come first in the draws for anchor ``i``."""
    order = {j: counter.uniform(*KEY, counter.stream(name), torch.tensor(i), torch.tensor(j)).item() for j in among}
    return sorted(among, key=order.get)[:n]


def ranked_by_loop(z, label, neg_num, pair_size, hard_ratio, rand_ratio, margin):
    """The ranked layer, one pair after the other; what is drawn is by its name."""
    chosen = []
    for i in range(0, len(z), pair_size):
        found = []
        for j in range(len(z)):
            loss = max(0, float(z[i] @ z[j]) - float(z[i] @ z[i + 1]) + margin)
            if label[i] == label[i + 1] != -1 and label[j] not in (-1, label[i]) and loss > 0:
                found.append((loss, j))
        if len(found) > neg_num:
            order = [j for _, j in sorted(found, reverse=True)]
            hard = draw("ranked hard", i, order[:neg_num], int(neg_num * hard_ratio))
            rest = [j for j in order if j not in hard]
            chosen.append(sorted(hard + draw("ranked rest", i, rest, int(neg_num * rand_ratio))))
        else:
            chosen.append([j for _, j in found])
    return chosen


@pytest.mark.parametrize("neg_num, pair_size, hard_ratio, rand_ratio, margin", [
    (4, 2, 0.5, 0.5, 0.5), (4, 2, 1.0, 0.0, 2.0), (4, 2, 0.0, 1.0, 2.0), (6, 2, 0.75, 0.25, 2.0), (3, 4, 0.5, 1.0, 2.0),
    (18, 2, 0.5, 0.25, 2.0), (1, 2, 1.0, 1.0, 0.1),     # 18: all that some anchors have
])
def test_the_ranked_mix_is_its_loop(neg_num, pair_size, hard_ratio, rand_ratio, margin):
    z, label = unit(24), torch.arange(6).repeat_interleave(4)
    label[5], label[12:14] = 40, -1                             # a pair that is none, and an unlabelled one
    settings = (neg_num, pair_size, hard_ratio, rand_ratio, margin)
    found = ranked_negatives(-products(z, z), relation(label, label), *settings, KEY)
    assert columns(found) == ranked_by_loop(z, label, *settings)
    assert found.any() and not found[12 // pair_size].any()


def test_hard_ones_come_from_the_hardest_and_every_other_can_be_drawn():
    z, label = unit(24), torch.arange(12).repeat_interleave(2)
    d, related = -products(z, z), relation(label, label)
    loss = d[0, 1] - d[0] + 3.0                                 # 22 negatives, each with a loss
    hardest = {j for j in loss.argsort(descending=True).tolist() if j > 1}
    hardest = set(sorted(hardest, key=lambda j: -loss[j].item())[:6])
    seen = torch.zeros(24, dtype=torch.int64)
    for step in range(200):
        of = set(columns(ranked_negatives(d, related, 6, 2, 0.5, 0.5, 3.0, (0, step)))[0])
        assert len(of) == 6 and len(of & hardest) >= 3
        seen[list(of)] += 1
    assert not seen[:2].any() and seen[2:].min() > 0
    assert seen[list(hardest)].float().mean() == pytest.approx(200 * (0.5 + 0.5 * 3 / 19), abs=15)


@pytest.mark.parametrize("ratio", [0.29, 0.07, 0.57, 0.58])
def test_a_share_is_what_is_written_not_what_a_double_makes_of_it(ratio):
    assert mining.counts(100, ratio, 0.0) == (round(100 * ratio), 0)


def test_an_unlabelled_batch_and_one_class_have_no_ranked_negatives():
    for label in (torch.full((6,), -1), torch.zeros(6, dtype=torch.int64)):
        z = unit(6)
        assert not ranked_negatives(-products(z, z), relation(label, label), 2, 2, 0.5, 0.5, 1.0, KEY).any()


@pytest.mark.parametrize("settings, message", [
    ((4, 2, 1.5, 0.5, 1.0), "hard_ratio: 1.5 given"), ((4, 2, 0.5, -1, 1.0), "rand_ratio: -1 given"),
    ((1, 2, 0.5, 0.5, 1.0), "neg_num: 1 given"), ((0, 2, 0.5, 0.5, 1.0), "neg_num: 0 given"),
    ((4, 4, 0.5, 0.5, 1.0), "pair_size: 4 given for 6 images"), ((4, 2, 0.5, 0.5, 0.0), "margin: 0.0"),
])
def test_a_mix_that_makes_no_sense_is_refused(settings, message):
    label, d = torch.arange(3).repeat_interleave(2), torch.ones(6, 6)
    with pytest.raises(ValueError, match=message):
        ranked_negatives(d, relation(label, label), *settings, KEY)
