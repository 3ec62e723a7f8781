"""What an evaluator embeds for others, and what it measures among the rows of a bank."""

import pytest
import torch

from common.data import Images, Splits
from common.data.recipes import digits
from common.encoder import Encoder
from common.evaluate import KNN, FewLabels, beside_bank, extract
from common.evaluate.evaluator import Evaluator, embed

VIEWS = digits()
CPU = torch.device("cpu")


def test_each_image_has_its_features_in_its_own_row_though_others_cannot_be_read(splits):
    train = splits.train
    images = Images(train.name, train.keys[:21], train.labels[:21], train.classes, train.array[:21])
    images.bad = {3: "planted", 10: "planted"}
    encoder = Encoder(torch.nn.Flatten(), torch.nn.Linear(64, 5))
    v_nC = embed(encoder, images, VIEWS, batch_size=8, workers=0, device=torch.device("cpu"))   # the last has 5
    assert not v_nC.requires_grad
    torch.testing.assert_close(v_nC.norm(dim=1), torch.ones(21))
    for i in set(range(21)) - images.bad.keys():
        torch.testing.assert_close(v_nC[i], encoder(VIEWS.evaluation_batch(images.array[[i]]))[0].detach())
    assert not torch.equal(v_nC[3], v_nC[10])


def some(splits, n, m):
    return Splits(*(Images(images.name, images.keys[:count], images.labels[:count].clone(), images.classes,
                           images.array[:count]) for images, count in zip(splits, (n, m))))


def encoder():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Encoder(torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU(),
                                           torch.nn.Flatten()), torch.nn.Linear(288, 16))


@pytest.mark.parametrize("with_test", [True, False])
def test_among_a_bank_just_filled_by_the_encoder_knn_is_what_it_is_when_all_are_embedded(splits, with_test):
    small, net = some(splits, 300, 120), encoder()
    small = small if with_test else Splits(small.train, None)
    evaluator = Evaluator(small, VIEWS, [KNN([5, 20]), FewLabels(draws=1)], layer="head", device=CPU)
    bank_nC = embed(net, small.train, VIEWS, batch_size=256, workers=0, device=CPU)
    by_bank, plain = evaluator.measure_by(bank_nC, net), evaluator.measure(net)[:2]
    assert [result.value for result in by_bank] == [result.value for result in plain]       # by kNN alone
    split = "" if with_test else ", split=leave-one-out"
    assert by_bank[0].label() == f"knn(layer=head, k=5, tau=0.07, norm=l2{split}, neighbours=bank)"
    assert plain[0].label() == f"knn(layer=head, k=5, tau=0.07, norm=l2{split})"
    assert by_bank[0].protocol["train"] == 300


def test_among_a_bank_only_the_test_images_are_embedded(splits):
    small, net, seen = some(splits, 300, 120), encoder(), []
    net.register_forward_hook(lambda module, images, features: seen.append(len(features)))
    bank_nC = torch.randn(300, 16)
    features = beside_bank(net, bank_nC, small, VIEWS, batch_size=50)
    assert sum(seen) == 120 and net.training
    assert torch.equal(features.train_nD, bank_nC) and torch.equal(features.train_label_n, small.train.labels)
    torch.testing.assert_close(features.test_mD, extract(net, small, VIEWS, layer="head").test_mD)


def test_rows_of_a_bank_without_a_label_or_a_readable_image_are_left_out(splits):
    small = some(splits, 30, 12)
    small.train.labels[:7] = -1
    small.train.bad.update({3: "planted", 20: "planted"})
    kept = [i for i in range(7, 30) if i != 20]
    features = beside_bank(encoder(), torch.arange(30 * 16.0).view(30, 16), small, VIEWS)
    assert torch.equal(features.train_nD[:, 0], torch.tensor(kept) * 16.0)
    assert torch.equal(features.train_label_n, small.train.labels[kept])
