"""Damaged, strange and hostile image files: loaded rightly, or skipped, counted and named; and the run goes on."""

import contextlib
import json
import os
import resource
import signal
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ImageFile

from common.data import folder
from common.data.images import UnreadableImage, image_size, read_image
from common.data.loader import Loader, plain_batches
from common.data.recipes import moco_v2
from common.printable import printable
from tests import tiny
from tests.faults.bad_images import BOMBS, LOADS, REFUSED, UNDETECTABLE
from tests.processes import finish, start, wait_for_lines

VIEWS = moco_v2(8)


@pytest.fixture(params=[False, True], ids=["", "LOAD_TRUNCATED_IMAGES"])
def lenient(request, monkeypatch):
    """Some libraries let Pillow fill up truncated images with grey, for the whole process."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", request.param)


@pytest.fixture
def silent(capfd):
    """A decoder's words do not name the file, so none reach the terminal."""
    yield
    assert capfd.readouterr() == ("", "")


pytestmark = pytest.mark.filterwarnings("error")


def ident(name: str) -> str:
    return printable(name[:40]).encode("ascii", "backslashreplace").decode()


@pytest.mark.parametrize("name", LOADS, ids=ident)
def test_strange_images_have_the_right_pixels(name, tmp_path, lenient, silent):
    make, expected, within = LOADS[name]
    make(tmp_path / name)
    found = read_image(tmp_path / name, channels=None)
    assert found.dtype == torch.uint8
    assert found.permute(1, 2, 0).shape == expected.shape
    assert np.abs(found.permute(1, 2, 0).numpy().astype(int) - expected.astype(int)).max() <= within
    assert sorted(image_size(tmp_path / name)) == sorted(expected.shape[:2])


@pytest.mark.parametrize("name", REFUSED)
def test_broken_images_are_refused_with_a_reason(name, tmp_path, lenient, silent):
    make, reason = REFUSED[name]
    make(tmp_path / name)
    with pytest.raises(UnreadableImage) as caught:
        read_image(tmp_path / name)
    assert reason in str(caught.value)
    assert 3 < len(str(caught.value)) < 500 and str(caught.value).isprintable()
    assert caught.value.path == str(tmp_path / name)


@pytest.mark.parametrize("name", UNDETECTABLE)
def test_damage_inside_the_pixels_gives_an_image_or_a_reason(name, tmp_path, lenient, silent):
    UNDETECTABLE[name](tmp_path / name)
    with contextlib.suppress(UnreadableImage):
        assert read_image(tmp_path / name).shape[0] == 3


def read_bombs(folder: Path, margin: int) -> None:
    """In a process that may take ``margin`` bytes of address space more than it has."""
    torch.set_num_threads(1)
    read_image(folder.parent / "plain.png")             # decoders are loaded
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + margin,) * 2)
    for path in sorted(folder.iterdir()):
        times = []
        for _ in range(3):
            began = time.perf_counter()
            try:
                reason = f"accepted {read_image(path).shape}"
            except UnreadableImage as error:
                reason = str(error)
            times.append(time.perf_counter() - began)
        print(json.dumps([path.name, min(times), reason]), flush=True)


def test_decompression_bombs_are_refused_at_once_and_in_little_memory(tmp_path, soak):
    bombs = tmp_path / "bombs"
    bombs.mkdir()
    LOADS["plain.png"][0](tmp_path / "plain.png")
    for name, make in BOMBS.items():
        make(bombs / name)
    said = tmp_path / "said"
    ended = finish(start(read_bombs, bombs, 50_000_000, output=said), said)
    assert (ended.code, ended.err) == (0, "")
    found = {name: (seconds, reason) for name, seconds, reason in map(json.loads, ended.out.splitlines())}
    assert found.keys() == BOMBS.keys()
    for name, (seconds, reason) in found.items():
        assert seconds < 0.05, name
        assert "accepted" not in reason and "MemoryError" not in reason, (name, reason)
    soak.report("D2", bombs=len(found), slowest_ms=round(1000 * max(seconds for seconds, _ in found.values()), 1))


def corpus(root: Path, count: int, good: int) -> tuple[Path, list[str]]:
    """``count`` damaged files among ``good`` ones, and the names of those that nobody can read."""
    kinds = {name: make for name, (make, _) in REFUSED.items() if name not in ("directory.jpg", "vanished.jpg")}
    kinds = list({**{f"bomb_{name}": make for name, make in BOMBS.items()}, **kinds, **UNDETECTABLE}.items())
    tiny.photos(root, count=good, classes=0)
    refused = []
    for i in range(count):
        name, make = kinds[i % len(kinds)]
        path = root / f"{i * good // count:03}_{i}_{name}"
        make(path)
        if name not in UNDETECTABLE:
            refused.append(path.name)
    return root, refused


