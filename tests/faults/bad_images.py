"""Images of every kind that goes wrong somewhere, made on the spot, each with what has to become of it.

``LOADS``: name -> (how to make it, the pixels that must come out, how far each may be off).
``REFUSED``: name -> (how to make it, a piece of the reason).
``UNDETECTABLE``: damage that no decoder can see; what must come out is an image or a reason, and nothing else.

A maker is called with the path and makes the file (or what stands there instead of one).
"""

import io
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

Maker = Callable[[Path], object]
H, W = 48, 64
SAME = {"quality": 95, "subsampling": 0}
_ORIENTATION = 0x0112


def smooth(height: int = H, width: int = W) -> np.ndarray:
    """uint8 [height, width, 3], different in every corner and smooth, so that lossy formats change little."""
    y, x = np.mgrid[:height, :width]
    planes = [40 + 200 * x // width, 20 + 200 * y // height, 220 - 90 * x // width - 90 * y // height]
    return np.stack(planes, -1).astype(np.uint8)


PICTURE = smooth()
RGB = Image.fromarray(PICTURE)
GREY = PICTURE[..., :1]
ALPHA = np.broadcast_to(255 - 3 * np.arange(W)[:, None], (H, W, 1)).astype(np.uint8)


def on_white(pixels: np.ndarray) -> np.ndarray:
    return np.rint(pixels * (ALPHA / 255) + 255 * (1 - ALPHA / 255)).astype(np.uint8)


def encoded(form: str, image: Image.Image = RGB, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def holds(data: bytes) -> Maker:
    return lambda path: path.write_bytes(data)


def noisy(height: int = 200, width: int = 300) -> Image.Image:
    """Large enough that a cut falls into the pixels."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *chunks: bytes, depth: int = 8, colour: int = 2) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + b"".join(chunks) + chunk(b"IEND", b"")


def interlaced(rows: bytes) -> bytes:
    """PNG of 2 x 2 pixels, in the passes of Adam7."""
    data = png(2, 2, chunk(b"IDAT", zlib.compress(rows)))
    header = struct.pack(">IIBBBB", 2, 2, 8, 2, 0, 0)
    return data.replace(chunk(b"IHDR", header + b"\0"), chunk(b"IHDR", header + b"\1"))


def jpeg_of_size(width: int, height: int) -> bytes:
    data = encoded("JPEG", **SAME)
    start = data.index(b"\xff\xc0") + 5
    return data[:start] + struct.pack(">HH", height, width) + data[start + 4:]


def tiff(tags: dict[int, tuple[int, int, int]], data: bytes = b"") -> bytes:
    """Little-endian; ``tags``: number -> (type, count, value or offset); ``data`` starts at byte 8."""
    start = 8 + len(data) + len(data) % 2
    entries = b"".join(struct.pack("<HHII", number, *tag) for number, tag in sorted(tags.items()))
    return b"II*\0" + struct.pack("<I", start) + data.ljust(start - 8, b"\0") + struct.pack("<H", len(tags)) + entries \
        + bytes(4)


def tiff_of_size(width: int, height: int, **more: tuple[int, int, int]) -> bytes:
    tags = {256: (4, 1, width), 257: (4, 1, height), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 273: (4, 1, 8),
            277: (3, 1, 1), 278: (4, 1, height), 279: (4, 1, 100)}
    return tiff({**tags, **{int(number[1:]): tag for number, tag in more.items()}}, bytes(100))


def tiled_tiff() -> bytes:
    """Grey, 64 x 48 in tiles of 16 x 16."""
    tiles = GREY[..., 0].reshape(H // 16, 16, W // 16, 16).swapaxes(1, 2).reshape(-1, 256)
    count, offsets = len(tiles), 8 + tiles.size
    table = struct.pack(f"<{count}I", *(8 + 256 * i for i in range(count))) + struct.pack("<I", 256) * count
    return tiff({256: (4, 1, W), 257: (4, 1, H), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1), 277: (3, 1, 1),
                 322: (3, 1, 16), 323: (3, 1, 16), 324: (4, count, offsets), 325: (4, count, offsets + 4 * count)},
                tiles.tobytes() + table)


def bmp(width: int, height: int, rows: bytes = b"") -> bytes:
    """24 bits; a negative height stands the picture on its head."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, len(rows), 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(rows), 0, 0, 54) + header + rows


def gif(width: int, height: int, frame: tuple[int, int] | None = None) -> bytes:
    """A screen of that size and a frame of one pixel, or one that claims to be of size ``frame``."""
    screen = struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(3) + b"\xff" * 3
    return b"GIF89a" + screen + b"," + struct.pack("<HHHHB", 0, 0, *(frame or (1, 1)), 0) + b"\x02\x02L\x01\0;"


def webp(width: int, height: int) -> bytes:
    """An animation's header and nothing that would fill it."""
    body = b"WEBPVP8X" + struct.pack("<IB3x", 10, 2) + (width - 1).to_bytes(3, "little") + \
        (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", len(body)) + body


def npy(shape: str, descr: str = "|u1", data: bytes = b"") -> bytes:
    header = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode().ljust(117) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + data


def saved_array(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def turned(orientation: object) -> Image.Exif:
    exif = Image.Exif()
    exif[_ORIENTATION] = orientation
    return exif


def upright(orientation: int) -> np.ndarray:
    image = RGB.copy()
    image.getexif()[_ORIENTATION] = orientation
    return np.array(ImageOps.exif_transpose(image))


def described() -> PngImagePlugin.PngInfo:
    text = PngImagePlugin.PngInfo()
    text.add_text("Comment", "\x1b[31m<script>alert(1)</script>", zip=True)
    return text


def link_to(data: bytes) -> Maker:
    """A link to a file beside it that holds ``data``."""
    def make(path: Path) -> None:
        (path.parent / "elsewhere").mkdir(exist_ok=True)
        (path.parent / "elsewhere" / path.name).write_bytes(data)
        path.symlink_to(Path("elsewhere") / path.name)
    return make


def bound_socket(path: Path) -> None:
    here = os.getcwd()
    os.chdir(path.parent)                       # a socket's whole path must be short
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(path.name)
    os.chdir(here)


def sparse(header: bytes, size: int) -> Maker:
    """A file that claims ``size`` bytes and holds next to none."""
    def make(path: Path) -> None:
        path.write_bytes(header)
        os.truncate(path, size)
    return make


PALETTE = RGB.quantize(64)
FRAMES = {"save_all": True, "append_images": [Image.new("RGB", (W, H), "red")], "duration": 10}
DEEP = np.linspace(0, 65535, H * W).reshape(H, W).astype(np.uint16)
BLACK_END, GREY_END = (np.concatenate([PICTURE[:-16], np.full((16, W, 3), value, np.uint8)]) for value in (0, 128))
HALF_SEEN = Image.fromarray(np.concatenate([PICTURE, ALPHA], -1))
PLAIN_JPEG, PLAIN_PNG, PLAIN_WEBP = encoded("JPEG", **SAME), encoded("PNG"), encoded("WEBP", lossless=True)


def first_is_white() -> tuple[bytes, np.ndarray]:
    """A palette of which the first colour is transparent."""
    pixels = np.array(PALETTE.convert("RGB"))
    pixels[np.array(PALETTE) == 0] = 255
    return encoded("PNG", PALETTE, transparency=0), pixels


TRANSPARENT, TRANSPARENT_PIXELS = first_is_white()

LOADS: dict[str, tuple[Maker, np.ndarray, int]] = {
    "plain.jpg": (holds(PLAIN_JPEG), PICTURE, 8),
    "progressive.jpg": (holds(encoded("JPEG", progressive=True, **SAME)), PICTURE, 8),
    "restarts.jpg": (holds(encoded("JPEG", restart_marker_blocks=3, **SAME)), PICTURE, 8),
    "cmyk.jpg": (holds(encoded("JPEG", RGB.convert("CMYK"), **SAME)), PICTURE, 10),
    "grey.jpg": (holds(encoded("JPEG", Image.fromarray(GREY[..., 0]), **SAME)), GREY, 8),
    "profile.jpg": (holds(encoded("JPEG", icc_profile=ImageCms.ImageCmsProfile(
        ImageCms.createProfile("sRGB")).tobytes(), **SAME)), PICTURE, 8),
    "comment.jpg": (holds(encoded("JPEG", comment=b"\x1b]0;owned\x07" * 500, **SAME)), PICTURE, 8),
    "garbage_after.jpg": (holds(PLAIN_JPEG + bytes(range(256)) * 20), PICTURE, 8),
    "twice.jpg": (holds(PLAIN_JPEG * 2), PICTURE, 8),
    "two_pictures.jpg": (holds(encoded("MPO", save_all=True, append_images=[RGB.transpose(0)], **SAME)), PICTURE, 8),
    "corrupt_exif.jpg": (holds(encoded("JPEG", exif=b"Exif\0\0not a TIFF header", **SAME)), PICTURE, 8),
    "cut_exif.jpg": (holds(encoded("JPEG", exif=turned(6).tobytes()[:16], **SAME)), PICTURE, 8),
    "endless_exif.jpg": (holds(encoded("JPEG", exif=b"Exif\0\0" + tiff({_ORIENTATION: (3, 2**31, 0)}), **SAME)),
                         PICTURE, 8),
    "no_such_orientation.jpg": (holds(encoded("JPEG", exif=turned(9), **SAME)), PICTURE, 8),
    "orientation_is_text.jpg": (holds(encoded("JPEG", exif=b"Exif\0\0" + tiff({_ORIENTATION: (2, 2, 0x36)}), **SAME)),
                                PICTURE, 8),
    **{f"orientation_{i}.jpg": (holds(encoded("JPEG", exif=turned(i), **SAME)), upright(i), 8) for i in range(1, 9)},
    "plain.png": (holds(PLAIN_PNG), PICTURE, 0),
    "interlaced.png": (holds(interlaced(b"\0\x01\x02\x03" + b"\0\x04\x05\x06" + b"\0\x07\x08\x09\x0a\x0b\x0c")),
                       np.array([[[1, 2, 3], [4, 5, 6]], [[7, 8, 9], [10, 11, 12]]], np.uint8), 0),
    "palette.png": (holds(encoded("PNG", PALETTE)), np.array(PALETTE.convert("RGB")), 0),
    "transparent_palette.png": (holds(TRANSPARENT), TRANSPARENT_PIXELS, 0),
    "grey.png": (holds(encoded("PNG", Image.fromarray(GREY[..., 0]))), GREY, 0),
    "grey_alpha.png": (holds(encoded("PNG", Image.fromarray(np.concatenate([GREY, ALPHA], -1), "LA"))),
                       on_white(GREY), 1),
    "alpha.png": (holds(encoded("PNG", HALF_SEEN)), on_white(PICTURE), 1),
    "one_bit.png": (holds(encoded("PNG", Image.fromarray(GREY[..., 0] > 128))), (GREY > 128) * np.uint8(255), 0),
    "two_bits.png": (holds(png(4, 1, chunk(b"IDAT", zlib.compress(b"\0\x1b")), depth=2, colour=0)),
                     np.array([[[0], [85], [170], [255]]], np.uint8), 0),
    "sixteen_bits.png": (holds(encoded("PNG", Image.fromarray(DEEP))), np.rint(DEEP / 257)[..., None], 0),
    "sixteen_bits_colour.png": (holds(png(2, 1, chunk(b"IDAT", zlib.compress(
        b"\0" + struct.pack(">6H", 0, 32896, 65535, 257, 25700, 51400))), depth=16)),
        np.array([[[0, 128, 255], [1, 100, 200]]], np.uint8), 0),
    "text.png": (holds(encoded("PNG", pnginfo=described())), PICTURE, 0),
    "animated.png": (holds(encoded("PNG", **FRAMES)), PICTURE, 0),
    "garbage_after.png": (holds(PLAIN_PNG + b"more" * 500), PICTURE, 0),
    "one_pixel.png": (holds(encoded("PNG", Image.new("RGB", (1, 1), (9, 8, 7)))), np.array([[[9, 8, 7]]]), 0),
    "one_pixel.jpg": (holds(encoded("JPEG", Image.new("RGB", (1, 1), (90, 90, 90)), **SAME)),
                      np.full((1, 1, 3), 90), 2),
    "tall.png": (holds(encoded("PNG", Image.fromarray(smooth(5000, 1)))), smooth(5000, 1), 0),
    "wide.jpg": (holds(encoded("JPEG", Image.fromarray(smooth(1, 5000)), **SAME)), smooth(1, 5000), 10),
    "cut_after_the_pixels.png": (holds(PLAIN_PNG[:-20]), PICTURE, 0),
    "black_end.png": (holds(encoded("PNG", Image.fromarray(BLACK_END))), BLACK_END, 0),
    "grey_end.jpg": (holds(encoded("JPEG", Image.fromarray(GREY_END), **SAME)), GREY_END, 8),
    "png_named.jpg": (holds(PLAIN_PNG), PICTURE, 0),
    "jpeg_named.png": (holds(PLAIN_JPEG), PICTURE, 8),
    "webp_named.jpeg": (holds(PLAIN_WEBP), PICTURE, 0),
    "gif_named.png": (holds(encoded("GIF", PALETTE)), np.array(PALETTE.convert("RGB")), 0),
    "UPPER.JPG": (holds(PLAIN_JPEG), PICTURE, 8),
    "animated.gif": (holds(encoded("GIF", PALETTE, save_all=True, append_images=[PALETTE.transpose(0)])),
                     np.array(PALETTE.convert("RGB")), 0),
    "cut_after_the_first_frame.gif": (holds(encoded(
        "GIF", PALETTE, save_all=True, append_images=[PALETTE.transpose(0)])[:-400]), np.array(PALETTE.convert("RGB")),
        0),
    "animated.webp": (holds(encoded("WEBP", lossless=True, **FRAMES)), PICTURE, 0),
    "lossy.webp": (holds(encoded("WEBP", quality=95)), PICTURE, 30),
    "alpha.webp": (holds(encoded("WEBP", HALF_SEEN, lossless=True, exact=True)), on_white(PICTURE), 1),
    "plain.bmp": (holds(encoded("BMP")), PICTURE, 0),
    "palette.bmp": (holds(encoded("BMP", PALETTE)), np.array(PALETTE.convert("RGB")), 0),
    "top_down.bmp": (holds(bmp(W, -H, PICTURE[..., ::-1].tobytes())), PICTURE, 0),
    "lzw.tif": (holds(encoded("TIFF", compression="tiff_lzw")), PICTURE, 0),
    "deflate.tif": (holds(encoded("TIFF", compression="tiff_adobe_deflate")), PICTURE, 0),
    "jpeg.tif": (holds(encoded("TIFF", compression="jpeg", quality=95)), PICTURE, 40),
    "fax.tif": (holds(encoded("TIFF", Image.fromarray(GREY[..., 0] > 128), compression="group4")),
                (GREY > 128) * np.uint8(255), 0),
    "tiled.tif": (holds(tiled_tiff()), GREY, 0),
    "cmyk.tif": (holds(encoded("TIFF", RGB.convert("CMYK"))), PICTURE, 0),
    "pages.tiff": (holds(encoded("TIFF", save_all=True, append_images=[RGB.transpose(0)])), PICTURE, 0),
    "sixteen_bits.tif": (holds(encoded("TIFF", Image.fromarray(DEEP))), np.rint(DEEP / 257)[..., None], 0),
    "floats.tif": (holds(encoded("TIFF", Image.fromarray((GREY[..., 0] / 255).astype(np.float32)))), GREY, 0),
    "strange_tag.tif": (holds(encoded("TIFF", Image.fromarray(GREY[..., 0]))), GREY, 0),
    "plain.ppm": (holds(encoded("PPM")), PICTURE, 0),
    "in_words.ppm": (holds(b"P3 # comment\n2 1 255\n1 2 3 4 5 6\n"), np.array([[[1, 2, 3], [4, 5, 6]]]), 0),
    "rows_first.npy": (holds(saved_array(PICTURE)), PICTURE, 0),
    "channels_first.npy": (holds(saved_array(np.ascontiguousarray(PICTURE.transpose(2, 0, 1)))), PICTURE, 0),
    "columns_first.npy": (holds(saved_array(np.asfortranarray(PICTURE))), PICTURE, 0),
    "grey.npy": (holds(saved_array(GREY[..., 0])), GREY, 0),
    "link.png": (link_to(PLAIN_PNG), PICTURE, 0),
    "caf\udce9.png": (holds(PLAIN_PNG), PICTURE, 0),
    "日本語 ünï.png": (holds(PLAIN_PNG), PICTURE, 0),
    "line\nbreak\x1b[31m.png": (holds(PLAIN_PNG), PICTURE, 0),
    "<script>alert(1)<\u202egnp.png": (holds(PLAIN_PNG), PICTURE, 0),
    "-rf $(id) %s {0}.png": (holds(PLAIN_PNG), PICTURE, 0),
    "x" * 251 + ".png": (holds(PLAIN_PNG), PICTURE, 0),
}

NOISY_JPEG, NOISY_PNG = encoded("JPEG", noisy()), encoded("PNG", noisy())
NOISY_GREY = encoded("JPEG", noisy().convert("L"))
PROGRESSIVE = encoded("JPEG", noisy(), progressive=True)
SCANS = [i for i in range(len(PROGRESSIVE)) if PROGRESSIVE.startswith(b"\xff\xda", i)]
UNKNOWN = "no image in a known format"
CUT = "truncated"

def ended_early_gif() -> bytes:
    """The first three blocks of the pixels, and then a proper end."""
    data = encoded("GIF", noisy().quantize(64))
    here = data.index(b",", 13 + 3 * 64) + 11
    for _ in range(3):
        here += 1 + data[here]
    return data[:here] + b"\0;"


def middle_zeroed(data: bytes) -> bytes:
    return data[:1000] + bytes(len(data) // 2) + data[1000 + len(data) // 2:]


REFUSED: dict[str, tuple[Maker, str]] = {
    "empty.jpg": (holds(b""), UNKNOWN),
    "one_byte.png": (holds(b"\x89"), UNKNOWN),
    "zeros.jpg": (holds(bytes(5000)), UNKNOWN),
    "random.jpg": (holds(np.random.default_rng(0).bytes(5000)), UNKNOWN),
    "text.jpg": (holds(b"not a picture\n" * 100), UNKNOWN),
    "page.png": (holds(b"<!DOCTYPE html><html><script>alert(1)</script>404</html>"), UNKNOWN),
    "drawing.png": (holds(b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'), UNKNOWN),
    "script.jpg": (holds(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"), UNKNOWN),
    "document.jpg": (holds(b"%PDF-1.4\n%%EOF\n"), UNKNOWN),
    "archive.jpg": (holds(b"PK\x03\x04" + bytes(300)), UNKNOWN),
    "icon.png": (holds(encoded("ICO")), UNKNOWN),                       # an image, but of no format of ours
    "pointer.jpg": (holds(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"), UNKNOWN),
    "only_start.jpg": (holds(NOISY_JPEG[:2]), ""),
    "cut_in_tables.jpg": (holds(NOISY_JPEG[:100]), ""),
    "cut_in_size.jpg": (holds(NOISY_JPEG[:NOISY_JPEG.index(b"\xff\xc0") + 6]), ""),
    "cut_before_pixels.jpg": (holds(NOISY_JPEG[:NOISY_JPEG.index(b"\xff\xda") + 14]), CUT),
    "cut_in_half.jpg": (holds(NOISY_JPEG[:len(NOISY_JPEG) // 2]), CUT),
    "cut_by_10.jpg": (holds(NOISY_JPEG[:-10]), CUT),
    "first_scan_only.jpg": (holds(PROGRESSIVE[:SCANS[1]]), CUT),
    "half_of_the_scans.jpg": (holds(PROGRESSIVE[:SCANS[len(SCANS) // 2] + 40]), CUT),
    "ended_early.jpg": (holds(NOISY_JPEG[:len(NOISY_JPEG) // 2] + b"\xff\xd9"), CUT),
    "grey_ended_early.jpg": (holds(NOISY_GREY[:len(NOISY_GREY) // 2] + b"\xff\xd9"), CUT),
    "no_scans.jpg": (holds(NOISY_JPEG[:NOISY_JPEG.index(b"\xff\xda")] + b"\xff\xd9"), "cannot load"),
    "cut_in_exif.jpg": (holds(encoded("JPEG", exif=turned(6))[:30]), ""),
    "cut_in_header.png": (holds(NOISY_PNG[:20]), ""),
    "cut_in_half.png": (holds(NOISY_PNG[:len(NOISY_PNG) // 2]), CUT),
    "no_pixels.png": (holds(png(W, H)), ""),
    "too_few_rows.png": (holds(png(W, H, chunk(b"IDAT", zlib.compress(bytes((3 * W + 1) * 20))))), CUT),
    "too_few_rows_interlaced.png": (holds(interlaced(b"\0\x01\x02\x03" + b"\0\x04\x05\x06")), CUT),
    "bad_checksum.png": (holds(NOISY_PNG[:29] + b"\0\0\0\0" + NOISY_PNG[33:]), ""),
    "bad_deflate.png": (holds(png(W, H, chunk(b"IDAT", b"x\x9c" + b"\xff" * 500))), ""),
    "zero_wide.png": (holds(png(0, 5, chunk(b"IDAT", zlib.compress(b"")))), ""),
    "no_palette.png": (holds(png(2, 1, chunk(b"IDAT", zlib.compress(b"\0\0\1")), colour=3)[:60]), ""),
    "cut.gif": (holds(encoded("GIF", noisy().quantize(64))[:-2000]), CUT),
    "ended_early.gif": (holds(ended_early_gif()), CUT),
    "header_only.gif": (holds(encoded("GIF", PALETTE)[:13]), ""),
    "no_frames.gif": (holds(encoded("GIF", PALETTE)[:13] + b";"), ""),
    "cut.bmp": (holds(encoded("BMP")[:-3000]), CUT),
    "header_only.bmp": (holds(encoded("BMP")[:54]), CUT),
    "cut.webp": (holds(PLAIN_WEBP[:-30]), ""),
    "header_only.webp": (holds(PLAIN_WEBP[:30]), ""),
    "cut.tif": (holds(tiff({256: (4, 1, W), 257: (4, 1, H), 258: (3, 1, 8), 259: (3, 1, 1), 262: (3, 1, 1),
                            273: (4, 1, 10**6), 277: (3, 1, 1), 278: (4, 1, H), 279: (4, 1, W * H)})), CUT),
    "cut_lzw.tif": (holds(encoded("TIFF", noisy(), compression="tiff_lzw")[:-90000]), ""),
    "zeroed_lzw.tif": (holds(middle_zeroed(encoded("TIFF", noisy(), compression="tiff_lzw"))), "decoder error"),
    "zeroed_deflate.tif": (holds(middle_zeroed(encoded("TIFF", noisy(), compression="tiff_adobe_deflate"))),
                           "decoder error"),
    "no_directory.tif": (holds(b"II*\0\xff\xff\0\0"), ""),
    "circle.tif": (holds(b"II*\0\x08\0\0\0\0\0\x08\0\0\0"), ""),
    "out_of_range_floats.tif": (holds(encoded("TIFF", Image.fromarray(np.full((H, W), 300, np.float32)))),
                                "0..1 or 0..255"),
    "nan.tif": (holds(encoded("TIFF", Image.fromarray(np.full((H, W), np.nan, np.float32)))), "0..1 or 0..255"),
    "cut.ppm": (holds(encoded("PPM")[:-100]), CUT),
    "no_size.ppm": (holds(b"P6\n"), ""),
    "cut.npy": (holds(npy("(20, 20)", data=bytes(30))), "promises 400 bytes of pixels, and 30 are there"),
    "header_only.npy": (holds(npy("(20, 20)")[:20]), ""),
    "pickle.npy": (holds(npy("(2, 2)", "|O", b"cos\nsystem\n(S'true'\ntR.")), "holds object"),
    "float.npy": (holds(npy("(2, 2)", "<f4", bytes(16))), "holds float32"),
    "empty.npy": (holds(npy("(0, 2)")), "holds uint8 [0, 2]"),
    "five_channels.npy": (holds(saved_array(np.zeros((H, W, 5), np.uint8))), "has 5 channels, not 3"),
    "code.npy": (holds(npy("__import__('os').abort()")), ""),
    "picture_named.npy": (holds(PLAIN_PNG), ""),
    "directory.jpg": (Path.mkdir, "Is a directory"),
    "pipe.jpg": (os.mkfifo, "not a regular file"),
    "socket.jpg": (bound_socket, "No such device"),
    "device.jpg": (lambda path: path.symlink_to("/dev/zero"), "not a regular file"),
    "dangling.jpg": (lambda path: path.symlink_to("gone.jpg"), "No such file"),
    "circle.jpg": (lambda path: path.symlink_to(path.name), "symbolic links"),
    "vanished.jpg": (lambda path: None, "No such file"),
}

TEXT = zlib.compress(bytes(50_000_000))
BOMBS: dict[str, Maker] = {
    "wide.png": holds(png(20_000, 20_000, chunk(b"IDAT", zlib.compress(bytes(60_001 * 50))))),
    "widest.png": holds(png(2**31 - 1, 2**31 - 1)),
    "text.png": holds(png(9, 9, chunk(b"zTXt", b"Comment\0\0" + TEXT))),
    "profile.png": holds(png(9, 9, chunk(b"iCCP", b"sRGB\0\0" + TEXT))),
    "long_text.png": holds(png(9, 9, chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + TEXT))),
    "wide.jpg": holds(jpeg_of_size(65_500, 65_500)),
    "just_too_wide.jpg": holds(jpeg_of_size(8_001, 8_000)),
    "wide.webp": holds(webp(2**24, 2**7)),
    "animated.webp": holds(webp(16_383, 16_383)),
    "screen.gif": holds(gif(65_535, 65_535)),
    "frame.gif": holds(gif(1, 1, frame=(65_535, 65_535))),
    "wide.tif": holds(tiff_of_size(2**31, 2**31)),
    "wide_but_small.tif": holds(tiff_of_size(60_000, 60_000)),
    "many_samples.tif": holds(tiff_of_size(10, 10, _258=(3, 2**31 - 1, 8), _277=(3, 1, 65_535))),
    "wide.bmp": holds(bmp(2**31 - 1, 2**31 - 1)),
    "on_its_head.bmp": holds(bmp(30_000, -30_000)),
    "wide.ppm": holds(b"P6\n1000000000 1000000000\n255\n"),
    "long_number.ppm": holds(b"P6\n" + b"9" * 100_000),
    "wide.npy": holds(npy("(100000, 100000, 3)")),
    "deep.npy": holds(npy("(3, 3, 10000000000000)")),
    "long_header.npy": holds(b"\x93NUMPY\x02\x00" + struct.pack("<I", 50_000_000) + b"(" * 50_000_000),
    "sparse.npy": sparse(npy("(100000, 100000, 3)"), 3 * 10**10 + 128),
}


def flipped(data: bytes, seed: int, count: int = 20, start: int = 0) -> bytes:
    """``count`` bits changed, after the first ``start`` bytes."""
    draw, changed = np.random.default_rng(seed), bytearray(data)
    for place in draw.integers(start, len(data), count):
        changed[place] ^= 1 << int(draw.integers(8))
    return bytes(changed)


def zeroed(data: bytes, seed: int, count: int = 512) -> bytes:
    start = int(np.random.default_rng(seed).integers(len(data) // 4, len(data) - count))
    return data[:start] + bytes(count) + data[start + count:]


UNDETECTABLE: dict[str, Maker] = {
    "flipped.jpg": holds(flipped(NOISY_JPEG, 1)),
    "flipped_pixels.jpg": holds(flipped(NOISY_JPEG, 2, start=700)),
    "zeroed.jpg": holds(zeroed(NOISY_JPEG, 3)),
    "half_of_the_scans_ended.jpg": (holds(PROGRESSIVE[:SCANS[len(SCANS) // 2] + 40] + b"\xff\xd9")),
    "flipped.webp": holds(flipped(encoded("WEBP", noisy()), 4, start=200)),
    "flipped.bmp": holds(flipped(encoded("BMP"), 5, start=100)),
    "flipped.ppm": holds(flipped(encoded("PPM"), 6, start=100)),
    "flipped.npy": holds(flipped(saved_array(PICTURE), 7, start=200)),
    "flipped_lzw.tif": holds(flipped(encoded("TIFF", noisy(), compression="tiff_lzw"), 8, start=300)),
    "strips_swapped.jpg": holds(NOISY_JPEG[:5000] + NOISY_JPEG[9000:12000] + NOISY_JPEG[5000:9000]
                                + NOISY_JPEG[12000:]),
    "no_end_marker.png": holds(NOISY_PNG[:-12]),
}
