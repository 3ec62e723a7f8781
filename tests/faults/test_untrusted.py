"""A stranger's files: nothing of them runs, writes or takes all memory, whichever door they come through."""

import builtins
import io
import multiprocessing
import os
import pickle
import resource
import runpy
import subprocess
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from common.checkpoint import DamagedCheckpoint, Folder, load, save
from common.config import ConfigError
from common.data import arrays, torchvision_set
from common.run import Run, load_run
from tests import tiny
from tests.processes import tool

FORK = multiprocessing.get_context("fork")
MEMORY, SECONDS = 3 * 2**30, 60         # what reading an absurd file may take; far more than reading a sound one does


class Evil:
    """Pickles to a call; loaded without care, it leaves a canary."""

    def __init__(self, call: Callable, *arguments: object):
        self.reduced = (call, arguments)

    def __reduce__(self):
        return self.reduced


def payloads(canary: Path) -> dict[str, Evil]:
    shell, python = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    return {"system": Evil(os.system, shell), "getoutput": Evil(subprocess.getoutput, shell),
            "popen": Evil(subprocess.Popen, shell, -1, None, None, None, None, None, True, True),
            "open": Evil(open, str(canary), "w"), "eval": Evil(eval, python), "exec": Evil(builtins.exec, python),
            "run_path": Evil(runpy.run_path, _script(canary)), "mkdir": Evil(os.mkdir, str(canary))}


def _script(canary: Path) -> str:
    script = canary.with_name("payload.py")
    script.write_text(f"open({str(canary)!r}, 'w')")
    return str(script)


def evil_files(folder: Path, canary: Path) -> list[Path]:
    """Eight payloads in three layouts: at the top, inside a state, and in torch's format of before 1.6."""
    made = []
    for name, payload in payloads(canary).items():
        inside = {"format": 1, "sha256": "0" * 64, "state": {"trainer": {"step": 1, "method": {"w": payload}}}}
        for layout, content in {"top": payload, "in": inside, "old": inside}.items():
            made.append(folder / f"{layout}-{name}.pt")
            torch.save(content, made[-1], _use_new_zipfile_serialization=layout != "old")
    return made


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    root = tiny.photos(tmp_path_factory.mktemp("photos"), count=8)
    folder = tmp_path_factory.mktemp("runs") / "run"
    sections = {"train": {"epochs": 1}, "evaluate": {"protocols": []}}
    return Run(tiny.settings(root, folder, "instdisc", **sections)).train().dir


def as_run(folder: Path, path: Path, config: str) -> Path:
    """A run's folder whose only checkpoint is the file ``path``."""
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints" / "step-00000001.pt").write_bytes(path.read_bytes())
    (folder / "config.yaml").write_text(config)
    return folder


def test_the_payloads_do_run_where_they_are_let_in(tmp_path, canary):
    for path in evil_files(tmp_path, canary):
        torch.load(path, weights_only=False)
        until = time.monotonic() + SECONDS
        while not canary.exists() and time.monotonic() < until:         # a Popen is not waited for
            time.sleep(0.01)
        assert canary.exists(), path
        canary.rmdir() if canary.is_dir() else canary.unlink()


def test_no_payload_runs_at_any_door(tmp_path, canary, finished, soak):
    config = (finished / "config.yaml").read_text().replace(str(finished), "stranger")
    doors = {"load": lambda path, run: load(path), "folder": lambda path, run: Folder(run / "checkpoints").newest(),
             "load_run file": lambda path, run: load_run(path), "load_run folder": lambda path, run: load_run(run)}
    commands = {"evaluate file": lambda path, run: ("evaluate", "knn", "--checkpoint", str(path)),
                "evaluate folder": lambda path, run: ("evaluate", "knn", "--checkpoint", str(run)),
                "resume": lambda path, run: ("train", "--config", str(run / "config.yaml"), f"run.dir={run}")}
    files = evil_files(tmp_path, canary)
    for path in files:
        run = as_run(tmp_path / "stranger", path, config)
        for door in doors.values():
            with pytest.raises(DamagedCheckpoint, match=rf"({path.name}|step-00000001.pt): "):
                door(path, run)
        for command in commands.values() if soak.long or path in files[1:3] else ():
            ended = tool(*command(path, run), cwd=tmp_path)
            assert ended.code not in (0, None) and "Traceback" not in ended.err and ".pt: " in ended.err, ended.err
    time.sleep(2)                                                       # for a process that would have been left behind
    assert not canary.exists()
    soak.report("S1", files=len(files), doors=len(doors) + len(commands), refused=len(files))


