"""InstDisc against the equations of Wu et al. 2018 in plain loops, and what its settings promise."""

import copy
import math

import pytest
import torch
from torch import nn

from common import counter
from common.dictionary import Bank
from common.encoder import Encoder
from common.method import Batch
from common.optim import sgd
from instdisc.method import InstDisc

LR, BETA = 0.3, 0.9
N, C, M, T = 24, 5, 7, 0.2
KEEP, Z_KEEP = 0.4, 0.9                       # t of the bank and of Z


def unit(x):
    return x / x.norm()


def equations(f, v, batches, *, loss="nce", z="average", proximal=0.0):
    """Sec. 3 as it is written, one image at a time, with its own SGD; v is a list of n rows. Yields (loss, Z)."""
    velocity = [torch.zeros_like(p) for p in f.parameters()]
    Z = N * math.exp(1 / (2 * C * T**2)) if z == "fixed" else None
    for step, (views, index, _) in enumerate(batches):
        images = index.tolist()
        features = [unit(row) for row in f(views[0])]
        noise = [[counter.integers(N, 0, counter.stream("bank"), step, index[b], torch.tensor(j)).item()
                  for j in range(M)] for b in range(len(images))]
        estimates = [N / M * sum((v[j] @ f_b / T).exp().item() for j in rows)               # Eq. 8
                     for f_b, rows in zip(features, noise, strict=True)]
        batch_Z = sum(estimates) / len(estimates)
        used_Z = batch_Z if Z is None else Z

        def h(f_b, i, used_Z=used_Z):
            p = (v[i] @ f_b / T).exp() / used_Z                                             # Eq. 4
            return p / (p + M / N)                                                          # Eq. 6, P_n = 1/n

        terms = []
        for i, f_b, rows in zip(images, features, noise, strict=True):
            if loss == "nce":                                                               # Eq. 7
                term = -h(f_b, i).log() - sum((1 - h(f_b, j)).log() for j in rows)
            else:                                                                           # Eq. 2-3, all or sampled
                others = range(N) if loss == "full_softmax" else [i, *rows]
                term = -((v[i] @ f_b / T).exp() / sum((v[j] @ f_b / T).exp() for j in others)).log()
            terms.append(term + proximal * (f_b - v[i]).square().sum())                     # Eq. 9
        total = sum(terms) / len(terms)
        yield total.item(), used_Z
        grads = torch.autograd.grad(total, list(f.parameters()))
        with torch.no_grad():
            for p, u, g in zip(f.parameters(), velocity, grads, strict=True):
                u.mul_(BETA).add_(g)
                p.sub_(LR * u)
            for i, f_b in zip(images, features, strict=True):
                v[i] = unit(KEEP * v[i] + (1 - KEEP) * f_b)
        if Z is None:
            Z = batch_Z
        elif z == "average":
            Z = Z_KEEP * Z + (1 - Z_KEEP) * batch_Z


def make(encoder, loss="nce", **settings):
    bank = Bank(N, C, negatives=None if loss == "full_softmax" else M, momentum=KEEP)
    return InstDisc(encoder, bank, **{"temperature": T, "z_momentum": Z_KEEP, "loss": loss, **settings}).double()


def train(method, batches):
    """The order of calls that the trainer promises; yields the loss of each step and its log Z."""
    optimizer = sgd(method, 256, lr=LR, momentum=BETA)
    for step, batch in enumerate(batches, 1):
        output = method(batch)
        yield output.loss.item(), output.logs.get("log_z")
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_step([batch], [output], step / len(batches))


@pytest.mark.parametrize("settings", [
    {}, {"z": "first_batch"}, {"z": "fixed"}, {"proximal": 3.0}, {"loss": "sampled_softmax"}, {"loss": "full_softmax"},
    {"loss": "full_softmax", "proximal": 0.5}], ids=str)
def test_twenty_steps_are_those_of_the_equations(settings, small_encoder, batches):
    method = make(small_encoder(batchnorm=False), **settings)
    f = copy.deepcopy(nn.Sequential(method.encoder.backbone, method.encoder.head))
    v = list(method.dictionary.v.clone())
    expected = list(equations(f, v, batches(20), **settings))
    found = list(train(method, batches(20)))
    assert [loss for loss, _ in found] == pytest.approx([loss for loss, _ in expected], abs=1e-6, rel=0)
    if method.loss == "nce":
        assert [log_z.item() for _, log_z in found] == pytest.approx([math.log(Z) for _, Z in expected], abs=1e-6)
    torch.testing.assert_close(method.dictionary.v, torch.stack(v))
    torch.testing.assert_close(list(method.encoder.parameters()), list(f.parameters()))
    assert max(loss for loss, _ in expected) - min(loss for loss, _ in expected) > 0.05


