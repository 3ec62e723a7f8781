"""The two commands, as someone types them, in processes of their own."""

import builtins
import json
import os
import re
import runpy
import signal
import sys

import pytest
import yaml

from common.sections import SECTIONS, complete, open_config
from tests import tiny
from tests.processes import ROOT, finish, run_tool, start, tool, wait_for_lines

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
QUICK = ["train.epochs=3", "evaluate.baselines=false", "log.every=1", "train.device=cpu",
         "evaluate.protocols=[{name: common.evaluate.KNN, k: [20], backend: torch}]"]


@pytest.mark.parametrize("name, words", [("evaluate", ["knn"]), ("export", ["--verify", "x"]),
                                         ("import_weights", ["x"])])
def test_a_ctrl_c_among_the_imports_ends_without_a_traceback(name, words, monkeypatch):
    plain = builtins.__import__

    def interrupted(module, *given, **named):
        if module == "common.announce":
            raise KeyboardInterrupt
        return plain(module, *given, **named)

    monkeypatch.setattr(sys, "argv", [name, *words])
    monkeypatch.setattr(builtins, "__import__", interrupted)
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")
    assert ended.value.code == 130


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A folder in which the demo was run for three epochs, and what it said."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, tool("train", "--config", "demo.yaml", *QUICK, cwd=folder)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_that_ships_holds_together(path, tmp_path):
    text = path.read_text()
    overrides = [f"data.root={tmp_path}"] if "root: null" in text else []
    config = complete(open_config(path, overrides=overrides))
    assert set(config.tree) == set(SECTIONS) and config.get("run.dir") == f"runs/{path.stem}"
    header = [line for line in text.splitlines() if line.startswith("#")]
    assert any(f"--config {path.name}" in line for line in header), "a config opens with its command"
    assert yaml.safe_load(text)["train"].get("batch_size"), "and says its batch size"


@pytest.mark.parametrize("name", ["moco_v1.yaml", "moco_v2", "instdisc.yaml", "my_images.yaml"])
def test_without_data_three_lines_say_what_to_do(name, tmp_path):
    said = tool("train", "--config", name, cwd=tmp_path)
    assert said.code == 2 and said.out == "" and not list(tmp_path.glob("runs"))
    first, *rest = said.err.strip().splitlines()
    assert re.match(rf"error: .*configs/{name.removesuffix('.yaml')}.yaml:\d+: data.root: ", first)
    assert "data.root=/path" in said.err and "--config demo.yaml" in said.err and len(rest) == 2


@pytest.mark.parametrize("override, said", [
    ("method.momentun=0.9", "command line: method.momentun: moco.MoCo takes no such key; did you mean 'momentum'?"),
    ("trian.epochs=3", "command line: trian: no such section; did you mean 'train'?"),
    ("train.epochs=many", "command line: train.epochs: wants a whole number; got the text 'many'."),
    ("train.accumulate=0", "command line: train.accumulate: 0 is less than 1."),
    ("train.channels_last=1", "command line: train.channels_last: wants true or false; got "),
    ("optimizer.lr=-0.1", "lr: -0.1 is negative"),
    ("train.batch_size=5000", "command line: train.batch_size: 5000, but digits holds 1297 images"),
    ("train.epochs", "command line: 'train.epochs': write section.key=value"),
    ("method.name=moco.MoKo", "moco has no 'MoKo'; did you mean 'MoCo'"),
    ("checkpoint.minutes=0", "every, minutes, keep: give"),
    ("train={batch_size: 64}", "command line: train: TrainSettings needs epochs (a whole number)."),
    ("train.batch=64", "command line: train.batch: TrainSettings takes no such key; did you mean 'batch_size'?"),
])
def test_a_mistake_gives_one_clear_line_and_exit_code_2(override, said, tmp_path):
    ended = tool("train", "--config", "demo.yaml", override, cwd=tmp_path)
    assert ended.code == 2 and said in ended.err and "Traceback" not in ended.err
    assert len(ended.err.strip().splitlines()) == 1 and ended.err.strip().startswith("error: ")


def test_a_warning_is_one_sentence_and_not_repeated_when_measuring(tmp_path):
    ended = tool("train", "--config", "demo.yaml", *QUICK, "train.epochs=1", "schedule.warmup=0",
                 "method.dictionary.mask_own=false", cwd=tmp_path)
    assert ended.code == 0 and len(ended.err.strip().splitlines()) == 1
    assert ended.err.startswith("warning: a queue of 1024 keys over 1297 images")
    measured = tool("evaluate", "knn", "--checkpoint", "runs/demo", "--k", "20", "--backend", "torch", cwd=tmp_path)
    assert measured.code == 0 and measured.err == ""


def test_a_config_that_is_not_there(tmp_path):
    ended = tool("train", "--config", "moco_v3.yaml", cwd=tmp_path)
    assert ended.code == 2 and "no such config" in ended.err and "moco_v2" in ended.err
    ended = tool("train", cwd=tmp_path)
    assert ended.code == 2 and "--config" in ended.err


def test_print_config_shows_every_value_and_its_origin_and_trains_nothing(tmp_path):
    ended = tool("train", "--config", "demo.yaml", "train.epochs=5", "--print-config", cwd=tmp_path)
    assert ended.code == 0 and not (tmp_path / "runs").exists()
    assert re.search(r"^  epochs: 5 +# command line$", ended.out, re.M)
    assert re.search(r"^  momentum: 0.99 +# .*configs/demo.yaml:9$", ended.out, re.M)
    assert re.search(r"^  clip: null +# default of TrainSettings$", ended.out, re.M)
    assert re.search(r"^  dir: runs/demo +# chosen: ", ended.out, re.M)
    (tmp_path / "again.yaml").write_text(ended.out)
    again = tool("train", "--config", "again.yaml", "--print-config", cwd=tmp_path)
    assert yaml.safe_load(again.out) == yaml.safe_load(ended.out)


