"""Triton kernels of ``common.data.fused``: everything between the crop and the network, in four launches at most.

Each program has one image, and BLOCK pixels of its three channels. What an image gets stands in its row of the table
that ``fused.table`` describes. Values are 0..255.
"""

import triton
import triton.language as tl

from common.data.fused import CODES, COLUMNS

_MIRRORED, _BEFORE, _PLACE, _SIGMA, _BLURRED = (tl.constexpr(column) for column in range(len(COLUMNS)))
_STEPS = tl.constexpr(len(COLUMNS))                                                     # the first step's column
_BRIGHTNESS, _CONTRAST, _SATURATION, _HUE, _GREY, _SOLARIZE = (tl.constexpr(code) for code in CODES.values())


@triton.jit
def _luma(red, green, blue):
    return 0.2989 * red + 0.587 * green + 0.114 * blue


@triton.jit
def _clip(x, high):
    return tl.minimum(tl.maximum(x, 0.0), high)


@triton.jit
def _turned(hue, value, chroma):
    return value - chroma * _clip(2 - tl.abs(6 * (hue - tl.floor(hue)) - 2), 1.0)


@triton.jit
def _hue(red, green, blue, shift):
    """As ``common.data.jitter.hue_``."""
    value = tl.maximum(tl.maximum(red, green), blue)
    chroma = value - tl.minimum(tl.minimum(red, green), blue)
    sixth = tl.where(value == red, green - blue,
                     tl.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma))
    hue = sixth / (6 * chroma + 1e-12) + (shift + 2)
    return (_turned(hue + 5 / 6, value, chroma), _turned(hue + 3 / 6, value, chroma),
            _turned(hue + 1 / 6, value, chroma))


@triton.jit
def _stepped(red, green, blue, step, num_steps, mean):
    """After ``num_steps`` steps, the first of which is at ``step``; ``mean`` is that of the luma at the contrast."""
    taken = 0
    while taken < num_steps:    # not range(): the interpreter of Triton 3.6 cannot take a bound that is loaded
        code = tl.load(step)
        value = tl.load(step + 1)
        if code == _BRIGHTNESS:
            red, green, blue = _clip(red * value, 255.0), _clip(green * value, 255.0), _clip(blue * value, 255.0)
        if (code == _CONTRAST) | (code == _SATURATION):
            rest = (1 - value) * tl.where(code == _CONTRAST, mean, _luma(red, green, blue))
            red, green, blue = (_clip(red * value + rest, 255.0), _clip(green * value + rest, 255.0),
                                _clip(blue * value + rest, 255.0))
        if code == _HUE:
            red, green, blue = _hue(red, green, blue, value)
        if code == _GREY:
            red = _luma(red, green, blue)
            green, blue = red, red
        if code == _SOLARIZE:
            red = tl.where(red < 128, red, 255 - red)
            green = tl.where(green < 128, green, 255 - green)
            blue = tl.where(blue < 128, blue, 255 - blue)
        step += 2
        taken += 1
    return red, green, blue


@triton.jit
def _loaded(x, image, pixel, num_pixels, stride_channel, stride_pixel):
    """Red, green, blue [BLOCK] of an image; 0 beyond the last pixel."""
    start = x + image * 3 * num_pixels + pixel * stride_pixel
    inside = pixel < num_pixels
    return (tl.load(start, inside, 0).to(tl.float32), tl.load(start + stride_channel, inside, 0).to(tl.float32),
            tl.load(start + 2 * stride_channel, inside, 0).to(tl.float32))


@triton.jit
def _store(x, image, pixel, num_pixels, red, green, blue):
    start = x + image * 3 * num_pixels + pixel
    inside = pixel < num_pixels
    tl.store(start, red, inside)
    tl.store(start + num_pixels, green, inside)
    tl.store(start + 2 * num_pixels, blue, inside)


