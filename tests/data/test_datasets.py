"""Sets of images from folders, lists, arrays and torchvision's files, all made here; digits from scikit-learn."""

import bz2
import gzip
import hashlib
import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common.data as data
from common.data.datasets import Splits, spread
from common.data.files import natural
from common.data.small_sets import read_idx

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def picture(path: Path, size: tuple[int, int] = (6, 4), value: int = 50) -> Path:
    """A grey PNG of ``size`` (width, height), whose every pixel is ``value``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


def values(images: data.Images) -> list[int]:
    return [int(images.read(i).max()) for i in range(len(images))]


# folders

def test_class_folders_are_labels_and_both_splits_share_the_classes(tmp_path):
    for i, name in enumerate(["train/ant/1.png", "train/bee/1.png", "train/cow/sub/1.png",
                              "val/ant/9.png", "val/dog/1.png"]):
        picture(tmp_path / name, value=i)
    train, test = data.folder(tmp_path)
    assert train.keys == ["ant/1.png", "bee/1.png", "cow/sub/1.png"] and test.keys == ["ant/9.png", "dog/1.png"]
    assert train.classes == test.classes == ["ant", "bee", "cow", "dog"]
    assert train.labels.tolist() == [0, 1, 2] and test.labels.tolist() == [0, 3]
    assert train.labels.dtype == torch.int64 and values(train) == [0, 1, 2] and values(test) == [3, 4]
    assert train.name == f"folder {tmp_path / 'train'}" and train.path(0) == str(tmp_path / "train/ant/1.png")


def test_classes_are_those_of_torchvisions_image_folder(tmp_path):
    from torchvision.datasets import ImageFolder
    for name in ["n01", "n02", "n10"]:
        for i in range(3):
            picture(tmp_path / name / f"{i}.png")
    theirs, ours = ImageFolder(str(tmp_path)), data.folder(tmp_path).train
    assert [(os.path.relpath(path, tmp_path), label) for path, label in theirs.samples] \
        == list(zip(ours.keys, ours.labels.tolist()))
    assert ours.classes == theirs.classes


@pytest.mark.parametrize("names", [
    ["a.png", "b.png"],                         # flat
    ["2019/a.png", "2019/b.png"],               # one folder tells nothing apart
    ["x/a.png", "y/b.png", "c.png"],            # some beside the folders
])
def test_images_outside_class_folders_make_a_set_without_labels(tmp_path, names):
    for name in names:
        picture(tmp_path / name)
    train, test = data.folder(tmp_path)
    assert sorted(train.keys) == sorted(names) and test is None
    assert train.classes == [] and train.labels.tolist() == [-1] * len(names)


def test_labels_can_be_asked_for_or_left_alone(tmp_path):
    for name in ["x/a.png", "y/b.png", "z.png"]:
        picture(tmp_path / name)
    forced = data.folder(tmp_path, labels="folders").train
    assert forced.classes == ["x", "y"] and forced.labels.tolist() == [0, 1, -1]
    (tmp_path / "z.png").unlink()
    assert data.folder(tmp_path).train.classes == ["x", "y"]
    assert data.folder(tmp_path, labels="none").train.classes == []


@pytest.mark.parametrize("present, expected", [
    (["train", "test", "val"], "test"), (["train", "val"], "val"), (["train", "valid"], "valid"), (["train"], None),
])
def test_the_test_folder_is_found_beside_train(tmp_path, present, expected):
    for name in present:
        picture(tmp_path / name / "a.png")
    train, test = data.folder(tmp_path)
    assert train.name.endswith("train") and (test.name.endswith(expected) if expected else test is None)
    assert data.folder(tmp_path, test=None).test is None


def test_a_test_folder_inside_the_training_folder_is_not_trained_on(tmp_path):
    for name in ["a.png", "held/b.png", "other/c.png"]:
        picture(tmp_path / name)
    train, test = data.folder(tmp_path, test="held")
    assert train.keys == ["a.png", "other/c.png"] and test.keys == ["b.png"]
    assert len(data.folder(tmp_path / "held", train=".", test=".").train) == 1         # unless the two are one


def test_order_is_natural_and_hidden_files_are_left_out(tmp_path):
    for name in ["img10.png", "img9.PNG", "Img1.png", "img2/x.png", "._img3.png", ".cache/a.png", "img02.png"]:
        picture(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert data.folder(tmp_path).train.keys == ["Img1.png", "img2/x.png", "img02.png", "img9.PNG", "img10.png"]
    assert sorted(["b", "a10b", "a10a", "a9", "", "10", "9"], key=natural) == ["", "9", "10", "a9", "a10a", "a10b", "b"]


def test_links_are_followed_but_not_in_circles(tmp_path):
    picture(tmp_path / "elsewhere/a.png")
    picture(tmp_path / "set/b.png")
    (tmp_path / "set/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set/again").symlink_to(tmp_path / "set")
    (tmp_path / "set/self").symlink_to("self")
    assert data.folder(tmp_path / "set").train.keys == ["b.png", "linked/a.png"]


def test_names_that_are_not_utf8_have_a_fingerprint(tmp_path):
    picture(tmp_path / "a.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    train = data.folder(tmp_path).train
    assert values(train) == [50] and len(train.fingerprint()) == 64


def test_no_root_says_how_to_give_one():
    with pytest.raises(ValueError) as caught:
        data.folder()
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and "data.root=/path/to/folder" in lines[1] and "--config demo.yaml" in lines[2]


def test_a_root_without_images_says_what_is_there(tmp_path):
    with pytest.raises(ValueError, match="there is no folder .*missing"):
        data.folder(tmp_path / "missing")
    for name in ["a.tar", "b.tar", "README"]:
        (tmp_path / name).write_text("")
    with pytest.raises(ValueError, match="holds no images .*found 3 other files: 2 .tar, 1 without suffix"):
        data.folder(tmp_path)
    with pytest.raises(ValueError, match="is a file, not a folder"):
        data.folder(tmp_path / "a.tar")
    with pytest.raises(ValueError, match="test: there is no folder .*held"):
        data.folder(tmp_path, test="held")


def test_no_readable_image_is_an_error_before_anything_is_loaded(tmp_path):
    for i in range(200):
        (tmp_path / f"{i}.jpg").write_text("no image")
    with pytest.raises(ValueError, match=r"none of the 64 images tried, of 200, can be read:\n  .*0.jpg: no image in"):
        data.folder(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may list every folder")
def test_a_folder_that_may_not_be_listed_is_named(tmp_path):
    picture(tmp_path / "closed/a.png")
    (tmp_path / "closed").chmod(0)
    with pytest.raises(ValueError, match="cannot list .*closed: Permission denied"):
        data.folder(tmp_path)


# in memory or not

def test_small_images_of_one_size_go_into_memory_and_read_alike(tmp_path):
    for i in range(5):
        picture(tmp_path / f"{i}.png", value=i)
    kept, read = data.folder(tmp_path).train, data.folder(tmp_path, in_memory=False).train
    assert kept.array.shape == (5, 3, 4, 6) and kept.array.dtype == torch.uint8 and read.array is None
    assert all(torch.equal(kept.read(i), read.read(i)) for i in range(5)) and values(read) == [0, 1, 2, 3, 4]
    assert kept.size == read.size == 4 and kept.channels == read.channels == 3
    assert kept.fingerprint() == read.fingerprint()


@pytest.mark.parametrize("sizes", [[(6, 4), (6, 5)], [(97, 4)] * 2])
def test_other_images_stay_files(tmp_path, sizes):
    for i, size in enumerate(sizes):
        picture(tmp_path / f"{i}.png", size)
    assert data.folder(tmp_path).train.array is None


def test_one_odd_size_late_in_the_set_keeps_it_out_of_memory(tmp_path):
    for i in range(130):
        picture(tmp_path / f"{i}.png", (6, 4) if i != 129 else (4, 6))
    assert 129 not in spread(130)
    train = data.folder(tmp_path).train
    assert train.array is None and train.bad == {} and train.read(129).shape == (3, 6, 4)
    with pytest.raises(ValueError, match=r"129.png is \[6, 4\] pixels, others are \[4, 6\]"):
        data.folder(tmp_path, in_memory=True)


def test_large_images_go_into_memory_on_request(tmp_path):
    picture(tmp_path / "a.png", (200, 100))
    assert data.folder(tmp_path, in_memory=True).train.array.shape == (1, 3, 100, 200)


@pytest.mark.parametrize("in_memory", [True, False])
def test_unreadable_images_are_errors_when_read_and_zero_in_memory(tmp_path, in_memory):
    for i in range(4):
        picture(tmp_path / f"{i}.png", value=9)
    (tmp_path / "1.png").write_bytes(b"")
    (tmp_path / "2.png").unlink()
    (tmp_path / "2.png").symlink_to("gone.png")
    train = data.folder(tmp_path, in_memory=in_memory).train
    for i, reason in [(1, "no image"), (2, "No such file")]:
        with pytest.raises(data.UnreadableImage, match=reason) as caught:
            train.read(i)
        assert caught.value.path == str(tmp_path / f"{i}.png")
    assert [int(train.read(i).max()) for i in (0, 3)] == [9, 9]
    if in_memory:
        assert sorted(train.bad) == [1, 2] and train.array[1:3].max() == 0


def test_channels_are_converted_or_found(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((8, 8, 5), np.uint8))
    np.save(tmp_path / "b.npy", np.ones((8, 8, 5), np.uint8))
    assert data.folder(tmp_path, channels=5).train.array.shape == (2, 5, 8, 8)
    assert data.folder(tmp_path, channels=None).train.channels == 5
    with pytest.raises(ValueError, match="has 5 channels, not 3"):
        data.folder(tmp_path)
    picture(tmp_path / "grey/a.png")
    assert [data.folder(tmp_path / "grey", channels=c).train.channels for c in (None, 1, 3)] == [1, 1, 3]


def test_size_is_the_median_short_side(tmp_path):
    for i, side in enumerate([10, 20, 300]):
        picture(tmp_path / f"{i}.png", (side, 400))
    assert data.folder(tmp_path).train.size == 20


def test_spread_covers_the_set_without_repeats():
    for n in (0, 1, 63, 64, 65, 1000):
        chosen = spread(n)
        assert len(set(chosen)) == len(chosen) == min(n, 64) and all(0 <= i < n for i in chosen)
    assert spread(4, 2) == [0, 2]


# what holds for every set

def every_kind(folder: Path) -> dict[str, Splits]:
    for i, name in enumerate(["train/a/1.png", "train/b/2.png", "test/a/3.png", "test/b/4.png"]):
        picture(folder / name, value=i)
    (folder / "list.txt").write_text("train/a/1.png a\ntrain/b/2.png b\n")
    return {
        "folder": data.folder(folder),
        "files": data.folder(folder, in_memory=False),
        "list": data.file_list(folder / "list.txt"),
        "digits": data.digits(),
        "arrays": data.arrays(torch.ones(3, 8, 8, dtype=torch.uint8), torch.tensor([0, 1, -1])),
    }


def test_every_set_keeps_the_contract_and_can_be_pickled(tmp_path):
    for splits in every_kind(tmp_path).values():
        for images in filter(None, pickle.loads(pickle.dumps(splits))):
            assert len(images) == len(images.keys) == len(set(images.keys)) == len(images.labels)
            assert images.labels.dtype == torch.int64 and images.labels.min() >= -1
            assert images.labels.max() < len(images.classes)
            image = images.read(len(images) - 1)
            assert image.dtype == torch.uint8 and image.shape[0] == images.channels
            assert images.size == min(image.shape[1:])


def test_building_and_reading_draw_nothing_from_the_global_generators(tmp_path):
    before = torch.get_rng_state(), numpy_state()
    for splits in every_kind(tmp_path).values():
        splits.train.read(0)
    assert torch.equal(before[0], torch.get_rng_state()) and before[1] == numpy_state()


def numpy_state() -> str:
    return repr(np.random.get_state())      # noqa: NPY002 - it is what must not change


def test_the_fingerprint_tells_lists_apart_and_nothing_else(tmp_path):
    def make(keys: list[str], labels: list[int]) -> str:
        return data.Images("any", keys, torch.tensor(labels), [], torch.zeros(len(keys), 1, 2, 2)).fingerprint()

    same = make(["a", "b"], [0, 1])
    assert same == make(["a", "b"], [0, 1])
    assert len({same, make(["b", "a"], [0, 1]), make(["a", "b"], [1, 0]), make(["a", "b", "c"], [0, 1, 1]),
                make(["ab", ""], [0, 1])}) == 5


def test_importing_the_package_loads_neither_torchvision_nor_sklearn():
    code = "import sys, common.data; print([m for m in ('torchvision', 'sklearn', 'scipy') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# lists

@pytest.mark.parametrize("text, labels", [
    ("a.png\nsub/b c.png\n", None),
    ("a.png 1\nsub/b c.png 0\n", [1, 0]),
    ("a.png,dog\r\nsub/b c.png,cat\r\n", [1, 0]),
    ("a.png\tbig dog\n\nsub/b c.png\tcat", [0, 1]),
    ("\ufeffpath,label\na.png,10\nsub/b c.png,9\n", [1, 0]),
    ("Label, Path\n10,a.png\n,\"sub/b c.png\"\n", [0, -1]),
    ("path\na.png\nsub/b c.png\n", None),
    ("a.png -1\nsub/b c.png é\n", [-1, 0]),
])
def test_lists_are_read(tmp_path, text, labels):
    picture(tmp_path / "a.png", value=1)
    picture(tmp_path / "sub/b c.png", value=2)
    (tmp_path / "list.txt").write_bytes(text.encode())
    train = data.file_list(tmp_path / "list.txt").train
    assert train.keys == ["a.png", "sub/b c.png"] and values(train) == [1, 2]
    assert train.labels.tolist() == (labels or [-1, -1])


def test_lists_share_classes_and_take_a_root(tmp_path):
    for name in "ab":
        picture(tmp_path / f"images/{name}.jpg.png")
    (tmp_path / "train.csv").write_text("path,label\na.jpg.png,x\nb.jpg.png,z\n")
    (tmp_path / "test.txt").write_text(f"{tmp_path}/images/a.jpg.png\ty\n")
    train, test = data.file_list(tmp_path / "train.csv", tmp_path / "test.txt", root=tmp_path / "images")
    assert train.classes == test.classes == ["x", "z", "y"] and test.labels.tolist() == [2]
    assert test.read(0).shape == (3, 4, 6)


@pytest.mark.parametrize("text, message", [
    ("a.png\nsomething else\n", r"list.txt:2: 'something else' is not a path that ends in one of"),
    ("\n", "lists no images"),
    ("path,label\n", "lists no images"),
    ("gone.png\n", r"none of the 1 images tried, of 1, can be read:\n  .*gone.png: No such file"),
])
def test_unclear_lists_are_refused(tmp_path, text, message):
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(ValueError, match=message):
        data.file_list(tmp_path / "list.txt")


@pytest.mark.parametrize("line", [
    "../secret.png", "sub/../../secret.png", "sub/../a.png", "/etc/passwd.png", "{above}/secret.png", "out.png",
    "through/secret.png", "a\0.png", "{above}/images-too/a.png", "\x1b[2J/../../a.png",
])
@pytest.mark.parametrize("kind", ["text", "csv"])
def test_a_list_does_not_reach_out_of_its_root(tmp_path, line, kind):
    root = tmp_path / "images"
    picture(root / "a.png")
    picture(tmp_path / "secret.png")
    picture(tmp_path / "images-too/a.png")
    (root / "sub").mkdir()
    (root / "out.png").symlink_to(tmp_path / "secret.png")
    (root / "through").symlink_to(tmp_path)
    text = f"a.png\n\n{line.format(above=tmp_path)}\n"
    (tmp_path / "list.txt").write_text(("path\n" if kind == "csv" else "") + text)
    with pytest.raises(ValueError, match=rf"list.txt:{3 + (kind == 'csv')}: .* leads out of {root}") as caught:
        data.file_list(tmp_path / "list.txt", root=root)
    assert str(caught.value).isprintable()


def test_links_and_whole_paths_below_the_root_of_a_list_are_followed(tmp_path):
    picture(tmp_path / "here/images/a.png")
    (tmp_path / "here/images/link.png").symlink_to("a.png")
    (tmp_path / "root").symlink_to(tmp_path / "here")
    (tmp_path / "list.txt").write_text(f"images/link.png\n{tmp_path}/here/images/a.png\n{tmp_path}/root/images/a.png\n")
    assert len(data.file_list(tmp_path / "list.txt", root=tmp_path / "root").train) == 3


def test_a_list_that_is_no_csv_says_so(tmp_path):
    (tmp_path / "list.csv").write_text("label,path\n1,a.png\n2\n3," + 200_000 * "x")
    with pytest.raises(ValueError, match=r"train: .*list.csv is no CSV: field larger than field limit"):
        data.file_list(tmp_path / "list.csv")


def test_a_missing_list_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"test: cannot read the list .*none.txt: No such file"):
        picture(tmp_path / "a.png")
        (tmp_path / "list.txt").write_text("a.png")
        data.file_list(tmp_path / "list.txt", tmp_path / "none.txt")


# arrays

@pytest.mark.parametrize("shape, channels, expected", [
    ((7, 8, 9), None, (7, 1, 8, 9)),
    ((7, 8, 9, 3), None, (7, 3, 8, 9)),
    ((7, 13, 20, 20), None, (7, 13, 20, 20)),
    ((7, 8, 9, 12), 12, (7, 12, 8, 9)),
])
def test_arrays_of_any_layout(tmp_path, shape, channels, expected):
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.save(tmp_path / "a.npy", array)
    for given in (array, torch.from_numpy(array), tmp_path / "a.npy", str(tmp_path / "a.npy")):
        train = data.arrays(given, channels=channels).train
        assert tuple(train.array.shape) == expected and train.classes == []
        assert sorted(train.read(3).flatten().tolist()) == sorted(array[3].flatten().tolist())
        if array.ndim == 4 and expected[1] == shape[3]:
            assert train.read(3)[1, 2, 4] == array[3, 2, 4, 1]


def test_arrays_take_labels():
    train, test = data.arrays(np.zeros((3, 8, 8), np.uint8), np.array([2, -1, 0]), np.zeros((1, 4, 4), np.uint8),
                              torch.tensor([3], dtype=torch.uint8))
    assert train.labels.tolist() == [2, -1, 0] and test.labels.tolist() == [3]
    assert train.classes == test.classes == ["0", "1", "2", "3"] and train.keys[1] == "train/1"


@pytest.mark.parametrize("arguments, message", [
    ({"train": np.zeros((3, 8, 8), np.float32)}, r"train: holds float32 \[3, 8, 8\]. Give uint8"),
    ({"train": np.zeros((0, 8, 8), np.uint8)}, r"train: holds uint8 \[0, 8, 8\]"),
    ({"train": "missing.npy"}, "train: cannot read missing.npy"),
    ({"train": np.zeros((3, 8, 8), np.uint8), "train_labels": np.zeros(2, int)}, r"train_labels: holds int64 \[2\]"),
    ({"train": np.zeros((3, 8, 8), np.uint8), "train_labels": np.zeros(3)}, r"train_labels: holds float64 \[3\]"),
    ({"train": np.zeros((3, 8, 8), np.uint8), "train_labels": np.full(3, -2)}, "train_labels: holds -2"),
    ({"train": np.zeros((3, 8, 8), np.uint8), "channels": 3}, "train: .* has no axis of 3 channels"),
    ({"train": np.zeros((3, 8, 8), np.uint8), "test": np.zeros((3, 8, 8, 3), np.uint8)}, "test: .* no axis of 1 chan"),
])
def test_other_arrays_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        data.arrays(**arguments)


# digits and Fashion-MNIST

def test_digits_are_scikit_learns_split_once_and_for_all():
    from sklearn.datasets import load_digits
    images, labels = load_digits(return_X_y=True)
    train, test = data.digits()
    assert (len(train), len(test)) == (1297, 500) and train.array.shape == (1297, 1, 8, 8) and train.array.max() == 255
    numbers = [int(key.removeprefix("digits/")) for key in train.keys + test.keys]
    assert sorted(numbers) == list(range(1797))
    both = torch.cat([train.array, test.array]).flatten(1).double().numpy()
    assert np.abs(both - images[numbers] * 255 / 16).max() <= 0.5
    assert torch.cat([train.labels, test.labels]).tolist() == labels[numbers].tolist()
    assert test.keys == data.digits().test.keys != data.digits(split_seed=1).test.keys
    assert test.keys[:4] == ["digits/7", "digits/8", "digits/9", "digits/11"]       # results hang on this split
    assert data.digits(test=0).test is None and len(data.digits(test=0).train) == 1797
    with pytest.raises(ValueError, match="test: 1797 of 1797 digits"):
        data.digits(test=1797)


def idx(array: np.ndarray) -> bytes:
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_fashion_mnist(folder: Path, compressed: bool) -> dict[str, np.ndarray]:
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    arrays = {}
    for prefix, n in (("train", 20), ("t10k", 10)):
        arrays[f"{prefix}-images-idx3-ubyte"] = draw.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        arrays[f"{prefix}-labels-idx1-ubyte"] = (np.arange(n) % 10).astype(np.uint8)
    for name, array in arrays.items():
        (folder / (name + ".gz" * compressed)).write_bytes(gzip.compress(idx(array)) if compressed else idx(array))
    return arrays


@pytest.mark.parametrize("compressed", [True, False])
def test_fashion_mnist_is_read_from_its_idx_files(tmp_path, compressed):
    arrays = write_fashion_mnist(tmp_path / "f", compressed)
    train, test = data.fashion_mnist(tmp_path / "f")
    assert (train.array[:, 0].numpy() == arrays["train-images-idx3-ubyte"]).all() and train.channels == 1
    assert test.labels.tolist() == arrays["t10k-labels-idx1-ubyte"].tolist() and len(test.classes) == 10


def test_damaged_idx_files_are_refused(tmp_path):
    whole = idx(np.zeros((2, 3, 3), np.uint8))
    for name, content, message in [
        ("short", whole[:-1], "17 bytes for"), ("head", whole[:9], "no idx file"), ("none", b"", "no idx file"),
        ("floats", b"\0\0\x0d\1" + whole[4:], "no idx file"), ("cut.gz", gzip.compress(whole)[:-9], "is damaged"),
        ("plain.gz", whole, "is damaged"),
    ]:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.* {message}|{name} is no idx file"):
            read_idx(tmp_path / name)


def test_missing_fashion_mnist_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="holds no train-images-idx3-ubyte, nor .*gz. Install .*dataset-fashion"):
        data.fashion_mnist(tmp_path)


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed")
def test_debians_fashion_mnist_is_found_and_whole():
    train, test = data.fashion_mnist()
    assert train.array.shape == (60_000, 1, 28, 28) and test.array.shape == (10_000, 1, 28, 28)
    assert train.labels.bincount().tolist() == [6000] * 10 and test.labels.bincount().tolist() == [1000] * 10
    assert train.array.float().mean().item() / 255 == pytest.approx(0.2860, abs=1e-4)       # as everyone normalises it


# torchvision

def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_cifar10_is_torchvisions(tmp_path, monkeypatch):
    """Ten tiny images in CIFAR-10's files; torchvision gets their checksums for the true ones."""
    from torchvision.datasets import CIFAR10
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        batch = {"data": draw.integers(0, 256, (2, 3072), dtype=np.uint8), "labels": [3, 9]}
        (folder / name).write_bytes(pickle.dumps(batch))
    names = ["airplane", *"bcdefghij"]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": names}))
    for table in ("train_list", "test_list"):
        monkeypatch.setattr(CIFAR10, table, [[name, md5(folder / name)] for name, _ in getattr(CIFAR10, table)])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(folder / "batches.meta")})
    train, test = data.torchvision_set("CIFAR10", tmp_path)
    theirs = CIFAR10(tmp_path)
    assert (train.read(7).permute(1, 2, 0).numpy() == np.array(theirs[7][0])).all()
    assert train.array.shape == (10, 3, 32, 32) and train.array.is_contiguous() and len(test) == 2
    assert test.labels.tolist() == [3, 9] and test.classes == names and train.keys[3] == "CIFAR10/train/3"
    grey = data.torchvision_set("CIFAR10", tmp_path, channels=1).train
    assert (grey.read(7)[0].numpy() == np.array(theirs[7][0].convert("L"))).all()
    with pytest.raises(ValueError, match="channels: CIFAR10 has 3 channels, not 2"):
        data.torchvision_set("CIFAR10", tmp_path, channels=2)


