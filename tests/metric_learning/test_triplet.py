"""Triplet and RankedTriplet beside loops over the features of their encoder; runs on digits that learn, and one that
collapses."""

import math
from functools import partial

import pytest
import torch

from common import counter
from common.data.orders import Balanced
from common.health import Health, spread
from common.method import Batch
from common.train import Step
from metric_learning import Memory, OfflineTriplet, RankedTriplet, Triplet
from tests import tiny
from tests.processes import tool

C, N = 5, 8
LABELS = {
    "two blocks": [0, 0, 0, 0, 1, 1, 1, 1],
    "gaps, one unlabelled, one of another class": [7, 7, -1, 7, 90, 90, 3, 90],
    "no positive pair": [0, 1, 2, 3, 4, 5, 6, 7],
    "one class": [2] * N,
    "unlabelled": [-1] * N,
}
NOTHING = ("no positive pair", "one class", "unlabelled")


def squared(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def mean(values):
    return sum(values) / len(values) if values else 0


def batch_of(label, seed=0):
    draw = torch.Generator().manual_seed(seed)
    index = torch.arange(N) + N * seed
    return Batch([torch.randn(N, 2, 5, 5, generator=draw, dtype=torch.float64)], index, torch.tensor(label))


def candidates(method, batch):
    """(feature, label) of the batch, and behind it of the memory, as plain lists."""
    found = list(zip(method.encoder(batch.views[0]).tolist(), batch.label.tolist(), strict=True))
    if method.dictionary is None:
        return found
    return found + list(zip(method.dictionary.keys.tolist(), method.dictionary.label.tolist(), strict=True))


@pytest.fixture(params=[False, True], ids=["no memory", "memory"])
def memory(request):
    def make():
        if not request.param:
            return None
        filled = Memory(12, C).double()
        x = torch.nn.functional.normalize(torch.randn(9, C, dtype=torch.float64), dim=1)
        filled.remember(x, torch.arange(9) + 100, torch.tensor([0, 1, 7, 90, -1, 5, 5, 2, 3]))
        return filled
    return make


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("square", [True, False], ids=["squared", "Euclidean"])
@pytest.mark.parametrize("negatives", ["hardest", "semi_hard"])
def test_the_triplet_loss_is_its_loop_over_all_pairs(negatives, square, name, memory, small_encoder):
    method = Triplet(small_encoder(dim=C), margin=0.4, negatives=negatives, squared=square, dictionary=memory())
    batch, margin = batch_of(LABELS[name]), 0.4
    found, terms, pos, neg = candidates(method, batch), [], [], []
    for i, (a, of_a) in enumerate(found[:N]):
        for j in range(i // 4 * 4, i // 4 * 4 + 4):                 # its block of four
            if i == j or of_a != found[j][1] or of_a == -1:
                continue
            d = [squared(a, x) if square else math.sqrt(squared(a, x)) for x, _ in found]
            others = [d[n] for n, (_, y) in enumerate(found) if y not in (-1, of_a)]
            farther = [x for x in others if x > d[j]]
            if others:
                pos.append(d[j])
                neg.append(min(others) if negatives == "hardest" else min(farther) if farther else max(others))
                terms.append(max(0, pos[-1] - neg[-1] + margin))
    logs = method(batch).logs
    assert logs["loss"].item() == pytest.approx(mean(terms), abs=1e-12) and bool(terms) >= (name == "two blocks")
    assert logs["active"].item() == pytest.approx(mean([float(x > 0) for x in terms]))
    assert (logs["d_pos"].item(), logs["d_neg"].item()) == pytest.approx((mean(pos), mean(neg)), abs=1e-12)
    assert logs["valid"].item() == pytest.approx(len(terms) / (N * 3))


@pytest.mark.parametrize("seed", [0, 1])
def test_random_negatives_change_with_the_step_and_the_seed_and_are_of_other_classes(seed, small_encoder):
    method = Triplet(small_encoder(dim=C), negatives="random", margin=4.0, seed=seed)
    batch = batch_of(LABELS["two blocks"])
    seen = []
    for _ in range(3):
        output = method(batch)
        seen.append(output.logs["d_neg"].item())
        method.after_step([batch], [output], 0.5)
    again = Triplet(small_encoder(dim=C), negatives="random", margin=4.0, seed=1 - seed)
    again.load_state_dict(method.state_dict())
    assert len({*seen, method(batch).logs["d_neg"].item(), again(batch).logs["d_neg"].item()}) == 5


@pytest.mark.parametrize("negatives", ["random", "semi_hard", "hardest"])
@pytest.mark.parametrize("square", [True, False], ids=["squared", "Euclidean"])
def test_features_that_are_one_point_have_the_loss_of_the_margin(negatives, square, small_encoder):
    encoder = small_encoder(dim=C)
    torch.nn.init.zeros_(encoder.head.weight)
    method = Triplet(encoder, margin=0.3, negatives=negatives, squared=square)
    output = method(batch_of(LABELS["two blocks"]))
    output.loss.backward()
    assert output.loss.item() == pytest.approx(method.chance()) == pytest.approx(0.3)
    assert output.logs["active"] == 1 and output.logs["d_pos"].item() == pytest.approx(0, abs=1e-12)
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


@pytest.mark.parametrize("make", [Triplet, RankedTriplet])
@pytest.mark.parametrize("name", NOTHING)
def test_without_a_triplet_the_loss_is_0_and_so_is_its_gradient(name, make, small_encoder):
    method = make(small_encoder(dim=C), order=Balanced(4))
    output = method(batch_of(LABELS[name]))
    output.loss.backward()
    assert output.loss.item() == 0 and all(x.isfinite() for x in output.logs.values())
    assert all(not p.grad.any() for p in method.parameters())


def test_triplets_without_a_loss_count_in_the_mean(small_encoder):
    """Else the loss of a network that has learned nearly all is about the margin, as that of one that collapsed."""
    method, batch = Triplet(small_encoder(dim=C), negatives="random", margin=0.3), batch_of(LABELS["two blocks"])
    d = torch.where(batch.label[:, None] == batch.label, 0.1, 2.0)
    d[0, 4:] = 0.1                                              # one of eight anchors has negatives that are not far
    method._distances = lambda x, y: d
    logs = method(batch).logs
    assert (logs["loss"].item(), logs["active"].item()) == pytest.approx((0.3 / 8, 1 / 8))


def test_the_triplet_loss_is_the_peers(small_encoder):
    pytest.importorskip("pytorch_metric_learning", reason="pytorch-metric-learning is not installed")
    from pytorch_metric_learning import distances, reducers
    from pytorch_metric_learning.losses import TripletMarginLoss
    from pytorch_metric_learning.miners import BatchEasyHardMiner

    plain = distances.LpDistance(normalize_embeddings=False, power=2)
    method, batch = Triplet(small_encoder(dim=C), margin=0.4, negatives="hardest"), batch_of(LABELS["two blocks"])
    x = method.encoder(batch.views[0])
    a, p, of, n = BatchEasyHardMiner("all", "hard", distance=plain)(x, batch.label)
    negative = torch.empty(N, dtype=torch.int64).scatter(0, of, n)
    theirs = TripletMarginLoss(0.4, reducer=reducers.MeanReducer(), distance=plain)(x, batch.label, (a, p, negative[a]))
    ours = method(batch).loss
    torch.testing.assert_close(ours, theirs)
    parameters = list(method.encoder.parameters())
    grads = [torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (ours, theirs)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("make", [
    lambda encoder: Triplet(encoder, margin=0.4), lambda encoder: Triplet(encoder, margin=0.4, squared=False),
    lambda encoder: RankedTriplet(encoder, margin=0.4), lambda encoder: Triplet(encoder, negatives="random"),
])
def test_gradients_are_those_of_finite_differences(make, small_encoder):
    method, batch = make(small_encoder(batchnorm=False, dim=C)), batch_of(LABELS["two blocks"])
    parameters = dict(method.named_parameters())

    def loss(*values):
        return torch.func.functional_call(method, dict(zip(parameters, values, strict=True)), (batch,)).loss
    assert torch.autograd.gradcheck(loss, tuple(parameters.values()))


def draw(name, step, i, among, n, seed=0):
    """The ``n`` of ``among`` that come first in the draws for anchor ``i``."""
    keys = seed, counter.stream("ranked triplet"), torch.tensor(step), counter.stream(name), torch.tensor(i)
    order = {j: counter.uniform(*keys, torch.tensor(j)).item() for j in among}
    return sorted(among, key=order.get)[:n]


def ranked_by_loop(found, step, neg_num, pair_size, hard_ratio, rand_ratio, margin):
    """The ranked layer, one pair after the other, as its tutorial tells it."""
    total = 0
    for i in range(0, N, pair_size):
        (a, of_a), (b, of_b) = found[i], found[i + 1]
        if of_a != of_b or of_a == -1:
            continue
        loss = {j: -dot(a, b) + dot(a, x) + margin for j, (x, y) in enumerate(found) if y not in (-1, of_a)}
        chosen = sorted((j for j in loss if loss[j] > 0), key=lambda j: -loss[j])
        if len(chosen) > neg_num:
            hard = draw("ranked hard", step, i, chosen[:neg_num], int(neg_num * hard_ratio))
            rest = [j for j in chosen if j not in hard]
            chosen = hard + draw("ranked rest", step, i, rest, int(neg_num * rand_ratio))
        total += sum(max(0, loss[j]) + max(0, -dot(a, b) + dot(b, found[j][0]) + margin) for j in chosen)
    return total / (2 * neg_num * N / pair_size)


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("settings", [(2, 2, 0.5, 0.5, 1.0), (3, 4, 0.34, 0.67, 2.0), (1, 2, 0.0, 1.0, 0.5),
                                      (20, 2, 0.5, 0.5, 2.0), (4, 2, 1.0, 0.0, 2.0)])
def test_the_ranked_layer_is_its_loop_at_each_step(settings, name, memory, small_encoder):
    named = dict(zip(("neg_num", "pair_size", "hard_ratio", "rand_ratio", "margin"), settings, strict=True))
    method = RankedTriplet(small_encoder(dim=C), **named, order=Balanced(4), dictionary=memory())
    for step in range(3):
        batch = batch_of(LABELS[name], step)
        expected = ranked_by_loop(candidates(method, batch), step, *settings)
        output = method(batch)
        assert output.loss.item() == pytest.approx(expected, abs=1e-12) and (expected > 0 or name in NOTHING)
        method.after_step([batch], [output], 0.5)


def test_the_ranked_loss_of_one_point_is_the_share_of_the_margin_that_its_mix_takes(small_encoder):
    encoder = small_encoder(dim=C)
    torch.nn.init.zeros_(encoder.head.weight)
    for settings, chance in (({}, 0.2), ({"hard_ratio": 0.25, "neg_num": 3, "rand_ratio": 0.7}, 0.2 * 2 / 3)):
        method = RankedTriplet(encoder, **settings, order=Balanced(4))
        logs = method(batch_of(LABELS["two blocks"])).logs
        assert logs["loss"].item() == pytest.approx(method.chance()) == pytest.approx(chance)
        assert logs["active"] == 1 and logs["chosen"].item() == pytest.approx(chance / 0.2)
        assert logs["d_pos"].item() == pytest.approx(-1) == logs["d_neg"].item()


@pytest.mark.parametrize("make, settings, message", [
    (Triplet, {"margin": 0.0}, "margin: 0.0 is not a positive number"),
    (RankedTriplet, {"margin": math.inf}, "margin: inf is not"),
    (RankedTriplet, {"pair_size": 1}, "pair_size: 1 given"),
    (RankedTriplet, {"order": Balanced(4), "pair_size": 3}, "pair_size: 3 given, of blocks of 4 images"),
    (RankedTriplet, {"neg_num": 1}, "neg_num: 1 given"),
    (RankedTriplet, {"rand_ratio": 2.0}, "rand_ratio: 2.0 given"),
])
def test_what_makes_no_sense_is_refused(make, settings, message, small_encoder):
    with pytest.raises(ValueError, match=message):
        make(small_encoder(), **settings)


def test_a_batch_that_is_no_whole_blocks_is_refused(small_encoder):
    with pytest.raises(ValueError, match="per_class: 3 given for 8 images"):
        Triplet(small_encoder(), order=Balanced(3))(batch_of(LABELS["two blocks"]))


def on_digits(folder, config, *overrides):
    """A short run of a config that ships, on scikit-learn's digits: 32 steps an epoch, ten classes of four images."""
    ended = tool("train", "--config", config, "data={name: common.data.digits}", "method.order.per_class=4",
                 "views={name: common.data.recipes.digits, num_views: 1, crop_min: 0.8}", "train.batch_size=40",
                 "method.encoder={name: common.backbones.encoder, arch: w16s2, dim: 32}", "train.workers=0",
                 "schedule.warmup=0", "train.threads=1", "train.device=cpu", "log.every=16", "run.dir=run", *overrides,
                 cwd=folder)
    assert ended.code == 0, ended.err
    alarms = [record["text"] for record in tiny.records(folder / "run", "event") if record["event"] == "alarm"]
    return ended.out, tiny.records(folder / "run"), alarms


@pytest.mark.parametrize("config", ["triplet.yaml", "ranked_triplet.yaml"])
def test_a_short_run_learns_and_raises_no_alarm(config, tmp_path):
    _, (first, *_, last), alarms = on_digits(tmp_path, config, "train.epochs=3", "evaluate.baselines=true")
    results = tiny.summary(tmp_path / "run")["results"]
    trained, untrained = (next(x["value"] for x in results[name] if x["protocol"]["k"] == 1)
                          for name in ("trained", "untrained"))
    assert trained > 90 > 80 > untrained and alarms == []
    assert last["loss"] < 0.75 * first["loss"] and last["active"] < 0.9 * first["active"]
    assert last["d_neg"] - last["d_pos"] > 2 * (first["d_neg"] - first["d_pos"])


def test_a_run_whose_features_become_one_point_is_told_that_its_loss_is_stuck_at_the_margin(tmp_path):
    """Hardest negatives from the start, at a high rate (Schroff et al. 2015, Section 3.2, speak of such a collapse)."""
    out, records, alarms = on_digits(tmp_path, "triplet.yaml", "train.epochs=4", "method.negatives=hardest",
                                     "optimizer.lr=0.5", "evaluate.protocols=[]")
    told = [text for text in alarms if "stuck at the margin for 100 steps" in text]
    assert len(told) == 1 and "begin with semi-hard" in told[0] and told[0] in out
    last = records[-1]
    assert last["loss"] == pytest.approx(last["chance"], rel=0.05) and last["chance"] == 0.2
    assert last["active"] > 0.99 and last["d_pos"] < 0.02 > last["d_neg"]


@pytest.mark.parametrize("make", [Triplet, RankedTriplet, partial(OfflineTriplet, num_samples=24)],
                         ids=["triplet", "ranked", "offline"])
def test_a_loss_near_the_margin_is_no_collapse_while_features_differ(make, small_encoder):
    method, health = make(small_encoder(), margin=0.3), Health()
    apart, one = torch.randn(40, C), torch.ones(40, C) + 1e-3 * torch.randn(40, C)

    def watch(x, loss):
        return [health.alarms(Step(n, 0.1, {}, 0.0, False, loss, 1.0, x if n % 20 == 0 else None), method.chance(),
                              method.at_chance) for n in range(150)]
    assert spread(apart).cosine < 0.5 < spread(one).cosine
    assert not any("stuck" in text for texts in watch(apart, 0.3) for text in texts)
    assert not any("stuck" in text for texts in watch(one, 0.25) for text in texts)
    assert sum("stuck" in text for texts in watch(one, 0.301) for text in texts) == 1