@triton.jit
def _store_view(out, image, row, pixel, H, W, stride_b, stride_c, stride_h, stride_w, red, green, blue,
                scale_r, scale_g, scale_b, offset_r, offset_g, offset_b):
    """Normalised, mirrored where that is due, to [B, 3, H, W] of any strides."""
    column = pixel % W
    column = tl.where(tl.load(row + _MIRRORED) != 0, W - 1 - column, column)
    start = out + image * stride_b + (pixel // W) * stride_h + column * stride_w
    inside = pixel < H * W
    tl.store(start, red * scale_r + offset_r, inside)
    tl.store(start + stride_c, green * scale_g + offset_g, inside)
    tl.store(start + 2 * stride_c, blue * scale_b + offset_b, inside)


@triton.jit
def luma_sums(x, stride_channel, stride_pixel, table, sums, num_pixels, num_columns, num_blocks, BLOCK: tl.constexpr):
    """[B, blocks]: the luma of the pixels of each block, as it is when the contrast's turn comes."""
    image, block = tl.program_id(0), tl.program_id(1)
    row = table + image * num_columns
    before = tl.load(row + _BEFORE).to(tl.int32)
    if before >= 0:
        pixel = block * BLOCK + tl.arange(0, BLOCK)
        red, green, blue = _loaded(x, image, pixel, num_pixels, stride_channel, stride_pixel)
        red, green, blue = _stepped(red, green, blue, row + _STEPS, before, 0.0)
        luma = tl.where(pixel < num_pixels, _luma(red, green, blue), 0.0)
        tl.store(sums + image * num_blocks + block, tl.sum(luma, 0))


@triton.jit
def points(x, stride_channel, stride_pixel, table, sums, between, num_blocks, out, H, W, stride_b, stride_c,
           stride_h, stride_w, scale_r, scale_g, scale_b, offset_r, offset_g, offset_b, num_columns,
           BEFORE: tl.constexpr, AFTER: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr):
    """The BEFORE steps before the blur; then, of an image without blur, the AFTER steps after it, and the view."""
    image, block = tl.program_id(0), tl.program_id(1)
    row, num_pixels = table + image * num_columns, H * W
    pixel, number = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCKS)
    mean = tl.sum(tl.load(sums + image * num_blocks + number, number < num_blocks, 0.0), 0) / num_pixels
    red, green, blue = _loaded(x, image, pixel, num_pixels, stride_channel, stride_pixel)
    red, green, blue = _stepped(red, green, blue, row + _STEPS, BEFORE, mean)
    place = tl.load(row + _PLACE).to(tl.int32)
    if place >= 0:
        _store(between, place, pixel, num_pixels, red, green, blue)
    else:
        red, green, blue = _stepped(red, green, blue, row + _STEPS + 2 * BEFORE, AFTER, 0.0)
        _store_view(out, image, row, pixel, H, W, stride_b, stride_c, stride_h, stride_w, red, green, blue,
                    scale_r, scale_g, scale_b, offset_r, offset_g, offset_b)


@triton.jit
def _weighted(x, image, pixel, H, W, sigma, ALONG_ROWS: tl.constexpr, RADIUS: tl.constexpr):
    """The sum over the taps of a Gaussian, up to six sigmas, along one axis; the border is repeated beyond it."""
    reach = tl.minimum((sigma * 6).to(tl.int32) + 1, RADIUS)
    inside = pixel < H * W
    y, column = pixel // W, pixel % W
    total = sigma * 0.0
    red, green, blue = pixel * 0.0, pixel * 0.0, pixel * 0.0
    k = -reach
    while k <= reach:
        distance = k / sigma
        weight = tl.exp(-0.5 * distance * distance)
        if ALONG_ROWS:
            place = y * W + tl.minimum(tl.maximum(column + k, 0), W - 1)
        else:
            place = tl.minimum(tl.maximum(y + k, 0), H - 1) * W + column
        start = x + image * 3 * H * W + place
        red += weight * tl.load(start, inside, 0.0)
        green += weight * tl.load(start + H * W, inside, 0.0)
        blue += weight * tl.load(start + 2 * H * W, inside, 0.0)
        total += weight
        k += 1
    return red / total, green / total, blue / total


@triton.jit
def blur_rows(x, table, out, H, W, num_columns, RADIUS: tl.constexpr, BLOCK: tl.constexpr):
    """Along the rows, of the blurred images: [N, 3, H, W] to the same."""
    place, block = tl.program_id(0), tl.program_id(1)
    image = tl.load(table + place * num_columns + _BLURRED).to(tl.int32)
    pixel = block * BLOCK + tl.arange(0, BLOCK)
    sigma = tl.load(table + image * num_columns + _SIGMA)
    red, green, blue = _weighted(x, place, pixel, H, W, sigma, True, RADIUS)
    _store(out, place, pixel, H * W, red, green, blue)


@triton.jit
def blur_columns(x, table, out, H, W, stride_b, stride_c, stride_h, stride_w,
                 scale_r, scale_g, scale_b, offset_r, offset_g, offset_b, num_columns,
                 BEFORE: tl.constexpr, AFTER: tl.constexpr, RADIUS: tl.constexpr, BLOCK: tl.constexpr):
    """Along the columns, of the blurred images; then the steps after the blur, and the view."""
    place, block = tl.program_id(0), tl.program_id(1)
    image = tl.load(table + place * num_columns + _BLURRED).to(tl.int32)
    row, pixel = table + image * num_columns, block * BLOCK + tl.arange(0, BLOCK)
    red, green, blue = _weighted(x, place, pixel, H, W, tl.load(row + _SIGMA), False, RADIUS)
    red, green, blue = _stepped(red, green, blue, row + _STEPS + 2 * BEFORE, AFTER, 0.0)
    _store_view(out, image, row, pixel, H, W, stride_b, stride_c, stride_h, stride_w, red, green, blue,
                scale_r, scale_g, scale_b, offset_r, offset_g, offset_b)
