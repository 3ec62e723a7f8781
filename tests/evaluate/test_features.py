"""Features against a plain loop over the images, one process against two, and the encoder left as it was."""

import copy
import random

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode

from common.data import Images, Splits
from common.data.recipes import digits as digit_views
from common.encoder import Encoder
from common.evaluate import Features, evaluating, extract, pixels, untrained
from common.evaluate import features as features_module

VIEWS = digit_views()


def small_encoder():
    """With BatchNorm, dropout, and one part frozen in evaluation mode, as a fine-tuner would have it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = nn.Sequential(nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(0.5),
                                 nn.AdaptiveAvgPool2d(2), nn.Flatten())
        encoder = Encoder(backbone, nn.Sequential(nn.Linear(24, 5), nn.BatchNorm1d(5)))
    encoder.head[1].eval()
    return encoder


def first(splits, n, m):
    return Splits(*(Images(images.name, images.keys[:count], images.labels[:count].clone(), images.classes,
                           images.array[:count]) for images, count in zip(splits, (n, m))))


def equal(one, other):
    return one.layer == other.layer and all(torch.equal(x, y) for x, y in zip(one[:4], other[:4]))


@pytest.mark.parametrize("layer", ["backbone", "head"])
def test_features_are_the_encoders_in_evaluation_mode(splits, layer):
    small, encoder = first(splits, 50, 21), small_encoder()
    features = extract(encoder, small, VIEWS, layer=layer, batch_size=16)
    oracle = copy.deepcopy(encoder).eval()
    embed = oracle.backbone if layer == "backbone" else oracle
    for x, label, images in ((features.train_nD, features.train_label_n, small.train),
                             (features.test_mD, features.test_label_m, small.test)):
        expected = torch.cat([embed(VIEWS.normalize(images.read(i)[None])) for i in range(len(images))])
        torch.testing.assert_close(x, expected.detach(), atol=1e-6, rtol=1e-5)
        assert torch.equal(label, images.labels) and not x.requires_grad
    assert features.layer == layer
    if layer == "head":
        torch.testing.assert_close(features.test_mD.norm(dim=1), torch.ones(21))


def test_the_encoder_and_all_random_states_are_left_as_found(splits):
    encoder = small_encoder()
    modes = [module.training for module in encoder.modules()]
    state = copy.deepcopy(encoder.state_dict())
    found = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()     # noqa: NPY002
    extract(encoder, first(splits, 30, 10), VIEWS, batch_size=16)
    assert [module.training for module in encoder.modules()] == modes and any(modes) and not all(modes)
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), found[0]) and random.getstate() == found[1]
    assert (np.random.get_state()[1] == found[2]).all()     # noqa: NPY002


def test_modes_come_back_after_an_error():
    encoder = small_encoder()
    modes = [module.training for module in encoder.modules()]
    with pytest.raises(RuntimeError), evaluating(encoder):
        assert not any(module.training for module in encoder.modules())
        raise RuntimeError
    assert [module.training for module in encoder.modules()] == modes


def test_features_are_float32_under_autocast(splits):
    small, encoder = first(splits, 20, 10), small_encoder()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = extract(encoder, small, VIEWS)
    assert equal(under, extract(encoder, small, VIEWS))


def test_images_without_a_label_are_left_out(splits):
    small = first(splits, 40, 12)
    small.train.labels[::3] = -1
    features, known = extract(small_encoder(), small, VIEWS, batch_size=7), small.train.labels >= 0
    everything = extract(small_encoder(), first(splits, 40, 12), VIEWS, batch_size=7)
    assert torch.equal(features.train_label_n, small.train.labels[known])
    torch.testing.assert_close(features.train_nD, everything.train_nD[known], atol=1e-6, rtol=1e-5)


def test_a_batch_of_unlabelled_images_is_no_trouble(splits):
    small = first(splits, 40, 12)
    small.train.labels[:20] = -1
    assert len(extract(small_encoder(), small, VIEWS, batch_size=10).train_nD) == 20


class Copies(TorchFunctionMode):
    """How many tensors are brought to the CPU meanwhile."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.Tensor.cpu
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("held, copies", [(features_module.HELD, 1), (3 * 10 * 24 * 4, 2), (1, 6)])
def test_features_stay_on_the_device_until_they_are_many(splits, monkeypatch, held, copies):
    small = first(splits, 60, 2)                                    # six batches of ten; three, or each one, are many
    expected = extract(small_encoder(), small, VIEWS, batch_size=10)
    monkeypatch.setattr(features_module, "HELD", held)
    with Copies() as counted:
        found = extract(small_encoder(), small, VIEWS, batch_size=10)
    assert counted.count == copies + 1                              # and the test images
    assert equal(found, expected)


