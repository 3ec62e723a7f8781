"""The two ways to decode a JPEG file: the same pixels bit for bit, and the same reason where there are none."""

import base64
import io
import itertools
import sys

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from common.data import jpeg
from common.data.images import UnreadableImage, image_size, read_image
from tests.faults.bad_images import LOADS, REFUSED, UNDETECTABLE

needs_simplejpeg = pytest.mark.skipif(jpeg.simplejpeg is None, reason="simplejpeg is not installed")
SIZES = [(1, 1), (1, 33), (17, 1), (2, 3), (7, 9), (8, 8), (15, 16), (16, 17), (17, 33), (64, 48)]
ORIENTATION = 0x0112
ARITHMETIC = base64.b64decode(              # 9 x 8 grey pixels, by cjpeg -arithmetic -quality 90
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAAMCAgMCAgMDAwMEAwMEBQgFBQQEBQoHBwYIDAoMDAsKCwsNDhIQDQ4RDgsLEBYQERMUFRUVDA8XGB"
    "YUGBIUFRT/yQALCAAIAAkBAREA/8wABgAQEAX/2gAIAQEAAD8A/wCTF6ngvWyAN/D04Vy66uXc/9k="
)


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Edges, slopes and noise."""
    draw = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    planes = [(7 * x + 3 * y * i) % 256 if i % 2 else 200 - 2 * x + 60 * (y % 5 > 2) for i in range(channels)]
    return np.clip(np.stack(planes, -1) + draw.normal(0, 20, (height, width, channels)), 0, 255).astype(np.uint8)


def encoded(pixels: np.ndarray, **options) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, "JPEG", **options)
    return buffer.getvalue()


def fast(data: bytes) -> np.ndarray | None:
    file = io.BytesIO(data)
    return jpeg.jpeg_pixels(file, Image.open(file))


def by_pillow(data: bytes) -> np.ndarray:
    pixels = np.array(Image.open(io.BytesIO(data)))
    return pixels if pixels.ndim == 3 else pixels[..., None]


def assert_same(data: bytes) -> None:
    """Unless the picture ends in grey: whether that is its end, Pillow's road finds out."""
    found, expected = fast(data), by_pillow(data)
    if {127, 128}.issuperset(expected[-1, -1].tolist()):
        assert found is None
    else:
        assert found is not None and found.dtype == np.uint8 and np.array_equal(found, expected)


def read(path, channels=None) -> torch.Tensor | str:
    try:
        return read_image(path, channels)
    except UnreadableImage as error:
        return str(error)


def both_roads(monkeypatch, path) -> tuple:
    """What comes of the file with simplejpeg, and without."""
    found = read(path)
    with monkeypatch.context() as patch:
        patch.setattr(jpeg, "simplejpeg", None)
        return found, read(path)


def assert_agree(monkeypatch, path) -> None:
    found, expected = both_roads(monkeypatch, path)
    assert type(found) is type(expected)
    assert found == expected if isinstance(found, str) else torch.equal(found, expected)


@needs_simplejpeg
@pytest.mark.parametrize("height, width", SIZES)
@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "Gray"])
def test_every_subsampling_is_the_same_at_odd_sizes(height, width, subsampling):
    pixels = picture(height, width, 1 if subsampling == "Gray" else 3)
    colours = "GRAY" if subsampling == "Gray" else "RGB"
    for quality in (1, 50, 97):
        assert_same(jpeg.simplejpeg.encode_jpeg(pixels, quality, colours, subsampling))


@needs_simplejpeg
@pytest.mark.parametrize("options", [
    {"progressive": True}, {"progressive": True, "subsampling": 0, "quality": 95}, {"optimize": True},
    {"restart_marker_blocks": 1}, {"restart_marker_rows": 1, "progressive": True}, {"quality": 100, "subsampling": 0},
    {"keep_rgb": True}, {"icc_profile": b"x" * 70_000}, {"comment": b"\xff\xd9\xff\xc0"}, {"dpi": (72, 300)},
], ids=str)
def test_every_kind_of_file_is_the_same(options):
    assert_same(encoded(picture(61, 83), **options))
    if "keep_rgb" not in options:
        assert_same(encoded(picture(61, 83, channels=1), **options))


@pytest.mark.parametrize("text, taken", [("__version__ = '1.8.2'", False), ("__version__ = '1.9.0'", True),
                                         ("__version__ = '1.10.1'", True), ("__version__ = '2.0'", True),
                                         ("__version__ = 'unknown'", False), ("", False),
                                         ("import nothing_of_this", False)])
