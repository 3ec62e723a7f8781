"""A linear classifier chosen among many, by a part of the training images: no test label has a say.

Axes: n rows to train on, h rows held out to choose by, m test images, D features, C classes.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from common import counter
from common.bar import Watch, silent
from common.evaluate.draws import draw_labels
from common.evaluate.linear import fit, predict
from common.evaluate.result import Result, Setting, accuracy, top1
from common.evaluate.rows import Problems, Rows, placed
from common.measuring.heads import NORMS, Group, Norm, Scaling, train
from common.measuring.stored import Stored

HELD_OUT = "10%"                    # of each class
Weights = tuple[Tensor, Tensor]     # [1, D, C] and [1, 1, C]


class Part(NamedTuple):
    """Rows of features, all layers side by side; of each the image, which view of it, and the class."""

    x_nD: Tensor
    image_n: Tensor
    view_n: Tensor
    label_n: Tensor

    def where(self, wanted_n: Tensor) -> "Part":
        return self if wanted_n.all() else Part(*(column[wanted_n] for column in self))


class Data(NamedTuple):
    """What classifiers are trained, chosen and tested on. ``fit_n``: of a row to train on, that its image is not held
    out to choose by. ``held`` and ``test`` are as the evaluation sees them, ``train`` perhaps augmented."""

    train: Part
    fit_n: Tensor
    held: Part
    test: Part
    protocol: dict[str, Setting]

    @classmethod
    def of(cls, stored: Stored, train_labels: Tensor, test_labels: Tensor | None) -> "Data":
        """``stored`` with the labels of all images, and a fixed tenth of each class to choose by.

        Without labelled test images, a fifth of the others is tested on, as in ``Features.with_test``. Raises
        ValueError where so few are labelled that none is left to train on.
        """
        plain = Part(stored.train_nD, stored.train_image_n, torch.zeros_like(stored.train_image_n),
                     train_labels[stored.train_image_n])
        rows = plain if not len(stored.crop_nD) else Part(stored.crop_nD, stored.crop_image_n, stored.crop_view_n,
                                                          train_labels[stored.crop_image_n])
        split: dict[str, Setting] = {}
        if test_labels is not None and len(stored.test_mD):
            test = Part(stored.test_mD, stored.test_image_m, torch.zeros_like(stored.test_image_m),
                        test_labels[stored.test_image_m])
        else:
            order_n = counter.permutation(len(plain.x_nD), counter.stream("held out"))
            images = plain.image_n[order_n[:max(1, len(order_n) // 5)]]
            test = plain.where(torch.isin(plain.image_n, images))
            plain, rows = (part.where(~torch.isin(part.image_n, images)) for part in (plain, rows))
            split = {"split": "fifth-held-out"}
        held = plain.where(_held_out(plain.label_n))
        fit_n = ~torch.isin(rows.image_n, held.image_n)
        if not fit_n.any():
            raise ValueError(f"data: {len(plain.x_nD)} labelled images to train on, and a tenth of each class, at "
                             "least one, is held out to choose by: none is left. Give more images.")
        return cls(rows, fit_n, held, test, split | {"train": len(plain.x_nD), "test": len(test.x_nD)})

    def on(self, device: torch.device) -> "Data":
        """With the features on ``device``, if they leave room there; else they travel some rows at a time."""
        train, held, test = (part._replace(x_nD=placed(part.x_nD, device))
                             for part in (self.train, self.held, self.test))
        return self._replace(train=train, held=held, test=test)

    @property
    def num_classes(self) -> int:
        return int(torch.cat([part.label_n for part in (self.train, self.held, self.test)]).max()) + 1

    def indices(self, every: bool) -> list[Tensor]:
        """Rows to train on, view by view: all, or those not held out."""
        wanted_n = self.fit_n | every
        return [((self.train.view_n == view) & wanted_n).nonzero()[:, 0] for view in self.train.view_n.unique()]


def _held_out(label_n: Tensor) -> Tensor:
    held_n = torch.zeros(len(label_n), dtype=torch.bool)
    held_n[draw_labels(label_n, HELD_OUT, counter.stream("chosen by"))] = True
    return held_n


class Head(NamedTuple):
    """The settings of one classifier."""

    layer: str
    norm: Norm
    settings: Mapping[str, float]

    def text(self) -> str:
        return " ".join([self.layer, self.norm, *(f"{name}={value:g}" for name, value in self.settings.items())])


class Inputs:
    """A layer's features as heads of one norm take them; the scaling is learned once, from the rows to train on."""

    def __init__(self, data: Data, width: Mapping[str, int], device: torch.device, one_length: bool):
        self.data, self.device, self.one_length = data, device, one_length
        ends = list(itertools.accumulate(width.values()))
        self.columns = {layer: slice(end - width[layer], end) for layer, end in zip(width, ends)}
        self._scalings: dict[tuple[str, Norm], Scaling] = {}

    def rows(self, head: Head, part: Part) -> Rows:
        x_nD = part.x_nD[:, self.columns[head.layer]]
        if (head.layer, head.norm) not in self._scalings:
            own = Rows(self.data.train.x_nD[:, self.columns[head.layer]], device=self.device)
            self._scalings[head.layer, head.norm] = Scaling.of(head.norm, own, self.one_length)
        return self._scalings[head.layer, head.norm].rows(x_nD, self.device)

    def predict(self, head: Head, part: Part, weights: Weights) -> Tensor:
        return predict(self.rows(head, part), *weights)[0]


