"""kNN against a plain loop of InstDisc's vote, scikit-learn, and one backend against the other."""

import logging
import math
import sys

import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from common import counter
from common.evaluate import KNN, Features, search
from common.evaluate import knn as knn_module


def noise(n, width, seed=0):
    return counter.uniform(seed, torch.arange(n * width)).view(n, width) - 0.5


def random_features(n=60, m=25, width=6, classes=4):
    label = counter.integers(classes, 1, torch.arange(n + m))
    return Features(noise(n, width), label[:n], noise(m, width, seed=2), label[n:], "backbone")


def vote_by_loop(features, k, tau, normalize):
    """InstDisc, Sec. 3.4, image by image."""
    predicted = []
    for query in features.test_mD.tolist():
        scored = []
        for row, label in zip(features.train_nD.tolist(), features.train_label_n.tolist(), strict=True):
            similarity = sum(a * b for a, b in zip(query, row, strict=True))
            scored.append((similarity / (math.hypot(*query) * math.hypot(*row)) if normalize else similarity, label))
        votes = {}
        for similarity, label in sorted(scored, reverse=True)[:k]:
            votes[label] = votes.get(label, 0) + math.exp(similarity / tau)
        predicted.append(max(votes, key=votes.get))
    return predicted


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("tau", [0.07, 1.0])
def test_the_vote_is_instdiscs(tau, normalize):
    features = random_features()
    predicted = KNN([1, 7, 30], tau, normalize).predict(features)
    for k in (1, 7, 30):
        assert predicted[k].tolist() == vote_by_loop(features, k, tau, normalize)


def test_a_grid_of_k_and_temperature_takes_one_search(monkeypatch):
    features, searches = random_features(), []
    searched = knn_module.search
    monkeypatch.setattr(knn_module, "search", lambda *arguments: searches.append(1) or searched(*arguments))
    grid = KNN([1, 7, 30], [0.1, 0.07, 1.0]).grid(features)
    assert len(searches) == 1
    assert list(grid) == [(k, tau) for tau in (0.07, 0.1, 1.0) for k in (1, 7, 30)]
    for (k, tau), predicted in grid.items():
        assert predicted.tolist() == vote_by_loop(features, k, tau, True)
    results = KNN([1, 7, 30], [0.1, 0.07, 1.0])(features)
    assert [(result.protocol["k"], result.protocol["tau"]) for result in results] == list(grid)


@pytest.mark.parametrize("k", [1, 20, 200])
def test_digits_are_classified_as_by_scikit_learn(digits, k):
    def weights(distance):
        return torch.from_numpy(1 - distance).div(0.07).exp().numpy()

    oracle = KNeighborsClassifier(k, metric="cosine", algorithm="brute", weights=weights)
    oracle.fit(digits.train_nD.numpy(), digits.train_label_n.numpy())
    assert KNN(k).predict(digits)[k].tolist() == oracle.predict(digits.test_mD.numpy()).tolist()


@pytest.mark.parametrize("normalize", [True, False])
def test_both_backends_classify_alike(digits, normalize):
    by_faiss = KNN([20, 200], normalize=normalize, backend="faiss").predict(digits)
    by_torch = KNN([20, 200], normalize=normalize, backend="torch").predict(digits)
    assert all(torch.equal(by_faiss[k], by_torch[k]) for k in (20, 200))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_a_gpu_classifies_like_the_cpu(digits, backend):
    on_gpu = KNN(20, backend=backend).predict(digits, torch.device("cuda"))[20]
    assert (on_gpu == KNN(20).predict(digits)[20]).double().mean() > 0.997


def test_blocks_of_queries_find_what_one_search_finds():
    train, query = noise(1300, 8), noise(13_000, 8, seed=1)         # 16.9 M similarities: more than one block
    similarity, index = search(train, query, 5, "torch")
    expected = (query @ train.T).topk(5, dim=1)
    torch.testing.assert_close(similarity, expected.values)
    assert torch.equal(index, expected.indices)


