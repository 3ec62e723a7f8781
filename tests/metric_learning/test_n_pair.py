"""N-pair loss as a method: beside a loop over its pairs and tuplets, with and without a memory; and a run."""

import math

import pytest
import torch

from common.data.datasets import Images
from common.data.orders import Balanced, RandomPairs, Streams, Tuplets
from metric_learning import Memory, NPair, losses
from tests.metric_cases import lengths
from tests.metric_learning import loops
from tests.metric_learning.loops import EARLIER, PAIRS, batch, compared, dot, mean, past

TUPLETS = [0, 1, 5, 8, 12, 14, 21, 2, 4, 20, 9, 13, 16, 17, 18, 10]     # of 4; the third begins with two classes


@pytest.fixture
def small_encoder(small_encoder):
    return lambda *given: lengths(small_encoder(*given))



def tuplet(anchor, positive, negatives):
    """Sohn 2016, Section 3.1."""
    return math.log(1 + sum(math.exp(dot(anchor, n) - dot(anchor, positive)) for n in negatives))


def by_loop(method, given, size):
    """The loss and the share of anchors whose positive comes first, one anchor after the other."""
    x, label, memory = method.encoder.project(given.views[0]).detach(), given.label.tolist(), past(method)
    starts = [i for i in range(0, len(x), size) if label[i] == label[i + 1] != -1]
    terms, first, lengths = [], [], []
    for i in starts:
        columns = [j + 1 for j in starts] if size == 2 else range(i + 2, i + size)
        _, negatives = compared(i, x, given, memory, columns)
        terms.append(tuplet(x[i], x[i + 1], negatives))
        first.append(all(dot(x[i], n) < dot(x[i], x[i + 1]) for n in negatives))
        lengths += [dot(x[j], x[j]) for j in range(i, i + size) if label[j] != -1]
    return mean(terms) + method.l2 * mean(lengths), mean(first)


@pytest.mark.parametrize("order, index", [(None, PAIRS), (Balanced(2), PAIRS), (Tuplets(4), TUPLETS)])
@pytest.mark.parametrize("l2", [0.0, 0.3])
@pytest.mark.parametrize("size", [0, 12, 100])                          # no memory; one that wraps around; one not full
def test_the_loss_is_its_loop(order, index, l2, size, small_encoder):
    method = NPair(small_encoder(False), order=order, l2=l2, dictionary=Memory(size, 5).double() if size else None)
    with torch.no_grad():
        method.encoder.head.weight.mul_(8)                              # inner products that differ
    loops.remember(method, [each[:len(each) // 4 * 4] for each in EARLIER])
    given = batch(index)
    output = method(given)
    assert (output.loss.item(), output.logs["top1"].item()) == pytest.approx(by_loop(method, given, method.group))
    assert output.loss.item() == pytest.approx(
        output.logs["tuplets"].item() + l2 * output.logs["length"].item())


def test_of_whole_pairs_it_is_the_function_and_the_peers(small_encoder):
    peer = pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
    from pytorch_metric_learning.losses import NPairsLoss

    method, given = NPair(small_encoder(False), l2=0.0), batch([0, 1, 4, 5, 8, 9, 14, 12])
    x = method.encoder.project(given.views[0])
    found = method(given).loss
    torch.testing.assert_close(found, losses.n_pair(x[0::2], x[1::2], given.label[0::2]))
    plain = peer.distances.DotProductSimilarity(normalize_embeddings=False)
    theirs = NPairsLoss(reducer=peer.reducers.MeanReducer(), distance=plain)
    torch.testing.assert_close(found, theirs(x, given.label))


@pytest.mark.parametrize("order, index", [(Balanced(2), PAIRS), (Tuplets(4), TUPLETS)])
def test_each_image_passes_the_encoder_once_all_together(order, index, small_encoder):
    """2N features for N tuplets of N + 1 images, not N (N + 1): Section 3.2."""
    method, passes = NPair(small_encoder(False), order=order), []
    method.encoder.backbone.register_forward_hook(lambda module, given, output: passes.append(len(given[0])))
    method(batch(index))
    assert passes == [len(index)]


@pytest.mark.parametrize("size", [0, 12])
@pytest.mark.parametrize("order", [Balanced(2), Tuplets(4)])
@pytest.mark.parametrize("index", [[0, 4, 8, 12, 5, 9, 14, 16], [21, 22, 23, 21, 0, 4, 8, 1]])
def test_without_a_pair_the_loss_is_zero_and_so_is_its_gradient(index, order, size, small_encoder):
    method = NPair(small_encoder(False), order=order, dictionary=Memory(size, 5).double() if size else None)
    loops.remember(method, [each[:4] for each in EARLIER])
    loss, gradients = loops.gradient(method, batch(index))
    assert loss == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_pairs_of_one_class_only_have_nothing_to_be_told_from(small_encoder):
    loss, gradients = loops.gradient(NPair(small_encoder(False), l2=0.0), batch([0, 1, 2, 3]))
    assert loss == 0 and not any(g.any() for g in gradients)


def test_its_gradient_is_that_of_finite_differences(small_encoder):
    method = NPair(small_encoder(False), l2=0.3, dictionary=Memory(12, 5).double())
    loops.remember(method)
    loss = loops.of_head(method, batch(PAIRS))
    assert torch.autograd.gradcheck(loss, (method.encoder.head.weight,))


def test_chance_is_that_of_features_which_are_one(small_encoder):
    method = NPair(small_encoder(False), order=Tuplets(4), l2=0.0)
    with torch.no_grad():
        method.encoder.head.weight.zero_()
    assert method(batch([0, 1, 5, 8, 12, 14, 4, 2])).loss.item() == pytest.approx(method.chance(), rel=1e-12)
    assert NPair(small_encoder()).chance() is None                      # the batch decides


@pytest.mark.parametrize("labels, together, order, message", [
    ([0, 1] * 4, 1, None, "two images of a class side by side, .* some come shuffled. Give method.order"),
    ([0, 1] * 4, 1, Streams(), "two images of a class side by side, .* some come by Streams. Give method.order"),
    ([0, 1] * 4, 1, RandomPairs(), "some come by RandomPairs"),
    ([0, 1] * 4, 2, Balanced(2), "some is a list of pairs, and NPair compares the images of a batch by their classes"),
    ([3, -1] * 4, 1, Balanced(2), "some has labelled images of 1 class, and metric learning tells classes apart"),
])
def test_images_that_it_cannot_learn_from_are_refused(labels, together, order, message, small_encoder):
    images = Images("some", [str(i) for i in range(8)], torch.tensor(labels), [str(i) for i in range(4)],
                    torch.zeros(8, 3, 8, 8, dtype=torch.uint8))
    images.together = together
    with pytest.raises(ValueError, match=message):
        NPair(small_encoder(), order=order).check_images(images)


@pytest.mark.parametrize("settings, message", [
    ({"l2": -1.0}, "l2: -1.0 given. Give 0 or more"), ({"l2": math.inf}, "l2: inf given"),
    ({"order": Balanced(3)}, "order: per_class 3 is no number of pairs. Give an even one"),
])
def test_settings_that_mean_nothing_are_refused(settings, message, small_encoder):
    with pytest.raises(ValueError, match=message):
        NPair(small_encoder(), **settings)
