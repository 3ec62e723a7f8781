"""Every operation does what torchvision's does, to each image of a batch on its own, with the same distribution."""

import itertools
import math

import pytest
import torch
import torchvision.transforms.functional as TF
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageFilter, ImageOps
from scipy import stats
from sklearn.datasets import load_sample_images
from torchvision import transforms
from torchvision.transforms.functional import InterpolationMode

from common import counter
from common.data.augment import to_device
from common.data.filters import GaussianBlur, Grayscale, Solarize, blur, convolution, gaussians
from common.data.geometry import HorizontalFlip, RandomResizedCrop, Rotate, crop_resize
from common.data.jitter import ColorJitter, brightness_, contrast_, hue_, saturation_

DRAWS = 10_000
JITTER = {
    "brightness": (brightness_, TF.adjust_brightness, (0.6, 1.4)),
    "contrast": (contrast_, TF.adjust_contrast, (0.6, 1.4)),
    "saturation": (saturation_, TF.adjust_saturation, (0.6, 1.4)),
    "hue": (hue_, TF.adjust_hue, (-0.4, 0.4)),
}


@pytest.fixture(scope="module")
def photos():
    """Eight different 96 x 80 pieces of two photos, uint8 [8, 3, 96, 80]."""
    both = [torch.from_numpy(image.copy()).permute(2, 0, 1) for image in load_sample_images().images]
    return torch.stack([photo[:, y : y + 96, x : x + 80] for y, x in
                        [(210, 220), (280, 330), (140, 220), (280, 220)] for photo in both])


def pil(image_cHW):
    return TF.to_pil_image(image_cHW)


def levels(picture):
    return TF.pil_to_tensor(picture).float()


def draws(op, n=DRAWS, **kwargs):
    return op.draw(counter.uniform(3, torch.arange(n), torch.arange(op.num_draws).view(-1, 1)), **kwargs)


def same_distribution(ours, theirs):
    return stats.ks_2samp(ours.numpy(), torch.as_tensor(theirs).numpy()).pvalue > 1e-3


BOXES = [(0, 0, 96, 80), (5, 7, 40, 61), (90, 70, 6, 10), (30, 0, 66, 17), (95, 79, 1, 1), (0, 40, 33, 40)]


@pytest.mark.parametrize("size", [8, 32, 48, 112])              # smaller than every box, between, larger than every box
def test_crop_resize_is_pillows_within_one_level(photos, size):
    images = photos[: len(BOXES)]
    box = dict(zip(("top", "left", "height", "width"), torch.tensor(BOXES).T))
    ours = crop_resize(images, box, size)
    for i, (top, left, height, width) in enumerate(BOXES):
        expected = TF.resized_crop(pil(images[i]), top, left, height, width, [size, size])
        assert (ours[i] - levels(expected)).abs().max() <= 1.1


@pytest.mark.parametrize("channels", [1, 2, 7])
def test_crop_resize_takes_any_number_of_channels(photos, channels):
    image = photos.flatten(0, 1)[None, :channels]
    box = dict(zip(("top", "left", "height", "width"), torch.tensor([BOXES[1]]).T))
    each = [crop_resize(image[:, c : c + 1], box, 24) for c in range(channels)]
    torch.testing.assert_close(crop_resize(image, box, 24), torch.cat(each, dim=1))


@pytest.mark.parametrize("height, width", [(100, 80), (40, 100), (30, 300), (32, 32)])  # 40 x 100: tries fail often
def test_crop_boxes_are_distributed_like_torchvisions(height, width):
    torch.manual_seed(0)
    op = RandomResizedCrop((0.2, 1.0))
    image = torch.empty(1, height, width)
    theirs = torch.tensor([
        transforms.RandomResizedCrop.get_params(image, list(op.scale), list(op.ratio)) for _ in range(DRAWS)
    ])
    ours = draws(op, height=height, width=width)
    for name, expected in zip(("top", "left", "height", "width"), theirs.T):
        assert same_distribution(ours[name], expected), name
    assert same_distribution(ours["height"] * ours["width"], theirs[:, 2] * theirs[:, 3])
    assert same_distribution(ours["height"] / ours["width"], theirs[:, 2] / theirs[:, 3])
    assert same_distribution(ours["top"] + ours["height"] / 2, theirs[:, 0] + theirs[:, 2] / 2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.01, 1))
