"""The first twenty losses of each method are those that are written down: a change of them is a change of the method.

On scikit-learn's digits, with a small network and otherwise as configs/ has it. Where a change is meant, write it into
CHANGELOG.md and the new numbers into golden.json: ``python tests/test_golden.py`` prints them.
"""

import json
import tempfile
from pathlib import Path

import pytest

from common.config import Config
from common.run import Run
from common.session import Session

GOLDEN, STEPS = Path(__file__).with_name("golden.json"), 20
SMALL = ["data={name: common.data.digits}", "views.size=8", "method.encoder.arch=w4s1", "method.encoder.dim=16",
         "method.dictionary.dim=16", "train.batch_size=32", "train.epochs=1", "train.workers=0", "train.threads=1",
         "train.device=cpu", "train.precision=float32", "evaluate.protocols=[]",
         "optimizer.base_lr=0.0003"]        # at the rates of configs/ so small a network multiplies rounding by 10^6
METHODS = {"moco_v1": ["method.dictionary.size=256"], "moco_v2": ["method.dictionary.size=256"],
           "instdisc": ["method.dictionary.negatives=256"]}


def losses(name: str, folder: Path) -> list[float]:
    session = Session(Run(Config.load(name, [*SMALL, *METHODS[name], f"run.dir={folder}"])))
    session.start()
    return [float(step.logs["loss"]) for step in session.trainer.steps(STEPS)]


@pytest.mark.parametrize("name", METHODS)
def test_the_first_losses_are_those_written_down(name, tmp_path):
    expected = json.loads(GOLDEN.read_text())[name]
    assert len(expected) == STEPS
    assert losses(name, tmp_path) == pytest.approx(expected, rel=0, abs=1e-4)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as top:
        found = {name: losses(name, Path(top) / name) for name in METHODS}
    print(json.dumps({name: [round(loss, 6) for loss in trace] for name, trace in found.items()}))