def test_every_kind_passes_workers_and_is_shown_or_listed(tmp_path, soak):
    """Through the listing of a folder, and both kinds of batches by two workers."""
    good = [(name, make) for name, (make, _, _) in LOADS.items()]
    bad = [(name, make) for name, (make, _) in REFUSED.items() if name not in ("directory.jpg", "vanished.jpg")]
    for number, (name, make) in enumerate([*good, *bad, *BOMBS.items(), *UNDETECTABLE.items()]):
        make(tmp_path / (name if len(name) > 200 else f"{number}{name}"))
    images = folder(tmp_path, in_memory=False).train
    assert len(images) == len(good) + len(bad) + len(BOMBS) + len(UNDETECTABLE) + 1         # what link.png leads to
    expected = {i for i in range(len(images)) if refuses(images.path(i))}
    assert len(expected) >= len(bad) + len(BOMBS)
    failures = []
    shown = [i for index_B, _ in plain_batches(images, VIEWS, 7, workers=2, report=failures.append)
             for i in index_B.tolist()]
    assert shown == [i for i in range(len(images)) if i not in expected]
    assert [image.index for image in failures] == sorted(expected)
    met = []
    loader = Loader(images, VIEWS, batch_size=1, seed=0, workers=2, max_unreadable=1.0, report=met.append)
    index = [int(batch.index) for _, (batch,), _ in loader.stream(0, len(images))]
    assert sorted(image.index for image in met) == sorted(expected) and not expected & set(index)
    soak.report("D", kinds=len(LOADS) + len(REFUSED) + len(BOMBS) + len(UNDETECTABLE), rightly=len(LOADS),
                refused=len(REFUSED) + len(BOMBS), undetectable=len(UNDETECTABLE))


def refuses(path: str) -> bool:
    try:
        read_image(path)
    except UnreadableImage:
        return True
    return False


def settings(root: Path, run: Path, **train: object) -> str:
    return tiny.settings(root, run, "instdisc", train={"epochs": 1, "batch_size": 20, "workers": 2, "threads": 1,
                                                       "device": "cpu", "max_unreadable": 0.6, **train},
                         evaluate={"every": 0, "protocols": []}, checkpoint={"minutes": 1e-4}).text()


