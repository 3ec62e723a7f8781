"""From JPEG files to two random crops of 224 pixels, in a worker: ours beside the official MoCo v2 recipe, and lightly.

    python -m benchmarks.loader --images FOLDER       photos in it or below
    python -m benchmarks.loader                       pictures drawn for it, 500 x 375 and about 100 kB, with no goal

The official recipe does all of a view in the worker: Pillow opens, torchvision's operations and Pillow's blur make two
float32 views, which are collated. Ours reads and decodes once, and writes two uint8 crops into the memory that the
worker shares; flip, colour, blur and normalisation follow on the device (``benchmarks.views``). So this is what a
machine with a GPU needs of its CPU. Two sides read the same pictures as ``tools/pack.py`` has written them, with a
shorter side of 256 pixels: as JPEG of quality 90, and as raw pixels. Each side is given the same pictures in a round,
the next ones in the next. The files are in the system's cache after the first.
"""

import itertools
import pickle
import tempfile
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torch.utils.data import default_collate
from torchvision import transforms

from benchmarks.harness import Report, Side, arguments, figure
from common.data import Images, Splits, folder, jpeg, packed, recipes
from common.data.reading import Read, TrainingCrops
from common.packing import Settings, pack

OFFICIAL, OURS, PACKED, RAW = "official MoCo v2 recipe", "ours", "ours, packed", "ours, packed raw"
COLOURS = np.array([[1, 0.9, 0.8], [0, 0.4, 0.4], [0, 0, 0.4]])     # mixes three noises: mostly grey, as photos are
Pass = Callable[[list[int]], object]


class Blur:
    """Of the authors' moco/loader.py, restated: Pillow's blur with a radius drawn from 0.1 .. 2."""

    def __call__(self, picture: Image.Image) -> Image.Image:
        return picture.filter(ImageFilter.GaussianBlur(float(torch.empty(1).uniform_(0.1, 2.0))))