@pytest.mark.parametrize("k", [1, 40, 150])                         # 150: more than a block holds unless it grows
@pytest.mark.parametrize("n", [100, 101, 199, 200, 1042])           # one block, one and a row, and the last one short
def test_blocks_of_training_images_find_what_one_search_finds(n, k, monkeypatch):
    monkeypatch.setattr(knn_module, "ROWS", {"cpu": 100})
    monkeypatch.setattr(knn_module, "SIMILARITIES", {"cpu": 700})
    train, query = noise(n, 8), noise(30, 8, seed=1)
    similarity, index = search(train, query, k, "torch")
    expected = (query @ train.T).topk(min(k, n), dim=1)
    torch.testing.assert_close(similarity, expected.values)
    assert torch.equal(index, expected.indices)


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


def test_a_search_holds_the_similarities_of_one_block():
    n, m, k = 200_000, 500, 5                                       # 100 M similarities in all
    train, query = torch.zeros(n, 2), torch.zeros(m, 2)
    with Largest() as largest:
        search(train, query, k, "torch")
    assert largest.elements == knn_module.SIMILARITIES["cpu"]


def test_a_search_holds_one_block_of_training_images(monkeypatch):
    monkeypatch.setattr(knn_module, "ROWS", {"cpu": 100})
    monkeypatch.setattr(knn_module, "SIMILARITIES", {"cpu": 700})
    train, query = noise(5000, 8), noise(30, 8, seed=1)
    with Largest() as largest:
        search(train, query, 10, "torch")
    assert largest.elements == 100 * 8                              # the rows of a block are a view on the CPU


def test_a_vote_among_many_classes_makes_no_one_hot():
    m, k, classes = 6000, 200, 1000                                 # a one-hot [m, k, classes] holds 1.2 billion
    similarity, label = noise(m, k), counter.integers(classes, 1, torch.arange(m * k)).view(m, k)
    with Largest() as largest:
        predicted = knn_module.vote(similarity, label, classes, 0.07)
    assert largest.elements <= knn_module.VOTES
    for i in (0, 4194, 4195, m - 1):                                # about the first block's end
        weights = (similarity[i] / 0.07).exp()
        assert predicted[i] == torch.zeros(classes).index_add(0, label[i], weights).argmax()


def test_a_search_on_a_gpu_is_torchs_unless_faiss_is_asked_for(monkeypatch):
    asked = []
    monkeypatch.setattr(knn_module, "_search_torch", lambda *arguments: asked.append(arguments[-1].type))
    search(noise(5, 2), noise(3, 2), 2, "auto", torch.device("cuda"))
    assert asked == ["cuda"]


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_k_above_the_number_of_training_images_means_all_of_them(backend):
    features = random_features(n=12)
    results = KNN([5, 12, 20, 200], backend=backend)(features)
    assert [result.protocol["k"] for result in results] == [5, 12]
    assert results[1].value == KNN(12)(features)[0].value


@pytest.mark.parametrize(("train_label", "test_label"), [(7, 2), (2, 7)])
def test_a_class_may_be_missing_from_either_split(train_label, test_label):
    features = random_features()._replace(train_label_n=torch.full((60,), train_label),
                                          test_label_m=torch.full((25,), test_label))
    assert KNN(5).predict(features)[5].tolist() == [train_label] * 25
    assert KNN(5)(features)[0].value == 0


