"""The recipes are the published ones, and views are functions of (seed, epoch, image, view) on either road."""

import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.functional as TF
from PIL import Image
from scipy import stats
from sklearn.datasets import load_sample_images
from torchvision import transforms

from common.data import arrays, recipes
from common.data.filters import GaussianBlur, Grayscale, Solarize
from common.data.geometry import HorizontalFlip, RandomResizedCrop, Rotate
from common.data.jitter import ColorJitter
from common.data.show import show_views
from common.data.views import View, Views

# What the authors' code says, in its order (see docs/paper_map.md for the files). ColorJitter without p is always on.
FULL, AUG_PLUS, BYOL = (ColorJitter(0.4, 0.4, 0.4, 0.4), ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8),
                        ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8))
V1 = [RandomResizedCrop((0.2, 1.0)), Grayscale(0.2), FULL, HorizontalFlip(0.5)]
V2 = [RandomResizedCrop((0.2, 1.0)), AUG_PLUS, Grayscale(0.2), GaussianBlur((0.1, 2.0), 0.5), HorizontalFlip(0.5)]
V3_1 = [RandomResizedCrop((0.2, 1.0)), BYOL, Grayscale(0.2), GaussianBlur((0.1, 2.0), 1.0), HorizontalFlip(0.5)]
V3_2 = [RandomResizedCrop((0.2, 1.0)), BYOL, Grayscale(0.2), GaussianBlur((0.1, 2.0), 0.1), Solarize(0.2),
        HorizontalFlip(0.5)]
CIFAR = [RandomResizedCrop((0.08, 1.0)), HorizontalFlip(0.5), AUG_PLUS, Grayscale(0.2)]
CIFAR_INSTDISC = [RandomResizedCrop((0.2, 1.0)), FULL, Grayscale(0.2)]
SMALL = [RandomResizedCrop((0.25, 1.0)), HorizontalFlip(0.5), ColorJitter(0.4, 0.4, 0.4, 0.1), Grayscale(0.2)]
PUBLISHED = {
    "instdisc": (224, [V1]), "moco_v1": (224, [V1, V1]), "moco_v2": (224, [V2, V2]), "moco_v3": (224, [V3_1, V3_2]),
    "moco_cifar10": (32, [CIFAR, CIFAR]), "instdisc_cifar10": (32, [CIFAR_INSTDISC]), "small_color": (32, [SMALL] * 2),
    "digits": (8, [[RandomResizedCrop((0.4, 1.0)), Rotate(15), ColorJitter(0.4, 0.4)]] * 2),
    "fashion": (28, [[RandomResizedCrop((0.3, 1.0)), HorizontalFlip(0.5), ColorJitter(0.4, 0.4)]] * 2),
}


@pytest.fixture(scope="module")
def photos():
    """Eight different 72 x 72 pieces of two photos, uint8 [8, 3, 72, 72]."""
    both = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    return torch.stack([photo[:, y : y + 72, x : x + 72] for y, x in
                        [(210, 220), (280, 330), (140, 220), (280, 220)] for photo in both])


def levels(views, x):
    """Grey levels of a normalised view."""
    return (x * torch.tensor(views.std).view(-1, 1, 1) + torch.tensor(views.mean).view(-1, 1, 1)) * 255


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipe_is_the_published_one(name):
    views = getattr(recipes, name)()
    size, expected = PUBLISHED[name]
    assert views.size == size and [[view.crop, *view.ops] for view in views.views] == expected
    assert all(str(op) in str(views) for view in expected for op in view)           # and says so when printed


def test_vit_recipe_of_moco_v3_crops_down_to_eight_percent():
    assert {view.crop.scale for view in recipes.moco_v3(crop_min=0.08).views} == {(0.08, 1.0)}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_recipe_gives_finite_views_for_any_number_of_channels(photos, name, channels):
    views = getattr(recipes, name)(size=12, channels=channels)
    images = photos.flatten(0, 1)[: 5 * channels].unflatten(0, (5, channels))
    out = views.from_memory(images, 0, 0, torch.arange(5))
    assert [x.shape for x in out] == [(5, channels, 12, 12)] * views.num_views
    assert all(x.dtype == torch.float32 and x.isfinite().all() and x.is_contiguous() for x in out)


