"""A recipe of views, bound to a size and a normalisation: what turns an image into V views.

Axes: B images, V views, c channels, H W pixels of an image, S pixels of a view's side, R uniform draws.

Two roads lead to a batch of views, with the same boxes and the same parameters. ``from_memory`` starts from images
that lie in memory, all of one size. ``crop`` is for a worker that has read one image, ``finish`` for the process that
collects a batch of crops. Nothing here holds a random state: every draw is a function of (seed, epoch, image, view).
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from common import counter
from common.data.augment import Op, Parameters, to_device
from common.data.fused import Fused
from common.data.geometry import RandomResizedCrop, centre, crop_resize, cut

# Values of float32 views that are worked on at a time. On a CPU 4 MB, so that what an operation wrote is still in the
# cache; elsewhere 256 MiB, which bounds the memory: crop and operations hold about six tensors of that size.
PART, PART_ON_DEVICE = 2**20, 2**26


class View(NamedTuple):
    """How one view is made: a crop, then operations in their order."""

    crop: RandomResizedCrop
    ops: tuple[Op, ...]


class Views:
    """V views of ``size`` x ``size`` pixels, normalised by ``mean`` and ``std`` (of 0..1 values, one per channel).

    A kind of operation occurs at most once in a view, since its draws and its parameters go by its name.
    """

    def __init__(self, size: int, views: Sequence[View], mean: Sequence[float], std: Sequence[float]) -> None:
        if size < 1:
            raise ValueError(f"views.size is {size}; a view has at least one pixel.")
        if len(mean) != len(std) or min(std) <= 0:
            raise ValueError(f"views.mean is {mean} and std {std}; give one of each per channel, std above 0.")
        self.size = size
        self.views = tuple(views)
        self.mean, self.std = tuple(mean), tuple(std)
        self._fused = [Fused(view.ops, self.mean, self.std) for view in self.views]
        self._keys = [_keys([view.crop, *view.ops]) for view in self.views]

    @property
    def num_views(self) -> int:
        return len(self.views)

    def __repr__(self) -> str:
        lines = [f"view {v + 1}: " + " -> ".join(map(str, (view.crop, *view.ops))) for v, view in enumerate(self.views)]
        return "\n".join([*lines, f"size {self.size}, mean {self.mean}, std {self.std}"])

    def boxes(self, seed: int, epoch: int, index_B: Tensor, view: int, height: int, width: int) -> Parameters:
        """The crops of images of ``height`` x ``width`` pixels: ``top left height width``, int64 [B] each."""
        crop = self.views[view].crop
        return crop.draw(self._uniform(seed, epoch, index_B, view)[: crop.num_draws], height, width)

    def parameters(self, seed: int, epoch: int, index_B: Tensor, view: int) -> dict[str, Parameters]:
        """What each operation after the crop does to each image, by the operation's name; all on the CPU."""
        return self._parameters(self._uniform(seed, epoch, index_B, view), view)

    def _uniform(self, seed: int, epoch: int, index_B: Tensor, view: int) -> Tensor:
        """All that is random in a view: [R, B], first what the crop needs, then each operation."""
        return counter.uniform(seed, epoch, index_B.cpu(), view, self._keys[view])

    def _parameters(self, u_RB: Tensor, view: int) -> dict[str, Parameters]:
        crop, ops = self.views[view]
        shares = u_RB[crop.num_draws :].split([op.num_draws for op in ops])
        return {type(op).__name__: op.draw(share_RB) for op, share_RB in zip(ops, shares)}

    def from_memory(self, images_BcHW: Tensor, seed: int, epoch: int, index_B: Tensor) -> list[Tensor]:
        """V views [B, c, S, S], normalised float32, of uint8 images of one size, on the images' device."""
        views = []
        for view, (crop, _) in enumerate(self.views):
            u_RB = self._uniform(seed, epoch, index_B, view)
            box = crop.draw(u_RB[: crop.num_draws], *images_BcHW.shape[-2:])
            parameters = self._parameters(u_RB, view)
            out_BcSS = torch.empty(*images_BcHW.shape[:2], self.size, self.size, device=images_BcHW.device)
            for rows in _parts(out_BcSS):
                crop_BcSS = crop_resize(images_BcHW[rows], _rows(box, rows), self.size)
                self._finish(crop_BcSS, view, parameters, rows, out_BcSS)
            views.append(out_BcSS)
        return views

    def crop(self, image_cHW: Tensor, seed: int, epoch: int, index: int, view: int) -> Tensor:
        """The crop of one uint8 image, uint8 [c, S, S]; for a worker, on the CPU."""
        return self._crop(image_cHW, self.shares(seed, epoch, torch.tensor([index]))[0][view], view)

    def crops(self, image_cHW: Tensor, shares_V: Sequence[Sequence[float]], out_VcSS: Tensor) -> None:
        """``crop`` for every view, with the image's row of ``shares``."""
        for view, (shares_R, out_cSS) in enumerate(zip(shares_V, out_VcSS)):
            out_cSS.copy_(self._crop(image_cHW, shares_R, view))

    def _crop(self, image_cHW: Tensor, shares_R: Sequence[float], view: int) -> Tensor:
        return cut(image_cHW, self.views[view].crop.box(shares_R, *image_cHW.shape[-2:]), self.size)

    def shares(self, seed: int, epoch: int, index_B: Tensor) -> list[tuple[list[float], ...]]:
        """The crops [B][V][R] of images whose sizes are not known yet (``RandomResizedCrop.shares``), all at once."""
        of_views = []
        for view, (crop, _) in enumerate(self.views):
            u_RB = counter.uniform(seed, epoch, index_B, view, self._keys[view][: crop.num_draws])
            of_views.append(crop.shares(u_RB).T.tolist())
        return list(zip(*of_views))

    def finish(self, crop_BcSS: Tensor, seed: int, epoch: int, index_B: Tensor, view: int) -> Tensor:
        """Everything after the crop: the operations of ``view``, then normalisation. uint8 or float 0..255 in."""
        parameters = self.parameters(seed, epoch, index_B, view)
        out_BcSS = torch.empty(crop_BcSS.shape, device=crop_BcSS.device)
        for rows in _parts(out_BcSS):
            part_BcSS = crop_BcSS[rows]
            part_BcSS = part_BcSS.float().clone() if part_BcSS.is_floating_point() else part_BcSS
            self._finish(part_BcSS, view, parameters, rows, out_BcSS)
        return out_BcSS

    def _finish(self, crop_BcSS: Tensor, view: int, parameters: dict[str, Parameters], rows: slice,
                out_BcSS: Tensor) -> None:
        """Fill ``rows`` of the output from the crops of those rows, uint8, or float32 that may be overwritten."""
        parameters = {name: _rows(values, rows) for name, values in parameters.items()}
        plain = partial(self._plain, self.views[view].ops)
        if crop_BcSS.device.type == "cuda" and crop_BcSS.shape[1] == len(self.mean):
            self._fused[view](crop_BcSS, parameters, out_BcSS[rows], plain)
        else:
            plain(crop_BcSS, parameters, out_BcSS[rows])

    def _plain(self, ops: Sequence[Op], x_BcSS: Tensor, parameters: dict[str, Parameters], out_BcSS: Tensor) -> None:
        x_BcSS = x_BcSS.to(torch.float32, memory_format=torch.contiguous_format)
        for op in ops:
            x_BcSS = op(x_BcSS, parameters[type(op).__name__])
        self.normalize(x_BcSS, out_BcSS)

    def evaluation(self, image_cHW: Tensor) -> Tensor:
        """The centre of one uint8 image, uint8 [c, S, S]; for a worker, on the CPU."""
        return centre(image_cHW.unsqueeze(0), self.size, self._short_side(*image_cHW.shape[-2:]))[0]

    def evaluation_batch(self, images_BcHW: Tensor) -> Tensor:
        """``evaluation`` and normalisation of uint8 images of one size, float32 [B, c, S, S], on their device."""
        images_BcHW = images_BcHW.float()
        return self.normalize(centre(images_BcHW, self.size, self._short_side(*images_BcHW.shape[-2:])))

    def _short_side(self, height: int, width: int) -> int:
        """256 / 224 of a view, as all ImageNet protocols do, but no margin for small views or images that fit."""
        return self.size if self.size < 96 or height == width == self.size else round(self.size * 256 / 224)

    def normalize(self, x_BcHW: Tensor, out_BcHW: Tensor | None = None) -> Tensor:
        """``(x / 255 - mean) / std`` of values 0..255, float32; written to ``out_BcHW`` if that is given."""
        if len(self.mean) != x_BcHW.shape[1]:
            raise ValueError(
                f"views.mean: {len(self.mean)} values are given, but the images have {x_BcHW.shape[1]} channels; "
                "give one value of mean and std for each channel."
            )
        std_c11 = torch.tensor(self.std).view(-1, 1, 1)
        scale_c11, offset_c11 = 1 / (255 * std_c11), -torch.tensor(self.mean).view(-1, 1, 1) / std_c11
        scaled_BcHW = torch.mul(x_BcHW, to_device(scale_c11, x_BcHW.device), out=out_BcHW)
        return scaled_BcHW.add_(to_device(offset_c11, x_BcHW.device))


def _parts(out_BcSS: Tensor) -> Iterator[slice]:
    """The rows that are made at a time."""
    part = PART if out_BcSS.device.type == "cpu" else PART_ON_DEVICE
    step = max(1, part // max(1, out_BcSS[:1].numel()))
    return (slice(row, row + step) for row in range(0, len(out_BcSS), step))


def _rows(parameters: Parameters, rows: slice) -> Parameters:
    return {name: value_B[rows] for name, value_B in parameters.items()}


def _keys(ops: Iterable[Op | RandomResizedCrop]) -> Tensor:
    """A key [R, 1] for each draw of each operation, from the operation's name."""
    names = [type(op).__name__ for op in ops]
    if len(set(names)) < len(names):
        raise ValueError(f"views: {names} names an operation twice; a view has at most one of each kind.")
    return torch.tensor(
        [[counter.stream(name) + (r << 32)] for name, op in zip(names, ops) for r in range(op.num_draws)],
        dtype=torch.int64,
    ).view(-1, 1)
