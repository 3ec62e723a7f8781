"""A run's folder: what is refused, what is repeated, what is written down, and what comes out of it again."""

import json
import math
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

import moco
from common.announce import closing
from common.checkpoint import DamagedCheckpoint
from common.config import Config, ConfigError
from common.data.loader import plain_batches
from common.dry_run import _measurements
from common.evaluate import Result
from common.evaluate.evaluator import Evaluator
from common.run import Run, load_run, open_config, pretrain
from common.session import Session
from common.signals import StopRequest
from common.train import Trainer
from tests import tiny


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tiny.photos(tmp_path_factory.mktemp("photos"))


@pytest.fixture(scope="module")
def finished(root, tmp_path_factory):
    """A finished run of two epochs, to copy."""
    return Run(tiny.settings(root, tmp_path_factory.mktemp("runs") / "first", train={"epochs": 2})).train()


@pytest.fixture
def copied(finished, tmp_path):
    return shutil.copytree(finished.dir, tmp_path / "run")


def test_the_folder_holds_what_the_design_says(finished):
    summary = tiny.summary(finished.dir)
    expected = {"step": 20, "finished": True, "images": 80, "unreadable": 0, "processes": 1, "seed": 3}
    assert expected.items() <= summary.items() and summary["results"]["trained"][0]["metric"] == "knn"
    assert torch.__version__.startswith(summary["versions"]["torch"])
    assert [record["step"] for record in tiny.records(finished.dir)] == list(range(1, 21))
    assert {"loss", "chance", "lr", "pos", "neg", "queue", "images_per_second"} <= tiny.records(finished.dir)[0].keys()
    assert Config.load(finished.dir / "config.yaml").tree == finished.config.tree


@pytest.mark.parametrize("section, setting, said", [
    ("method", {"momentum": 0.99}, "method.momentum was 0.9 and is 0.99"),
    ("train", {"batch_size": 8}, "train.batch_size was 4 and is 8"),
    ("run", {"seed": 4}, "run.seed was 3 and is 4"),
])
def test_another_config_is_refused_by_name_and_both_values(section, setting, said, root, copied):
    config = tiny.settings(root, copied, **{"train": {"epochs": 2}})
    for key, value in setting.items():
        config.set(f"{section}.{key}", value, "command line")
    with pytest.raises(ConfigError, match="checkpoint of step 20 belongs to another config") as error:
        Run(config).train()
    assert said in str(error.value) and "another run.dir" in str(error.value)


def test_other_images_are_refused(root, copied, tmp_path):
    shutil.copytree(root, tmp_path / "photos")
    (tmp_path / "photos" / "class0" / "000.png").rename(tmp_path / "photos" / "class0" / "0.png")
    with pytest.raises(ConfigError, match="other data: the list of training images or labels has changed"):
        Run(tiny.settings(tmp_path / "photos", copied, train={"epochs": 2})).train()


def test_images_that_only_moved_are_the_same(root, copied, tmp_path, capsys):
    shutil.copytree(root, tmp_path / "photos")
    Run(tiny.settings(tmp_path / "photos", copied, train={"epochs": 2, "workers": 1}, log={"every": 7})).train()
    assert "finished already" in capsys.readouterr().out


def test_a_finished_run_started_again_prints_its_table_and_trains_nothing(root, copied, capsys):
    before, files = tiny.summary(copied), (copied / "metrics.jsonl").read_bytes()
    run = Run(tiny.settings(root, copied, train={"epochs": 2})).train()
    said = capsys.readouterr().out
    assert "knn k=5" in said and "trained" in said and "loss" not in said
    assert (copied / "metrics.jsonl").read_bytes() == files
    assert tiny.summary(copied)["results"] == before["results"] and tiny.summary(copied)["images_per_second"] > 0
    assert run.knn(5)[0].value == before["results"]["trained"][0]["value"]