def finished_by_torchvision(views, crop_cSS, seed, epoch, index, view):
    """What follows the crop, by torchvision's own functions, from the parameters that were drawn."""
    x, names = crop_cSS / 255, ["brightness", "contrast", "saturation", "hue"]
    for op, parameters in views.parameters(seed, epoch, torch.tensor([index]), view).items():
        if not parameters["applied"]:
            continue
        if op == "ColorJitter":
            for k in parameters["order"][0].tolist():
                x = getattr(TF, "adjust_" + names[k])(x, float(parameters[names[k]]))
        elif op == "GaussianBlur":
            padded = torch.nn.functional.pad(x[None], [16] * 4, mode="replicate")[0]
            x = TF.gaussian_blur(padded, [25, 25], [float(parameters["sigma"])] * 2)[:, 16:-16, 16:-16]
        elif op == "Solarize":
            x = TF.solarize(x, 128 / 255)
        else:
            x = {"Grayscale": lambda x: TF.rgb_to_grayscale(x, 3), "HorizontalFlip": TF.hflip}[op](x)
    return TF.normalize(x, views.mean, views.std)


def cropped_by_torchvision(views, image_cHW, seed, epoch, index, view):
    box = views.boxes(seed, epoch, torch.tensor([index]), view, *image_cHW.shape[1:])
    corner = [int(box[name]) for name in ("top", "left", "height", "width")]
    return TF.pil_to_tensor(TF.resized_crop(TF.to_pil_image(image_cHW), *corner, [views.size] * 2))


def solarized(views, epoch, index, view):
    """Where a value near 128 may fall on either side of the threshold."""
    return views.parameters(7, epoch, index, view).get("Solarize", {}).get("applied", index < 0)


RGB = ["instdisc", "moco_v1", "moco_v2", "moco_v3", "moco_cifar10", "instdisc_cifar10", "small_color"]


@pytest.mark.parametrize("name", RGB)
def test_operations_after_the_crop_are_torchvisions_in_the_recipes_order(photos, name):
    views, index = getattr(recipes, name)(size=72), torch.arange(8)
    for epoch in range(4):
        for view in range(views.num_views):
            out = views.finish(photos, 7, epoch, index, view)
            expected = [finished_by_torchvision(views, photos[i], 7, epoch, i, view) for i in range(8)]
            error = (levels(views, out) - levels(views, torch.stack(expected))).abs()
            assert error[~solarized(views, epoch, index, view)].max() <= 0.5
            assert error.mean() <= 0.3


def uniform(values_B, low, high):
    return stats.kstest(values_B.numpy(), stats.uniform(low, high - low).cdf).pvalue > 1e-4


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_operation_of_a_recipe_is_distributed_as_in_torchvision(name):
    views, index, n = getattr(recipes, name)(), torch.arange(10_000), 10_000
    for v, (_, ops) in enumerate(views.views):
        drawn = views.parameters(0, 0, index, v)
        for op in ops:
            found = drawn[type(op).__name__]
            assert "applied" not in found or stats.binomtest(int(found["applied"].sum()), n, op.p).pvalue > 1e-4
            match op:
                case ColorJitter():
                    for what in ("brightness", "contrast", "saturation"):
                        strength = getattr(op, what)
                        assert strength == 0 or uniform(found[what], 1 - strength, 1 + strength)
                    assert op.hue == 0 or uniform(found["hue"], -op.hue, op.hue)
                    orders = (found["order"] * torch.tensor([64, 16, 4, 1])).sum(1).unique(return_counts=True)[1]
                    assert len(orders) == 24 and stats.chisquare(orders.numpy()).pvalue > 1e-4
                case GaussianBlur():
                    assert uniform(found["sigma"], *op.sigma)
                case Rotate():
                    assert uniform(found["degrees"], -op.degrees, op.degrees)
                case _:
                    assert list(found) == ["applied"]


