"""Images of some classes only, so that a network can be verified on classes that it has not seen."""

from typing import Literal

import torch

from common.data.datasets import Images, Splits
from common.data.subset import Subset
from common.printable import printable


def only_classes(of: Splits, classes: list[str], test: Literal["all", "same", "others"] = "all") -> Splits:
    """The training images of ``of`` that are of ``classes``, and the test images of all classes, of the same or of the
    others.

    Labels keep their numbers, and ``Images.classes`` all names: what a label means does not depend on what was left
    out. Images without a label are left out, but for test images of "all". Raises ValueError for a class that is not
    there, one that is named twice, a list of pairs, and where nothing would be left.
    """
    check_names(classes)
    train = of.train
    if train.together != 1:
        raise ValueError(f"of: {train.name} is a list of pairs, whose labels are no classes. Give images with classes.")
    if unknown := [name for name in classes if name not in train.classes]:
        raise ValueError(f"classes: {train.name} has no {', '.join(map(printable, unknown))}; it has "
                         f"{printable(', '.join(train.classes), 400)}.")
    seen = [train.classes.index(name) for name in classes]
    others = [label for label in range(len(train.classes)) if label not in seen]
    tested = of.test if of.test is None or test == "all" else _having(of.test, seen if test == "same" else others)
    return Splits(_having(train, seen), tested)


def check_names(classes: list[str]) -> None:
    """Raises ValueError for no classes, and for a class that is named twice."""
    if not classes:
        raise ValueError("classes: none given. Give the names of those to train on.")
    if twice := sorted({name for name in classes if classes.count(name) > 1}):
        raise ValueError(f"classes: {', '.join(map(printable, twice))} given twice. Give each once.")


def _having(images: Images, labels: list[int]) -> Subset:
    chosen_m = torch.isin(images.labels, torch.tensor(labels)).nonzero()[:, 0]
    if not len(chosen_m):
        names = ", ".join(images.classes[label] for label in labels)
        raise ValueError(f"classes: {images.name} holds no image of {printable(names) or 'other classes'}. Give "
                         "classes that it has images of.")
    return Subset(images, chosen_m)
