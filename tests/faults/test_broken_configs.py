"""A broken config ends the command at once: one message that names the place, no traceback, torch never imported."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import pytest

from common.config import TRUSTED, Config
from common.sections import check_early, open_config

ROOT = Path(__file__).parents[2]
# Runs a tool as the command line does, and says whether torch was imported.
DRIVER = ("import atexit, runpy, sys; atexit.register(lambda: print('torch imported:', 'torch' in sys.modules)); "
          "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')")
SOUND = """\
data: {name: common.data.digits}
views: {name: common.data.recipes.digits, size: 8}
method:
  name: moco.MoCo
  momentum: 0.99
  temperature: 0.2
  key_bn: sync
  bn_groups: 1
  encoder: {name: common.backbones.encoder, arch: w16s1, dim: &dim 64}
  dictionary: {name: common.dictionary.Queue, size: 1024, dim: *dim, mask_own: true}
optimizer: {name: common.optim.sgd, lr: 0.06}
schedule: {name: common.schedule.cosine, warmup: 2}
train:
  epochs: 47
  batch_size: 64
evaluate: {every: 10, protocols: [{name: common.evaluate.KNN, k: [20]}]}
"""


class Broken(NamedTuple):
    old: str                        # of SOUND; "" puts ``new`` in the place of the whole file
    new: str
    where: str                      # how the message begins
    words: str                      # what else stands in it
    more: tuple[str, ...] = ()      # of the command line
    env: tuple[tuple[str, str], ...] = ()


def by_file(old: str, new: str, where: str, words: str) -> Broken:
    return Broken(old, new, f"my.yaml:{where}", words)


def by_command(override: str, words: str, **env: str) -> Broken:
    return Broken("", SOUND, f"command line: {override.partition('=')[0]}", words, (override,), tuple(env.items()))


BROKEN = [
    # keys
    by_file("momentum", "momentun", "5: method.momentun: ", "did you mean 'momentum'?"),
    by_file("batch_size", "batchsize", "15: train.batchsize: ", "did you mean 'batch_size'?"),
    by_file("schedule:", "scheduler:", "12: scheduler: ", "did you mean 'schedule'?"),
    by_file("arch", "arhc", "9: method.encoder.arhc: ", "did you mean 'arch'?"),
    by_file("k: [20]", "K: [20]", "16: evaluate.protocols.0.K: ", "takes no such key"),
    by_file("size: 1024, ", "", "10: method.dictionary: ", "needs size (a whole number)"),
    by_file("arch: w16s1, ", "", "9: method.encoder: ", "needs arch (text)"),
    by_file("  epochs: 47\n", "", "13: train: ", "needs epochs (a whole number)"),
    by_file("optimizer:", "optim:", "11: optim: ", "no such section"),
    by_file("  name: moco.MoCo\n", "", "3: method: ", "wants a mapping with a 'name'"),
    by_file("  epochs: 47\n", "  epochs: 47\n  epochs: 48\n", "15: train.epochs: ", "given twice, first in line 14"),
    by_file("train:", "method: {}\ntrain:", "13: method: ", "given twice, first in line 3"),
    by_command("train.batch=64", "did you mean 'batch_size'?"),
    by_command("trian={epochs: 3}", "did you mean 'train'?"),
    by_file("common.dictionary.Queue", "common.dictionary.InBatch", "10: method.dictionary.size: ", "It takes: none"),
    by_command("run.seeds=3", "did you mean 'seed'?"),
    # kinds of values
    by_file("epochs: 47", "epochs: many", "14: train.epochs: ", "wants a whole number; got the text 'many'"),
    by_file("epochs: 47", "epochs: 4.5", "14: train.epochs: ", "wants a whole number; got 4.5"),
    by_file("epochs: 47", "epochs: true", "14: train.epochs: ", "got true"),
    by_file("epochs: 47", "epochs: null", "14: train.epochs: ", "got null"),
    by_file("epochs: 47", "epochs: [47]", "14: train.epochs: ", "got [47]"),
    by_file("momentum: 0.99", 'momentum: "0.99"', "5: method.momentum: ", "write it without quotes"),
    by_file("lr: 0.06", "lr: 3e-4x", "11: optimizer.lr: ", "wants a number or null; got the text '3e-4x'"),
    by_file("mask_own: true", "mask_own: yes", "10: method.dictionary.mask_own: ", "wants true or false"),
    by_file("k: [20]", "k: many", "16: evaluate.protocols.0.k: ", "wants a whole number or a list"),
    by_file("[{name: common.evaluate.KNN, k: [20]}]", "KNN", "16: evaluate.protocols: ", "wants a list"),
    by_file("key_bn: sync", "key_bn: suffle", "7: method.key_bn: ", "'shuffle' or 'split' or 'sync'"),
    by_file("{name: common.data.digits}", "digits", "1: data: ", "wants a mapping with a 'name'"),
    by_command("train.channels_last=1", "wants true or false; got 1"),
    by_command("train.precision=fp8", "'float32' or 'bf16' or 'fp16'"),
    by_command("views.mean=[0.5,dark]", "wants a number; got the text 'dark'"),
    by_command("method.encoder=resnet50", "wants a Encoder"),
    # values
    by_file("momentum: 0.99", "momentum: 1.5", "5: method.momentum: ", "lies outside [0, 1]"),
    by_file("temperature: 0.2", "temperature: 0", "6: method.temperature: ", "is not positive"),
    by_file("size: 1024", "size: -1", "10: method.dictionary.size: ", "Give 1 or more"),
    by_file("size: 8", "size: 0", "2: views.size: ", "at least one pixel"),
    by_file("lr: 0.06", "lr: -0.1", "11: optimizer.lr: ", "is negative"),
    by_file("lr: 0.06", "lr: 0.06, base_lr: 0.03", "11: optimizer", "give one of the two"),
    by_file("lr: 0.06", "lr: .inf", "11: optimizer.lr: ", "is no rate"),
    by_file("warmup: 2", "warmup: 50", "12: schedule.warmup: ", "50.0 epochs of 47"),
    by_file("warmup: 2", "warmup: -1", "12: schedule.warmup: ", "Give from 0"),
    by_file("epochs: 47", "epochs: 0", "14: train.epochs: ", "less than 1"),
    by_file("batch_size: 64", "batch_size: -64", "15: train.batch_size: ", "less than 1"),
    by_file("k: [20]", "k: [0]", "16: evaluate.protocols.0.k: ", "at least 1"),
    by_file("dim: &dim 64", "dim: &dim 0", "9: method.encoder.dim: ", "Give 1 or more"),
    by_file("arch: w16s1", "arch: resnet51", "9: method.encoder.arch: ", "timm has no model 'resnet51'. Did you mean"),
    by_file("arch: w16s1", "arch: torchvision/resnet", "9: method.encoder.arch: ", "has no model"),
    by_file("arch: w16s1", "arch: tf/resnet50", "9: method.encoder.arch: ", "Did you mean timm/resnet50"),
    by_command("train.workers=-1", "is negative. Give 0"),
    by_command("train.clip=0", "is not positive"),
    by_command("train.max_unreadable=2", "is no share"),
    by_command("checkpoint={keep: 0}", "at least 1 to keep"),
    by_command("optimizer.momentum=1", "lies outside [0, 1)"),
    by_command("data={name: common.data.folder, root: /no/such/folder}", "there is no folder /no/such/folder"),
    by_command("data={name: common.data.folder}", "no images given"),
    by_command("data={name: common.data.file_list, train: list.txt}", "there is no such file"),
    # names
    by_file("moco.MoCo", "moco.MoKo", "4: method.name: ", "did you mean 'MoCo'?"),
    by_file("moco.MoCo", "moko.MoCo", "4: method.name: ", "Did you mean 'moco'?"),
    by_file("moco.MoCo", "os.system", "4: method.name: ", "not trusted"),
    by_file("moco.MoCo", "MoCo", "4: method.name: ", "wants the import path"),
    by_file("common.dictionary.Queue", "common.dictionaries.Queue", "10: method.dictionary.name: ", "cannot import"),
    by_file("common.data.digits", "common.data.recipes.digits", "1: data: ", "gives a Views"),
    by_file("name: common.optim.sgd", "name: common.schedule.constant", "11: optimizer.lr: ", "takes no such key"),
    # the batch and the machine
    by_file("batch_size: 64", "batch_size: 64\n  accumulate: 3", "15: train.batch_size: ", "sizes that do: 63 and 66"),
    by_command("train.batch_size=65", "2 processes x 1 micro-batch. Nearest sizes that do: 64 and 66", WORLD_SIZE="2"),
    by_command("train.device=cuda", "names 1 of its GPUs", LOCAL_WORLD_SIZE="2", WORLD_SIZE="2",
               CUDA_VISIBLE_DEVICES="0"),
    # the file itself
    Broken("", "", "my.yaml: ", "is empty"),
    Broken("", "- a\n- b\n", "my.yaml: ", "a config holds sections"),
    by_file("  momentum", "\tmomentum", "5: not valid YAML: ", "'\\t'"),
    by_file("k: [20]", "k: [20", "16: not valid YAML: ", ""),
    by_file("momentum: 0.99", "momentum: !!python/name:os.system", "5: method.momentum: ", "the tag !!python/name"),
    by_file("momentum: 0.99", "momentum: *m", "5: not valid YAML: ", "undefined alias"),
    by_file("momentum: 0.99", "momentum: .nan", "5: method.momentum: ", "not-a-number"),
    by_file("epochs: 47", "a.b: 47", "14: train: ", "is no key"),
    Broken("", SOUND, "command line: 'train.epochs': ", "write section.key=value", ("train.epochs",)),
    Broken("", "[" * 5000, "my.yaml:1: ", "more than 32 levels"),
]
BROKEN += [Broken("", SOUND, "no.yaml: ", "no such config", ("--config", "no.yaml"))]


class Ended(NamedTuple):
    code: int
    out: str
    err: str
    seconds: float                  # by the clock, on a machine that may do other things beside
    cpu_seconds: float              # of the processor


def run(broken: Broken, folder: Path) -> Ended:
    """``python tools/train.py`` with a config broken so."""
    text = broken.new if not broken.old else SOUND.replace(broken.old, broken.new, 1)
    assert not broken.old or text != SOUND
    (folder / "my.yaml").write_text(text)
    since, before = time.monotonic(), os.times()
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER, str(ROOT / "tools" / "train.py"), "--config", "my.yaml", *broken.more],
        cwd=folder, env=os.environ | dict(broken.env), capture_output=True, text=True, timeout=120, check=False)
    after = os.times()
    cpu_seconds = after.children_user - before.children_user + after.children_system - before.children_system
    return Ended(ended.returncode, ended.stdout, ended.stderr, time.monotonic() - since, cpu_seconds)


def test_a_broken_config_ends_at_once_with_one_message_and_without_torch(tmp_path, soak):
    count = soak.count(12, len(BROKEN))
    chosen = [BROKEN[i * len(BROKEN) // count] for i in range(count)]
    ended = [run(broken, tmp_path) for broken in chosen]
    for broken, (code, out, err, *_) in zip(chosen, ended, strict=True):
        first, *others = err.strip().splitlines()
        assert code == 2 and first.startswith(f"error: {broken.where}") and broken.words in err, (broken, err)
        assert len(others) < 4 and all(re.match(r"my\.yaml|command line|  ", line) for line in others), err
        assert out == "torch imported: False\n", (broken, out)
    assert [path.name for path in tmp_path.iterdir()] == ["my.yaml"]
    soak.report("F1", configs=count, refused=count, slowest_cpu_seconds=round(max(one.cpu_seconds for one in ended), 2),
                slowest_seconds=round(max(one.seconds for one in ended), 2))


@pytest.mark.parametrize("override", ["optimizer.lr=3e-4", "optimizer.lr=3E-4", "optimizer.lr=0.0003"])
def test_a_sound_config_passes_the_early_check(override):
    config = Config.parse(SOUND, "my.yaml", [override], TRUSTED)
    check_early(config)
    assert config.get("optimizer.lr") == 0.0003


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_early_check_refuses_no_config_that_ships(path, tmp_path):
    check_early(open_config(path, data=tmp_path if "root: null" in path.read_text() else None))
