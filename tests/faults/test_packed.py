"""Packing that is stopped anywhere, stores that are cut or changed, and indexes that lie."""

import functools
import hashlib
import io
import json
import os
import re
import resource
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from common import packing
from common.data import folder, packed
from common.data.images import UnreadableImage
from common.data.pack_index import INDEX, Index, read_index, write_index
from common.packing import Settings, pack
from tests import tiny
from tests.faults.bad_images import REFUSED
from tests.processes import finish, start

SETTINGS = Settings(short_side=16)
SHARD = 6000                                            # bytes: several shards


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Twelve images, two of them unreadable."""
    root = tiny.photos(tmp_path_factory.mktemp("photos"), count=10, classes=0)
    for name in ("003_text.jpg", "zzz.jpg"):
        REFUSED["text.jpg"][0](root / name)
    return root


def write(root: Path, store: Path, raw: bool = False) -> None:
    for _ in pack(folder(root, channels=None, in_memory=False), store, Settings(16, 90, raw), shard_bytes=SHARD):
        pass


@pytest.fixture(scope="module")
def straight(photos, tmp_path_factory):
    """A store that was written without a stop."""
    store = tmp_path_factory.mktemp("straight") / "store"
    write(photos, store)
    assert len(list(store.glob("*.tar"))) > 2
    return store


def contents(store: Path) -> dict[str, bytes]:
    return {str(path.relative_to(store)): path.read_bytes() for path in store.rglob("*") if path.is_file()}


def write_and_die(root: str, store: str, call: int, half: bool) -> None:
    """SIGKILL at the ``call``-th time that packing writes, syncs or renames, with half of the bytes written."""
    calls = 0
    original = {name: getattr(os, name) for name in ("write", "fsync", "replace", "truncate")}

    def planted(name, *arguments):
        nonlocal calls
        calls += 1
        if calls == call:
            if name == "write" and half:
                original["write"](arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return original[name](*arguments)

    for name in original:
        setattr(os, name, functools.partial(planted, name))
    write(Path(root), Path(store))


def test_killed_at_any_write_and_started_again_it_writes_the_same_bytes(photos, straight, tmp_path, soak):
    """Each start dies a little later than the one before it, until one gets to its end."""
    store, said, kills = tmp_path / "store", tmp_path / "said", 0
    for call in range(3, 200, soak.count(5, 1)):
        process = start(write_and_die, str(photos), str(store), call, bool(kills % 2), output=said)
        ended = finish(process, said)
        if ended.code == 0:
            break
        assert ended.code == -signal.SIGKILL, ended.err
        kills += 1
        with pytest.raises(ValueError, match="is not finished"):
            packed(store)
    assert kills > 3 and contents(store) == contents(straight)
    soak.report("P1", kills=kills)


def partly_written(photos: Path, store: Path, count: int) -> None:
    members = pack(folder(photos, channels=None, in_memory=False), store, SETTINGS, shard_bytes=SHARD)
    for _ in range(count):
        next(members)
    members.close()


def zeros(path: Path, count: int) -> None:
    """The last ``count`` bytes never came to the disk."""
    size = path.stat().st_size
    os.truncate(path, size - count)
    os.truncate(path, size)


@pytest.mark.parametrize("loss", [
    lambda store: zeros(store / "packing/records", 100),
    lambda store: os.truncate(store / "packing/records", 150),
    lambda store: zeros(sorted(store.glob("*.tar"))[-1], 700),
    lambda store: os.truncate(sorted(store.glob("*.tar"))[-1], 0),
    lambda store: os.unlink(sorted(store.glob("*.tar"))[-1]),
    lambda store: os.truncate(store / "packing/bad.jsonl", 5),
    lambda store: (store / "packing/bad.jsonl").write_bytes(bytes(30) + b"\n"),
    lambda store: (store / "packing/records").write_bytes(bytes([9]) * 640),
], ids=["zeros in records", "records cut", "zeros in a shard", "shard empty", "shard gone", "reasons cut",
        "zeros in reasons", "other records"])
def test_after_a_power_cut_it_goes_on_from_what_is_whole(loss, photos, straight, tmp_path):
    partly_written(photos, tmp_path / "store", 11)
    loss(tmp_path / "store")
    write(photos, tmp_path / "store")
    assert contents(tmp_path / "store") == contents(straight)


def test_without_its_plan_nothing_is_taken_up_and_nothing_deleted(photos, tmp_path):
    """What lies there may be of other settings, or of someone else who has a folder of this name."""
    partly_written(photos, tmp_path / "store", 11)
    (tmp_path / "store/packing/plan.json").unlink()
    before = contents(tmp_path / "store")
    with pytest.raises(ValueError, match="--out: .*store holds something else"):
        write(photos, tmp_path / "store")
    assert contents(tmp_path / "store") == before


def test_a_damaged_plan_is_said(photos, tmp_path):
    partly_written(photos, tmp_path / "store", 2)
    for text in ("{", "[3]", "null"):
        (tmp_path / "store/packing/plan.json").write_text(text)
        with pytest.raises(ValueError, match="plan.json is damaged. Delete .*store, and start anew"):
            write(photos, tmp_path / "store")


def test_only_shards_are_deleted(photos, straight, tmp_path):
    store = tmp_path / "store"
    partly_written(photos, store, 2)
    for name in ("notes.tar", "99999.tar"):
        (store / name).write_text("x")
    write(photos, store)
    assert contents(store) == contents(straight) | {"notes.tar": b"x"}


def test_a_store_that_another_process_has_finished_meanwhile_is_left_alone(photos, straight, tmp_path, monkeypatch):
    """After this one has looked, and before it has the lock."""
    original = packing.member_names

    def slowly(*arguments):
        monkeypatch.setattr(packing, "member_names", original)
        write(photos, tmp_path / "store")
        return original(*arguments)

    monkeypatch.setattr(packing, "member_names", slowly)
    assert not list(pack(folder(photos, channels=None, in_memory=False), tmp_path / "store", SETTINGS,
                         shard_bytes=SHARD))
    assert contents(tmp_path / "store") == contents(straight)


def test_a_finished_shard_that_has_changed_stops_it(photos, tmp_path):
    partly_written(photos, tmp_path / "store", 11)
    os.truncate(tmp_path / "store/00000.tar", 1000)
    with pytest.raises(ValueError, match=r"--out: .*00000.tar had .* bytes when it was done, and has 1,000. Delete"):
        write(photos, tmp_path / "store")


def write_in_little_room(root: str, store: str) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))         # a file that grows beyond it: EFBIG, as ENOSPC
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    from tests.processes import run_tool

    run_tool("pack", "--data", root, "--out", store, "--short-side", "16", "--workers", "0")


def test_a_full_disk_is_said_and_loses_nothing(photos, straight, tmp_path):
    store, said = tmp_path / "store", tmp_path / "said"
    ended = finish(start(write_in_little_room, str(photos), str(store), output=said), said)
    assert ended.code == 74 and "Traceback" not in ended.err
    assert re.search("File too large, after [1-9] of 12 images. Nothing of them is lost: make room", ended.err)
    for _ in pack(folder(photos, channels=None, in_memory=False), store, SETTINGS):
        pass
    whole = tmp_path / "whole"
    for _ in pack(folder(photos, channels=None, in_memory=False), whole, SETTINGS):
        pass
    assert contents(store) == contents(whole)


def copy(store: Path, path: Path) -> Path:
    path.mkdir()
    for name, data in contents(store).items():
        (path / name).write_bytes(data)
    return path


DAMAGE = {
    "cut": (lambda store: os.truncate(store / "00001.tar", 1000), "00001.tar has 1,000 bytes, and the index says"),
    "grown": (lambda store: os.truncate(store / "00001.tar", 9000), "it was cut or replaced"),
    "gone": (lambda store: os.unlink(store / "00000.tar"), "cannot open the shard .*00000.tar: No such file"),
    "another": (lambda store: (store / "00000.tar").write_bytes(bytes((store / "00000.tar").stat().st_size)),
                "00000.tar is not the one that was packed: .*Copy the store again"),
    "link": (lambda store: ((store / "00000.tar").rename(store / "x"), (store / "00000.tar").symlink_to("x")),
             "00000.tar is not a regular file"),
    "pipe": (lambda store: (os.unlink(store / "00000.tar"), os.mkfifo(store / "00000.tar")), "not a regular file"),
    "index cut": (lambda store: os.truncate(store / INDEX, 500), f"{INDEX} cannot be used: it ends early"),
    "index empty": (lambda store: os.truncate(store / INDEX, 0), "cannot be used: it ends early"),
    "index of 1 TB": (lambda store: os.truncate(store / INDEX, 2**40), "more than 4,294,967,296"),
    "index's end": (lambda store: zeros(store / INDEX, 20), "its SHA-256 is another"),
    "index's link": (lambda store: ((store / INDEX).rename(store / "x"), (store / INDEX).symlink_to("x")),
                     f"{INDEX} is not a regular file"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_store_is_refused_when_it_is_opened(name, straight, tmp_path):
    damage, message = DAMAGE[name]
    store = copy(straight, tmp_path / "store")
    damage(store)
    with pytest.raises(ValueError, match="root: .*" + message):
        packed(store)


@pytest.mark.parametrize("raw", [False, True])
def test_a_shard_that_is_cut_while_it_is_read_costs_images_and_not_the_process(raw, photos, tmp_path):
    store = tmp_path / "store"
    write(photos, store, raw)
    images = packed(store).train
    images.read(0)
    for shard in store.glob("*.tar"):
        os.truncate(shard, 700)
    for i in {0, 5, 9} - images.bad.keys():
        with pytest.raises(UnreadableImage, match=r"its shard \d{5}.tar ends before it does"):
            images.read(i)


def test_a_damaged_jpeg_in_a_store_is_unreadable(straight, tmp_path):
    store = copy(straight, tmp_path / "store")
    index = read_index(store)
    with open(store / "00000.tar", "r+b") as file:
        file.seek(int(index.columns["offset"][0]))
        file.write(b"no picture")
    with pytest.raises(UnreadableImage, match="no image in a known format") as caught:
        packed(store).train.read(0)
    assert caught.value.path == f"{store}/00000.tar:{index.keys[0]}"


def lie(column: str, value: int, row: int = 0) -> callable:
    def change(facts, columns, keys, classes):
        columns[column] = columns[column].copy()
        columns[column][row] = value
    return change


def none_is_readable(facts, columns, keys, classes):
    columns["length"] = 0 * columns["length"]
    facts["bad"] = {str(number): "x" for number in range(len(keys))}


def shard_of_none(facts, columns, keys, classes):
    facts["shards"].append({"name": "00099.tar", "bytes": 1})


def fact(name: str, value: object) -> callable:
    return lambda facts, columns, keys, classes: facts.update({name: value})


def shard_fact(name: str, value: object) -> callable:
    return lambda facts, columns, keys, classes: facts["shards"][0].update({name: value})


BIG = 2**62
LIES = {
    "negative offset": lie("offset", -512), "offset beyond": lie("offset", BIG), "negative length": lie("length", -1),
    "length beyond": lie("length", BIG), "no bytes": lie("length", 0), "shard beyond": lie("shard", 99),
    "negative shard": lie("shard", -1), "no pixels": lie("height", 0), "negative pixels": lie("width", -5),
    "huge": lie("height", 2**31 - 1), "many channels": lie("channels", 2**31 - 1), "label beyond": lie("label", 7),
    "label below": lie("label", -2), "format": fact("format", 2), "kind": fact("kind", "pickle"),
    "more for training": fact("train", 13), "none for training": fact("train", 0), "train is text": fact("train", "x"),
    "train is fractional": fact("train", 11.5), "test": fact("test", 5), "no shards": fact("shards", []),
    "shards": fact("shards", 3), "shard outside": shard_fact("name", "../00000.tar"),
    "shard is absolute": shard_fact("name", "/etc/passwd"), "shard's size is text": shard_fact("bytes", "x"),
    "train is a float": fact("train", 12.0), "train is true": fact("train", True), "test is a float": fact("test", 0.5),
    "shards are mixed": lie("shard", 1), "a shard of no images": shard_of_none, "images of no shard": none_is_readable,
    "an unreadable image has bytes": lie("length", BIG, row=11),
    "bad beyond": fact("bad", {"12": "x"}), "bad is no number": fact("bad", {"x": "x"}),
    "bad reason": fact("bad", {"3": [1]}), "bad is a list": fact("bad", [3]),
    "a key more": lambda facts, columns, keys, classes: keys.append("x"),
    "a key less": lambda facts, columns, keys, classes: keys.pop(),
}


@pytest.mark.parametrize("name", LIES)
def test_an_index_that_lies_is_refused(name, photos, raw_store, tmp_path):
    """Its digest is right: a stranger can compute it."""
    store = copy(raw_store, tmp_path / "store")
    index = read_index(store)
    LIES[name](index.facts, index.columns, index.keys, index.classes)
    write_index(store, index)
    with pytest.raises(ValueError, match=f"root: .*{INDEX} cannot be used: "):
        packed(store)


@pytest.mark.parametrize("column, value", [("channels", 2**31 - 1), ("channels", 2), ("height", 65_536), ("width", 0)])
def test_an_index_of_jpegs_lists_what_a_jpeg_can_be(column, value, straight, tmp_path):
    store = copy(straight, tmp_path / "store")
    index = read_index(store)
    lie(column, value)(*index)
    write_index(store, index)
    with pytest.raises(ValueError, match=f"root: .*{INDEX} cannot be used: one of its images has .*pixels"):
        packed(store)


def test_a_reason_in_an_index_cannot_act_on_a_terminal(straight, tmp_path):
    store = copy(straight, tmp_path / "store")
    index = read_index(store)
    index.facts["bad"]["11"] = "\x1b[2Jall is\nwell"
    write_index(store, index)
    assert packed(store).train.bad[11] == r"\x1b[2Jall is\nwell"


def test_a_store_in_memory_is_no_larger_than_its_index_says(photos, tmp_path, monkeypatch):
    """All its images are said to be small, and are one large one: auto leaves it on the disk."""
    monkeypatch.setattr("common.data.files._MEMORY", 12 * 3 * 16 * 16 + 1)
    store = tmp_path / "store"
    for _ in pack(folder(photos, channels=None, in_memory=False), store, SETTINGS):
        pass
    large = io.BytesIO()
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(large, "JPEG")
    (store / "00000.tar").write_bytes(large.getvalue())
    index = read_index(store)
    index.facts["shards"][0]["bytes"] = large.tell()
    said = {"offset": 0, "length": large.tell(), "height": 16, "width": 16,
            "sha256": np.frombuffer(hashlib.sha256(large.getvalue()).digest(), np.uint8)}
    good = index.columns["length"] > 0
    for name, value in said.items():
        index.columns[name] = index.columns[name].copy()
        index.columns[name][good] = value
    write_index(store, index)
    images = packed(store).train
    assert images.array is None and images.read(0).shape == (3, 64, 64)


def test_a_jpeg_of_more_bytes_than_its_pixels_take_is_not_read(straight, tmp_path):
    """A shard may have holes: a gigabyte that takes nothing on the disk."""
    store = copy(straight, tmp_path / "store")
    index = read_index(store)
    index.columns["length"] = index.columns["length"].copy()
    index.columns["length"][0] = 2**29
    index.facts["shards"][0]["bytes"] = 2**30
    os.truncate(store / "00000.tar", 2**30)
    write_index(store, index)
    with pytest.raises(UnreadableImage, match="536,870,912 bytes, more than"):
        packed(store).train.read(0)


@pytest.fixture(scope="module")
def raw_store(photos, tmp_path_factory):
    store = tmp_path_factory.mktemp("raw") / "store"
    write(photos, store, raw=True)
    return store


def test_random_changes_of_an_index_are_refused_or_read_within_the_shards(raw_store, tmp_path, soak):
    store, draw, refused = copy(raw_store, tmp_path / "store"), np.random.default_rng(0), 0
    rounds = soak.count(150, 5000)
    for _ in range(rounds):
        index = read_index(raw_store)
        columns = {name: column.copy() for name, column in index.columns.items()}
        name = draw.choice([name for name in columns if name != "sha256"])
        columns[name][draw.integers(12)] = draw.choice([-1, 0, 1, 5, 200, 2**31 - 1, draw.integers(10_000)])
        write_index(store, Index(index.facts, columns, index.keys, index.classes))
        try:
            images = packed(store).train
        except ValueError:
            refused += 1
            continue
        for i in range(len(images)):
            try:
                assert images.read(i).dtype.itemsize == 1
            except UnreadableImage:
                continue
    assert rounds / 5 < refused < rounds
    soak.report("P2", rounds=rounds, refused=refused)


@pytest.mark.parametrize("header", [b"[" * 100_000, b"{}", b"[]", b"null", b"\xff",
                                    b'{"__metadata__": {"store": "{}"}}',
                                    json.dumps({"__metadata__": {"store": "{}", "sha256": "0"}}).encode()])
def test_a_header_that_is_none_is_refused(header, straight, tmp_path):
    store = copy(straight, tmp_path / "store")
    (store / INDEX).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(ValueError, match="cannot be used"):
        packed(store)
