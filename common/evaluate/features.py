"""What an encoder makes of each labelled image, once: the probes share these features and never touch a pixel.

Axes: B images of a batch, n training and m test images, D features, c colour channels, S side in pixels.
"""

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from common import counter, distributed
from common.bar import Watch, silent
from common.batchnorm import average_running_statistics
from common.data.augment import chosen
from common.data.datasets import Images, Splits
from common.data.loader import Report, plain_batches
from common.data.views import Views
from common.data.workers import PLAIN_CARE, Care
from common.encoder import Encoder

CPU = torch.device("cpu")
PIXEL_SIDE = 32         # larger images are averaged down to this before their raw pixels count as features
BLOCK = 4096            # rows that travel between processes at a time
HELD = 1 << 28          # bytes of features that a device gathers before the host waits for them


class Features(NamedTuple):
    """Features and classes of the labelled images, float32 and int64 on the CPU."""

    train_nD: Tensor
    train_label_n: Tensor
    test_mD: Tensor | None          # None where no test image has a label
    test_label_m: Tensor | None
    layer: str                      # "backbone", "head", "pixels"
    neighbours: str = ""            # "bank" where the training images' are those that the method keeps of them

    @property
    def num_classes(self) -> int:
        """One more than the largest label of either split: a class may be missing from one of them."""
        labels = [label for label in (self.train_label_n, self.test_label_m) if label is not None]
        return int(torch.cat(labels).max()) + 1

    def with_test(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Training features and labels, test features and labels.

        Without labelled test images a fifth of the training images is held out, always the same ones.
        """
        if self.test_mD is not None and self.test_label_m is not None:
            return self.train_nD, self.train_label_n, self.test_mD, self.test_label_m
        train_n, test_m = held_out(len(self.train_nD))
        return self.train_nD[train_n], self.train_label_n[train_n], self.train_nD[test_m], self.train_label_n[test_m]


def held_out(n: int) -> tuple[Tensor, Tensor]:
    """Which of ``n`` labelled images are trained on, and which fifth is tested on where there are no test images."""
    test_m, train_n = counter.permutation(n, counter.stream("held out")).tensor_split([max(1, n // 5)])
    return train_n, test_m


def extract(encoder: Encoder, splits: Splits, views: Views, *, layer: Literal["backbone", "head"] = "backbone",
            batch_size: int = 256, workers: int = 0, device: torch.device = CPU, report: Report | None = None,
            care: Care = PLAIN_CARE, watch: Watch = silent) -> Features | None:
    """Features of each labelled image under the evaluation transform: the backbone's, or the head's.

    Called by all processes together: each embeds its share, the main one gets the result, the others None. The
    encoder, already on ``device``, is left as it was found: modes, buffers, random numbers. Images that cannot be read
    are left out and passed to ``report``. Raises ValueError where fewer than two training images have a label, and
    where a feature is not finite.
    """
    embed = {"backbone": encoder.backbone, "head": encoder}[layer]
    with evaluating(encoder):
        return _features(embed, layer, splits, views, batch_size, workers, device, report, care, watch=watch)


def beside_bank(encoder: Encoder, bank_nC: Tensor, splits: Splits, views: Views, *, batch_size: int = 256,
                workers: int = 0, device: torch.device = CPU, report: Report | None = None,
                care: Care = PLAIN_CARE) -> Features | None:
    """The head's features of the test images, and the rows of ``bank_nC`` as those of all training images, in order.

    No training image is embedded: each has the feature of when it was last seen, under the views of the training.
    Called and answered like ``extract``. Training images that are known to be unreadable are left out.
    """
    with evaluating(encoder):
        return _features(encoder, "head", splits, views, batch_size, workers, device, report, care, bank_nC)


def pixels(splits: Splits, views: Views, *, batch_size: int = 256, workers: int = 0,
           device: torch.device = CPU, report: Report | None = None, care: Care = PLAIN_CARE,
           watch: Watch = silent) -> Features | None:
    """The images themselves as features, c * S * S wide (S at most 32): what any encoder has to beat.

    Normalised by the recipe's mean and standard deviation of each channel. Called and answered like ``extract``.
    """
    return _features(flat, "pixels", splits, views, batch_size, workers, device, report, care, watch=watch)


@torch.no_grad()
def untrained(encoder: Encoder, batches: Iterable[Tensor], num_batches: int = 20) -> Encoder:
    """A copy of an encoder that has not learned yet, with the BatchNorm statistics of its first ``num_batches``.

    Without them BatchNorm would pass features on as they come, and the baseline would be weaker than it is. Each of
    ``batches`` is this process's share of a batch, [B, c, S, S] on the encoder's device, best in random order. The
    copy is for measuring: it is in evaluation mode.
    """
    encoder = copy.deepcopy(encoder).eval()
    norms = [module for module in encoder.modules() if isinstance(module, _BatchNorm)]
    for norm in norms:
        norm.train()
    for done, x_BcSS in enumerate(itertools.islice(batches, num_batches)):
        for norm in norms:
            norm.momentum = 1 / (done + 1)          # the plain mean over batches
        encoder(x_BcSS)
    average_running_statistics(encoder)
    return encoder.eval()


@contextlib.contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; afterwards each part is in the mode it was found in, which need not be one for all."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _features(embed: Callable[[Tensor], Tensor], layer: str, splits: Splits, views: Views, batch_size: int,
              workers: int, device: torch.device, report: Report | None, care: Care,
              bank_nC: Tensor | None = None, watch: Watch = silent) -> Features | None:
    train, test = splits
    check_labelled(train)

    def rows(images: Images) -> tuple[Tensor, Tensor]:
        batches = plain_batches(images, views, batch_size, workers, device, report=report, care=care)
        share = -(-len(images) // batch_size // distributed.world())
        x_nD, index_n = collect(embed, images, watch(batches, share, f"features of {images.name}"), device)
        return x_nD, images.labels[index_n]

    train_nD, train_label_n = rows(train) if bank_nC is None else _rows_of(bank_nC, train)
    test_mD, test_label_m = rows(test) if test is not None and (test.labels >= 0).any() else (None, None)
    if not distributed.is_main():
        return None
    features = Features(train_nD, train_label_n, test_mD, test_label_m, layer, "" if bank_nC is None else "bank")
    _check_finite(features)
    return features


def check_labelled(train: Images) -> None:
    """Raises ValueError where there are too few labels to measure by."""
    if (labelled := int((train.labels >= 0).sum())) < 2:
        raise ValueError(f"data: {labelled} of the {len(train)} training images of {train.name} have a label; kNN and "
                         "linear probes need at least 2. Give labelled data, or leave evaluate.protocols empty.")


@torch.no_grad()
def collect(embed: Callable[[Tensor], Tensor], images: Images, batches: Iterable[tuple[Tensor, Tensor]],
            device: torch.device, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Features and numbers of the labelled images of ``batches`` (numbers [B] on the CPU, views [B, c, S, S]), in their
    order, rank by rank. Called by all processes; complete in the main one only."""
    indices = [torch.empty(0, dtype=torch.int64)]

    def found() -> Iterator[Tensor]:
        for index_B, x_BcSS in batches:
            known_B = images.labels[index_B] >= 0
            if known_B.any():
                indices.append(index_B[known_B])
                yield embed(x_BcSS if known_B.all() else x_BcSS.index_select(0, chosen(known_B, device))).to(dtype)

    with torch.autocast(device.type, enabled=False):
        xs = list(_on_host(found()))
    width = max(distributed.gather_objects(xs[-1].shape[1] if xs else 0))       # a process may have had no image
    return (_to_main(torch.cat(xs) if xs else torch.empty(0, width, dtype=dtype), device),
            _to_main(torch.cat(indices), device))


def _on_host(parts: Iterable[Tensor]) -> Iterator[Tensor]:
    """The rows of all parts on the CPU. They stay on the device until they are ``HELD`` bytes: only then is it waited
    for, and not at every batch."""
    held: list[Tensor] = []
    for part in parts:
        held.append(part)
        if sum(x.nbytes for x in held) >= HELD:
            yield torch.cat(held).cpu()
            held = []
    if held:
        yield torch.cat(held).cpu()


def _rows_of(bank_nC: Tensor, images: Images) -> tuple[Tensor, Tensor]:
    """The bank's rows and the labels of the labelled images that can be read."""
    known_n = images.labels >= 0
    known_n[list(images.bad)] = False
    return bank_nC.detach().float().cpu()[known_n], images.labels[known_n]


def _to_main(x_n: Tensor, device: torch.device) -> Tensor:
    """The rows of all ranks in rank order, on the CPU of the main process; ranks may hold different numbers."""
    if distributed.world() == 1:
        return x_n
    counts = distributed.gather_objects(len(x_n))
    parts: list[list[Tensor]] = [[] for _ in counts]
    for start in range(0, max(counts), BLOCK):
        mine = x_n[start:start + BLOCK]
        block = torch.cat([mine, mine.new_zeros(BLOCK - len(mine), *mine.shape[1:])])
        blocks = distributed.gather(block.to(device))
        if distributed.is_main():
            for part, count, rows in zip(parts, counts, blocks.cpu().split(BLOCK), strict=True):
                part.append(rows[:max(0, count - start)])
    return torch.cat(list(itertools.chain(*parts))) if distributed.is_main() else x_n


def flat(x_BcSS: Tensor) -> Tensor:
    """Raw pixels in one row for each image, of a side of at most ``PIXEL_SIDE``."""
    if max(x_BcSS.shape[-2:]) > PIXEL_SIDE:
        x_BcSS = F.adaptive_avg_pool2d(x_BcSS, PIXEL_SIDE)
    return x_BcSS.flatten(1)


def _check_finite(features: Features) -> None:
    for name, x_nD in (("training", features.train_nD), ("test", features.test_mD)):
        if x_nD is not None and (bad := int((~x_nD.isfinite()).any(dim=1).sum())):
            raise ValueError(f"evaluate: the {features.layer} features of {bad} of {len(x_nD)} {name} images are not "
                             "finite: the encoder's weights or statistics are broken. Go back to an older checkpoint.")
