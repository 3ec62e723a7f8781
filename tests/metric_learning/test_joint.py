"""Softmax and contrastive loss of two streams: the method beside a loop, its weights, its batches, and a short run."""

import math

import pytest
import torch
import torch.nn.functional as F

from common.data.datasets import Images
from common.data.orders import Balanced, RandomPairs, Streams
from common.encoder import Encoder
from common.method import Batch
from metric_learning import SoftmaxContrastive
from metric_learning.classifying import widths
from tests.metric_cases import lengths

C, MARGIN = 4, 2.0


@pytest.fixture
def small_encoder(small_encoder):
    return lambda *given, **named: lengths(small_encoder(*given, **named))


@pytest.fixture
def make(small_encoder):
    return lambda **settings: SoftmaxContrastive(small_encoder(), C, margin=MARGIN, **settings).double()


def by_loop(method, batch, contrastive_weight):
    """The loss of a batch, image by image and pair by pair; the mean softmax loss of both streams; the pairs' loss."""
    x_BD = method.encoder.backbone(batch.views[0]).detach()
    branch = method.encoder.head(x_BD).detach()
    scores, label = method.classifier(x_BD).detach(), batch.label.tolist()
    of_images = [F.cross_entropy(z[None], torch.tensor([y])).item() if y >= 0 else None for z, y in zip(scores, label)]
    streams = [[x for x in of_images[s::2] if x is not None] for s in (0, 1)]
    pairs = []
    for i in range(0, len(label), 2):
        if min(label[i:i + 2]) >= 0:
            d = math.dist(branch[i].tolist(), branch[i + 1].tolist())
            pairs.append(d * d / 2 if label[i] == label[i + 1] else max(0, MARGIN - d) ** 2 / 2)
    softmax, contrastive = [sum(x) / len(x) for x in streams], sum(pairs) / len(pairs)
    return 0.5 * sum(softmax) + contrastive_weight * contrastive, sum(softmax) / 2, contrastive


@pytest.mark.parametrize("weight", [0.1, 0, 3.0])
def test_the_loss_is_its_loop(make, batches, weight):
    method, (batch,) = make(contrastive_weight=weight), batches(1)
    output = method(batch)
    found = [x.item() for x in (output.loss, output.logs["softmax"], output.logs["contrastive"])]
    assert found == pytest.approx(by_loop(method, batch, weight), rel=1e-12)
    answers = method.logits(batch.views[0]).argmax(dim=1).tolist()
    right = [y == z for y, z in zip(batch.label.tolist(), answers) if y >= 0]
    assert output.logs["top1"].item() == pytest.approx(sum(right) / len(right))


def test_a_weight_of_the_softmax_loss_is_the_running_mean_of_the_steps_before(make, batches):
    method, expected = make(contrastive_weight="softmax_loss"), math.log(C)
    for step in batches(6):
        parts = [Batch([view[half] for view in step.views], step.index[half], step.label[half])
                 for half in (slice(0, 4), slice(4, 8))]                            # micro-batches: once a step
        outputs = [method(part) for part in parts]
        for part, output in zip(parts, outputs):
            assert output.loss.item() == pytest.approx(by_loop(method, part, expected)[0], rel=1e-6)
        method.after_step(parts, outputs, 0.5)
        expected = 0.99 * expected + 0.01 * sum(by_loop(method, part, 0)[1] for part in parts) / 2
        assert method.running.item() == pytest.approx(expected, rel=1e-6) and not method.running.requires_grad


def test_softmax_alone_leaves_the_branch_a_gradient_of_zero_and_has_the_loss_of_chance(make, batches):
    method = make(contrastive_weight=0)
    method(batches(1)[0]).loss.backward()
    assert all(p.grad is not None and not p.grad.any() for p in method.encoder.head.parameters())
    assert method.classifier.weight.grad.any() and method.encoder.backbone[0].weight.grad.any()
    assert method.chance() == pytest.approx(math.log(C)) and make().chance() is None


def test_images_without_labels_take_no_part(make, batches):
    method, (batch,) = make(), batches(1)
    none = batch._replace(label=torch.full_like(batch.label, -1))
    loss = method(none).loss
    loss.backward()
    assert loss.item() == 0 and not any(p.grad.any() for p in method.parameters())
    assert all(x.isfinite() for x in method(none).logs.values())


def test_images_come_in_two_streams_unless_another_order_is_given(make):
    assert isinstance(make().order, Streams)
    assert isinstance(make(order=RandomPairs()).order, RandomPairs)


def test_the_widths_are_those_of_the_head(small_encoder):
    assert widths(small_encoder(dim=3)) == (6, 3)
    with pytest.raises(ValueError, match="its head has no linear layer"):
        widths(Encoder(torch.nn.Flatten(), torch.nn.Identity()))


@pytest.mark.parametrize("settings, message", [
    ({"num_classes": 1}, "num_classes: 1 given, and a classifier tells classes apart"),
    ({"margin": 0.0}, "margin: 0.0 is not a positive number"),
    ({"softmax_weight": -1.0}, "softmax_weight: -1.0 given. Give a weight of 0 or more"),
    ({"contrastive_weight": math.inf}, "contrastive_weight: inf given"),
])
def test_settings_that_mean_nothing_are_refused(small_encoder, settings, message):
    with pytest.raises(ValueError, match=message):
        SoftmaxContrastive(small_encoder(), **{"num_classes": C, **settings})


@pytest.mark.parametrize("labels, together, message", [
    ([0, 1, 4, 2], 1, "num_classes: 4 given, and some has the label 4. Give 5 or more"),
    ([1, 1, -1, 1], 1, "labelled images of 1 class, and"),
    ([0, 1, 2, 2], 2, "some is a list of pairs"),
])
def test_images_that_it_cannot_learn_from_are_refused(make, labels, together, message):
    some = Images("some", list("abcd"), torch.tensor(labels), ["x"] * 5, torch.zeros(4, 2, 5, 5, dtype=torch.uint8))
    some.together = together
    with pytest.raises(ValueError, match=message):
        make().check_images(some)


def test_images_side_by_side_of_one_class_are_no_pairs_of_two(make):
    some = Images("some", list("abcd"), torch.tensor([0, 0, 1, 1]), ["x"] * 5, torch.zeros(4, 2, 5, 5).byte())
    with pytest.raises(ValueError, match="SoftmaxContrastive compares images 2i and 2i . 1: hardly one pair"):
        make(order=Balanced(2)).check_images(some)