@pytest.mark.parametrize("scale", sorted({view[0].scale for _, views in PUBLISHED.values() for view in views}))
def test_the_crops_of_every_recipe_are_distributed_as_torchvisions(scale):
    torch.manual_seed(0)
    name, v = next((name, v) for name, (_, views) in PUBLISHED.items() for v, view in enumerate(views)
                   if view[0].scale == scale)
    draw = transforms.RandomResizedCrop.get_params
    theirs_4n = torch.tensor([draw(torch.empty(1, 333, 500), list(scale), [3 / 4, 4 / 3]) for _ in range(2000)]).T
    box = getattr(recipes, name)().boxes(0, 0, torch.arange(2000), v, 333, 500)
    for what, expected_n in zip(("top", "left", "height", "width"), theirs_4n):
        assert stats.ks_2samp(box[what].numpy(), expected_n.numpy()).pvalue > 1e-4, what


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("road", ["memory", "worker"])
def test_views_do_not_depend_on_how_many_images_are_worked_on_at_a_time(photos, name, road, monkeypatch):
    views, index = getattr(recipes, name)(size=24), torch.arange(8)
    images = photos[:, :len(views.mean)]
    whole = made(views, images, road, 3, 1, index)
    for images_at_a_time in (1, 3):
        monkeypatch.setattr("common.data.views.PART", images_at_a_time * whole[0][0].numel())
        for x, y in zip(whole, made(views, images, road, 3, 1, index)):
            assert (levels(views, x) - levels(views, y)).abs().max() < 1e-3


@pytest.mark.parametrize("name", RGB)
@pytest.mark.parametrize("road", ["memory", "worker"])
def test_whole_views_are_torchvisions(photos, name, road):
    """Within two levels but for three values in a thousand: strong jitter enlarges the one level of the crop."""
    views, index, errors = getattr(recipes, name)(size=40), torch.arange(8), []
    for epoch in range(3):
        for view, x in enumerate(made(views, photos, road, 7, epoch, index)):
            expected = torch.stack([
                finished_by_torchvision(views, cropped_by_torchvision(views, photos[i], 7, epoch, i, view),
                                        7, epoch, i, view) for i in range(8)
            ])
            error = (levels(views, x) - levels(views, expected)).abs()
            errors.append(error[~solarized(views, epoch, index, view)].flatten())
    errors = torch.cat(errors)
    assert errors.mean() < 0.5 and (errors > 2).float().mean() < 3e-3


def made(views, photos, road, seed, epoch, index):
    if road == "memory":
        return views.from_memory(photos[index], seed, epoch, index)
    return [
        views.finish(torch.stack([views.crop(photos[i], seed, epoch, i, view) for i in index.tolist()]),
                     seed, epoch, index, view)
        for view in range(views.num_views)
    ]


def test_moco_v2_is_distributed_like_its_torchvision_transforms(photos):
    ours, theirs, n = recipes.moco_v2(size=24), recipes.torchvision_moco_v2(size=24), 600
    torch.manual_seed(0)
    random.seed(0)
    picture = TF.to_pil_image(photos[0])
    theirs_n = torch.stack([theirs(picture) for _ in range(n)])
    ours_n = ours.from_memory(photos[:1].expand(n, -1, -1, -1), 0, 0, torch.arange(n))[0]
    for what in (lambda x: x.mean((1, 2, 3)), lambda x: x.std((1, 2, 3)), lambda x: (x[:, 0] - x[:, 2]).mean((1, 2)),
                 lambda x: x.diff(dim=3).abs().mean((1, 2, 3)), lambda x: x[..., :12].mean((1, 2, 3))):
        assert stats.ks_2samp(what(ours_n).numpy(), what(theirs_n).numpy()).pvalue > 1e-3


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_a_workers_crop_is_the_plain_resize_of_the_box(channels, channels_last):
    views = recipes.moco_v2(size=24, channels=channels)
    for index in range(20):
        shape = channels, 40 + 3 * index, 90 - 2 * index
        image_cHW = torch.randint(256, shape, generator=torch.Generator().manual_seed(index), dtype=torch.uint8)
        out_2cSS = torch.zeros(2, 24, 24, channels, dtype=torch.uint8).permute(0, 3, 1, 2)
        for view in range(2):
            box = views.boxes(1, 2, torch.tensor([index]), view, *image_cHW.shape[1:])
            top, left, height, width = (int(box[name]) for name in ("top", "left", "height", "width"))
            plain = image_cHW[:, top : top + height, left : left + width].contiguous()
            out_2cSS[view] = F.interpolate(plain[None], (24, 24), mode="bilinear", antialias=True)[0]
        if channels_last:
            image_cHW = image_cHW.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        found_2cSS = torch.zeros_like(out_2cSS)
        views.crops(image_cHW, views.shares(1, 2, torch.tensor([9, index]))[1], found_2cSS)
        assert found_2cSS.equal(out_2cSS)
        assert all(views.crop(image_cHW, 1, 2, index, view).equal(out_2cSS[view]) for view in range(2))


