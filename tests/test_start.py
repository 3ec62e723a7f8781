"""A run that begins with weights that were trained before: its own kind of start, and said so."""

import shutil

import pytest
import torch

from common import checkpoint, start
from common.checkpoint import DamagedCheckpoint
from common.config import ConfigError
from common.run import Run, load_run
from common.session import Session
from common.trained import load_trained
from tests import tiny

ENCODER = {"name": "common.backbones.encoder", "arch": "w4s1", "dim": 16}
ONE = {"epochs": 1}
BANK = {"name": "common.dictionary.Bank", "dim": 16, "negatives": 12, "init": "encoder"}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.photos(tmp_path_factory.mktemp("images"), sizes=((8, 8),))


@pytest.fixture(scope="module")
def first(root, tmp_path_factory):
    """The last checkpoint of a MoCo run of one epoch."""
    run = tmp_path_factory.mktemp("first") / "run"
    Run(tiny.settings(root, run, method={"encoder": ENCODER}, train=ONE)).train()
    return run / "checkpoints" / "step-00000010.pt"


@pytest.fixture(scope="module")
def weights(first, tmp_path_factory):
    """The same encoder as imported weights: a backbone alone."""
    state = checkpoint.load(first)
    tensors = {name.removeprefix("encoder."): tensor for name, tensor in state["trainer"]["method"].items()
               if name.startswith("encoder.backbone.")}
    file = tmp_path_factory.mktemp("weights") / "backbone.pt"
    checkpoint.save(file, {"config": state["config"], "facts": state["facts"], "weights": tensors,
                           "parts": ["backbone"], "origin": {"layout": "moco"}})
    return file


def config(root, run, file, of="moco", method=None, **sections):
    sections = {"train": ONE, "method": {"encoder": ENCODER, **(method or {})}, **sections}
    made = tiny.settings(root, run, of, **sections)
    if file:
        made.set("run.weights", str(file), "test")
    return made


def begun(root, run, file, **sections):
    """A session before its first step."""
    session = Session(Run(config(root, run, file, **sections)))
    session.start()
    session.disk.close(10)
    return session


def tensors(file, part):
    return {name.removeprefix(f"encoder.{part}."): tensor
            for name, tensor in checkpoint.load(file)["trainer"]["method"].items()
            if name.startswith(f"encoder.{part}.")}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_moco_begins_with_the_weights_in_both_encoders_and_a_new_queue(root, first, tmp_path, capsys):
    method = begun(root, tmp_path / "run", first).run.method
    assert same(method.encoder.backbone.state_dict(), tensors(first, "backbone"))
    assert same(method.encoder.head.state_dict(), tensors(first, "head"))
    method.eval()
    image = torch.randn(4, 3, 8, 8)
    assert torch.equal(method.encoder(image), method.key_encoder(image))                       # q(x) == k(x)
    new = Run(config(root, tmp_path / "other", None)).method
    assert torch.equal(method.dictionary.keys, new.dictionary.keys) and not method.step
    said = capsys.readouterr().out
    assert f"weights  {first} (a run's, step 10): backbone and head; all else starts anew" in said


def test_a_head_that_does_not_come_or_fit_is_new(root, first, weights, tmp_path, capsys):
    alone = begun(root, tmp_path / "alone", weights).run.encoder
    wide = begun(root, tmp_path / "wide", first, method={"encoder": {**ENCODER, "dim": 8},
                                                         "dictionary": {**tiny.QUEUE, "dim": 8}}).run.encoder
    for encoder in (alone, wide):
        assert same(encoder.backbone.state_dict(), tensors(first, "backbone"))
    random = Run(config(root, tmp_path / "random", None)).encoder
    assert same(alone.head.state_dict(), random.head.state_dict())
    said = capsys.readouterr().out
    assert "(imported, moco): the backbone; the file has no head, and the run's is new" in said
    assert "the head is new, for weight is [16, 16] in the file and [8, 16] in the run (and 1 more)" in said


def test_the_untrained_baseline_stays_untrained(root, first, tmp_path):
    session = begun(root, tmp_path / "run", first)
    random = dict(Run(config(root, tmp_path / "random", None)).encoder.named_parameters())
    assert all(torch.equal(value, random[name]) for name, value in session._untrained().named_parameters())


def test_a_bank_that_begins_with_features_has_those_of_the_weights(root, first, tmp_path):
    session = begun(root, tmp_path / "run", first, of="instdisc", method={"dictionary": BANK})
    method = session.run.method.eval()
    view = session.run.views.evaluation_batch(torch.stack([session.run.splits.train.read(i) for i in range(3)]))
    torch.testing.assert_close(method.dictionary.v[:3], method.encoder(view))