def test_data_that_a_config_names_runs_nothing(tmp_path, canary):
    for name, payload in payloads(canary).items():
        np.save(tmp_path / "x.npy", np.array([payload], dtype=object), allow_pickle=True)
        (tmp_path / "y.npy").write_bytes(pickle.dumps(payload))
        (tmp_path / "cifar-10-batches-py").mkdir(exist_ok=True)
        for batch in ("data_batch_1", "test_batch", "batches.meta"):
            (tmp_path / "cifar-10-batches-py" / batch).write_bytes(pickle.dumps(payload))
        for read in (lambda: arrays(tmp_path / "x.npy"), lambda: arrays(tmp_path / "y.npy"),
                     lambda: torchvision_set("CIFAR10", tmp_path)):
            with pytest.raises(ValueError, match="cannot read|not whole"):
                read()
        assert not canary.exists(), name


# Absurd files

def rewritten(path: Path, edit: Callable[[bytes], bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """The checkpoint with another pickle, or with its parts compressed."""
    parts = zipfile.ZipFile(io.BytesIO(path.read_bytes()))
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name in parts.namelist():
            archive.writestr(name, edit(parts.read(name)) if name.endswith("/data.pkl") else parts.read(name))
    return path


def lie(at: int, value: int = 10**12) -> Callable[[bytes], bytes]:
    """Replaces the ``at``-th 7 of the pickle: how many elements a storage has, or a tensor, and its stride."""
    def edit(content: bytes) -> bytes:
        parts = content.split(b"K\x07")
        number = b"\x8a\x08" + value.to_bytes(8, "little", signed=True)
        return b"K\x07".join(parts[:at + 1]) + number + b"K\x07".join(parts[at + 1:])
    return edit


def nested(depth: int) -> list:
    tree: list = []
    for _ in range(depth):
        tree = [tree]
    return tree


def laughs() -> list:
    tree: list = ["ha"] * 10
    for _ in range(30):
        tree = [tree] * 10
    return tree


def raw(content: bytes, name: str = "archive/data.pkl") -> Callable[[Path], None]:
    def make(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, content)
            archive.writestr("archive/version", "3\n")
    return make


def saved(content: object) -> Callable[[Path], None]:
    return lambda path: torch.save({"format": 1, "sha256": "0" * 64, "state": {"x": content}}, path)


def edited(edit: Callable[[bytes], bytes], **how: int) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        save(path, {"x": torch.arange(7.0)})
        rewritten(path, edit, **how)
    return make


def cyclic() -> list:
    tree: list = []
    tree.append(tree)
    return tree


def bomb(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"")
        with archive.open("archive/data/0", "w", force_zip64=True) as part:
            for _ in range(200):
                part.write(bytes(10**7))


def two_in_one(path: Path) -> None:
    """Python's reader takes the second archive, torch's the first: what one has checked the other does not load."""
    save(path, {"x": torch.arange(7.0)})
    path.write_bytes(2 * path.read_bytes())


HASHED_FOR_EVER = b"\x80\x02}q\x00)q\x01" + 60 * b"h\x01\x86q\x01" + b"K\x01s."       # {((((), ()), ...)): 1}
ABSURD: dict[str, Callable[[Path], None]] = {
    "a storage of 10^12 elements": edited(lie(0)), "a tensor of 10^12 elements": edited(lie(1)),
    "a negative shape": edited(lie(1, -7)),
    "stride 0": saved(torch.zeros(1).expand(10**12)), "overlapping rows": saved(torch.zeros(9).unfold(0, 8, 1)),
    "a thousand views of one tensor": saved([torch.zeros(10**6)[:]] * 1000), "a cycle": saved(cyclic()),
    "a billion laughs": saved(laughs()), "lists in lists": saved(nested(400)),
    "a text in a million places": saved(["x" * 10**4] * 10**6), "sparse": saved(torch.eye(3).to_sparse()),
    "meta": saved(torch.empty(10**12, device="meta")), "a parameter": saved(torch.nn.Parameter(torch.ones(2))),
    "compressed": edited(lambda content: content, compression=zipfile.ZIP_DEFLATED), "a zip bomb": bomb,
    "a number of 10^6 digits": raw(b"\x80\x02\x8b" + (10**6).to_bytes(4, "little") + b"\x01" * 10**6 + b"."),
    "20 MB of structure": raw(b"\x80\x02" + b"]" * (20 * 2**20) + b"."), "no pickle at all": raw(b""),
    "an unknown opcode": raw(b"\x80\x02\xff."), "a pickle that ends early": raw(b"\x80\x02}q\x00(X\x10\x00"),
    "a memo of 2^32": raw(b"\x80\x02]r\xff\xff\xff\xff."), "no archive folder": raw(b"\x80\x02}.", "data.pkl"),
    "an archive outside": raw(b"\x80\x02}.", "../data.pkl"),
    "protocol 4": raw(pickle.dumps(os.system, protocol=4)), "a set": raw(pickle.dumps({1}, protocol=2)),
    "two archives": two_in_one, "a key that is hashed for ever": raw(HASHED_FOR_EVER),
    "ten thousand long keys": raw(b"\x80\x02}(" + 10**4 * (b"(" + 2000 * b"K\x01" + b"tK\x01") + b"u."),
    "an OrderedDict of long keys": raw(b"\x80\x02ccollections\nOrderedDict\n]\x85R."),
    "numbers that collide": raw(b"\x80\x02}(" + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little")
                                                         + b"K\x01" for i in range(20_000)) + b"u."),
    "bytes": raw(pickle.dumps(b"x" * 9, protocol=2)), "format of text": lambda path: torch.save(
        {"format": "1", "sha256": "", "state": {}}, path),
}


def read_with_little(path: Path, said) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY + _size(), MEMORY + _size()))
    try:
        load(path)
        said.put("loaded")
    except DamagedCheckpoint as error:
        said.put(str(error))