def test_a_decoder_of_another_age_is_not_used(text, taken, tmp_path, monkeypatch):
    """It may not know ``strict``: then each picture would be unreadable. Or it decodes to other pixels."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "of_some_age.py").write_text(text)
    monkeypatch.delitem(sys.modules, "of_some_age", raising=False)
    assert (jpeg._installed("of_some_age") is not None) == taken


@needs_simplejpeg
def test_arithmetic_coding_and_several_pictures_are_the_same():
    assert_same(ARITHMETIC)
    buffer = io.BytesIO()
    first, second = (Image.fromarray(picture(40, 50, seed=seed)) for seed in (1, 2))
    first.save(buffer, "MPO", save_all=True, append_images=[second])
    assert_same(buffer.getvalue())


@needs_simplejpeg
def test_random_files_are_the_same():
    draw = np.random.default_rng(0)
    for number in range(300):
        height, width = draw.integers(1, 70, 2)
        pixels = picture(height, width, channels=(3, 1)[number % 5 == 0], seed=number)
        assert_same(encoded(pixels, quality=int(draw.integers(1, 101)), subsampling=int(draw.integers(3)),
                            progressive=bool(draw.integers(2)), optimize=bool(draw.integers(2)),
                            restart_marker_blocks=int(draw.integers(3))))


@needs_simplejpeg
def test_what_is_not_plain_is_left_to_pillow():
    pixels = picture(40, 50)
    cmyk = io.BytesIO()
    Image.fromarray(pixels).convert("CMYK").save(cmyk, "JPEG")
    plain = encoded(pixels)
    assert fast(plain) is not None
    assert fast(cmyk.getvalue()) is None
    assert fast(encoded(np.full((40, 50, 3), 128, np.uint8))) is None           # ends in grey: is it whole?
    assert fast(plain[: len(plain) // 2]) is None
    assert fast(plain[: len(plain) // 2] + b"\xff\xd9") is None
    assert fast(plain + bytes(2**21)) is None                                   # far more bytes than pixels


@needs_simplejpeg
@pytest.mark.parametrize("name", [name for name in (LOADS | REFUSED | UNDETECTABLE) if name.endswith((".jpg", ".JPG"))])
def test_strange_and_broken_files_come_to_the_same(name, tmp_path, monkeypatch):
    made = (LOADS | REFUSED | UNDETECTABLE)[name]
    (made if callable(made) else made[0])(tmp_path / name)
    assert_agree(monkeypatch, tmp_path / name)


@needs_simplejpeg
@pytest.mark.parametrize("progressive", [False, True])
def test_a_file_cut_anywhere_comes_to_the_same(progressive, tmp_path, monkeypatch):
    data = encoded(picture(24, 40), progressive=progressive, subsampling=2)
    start = data.index(b"\xff\xda")
    for length, end in itertools.product(range(start, len(data), 11), (b"", b"\xff\xd9")):
        (tmp_path / "cut.jpg").write_bytes(data[:length] + end)
        assert_agree(monkeypatch, tmp_path / "cut.jpg")


@needs_simplejpeg
def test_damaged_files_come_to_the_same(tmp_path, monkeypatch):
    """Bytes changed, lost and added, in the header and in the pixels."""
    draw = np.random.default_rng(0)
    for number in range(200):
        data = bytearray(encoded(picture(24, 40, seed=number), progressive=number % 3 == 0))
        for place in draw.integers(2, len(data) if number % 2 else 200, draw.integers(1, 4)):
            kind, count = draw.integers(3), int(draw.integers(1, 9))
            data[place : place + (0 if kind == 0 else count)] = b"" if kind == 1 else draw.bytes(count)
        (tmp_path / "damaged.jpg").write_bytes(data)
        assert_agree(monkeypatch, tmp_path / "damaged.jpg")


@pytest.mark.parametrize("installed", [pytest.param(True, marks=needs_simplejpeg), False])
@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("endian", ["<", ">"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_as_pillow_turns_them(installed, channels, endian, orientation, tmp_path, monkeypatch):
    if not installed:
        monkeypatch.setattr(jpeg, "simplejpeg", None)
    exif = Image.Exif()
    exif.endian = endian
    exif[ORIENTATION] = orientation
    (tmp_path / "a.jpg").write_bytes(encoded(picture(17, 33, channels), exif=exif))
    expected = np.array(ImageOps.exif_transpose(Image.open(tmp_path / "a.jpg")).convert("RGB"))
    for wanted in (None, 3):
        found = read_image(tmp_path / "a.jpg", wanted).permute(1, 2, 0)
        assert np.array_equal(np.broadcast_to(found, expected.shape), expected)
    assert found.is_contiguous() and image_size(tmp_path / "a.jpg") == (17, 33)
