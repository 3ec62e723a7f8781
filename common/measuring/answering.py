"""``tools/verify.py`` on single images: two compared with each other, or each with one subject.

Axes: n and i images, m images in question, D features.
"""

import argparse
import json
import math
from typing import Any

import torch
from torch import Tensor

from common import distributed
from common.config import ConfigError
from common.data.datasets import Images
from common.evaluate.subject import Normal, probability
from common.evaluate.verification import scores
from common.measuring import records, thresholds
from common.measuring.embedding import Sides, comparing, embedded, loaded
from common.measuring.pair_list import given
from common.printable import printable
from common.trained import Trained


def compare(options: argparse.Namespace) -> None:
    """Two image files: how alike they are and, with a threshold, whether they are called the same."""
    trained = loaded(options)
    images = [given([path], trained.facts["channels"]) for path in options.image]
    rows = [embedded(trained, images[0], options.layer, 0), embedded(trained, images[1], options.layer, 1)]
    other = thresholds.validation(trained, options)
    if not distributed.is_main():
        return
    x_1D, y_1D = (_all_read(*found, of) for found, of in zip(rows, images, strict=True))
    similarity, distance = (scores(x_1D, y_1D, kind).item() for kind in ("cosine", "euclidean"))
    print(f"similarity {similarity:.4f} (cosine), distance {-distance:.4g} (Euclidean), features of the "
          f"{options.layer}")
    if options.measure == "learned":
        chance = torch.sigmoid(comparing(trained, "learned")(x_1D, y_1D)).item()
        print(f"probability {chance:.4g} of being the same (learned)")
    value = comparing(trained, options.measure)(x_1D, y_1D).item()
    threshold, source = _threshold(trained, other, options)
    if threshold is None:
        print("same or different: no threshold is known. Give --threshold, or choose one first: verify.py --pairs.")
        return
    answer = "same" if value >= threshold else "different"
    print(f"{answer}: score {value:.4f} ({options.measure}), threshold {threshold:.4f} ({source})")


def identify(options: argparse.Namespace) -> None:
    """The probability that each image is of one subject (Chopra et al. 2005, Sec. 4.1)."""
    trained = loaded(options)
    sets = [given(paths, trained.facts["channels"]) for paths in (options.subject, options.impostors, options.image)]
    found = [(*embedded(trained, images, options.layer), images) for images in sets]
    if not distributed.is_main():
        return
    (subject_nD, *_), (impostor_iD, *_), asked = found
    chance_m = probability(Normal.fit(subject_nD, options.shrinkage), impostor_iD, _all_read(*asked))
    for path, chance in zip(asked[2].keys, chance_m.tolist(), strict=True):
        print(f"{chance:<10.4g}  {printable(path)}")
    print(f"probability of being the subject of {len(subject_nD)} images, against {len(impostor_iD)} of others; "
          f"features of the {options.layer}")


def _threshold(trained: Trained, other: Sides | None, options: argparse.Namespace) -> tuple[float | None, str]:
    """That given, that chosen on the pairs of --threshold-from, or that last found; and which it is."""
    if rules := thresholds.chosen(other, comparing(trained, options.measure), options):
        rule = rules[1 if options.far_given and other is not None else 0]
        return rule.threshold, "given" if other is None else f"{rule.name} on the pairs of --threshold-from"
    return _recorded(trained, options)


def _recorded(trained: Trained, options: argparse.Namespace) -> tuple[float | None, str]:
    """The threshold that was last found for these weights, layer and measure: the best, or that for ``--far``."""
    path = options.results or trained.folder / records.FILE
    far = options.far[0] if options.far_given else None
    wanted = "verification" if far is None else "TAR"
    found, weights = None, trained.sha256()
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        record = _read(line)
        protocol = record["protocol"]
        if (record.get("metric"), record.get("weights"), record.get("layer")) == (wanted, weights, options.layer) and \
                (protocol.get("measure"), protocol.get("far")) == (options.measure, far):
            found = record.get("threshold")
    if not isinstance(found, float) or not math.isfinite(found):
        found = None
    return found, f"of {path}" + ("" if far is None else f", FAR <= {far:g}")


def _read(line: bytes) -> dict[str, Any]:
    """A record; one of nothing for a line that a full disk cut off, or that is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        record = None
    whole = isinstance(record, dict) and isinstance(record.get("protocol"), dict)
    return record if whole else {"protocol": {}}


def _all_read(x_nD: Tensor, row_n: Tensor, images: Images) -> Tensor:
    if missing := sorted(set(range(len(images))) - set(row_n.tolist())):
        raise ConfigError(f"--image: {printable(images.path(missing[0]))} cannot be read. tools/check_data.py says "
                          "why.")
    return x_nD[row_n.argsort()]
