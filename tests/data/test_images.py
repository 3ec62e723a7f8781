"""One file -> one uint8 tensor, against PIL's own conversions, plain arithmetic, and files broken on purpose."""

import io
import os
import pickle
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile, ImageOps

from common.data.images import SUFFIXES, UnreadableImage, as_channels, image_size, read_image

H, W = 12, 20


def smooth(channels: int = 3) -> np.ndarray:
    """[H, W, channels], different in every corner and smooth, so that JPEG changes little."""
    y, x = np.mgrid[:H, :W]
    planes = [40 + 10 * x, 20 + 15 * y, 200 - 4 * x - 6 * y, 255 - 12 * x]
    return np.stack(planes[:channels], axis=-1).astype(np.uint8)


def near(found: torch.Tensor, expected: np.ndarray, within: int) -> None:
    expected = expected if expected.ndim == 3 else expected[..., None]
    assert found.dtype == torch.uint8
    assert tuple(found.shape) == expected.transpose(2, 0, 1).shape
    assert np.abs(found.numpy().astype(int) - expected.transpose(2, 0, 1).astype(int)).max() <= within


@pytest.mark.parametrize("suffix", [s for s in SUFFIXES if s != ".npy"])
@pytest.mark.parametrize("upper", [False, True])
def test_every_format_is_read(tmp_path, suffix, upper):
    path = tmp_path / ("picture" + (suffix.upper() if upper else suffix))
    Image.fromarray(smooth()).save(path, **({"quality": 95, "subsampling": 0} if "jp" in suffix else {}))
    lossy = {".jpg": 6, ".jpeg": 6, ".webp": 30, ".gif": 60}
    near(read_image(path), smooth(), within=lossy.get(suffix, 0))
    assert image_size(path) == (H, W)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif", ".webp"])
def test_exif_orientation_is_applied(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.fromarray(smooth())
    options = {"quality": 95, "subsampling": 0} if suffix == ".jpg" else {}
    image.save(tmp_path / f"turned{suffix}", exif=exif, **options)
    image.getexif()[0x0112] = orientation
    near(read_image(tmp_path / f"turned{suffix}"), np.array(ImageOps.exif_transpose(image)),
         within={".jpg": 6, ".webp": 30}.get(suffix, 0))


def test_damaged_exif_does_not_cost_the_picture(tmp_path):
    Image.fromarray(smooth()).save(tmp_path / "a.jpg", exif=b"Exif\0\0not a TIFF header", quality=95, subsampling=0)
    near(read_image(tmp_path / "a.jpg"), smooth(), within=6)


def test_palette_cmyk_one_bit_and_grey(tmp_path):
    colour = Image.fromarray(smooth())
    palette = colour.quantize(64)
    palette.save(tmp_path / "palette.png")
    near(read_image(tmp_path / "palette.png"), np.array(palette.convert("RGB")), 0)
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95, subsampling=0)
    near(read_image(tmp_path / "cmyk.jpg"), smooth(), 8)
    bits = smooth(1)[..., 0] > 128
    Image.fromarray(bits).save(tmp_path / "bits.png")
    near(read_image(tmp_path / "bits.png", channels=None), bits * 255, 0)
    grey = smooth(1)[..., 0]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    near(read_image(tmp_path / "grey.png", channels=None), grey, 0)
    near(read_image(tmp_path / "grey.png"), np.repeat(grey[..., None], 3, -1), 0)


def test_alpha_is_composited_on_white(tmp_path):
    rgba = smooth(4)
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    alpha = rgba[..., 3:] / 255
    near(read_image(tmp_path / "rgba.png"), np.rint(rgba[..., :3] * alpha + 255 * (1 - alpha)), 1)
    la = rgba[..., [0, 3]]
    Image.fromarray(la, mode="LA").save(tmp_path / "la.png")
    near(read_image(tmp_path / "la.png", channels=None), np.rint(la[..., :1] * alpha + 255 * (1 - alpha)), 1)


@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_a_transparent_colour_turns_white(tmp_path, mode):
    image = Image.new(mode, (2, 1), 0)
    image.putpixel((1, 0), {"L": 7, "RGB": (7, 7, 7), "P": 7}[mode])
    if mode == "P":
        image.putpalette([0] * 21 + [7, 7, 7] + [0] * 744)
    image.save(tmp_path / "a.png", transparency={"L": 0, "RGB": (0, 0, 0), "P": 0}[mode])
    assert read_image(tmp_path / "a.png")[:, 0].tolist() == [[255, 7]] * 3


@pytest.mark.parametrize("suffix", [".png", ".tif", ".ppm"])
def test_sixteen_bits_are_scaled_not_cut(tmp_path, suffix):
    values = np.linspace(0, 65535, H * W).reshape(H, W).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / f"deep{suffix}")
    near(read_image(tmp_path / f"deep{suffix}", channels=1), np.rint(values / 257), 0)


@pytest.mark.parametrize("full", [1, 255])
def test_float_images_are_scaled(tmp_path, full):
    values = np.linspace(0, full, H * W, dtype=np.float32).reshape(H, W)
    Image.fromarray(values).save(tmp_path / "float.tif")
    near(read_image(tmp_path / "float.tif", channels=1), np.rint(values * (255 / full)), 0)