@pytest.mark.parametrize("road", ["memory", "worker"])
def test_view_depends_on_seed_epoch_image_and_view_only(photos, road):
    views, index = recipes.moco_v2(size=24), torch.tensor([5, 2, 7, 0, 1])
    together = made(views, photos, road, 3, 1, index)
    alone = [torch.cat(parts) for parts in zip(*(made(views, photos, road, 3, 1, i) for i in index.split(2)))]
    for x, y in zip(together, alone):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-4)
    assert not together[0].allclose(together[1])                                    # another view
    for seed, epoch in ((4, 1), (3, 2)):
        assert not made(views, photos, road, seed, epoch, index)[0].allclose(together[0])


def test_parameters_of_views_epochs_seeds_and_operations_are_independent():
    views, index = recipes.moco_v2(), torch.arange(10_000)
    table = []
    for seed, epoch, view in ((0, 0, 0), (0, 0, 1), (0, 1, 0), (1, 0, 0)):
        box, drawn = (views.boxes(seed, epoch, index, view, 300, 400), views.parameters(seed, epoch, index, view))
        table += [box["top"], box["height"], drawn["ColorJitter"]["brightness"], drawn["GaussianBlur"]["sigma"]]
        table += [drawn[name]["applied"] for name in ("ColorJitter", "Grayscale", "GaussianBlur", "HorizontalFlip")]
    correlation = torch.corrcoef(torch.stack([row.float() for row in table])) - torch.eye(len(table))
    for first in range(0, len(table), 8):
        correlation[first : first + 2, first : first + 2] = 0               # a large box starts near the top
    assert correlation.abs().max() < 5 / len(index) ** 0.5


def test_global_random_state_is_neither_used_nor_changed(photos):
    views = recipes.moco_v3(size=24)
    results = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        np.random.seed(seed)                                                        # noqa: NPY002
        random.seed(seed)
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()      # noqa: NPY002
        results.append(made(views, photos, "worker", 0, 0, torch.arange(8)))
        assert torch.get_rng_state().equal(before[0]) and random.getstate() == before[2]
        assert (np.random.get_state()[1] == before[1]).all()                        # noqa: NPY002
    assert all(x.equal(y) for x, y in zip(*results))


def test_finish_takes_any_layout_and_does_not_write_into_its_crops(photos):
    views, crops = recipes.moco_v2(size=72), photos.float()
    out = views.finish(crops, 0, 0, torch.arange(8), 0)
    assert crops.equal(photos.float())
    crops = crops.contiguous(memory_format=torch.channels_last)
    assert views.finish(crops, 0, 0, torch.arange(8), 0).equal(out)


@pytest.mark.parametrize("height, width", [(1, 1), (3, 200), (257, 5)])
def test_images_of_odd_shapes_have_views(height, width):
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    views = recipes.moco_v2(size=16)
    assert views.crop(image, 0, 0, 0, 1).shape == (3, 16, 16) and views.crop(image, 0, 0, 0, 1).dtype == torch.uint8
    assert all(x.isfinite().all() for x in views.from_memory(image[None], 0, 0, torch.tensor([0])))
    assert views.evaluation(image).shape == (3, 16, 16)