def test_crop_boxes_lie_in_the_image(height, width, smallest):
    box = draws(RandomResizedCrop((smallest, 1.0)), n=50, height=height, width=width)
    assert all((box[name] >= low).all() for name, low in (("top", 0), ("left", 0), ("height", 1), ("width", 1)))
    assert (box["top"] + box["height"] <= height).all() and (box["left"] + box["width"] <= width).all()


@pytest.mark.parametrize("height, width", [(100, 80), (375, 500), (40, 100), (30, 300), (500, 3), (1, 1), (3, 2)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.2, 1.0), (0.9, 1.0)])
def test_the_box_of_one_image_is_its_box_in_a_batch(height, width, scale):
    op = RandomResizedCrop(scale)
    u_RB = counter.uniform(3, torch.arange(500), torch.arange(op.num_draws).view(-1, 1))
    expected = op.draw(u_RB, height, width)
    boxes = [op.box(shares_R, height, width) for shares_R in op.shares(u_RB).T.tolist()]
    assert boxes == list(zip(*(expected[name].tolist() for name in ("top", "left", "height", "width"))))


def test_flip_mirrors_the_images_drawn_and_no_others(photos):
    applied = torch.tensor([True, False, True, True, False, False, False, True])
    out = HorizontalFlip()(photos.float(), {"applied": applied})
    for i in range(8):
        assert out[i].equal((TF.hflip(photos[i]) if applied[i] else photos[i]).float())


@pytest.mark.parametrize("height, width", [(80, 80), (96, 80), (8, 8)])
def test_rotation_is_torchvisions(photos, height, width):
    images, degrees = photos[..., :height, :width].float(), torch.linspace(-15, 15, 8)
    out = Rotate(15)(images.clone(), {"degrees": degrees})
    for i in range(8):
        expected = TF.rotate(images[i], float(degrees[i]), InterpolationMode.BILINEAR)
        inside = TF.rotate(torch.ones(1, height, width), float(degrees[i]), InterpolationMode.BILINEAR) > 0.999
        assert ((out[i] - expected).abs() * inside).max() < 0.1     # torchvision fades the border twice


def test_rotation_angles_are_distributed_like_torchvisions():
    torch.manual_seed(0)
    theirs = [transforms.RandomRotation.get_params([-15, 15]) for _ in range(DRAWS)]
    assert same_distribution(draws(Rotate(15))["degrees"], theirs)


@pytest.mark.parametrize("name", JITTER)
def test_jitter_operation_is_torchvisions(photos, name):
    ours_, theirs, (low, high) = JITTER[name]
    factors = torch.linspace(low, high, 8)
    out = photos.float()
    ours_(out, factors.view(-1, 1, 1, 1))
    for i in range(8):
        expected = theirs(photos[i] / 255, float(factors[i])) * 255
        assert (out[i] - expected).abs().max() < 0.05
        if name != "hue":                       # torchvision's own float and PIL hues differ by more
            assert (out[i] - levels(theirs(pil(photos[i]), float(factors[i])))).abs().max() <= 2


def test_hue_is_right_where_channels_are_equal_and_at_its_corners():
    corners = torch.tensor(list(itertools.product([0.0, 100.0, 255.0], repeat=3))).T.reshape(1, 3, 1, 27)
    for shift in (-0.5, -1 / 6, 0.0, 0.1, 1 / 3, 0.5):
        out = corners.clone()
        hue_(out, torch.tensor(shift).view(1, 1, 1, 1))
        assert (out - TF.adjust_hue(corners / 255, shift) * 255).abs().max() < 0.01


def one_by_one(op, photos, parameters):
    """The jitter as torchvision does it: a loop over images, and over operations in the order drawn."""
    names, out = list(JITTER), []
    for i, image in enumerate(photos):
        image = image / 255
        for k in parameters["order"][i].tolist():
            if parameters["applied"][i] and getattr(op, names[k]):
                image = JITTER[names[k]][1](image, float(parameters[names[k]][i]))
        out.append(image * 255)
    return torch.stack(out)


@pytest.mark.parametrize("op", [ColorJitter(0.4, 0.4, 0.4, 0.4), ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.5),
                                ColorJitter(0.8, 0.8), ColorJitter(0, 0, 0.4, 0.1), ColorJitter(hue=0.2)], ids=str)
