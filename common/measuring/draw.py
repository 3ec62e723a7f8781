"""``evaluate.py draw A B ...``: the features of runs whose head has two, class by class, a panel for each run.

Axes: B images of a batch, c channels, S pixels of a side, m test images.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from common import distributed
from common.config import Config, ConfigError
from common.measuring import features_picture
from common.measuring.classify import measure, tested
from common.measuring.features_picture import Cloud
from common.measuring.shared import add_command, collected, epoch, is_override
from common.trained import Trained, load_trained

NOT_SAID = ("run.dir",)                 # in a title: it differs anyhow


def add(parsers: Any) -> None:
    parser = add_command(parsers, "draw", "a picture of the test images' features, of heads of two dimensions", run,
                         check, overrides=False)
    parser.add_argument("runs", nargs="+", metavar="A B ...", help="runs or checkpoints whose encoder has dim: 2; "
                        "section.key=value changes the config of all")
    parser.add_argument("--picture", type=Path, default=Path("features.png"), metavar="FILE.png",
                        help="where it is drawn (%(default)s)")
    parser.add_argument("--images", type=int, default=2000, metavar="N",
                        help="how many of the test images are drawn, evenly spread (%(default)s)")
    parser.add_argument("--epoch", default="last", type=epoch, metavar="last | best | N",
                        help="which checkpoint of each run's folder (%(default)s)")


def check(options: argparse.Namespace) -> None:
    if options.images < 1:
        raise ValueError(f"--images: {options.images} given. Give 1 or more.")


def run(options: argparse.Namespace) -> None:
    words = [word for word in options.runs if not is_override(word)]
    overrides = [*options.overrides, *filter(is_override, options.runs)]
    runs = [load_trained(word, overrides, options.trust, data=options.data, epoch=options.epoch) for word in words]
    for trained in runs:
        _check_dimension(trained)
    clouds = [_cloud(trained, title) for trained, title in zip(runs, titles(runs), strict=True)]
    if distributed.is_main():
        features_picture.draw(options.picture, clouds, options.images)
        print(f"drawn: {options.picture}")


@torch.no_grad()
def _cloud(trained: Trained, title: str) -> Cloud:
    images = tested(trained, trained.splits())
    has_classifier = trained.method.logits(_blank(trained)) is not None
    below = f"accuracy {measure(trained, images).value:.1f} %" if has_classifier else ""
    x_mD, row_m = collected(trained, images, trained.encoder.project, "features")
    if bad := distributed.from_main(int((~x_mD.isfinite()).any(dim=1).sum())):
        raise ConfigError(f"{trained.path}: the features of {bad} of {len(images)} images are not finite: its weights "
                          "or statistics are broken. Go back to an older checkpoint.")
    return Cloud(x_mD, images.labels[row_m], images.classes, title, below)


@torch.no_grad()
def _check_dimension(trained: Trained) -> None:
    """Raises ConfigError for a head that a plane cannot show, before an image is read."""
    trained.check_layer("head")
    if (dim := trained.encoder.project(_blank(trained)).shape[1]) != 2:
        raise ConfigError(f"{trained.path}: its head gives {dim} features, and a picture shows 2. Train with "
                          "method.encoder.dim=2.")


def _blank(trained: Trained) -> torch.Tensor:
    return torch.zeros(1, trained.facts["channels"], trained.views.size, trained.views.size, device=trained.device)


def titles(runs: Sequence[Trained]) -> list[str]:
    """What of each run's config is not the same in all, or its folder's name where nothing is."""
    settings = [leaves(trained.recorded or trained.config) for trained in runs]
    keys = [key for key in dict.fromkeys(key for leaf in settings for key in leaf)
            if key not in NOT_SAID and len({str(leaf.get(key)) for leaf in settings}) > 1]
    return [", ".join(f"{key.rpartition('.')[2]} {leaf.get(key)}" for key in keys) or trained.folder.name
            for trained, leaf in zip(runs, settings, strict=True)]


def leaves(config: Config) -> dict[str, Any]:
    """``section.key`` -> value, down to what is no section."""
    def below(tree: dict[str, Any], where: str) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in tree.items():
            found |= below(value, f"{where}{key}.") if isinstance(value, dict) else {f"{where}{key}": value}
        return found
    return below(config.tree, "")
