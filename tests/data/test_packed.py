"""A packed set stands in for the images that it was made of."""

import faulthandler
import io
import os
import pickle
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from common import identity
from common.config import ConfigError
from common.data import Images, Splits, arrays, file_list, folder, packed
from common.data.images import UnreadableImage, read_image
from common.data.loader import Loader, plain_batches
from common.data.pack_index import INDEX
from common.data.recipes import moco_v2
from common.pack_tar import member_names, tar_header
from common.packing import Settings, pack
from common.run import Run
from tests import tiny
from tests.faults.bad_images import REFUSED

VIEWS = moco_v2(16)


def picture(height: int, width: int, grey: bool = False) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([x % 200, y % 200, (x + y) % 200], -1).astype(np.uint8)
    return Image.fromarray(pixels[..., 0] if grey else pixels)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Two classes to train on, one more to test on; of many sizes and kinds."""
    root = tmp_path_factory.mktemp("photos")
    for name in ("train/cat", "train/dog", "test/cat", "test/eel"):
        (root / name).mkdir(parents=True)
    picture(60, 90).save(root / "train/cat/2.png")
    picture(90, 61).save(root / "train/cat/10.jpg", quality=95)
    picture(40, 32).save(root / "train/cat/small.JPEG", quality=30, comment=b"as it is")
    turned = Image.Exif()
    turned[0x0112] = 6
    picture(30, 40).save(root / "train/dog/turned.jpg", exif=turned)
    picture(80, 70, grey=True).save(root / "train/dog/grey.png")
    np.save(root / "train/dog/array.npy", np.asarray(picture(50, 47)))
    picture(33, 64).save(root / "test/eel/a.webp", lossless=True)
    picture(48, 48).save(root / "test/cat/b.bmp")
    return root


def store_of(splits: Splits, path: Path, workers: int = 0, shard_bytes: int = 2**30, **settings: object) -> Path:
    for _ in pack(splits, path, Settings(**{"short_side": 32, **settings}), workers, shard_bytes=shard_bytes):
        pass
    return path


def as_they_are(root: Path) -> Splits:
    return folder(root, channels=None, in_memory=False)


@pytest.fixture(scope="module")
def stores(root, tmp_path_factory):
    where = tmp_path_factory.mktemp("stores")
    return {kind: store_of(as_they_are(root), where / kind, raw=kind == "raw") for kind in ("jpeg", "raw")}


def small(path: str) -> Image.Image:
    """Upright, short side 32, by Pillow alone."""
    image = Image.fromarray(np.load(path)) if path.endswith(".npy") else ImageOps.exif_transpose(Image.open(path))
    short = min(image.size)
    return image.resize([32 * side // short for side in image.size], Image.Resampling.LANCZOS) if short > 32 else image


def expected(path: str, kind: str) -> np.ndarray:
    image = small(path)
    if kind == "jpeg" and not path.endswith("small.JPEG"):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=90, subsampling=2)
        image = Image.open(buffer)
    return np.array(image).reshape(image.height, image.width, -1)


@pytest.mark.parametrize("kind", ["jpeg", "raw"])
def test_a_store_has_the_sources_splits_keys_labels_and_small_pixels(kind, root, stores):
    source, store = as_they_are(root), packed(stores[kind])
    for split in (0, 1):
        assert store[split].keys == source[split].keys and store[split].classes == ["cat", "dog", "eel"]
        assert store[split].labels.tolist() == source[split].labels.tolist()
        assert store[split].fingerprint() == source[split].fingerprint()
        for i in range(len(source[split])):
            found = store[split].read(i).permute(1, 2, 0).numpy()
            wanted = expected(source[split].path(i), kind)
            assert np.array_equal(found, np.broadcast_to(wanted, (*wanted.shape[:2], 3))), source[split].keys[i]
    assert store.train.size == 32 and store.train.channels == 3
    assert packed(stores[kind], channels=1).train.read(4).shape[0] == 1


def members(store: Path) -> dict[str, bytes]:
    with tarfile.open(store / "00000.tar") as tar:
        return {member.name: tar.extractfile(member).read() for member in tar}


def test_a_small_upright_jpeg_is_copied_and_grey_stays_one_channel(root, stores):
    files = members(stores["jpeg"])
    assert files["train/cat/small.JPEG"] == (root / "train/cat/small.JPEG").read_bytes()
    assert files["train/dog/turned.jpg"] != (root / "train/dog/turned.jpg").read_bytes()
    assert Image.open(io.BytesIO(files["train/dog/grey.jpg"])).mode == "L"
    assert np.load(io.BytesIO(members(stores["raw"])["train/dog/grey.npy"])).shape[2] == 1


@pytest.mark.parametrize("kind", ["jpeg", "raw"])
def test_unpacked_by_tar_it_is_a_folder_with_the_same_images(kind, stores, tmp_path):
    with tarfile.open(stores[kind] / "00000.tar") as tar:
        tar.extractall(tmp_path, filter="data")
    store, again = packed(stores[kind]), folder(tmp_path, in_memory=False)
    assert again.test.labels.tolist() == store.test.labels.tolist()
    for i, key in enumerate(again.train.keys):
        twin = [os.path.splitext(key)[0] for key in store.train.keys].index(os.path.splitext(key)[0])
        assert torch.equal(again.train.read(i), store.train.read(twin))


def test_the_bytes_are_the_same_for_any_number_of_workers_and_shards_are_cut_at_their_size(root, tmp_path):
    one, two = (store_of(as_they_are(root), tmp_path / str(workers), workers, shard_bytes=4096)
                for workers in (0, 2))
    assert same_bytes(one) == same_bytes(two)
    assert len(list(one.glob("*.tar"))) > 2 and all(path.stat().st_size <= 4096 + 1024 for path in one.glob("*.tar"))
    assert {path.suffix for path in one.iterdir()} == {".tar", ".safetensors"}
    assert packed(one).train.read(2).shape == (3, 40, 32)


def same_bytes(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["jpeg", "raw"])
def test_batches_are_those_of_the_images_for_any_number_of_workers(kind, stores):
    def views(workers):
        loader = Loader(packed(stores[kind]).train, VIEWS, batch_size=3, seed=0, workers=workers)
        return [batch.views for _, (batch,), _ in loader.stream(0, 4)]

    for one, two in zip(views(0), views(2)):
        assert all(map(torch.equal, one, two))


def test_a_store_of_one_small_size_is_held_in_memory(tmp_path):
    array = torch.randint(0, 256, (20, 3, 24, 24), dtype=torch.uint8)
    source = arrays(array, torch.arange(20) % 3, array[:4], torch.arange(4) % 3)
    store = store_of(source, tmp_path / "store", raw=True)
    assert torch.equal(packed(store).train.array, array) and torch.equal(packed(store).test.array, array[:4])
    assert packed(store, in_memory=False).train.array is None
    assert packed(store).train.keys == source.train.keys


@pytest.mark.parametrize("kind", ["jpeg", "raw"])
def test_sizes_that_differ_do_not_go_into_memory(kind, stores):
    with pytest.raises(ValueError, match=r"in_memory: .* only images of one size"):
        packed(stores[kind], in_memory=True)


def test_other_numbers_of_channels_are_packed_raw_only(tmp_path):
    source = arrays(torch.randint(0, 256, (3, 13, 50, 40), dtype=torch.uint8))
    with pytest.raises(ValueError, match="--data: the images have 13 channels.* Give --raw"):
        store_of(source, tmp_path / "jpeg")
    store = packed(store_of(source, tmp_path / "raw", raw=True), channels=None)
    assert store.train.channels == 13 and store.train.read(2).shape == (13, 40, 32)
    plane = Image.fromarray(source.train.array[2, 7].numpy()).resize((32, 40), Image.Resampling.LANCZOS)
    assert np.array_equal(store.train.read(2)[7].numpy(), np.asarray(plane))
    with pytest.raises(UnreadableImage, match="has 13 channels, not 3"):
        packed(tmp_path / "raw").train.read(0)


def test_unreadable_images_keep_their_place_and_reason(root, tmp_path):
    for i in range(12):
        picture(40, 40).save(tmp_path / f"{i}.png")
    REFUSED["text.jpg"][0](tmp_path / "3.png")
    REFUSED["empty.jpg"][0](tmp_path / "11.png")
    source = folder(tmp_path, in_memory=False)
    images = packed(store_of(source, tmp_path / "store", workers=2)).train
    assert images.bad.keys() == {3, 11} and images.fingerprint() == source.train.fingerprint()
    for i in images.bad:
        with pytest.raises(UnreadableImage) as caught:
            images.read(i)
        with pytest.raises(UnreadableImage, match=str(caught.value)[:9]):
            read_image(source.train.path(i))
    shown = [i for index_B, _ in plain_batches(images, VIEWS, 5) for i in index_B.tolist()]
    assert shown == [i for i in range(12) if i not in (3, 11)]
    with pytest.raises(ValueError, match="2 of the 12 images .* cannot be read, more than max_unreadable"):
        Loader(images, VIEWS, batch_size=3, seed=0)
    held = packed(tmp_path / "store", in_memory=True).train
    assert held.bad.keys() == {3, 11} and not held.array[3].any() and held.array[4].any()


class Deadly(Images):
    """Some of its images kill who reads them."""

    def __init__(self):
        super().__init__("deadly", [str(i) for i in range(40)], torch.full((40,), -1), [], None)
        self.channels, self.size = 3, 8

    def read(self, i):
        if i in (7, 30):
            faulthandler.disable()                          # pytest's, which would print every thread's stack
            os.kill(os.getpid(), signal.SIGSEGV)
        return torch.full((3, 8, 8), i, dtype=torch.uint8)


def test_an_image_that_kills_its_reader_is_bad_and_the_others_keep_their_order(tmp_path):
    images = packed(store_of(Splits(Deadly()), tmp_path / "store", workers=1, raw=True)).train
    assert images.bad == dict.fromkeys((7, 30), "its reader was killed by SIGSEGV, twice")
    assert all((images.array[i] == i).all() for i in range(40) if i not in images.bad)


class Named(Images):
    """Images whose keys are whatever one likes."""

    def __init__(self, keys):
        super().__init__("named", keys, torch.zeros(len(keys)).long(), ["on\nly"], None)
        self.channels, self.size = 3, 8

    def read(self, i):
        return torch.full((3, 8, 8), i, dtype=torch.uint8)


ODD = ["../../out.png", "/etc/passwd", "a/./b//c.jpg", "line\nbreak\x1b[2J.png", "caf\udce9.jpg", "Bär/" * 60 + "x.png",
       "same.png", "same.jpg", "same.jpg", "same-2.jpg", "..", "", "-rf.jpg"]


def test_odd_names_stay_and_lead_nowhere(tmp_path):
    store = store_of(Splits(Named(ODD)), tmp_path / "store", raw=True)
    assert packed(store).train.keys == ODD and packed(store).train.classes == ["on\nly"]
    with tarfile.open(store / "00000.tar", errors="surrogateescape") as tar:
        assert tar.getnames() == member_names([ODD], ".npy")
        tar.extractall(tmp_path / "out", filter="data")
    files = {os.path.relpath(os.path.join(at, name), tmp_path / "out"): np.load(os.path.join(at, name))[0, 0, 0]
             for at, _, names in os.walk(tmp_path / "out") for name in names}
    assert sorted(files.values()) == list(range(len(ODD)))
    assert files["caf\udce9.npy"] == 4 and files["__/__/out.npy"] == 0 and files["etc/passwd.npy"] == 1
    assert len(set(member_names([ODD], ".jpg"))) == len(ODD)
    with pytest.raises(ValueError, match=r"--data: a\\x00b holds a zero byte"):
        store_of(Splits(Named(["a\0b"])), tmp_path / "zero")


def test_a_header_is_that_of_a_file_of_nobody_and_no_time():
    info = tarfile.TarInfo.frombuf(tar_header("a/b.jpg", 1234), "utf-8", "strict")
    assert (info.name, info.size, info.mtime, info.uid, info.uname) == ("a/b.jpg", 1234, 0, 0, "")


def test_a_list_of_files_is_packed_in_its_order(root, tmp_path):
    (tmp_path / "list.txt").write_text(f"{root}/train/dog/grey.png\tx\ntrain/cat/2.png\ty\n")
    source = file_list(tmp_path / "list.txt", root=root, channels=None, in_memory=False)
    images = packed(store_of(source, tmp_path / "store")).train
    assert images.keys == [f"{root}/train/dog/grey.png", "train/cat/2.png"] and images.classes == ["x", "y"]
    assert images.fingerprint() == source.train.fingerprint() and images.read(0).shape == (3, 36, 32)


def test_a_set_can_be_pickled_and_names_its_shard_and_key(stores):
    images = packed(stores["jpeg"]).train
    again = pickle.loads(pickle.dumps(images))
    assert torch.equal(again.read(1), images.read(1))
    assert again.path(1) == f"{stores['jpeg']}/00000.tar:cat/10.jpg"


def test_others_can_read_the_index(stores):
    load_file = pytest.importorskip("safetensors.numpy").load_file
    columns = load_file(stores["raw"] / INDEX)
    assert columns["keys"].tobytes().decode().split("\0")[0] == "cat/2.png"
    data = (stores["raw"] / "00000.tar").read_bytes()
    start, length = columns["offset"][0], columns["length"][0]
    assert np.load(io.BytesIO(data[start : start + length])).shape == (32, 48, 3)


def test_a_limit_on_pixels_holds_for_each_image(stores):
    for kind in ("jpeg", "raw"):
        images = packed(stores[kind], max_pixels=32 * 40).train
        assert images.read(2).shape == (3, 40, 32)
        with pytest.raises(UnreadableImage, match="more than max_pixels = 1,280"):
            images.read(0)


@pytest.mark.parametrize("builder, given, message", [
    (packed, None, "root: no packed images given"),
    (packed, "nowhere", "root: there is no folder .*nowhere"),
    (packed, "photos", "root: .*photos holds no packed images .* read by common.data.folder"),
    (packed, "begun", "root: .*begun is not finished. Run the command .* again"),
    (folder, "store", "root: .*store is a packed set. Give data.name=common.data.packed"),
])
def test_what_is_no_store_is_refused_with_what_to_do(builder, given, message, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "begun/packing").mkdir(parents=True)
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / INDEX).touch()
    with pytest.raises(ValueError, match=message):
        builder(given and tmp_path / given)


def test_a_run_goes_on_from_a_moved_store_and_not_from_one_packed_otherwise(tmp_path):
    source = tiny.photos(tmp_path / "photos")
    for name, quality in (("a", 90), ("b", 91)):
        store_of(as_they_are(source), tmp_path / name, quality=quality)

    def run(name):
        data = {"name": "common.data.packed", "in_memory": False}
        return Run(tiny.settings(tmp_path / name, tmp_path / "run", data=data))

    first, other = identity.of(run("a")), run("b")
    state = first | {"trainer": {"step": 3}}
    (tmp_path / "a").rename(tmp_path / "moved")
    moved = run("moved")
    identity.check_same(state, identity.of(moved), moved)
    with pytest.raises(ConfigError, match="step 3 belongs to another packed set: of the same images"):
        identity.check_same(state, identity.of(other), other)