def test_each_image_is_jittered_in_its_own_order(photos, op):
    photos = photos[:, :, :40, :40].repeat(5, 1, 1, 1)
    parameters = draws(op, n=len(photos))
    out = op(photos.float(), parameters)
    assert (out - one_by_one(op, photos, parameters)).abs().max() < 0.1


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_images_that_are_not_rgb_get_brightness_and_contrast_only(photos, channels):
    op = ColorJitter(0.4, 0.4, 0.4, 0.4)
    images = photos.flatten(0, 1)[: 4 * channels].unflatten(0, (4, channels))
    parameters = draws(op, n=4)
    out = op(images.float(), parameters)
    for i, image in enumerate(images.float()):
        for k in parameters["order"][i].tolist():
            factor = float(parameters[list(JITTER)[k]][i])
            if k == 0:
                image = (image * factor).clamp(0, 255)
            if k == 1:
                image = (factor * image + (1 - factor) * image.mean()).clamp(0, 255)
        assert (out[i] - image).abs().max() < 0.01
    assert Grayscale(1.0)(images.float(), {"applied": torch.ones(4, dtype=torch.bool)}).equal(images.float())


def test_jitter_parameters_are_distributed_like_torchvisions():
    torch.manual_seed(0)
    op = ColorJitter(0.4, 0.4, 0.2, 0.1, p=0.8)
    theirs = transforms.ColorJitter(0.4, 0.4, 0.2, 0.1)
    drawn = [theirs.get_params(theirs.brightness, theirs.contrast, theirs.saturation, theirs.hue) for _ in range(DRAWS)]
    ours = draws(op)
    for k, name in enumerate(JITTER, start=1):
        assert same_distribution(ours[name], [draw[k] for draw in drawn]), name
    places = torch.tensor([4**3, 4**2, 4, 1])
    orders = [(order * places).sum(-1).unique(return_counts=True)[1] for order in
              (ours["order"], torch.stack([draw[0] for draw in drawn]))]
    assert len(orders[0]) == len(orders[1]) == math.factorial(4)
    assert stats.chi2_contingency(torch.stack(orders).numpy()).pvalue > 1e-3
    assert stats.binomtest(int(ours["applied"].sum()), DRAWS, 0.8).pvalue > 1e-3


def test_draws_of_different_parameters_are_independent():
    ours = draws(ColorJitter(0.4, 0.4, 0.4, 0.4, p=0.5))
    table = torch.stack([ours[name].float() for name in (*JITTER, "applied")] + list(ours["order"].float().T[:3]))
    correlation = torch.corrcoef(table) - torch.eye(len(table))
    correlation[5:, 5:] = 0                     # places in one order exclude each other
    assert correlation.abs().max() < 5 / math.sqrt(DRAWS)


def test_grey_is_pillows_luma(photos):
    applied = torch.tensor([True, False] * 4)
    out = Grayscale()(photos.float(), {"applied": applied})
    for i in range(8):
        expected = levels(pil(photos[i]).convert("L").convert("RGB")) if applied[i] else photos[i].float()
        assert (out[i] - expected).abs().max() <= 1


def test_solarize_is_pillows(photos):
    applied = torch.tensor([False, True] * 4)
    out = Solarize()(photos.float(), {"applied": applied})
    for i in range(8):
        assert out[i].equal(levels(ImageOps.solarize(pil(photos[i])) if applied[i] else pil(photos[i])))


def test_blur_is_torchvisions_with_the_border_repeated(photos):
    sigma, op = torch.linspace(0.1, 2.0, 8), GaussianBlur()
    out = op(photos.float(), {"sigma": sigma, "applied": torch.ones(8, dtype=torch.bool)})
    for i in range(8):
        padded = torch.nn.functional.pad(photos[i, None].float(), [16] * 4, mode="replicate")
        exact = TF.gaussian_blur(padded, [25, 25], [float(sigma[i])] * 2)[0, :, 16:-16, 16:-16]
        assert (out[i] - exact).abs().max() < 0.5
        pillow = levels(pil(photos[i]).filter(ImageFilter.GaussianBlur(float(sigma[i]))))
        assert (out[i] - pillow).abs().mean() < 1.5     # Pillow's is three box filters