@pytest.mark.parametrize("backend", ["faiss", "torch"])
def test_without_a_test_set_each_image_is_classified_by_the_others(backend):
    features = random_features(n=20)
    features.train_nD[8:14] = features.train_nD[8]                  # more equal images than neighbours
    alone = features._replace(test_mD=None, test_label_m=None)
    predicted = KNN([1, 3, 19, 500], backend=backend).predict(alone)
    for k in (1, 19):
        for i in [*range(8), *range(14, 20)]:
            rest = [j for j in range(20) if j != i]
            one = Features(features.train_nD[rest], features.train_label_n[rest], features.train_nD[[i]],
                           features.train_label_n[[i]], "backbone")
            if k == 19 or i not in range(8, 14):
                assert predicted[k][i] == KNN(k).predict(one)[k][0]
    assert sorted(predicted) == [1, 3, 19]
    assert "split=leave-one-out" in KNN(3)(alone)[0].label()


def test_an_image_never_votes_for_itself():
    label = torch.arange(20)
    features = Features(noise(20, 4), label, None, None, "backbone")
    assert KNN([1, 3])(features)[0].value == 0
    equal = features._replace(train_nD=torch.ones(20, 4))
    assert KNN(3)(equal)[0].value == 0


def test_features_of_any_length_give_finite_votes():
    features = random_features()
    long = features._replace(train_nD=1e3 * features.train_nD, test_mD=1e3 * features.test_mD)
    assert torch.equal(KNN(9, 0.07e6, False).predict(long)[9], KNN(9, 0.07, False).predict(features)[9])
    nearest = KNN(1, 0.07, False).predict(long)[1]
    assert torch.equal(KNN(9, 1e-6, False).predict(long)[9], nearest)


def test_a_faiss_that_fails_is_replaced_with_one_line(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "faiss", None)                 # import faiss now raises ImportError
    knn_module._say_once.cache_clear()
    features = random_features()
    with caplog.at_level(logging.WARNING):
        predicted = [KNN(5).predict(features)[5] for _ in range(3)]
    assert len(caplog.records) == 1 and "searching with torch" in caplog.text
    assert all(torch.equal(one, KNN(5, backend="torch").predict(features)[5]) for one in predicted)
    with pytest.raises(ImportError):
        KNN(5, backend="faiss").predict(features)


def test_the_protocol_travels_with_the_value(digits):
    small, large = KNN(temperature=0.1)(digits)
    assert small.label() == "knn(layer=pixels, k=20, tau=0.1, norm=l2)"
    assert large.label() == "knn(layer=pixels, k=200, tau=0.1, norm=l2)"
    assert (small.protocol["train"], small.protocol["test"]) == (1297, 500)


def test_raw_digits_reach_their_known_accuracy(digits):
    small, large = KNN()(digits)
    assert 97 <= small.value <= 99.5 and 95.5 <= large.value <= 98.5         # a first trial: 98.2 and 97.2


def test_of_many_images_some_are_searched_for_among_all(digits, monkeypatch):
    """With at most 100 searched for, the class of every n-th image is what it is when all are."""
    alone = digits._replace(test_mD=None, test_label_m=None)
    everyone = KNN(5).predict(alone)[5]
    monkeypatch.setattr("common.evaluate.knn.LEFT_OUT", 100)
    stride = -(-len(alone.train_nD) // 100)
    assert torch.equal(KNN(5).predict(alone)[5], everyone[::stride])
    result = KNN(5)(alone)[0]
    right = (everyone == alone.train_label_n)[::stride]
    assert result.value == pytest.approx(100 * right.double().mean().item())
    assert result.protocol["test"] == len(right) <= 100


def test_search_leaves_the_features_alone(digits):
    before = digits.train_nD.clone(), digits.test_mD.clone()
    KNN()(digits)
    assert torch.equal(digits.train_nD, before[0]) and torch.equal(digits.test_mD, before[1])


@pytest.mark.parametrize(("setting", "message"), [({"k": 0}, "k: 0"), ({"k": []}, "k:"), ({"k": [20, -1]}, "k:"),
                                                  ({"temperature": 0}, "temperature: 0"),
                                                  ({"temperature": []}, "temperature: .."),
                                                  ({"temperature": [0.1, -1.0]}, "temperature:")])
def test_senseless_settings_are_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        KNN(**setting)