def test_stl10_trains_on_its_unlabelled_images_too(tmp_path, monkeypatch):
    from torchvision.datasets import STL10
    folder = tmp_path / "stl10_binary"
    folder.mkdir()
    draw = np.random.default_rng(0)
    for name, n in [("train_X.bin", 2), ("unlabeled_X.bin", 3), ("test_X.bin", 1)]:
        draw.integers(0, 256, (n, 3, 96, 96), dtype=np.uint8).tofile(folder / name)
    for name, labels in [("train_y.bin", [1, 10]), ("test_y.bin", [5])]:
        np.array(labels, np.uint8).tofile(folder / name)
    (folder / "class_names.txt").write_text("\n".join("abcdefghij"))
    for table in ("train_list", "test_list"):
        monkeypatch.setattr(STL10, table, [[name, md5(folder / name)] for name, _ in getattr(STL10, table)])
    train, test = data.torchvision_set("STL10", tmp_path)
    assert train.array.shape == (5, 3, 96, 96) and train.labels.tolist() == [0, 9, -1, -1, -1]
    assert test.labels.tolist() == [4] and test.classes == list("abcdefghij")
    assert (test.read(0).permute(1, 2, 0).numpy() == np.array(STL10(tmp_path, split="test")[0][0])).all()


@pytest.mark.parametrize("name", ["FashionMNIST", "KMNIST", "MNIST"])
def test_the_mnist_family_is_torchvisions(tmp_path, name):
    arrays = write_fashion_mnist(tmp_path / name / "raw", compressed=False)
    train, test = data.torchvision_set(name, tmp_path)
    assert (train.array[:, 0].numpy() == arrays["train-images-idx3-ubyte"]).all() and len(test) == 10
    assert data.torchvision_set(name, tmp_path, channels=3).train.array.shape == (20, 3, 28, 28)


