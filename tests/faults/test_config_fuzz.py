"""Any config: either an error that names its place, before images are touched, or a step of training."""

import contextlib
import copy
import math
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from common.config import TRUSTED, Config, ConfigError
from common.run import Run
from common.sections import check_early
from common.session import Session
from tests import tiny

ENCODER = {"name": "common.backbones.encoder", "arch": "w4s1", "dim": 16}
METHODS = {"moco": {**tiny.METHODS["moco"], "encoder": ENCODER}, "instdisc": tiny.METHODS["instdisc"],
           "end to end": {"name": "moco.EndToEnd", "encoder": ENCODER, "temperature": 0.2, "bn_groups": 1}}
NAMES = ["moco.MoCo", "moco.EndToEnd", "instdisc.InstDisc", "common.dictionary.Queue", "common.dictionary.Bank",
         "common.dictionary.InBatch", "common.optim.sgd", "common.optim.adamw", "common.schedule.constant",
         "common.schedule.cosine", "common.data.digits", "common.data.recipes.instdisc", "common.data.recipes.digits",
         "common.evaluate.KNN", "common.evaluate.Linear", "common.backbones.encoder", "common.checkpoint.Folder",
         "common.run.pretrain", "common.log.Records", "os.system", "torch.optim.SGD", "moco", "", "a b", "."]
VALUES = [None, True, False, -1, 0, 1, 2, 3, 7, 48, 10**9, 10**12, 2**63, 10**30, -10**30, 0.0, -0.5, 0.3, 1.0, 1e-300,
          1e300, math.inf, -math.inf, "", "auto", "none", "0.5", "nan", "é😀", "x" * 500, "/no/such/folder", "../..",
          [], [1], [0], [-1], [10**12], [0.5, 0.5, 0.5], [0.5], [math.inf] * 3, ["a", None], {}, {"name": "moco.MoCo"},
          {"a": {"b": [1]}}, "sum", "mean", "sync", "split", "eval", "shuffle", "mlp", "small", "bf16", "head",
          "nce", "full_softmax", "sampled_softmax", "fixed", "w4s2", "w8p4", "w999999s1", "resnet51", "encoder", "step"]
KEYS = ["size", "dim", "name", "momentun", "epochs", "x", "hidden", "clip", "symmetric", "mask_own", "negatives",
        "base_lr", "by", "z", "l2", "k", "seed", "precision", "accumulate", "stem", "é", "a b", "channels", "num_views"]
# What only the images can tell: how many there are, of which kind, and what the data's own settings find.
OF_IMAGES = r"data|train\.batch_size|method\.dictionary(\.size)?|views\.(mean|std)"
LINE = re.compile(r"(tiny\.yaml(:\d+)?|default of \S+|chosen: [^:]+|a test): ([\w.é ]+): .")


def places(node: Any, above: tuple = ()) -> list[tuple]:
    """The path of each value below ``node``."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path for key, item in pairs for path in ((*above, key), *places(item, (*above, key)))]


def mutate(tree: dict, draw: Any) -> None:
    """Drop, rename, add or replace a value somewhere."""
    path = draw(st.sampled_from(places(tree)))
    holder = tree
    for key in path[:-1]:
        holder = holder[key]
    what = draw(st.sampled_from(["drop", "rename", "add", "name", "value", "value", "value", "value"]))
    if what == "drop":
        del holder[path[-1]]
    elif what == "name":
        holder[path[-1]] = draw(st.sampled_from(NAMES))
    elif what == "value" or isinstance(holder, list):
        holder[path[-1]] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    else:
        value = holder.pop(path[-1]) if what == "rename" else copy.deepcopy(draw(st.sampled_from(VALUES)))
        holder[draw(st.sampled_from(KEYS))] = value


@st.composite
def trees(draw: Any, root: Path) -> dict:
    of = draw(st.sampled_from(sorted(METHODS)))
    tree = yaml.safe_load(tiny.settings(root, Path("run"), "instdisc" if of == "instdisc" else "moco",
                                        train={"epochs": 2}).text())
    tree["method"] = copy.deepcopy(METHODS[of])
    for _ in range(draw(st.integers(1, 3))):
        mutate(tree, draw)
    if isinstance(tree.get("run"), dict) and isinstance(tree["run"].get("dir"), str):
        tree["run"]["dir"] = "run"                              # the user's own choice, and this test's own disk
    if isinstance(tree.get("train"), dict):
        tree["train"].pop("compile", None)                      # minutes
        if tree["train"].get("workers", 4) in (3, 4, 7, 48):
            tree["train"]["workers"] = 1                        # forks take long, and one worker is a worker
    return tree


class Watch:
    """Whether anything below a folder was listed or opened, by Python's own audit of such calls."""

    def __init__(self, folder: Path):
        self.folder, self.touched, self.on = str(folder), False, True
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple) -> None:
        if self.on and event in ("open", "os.scandir", "os.listdir") and str(arguments[0]).startswith(self.folder):
            self.touched = True


def step_of(config: Config) -> float:
    """The loss of the first step."""
    session = Session(Run(config))
    session.start()
    with contextlib.closing(session.trainer.steps(1)) as steps:
        return next(float(step.logs["loss"]) for step in steps)


def try_out(tree: dict, watch: Watch) -> str:
    """"refused", "refused by the images" or "trained"; anything else fails."""
    watch.touched = False
    config = Config({}, {}, "tiny.yaml", TRUSTED)
    try:
        config = Config.parse(Config(tree, {}, "tiny.yaml").text(), "tiny.yaml", trusted=TRUSTED)
        check_early(config)
        loss = step_of(config)
    except ConfigError as error:
        found = [LINE.match(line) for line in str(error).splitlines() if not line.startswith("  ")]
        assert found and all(found), error
        assert not Path("run").exists() or watch.touched, error
        of_images = all(re.match(OF_IMAGES, one[3]) for one in found if one)
        assert of_images or not watch.touched, f"the images were touched before: {error}"
        return "refused by the images" if watch.touched else "refused"
    assert math.isfinite(loss), tree
    return "trained"


def test_every_config_is_refused_in_words_or_trains_a_step(tmp_path, monkeypatch, soak):
    root, counts = tiny.photos(tmp_path / "photos", count=8), Counter[str]()
    watch = Watch(root)

    @settings(max_examples=soak.count(60, 2000), deadline=None, derandomize=True, database=None,
              phases=[Phase.generate], suppress_health_check=list(HealthCheck))
    @given(trees(root))
    def fuzz(tree: dict) -> None:
        here = tempfile.mkdtemp(dir=tmp_path)
        monkeypatch.chdir(here)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            counts[try_out(tree, watch)] += 1
        os.chdir(tmp_path)
        shutil.rmtree(here)

    try:
        fuzz()
    finally:
        watch.on = False                                # a hook stays for good
        monkeypatch.undo()
    assert counts["refused"] and counts["trained"], counts
    soak.report("F2", cases=counts.total(), **{name.replace(" ", "_"): number for name, number in counts.items()})