def test_baselines_can_be_asked_for_afterwards(root, copied, capsys):
    Run(tiny.settings(root, copied, train={"epochs": 2}, evaluate={"baselines": True})).train()
    said = capsys.readouterr().out
    expected = ["raw pixels", "untrained", "trained"]
    assert [row for line in said.splitlines() if (row := line.split("  ")[0]) in expected] == expected


def test_the_untrained_baseline_has_the_first_weights_and_draws_nothing(root, finished):
    session = Session(load_run(finished.dir, trust=["tests"]))
    before = torch.get_rng_state()
    untrained = dict(session._untrained().named_parameters())
    assert torch.equal(torch.get_rng_state(), before)
    first = Run(tiny.settings(root, finished.dir, train={"epochs": 2})).encoder
    assert all(torch.equal(value, untrained[name]) for name, value in first.named_parameters())


def test_evaluation_leaves_the_trace_alone(root, finished, tmp_path):
    measured = tiny.settings(root, tmp_path / "often", train={"epochs": 2}, evaluate={"every": 1, "baselines": True})
    never = tiny.settings(root, tmp_path / "never", train={"epochs": 2}, evaluate={"every": 0, "protocols": []})
    often, bare = Run(measured).train(), Run(never).train()
    assert tiny.losses(often.dir) == tiny.losses(bare.dir) == tiny.losses(finished.dir)
    assert len(tiny.records(often.dir, "eval")) == 2 and not tiny.records(bare.dir, "eval")


def test_a_measurement_that_was_cut_off_is_made_up_for(root, tmp_path):
    """Killed between the checkpoint at the end of an epoch and its evaluation, before anything was recorded."""
    config = tiny.settings(root, tmp_path / "run", train={"epochs": 2}, evaluate={"every": 1}, log={"every": 100})
    session = Session(Run(config))
    session.start()
    for _ in session.trainer.steps(10):
        pass
    session.save()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    Run(tiny.settings(root, tmp_path / "run", train={"epochs": 2}, evaluate={"every": 1}, log={"every": 100})).train()
    assert [record["step"] for record in tiny.records(tmp_path / "run", "eval")] == [10, 20]


def test_a_kill_while_measuring_loses_no_step(root, tmp_path, monkeypatch):
    sections = {"train": {"epochs": 2}, "evaluate": {"every": 1}, "log": {"every": 100}}
    run = Run(tiny.settings(root, tmp_path / "run", **sections))
    monkeypatch.setattr(run.evaluator, "measure", lambda encoder: exit("killed"))
    with pytest.raises(SystemExit):
        run.train()
    assert tiny.last_state(run.dir)["trainer"]["step"] == 10
    Run(tiny.settings(root, tmp_path / "run", **sections)).train()
    assert [record["step"] for record in tiny.records(run.dir, "eval")] == [10, 20]


def spoil(run, at):
    """Make one step's loss NaN."""
    forward, calls = run.method.forward, []

    def spoiled(batch):
        calls.append(batch)
        output = forward(batch)
        return output._replace(loss=output.loss * math.nan) if len(calls) == at else output

    run.method.forward = spoiled


def test_a_skipped_step_is_an_event_and_the_run_goes_on(root, tmp_path, capsys):
    run = Run(tiny.settings(root, tmp_path / "run", train={"epochs": 1}))
    spoil(run, at=4)
    run.train()
    event, = tiny.records(run.dir, "event")
    assert (event["step"], event["event"]) == (4, "skipped")
    assert "step 4: the loss, a key or the gradient was not finite" in capsys.readouterr().out
    assert [record["step"] for record in tiny.records(run.dir)] == [1, 2, 3, 5, 6, 7, 8, 9, 10]


def test_a_checkpoint_that_is_to_stay_is_not_lost_to_a_skipped_step(root, tmp_path):
    run = Run(tiny.settings(root, tmp_path / "run", train={"epochs": 2}, checkpoint={"every": 1}))
    spoil(run, at=10)
    run.train()
    kept = [path.name for path in sorted((run.dir / "checkpoints").glob("*-kept.pt"))]
    assert kept == ["step-00000011-kept.pt", "step-00000020-kept.pt"]