def test_going_on_needs_the_file_no_more_and_gives_the_same_run(root, first, tmp_path):
    file = tmp_path / "start.pt"
    shutil.copy(first, file)
    straight, stopped = (config(root, tmp_path / name, file, train={"epochs": 2}) for name in ("straight", "stopped"))
    Run(straight).train()
    tiny.train_and_stop(stopped.text(), 5)
    file.unlink()
    run = Run(stopped).train()
    assert tiny.losses(tmp_path / "straight") == tiny.losses(run.dir)
    assert tiny.last_state(run.dir)["start"] == start.sha256(str(first))
    copy = tmp_path / "elsewhere.pt"                                                # another name, the same weights
    shutil.copy(first, copy)
    Run(config(root, run.dir, copy, train={"epochs": 2})).train()


def test_going_on_from_another_start_is_refused(root, first, weights, tmp_path):
    begun(root, tmp_path / "run", first)
    for file, message in ((weights, "and the config names weights of SHA-256"), (None, "and the config names none")):
        with pytest.raises(ConfigError, match=f"began from weights of SHA-256 [0-9a-f]{{12}}..., {message}"):
            begun(root, tmp_path / "run", file)
    begun(root, tmp_path / "random", None)
    with pytest.raises(ConfigError, match="began from random weights, and the config names weights"):
        begun(root, tmp_path / "random", first)


def test_weights_that_no_run_can_begin_with_are_refused(root, first, weights, tmp_path):
    first_step = begun(root, tmp_path / "new", None).folder.file(0)
    for file, message in (
            (tmp_path / "none.pt", "run.weights: .*no such file. Give a checkpoint"),
            (first.parent.parent, "is a folder; give one of the files in it"),
            (first_step, r"as random as training found them \(step 0\)")):
        with pytest.raises(ConfigError, match=message):
            begun(root, tmp_path / "run", file)
    wide = {"encoder": {**ENCODER, "arch": "w8s1"}}
    with pytest.raises(ConfigError, match=r"another backbone: conv1.weight is \[4, 3, 3, 3\] in the file and "
                       r"\[8, 3, 3, 3\] in the run \(and .* more\). Its own config has: method.encoder.arch=w4s1"):
        begun(root, tmp_path / "run", first, method=wide)
    cut = tmp_path / "cut.pt"
    cut.write_bytes(weights.read_bytes()[:-2000])
    with pytest.raises(DamagedCheckpoint, match="cut off; its end is missing"):
        begun(root, tmp_path / "run", cut)


def test_random_features_are_never_measured_unasked(root, tmp_path):
    """A run that was stopped before its first step: its folder, and that checkpoint."""
    begun(root, tmp_path / "run", None)
    for path in (tmp_path / "run", tmp_path / "run" / "checkpoints" / "step-00000000.pt"):
        with pytest.raises(DamagedCheckpoint, match=r"as random as training found it \(step 0\).*or --untrained"):
            load_trained(path)
    assert load_trained(tmp_path / "run", untrained=True).step == 0


@pytest.mark.parametrize(("key", "value", "message"), [
    ("parts", ["head"], "'parts' is"), ("facts", {"channels": 3}, "'facts.num_samples' is None"),
    ("config", None, "'config', 'facts' or 'weights' is missing"), ("weights", {"backbone.x": 1}, "more than tensors"),
    ("weights", {"trunk.x": torch.ones(1)}, "more than tensors of")])
def test_a_sound_file_that_holds_something_else_is_refused(weights, tmp_path, key, value, message):
    file = tmp_path / "odd.pt"
    checkpoint.save(file, {**checkpoint.load(weights), key: value})
    for read in (load_trained, lambda path: start.read(str(path))):
        with pytest.raises(DamagedCheckpoint, match=f"odd.pt: not imported weights: .*{message}"):
            read(file)


def test_weights_of_a_larger_backbone_do_not_pass_for_a_smaller_one(weights, tmp_path):
    """All that the smaller one has is there, with its shapes, and more: as resnet18 in resnet34."""
    file, state = tmp_path / "more.pt", checkpoint.load(weights)
    checkpoint.save(file, {**state, "weights": {**state["weights"], "backbone.layer4.conv1.weight": torch.ones(1)}})
    with pytest.raises(DamagedCheckpoint, match=r"Unexpected key\(s\).*layer4"):
        load_trained(file)


def test_a_run_that_began_with_weights_is_measured_as_any(root, first, tmp_path):
    begun(root, tmp_path / "run", first)
    assert load_trained(tmp_path / "run").step == 0             # weights of another run, not random ones
    assert load_run(tmp_path / "run").settings.weights == str(first)