def official(paths: list[str], size: int) -> Callable[[list[int]], list[Tensor]]:
    """``--aug-plus`` of the authors' main_moco.py, restated: two views [B, 3, S, S] of the pictures, float32."""
    recipe = transforms.Compose([
        transforms.RandomResizedCrop(size, scale=(0.2, 1.0)),
        transforms.RandomApply([transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        transforms.RandomGrayscale(p=0.2),
        transforms.RandomApply([Blur()], p=0.5),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(*recipes.IMAGENET),
    ])
    return lambda rows: default_collate([[recipe(picture), recipe(picture)] for picture in opened(paths, rows)])


def lightly(paths: list[str], size: int) -> Pass:
    recipe = import_module("lightly.transforms.moco_transform").MoCoV2Transform(input_size=size)
    return lambda rows: default_collate([recipe(picture) for picture in opened(paths, rows)])


def opened(paths: list[str], rows: list[int]) -> Iterable[Image.Image]:
    for i in rows:
        with open(paths[i], "rb") as file:
            yield Image.open(file).convert("RGB")


def crops(images: Images, size: int, count: int) -> Callable[[list[int]], tuple[Read, Tensor]]:
    """What a worker does for ``count`` images: its answer, and the memory that the main process shares."""
    task = TrainingCrops(images, recipes.moco_v2(size), seed=0)
    out_VBSSc = torch.zeros(2, count, size, size, images.channels, dtype=torch.uint8)
    return lambda rows: (task((0, rows), out_VBSSc, lambda image: None), out_VBSSc)


def stores(images: Images, place: Path, size: int, count: int) -> dict[str, Pass]:
    """The same, of packed sets, which are written for it."""
    found: dict[str, Pass] = {}
    for name, raw in ((PACKED, False), (RAW, True)):
        for _ in pack(Splits(images), place / name, Settings(raw=raw)):
            pass
        store = packed(place / name, in_memory=False).train
        print(f"{name}: {sum(path.stat().st_size for path in (place / name).iterdir()) / len(store) / 1e3:.0f} kB")
        found[name] = crops(store, size, count)
    return found


def with_pillow(call: Pass) -> Pass:
    """As where simplejpeg is not installed."""
    def alone(rows: list[int]) -> object:
        kept, jpeg.simplejpeg = jpeg.simplejpeg, None
        try:
            return call(rows)
        finally:
            jpeg.simplejpeg = kept
    return alone


def decoding(paths: list[str]) -> Pass:
    """The floor: nothing but the decoder, over bytes that are read anew."""
    assert jpeg.simplejpeg is not None
    decode = jpeg.simplejpeg.decode_jpeg
    return lambda rows: [decode(Path(paths[i]).read_bytes()) for i in rows]


def passes(images: Images, size: int, count: int) -> dict[str, Pass]:
    """What is compared, the baseline first; a side whose package is not installed is left out, and said so."""
    paths = [images.path(i) for i in range(len(images))]
    found: dict[str, Pass] = {OFFICIAL: official(paths, size)}
    try:
        found["lightly MoCoV2Transform"] = lightly(paths, size)
    except ImportError as error:
        print(f"lightly is left out: {error}")
    ours = crops(images, size, count)
    if jpeg.simplejpeg is None:
        print("simplejpeg is not installed: ours decodes with Pillow only, and the floor is left out")
        return found | {OURS: ours}
    return found | {OURS: ours, "ours, without simplejpeg": with_pillow(ours), "floor: decoding": decoding(paths)}


def sides(found: dict[str, Pass], num_images: int, count: int) -> dict[str, Side]:
    """Each call takes the next ``count`` images, every side the same ones in its n-th call."""
    def side(call: Pass) -> Side:
        place = itertools.count(step=count)
        def run() -> object:
            start = next(place)
            return call([i % num_images for i in range(start, start + count)])
        return run
    return {name: side(call) for name, call in found.items()}


def megabytes(images: Images, size: int, count: int) -> dict[str, float]:
    """What goes from a worker to the main process for a picture, pickled or in shared memory."""
    rows = [i % len(images) for i in range(count)]
    views = official([images.path(i) for i in range(len(images))], size)(rows)
    read, crops_VBSSc = crops(images, size, count)(rows)
    ours = crops_VBSSc.nbytes + len(pickle.dumps((read, "")))
    return {OFFICIAL: sum(x_BcSS.nbytes for x_BcSS in views) / count / 1e6, OURS: ours / count / 1e6}


def draw_pictures(place: Path, count: int, height: int = 375, width: int = 500) -> None:
    """With the spectrum of photos, one over the frequency: JPEG files of about the size of ImageNet's."""
    y, x = np.fft.fftfreq(height)[:, None, None], np.fft.rfftfreq(width)[None, :, None]
    place.mkdir()
    fall = 1 / np.maximum(np.hypot(y, x), 1 / width)
    for i in range(count):
        noise = np.random.default_rng(i).normal(size=(height, width, 3)) @ COLOURS
        values = np.fft.irfft2(np.fft.rfft2(noise, axes=(0, 1)) * fall, (height, width), axes=(0, 1))
        pixels = np.clip(118 + 55 * (values - values.mean()) / values.std(), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(place / f"{i:03}.jpg", quality=92)


def main() -> None:
    options = arguments(__doc__, quick={"size": 32, "pictures": 2, "drawn": 2}, images="", size=224, pictures=25,
                        drawn=50)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as place:
        if not options.images:
            draw_pictures(Path(place, "drawn"), options.drawn)
        images = folder(Path(options.images or place, "" if options.images else "drawn"), in_memory=False).train
        report = Report("loader", quick=options.quick, folder=options.out)
        kind = "photos" if options.images else "drawn pictures"
        bytes_ = sum(Path(images.path(i)).stat().st_size for i in range(len(images))) / len(images)
        print(f"{len(images)} {kind} of {bytes_ / 1e3:.0f} kB, {options.pictures} a round")
        goals = {OURS: 4.0, PACKED: 7.0, RAW: 10.0} if options.images and jpeg.simplejpeg else {}
        found = passes(images, options.size, options.pictures)
        found |= stores(images, Path(place), options.size, options.pictures)
        report.compare(f"a picture to two crops, CPU time ({kind})",
                       sides(found, len(images), options.pictures), rounds=options.rounds, per=options.pictures,
                       at_least=goals)
        for side, value in megabytes(images, options.size, options.pictures).items():
            report.add(figure("from a worker to the main process, a picture", side, [value], "MB",
                              at_most=0.31 if side == OURS else None))


if __name__ == "__main__":
    main()