def train_and_weigh(text: str) -> None:
    """Train; then say by how many bytes this process or a worker of it has grown."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tiny.train(text)
    peaks = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    print("grown", *(1024 * (peak - before) for peak in peaks))


@pytest.fixture(scope="module")
def damaged(tmp_path_factory, request):
    count = 1000 if request.config.getoption("soak") else 150
    return corpus(tmp_path_factory.mktemp("damaged") / "images", count, good=count), count


@pytest.fixture(scope="module")
def trained(damaged, tmp_path_factory):
    """A run over as many damaged images as good ones, without interruption."""
    run = tmp_path_factory.mktemp("straight") / "run"
    process = start(train_and_weigh, settings(damaged[0][0], run), output=run.parent / "said")
    return run, finish(process, run.parent / "said")


def bad_names(run: Path) -> list[str]:
    return [Path(json.loads(line)["path"]).name for line in (run / "bad_images.jsonl").read_text().splitlines()]


def test_a_run_over_as_many_damaged_images_as_good_ones_names_each_once(damaged, trained, soak):
    (_, refused), count = damaged
    run, ended = trained
    assert ended.code == 0, ended.err
    names = bad_names(run)
    undetectable = [name for name in names if name not in refused]
    assert sorted(set(names)) == sorted(names) and set(refused) <= set(names)
    assert all(name.split("_", 2)[2] in UNDETECTABLE for name in undetectable)
    assert tiny.summary(run)["unreadable"] == len(names) and tiny.summary(run)["finished"]
    assert ended.err == ""
    grown = max(map(int, ended.out.splitlines()[-1].split()[1:]))
    assert grown < 200e6
    soak.report("D1", damaged=count, named=len(names), read=count - len(names), grown_mb=round(grown / 1e6))


def test_killed_among_damaged_images_and_continued_it_is_the_same_run(damaged, trained, tmp_path, soak):
    (root, _), count = damaged
    run, said = tmp_path / "run", tmp_path / "said"
    steps = 2 * count // 20
    kills = soak.count(1, 5)
    for kill in range(kills):
        process = start(tiny.train, settings(root, run), output=said)
        wait_for_lines(run / "metrics.jsonl", steps * (kill + 1) // (kills + 2), process)
        process.kill()
        assert finish(process, said).code == -signal.SIGKILL
    assert finish(start(tiny.train, settings(root, run), output=said), said).code == 0
    assert tiny.losses(run) == tiny.losses(trained[0])
    assert sorted(bad_names(run)) == sorted(bad_names(trained[0]))
    soak.report("D5", kills=kills, equal_steps=len(tiny.losses(run)))


@pytest.mark.parametrize("readable", [0, 1])
def test_a_set_that_cannot_be_read_ends_the_run_and_says_so(readable, tmp_path, soak):
    """Nothing at all, which is seen at the start, or one image, after which the rest is found to be bad."""
    began = time.monotonic()
    for i in range(300):
        (tmp_path / f"{i}.jpg").write_bytes(b"not found")
    if readable:
        LOADS["plain.jpg"][0](tmp_path / "0.jpg")
    said = tmp_path / "said"
    ended = finish(start(tiny.train, settings(tmp_path, tmp_path / "run"), output=said), said)
    assert ended.code == 1 and "no image in a known format" in ended.err
    assert ("cannot be read" in ended.err) if readable else ("none of the 64 images tried, of 300" in ended.err)
    assert time.monotonic() - began < 30
    soak.report("D4", readable=readable, seconds=round(time.monotonic() - began, 1))


def delete_while_training(text: str, path: str) -> None:
    from common.monitor import Monitor

    taken = Monitor.step

    def step(monitor, step):
        taken(monitor, step)
        if step.number == 12:                           # of ten a epoch
            os.unlink(path)

    Monitor.step = step
    tiny.train(text)


def test_an_image_deleted_while_a_run_reads_it_is_skipped_and_named(tmp_path):
    root, run, said = tiny.photos(tmp_path / "photos"), tmp_path / "run", tmp_path / "said"
    gone = root / "class0" / "004.png"
    text = tiny.settings(root, run, train={"workers": 2, "max_unreadable": 0.1}).text()
    ended = finish(start(delete_while_training, text, str(gone), output=said), said)
    assert ended.code == 0, ended.err
    assert bad_names(run) == ["004.png"]
    assert f"cannot be read, another image takes its place: {gone}: No such file or directory" in ended.out


@contextlib.contextmanager
def as_nobody():
    """Root may read everything, so step down, if this is root."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def test_an_image_that_becomes_forbidden_is_skipped_and_named():
    with tempfile.TemporaryDirectory() as name:         # pytest's own folders are closed to others
        os.chmod(name, 0o755)
        root = tiny.photos(Path(name), classes=0)
        met = []
        with as_nobody():
            loader = Loader(folder(root).train, VIEWS, batch_size=4, seed=0, workers=2, max_unreadable=0.1,
                            report=met.append)
            steps = loader.stream(0, 30)
            for _ in range(10):
                next(steps)
            assert not met
        os.chmod(root / "007.png", 0)
        with as_nobody():
            index = [i for _, (batch,), _ in steps for i in batch.index.tolist()]
            steps.close()
    assert [(Path(image.path).name, image.reason) for image in met] == [("007.png", "Permission denied")]
    assert len(index) == 80


def test_names_that_would_act_on_a_terminal_are_shown_escaped_and_kept_whole_in_the_list(tmp_path):
    """One of them is not UTF-8, which print() refuses; the process's output is UTF-8."""
    root, run, said = tiny.photos(tmp_path / "photos", classes=0), tmp_path / "run", tmp_path / "said"
    names = ["\x1b[2J\x1b]0;owned\x07.png", "line\nbreak.png", "caf\udce9.png", "<script>alert(1)<\u202egnp.png"]
    for name in names:
        (root / name).write_bytes(b"")
    text = tiny.settings(root, run, train={"epochs": 1, "workers": 2, "max_unreadable": 0.2},
                         evaluate={"every": 0, "protocols": []}).text()
    ended = finish(start(tiny.train, text, output=said), said)
    assert ended.code == 0, ended.err
    assert sorted(bad_names(run)) == sorted(names)
    shown = ended.out + ended.err
    assert all(c.isprintable() or c == "\n" for c in shown)
    for name in names:
        assert f"{root}/{printable(name)}: no image" in shown
    assert (run / "bad_images.jsonl").read_bytes().isascii()

    few = tiny.settings(root, tmp_path / "second", train={"max_unreadable": 0.01}).text()
    ended = finish(start(tiny.train, few, output=said), said)
    assert "cannot be read, more than max_unreadable" in ended.err and "\x1b" not in ended.err + ended.out
