"""Centre loss: the method beside a loop, its centres over steps, micro-batches and processes, and what is refused."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.method import Batch
from metric_learning import CentreLoss
from tests.metric_cases import lengths

C, WEIGHT = 4, 0.3


@pytest.fixture
def small_encoder(small_encoder):
    return lambda *given, **named: lengths(small_encoder(*given, **named))


@pytest.fixture
def make(small_encoder):
    def build(batchnorm=True, **settings):
        method = CentreLoss(small_encoder(batchnorm), C, **{"weight": WEIGHT, **settings}).double()
        method.centres.normal_()
        return method
    return build


def moved(centres, x, labels, alpha):
    """Wen et al. 2016, Eq. 4, class by class."""
    after = []
    for j, c in enumerate(centres):
        mine = [x[i] for i, y in enumerate(labels) if y == j]
        after.append(c - alpha * sum((c - x_i for x_i in mine), torch.zeros_like(c)) / (1 + len(mine)))
    return torch.stack(after)


def test_the_loss_and_the_distances_are_their_loops(make, batches):
    method, (batch,) = make(), batches(1)
    x, terms, own, other = method.encoder.project(batch.views[0]).detach(), [], [], []
    for x_i, y in zip(x, batch.label.tolist()):
        if y >= 0:
            softmax = F.cross_entropy(method.classifier(x_i)[None], torch.tensor([y])).item()
            d = [math.dist(x_i.tolist(), c) for c in method.centres.tolist()]
            terms.append(softmax + WEIGHT / 2 * d[y] ** 2)
            own.append(d[y])
            other.append(min(d[:y] + d[y + 1:]))
    output, n = method(batch), len(terms)
    found = [x.item() for x in (output.loss, output.logs["d_pos"], output.logs["d_neg"])]
    assert found == pytest.approx([sum(x) / n for x in (terms, own, other)], rel=1e-9)
    assert output.logs["loss"] == pytest.approx((output.logs["softmax"] + WEIGHT * output.logs["centre"]).item())


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_centres_follow_wens_rule_from_step_to_step(make, batches, alpha):
    method = make(alpha=alpha)
    for batch in batches(5):
        expected = moved(method.centres.clone(), method.encoder.project(batch.views[0]).detach(), batch.label, alpha)
        method.after_step([batch], [method(batch)], 0.5)
        torch.testing.assert_close(method.centres, expected)


def test_micro_batches_move_the_centres_once_as_one_batch_does(make, batches):
    method, (batch,) = make(batchnorm=False), batches(1)
    expected = moved(method.centres.clone(), method.encoder.project(batch.views[0]).detach(), batch.label, 0.5)
    parts = [Batch([view[i:i + 2] for view in batch.views], batch.index[i:i + 2], batch.label[i:i + 2])
             for i in range(0, 8, 2)]
    method.after_step(parts, [method(part) for part in parts], 0.5)
    torch.testing.assert_close(method.centres, expected)


def test_centres_end_at_the_means_of_features_that_stay(make, batches):
    method, (batch,) = make(batchnorm=False), batches(1)
    x, before = method.encoder.project(batch.views[0]).detach(), method.centres.clone()
    for _ in range(200):
        method.after_step([batch], [method(batch)], 0.5)
    means = torch.stack([x[batch.label == j].mean(dim=0) for j in range(C)])
    torch.testing.assert_close(method.centres, means)
    assert not torch.allclose(before, means, atol=0.1)


def test_images_without_labels_take_no_part(make, batches):
    method, (batch,) = make(), batches(1)
    none, before = batch._replace(label=torch.full_like(batch.label, -1)), method.centres.clone()
    output = method(none)
    output.loss.backward()
    method.after_step([none], [output], 0.5)
    assert output.loss.item() == 0 and not any(p.grad.any() for p in method.parameters())
    assert torch.equal(method.centres, before) and all(x.isfinite() for x in output.logs.values())


def test_centres_are_state_and_no_parameters(make):
    method = make()
    assert "centres" in method.state_dict() and "centres" not in dict(method.named_parameters())
    assert method.chance() == pytest.approx(math.log(C))


@pytest.mark.parametrize("settings, message", [
    ({"weight": -0.1}, "weight: -0.1 given. Give a weight of 0 or more"),
    ({"alpha": 1.5}, "alpha: 1.5 given. Give a number from 0"),
    ({"num_classes": 0}, "num_classes: 0 given"),
])
def test_settings_that_mean_nothing_are_refused(small_encoder, settings, message):
    with pytest.raises(ValueError, match=message):
        CentreLoss(small_encoder(), **{"num_classes": C, **settings})
