"""Retrieval against a plain loop and scikit-learn."""

import math

import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from common import counter
from common.evaluate import Features, Retrieval
from common.evaluate import retrieval as module


def noise(n, width, seed=0):
    return counter.uniform(seed, torch.arange(n * width)).view(n, width) - 0.5


def random_features(n=40, m=25, width=6, classes=4):
    label = counter.integers(classes, 1, torch.arange(n + m))
    return Features(noise(n, width), label[:n], noise(m, width, seed=2), label[n:], "backbone")


def measured(features, *arguments, **settings):
    """The values by name: recall@1, ..., mAP, mAP@R; and the results themselves."""
    results = Retrieval(*arguments, **settings)(features)
    return {f"{result.metric}@{result.protocol['k']}" if "k" in result.protocol else result.metric: result.value
            for result in results}, results


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)


def by_loop(queries, labels, gallery, gallery_labels, leave_one_out, ks=(1, 5, 10), similarity=cosine):
    """Image by image, rank by rank."""
    rows = []
    for i, (query, label) in enumerate(zip(queries, labels, strict=True)):
        others = [(similarity(query, image), of == label)
                  for j, (image, of) in enumerate(zip(gallery, gallery_labels, strict=True))
                  if not (leave_one_out and j == i)]
        hits = [hit for _, hit in sorted(others, reverse=True)]
        relevant = sum(hits)
        if relevant == 0:
            continue
        precision = [sum(hits[:rank]) / rank for rank in range(1, len(hits) + 1)]
        rows.append([*(100 * any(hits[:k]) for k in ks),
                     100 * sum(p for p, hit in zip(precision, hits, strict=True) if hit) / relevant,
                     100 * sum(p for p, hit in zip(precision[:relevant], hits, strict=False) if hit) / relevant])
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


@pytest.mark.parametrize("images", ["test", "train", "test-in-train"])
def test_the_measures_are_those_of_a_plain_loop(images):
    features = random_features()
    train, test = (features.train_nD, features.train_label_n), (features.test_mD, features.test_label_m)
    query, gallery = {"test": (test, test), "train": (train, train), "test-in-train": (test, train)}[images]
    found, results = measured(features, images=images)
    assert list(found) == ["recall@1", "recall@5", "recall@10", "mAP", "mAP@R"]
    expected = by_loop(*(x.tolist() for x in (*query, *gallery)), images != "test-in-train")
    assert list(found.values()) == pytest.approx(expected, abs=1e-4)
    assert results[0].protocol["queries"] == len(query[0])
    assert results[0].protocol["gallery"] == len(gallery[0]) - (images != "test-in-train")


def test_without_unit_length_it_is_the_inner_product():
    features = random_features()
    test = features.test_mD.tolist(), features.test_label_m.tolist()
    found, (first, *_) = measured(features, normalize=False)
    dot = by_loop(*test, *test, True, similarity=lambda a, b: sum(x * y for x, y in zip(a, b, strict=True)))
    assert list(found.values()) == pytest.approx(dot, abs=1e-4)
    assert first.label() == "recall(layer=backbone, k=1, images=test, norm=none, split=leave-one-out)"


def test_average_precision_of_digits_is_scikit_learns(digits):
    results = Retrieval([1])(digits)
    x_mD = torch.nn.functional.normalize(digits.test_mD, dim=1)
    similarity, label = x_mD @ x_mD.T, digits.test_label_m
    expected = []
    for i in range(len(x_mD)):
        others = torch.arange(len(x_mD)) != i
        expected.append(average_precision_score((label == label[i])[others], similarity[i, others]))
    assert results[1].metric == "mAP"
    assert list(results[1].score_m) == pytest.approx(expected, abs=1e-3)      # two that are equal but for rounding
    assert results[1].value == pytest.approx(100 * sum(expected) / len(expected), abs=1e-3)


def test_recall_at_1_among_the_training_images_is_knn_of_one(digits):
    from common.evaluate import KNN

    assert measured(digits, [1], images="test-in-train")[0]["recall@1"] == KNN(1)(digits)[0].value


@pytest.mark.parametrize("held", [1, 100, 24 * 25, 10**6])          # a query at a time, some, all but one, all
def test_blocks_of_queries_are_as_good_as_one(held, monkeypatch):
    features = random_features()
    expected = measured(features)[1]
    monkeypatch.setattr(module, "SIMILARITIES", {"cpu": held})
    for result, other in zip(measured(features)[1], expected, strict=True):
        assert result.score_m == pytest.approx(other.score_m, abs=1e-6)