@pytest.mark.parametrize("size, short_side", [(224, 256), (112, 128), (96, 110), (32, 32), (8, 8)])
@pytest.mark.parametrize("height, width", [(300, 451), (400, 260), (130, 130)])
def test_evaluation_is_resize_and_center_crop(size, short_side, height, width):
    image = torch.from_numpy(load_sample_images().images[0].copy()).permute(2, 0, 1)[:, :height, :width]
    views = recipes.moco_v2(size=size)
    expected = TF.pil_to_tensor(
        transforms.Compose([transforms.Resize(short_side), transforms.CenterCrop(size)])(TF.to_pil_image(image))
    )
    assert views.evaluation(image).dtype == torch.uint8
    assert (views.evaluation(image).float() - expected).abs().max() <= 1
    in_batch = levels(views, views.evaluation_batch(image[None])[0])
    assert (in_batch - expected).abs().max() <= 1.1


def test_evaluation_leaves_images_of_the_right_size_as_they_are(photos):
    for size in (32, 72, 128):
        image = Image.fromarray(photos[0].permute(1, 2, 0).numpy()).resize((size, size))
        image = TF.pil_to_tensor(image)
        views = recipes.moco_v1(size=size)
        assert views.evaluation(image).equal(image)
        expected = TF.normalize(image / 255, views.mean, views.std)
        torch.testing.assert_close(views.evaluation_batch(image[None])[0], expected, rtol=0, atol=1e-5)


def test_mean_and_std_follow_the_channels_or_what_is_given(photos):
    assert recipes.moco_v1().mean == recipes.IMAGENET[0] and recipes.moco_cifar10().std == recipes.CIFAR[1]
    assert recipes.moco_v1(channels=1).mean == (sum(recipes.IMAGENET[0]) / 3,)
    assert recipes.digits(channels=3).mean == recipes.DIGITS[0] * 3
    assert recipes.moco_v2(mean=[0.1, 0.2, 0.3], std=[1, 1, 1]).mean == (0.1, 0.2, 0.3)
    with pytest.raises(ValueError, match="3 values for images of 1 channels"):
        recipes.moco_v2(mean=[0.1, 0.2, 0.3], std=[1, 1, 1], channels=1)
    with pytest.raises(ValueError, match="the images have 1 channels"):
        recipes.moco_v2(size=72).evaluation_batch(photos[:, :1])
    with pytest.raises(ValueError, match="std above 0"):
        recipes.moco_v2(mean=[0.1, 0.2, 0.3], std=[1, 0, 1])


def test_views_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="at least one pixel"):
        recipes.moco_v1(size=0)
    with pytest.raises(ValueError, match="twice"):
        Views(8, [View(RandomResizedCrop(), (Grayscale(), Grayscale()))], [0.5], [0.5])


def test_views_can_be_sent_to_a_worker(photos):
    views = recipes.moco_v3(size=24)
    again = pickle.loads(pickle.dumps(views))
    assert again.crop(photos[0], 0, 0, 3, 1).equal(views.crop(photos[0], 0, 0, 3, 1))


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_picture_shows_each_image_with_its_views(photos, channels, tmp_path):
    array = photos[:, :channels, :64, :64].contiguous()
    views = recipes.small_color(size=16, channels=channels)
    show_views(arrays(array).train, views, seed=5, path=tmp_path / "views.png", num_images=8)
    with Image.open(tmp_path / "views.png") as picture:
        sheet = TF.pil_to_tensor(picture).float()
    step, x = 128 + 6, views.finish(views.crop(array[6], 5, 1, 6, 1)[None], 5, 1, torch.tensor([6]), 1)[0]
    for column, image in ((0, array[6].float()), (4, levels(views, x))):            # 4: epoch 1, view 2
        tile = sheet[:, 22 + 6 * step :, 6 + column * step :][:, :128, :128]
        image = image if channels == 3 else image[:1].expand(3, -1, -1)
        assert (tile - torch.nn.functional.interpolate(image[None], (128, 128))[0]).abs().max() <= 0.51


def test_picture_leaves_out_images_that_cannot_be_read(photos, tmp_path):
    images = arrays(photos).train
    images.bad[0] = "damaged"
    show_views(images, recipes.small_color(size=16), seed=0, path=tmp_path / "views.png", num_images=3)
    with Image.open(tmp_path / "views.png") as picture:
        assert picture.height == 22 + 2 * (128 + 6) + 6
    images.bad.update(dict.fromkeys(range(8), "damaged"))
    with pytest.raises(ValueError, match="none of the images"):
        show_views(images, recipes.small_color(size=16), seed=0, path=tmp_path / "views.png")