def test_measuring_minds_the_time_that_a_worker_may_take(root, tmp_path, monkeypatch):
    seen = []
    loader = Run(tiny.settings(root, tmp_path / "run", train={"epochs": 1, "worker_timeout": 77.0}))
    monkeypatch.setattr("common.evaluate.features.plain_batches",
                        lambda *given, care, **more: seen.append(care.timeout) or plain_batches(*given, **more))
    loader.evaluator.measure(loader.encoder)
    assert set(seen) == {77.0}


@pytest.mark.parametrize("width, channels_last", [(4, False), (16, True)])
def test_few_channels_stay_out_of_a_kernel_that_writes_past_its_memory(width, channels_last, root, tmp_path):
    """torch 2.15 on a CPU, channels_last: below 16 channels memory is damaged, and most runs of 224 pixels die."""
    encoder = {"name": "common.backbones.encoder", "arch": f"w{width}s1", "dim": 16}
    method = {**tiny.METHODS["instdisc"], "encoder": encoder}
    run = Run(tiny.settings(root, tmp_path / "run", "instdisc", method=method, views={"size": 96},
                            train={"epochs": 1, "batch_size": 8}))
    weights = [module.weight for module in run.method.modules() if isinstance(module, torch.nn.Conv2d)]
    laid_out = [weight.is_contiguous(memory_format=torch.channels_last) for weight in weights if weight.shape[2] > 1]
    assert all(laid_out) == channels_last
    run.train()


def test_images_that_fill_no_batch_are_refused_before_the_method_is_built(root, tmp_path, monkeypatch):
    monkeypatch.setattr(Run, "build_method", lambda self: pytest.fail("built"))
    with pytest.raises(ConfigError, match=r"tiny.yaml:\d+: train.batch_size: 400, but folder .* holds 40 images"):
        Run(tiny.settings(root, tmp_path / "run", train={"batch_size": 400}))


def test_the_result_is_the_last_measurement_and_not_the_best(root, tmp_path):
    session = Session(Run(tiny.settings(root, tmp_path / "run")))
    session.start()
    for value in (50.0, 90.0, 70.0):
        session.monitor.measured([Result("knn", value, None, {"layer": "backbone", "k": 5})])
    session.disk.wait()
    assert [result["value"] for result in tiny.summary(tmp_path / "run")["results"]["trained"]] == [70.0]
    assert [record["value"] for record in tiny.records(tmp_path / "run", "eval")] == [50.0, 90.0, 70.0]


BY_BANK = {"evaluate": {"every": 1, "bank": True, "layer": "head"}, "train": {"epochs": 3}}


def test_among_the_bank_a_run_measures_until_its_end_and_then_all_images(root, tmp_path, capsys):
    run = Run(tiny.settings(root, tmp_path / "run", "instdisc", **BY_BANK)).train()
    plain = Run(tiny.settings(root, tmp_path / "plain", "instdisc", train={"epochs": 3}, evaluate={"layer": "head"}))
    assert tiny.losses(run.dir) == tiny.losses(plain.train().dir)                   # which writes nothing into the bank
    records, among = tiny.records(run.dir, "eval"), "neighbours=bank"
    assert [(record["step"], among in record["label"]) for record in records] == [(10, True), (20, True), (30, False)]
    assert records[-1]["value"] == run.knn(5, layer="head")[0].value
    assert tiny.summary(run.dir)["results"]["trained"][0]["protocol"] == records[-1]["protocol"]
    assert _measurements(run, 0.5) == (3, 20) and _measurements(plain, 0.5) == (2, 40)      # seconds of 40 images
    said = capsys.readouterr().out
    assert "epoch 2  head beside the bank: knn k=5" in said and "epoch 3  head: knn k=5" in said


@pytest.mark.parametrize("of, changes, message", [
    ("moco", {}, "but moco.MoCo keeps no feature of each training image"),
    ("instdisc", {"protocols": [{"name": "common.evaluate.Linear"}]}, "but evaluate.protocols has no common.eval")])
