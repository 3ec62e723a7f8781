"""``tools/verify.py`` on single images: two compared with each other, or each with one subject.

Axes: n and i images, m images in question, D features.
"""

import argparse
import json
from typing import Any

from torch import Tensor

from common import distributed
from common.config import ConfigError
from common.data.datasets import Images
from common.evaluate.subject import Normal, probability
from common.evaluate.verification import scores
from common.measuring import records
from common.measuring.pair_list import given
from common.measuring.verifying import embedded, loaded
from common.printable import printable
from common.trained import Trained


def compare(options: argparse.Namespace) -> None:
    """Two image files: how alike they are and, with a threshold, whether they are called the same."""
    trained = loaded(options)
    images = given(options.image, trained.facts["channels"])
    x_nD, row_n = embedded(trained, images, options.layer)
    if not distributed.is_main():
        return
    x_nD = _all_read(x_nD, row_n, images)
    similarity, distance = (scores(x_nD[:1], x_nD[1:], kind).item() for kind in ("cosine", "euclidean"))
    print(f"similarity {similarity:.4f} (cosine), distance {-distance:.4g} (Euclidean), features of the "
          f"{options.layer}")
    threshold, source = (options.threshold, "given") if options.threshold is not None else _recorded(trained, options)
    if threshold is None:
        print("same or different: no threshold is known. Give --threshold, or choose one first: verify.py --pairs.")
        return
    value = similarity if options.measure == "cosine" else distance
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


def _recorded(trained: Trained, options: argparse.Namespace) -> tuple[float | None, str]:
    """The threshold that was last found for these weights, layer and measure: the best, or that for ``--far``."""
    path = options.results or trained.folder / records.FILE
    far = options.far[0] if options.far_given else None
    wanted = "verification" if far is None else "TAR"
    found, weights = None, trained.sha256()
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        record = _read(line)
        protocol = record.get("protocol", {})
        if (record.get("metric"), record.get("weights"), record.get("layer")) == (wanted, weights, options.layer) and \
                (protocol.get("measure"), protocol.get("far")) == (options.measure, far):
            found = record.get("threshold")
    return found, f"of {path}" + ("" if far is None else f", FAR <= {far:g}")


def _read(line: str) -> dict[str, Any]:
    """A record; nothing of a line that a full disk cut off."""
    try:
        record = json.loads(line)
    except ValueError:
        return {}
    return record if isinstance(record, dict) else {}


def _all_read(x_nD: Tensor, row_n: Tensor, images: Images) -> Tensor:
    if missing := sorted(set(range(len(images))) - set(row_n.tolist())):
        raise ConfigError(f"--image: {printable(images.path(missing[0]))} cannot be read. tools/check_data.py says "
                          "why.")
    return x_nD[row_n.argsort()]
