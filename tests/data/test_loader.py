import itertools
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from contextlib import closing
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import counter
from common.data import loader
from common.data.datasets import Images
from common.data.images import read_image
from common.data.loader import Loader, plain_batches
from common.data.reading import candidates
from common.data.recipes import moco_v2
from common.data.transfer import on_device

SEED = 7
VIEWS = moco_v2(16)
ROOT = Path(__file__).resolve().parents[2]
LONG = 10_000           # steps that no test gets through


class Files(Images):
    """Images that are read one by one."""

    def __init__(self, paths):
        super().__init__("folder photos", [path.name for path in paths], torch.arange(len(paths)) % 3, [*"abc"], None)
        self.paths, self.channels, self.size = paths, 3, 20

    def read(self, i):
        return read_image(self.paths[i])


def noise(n, height, width):
    return torch.randint(256, (n, height, width, 3), generator=torch.Generator().manual_seed(n), dtype=torch.uint8)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    for i in range(23):
        Image.fromarray(noise(1, 20 + i, 44 - i)[0].numpy()).save(folder / f"{i:02}.png")
    return Files(sorted(folder.iterdir()))


@pytest.fixture
def damaged(files, tmp_path):
    """The files, but number 4 is cut short and number 11 is gone."""
    for path in files.paths:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "04.png").write_bytes(files.paths[4].read_bytes()[:-100])
    (tmp_path / "11.png").unlink()
    return Files([tmp_path / path.name for path in files.paths])


@pytest.fixture
def memory():
    array = noise(23, 20, 20).movedim(3, 1)
    return Images("array", [*"abcdefghijklmnopqrstuvw"], torch.arange(23) % 3, [*"abc"], array)


def run(images, start=0, stop=8, **options):
    """All micro-batches of the steps, in one list."""
    loader = Loader(images, VIEWS, **{"batch_size": 5, "seed": SEED, "workers": 0, **options})
    return [batch for _, batches, _ in loader.stream(start, stop) for batch in batches]


def indices(batches):
    return [batch.index.tolist() for batch in batches]


def joined(lists):
    return [*itertools.chain.from_iterable(lists)]


def assert_same(batches, others):
    assert indices(batches) == indices(others)
    for batch, other in zip(batches, others):
        assert torch.equal(batch.label, other.label)
        assert len(batch.views) == len(other.views)
        assert all(torch.equal(view, view_) for view, view_ in zip(batch.views, other.views))


def assert_made_one_by_one(files, batch, epoch):
    assert torch.equal(batch.label, batch.index % 3)
    for v, view in enumerate(batch.views):
        crops = [VIEWS.crop(read_image(files.paths[i]), SEED, epoch, i, v) for i in batch.index.tolist()]
        assert torch.equal(view, VIEWS.finish(torch.stack(crops), SEED, epoch, batch.index, v))


def test_batches_are_the_order_of_each_epoch_cut_and_cropped_image_by_image(files):
    for step, batch in enumerate(run(files)):
        epoch, place = divmod(step, 4)                                      # 23 images are 4 batches of 5, and 3 left
        index_B = counter.permutation(23, SEED, counter.stream("order"), epoch)[5 * place : 5 * place + 5]
        assert torch.equal(batch.index, index_B)
        assert_made_one_by_one(files, batch, epoch)