def test_measuring_by_a_bank_that_cannot_be_is_refused(of, changes, message, root, tmp_path):
    with pytest.raises(ConfigError, match=r"tiny.yaml:\d+: evaluate.bank: true, " + message):
        Run(tiny.settings(root, tmp_path / "run", of, evaluate={"bank": True, **changes}))


def test_a_run_says_what_measuring_took_of_its_time(root, tmp_path, monkeypatch, capsys):
    """Of a clock on which a step takes a second, a measurement ten and nothing else any; over a stop, too."""
    now = [0.0]
    monkeypatch.setattr("common.monitor.time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(Evaluator, "measure", ticking(Evaluator.measure, now, 10))
    monkeypatch.setattr(Trainer, "_optimize", ticking(Trainer._optimize, now, 1))
    sections = {"evaluate": {"every": 1}, "train": {"epochs": 3}}
    tiny.train_and_stop(tiny.settings(root, tmp_path / "run", **sections).text(), stop=15)
    Run(tiny.settings(root, tmp_path / "run", **sections)).train()
    said = capsys.readouterr().out
    assert "(measuring took 10 s of 20 s, 50% so far)" in said                     # epoch 1
    assert f"Run      {tmp_path / 'run'}  (measuring took 30 s of 1 min, 50%;" in said
    summary = tiny.summary(tmp_path / "run")
    assert (summary["measuring_seconds"], summary["seconds"]) == (30, 60)


def ticking(function, now, seconds):
    def ticks(*arguments):
        now[0] += seconds
        return function(*arguments)
    return ticks


def test_unlabelled_images_train_and_say_why_nothing_is_measured(tmp_path, capsys):
    root = tiny.photos(tmp_path / "flat", count=12, classes=0)
    run = Run(tiny.settings(root, tmp_path / "run", train={"epochs": 1})).train()
    said = capsys.readouterr().out
    assert [line for line in said.splitlines() if line.startswith("measure  ")] == [
        "measure  nothing: the training images have no labels"]
    assert "Traceback" not in said and tiny.summary(run.dir)["finished"] and not tiny.summary(run.dir)["results"]
    with pytest.raises(ValueError, match="need at least 2"):
        run.knn()


def test_unreadable_images_are_written_down_once_over_sessions(tmp_path, capsys):
    root = tiny.photos(tmp_path / "photos", count=20)
    (root / "class0" / "004.png").write_bytes(b"no image")
    for epochs_done in (1, 2):
        config = tiny.settings(root, tmp_path / "run", train={"epochs": 2, "max_unreadable": 0.1})
        session = Session(Run(config))
        session.start()
        for step in session.trainer.steps(5 * epochs_done):
            session.monitor.step(step)
        session.save()
    line, = (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()
    assert json.loads(line)["path"].endswith("004.png") and json.loads(line)["reason"]
    assert capsys.readouterr().out.count("cannot be read, another image takes its place") == 1
    Run(tiny.settings(root, tmp_path / "run", train={"epochs": 2, "max_unreadable": 0.1})).train()
    assert tiny.summary(tmp_path / "run")["unreadable"] == 1
    with pytest.raises(ValueError, match=r"1 of the 20 images .* cannot be read, more than max_unreadable = 1.00%"):
        Run(tiny.settings(root, tmp_path / "other", train={"epochs": 2})).train()


def test_the_encoder_measures_the_same_when_it_is_opened_again(finished):
    again = load_run(finished.dir, trust=["tests"])
    assert again.knn(5) == finished.knn(5)
    x_BcHW = torch.rand(3, 3, 8, 8)
    assert torch.equal(again.encoder(x_BcHW), finished.encoder(x_BcHW))             # both ready for use: no dropout


def test_what_comes_out_is_the_encoder_that_was_trained(finished):
    """Not its momentum copy, which lags behind and has seen other statistics."""
    state = tiny.last_state(finished.dir)["trainer"]["method"]
    for run in (finished, load_run(finished.dir, trust=["tests"])):
        assert all(torch.equal(value, state[f"encoder.{name}"]) for name, value in run.encoder.state_dict().items())


@pytest.mark.parametrize("method", ["moco", "instdisc"])
def test_a_trained_encoder_measures_other_data_than_it_was_trained_on(method, root, tmp_path):
    """Fewer images than the queue is long, or than the bank has rows."""
    run = Run(tiny.settings(root, tmp_path / "run", method, train={"epochs": 1}, evaluate={"protocols": []})).train()
    few = tiny.photos(tmp_path / "few", count=10, sizes=((9, 9),))
    opened = load_run(run.dir, [f"data.root={few}"], trust=["tests"])
    assert len(opened.splits.train) == 10 and 0 <= opened.knn(1)[0].value <= 100
    with pytest.raises(ConfigError, match="trained on images of 3 channels; those of .* have 1"):
        load_run(run.dir, [f"data.root={few}", "data.channels=1"], trust=["tests"])


def test_a_second_interrupt_interrupts_and_other_signals_only_ask(monkeypatch):
    monkeypatch.setattr("common.signals.PATIENCE", -1.0)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), StopRequest() as request:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert request.number == signal.SIGTERM, "the first that asked"
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_weights_that_do_not_fit_are_refused_by_name(finished):
    said = "does not fit the method of the config: size mismatch for encoder.head.2.weight: .* Leave the settings"
    with pytest.raises(DamagedCheckpoint, match=said) as error:
        load_run(finished.dir, ["method.encoder.dim=8", "method.dictionary.dim=8"], trust=["tests"])
    assert "\n" not in str(error.value)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="no run with a checkpoint"):
        load_run(tmp_path)