def test_dry_run_tries_everything_and_leaves_nothing(tmp_path):
    ended = tool("train", "--config", "demo.yaml", "--dry-run", "log.wandb=offline", *QUICK[3:], cwd=tmp_path)
    assert ended.code == 0, ended.err
    assert [word for word in ("train  ", "evaluate  ", "resume  ", "  time  ", "  memory  ", "  disk  ")
            if f"\n{word}" not in ended.out] == []
    assert "940 steps of 64 images" in ended.out and "runs/demo" in ended.out
    assert re.search(r"images/s; 5 measurements: .*, \d+%\)\n", ended.out)
    assert not (tmp_path / "runs").exists() and "wandb" not in ended.out + ended.err


def test_dry_run_of_instdisc_whose_z_is_never_estimated(tmp_path):
    root = tiny.photos(tmp_path / "photos", count=24)
    config = tiny.settings(root, tmp_path / "run", "instdisc", method={"loss": "sampled_softmax"})
    (tmp_path / "tiny.yaml").write_text(config.text())
    ended = tool("train", "--config", "tiny.yaml", "--dry-run", cwd=tmp_path)
    assert ended.code == 0 and "resume " in ended.out, ended.err


def test_show_views_draws_a_picture(tmp_path):
    ended = tool("train", "--config", "demo.yaml", "--show-views", "out.png", cwd=tmp_path)
    assert ended.code == 0 and (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")
    assert ended.out.startswith("out.png: ") and "RandomResizedCrop" in ended.out and not (tmp_path / "runs").exists()


def test_train_then_evaluate_gives_the_same_number(demo):
    folder, ended = demo
    assert ended.code == 0 and ended.err == "", ended.err
    assert "epoch 3/3  step 60/60  loss " in ended.out and "Run      runs/demo  (" in ended.out
    assert "tools/export.py --checkpoint runs/demo --format torchvision --out runs/demo-backbone" in ended.out
    in_run, = tiny.summary(folder / "runs" / "demo")["results"]["trained"]
    measured = tool("evaluate", "knn", "--checkpoint", "runs/demo", "--k", "20", "--backend", "torch", cwd=folder)
    assert measured.code == 0 and f"{in_run['value']:.1f}" in measured.out.split("trained backbone")[1].split()[0]
    one_file, = (folder / "runs" / "demo" / "checkpoints").glob("step-00000060*.pt")
    again = tool("evaluate", "knn", "--checkpoint", str(one_file), "--k", "20", "--backend", "torch", cwd=folder)
    assert again.out.replace("this file", "last").splitlines()[:-1] == measured.out.splitlines()[:-1]
    lines = (folder / "runs" / "demo" / "results.jsonl").read_text().splitlines()
    recorded = {(line["value"], line["k"], line["epoch"], line["seed"]) for line in map(json.loads, lines)}
    assert recorded == {(in_run["value"], 20, 3, 0)}


def test_the_same_command_again_trains_nothing_more(demo):
    folder, _ = demo
    before = (folder / "runs" / "demo" / "metrics.jsonl").read_bytes()
    again = tool("train", "--config", "demo.yaml", *QUICK, cwd=folder)
    assert again.code == 0 and "knn k=20" in again.out
    assert (folder / "runs" / "demo" / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_repeats_from_its_own_config_bit_for_bit(demo):
    folder, _ = demo
    repeated = tool("train", "--config", "runs/demo/config.yaml", cwd=folder)
    assert repeated.code == 0 and "run      runs/demo-2" in repeated.out, repeated.err
    assert tiny.losses(folder / "runs" / "demo-2") == tiny.losses(folder / "runs" / "demo")
    assert tiny.summary(folder / "runs" / "demo-2")["results"] == tiny.summary(folder / "runs" / "demo")["results"]


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    root = tiny.photos(tmp_path / "photos", count=24)
    (tmp_path / "tiny.yaml").write_text(tiny.settings(root, tmp_path / "run", train={"epochs": 300}).text())
    process = start(run_tool, "train", "--config", "tiny.yaml", output=tmp_path / "said", cwd=tmp_path)
    wait_for_lines(tmp_path / "run" / "metrics.jsonl", 2, process)
    os.kill(process.pid, signal.SIGINT)
    ended = finish(process, tmp_path / "said")
    assert ended.code == 128 + signal.SIGINT and ended.err == ""
    assert "everything is saved in" in ended.out and "The same command again goes on from here." in ended.out


def test_a_run_that_was_moved_goes_on_from_its_own_config(tmp_path):
    root = tiny.photos(tmp_path / "photos", count=24)
    config = tiny.settings(root, tmp_path / "run", "instdisc", train={"epochs": 1}, evaluate={"protocols": []})
    (tmp_path / "tiny.yaml").write_text(config.text())
    assert tool("train", "--config", "tiny.yaml", cwd=tmp_path).code == 0
    (tmp_path / "run" / "summary.json").unlink()                            # as if it had been stopped
    (tmp_path / "run").rename(tmp_path / "moved")
    ended = tool("train", "--config", "moved/config.yaml", cwd=tmp_path)
    assert ended.code == 0 and "run      moved, finished already" in ended.out and not (tmp_path / "run").exists()


def test_another_setting_for_a_run_that_exists_is_refused_in_one_line(demo):
    folder, _ = demo
    ended = tool("train", "--config", "demo.yaml", *QUICK, "method.momentum=0.5", cwd=folder)
    assert ended.code == 2 and "method.momentum was 0.99 and is 0.5" in ended.err
    assert len(ended.err.strip().splitlines()) == 1