def _size() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@pytest.mark.parametrize("kind", ABSURD)
def test_an_absurd_file_is_refused_with_little_memory(kind, tmp_path):
    path = tmp_path / "absurd.pt"
    ABSURD[kind](path)
    said = FORK.SimpleQueue()
    child = FORK.Process(target=read_with_little, args=(path, said))
    child.start()
    child.join(SECONDS)
    assert child.exitcode == 0, "it hung, or took all its memory"
    assert said.get().startswith(f"{path}: ") and "Traceback" not in kind


WRONG: dict[str, Callable[[dict], object]] = {
    "config": lambda state: state.update(config=5), "no config": lambda state: state.pop("config"),
    "facts": lambda state: state.update(facts=[]), "10^30 images": lambda s: s["facts"].update(num_samples=10**30),
    "no images": lambda state: state["facts"].update(num_samples=0), "trainer": lambda s: s.update(trainer=None),
    "step": lambda state: state["trainer"].update(step="1"), "a step before 0": lambda s: s["trainer"].update(step=-1),
    "a bool step": lambda state: state["trainer"].update(step=True), "rng": lambda state: state.update(rng={}),
    "a factor of text": lambda state: state["trainer"].update(lr_scale="half"),
    "weights": lambda state: state["trainer"]["method"].update({"log_z": 5}),
    "no weights": lambda state: state["trainer"]["method"].clear(),
    "another shape": lambda state: state["trainer"]["method"].update({"dictionary.v": torch.zeros(2, 2)}),
    "another dtype": lambda state: state["trainer"]["method"].update({"dictionary.v": torch.zeros(3).bool()}),
    "a config that is none": lambda state: state.update(config="[1"),
    "a config of another package": lambda state: state.update(config=state["config"].replace("instdisc.I", "os.I")),
    "a config with a bad value": lambda state: state.update(config=state["config"].replace("temperature: 0.2",
                                                                                         "temperature: -1")),
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_sound_file_with_wrong_content_is_refused_in_words(kind, tmp_path, finished):
    state = tiny.last_state(finished)
    WRONG[kind](state)
    save(tmp_path / "wrong.pt", state)
    with pytest.raises((DamagedCheckpoint, ConfigError), match=r"wrong\.pt|the checkpoint does not fit"):
        load_run(tmp_path / "wrong.pt")


def test_a_strangers_config_neither_makes_its_folder_nor_writes_outside(tmp_path, finished, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = tiny.last_state(finished)
    state["config"] = state["config"].replace(str(finished), "../outside/run")
    save(tmp_path / "a.pt", state)
    before = sorted(tmp_path.parent.rglob("*"))
    load_run(tmp_path / "a.pt")
    assert sorted(tmp_path.parent.rglob("*")) == before and not (tmp_path.parent / "outside").exists()