def test_embedding_asks_the_device_for_nothing_before_its_end(splits):
    """Tensors of a GPU that is not there: each question to it, such as where a mask holds, would raise."""
    images = first(splits, 40, 12).train
    with FakeTensorMode():
        batches = [torch.empty(10, 1, 8, 8, device="cuda") for _ in range(4)]
    batches = [(torch.arange(10 * i, 10 * i + 10), x_BcSS) for i, x_BcSS in enumerate(batches)]
    x_nD, index_n = features_module.collect(lambda x_BcSS: x_BcSS.flatten(1), images, batches, torch.device("cuda"))
    assert x_nD.shape == (40, 64) and x_nD.device.type == "cpu" and torch.equal(index_n, torch.arange(40))


def test_images_that_cannot_be_read_are_left_out(splits):
    small = first(splits, 20, 10)
    small.train.bad[3] = "planted"
    features = extract(small_encoder(), small, VIEWS)
    assert torch.equal(features.train_label_n, small.train.labels[torch.arange(20) != 3])
    assert len(features.train_nD) == 19


def test_an_unlabelled_test_set_counts_as_none(splits):
    small = first(splits, 20, 10)
    small.test.labels.fill_(-1)
    for data in (small, Splits(small.train, None)):
        features = extract(small_encoder(), data, VIEWS)
        assert features.test_mD is None and features.test_label_m is None


def test_no_labels_at_all_are_refused_by_name(splits):
    small = first(splits, 20, 10)
    small.train.labels.fill_(-1)
    with pytest.raises(ValueError, match=r"0 of the 20 training images of .*digits.* have a label"):
        extract(small_encoder(), small, VIEWS)


def test_features_that_are_not_finite_are_refused(splits):
    encoder = small_encoder()
    encoder.backbone[1].running_var[0] = float("nan")
    with pytest.raises(ValueError, match="backbone features of 20 of 20 training images are not finite"):
        extract(encoder, first(splits, 20, 10), VIEWS)


def test_pixels_are_the_normalised_image(splits):
    features = pixels(first(splits, 20, 10), VIEWS)
    expected = (splits.train.array[:20].flatten(1) / 255 - VIEWS.mean[0]) / VIEWS.std[0]
    torch.testing.assert_close(features.train_nD, expected)
    assert features.layer == "pixels" and features.test_mD.shape == (10, 64)


def test_pixels_of_large_images_are_averaged_down(splits):
    features = pixels(first(splits, 4, 2), digit_views(size=64))
    assert features.train_nD.shape == (4, 32 * 32)


def test_the_largest_label_of_either_split_counts():
    x = torch.zeros(2, 1)
    for train, test in ((torch.tensor([0, 7]), torch.tensor([1, 2])), (torch.tensor([0, 1]), torch.tensor([1, 7]))):
        assert Features(x, train, x, test, "backbone").num_classes == 8


def test_an_untrained_copy_has_the_mean_statistics_of_its_batches(splits):
    encoder = small_encoder()
    state = copy.deepcopy(encoder.state_dict())
    batches = [VIEWS.evaluation_batch(splits.train.array[64 * i:64 * (i + 1)]) for i in range(5)]
    copied = untrained(encoder, iter(batches), num_batches=4)
    out = [encoder.backbone[0](batch) for batch in batches[:4]]
    norm = copied.backbone[1]
    torch.testing.assert_close(norm.running_mean, torch.stack([x.mean((0, 2, 3)) for x in out]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.stack([x.var((0, 2, 3)) for x in out]).mean(0))
    assert not any(module.training for module in copied.modules())
    assert all(torch.equal(value, state[name]) for name, value in encoder.state_dict().items())


def _extract_as_one_of_two(rank, folder, small, encoder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    try:
        features = extract(encoder, small, VIEWS, batch_size=16)
        shifted = untrained(encoder, [VIEWS.evaluation_batch(small.train.array[rank::2])])
        torch.save((features and tuple(features), shifted.state_dict()), f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


def test_two_processes_give_what_one_gives(splits, tmp_path):
    small, encoder = first(splits, 51, 1), small_encoder()          # uneven, and one process without a test image
    mp.spawn(_extract_as_one_of_two, (str(tmp_path), small, encoder), nprocs=2)
    (main, main_state), (other, other_state) = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = extract(encoder, small, VIEWS, batch_size=16)
    assert other is None
    for mine, theirs in zip(alone[:4], main[:4]):
        torch.testing.assert_close(mine, theirs, atol=1e-6, rtol=1e-5)
    assert all(torch.equal(main_state[name], other_state[name]) for name in main_state)
