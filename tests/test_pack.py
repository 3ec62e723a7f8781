"""tools/pack.py writes a store, goes on with one, verifies one, and says what is wrong."""

import re
from pathlib import Path

import pytest

from common.data import packed
from common.run import Run
from tests import tiny
from tests.faults.bad_images import REFUSED
from tests.processes import tool
from tools import pack


def contents(store: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.iterdir()}


def test_a_folder_is_packed_verified_and_found_whole(tmp_path):
    root = tiny.photos(tmp_path / "photos", count=12)
    said = tool("pack", "--data", "photos", "--out", "my store", "--short-side", "16", "--workers", "2", cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    assert "my store: 12 of 12 images\n" in said.out and "JPEG of quality 90, shorter side 16 or less" in said.out
    assert f"data.name=common.data.packed data.root='{tmp_path}/my store'" in said.out
    before = contents(tmp_path / "my store")
    assert before.keys() == {"00000.tar", "index.safetensors"}
    again = tool("pack", "--data", str(root), "--out", "my store", "--short-side", "16", "--workers", "0", cwd=tmp_path)
    assert again.code == 0 and "was whole already" in again.out and contents(tmp_path / "my store") == before
    checked = tool("pack", "--verify", "my store", cwd=tmp_path)
    assert (checked.code, checked.out) == (0, "my store: 12 of 12 images are what was packed\n")


def test_grey_images_of_a_config_stay_grey_and_bad_ones_are_listed(tmp_path):
    root = tiny.photos(tmp_path / "photos/train", count=4)
    tiny.photos(tmp_path / "photos/test", count=4)
    REFUSED["text.jpg"][0](root / "class1/line\nbreak.jpg")
    (tmp_path / "mine.yaml").write_text("data: {name: common.data.folder, root: photos}\n")
    said = tool("pack", "--config", "mine.yaml", "--out", "store", "--raw", "--workers", "0", cwd=tmp_path)
    assert (said.code, said.err) == (1, "")
    assert "8 of 9 images" in said.out and "1  no image in a known format" in said.out
    assert rf"{root}/class1/line\nbreak.jpg" in said.out
    assert len(packed(tmp_path / "store").test) == 4 and len(packed(tmp_path / "store").train.bad) == 1
    checked = tool("pack", "--verify", "store", cwd=tmp_path)
    assert checked.code == 0 and "8 of 8 images are what was packed; 1 could not be read when it was" in checked.out


def test_a_set_that_was_packed_again_is_not_taken_for_the_set_that_it_was_made_of(tmp_path):
    tiny.photos(tmp_path / "photos", count=4)
    (tmp_path / "mine.yaml").write_text("data: {name: common.data.folder, root: photos}\n")
    packing = "pack", "--config", "mine.yaml", "--workers", "0", "--raw", "--out"
    assert tool(*packing, "store", cwd=tmp_path).code == 0
    again = *packing, "again", "data.name=common.data.packed", "data.root=store", "data.max_pixels=64000000"
    assert tool(*again, cwd=tmp_path).code == 0
    said = tool(*packing, "again", cwd=tmp_path)
    assert said.code == 2 and "was begun with other settings or images: the list of images" in said.err


def test_a_list_of_files_is_taken_for_one(tmp_path):
    tiny.photos(tmp_path / "photos", count=4)
    (tmp_path / "list.txt").write_text("photos/class1/001.png x\nphotos/class0/000.png y\n")
    assert tool("pack", "--data", "list.txt", "--out", "store", "--workers", "0", cwd=tmp_path).code == 0
    assert packed(tmp_path / "store").train.keys == ["photos/class1/001.png", "photos/class0/000.png"]


def test_damaged_images_are_named(tmp_path):
    tiny.photos(tmp_path / "photos", count=6)
    tool("pack", "--data", "photos", "--out", "store", "--raw", "--workers", "0", cwd=tmp_path)
    shard = tmp_path / "store/00000.tar"
    data = bytearray(shard.read_bytes())
    data[512 + 128 + 5] ^= 1                                        # a pixel of the first image
    shard.write_bytes(data)
    said = tool("pack", "--verify", "store", cwd=tmp_path)
    assert said.code == 1 and "5 of 6 images are what was packed" in said.out
    assert "store/00000.tar:class0/000.png: its bytes are not those that were packed" in said.out


@pytest.mark.parametrize("arguments, message", [
    (["--data", "nowhere", "--out", "store"], "there is no folder"),
    (["--data", "photos"], "--out: no folder to write"),
    (["--data", "photos", "--out", "photos"], "--out: .*photos holds something else"),
    (["--data", "photos", "--out", "store", "--short-side", "2"], "--short-side: 2. Give 8 to 8192"),
    (["--data", "photos", "--out", "store", "--quality", "101"], "--quality: 101. Give 1 to 100"),
    (["--data", "photos", "--out", "store", "--workers", "-1"], "--workers: -1 is negative"),
    (["--data", "photos", "--out", "whole", "--quality", "80"], "begun with other .*: quality was 90 and is 80. Give"),
    (["--data", "photos/class0", "--out", "whole"], "train was 4 and is 2; the list of images, their labels"),
    (["--data", "photos", "--out", "whole", "--raw"], "kind was 'jpeg' and is 'raw'"),
    (["--verify", "photos"], "holds no packed images"),
    (["--verify", "whole", "--out", "store"], "--verify: reads whole and writes nothing. Leave out --out"),
    (["--verify", "whole", "data.root=photos"], "writes nothing. Leave out data.root=photos"),
    ([], "one of the arguments --data --config --verify is required"),
])
def test_mistakes_in_the_command_are_status_2(arguments, message, mistaken):
    said = tool("pack", *arguments, cwd=mistaken)
    assert said.code == 2 and re.search(message, said.err) and "Traceback" not in said.err
    assert not (mistaken / "store").exists()


@pytest.mark.parametrize("count, text", [(0, "0 kB"), (5_561_344, "5,561 kB"), (14_400_000, "14 MB"),
                                         (9_876_000_000, "9,876 MB"), (37e9, "37 GB")])
def test_the_size_of_a_store_has_digits_that_say_something(count, text):
    assert pack._size(count) == text


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    where = tmp_path_factory.mktemp("mistaken")
    tiny.photos(where / "photos", count=4)
    assert tool("pack", "--data", "photos", "--out", "whole", "--workers", "0", cwd=where).code == 0
    return where


def test_a_run_trains_measures_and_goes_on_from_a_store(tmp_path):
    tiny.photos(tmp_path / "photos", sizes=((20, 30), (24, 20)))
    tool("pack", "--data", "photos", "--out", "store", "--short-side", "16", "--workers", "0", cwd=tmp_path)

    def config(run, **train):
        data = {"name": "common.data.packed", "root": str(tmp_path / "store")}
        train = {"epochs": 2, **train}
        return tiny.settings(tmp_path, run, data=data, train={"batch_size": 4, "threads": 1, "device": "cpu", **train})

    Run(config(tmp_path / "straight")).train()
    tiny.train_and_stop(config(tmp_path / "run", workers=2).text(), 13)
    (tmp_path / "store").rename(tmp_path / "moved")
    text = config(tmp_path / "run").text().replace(str(tmp_path / "store"), str(tmp_path / "moved"))
    tiny.train(text)
    assert tiny.losses(tmp_path / "run") == tiny.losses(tmp_path / "straight")
    assert tiny.measured(tmp_path / "run") == tiny.measured(tmp_path / "straight") != []
