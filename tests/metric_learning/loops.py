"""Plain loops over what a method compares: the images of a batch, and behind them those of a memory."""

import math

import torch

from common.method import Batch

LABELS = [0] * 4 + [3] * 4 + [7] * 4 + [9] * 4 + [4] * 4 + [12, -1, -1, -1]         # of 24 images: gaps, one alone
IMAGES = torch.randn(24, 2, 5, 5, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
PAIRS = [0, 1, 5, 4, 8, 20, 14, 15, 2, 3]       # two pairs of class 0, one whose labels differ
EARLIER = [[6, 7, 9, 11, 12, 13, 0, 2], [16, 17, 21, 22, 1, 3, 18, 10], [4, 8, 19, 15, 23, 5]]


def batch(index, views=1):
    """These of the 24 images, each view moved a little."""
    index_B = torch.tensor(index)
    return Batch([IMAGES[index_B] + 0.1 * view for view in range(views)], index_B, torch.tensor(LABELS)[index_B])


def remember(method, earlier=EARLIER, views=1):
    """Steps of the past, with the encoder that there was."""
    for index in earlier:
        given = batch(index, views)
        method.after_step([given], [method(given)], 0.5)
        with torch.no_grad():
            for parameter in method.encoder.parameters():
                parameter.mul_(1.1)


def past(method):
    """(feature, label, image) of each entry of the memory that is filled, the oldest first or not."""
    memory = method.dictionary
    if memory is None:
        return []
    entries = zip(memory.keys.clone(), memory.label.tolist(), memory.image.tolist(), strict=True)
    return [entry for entry in entries if entry[2] >= 0]


def compared(i, x, given, memory=(), columns=None):
    """Features of the positives and of the negatives of image ``i``: those among ``columns``, and the memory's."""
    image, label = given.index.tolist(), given.label.tolist()
    there = [(x[j], label[j], None) for j in (range(len(x)) if columns is None else columns) if j != i]
    known = [entry for entry in [*there, *memory] if entry[1] != -1 != label[i]]
    return ([z for z, of, whose in known if of == label[i] and whose != image[i]],
            [z for z, of, _ in known if of != label[i]])


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a.tolist(), b.tolist(), strict=True))


def euclidean(a, b):
    return math.sqrt(math.fsum((x - y) ** 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)))


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values) if values else 0.0


def gradient(method, given):
    """The loss, and its gradient in the encoder."""
    loss = method(given).loss
    return loss.detach(), torch.autograd.grad(loss, list(method.encoder.parameters()), allow_unused=True)


def of_head(method, given):
    """The loss as a function of the head's weight."""
    return lambda weight: torch.func.functional_call(method, {"encoder.head.weight": weight}, (given,)).loss