def test_svhn_and_usps_are_torchvisions(tmp_path, monkeypatch):
    from scipy.io import savemat
    from torchvision.datasets import SVHN, USPS
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3, 4), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(tmp_path / f"{split}_32x32.mat", {"X": pixels, "y": np.array([[1], [10], [2], [3]])})
    sums = {split: ["", f"{split}_32x32.mat", md5(tmp_path / f"{split}_32x32.mat")] for split in ("train", "test")}
    monkeypatch.setattr(SVHN, "split_list", sums)
    train = data.torchvision_set("SVHN", tmp_path).train
    assert (train.array.permute(2, 3, 1, 0).numpy() == pixels).all() and train.labels.tolist() == [1, 0, 2, 3]
    for name in ("usps.bz2", "usps.t.bz2"):
        line = "10 " + " ".join(f"{i + 1}:{i / 127.5 - 1:.6f}" for i in range(256))
        (tmp_path / name).write_bytes(bz2.compress(line.encode()))
    train = data.torchvision_set("USPS", tmp_path).train
    assert train.array.shape == (1, 1, 16, 16) and train.labels.tolist() == [9] and len(train.classes) == 10
    assert (train.read(0)[0].numpy() == np.array(USPS(tmp_path)[0][0])).all()


@pytest.mark.parametrize("name, place", [("CIFAR10", "cifar-10-batches-py"), ("CIFAR100", "cifar-100-python"),
                                         ("FashionMNIST", "FashionMNIST/raw"), ("STL10", "stl10_binary"),
                                         ("SVHN", "train_32x32.mat"), ("USPS", "usps.bz2")])
def test_nothing_is_downloaded_and_the_place_looked_at_is_named(tmp_path, name, place):
    with pytest.raises(ValueError, match=f"{name} is not whole under {tmp_path}, where .*{place}.*download=True"):
        data.torchvision_set(name, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_unknown_set_brings_the_nearest_name(tmp_path):
    with pytest.raises(ValueError, match="no set 'cifar-10'; did you mean 'CIFAR10'.*common.data.folder"):
        data.torchvision_set("cifar-10", tmp_path)
