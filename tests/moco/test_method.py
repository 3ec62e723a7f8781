"""MoCo against Algorithm 1 in plain loops, and what its settings promise."""

import copy
import math

import pytest
import torch
from torch import nn

from common import counter
from common.dictionary import Bank, InBatch, Queue
from common.encoder import Encoder
from common.method import Batch
from common.optim import sgd
from moco.end_to_end import EndToEnd
from moco.method import MoCo

LR, BETA, DECAY = 0.3, 0.9, 1e-3
M, T, K = 0.9, 0.2, 20


def unit(x):
    return x / x.norm()


def normalised_in_groups(f, x_BcHW, groups):
    """f in train mode on each of the groups alone, as on so many GPUs; a list of B unit vectors."""
    return [unit(row) for part in x_BcHW.tensor_split(groups) for row in f(part)]


def algorithm_1(f_q, queue, batches, *, symmetric=False, mask_own=False, groups=1, shuffle=False):
    """The pseudocode of He et al. 2020, with a list as queue and its own SGD; yields the loss of each step.

    f_q, f_k: encoder networks for query and key; queue: a list of K (key, image), the oldest first.
    """
    f_k = copy.deepcopy(f_q)
    velocity = [torch.zeros_like(p) for p in f_q.parameters()]
    for step, (views, index, _) in enumerate(batches):
        loss, enqueued = 0.0, []
        for query_view, key_view in [(0, 1), (1, 0)] if symmetric else [(0, 1)]:
            q = normalised_in_groups(f_q, views[query_view], groups)            # q = f_q.forward(x_q)
            order = list(range(len(index)))
            if shuffle:
                order.sort(key=lambda i: counter.bits(0, counter.stream("shuffle"), step, index[i]).item())
            with torch.no_grad():                                               # k = f_k.forward(x_k); k = k.detach()
                dealt = normalised_in_groups(f_k, views[key_view][order], groups)
            k = [dealt[order.index(i)] for i in range(len(index))]
            terms = []
            for q_i, k_i, image in zip(q, k, index.tolist(), strict=True):
                logits = [q_i @ k_i / T]                                        # the 0-th are positives
                logits += [q_i @ key / T for key, of in queue if not (mask_own and of == image)]
                terms.append(-torch.log(logits[0].exp() / sum(x.exp() for x in logits)))
            loss = loss + sum(terms) / len(terms)
            enqueued += zip(k, index.tolist(), strict=True)
        if symmetric == "mean":
            loss = loss / 2
        yield loss.item()
        grads = torch.autograd.grad(loss, list(f_q.parameters()))               # SGD update: query network
        with torch.no_grad():
            for p, v, g in zip(f_q.parameters(), velocity, grads, strict=True):
                v.mul_(BETA).add_(g + DECAY * p)
                p.sub_(LR * v)
            for slow, fast in zip(f_k.parameters(), f_q.parameters(), strict=True):
                slow.copy_(M * slow + (1 - M) * fast)                           # momentum update: key network
        queue[:] = (queue + enqueued)[-K:]                                      # enqueue, dequeue


def train(method, batches):
    """The order of calls that the trainer promises; yields the loss of each step."""
    optimizer = sgd(method, 256, lr=LR, momentum=BETA, weight_decay=DECAY)
    for step, batch in enumerate(batches, 1):
        output = method(batch)
        yield output.loss.item()
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        method.after_step([batch], [output], step / len(batches))


def plain(encoder):
    return nn.Sequential(encoder.backbone, encoder.head)


@pytest.mark.parametrize("settings", [
    {}, {"symmetric": "sum"}, {"symmetric": "mean"}, {"mask_own": True}, {"symmetric": "sum", "mask_own": True},
    {"groups": 4}, {"groups": 2, "shuffle": True}, {"groups": 4, "shuffle": True, "symmetric": "mean"}], ids=str)
