"""A trained encoder opened again: the right checkpoint, the right images, and never random weights unasked."""

import json
import shutil

import pytest
import torch

from common import checkpoint
from common.checkpoint import DamagedCheckpoint
from common.config import ConfigError
from common.run import Run
from common.trained import load_trained
from tests import tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def run(root, tmp_path_factory):
    """Four epochs, measured and kept after each second one."""
    config = tiny.settings(root, tmp_path_factory.mktemp("runs") / "first", train={"epochs": 4},
                           checkpoint={"every": 1},
                           method={"encoder": {"name": "common.backbones.encoder", "arch": "w4s1", "dim": 16}})
    return Run(config).train()


def weights(trained):
    return {name: tensor.clone() for name, tensor in trained.encoder.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_the_last_checkpoint_is_the_encoder_that_training_ended_with(run):
    trained = load_trained(run.dir)
    assert same(weights(trained), run.encoder.state_dict()) and not trained.encoder.training
    assert (trained.step, trained.epoch, trained.seed, trained.chosen) == (40, 4.0, 3, "last")
    assert trained.folder == run.dir and trained.origin is None and trained.parts == ("backbone", "head")


def test_one_file_is_that_file_and_lies_in_its_run(run):
    file, = (run.dir / "checkpoints").glob("step-00000020*.pt")
    trained = load_trained(file)
    assert (trained.step, trained.epoch, trained.folder) == (20, 2.0, run.dir)
    assert trained.chosen == "this file"                    # and not the last, which it is not
    assert trained.sha256() != load_trained(run.dir).sha256()


def test_an_epoch_is_chosen_by_number(run):
    trained = load_trained(run.dir, epoch=3)
    assert trained.step == 30 and trained.chosen == "epoch 3"
    with pytest.raises(ConfigError, match=r"--epoch 7: no checkpoint of it. There are those of epochs 0, 1, 2, 3, 4"):
        load_trained(run.dir, epoch=7)


def test_the_best_is_the_best_of_those_measured_and_called_so(run, tmp_path):
    folder = shutil.copytree(run.dir, tmp_path / "run")
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for record in records:
        if record["kind"] == "eval":
            record["value"] = {20: 90.0, 40: 80.0}[record["step"]]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records)
                                          + '{"kind": {"cut": 1}\n')
    trained = load_trained(folder, epoch="best")
    assert trained.step == 20 and trained.chosen.startswith("best of 2 by knn(layer=backbone, k=5, tau=0.07, norm=l2")
    assert load_trained(folder).step == 40                                      # never unasked


def test_weights_of_another_project_are_sent_to_the_import(tmp_path):
    torch.save({"state_dict": {"module.encoder_q.conv1.weight": torch.ones(4, 3, 3, 3)}}, tmp_path / "moco.pth.tar")
    with pytest.raises(DamagedCheckpoint, match=r"moco\.pth\.tar: not a checkpoint of this .*import_weights\.py FILE"):
        load_trained(tmp_path / "moco.pth.tar")


def test_best_without_measurements_and_an_epoch_of_a_file_are_refused(run, tmp_path):
    folder = shutil.copytree(run.dir, tmp_path / "run")
    (folder / "metrics.jsonl").unlink()
    with pytest.raises(ConfigError, match="--epoch best: none of its 5 checkpoints was measured"):
        load_trained(folder, epoch="best")
    file = next((folder / "checkpoints").glob("*.pt"))
    with pytest.raises(ConfigError, match="--epoch best chooses among the checkpoints of a run's folder"):
        load_trained(file, epoch="best")
    with pytest.raises(ConfigError, match="no run with a checkpoint"):
        load_trained(tmp_path)


def test_random_weights_are_not_opened_unasked(run, tmp_path):
    state = tiny.last_state(run.dir)
    state["trainer"]["step"] = 0
    state["trainer"]["method"] = Run(run.config).method.state_dict()
    checkpoint.save(tmp_path / "start.pt", state)
    with pytest.raises(DamagedCheckpoint, match="its backbone is as random as training found it"):
        load_trained(tmp_path / "start.pt")
    assert load_trained(tmp_path / "start.pt", untrained=True).step == 0


def test_weights_of_another_architecture_are_refused(run):
    with pytest.raises(DamagedCheckpoint, match="does not fit the method of the config"):
        load_trained(run.dir, ["method.encoder.arch=w8s1"])


def test_imported_weights_fill_what_they_hold_and_no_more(run, tmp_path):
    state, encoder = tiny.last_state(run.dir), run.encoder.state_dict()
    held = {name: tensor for name, tensor in encoder.items() if name.startswith("backbone.")}
    checkpoint.save(tmp_path / "weights.pt", {"config": state["config"], "facts": state["facts"], "weights": held,
                                              "parts": ["backbone"], "origin": {"layout": "moco"}})
    trained = load_trained(tmp_path / "weights.pt")
    assert same({name: weights(trained)[name] for name in held}, held) and trained.origin == {"layout": "moco"}
    with pytest.raises(ConfigError, match="a head of random numbers is not measured"):
        trained.evaluator(trained.splits(), [], "head")
    held.pop("backbone.bn1.weight")
    checkpoint.save(tmp_path / "holes.pt", {"config": state["config"], "facts": state["facts"], "weights": held,
                                            "parts": ["backbone"], "origin": {}})
    with pytest.raises(DamagedCheckpoint, match=r"backbone\.bn1\.weight"):
        load_trained(tmp_path / "holes.pt")


def test_other_images_are_given_as_folder_list_or_store(run, root, tmp_path):
    grey = tiny.photos(tmp_path / "grey", count=6)
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in sorted(grey.rglob("*.png"))[:4]))
    assert len(load_trained(run.dir).splits().train) == 40
    assert len(load_trained(run.dir, data=str(grey)).splits().train) == 6
    assert len(load_trained(run.dir, data=str(tmp_path / "list.txt")).splits().train) == 4
    with pytest.raises(ConfigError, match="there is no such file or folder"):
        load_trained(run.dir, data=str(tmp_path / "nowhere"))


def test_a_change_of_the_data_holds_beside_other_images_too(run, tmp_path):
    """It was overwritten by --data: a test set that was given was not measured on."""
    images = sorted(tiny.photos(tmp_path / "photos", count=10).rglob("*.png"))
    for name, some in (("train", images[:6]), ("test", images[6:10])):
        (tmp_path / f"{name}.txt").write_text("\n".join(map(str, some)))
    splits = load_trained(run.dir, [f"data.test={tmp_path / 'test.txt'}"], data=str(tmp_path / "train.txt")).splits()
    assert splits.test is not None and (len(splits.train), len(splits.test)) == (6, 4)


def test_images_are_read_with_the_channels_that_the_encoder_takes(run, root):
    assert load_trained(run.dir, data=str(root)).splits().train.channels == 3
    with pytest.raises(ConfigError, match=r"trained on images of 3 channels; those of .* have 1"):
        load_trained(run.dir, ["data.channels=1"]).splits()