class Largest(TorchDispatchMode):
    """Of all tensors that are made meanwhile, how many elements the largest holds."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tensors = [x for x in pytree.tree_leaves(made) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *(x.numel() for x in tensors)])
        return made


def test_no_more_than_a_block_of_similarities_is_held(monkeypatch):
    monkeypatch.setattr(module, "SIMILARITIES", {"cpu": 30_000})
    monkeypatch.setattr("common.evaluate.statistics.HELD", 30_000)
    features = random_features(m=500)                               # 250,000 similarities in all
    with Largest() as largest:
        Retrieval()(features)
    assert largest.elements <= 30_000


def test_queries_that_have_nothing_to_find_are_left_out_and_counted():
    features = random_features(m=20)
    features.test_label_m[:3] = torch.tensor([7, 8, 9])             # each alone in its class
    found, results = measured(features)
    test = features.test_mD.tolist(), features.test_label_m.tolist()
    assert list(found.values()) == pytest.approx(by_loop(*test, *test, True), abs=1e-4)
    assert results[0].protocol["queries"] == 17 and results[0].protocol["left_out"] == 3
    assert len(results[0].score_m) == 17
    alone = features._replace(test_label_m=torch.arange(20))
    with pytest.raises(ValueError, match="none of 20 queries"):
        Retrieval()(alone)


def test_a_collapsed_encoder_is_as_good_as_chance_whatever_the_order_of_the_files():
    label = torch.arange(10).repeat_interleave(40)
    features = Features(torch.ones(4, 3), torch.arange(4), torch.ones(400, 3), label, "backbone")
    found, _ = measured(features)
    assert found["recall@1"] < 25 and 8 < found["mAP"] < 15         # chance: 9.8 = 39 / 399


def test_a_perfect_encoder_finds_all():
    label = torch.arange(4).repeat(5)
    features = Features(torch.eye(4)[label], label, None, None, "backbone")
    found, results = measured(features, [1, 3])
    assert list(found.values()) == [100] * 4 and results[0].interval == (100, 100)


def test_without_test_images_the_training_images_are_searched():
    features = random_features()
    alone = features._replace(test_mD=None, test_label_m=None)
    found, results = measured(alone)
    assert found == measured(features, images="train")[0]
    assert results[0].protocol["images"] == "train" and results[0].protocol["split"] == "leave-one-out"
    with pytest.raises(ValueError, match="no test image has a label"):
        Retrieval(images="test-in-train")(alone)


def test_of_many_queries_some_are_taken_and_the_gallery_is_whole(monkeypatch):
    features = random_features(m=100)
    everyone = Retrieval()(features)
    monkeypatch.setattr(module, "QUERIES", 30)
    some = Retrieval()(features)
    assert some[0].protocol["queries"] == 25 and some[0].protocol["gallery"] == 99
    for result, whole in zip(some, everyone, strict=True):
        assert result.score_m == pytest.approx(whole.score_m[::4])


def test_k_above_the_gallery_means_all_of_it():
    assert [result.protocol["k"] for result in Retrieval([5, 24, 100, 200])(random_features())[:-2]] == [5, 24]


def test_the_interval_holds_the_value_and_is_of_the_bootstrap():
    for result in Retrieval()(random_features()):
        assert result.interval[0] <= result.value <= result.interval[1] and result.interval_by == "bootstrap"


def test_the_nearest_are_those_of_the_ranking():
    features = random_features()
    query = Retrieval().query(features)
    similarity, row = module.nearest(query, torch.tensor([3, 8]), 5)
    x = torch.nn.functional.normalize(features.test_mD, dim=1)
    for i, found, values in zip((3, 8), row, similarity, strict=True):
        others = (x @ x[i]).masked_fill(torch.arange(25) == i, -torch.inf)
        assert found.tolist() == others.topk(5).indices.tolist()
        torch.testing.assert_close(values, others.topk(5).values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_ranks_like_the_cpu(digits):
    on_gpu, on_cpu = Retrieval()(digits, torch.device("cuda")), Retrieval()(digits)
    assert [result.value for result in on_gpu] == pytest.approx([result.value for result in on_cpu], abs=0.1)


@pytest.mark.parametrize("k", [0, [], [5, -1]])
def test_senseless_numbers_of_neighbours_are_refused(k):
    with pytest.raises(ValueError, match="k:"):
        Retrieval(k)