def test_twenty_steps_are_those_of_algorithm_1(settings, small_encoder, batches):
    groups, shuffle = settings.get("groups", 1), settings.get("shuffle", False)
    encoder = small_encoder(batchnorm=groups > 1)
    dictionary = Queue(K, 5, mask_own=settings.get("mask_own", False)).double()
    f_q = plain(copy.deepcopy(encoder))
    queue = [(key.clone(), -1) for key in dictionary.keys]
    key_bn = "none" if groups == 1 else "shuffle" if shuffle else "split"
    method = MoCo(encoder, dictionary, momentum=M, temperature=T, key_bn=key_bn, bn_groups=groups,
                  symmetric=settings.get("symmetric", False))
    expected = list(algorithm_1(f_q, queue, batches(20), **settings))
    assert list(train(method, batches(20))) == pytest.approx(expected, abs=1e-6, rel=0)
    assert max(expected) - min(expected) > 0.05                                 # something was learnt or forgotten
    torch.testing.assert_close(list(method.encoder.parameters()), list(f_q.parameters()))
    head = dictionary.head.item()
    torch.testing.assert_close(torch.roll(dictionary.keys, -head, 0), torch.stack([key for key, _ in queue]))
    assert torch.roll(dictionary.image, -head).tolist() == [image for _, image in queue]


def make(encoder, dictionary, **settings):
    return MoCo(encoder, dictionary.double(), **{"key_bn": "none", **settings})


@pytest.mark.parametrize("symmetric", [False, "sum", "mean"])
@pytest.mark.parametrize("dictionary", [lambda: Queue(K, 5), lambda: Bank(24, 5), lambda: Bank(24, 5, negatives=7)])
def test_the_loss_at_chance_is_the_one_announced(dictionary, symmetric, small_encoder, batches):
    method = make(small_encoder(False), dictionary(), temperature=1e7, symmetric=symmetric)
    assert method(batches(1)[0]).loss.item() == pytest.approx(method.chance(), abs=1e-5)


def test_the_papers_chance_levels():
    def chance(dictionary, **settings):
        return MoCo(Encoder(nn.Flatten(), nn.Linear(4, 4)), dictionary, key_bn="none", **settings).chance()

    assert chance(Queue(65536, 4)) == pytest.approx(11.09, abs=0.005)            # ln(65537)
    assert chance(Queue(65536, 4), symmetric="mean") == chance(Queue(65536, 4))
    assert chance(Queue(4096, 4)) == pytest.approx(8.32, abs=0.005)
    assert chance(InBatch()) is None


def test_in_batch_candidates_at_chance_are_the_batch(small_encoder, batches):
    method = make(small_encoder(False), InBatch(), temperature=1e7)
    assert method(batches(1)[0]).loss.item() == pytest.approx(math.log(8), abs=1e-5)
    method = EndToEnd(small_encoder(), temperature=1e7)
    assert method(batches(1)[0]).loss.item() == pytest.approx(math.log(8), abs=1e-5)


@pytest.mark.parametrize("batchnorm", [False, True])
def test_keys_equal_queries_at_step_0(batchnorm, small_encoder, batches):
    method = make(small_encoder(batchnorm), Queue(K, 5), key_bn="split" if batchnorm else "none", bn_groups=4)
    view = batches(1)[0].views[0]
    with torch.no_grad():
        assert torch.equal(method.encode_keys(view, torch.arange(8)), method.encoder(view))
    assert not any(p.requires_grad for p in method.key_encoder.parameters())


@pytest.mark.parametrize("symmetric", [False, "sum", "mean"])
def test_perfect_features_lose_nothing(symmetric):
    """Keys are enqueued after the loss, and after both where both views are queries: never negatives of their own."""
    encoder = Encoder(nn.Flatten(), nn.Linear(16, 16, bias=False))
    nn.init.eye_(encoder.head.weight)
    method = MoCo(encoder, Queue(8, 16), key_bn="none", symmetric=symmetric)
    images = torch.eye(16).view(16, 1, 4, 4)
    for index in (torch.arange(8), torch.arange(8, 16)):
        batch = Batch([images[index]] * 2, index, index)
        output = method(batch)
        method.after_step([batch], [output], 1.0)
    assert output.loss < 1e-3