class Classifiers(Protocol):
    """A way to train linear classifiers, and the settings to try."""

    protocol: dict[str, Setting]
    one_length: bool                    # of their input, see Scaling

    def heads(self, layers: Sequence[str]) -> list[Head]: ...

    def fit(self, heads: Sequence[Head], inputs: Inputs, indices: Sequence[Tensor]) -> list[Weights]: ...


class Grid:
    """SGD with every learning rate, weight decay, layer and norm, all at once.

    ``epochs`` passes over the training images, or as many more as it takes to make ``min_steps``.
    """

    one_length = True

    def __init__(self, lr: Sequence[float] = (3, 10, 30, 100), decay: Sequence[float] = (0, 1e-5), epochs: int = 20,
                 batch_size: int = 512, min_steps: int = 1000, watch: Watch = silent):
        self.settings = [{"lr": rate, "wd": weight} for rate, weight in itertools.product(lr, decay)]
        self.epochs, self.batch_size, self.min_steps, self.watch = epochs, batch_size, min_steps, watch
        self.protocol: dict[str, Setting] = {"fast": "grid", "epochs": epochs, "batch": batch_size,
                                             "min_steps": min_steps}

    def heads(self, layers: Sequence[str]) -> list[Head]:
        return [Head(*head) for head in itertools.product(layers, NORMS, self.settings)]

    def fit(self, heads: Sequence[Head], inputs: Inputs, indices: Sequence[Tensor]) -> list[Weights]:
        kinds = {head[:2]: [other for other in heads if other[:2] == head[:2]] for head in heads}
        groups = [Group(inputs.rows(some[0], inputs.data.train), torch.tensor([head.settings["lr"] for head in some]),
                        torch.tensor([head.settings["wd"] for head in some])) for some in kinds.values()]
        epochs = max(self.epochs, -(-self.min_steps // -(-len(indices[0]) // self.batch_size)))
        found = train(groups, inputs.data.train.label_n, indices, inputs.data.num_classes, epochs, self.batch_size,
                      self.watch)
        weights = {kind: iter(zip(*(x.split(1) for x in of_kind))) for kind, of_kind in zip(kinds, found)}
        return [next(weights[head[:2]]) for head in heads]


class Logistic:
    """Multinomial logistic regression by L-BFGS on standardised features, with every l2 and layer."""

    one_length = False

    def __init__(self, l2: Sequence[float] = (1e-2, 1e-3, 1e-4), max_iter: int = 50, watch: Watch = silent):
        self.l2, self.max_iter, self.watch = sorted(l2, reverse=True), max_iter, watch
        self.protocol: dict[str, Setting] = {"fast": "logistic", "max_iter": max_iter}

    def heads(self, layers: Sequence[str]) -> list[Head]:
        return [Head(layer, "standardised", {"l2": l2}) for layer in layers for l2 in self.l2]

    def fit(self, heads: Sequence[Head], inputs: Inputs, indices: Sequence[Tensor]) -> list[Weights]:
        index_1n = torch.cat(list(indices))[None]
        found: list[Weights] = []
        start, layer = None, ""
        for head in self.watch(heads, len(heads), "logistic regressions"):
            if head.layer != layer:
                problems = Problems(inputs.rows(head, inputs.data.train), inputs.data.train.label_n, index_1n)
                start, layer = None, head.layer
            start = fit(problems, inputs.data.num_classes, head.settings["l2"], self.max_iter, start)   # the next l2's
            found.append(start)
        return found


class Found(NamedTuple):
    """The result of the head that won; all heads with their accuracy in percent on what was held out, best first."""

    result: Result
    ranking: list[tuple[Head, float]]


def search(classifiers: Classifiers, data: Data, width: Mapping[str, int], views: int, device: torch.device,
           layer: str | None = None) -> Found:
    """Train all heads without the held-out images, choose the best on these, train it once more on all, and test it.

    ``layer``: of this one alone. The first of equals wins. The test images are looked at once, after that.
    """
    data = data.on(device)
    inputs = Inputs(data, width, device, classifiers.one_length)
    layers = [layer] if layer else list(width)
    heads = classifiers.heads(layers)
    fitted = classifiers.fit(heads, inputs, data.indices(every=False))
    held = [top1(inputs.predict(head, data.held, weights), data.held.label_n) for head, weights in zip(heads, fitted)]
    ranking = sorted(zip(heads, held), key=lambda pair: -pair[1])
    best = ranking[0][0]
    weights, = classifiers.fit([best], inputs, data.indices(every=True))
    protocol = {"layer": best.layer, **classifiers.protocol, "views": views, "heads": len(heads),
                "layers": "+".join(layers), "chosen_by": f"{HELD_OUT} of train", "refit": "all of train",
                "won": best.text(), **data.protocol}
    predicted_m = inputs.predict(best, data.test, weights)
    return Found(accuracy("linear", predicted_m, data.test.label_n, protocol), ranking)