@pytest.mark.parametrize("sigma", [[0.1, 0.1], [0.3, 1.0], [2.0, 0.1]])     # no tap but one, few, all
@pytest.mark.parametrize("height, width", [(96, 80), (4, 5)])
def test_blur_by_shifted_images_is_the_convolution_with_all_taps(photos, sigma, height, width):
    images, sigma = photos[:2, :, :height, :width].float(), torch.tensor(sigma)
    convolved = convolution(images, gaussians(sigma, 6))
    assert (blur(images, sigma, radius=6) - convolved).abs().max() < 1e-3


def test_blur_of_an_image_is_the_same_to_the_last_bit_whichever_others_are_blurred_with_it():
    torch.manual_seed(0)
    images, sigma = (torch.rand(40, 1, 29, 31) < 0.3) * 255.0, torch.linspace(0.1, 2.0, 40)
    alone = [blur(images[i : i + 1], sigma[i : i + 1], radius=6) for i in range(40)]
    assert blur(images, sigma, radius=6).equal(torch.cat(alone))


def test_blur_of_a_point_is_a_gaussian_of_that_sigma():
    point = torch.zeros(3, 1, 31, 31)
    point[:, :, 15, 15] = 1
    sigma = torch.tensor([0.5, 1.0, 2.0])
    out = blur(point, sigma, radius=15)[:, 0]
    distance = torch.arange(31) - 15
    variance = (out.sum(1) * distance**2).sum(1)
    torch.testing.assert_close(variance[1:], sigma[1:] ** 2, rtol=0.01, atol=0)
    torch.testing.assert_close(out.sum((1, 2)), torch.ones(3))
    torch.testing.assert_close(out, out.transpose(1, 2))


def test_blur_leaves_the_other_images_alone_and_takes_images_smaller_than_its_filter(photos):
    images, applied = photos[..., :4, :5].float(), torch.tensor([True] + [False] * 7)
    out = GaussianBlur()(images.clone(), {"sigma": torch.full((8,), 2.0), "applied": applied})
    assert out[1:].equal(images[1:]) and not out[0].equal(images[0])
    nobody = {"sigma": torch.full((8,), 2.0), "applied": torch.zeros(8, dtype=torch.bool)}
    assert GaussianBlur()(images.clone(), nobody).equal(images)


def test_blur_sigmas_are_distributed_like_torchvisions():
    torch.manual_seed(0)
    theirs = [transforms.GaussianBlur.get_params(0.1, 2.0) for _ in range(DRAWS)]
    assert same_distribution(draws(GaussianBlur())["sigma"], theirs)


@pytest.mark.parametrize("op, p", [(HorizontalFlip(), 0.5), (Grayscale(), 0.2), (GaussianBlur(p=0.1), 0.1),
                                   (Solarize(), 0.2), (GaussianBlur(p=1.0), 1.0), (HorizontalFlip(0.0), 0.0)], ids=str)
def test_an_operation_is_applied_as_often_as_it_says(op, p):
    assert stats.binomtest(int(draws(op)["applied"].sum()), DRAWS, p).pvalue > 1e-3


@pytest.mark.parametrize("make", [lambda: RandomResizedCrop((0.5, 0.2)), lambda: RandomResizedCrop((0.2, 1.5)),
                                  lambda: RandomResizedCrop((0, 1)), lambda: ColorJitter(-0.1),
                                  lambda: ColorJitter(hue=0.6), lambda: ColorJitter(p=1.2),
                                  lambda: GaussianBlur((0, 2)), lambda: Grayscale(-1), lambda: Solarize(2.0)])
def test_impossible_settings_are_refused(make):
    with pytest.raises(ValueError):
        make()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_operations_never_wait_for_the_device(photos):
    images = photos.cuda().float()
    ops = [ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), Grayscale(), GaussianBlur(), Solarize(), HorizontalFlip(), Rotate(9)]
    parameters = [draws(op, n=8) for op in ops]
    box = draws(RandomResizedCrop(), n=8, height=96, width=80)
    torch.cuda.set_sync_debug_mode("error")
    try:
        crop_resize(images, box, 32)
        for op, parameter in zip(ops, parameters):
            op(images, parameter)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert to_device(torch.ones(1), images.device).device == images.device