def test_symmetric_is_the_sum_or_mean_of_both_directions(small_encoder, batches):
    batch, loss = batches(1)[0], {}
    swapped = batch._replace(views=batch.views[::-1])
    for symmetric in (False, "sum", "mean"):
        torch.manual_seed(5)
        method = make(small_encoder(False), Queue(K, 5), symmetric=symmetric)
        loss[symmetric] = method(batch).loss.item(), method(swapped).loss.item()
    assert loss["sum"][0] == pytest.approx(sum(loss[False])) and loss["mean"][0] == pytest.approx(sum(loss[False]) / 2)


def test_both_sets_of_keys_are_enqueued_in_order(small_encoder, batches):
    method, batch = make(small_encoder(False), Queue(K, 5), symmetric="mean"), batches(1)[0]
    with torch.no_grad():
        keys = torch.cat([method.key_encoder(batch.views[1]), method.key_encoder(batch.views[0])])
    method.after_step([batch], [method(batch)], 1.0)
    torch.testing.assert_close(method.dictionary.keys[:16], keys)
    assert method.dictionary.image[:16].tolist() == batch.index.tolist() * 2


def test_momentum_0_and_1_are_the_two_ends(small_encoder, batches):
    for momentum, same_as_query in [(0.0, True), (1.0, False)]:
        method = make(small_encoder(False), Queue(K, 5), momentum=momentum)
        start = copy.deepcopy(method.encoder)
        list(train(method, batches(3)))
        expected = method.encoder if same_as_query else start
        torch.testing.assert_close(list(method.key_encoder.parameters()), list(expected.parameters()))


