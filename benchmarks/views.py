"""Views, two of each image, beside the recipes of others: python -m benchmarks.views --images FOLDER

On a CPU, CPU time of one thread: CIFAR's recipe at 32 pixels from images in memory, against the notebook of MoCo's
authors (PIL, one image at a time), lightly's SimCLRTransform and kornia on the batch; MoCo v2's at 224 pixels, after
the crop and from JPEG files to float32, against the official recipe and kornia. With ``--device cuda``: MoCo v2's after
the crop, ours as Triton kernels and as plain operations against kornia's, and the share that the views of a batch have
of its ResNet-50 step. Recipes are restated here, kornia's as a chain on a float batch in the order of
stable-pretraining 0.1.8, with a blur as wide as ours. What is not installed is left out, and this is printed. Without
``--images``, pieces of the two photos of scikit-learn.
"""

import random
import tempfile
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torchvision import transforms
from torchvision.models import resnet50
from torchvision.transforms import functional as TF

from benchmarks.harness import Report, Side, arguments, figure, interleaved
from common.data import folder, recipes
from common.data.datasets import Images
from common.data.reading import TrainingCrops
from common.data.views import Views

GOAL_32, GOAL_224, GOAL_KORNIA, GOAL_SHARE = 7.0, 1.0, 3.0, 2.0     # the last one: percent of a step
Picture = Image.Image
Sides = dict[str, Side]


def main() -> None:
    options = arguments(__doc__, quick={"batch": 4, "photos": 2}, images="", batch=256, photos=32, device="cpu")
    report = Report("views", quick=options.quick, folder=options.out)
    with tempfile.TemporaryDirectory() as drawn:
        images = folder(Path(options.images) if options.images else pieces(Path(drawn)), in_memory=False).train
        if options.device == "cpu":
            on_cpu(report, images, options.batch, min(options.photos, len(images)), options.rounds)
        else:
            on_cuda(report, images, options.batch, options.rounds, options.device)


def on_cpu(report: Report, images: Images, batch: int, photos: int, rounds: int) -> None:
    report.compare("32 px from memory, per image", sides_32(images, batch), per=batch, rounds=rounds,
                   at_least={"ours": GOAL_32})
    what, sides = "224 px after the crop, per image", sides_after_the_crop(images, photos)
    seconds = report.compare(what, sides, per=photos, rounds=rounds)
    if "kornia" in seconds:
        ratios = [theirs / mine for theirs, mine in zip(seconds["kornia"], seconds["ours"])]
        report.add(figure(what, "ours", ratios, "x", baseline="kornia", at_least=GOAL_KORNIA))
    report.compare("224 px, JPEG to float32, per image", sides_from_files(images, photos), per=photos, rounds=rounds,
                   at_least={"ours": GOAL_224})


def sides_32(images: Images, batch: int) -> Sides:
    small_BcHW = torch.stack([small(images.read(i % len(images))) for i in range(batch)])
    pictures, index_B = [TF.to_pil_image(image) for image in small_BcHW], torch.arange(batch)
    mean, std = recipes.CIFAR
    recipe = transforms.Compose([transforms.RandomResizedCrop(32), transforms.RandomHorizontalFlip(), jitter_and_grey(),
                                 transforms.ToTensor(), transforms.Normalize(mean, std)])
    sides: Sides = {"MoCo's notebook (PIL)": partial(each_twice, recipe, pictures)}
    if installed("lightly"):
        theirs = import_module("lightly.transforms").SimCLRTransform(32, cj_strength=0.5, gaussian_blur=0.0)
        sides["lightly SimCLRTransform"] = partial(each, theirs, pictures)
    if installed("kornia"):
        sides["kornia"] = partial(twice, kornia_chain(32, (0.08, 1.0), mean, std, blur=False), small_BcHW)
    views = recipes.moco_cifar10()
    return {**sides, "ours": lambda: views.from_memory(small_BcHW, 0, 0, index_B)}


def sides_after_the_crop(images: Images, photos: int) -> Sides:
    crop_VBcSS = crops(images, recipes.moco_v2(), photos)
    pictures, index_B = [[TF.to_pil_image(crop) for crop in view] for view in crop_VBcSS], torch.arange(photos)
    recipe = official_after_the_crop()
    sides: Sides = {"official (PIL)": lambda: [each_once(recipe, view) for view in pictures]}
    if installed("kornia"):
        chain = kornia_chain(None, (0.2, 1.0), *recipes.IMAGENET, blur=True)
        sides["kornia"] = lambda: [chain(crop_BcSS.float() / 255) for crop_BcSS in crop_VBcSS]
    views = recipes.moco_v2()
    return {**sides, "ours": lambda: [views.finish(crop_VBcSS[v], 0, 0, index_B, v) for v in (0, 1)]}


def sides_from_files(images: Images, photos: int) -> Sides:
    recipe = transforms.Compose([transforms.RandomResizedCrop(224, scale=(0.2, 1.0)), official_after_the_crop()])
    views, index_B = recipes.moco_v2(), torch.arange(photos)

    def official() -> list[Tensor]:
        return each_twice(recipe, [opened(images.path(i)) for i in range(photos)])

    def ours() -> list[Tensor]:
        return [views.finish(crop_BcSS, 0, 0, index_B, v) for v, crop_BcSS in enumerate(crops(images, views, photos))]

    return {"official (PIL)": official, "ours": ours}


