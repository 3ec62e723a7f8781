"""Supervised contrastive loss as a method: beside a loop over views and a memory, and pytorch-metric-learning."""

import math

import pytest
import torch

from common.method import Batch
from metric_learning import Memory, SupCon
from tests.metric_learning import loops
from tests.metric_learning.loops import batch, compared, dot, mean, past

MIXED = [0, 1, 5, 20, 21, 2, 8, 16]             # three of a class; others alone in theirs; one not labelled


def by_loop(method, given):
    """Khosla et al. 2020, Eq. 2, and the share of views whose nearest candidate is a positive; view after view."""
    views = len(given.views)
    x = torch.cat([method.encoder(view) for view in given.views]).detach()
    every = Batch([], given.index.repeat(views), given.label.repeat(views))
    terms, first = [], []
    for i in range(len(x)):
        (positives, negatives), t = compared(i, x, every, past(method)), method.temperature
        if positives:
            total = sum(math.exp(dot(x[i], z) / t) for z in [*positives, *negatives])
            terms.append(-mean(math.log(math.exp(dot(x[i], z) / t) / total) for z in positives))
            nearest = max(dot(x[i], z) for z in positives)
            first.append(all(dot(x[i], z) < nearest for z in negatives))
    return mean(terms), mean(first)


@pytest.mark.parametrize("views", [1, 2, 3])
@pytest.mark.parametrize("size", [0, 12, 100])                          # no memory; one that wraps around; one not full
def test_the_loss_is_its_loop(views, size, small_encoder):
    method = SupCon(small_encoder(False), temperature=0.2, dictionary=Memory(size, 5).double() if size else None)
    loops.remember(method, views=views)
    given = batch(MIXED, views)
    output = method(given)
    assert (output.loss.item(), output.logs["top1"].item()) == pytest.approx(by_loop(method, given))


def test_of_two_views_it_is_the_peers(small_encoder):
    peer = pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
    from pytorch_metric_learning.losses import SupConLoss

    method, given = SupCon(small_encoder(False)), batch([0, 1, 5, 6, 8, 20], 2)
    x = torch.cat([method.encoder(view) for view in given.views])
    theirs = SupConLoss(0.1, reducer=peer.reducers.MeanReducer())(x, given.label.repeat(2))
    torch.testing.assert_close(method(given).loss, theirs)


def test_the_memory_keeps_the_first_view_of_each_image(small_encoder):
    method, given = SupCon(small_encoder(False), dictionary=Memory(20, 5).double()), batch(MIXED, 2)
    method.after_step([given], [method(given)], 0.5)
    torch.testing.assert_close(method.dictionary.keys[:8], method.encoder(given.views[0]))
    assert method.dictionary.image[:8].tolist() == MIXED


@pytest.mark.parametrize("index, views", [([0, 4, 8, 12, 16], 1), ([21, 22, 23, 21], 2)])
def test_without_a_positive_the_loss_is_zero_and_so_is_its_gradient(index, views, small_encoder):
    loss, gradients = loops.gradient(SupCon(small_encoder(False)), batch(index, views))
    assert loss == 0 and all(torch.equal(g, torch.zeros_like(g)) for g in gradients)


def test_another_view_alone_is_a_positive(small_encoder):
    loss, gradients = loops.gradient(SupCon(small_encoder(False)), batch([0, 4, 8, 20], 2))
    assert loss > 0 and all(g.isfinite().all() and g.any() for g in gradients)


def test_an_image_without_a_label_changes_nothing(small_encoder):
    method = SupCon(small_encoder(False))
    with_it, without = (loops.gradient(method, batch(index, 2)) for index in ([0, 1, 21, 5], [0, 1, 5]))
    torch.testing.assert_close(with_it, without)


def test_its_gradient_is_that_of_finite_differences(small_encoder):
    method = SupCon(small_encoder(False), dictionary=Memory(12, 5).double())
    loops.remember(method)
    assert torch.autograd.gradcheck(loops.of_head(method, batch(MIXED, 2)), (method.encoder.head.weight,))


def test_a_temperature_that_is_none_is_refused(small_encoder):
    with pytest.raises(ValueError, match="temperature: 0"):
        SupCon(small_encoder(), temperature=0.0)