def test_five_lines_of_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.photos(tmp_path / "photos", count=16, sizes=((8, 8),))
    small = ["method.encoder.arch=w4s1", "train.threads=1", "train.device=cpu"]
    run = moco.pretrain("my_images.yaml", data="photos", epochs=1, overrides=small)
    assert run.dir.resolve() == tmp_path / "runs" / "my_images" and run.knn(k=3)[0].metric == "knn"
    assert run.encoder.backbone(torch.zeros(2, 3, 8, 8)).shape == (2, 16)


def test_pretrain_takes_a_config_that_is_already_open(root, tmp_path):
    config = tiny.settings(root, tmp_path / "run")
    changed = open_config(config, epochs=1, dir=tmp_path / "other", overrides=["train.batch_size=8"])
    assert (changed.get("train.epochs"), changed.get("train.batch_size")) == (1, 8)
    assert changed.get("run.dir") == str(tmp_path / "other")
    assert config.get("train.batch_size") == 4
    run = pretrain(tiny.settings(root, tmp_path / "run"), epochs=1, overrides=["evaluate.protocols=[]"])
    assert tiny.summary(run.dir)["step"] == 10


def test_wandb_gets_a_copy_and_keeps_its_id_over_a_stop(root, tmp_path):
    pytest.importorskip("wandb")
    sections = {"train": {"epochs": 1}, "evaluate": {"protocols": []}, "log": {"every": 5, "wandb": "offline"}}
    session = Session(Run(tiny.settings(root, tmp_path / "run", **sections)))
    session.start()
    for step in session.trainer.steps(5):
        session.monitor.step(step)
    session.save()
    session.monitor.stopped()
    Run(tiny.settings(root, tmp_path / "run", **sections)).train()
    # By the file's name: that of its folder ends in -1 where two sessions start within a second.
    copies = [copy.stem for copy in (tmp_path / "run" / "wandb").glob("offline-run-*/run-*.wandb")]
    assert copies == 2 * ["run-" + tiny.last_state(tmp_path / "run")["wandb_id"]]
    assert [record["step"] for record in tiny.records(tmp_path / "run")] == [5, 10]


def test_the_way_to_hand_on_an_encoder_of_ones_own_is_a_graph(finished):
    assert "--format torch_export --out" in closing(finished, 1.0, 0.0)