def on_cuda(report: Report, images: Images, batch: int, rounds: int, device: str) -> None:
    crop_VBcSS = crops(images, recipes.moco_v2(), min(batch, len(images))).to(device)
    crop_VBcSS = crop_VBcSS.movedim(-3, -1)[:, torch.arange(batch) % crop_VBcSS.shape[1]].movedim(-1, -3)
    fused, plain, index_B = recipes.moco_v2(), recipes.moco_v2(), torch.arange(batch)
    for view in plain._fused:
        view.wanted = False
    sides: Sides = {}
    if installed("kornia"):
        chain = kornia_chain(None, (0.2, 1.0), *recipes.IMAGENET, blur=True).to(device)
        sides["kornia"] = lambda: [chain(crop_BcSS.float() / 255) for crop_BcSS in crop_VBcSS]
    for side, views in (("ours, plain", plain), ("ours, Triton", fused)):
        sides[side] = partial(finished, views, crop_VBcSS, index_B)
    seconds = report.compare(f"224 px after the crop, {batch} images", sides, rounds=rounds, device=device,
                             at_least={"ours, Triton": GOAL_KORNIA})
    if not all(view.wanted for view in fused._fused):
        print("The Triton kernels were not used, see the warning: \"ours, Triton\" is the plain operations.")
    step = interleaved({"step": step_of_resnet50(batch, device)}, rounds, device)["step"]
    shares = [100 * mine / whole for mine, whole in zip(seconds["ours, Triton"], step)]
    report.add(figure("views' share of a ResNet-50 step", "ours, Triton", shares, "%", at_most=GOAL_SHARE))


def installed(peer: str) -> bool:
    if not find_spec(peer):
        print(f"{peer} is not installed and is left out: pip install -e '.[bench]'")
    return find_spec(peer) is not None


def finished(views: Views, crop_VBcSS: Tensor, index_B: Tensor) -> list[Tensor]:
    return [views.finish(crop_BcSS, 0, 0, index_B, v) for v, crop_BcSS in enumerate(crop_VBcSS)]


def step_of_resnet50(batch: int, device: str) -> Side:
    """MoCo's: the keys' forward pass, the queries' forward and backward pass; bfloat16 and channels_last."""
    network = resnet50(num_classes=128).to(device, memory_format=torch.channels_last)
    x_BcSS = torch.randn(batch, 3, 224, 224, device=device).to(memory_format=torch.channels_last)

    def step() -> None:
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            with torch.no_grad():
                network(x_BcSS)
            loss = network(x_BcSS).float().square().mean()
        loss.backward()

    return step


def pieces(root: Path, count: int = 16) -> Path:
    """JPEG files of 500 x 375 pixels, quality 95, cut at random from scikit-learn's two photos."""
    draw = np.random.default_rng(0)
    for i in range(count):
        photo = load_sample_images().images[i % 2]
        y, x = draw.integers(0, (photo.shape[0] - 375, photo.shape[1] - 500))
        Image.fromarray(photo[y : y + 375, x : x + 500]).save(root / f"{i}.jpg", quality=95)
    return root


def small(image_cHW: Tensor) -> Tensor:
    return TF.center_crop(TF.resize(image_cHW, 32, antialias=True), [32, 32])


def crops(images: Images, views: Views, photos: int) -> Tensor:
    """What a worker makes of the first ``photos`` images, uint8 [V, B, c, S, S] with the strides of H, W, c."""
    out_VBSSc = torch.empty(views.num_views, photos, views.size, views.size, 3, dtype=torch.uint8)
    TrainingCrops(images, views, seed=0)((0, range(photos)), out_VBSSc, lambda _: None)
    return out_VBSSc.movedim(-1, -3)


def opened(path: str) -> Picture:
    with open(path, "rb") as file:
        return Image.open(file).convert("RGB")


def jitter_and_grey() -> transforms.Compose:
    return transforms.Compose([transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
                               transforms.RandomGrayscale(p=0.2)])


def official_after_the_crop() -> transforms.Compose:
    blur = transforms.Lambda(lambda image: image.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))
    return transforms.Compose([jitter_and_grey(), transforms.RandomApply([blur], p=0.5),
                               transforms.RandomHorizontalFlip(), transforms.ToTensor(),
                               transforms.Normalize(*recipes.IMAGENET)])


def each_once(recipe: Callable, pictures: list[Picture]) -> Tensor:
    return torch.stack([recipe(picture) for picture in pictures])


def each_twice(recipe: Callable, pictures: list[Picture]) -> list[Tensor]:
    return [torch.stack(view) for view in zip(*((recipe(picture), recipe(picture)) for picture in pictures))]


def each(recipe: Callable, pictures: list[Picture]) -> list[Tensor]:
    """Of a recipe that gives both views."""
    return [torch.stack(view) for view in zip(*map(recipe, pictures))]


def twice(chain: nn.Module, images_BcHW: Tensor) -> list[Tensor]:
    return [chain(images_BcHW.float() / 255) for _ in range(2)]


def kornia_chain(size: int | None, scale: tuple[float, float], mean: tuple, std: tuple, blur: bool) -> nn.Module:
    """Of float batches 0..1; without the crop where ``size`` is None."""
    K = import_module("kornia.augmentation")
    crop = [K.RandomResizedCrop((size, size), scale=scale)] if size else []
    return nn.Sequential(*crop, K.ColorJitter(0.4, 0.4, 0.4, 0.1, p=0.8), K.RandomGrayscale(p=0.2),
                         *([K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=0.5)] if blur else []),
                         K.RandomHorizontalFlip(p=0.5), K.Normalize(torch.tensor(mean), torch.tensor(std)))


if __name__ == "__main__":
    main()