def test_batches_from_memory_are_the_views_of_the_same_order(files, memory):
    batches = run(memory)
    assert indices(batches) == indices(run(files))
    for step, batch in enumerate(batches):
        views = VIEWS.from_memory(memory.array[batch.index], SEED, step // 4, batch.index)
        assert torch.equal(batch.label, batch.index % 3)
        assert all(torch.equal(view, view_) for view, view_ in zip(batch.views, views))


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_any_number_of_workers_gives_the_same_batches(files, memory, workers):
    assert_same(run(files, workers=workers), run(files))
    assert_same(run(memory, workers=workers), run(memory))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_started_in_the_middle_is_the_tail_of_the_whole(files, memory, workers):
    assert_same(run(files, 25, 30, workers=workers), run(files, 0, 30, workers=workers)[25:])
    assert_same(run(memory, 25, 30), run(memory, 0, 30)[25:])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("road, workers", [("files", 0), ("files", 2), ("memory", 0)])
def test_batches_on_a_gpu_are_those_on_the_cpu(road, workers, request):
    images, device = request.getfixturevalue(road), torch.device("cuda")
    for batch, other in zip(run(images, workers=workers, device=device), run(images), strict=True):
        assert torch.equal(batch.index.cpu(), other.index) and torch.equal(batch.label.cpu(), other.label)
        for view, view_ in zip(batch.views, other.views):
            assert view.is_cuda
            torch.testing.assert_close(view.cpu(), view_, rtol=0, atol=1e-2)
    for (index_B, x_BcSS), (_, x_BcSS_) in zip(plain_batches(images, VIEWS, 5, workers, device),
                                               plain_batches(images, VIEWS, 5), strict=True):
        assert not index_B.is_cuda
        torch.testing.assert_close(x_BcSS.cpu(), x_BcSS_, rtol=0, atol=1e-2)


@pytest.mark.parametrize("free, where", [(2.0, "meta"), (1.9, "cpu")])        # of what the images take
def test_images_that_would_take_half_a_gpus_memory_stay_on_the_host(free, where, memory, monkeypatch, caplog):
    """Their batches are on the device all the same; here one that computes nothing."""
    monkeypatch.setattr(loader, "free_bytes", lambda device: free * memory.array.nbytes)
    device = torch.device("meta")
    streamed = Loader(memory, VIEWS, batch_size=5, seed=SEED, device=device)
    assert streamed._array.device.type == where
    assert bool(caplog.messages) == (where == "cpu") and all("stay in the host's memory" in m for m in caplog.messages)
    (_, (batch,), _), *_ = streamed.stream(0, 2)
    assert batch.views[0].device == batch.index.device == device


def test_steps_are_numbered_and_waiting_is_in_seconds(files):
    stream = Loader(files, VIEWS, batch_size=5, seed=SEED).stream(3, 6)
    steps, batches, seconds = zip(*stream)
    assert steps == (3, 4, 5) and all(len(step) == 1 for step in batches) and all(0 < s < 60 for s in seconds)


def test_waiting_for_the_device_is_no_waiting_for_data(files, monkeypatch):
    """A GPU that is at work on the step before lets the loader wait for its copy, too. By a clock of our own."""
    clock, images = [0.0], Files(files.paths)

    def read(i):
        clock[0] += 1
        return read_image(files.paths[i])

    class Copied:
        def __init__(self, blocking):
            pass

        def record(self, stream):
            pass

        def synchronize(self):
            clock[0] += 100

    def on_a_gpu(answers, device, waited):
        return on_device(answers, torch.device("cuda"), waited)

    images.read = read
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(torch.cuda, "Event", Copied)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    monkeypatch.setattr("common.data.transfer.to_device", lambda memory, device: memory)
    monkeypatch.setattr("common.data.loader.on_device", on_a_gpu)
    seconds = [seconds for *_, seconds in Loader(images, VIEWS, batch_size=6, seed=SEED, accumulate=2).stream(0, 4)]
    assert clock[0] == 4 * 6 + 7 * 100 and seconds == [6] * 4           # a step's images are read


def test_an_epoch_is_a_permutation_without_its_tail_and_no_two_are_alike(files):
    loader = Loader(files, VIEWS, batch_size=5, seed=SEED)
    orders = [loader.order(epoch).tolist() for epoch in range(3)]
    assert loader.steps_per_epoch == 4
    assert all(sorted(order) == list(range(23)) for order in orders)
    assert all(a != b for a, b in itertools.combinations(orders, 2))
    assert joined(indices(run(files, 0, 4))) == orders[0][:20]
    assert Loader(files, VIEWS, batch_size=5, seed=SEED + 1).order(0).tolist() != orders[0]


@pytest.mark.parametrize("road", ["files", "memory"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_shares_of_three_ranks_side_by_side_are_the_batch_of_one(road, accumulate, request):
    images, options = request.getfixturevalue(road), {"batch_size": 12, "accumulate": accumulate}
    whole = run(images, 0, 2, **options)
    ranks = [run(images, 0, 2, rank=rank, world=3, workers=rank, **options) for rank in range(3)]
    assert len(whole) == 2 * accumulate
    for batch, *shares in zip(whole, *ranks):
        assert torch.equal(batch.index, torch.cat([share.index for share in shares]))
        assert torch.equal(batch.label, torch.cat([share.label for share in shares]))
        for view, *parts in zip(batch.views, *(share.views for share in shares)):
            torch.testing.assert_close(view, torch.cat(parts), rtol=0, atol=1e-5)


def test_micro_batches_are_slices_of_the_batch(files):
    micro = run(files, 0, 3, batch_size=12, accumulate=3)
    whole = run(files, 0, 3, batch_size=12)
    assert [len(batch.index) for batch in micro] == [4] * 9
    assert indices(whole) == [joined(indices(micro[i : i + 3])) for i in (0, 3, 6)]


@pytest.mark.parametrize("options, message", [
    ({"batch_size": 24}, "train.batch_size: 24, but folder photos holds 23 images .* a batch of at most 23"),
    ({"batch_size": 24, "world": 4, "rank": 0}, "holds 23 images .* a batch of at most 20"),
    ({"batch_size": 32, "world": 32, "rank": 0}, "holds 23 images .* Give more images.$"),
    ({"batch_size": 10, "accumulate": 2, "world": 2, "rank": 0}, "10 images .* 2 processes x 2 .*: 8 and 12"),
    ({"batch_size": 3, "accumulate": 4}, "3 images .* 1 process x 4 micro-batches.*: 4"),
    ({"batch_size": 0}, "train.batch_size: 0 "),
    ({"batch_size": 4, "accumulate": 0}, "train.accumulate: 0"),
])
def test_batches_that_cannot_be_cut_are_refused_with_the_nearest_that_can(files, options, message):
    with pytest.raises(ValueError, match=message):
        Loader(files, VIEWS, seed=SEED, **options)


def replaced(order, bad, epoch):
    """The order with each bad image replaced by the first of its candidates that is good."""
    return [next(c for c in candidates(23, SEED, epoch, i) if c not in bad) for i in order]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_unreadable_images_are_replaced_reported_once_and_counted(damaged, memory, workers):
    reports = []
    loader = Loader(damaged, VIEWS, batch_size=5, seed=SEED, workers=workers, max_unreadable=0.1, report=reports.append)
    batches = [batch for _, step, _ in loader.stream(0, 12) for batch in step]
    assert sorted(image.index for image in reports) == [4, 11]
    assert {image.index: image.path for image in reports} == {4: "04.png", 11: "11.png"}
    assert all(image.reason for image in reports)
    assert list(loader.unreadable.values()) == reports
    wanted = [replaced(loader.order(epoch)[:20].tolist(), {4, 11}, epoch) for epoch in range(3)]
    assert joined(indices(batches)) == joined(wanted)
    for step, batch in enumerate(batches):
        assert_made_one_by_one(damaged, batch, step // 4)
    memory.bad = {4: "cut short", 11: "gone"}
    assert indices(run(memory, 0, 12, max_unreadable=0.1)) == indices(batches)


def test_substitutes_of_substitutes_are_found(files):
    images = Files([Path("nowhere") / path.name if i % 2 else path for i, path in enumerate(files.paths)])
    found = joined(indices(run(images, 0, 4, max_unreadable=0.5)))
    assert found == replaced(Loader(images, VIEWS, batch_size=5, seed=SEED).order(0)[:20].tolist(), range(1, 23, 2), 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_more_unreadable_images_than_allowed_are_an_error_that_names_them(damaged, workers):
    message = r"2 of the 23 images of folder photos \(8.70%\).*max_unreadable = 5.00%.*(04|11).png \(.*(04|11).png \("
    with pytest.raises(ValueError, match=message):
        run(damaged, 0, 8, max_unreadable=0.05, workers=workers)
    assert not multiprocessing.active_children()


def test_more_unreadable_images_in_memory_than_allowed_are_refused_at_once(memory):
    memory.bad = {4: "cut short", 11: "gone"}
    with pytest.raises(ValueError, match=r"2 of the 23 images of array.*e \(cut short\); l \(gone\)"):
        Loader(memory, VIEWS, batch_size=5, seed=SEED, max_unreadable=0.05)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_set_without_one_readable_image_ends_instead_of_searching_for_ever(files, memory, workers):
    with pytest.raises(ValueError, match="20 of them in a row"):
        run(Files([Path("nowhere") / path.name for path in files.paths]), max_unreadable=1.0, workers=workers)
    memory.bad = dict.fromkeys(range(23), "gone")
    with pytest.raises(ValueError, match="20 of them in a row"):
        run(memory, max_unreadable=1.0)


def test_iterating_leaves_all_random_states_alone(files, memory):
    def states():
        return [torch.get_rng_state().tolist(), str(np.random.get_state()[1].tolist()), random.getstate()]  # noqa: NPY002

    before = states()
    for images, workers in [(files, 0), (files, 2), (memory, 0)]:
        run(images, workers=workers)
        list(plain_batches(images, VIEWS, 5, workers))
    assert states() == before


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 3])
def test_plain_batches_give_every_image_once_in_order(files, memory, workers, world):
    for images in (files, memory):
        shares = [list(plain_batches(images, VIEWS, 5, workers, rank=rank, world=world)) for rank in range(world)]
        index_n = torch.cat([index_B for share in shares for index_B, _ in share])
        x_ncSS = torch.cat([x_BcSS for share in shares for _, x_BcSS in share])
        assert index_n.tolist() == list(range(23))
        assert [len(x_BcSS) for _, x_BcSS in shares[0]] == ([5, 5, 5, 5, 3] if world == 1 else [5, 2])
        for i in range(23):
            alone = (VIEWS.normalize(VIEWS.evaluation(images.read(i)).unsqueeze(0)) if images is files
                     else VIEWS.evaluation_batch(images.array[i : i + 1]))
            torch.testing.assert_close(x_ncSS[i : i + 1], alone, rtol=0, atol=1e-5)


def test_plain_batches_leave_unreadable_images_out(damaged, memory):
    readable = [i for i in range(23) if i not in (4, 11)]
    reports = []
    batches = list(plain_batches(damaged, VIEWS, 2, workers=2, report=reports.append))
    assert torch.cat([index_B for index_B, _ in batches]).tolist() == readable
    assert all(len(index_B) == len(x_BcSS) > 0 for index_B, x_BcSS in batches)
    assert [image.path for image in reports] == ["04.png", "11.png"]
    memory.bad = {4: "cut short", 11: "gone"}
    assert torch.cat([index_B for index_B, _ in plain_batches(memory, VIEWS, 1)]).tolist() == readable


def stream(images, workers=2):
    return closing(Loader(images, VIEWS, batch_size=5, seed=SEED, workers=workers).stream(0, LONG))


def test_a_failing_worker_is_an_error_with_its_traceback(files):
    class Broken(Files):
        def read(self, i):
            return 1 // 0

    traceback = "(?s)in read.*ZeroDivisionError"
    with stream(Broken(files.paths)) as batches, pytest.raises(ChildProcessError, match=traceback):
        next(batches)
    assert not multiprocessing.active_children()


def test_closing_a_stream_ends_its_workers_and_no_others(files):
    with stream(files) as batches:
        next(batches)
        ours = set(multiprocessing.active_children())
        with closing(plain_batches(files, VIEWS, 5, workers=1)) as plain:
            next(plain)
            assert len(multiprocessing.active_children()) == 3
        assert set(multiprocessing.active_children()) == ours and len(ours) == 2
        next(batches)
    assert not multiprocessing.active_children()


def test_signals_that_stop_a_run_leave_its_workers_at_work(files):
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with stream(files) as batches:
        next(batches)
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == mask
        for worker in multiprocessing.active_children():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
                os.kill(worker.pid, number)
        assert [step for step, _, _ in itertools.islice(batches, 20)] == list(range(1, 21))
    assert not multiprocessing.active_children()


def test_workers_do_not_outlive_a_killed_process(files):
    def main(pipe):
        stream_ = Loader(files, VIEWS, batch_size=5, seed=SEED, workers=3).stream(0, LONG)
        next(stream_)
        pipe.send([worker.pid for worker in multiprocessing.active_children()])
        signal.pause()

    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=main, args=(theirs,))
    process.start()
    pids = ours.recv()
    handles = [os.fdopen(os.pidfd_open(pid)) for pid in pids]
    process.kill()
    process.join()
    assert len(handles) == 3
    for handle in handles:
        assert wait([handle], timeout=60)           # a pidfd is readable once its process has ended


def test_a_script_that_fails_beside_an_open_stream_ends(files, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(Path(__file__).parent)!r}]
from pathlib import Path
from test_loader import *
images = Files(sorted(Path({str(files.paths[0].parent)!r}).iterdir()))
batches = Loader(images, VIEWS, batch_size=5, seed=1, workers=2).stream(0, LONG)
next(batches)
raise SystemExit(3)
""")
    assert subprocess.run([sys.executable, script], timeout=120, check=False).returncode == 3


def test_workers_keep_to_one_thread_after_their_parent_used_two(files):
    """A forked child that uses OpenMP with two threads hangs."""
    class Heavy(Files):
        def read(self, i):
            assert torch.get_num_threads() == 1
            torch.ones(500_000).exp().sum()
            return super().read(i)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(500_000).exp().sum()
        batches = run(Heavy(files.paths), 0, 2, workers=1)
    finally:
        torch.set_num_threads(threads)
    assert_same(batches, run(files, 0, 2))