@pytest.mark.parametrize("groups", [2, 4])
def test_shuffled_keys_come_back_in_order_with_other_company(groups, small_encoder, batches):
    """Each key is what the key encoder makes of the image among those that the hash deals into its group."""
    method = make(small_encoder(), Queue(K, 5), key_bn="shuffle", bn_groups=groups, seed=3)
    plain_encoder = small_encoder()
    plain_encoder.load_state_dict(method.key_encoder.state_dict())
    companies = set()
    for step, batch in enumerate(batches(3)):
        view, images = batch.views[1], batch.index.tolist()
        dealt = sorted(range(8), key=lambda i: counter.bits(3, counter.stream("shuffle"), step, batch.index[i]).item())
        found = method.encode_keys(view, batch.index)
        for members in (dealt[first:first + 8 // groups] for first in range(0, 8, 8 // groups)):
            companies.add(frozenset(images[i] for i in members))
            torch.testing.assert_close(found[members], plain_encoder(view[members]).detach())
        method.step.add_(1)
    assert len(companies) == 3 * groups


def test_a_shuffled_key_encoder_in_eval_mode_is_the_plain_one(small_encoder, batches):
    """The permutation alone changes no key: where company does not matter, every key is at its image's place."""
    method = make(small_encoder(), Queue(K, 5), key_bn="shuffle", bn_groups=2).eval()
    batch = batches(1)[0]
    with torch.no_grad():
        torch.testing.assert_close(method.encode_keys(batch.views[1], batch.index), method.key_encoder(batch.views[1]))


def test_split_keys_recognise_their_company_and_shuffled_keys_do_not():
    """The leak: images without any content of their own, told apart by nothing but the group they are normalised in."""
    class Company(nn.Module):
        """The sign of an image's own noise after BatchNorm: its place in its group of two."""

        def __init__(self):
            super().__init__()
            self.norm, self.scale = nn.BatchNorm1d(1), nn.Parameter(torch.ones(()))

        def forward(self, x):
            return torch.cat([self.norm(x), torch.full_like(x, 0.1)], dim=1) * self.scale

    def top1(key_bn):
        torch.manual_seed(0)
        method = MoCo(Encoder(Company(), nn.Identity()), InBatch(), key_bn=key_bn, bn_groups=64, temperature=0.1)
        level = torch.randn(64).repeat_interleave(2)[:, None]                   # what a group has in common
        noise = torch.tensor([[-1.0], [1.0]]).repeat(64, 1)                      # of both views: the same place in it
        views = [level + 0.01 * noise * (1 + torch.rand(128, 1)) for _ in range(2)]
        index = torch.arange(128)
        q, k = method.encoder(views[0]), method.encode_keys(views[1], index)
        return ((q * k).sum(dim=1) > 0.9).float().mean().item()

    assert top1("split") == 1.0                                                 # q and k agree by their company alone
    assert top1("shuffle") < 0.75                                               # a coin toss


def test_eval_keys_are_normalised_by_averaged_running_statistics(small_encoder, batches):
    method = make(small_encoder(), Queue(K, 5), key_bn="eval", bn_groups=2, momentum=0.8)
    slow, fast = (f.backbone[1] for f in (method.key_encoder, method.encoder))
    expected = slow.running_mean.clone(), slow.running_var.clone()
    for batch in batches(3):
        output = method(batch)
        alone = torch.cat([method.encode_keys(x[None], batch.index[:1]) for x in batch.views[1]])
        torch.testing.assert_close(output.carry["keys"], alone)
        method.after_step([batch], [output], 1.0)
        expected = tuple(0.8 * old + 0.2 * new for old, new in
                         zip(expected, (fast.running_mean, fast.running_var), strict=True))
    torch.testing.assert_close((slow.running_mean, slow.running_var), expected)
    method.eval().train()
    assert method.encoder.training and not method.key_encoder.training


def test_the_key_encoders_running_statistics_are_its_own(small_encoder, batches):
    """What its own BatchNorm saw, counted, and no average of the query encoder's."""
    method = make(small_encoder(), Queue(K, 5), key_bn="split", bn_groups=2, momentum=0.8)
    conv, norm = method.key_encoder.backbone[:2]
    mean_C, var_C = torch.zeros(6), torch.ones(6)
    for batch in batches(3):
        halves = conv(batch.views[1]).detach().split(4)
        mean_C = 0.9 * mean_C + 0.1 * sum(x.mean((0, 2, 3)) for x in halves) / 2
        var_C = 0.9 * var_C + 0.1 * sum(x.var((0, 2, 3)) for x in halves) / 2
        method.after_step([batch], [method(batch)], 1.0)
    torch.testing.assert_close((norm.running_mean, norm.running_var), (mean_C, var_C))
    assert norm.num_batches_tracked == 3


def test_key_bn_none_leaves_batchnorm_as_it_is(small_encoder):
    method = make(small_encoder(), Queue(K, 5))
    assert type(method.encoder.backbone[1]) is nn.BatchNorm2d


@pytest.mark.parametrize(("batchnorm", "settings", "message"), [
    (True, {"key_bn": "shuffle", "bn_groups": 1}, "'shuffle' with bn_groups 1 changes nothing"),
    (True, {"key_bn": "split", "bn_groups": 1}, "'split' with bn_groups 1 changes nothing"),
    (True, {"key_bn": "sync", "bn_groups": 8}, "bn_groups is 8"),
    (True, {"key_bn": "eval", "bn_groups": 0}, "bn_groups: 0"),
    (False, {"key_bn": "shuffle"}, "no BatchNorm. Give 'none'"),
    (False, {"momentum": 1.1}, "momentum: 1.1"),
    (False, {"temperature": 0.0}, "temperature: 0.0")])
def test_settings_that_mean_nothing_are_refused(batchnorm, settings, message, small_encoder):
    with pytest.raises(ValueError, match=message):
        make(small_encoder(batchnorm), Queue(K, 5), **settings)