@pytest.mark.parametrize("value", [np.nan, -0.5, 300.0])
def test_floats_of_unknown_scale_are_refused(tmp_path, value):
    values = np.full((H, W), 0.5, np.float32)
    values[0, 0] = value
    Image.fromarray(values).save(tmp_path / "float.tif")
    with pytest.raises(UnreadableImage, match="0..1 or 0..255"):
        read_image(tmp_path / "float.tif")


def test_the_first_of_several_frames_is_read(tmp_path):
    frames = [Image.new("L", (W, H), value) for value in (10, 200)]
    for suffix in (".gif", ".tif"):
        frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:])
        assert read_image(tmp_path / f"a{suffix}").unique().tolist() == [10]


@pytest.mark.parametrize("shape, channels, expected", [
    ((H, W), None, (1, H, W)),
    ((H, W, 5), None, (5, H, W)),
    ((5, H, W), None, (5, H, W)),
    ((5, H, W), 5, (5, H, W)),
    ((8, 9, 12), 12, (12, 8, 9)),           # told, although the first axis is shorter
    ((3, 4, 3), 3, (3, 3, 4)),              # cannot be told: channels last, as PIL and most writers have it
])
def test_npy_axes(tmp_path, shape, channels, expected):
    array = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    np.save(tmp_path / "a.npy", array)
    image = read_image(tmp_path / "a.npy", channels=channels)
    assert tuple(image.shape) == expected and image_size(tmp_path / "a.npy") == image_size_of(array)
    found = image.permute(1, 2, 0) if array.ndim == 3 and array.shape != expected else image.reshape(shape)
    assert (found.numpy() == array).all()


def image_size_of(array: np.ndarray) -> tuple[int, ...]:
    sides = list(array.shape)
    if array.ndim == 3:
        sides.pop(0 if sides[0] < sides[2] else 2)
    return tuple(sides)


def test_grey_from_colour_is_pils(tmp_path):
    colour = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(colour).save(tmp_path / "a.png")
    near(read_image(tmp_path / "a.png", channels=1), np.array(Image.fromarray(colour).convert("L")), 0)


@pytest.mark.parametrize("found, wanted", [(5, 3), (1, 2), (3, 4)])
def test_other_numbers_of_channels_are_not_made_up(found, wanted):
    with pytest.raises(ValueError, match=f"has {found} channels, not {wanted}"):
        as_channels(torch.zeros(found, 4, 4, dtype=torch.uint8), wanted)


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(smooth()).save(buffer, "JPEG")
    return buffer.getvalue()


def png_that_claims(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def jpeg_that_claims(width: int, height: int) -> bytes:
    data = jpeg()
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4:]


def npy_that_claims(shape: str, descr: str = "|u1") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


BROKEN = {
    "empty.jpg": (b"", "no image in a known format"),
    "zeros.png": (bytes(500), "no image in a known format"),
    "page.jpg": (b"<html>not found</html>", "no image in a known format"),
    "cut.jpg": (jpeg()[:-60], "truncated"),
    "head.jpg": (jpeg()[:30], ""),
    "cut.png": (png_that_claims(W, H), ""),
    "script.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "no image in a known format"),
    "wide.png": (png_that_claims(20_000, 20_000), "pixels"),
    "wide.jpg": (jpeg_that_claims(65_500, 65_500), "pixels"),
    "over.jpg": (jpeg_that_claims(8_001, 8_000), "8001 x 8000 pixels by its header, more than max_pixels = 64,000,000"),
    "empty.npy": (b"", ""),
    "huge.npy": (npy_that_claims("(100000, 100000, 3)"), ""),
    "pickle.npy": (npy_that_claims("(2, 2)", "|O") + pickle.dumps([1] * 4), ""),
    "short.npy": (npy_that_claims("(20, 20)") + bytes(30), ""),
    "float.npy": (npy_that_claims("(2, 2)", "<f4") + bytes(16), "holds float32"),
    "none.npy": (npy_that_claims("(0, 2)"), ""),
}


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_with_a_reason(tmp_path, name):
    data, reason = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UnreadableImage) as caught:
        read_image(tmp_path / name)
    assert reason in str(caught.value) and str(caught.value)
    assert caught.value.path == str(tmp_path / name)


def test_pixels_are_counted_before_they_are_decoded(tmp_path, monkeypatch):
    Image.fromarray(smooth()).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", smooth())
    for name in ("a.png", "a.npy"):
        assert read_image(tmp_path / name, max_pixels=H * W).shape == (3, H, W)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda self: pytest.fail("decoded"))
    for name in ("a.png", "a.npy"):
        with pytest.raises(UnreadableImage, match="max_pixels"):
            read_image(tmp_path / name, max_pixels=H * W - 1)


def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")                # opening it would wait for ever
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone.jpg")
    for name, reason in {"pipe.jpg": "not a regular file", "folder.jpg": "Is a directory",
                         "link.jpg": "No such file", "never.npy": "No such file"}.items():
        for read in (read_image, image_size):
            with pytest.raises(UnreadableImage, match=reason):
                read(tmp_path / name)


def test_names_that_are_not_utf8_are_read(tmp_path):
    path = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")
    Image.fromarray(smooth()).save(path)
    near(read_image(path), smooth(), 0)


def test_the_error_survives_the_way_from_a_worker():
    error = pickle.loads(pickle.dumps(UnreadableImage("a/b.jpg", "truncated")))
    assert (error.path, str(error)) == ("a/b.jpg", "truncated")