@pytest.mark.parametrize("settings", [{}, {"z": "first_batch"}, {"z": "fixed"}, {"loss": "sampled_softmax"},
                                      {"loss": "full_softmax"}], ids=str)
def test_the_loss_at_chance_is_the_one_announced(settings, small_encoder, batches):
    method = make(small_encoder(), temperature=1e7, **settings)
    assert method(batches(1)[0]).loss.item() == pytest.approx(method.chance(), abs=1e-5)


def test_the_papers_chance_levels():
    def chance(negatives, loss, n=50_000):
        return InstDisc(Encoder(nn.Flatten(), nn.Linear(4, 4)), Bank(n, 4, negatives), loss=loss).chance()

    assert chance(None, "full_softmax") == pytest.approx(10.82, abs=0.005)       # ln of CIFAR's 50,000
    assert chance(4096, "sampled_softmax") == pytest.approx(math.log(4097))
    assert chance(4096, "nce") == pytest.approx(math.log(4097) + 4096 * math.log(4097 / 4096))


def test_the_fixed_z_is_what_random_features_give():
    """Z/n = 2.22 at D = 128, T = 0.07; the authors' code finds it on its first, random batch."""
    method = InstDisc(Encoder(nn.Flatten(), nn.Linear(4, 128)), Bank(20_000, 128, 8), temperature=0.07, z="fixed")
    q = torch.nn.functional.normalize(torch.randn(64, 128), dim=1)
    found = (q @ method.dictionary.v.T / 0.07).exp().mean()
    assert method.log_z.exp().item() / 20_000 == pytest.approx(found.item(), rel=0.02) == pytest.approx(2.22, rel=0.02)


@pytest.mark.parametrize(("z", "moves"), [("average", True), ("first_batch", False), ("fixed", False)])
def test_z_moves_only_when_it_is_averaged(z, moves, small_encoder, batches):
    method = make(small_encoder(), z=z)
    assert method.log_z.isnan() == (z != "fixed")
    seen = []
    for batch in batches(3):
        method.after_step([batch], [method(batch)], 1.0)
        seen.append(method.log_z.item())
    assert (seen[0] != seen[1] != seen[2]) == moves and (seen[0] == seen[2]) != moves


def test_a_bank_may_start_from_the_encoders_features():
    features = torch.randn(N, C)
    for init, taken in [("encoder", True), ("random", False)]:
        method = InstDisc(Encoder(nn.Flatten(), nn.Linear(4, C)), Bank(N, C, negatives=M, init=init))
        before = method.dictionary.v.clone()
        method.prepare(lambda: features)
        expected = torch.stack([unit(row) for row in features]) if taken else before
        torch.testing.assert_close(method.dictionary.v, expected)


def test_the_first_z_of_accumulated_gradients_is_the_mean_of_all(small_encoder, batches):
    method, feed = make(small_encoder()), batches(4, size=2)
    outputs = [method(batch) for batch in feed]
    method.after_step(feed, outputs, 0.5)
    z = torch.cat([output.carry["log_z"] for output in outputs]).exp()
    torch.testing.assert_close(method.log_z.exp(), z.mean())


def test_perfect_features_lose_nothing():
    """Every image its own direction, and the bank knows it: no other row is near, the image's own is no negative."""
    encoder = Encoder(nn.Flatten(), nn.Linear(16, 16, bias=False))
    nn.init.eye_(encoder.head.weight)
    method = InstDisc(encoder, Bank(16, 16, init="encoder"), loss="full_softmax")
    method.prepare(lambda: torch.eye(16))
    index = torch.arange(8)
    assert method(Batch([torch.eye(16)[index]], index, index)).loss < 1e-3


@pytest.mark.parametrize(("settings", "negatives", "message"), [
    ({"loss": "full_softmax"}, 7, "'full_softmax' with dictionary.negatives 7"),
    ({"loss": "nce"}, None, "'nce' with dictionary.negatives None"),
    ({"temperature": -1.0}, 7, "temperature: -1.0"),
    ({"z_momentum": 0.0}, 7, "z_momentum: 0.0"), ({"z_momentum": 1.0}, 7, "z_momentum: 1.0")])
def test_settings_that_mean_nothing_are_refused(settings, negatives, message):
    with pytest.raises(ValueError, match=message):
        InstDisc(Encoder(nn.Flatten(), nn.Linear(4, C)), Bank(N, C, negatives), **settings)
