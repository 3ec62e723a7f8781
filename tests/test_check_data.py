"""tools/check_data.py reads what training would read, and says what it cannot."""

import faulthandler
import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch

from common.data import Images, arrays
from common.data.check import Summary, check, report
from tests import tiny
from tests.faults.bad_images import BOMBS, REFUSED
from tests.processes import tool


def test_bad_images_are_listed_by_reason_and_written_down(tmp_path):
    root = tiny.photos(tmp_path / "photos", classes=0)
    bad = {"empty.jpg": REFUSED["empty.jpg"][0], "text.jpg": REFUSED["text.jpg"][0], "wide.png": BOMBS["wide.png"],
           "dangling.jpg": REFUSED["dangling.jpg"][0], "line\nbreak\x1b[2J.png": REFUSED["cut_in_half.png"][0]}
    for name, make in bad.items():
        make(root / name)
    said = tool("check_data", "--data", str(root), "--workers", "2", "--out", "bad.jsonl", cwd=tmp_path)
    assert (said.code, said.err) == (1, "")
    assert "40 of 45 images can be read" in said.out
    assert "short side  8 to 32 pixels, median 16: 8..15 (20), 16..31 (10), 32..63 (10)" in said.out
    assert "2  no image in a known format" in said.out and r"line\nbreak\x1b[2J.png" in said.out
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert {Path(line["path"]).name for line in lines} == bad.keys()
    assert all(line["reason"] for line in lines) and [line["index"] for line in lines] == list(range(40, 45))


def test_a_good_set_is_nothing_to_speak_of(tmp_path):
    for split, count in (("train", 12), ("val", 3)):
        tiny.photos(tmp_path / "photos" / split, count=count)
    (tmp_path / "mine.yaml").write_text("data: {name: common.data.folder, root: null}\n")
    said = tool("check_data", "--config", "mine.yaml", f"data.root={tmp_path}/photos", "--workers", "0", cwd=tmp_path)
    assert (said.code, said.err) == (0, "")
    assert "12 of 12 images can be read" in said.out and "3 of 3 images can be read" in said.out


@pytest.mark.parametrize("arguments, message", [
    (["--data", "nowhere"], "there is no folder"),
    (["--config", "nowhere.yaml"], "nowhere.yaml"),
    (["--data", ".", "--workers", "-1"], "--workers: -1 is negative"),
    (["--data", ".", "--config", "demo.yaml"], "not allowed with"),
    ([], "one of the arguments --config --data is required"),
])
def test_mistakes_in_the_command_are_status_2(arguments, message, tmp_path):
    said = tool("check_data", *arguments, cwd=tmp_path)
    assert said.code == 2 and message in said.err and "Traceback" not in said.err


class Deadly(Images):
    def __init__(self):
        super().__init__("deadly", [str(i) for i in range(40)], torch.full((40,), -1), [], None)
        self.channels, self.size = 1, 5

    def read(self, i):
        if i in (7, 30):
            faulthandler.disable()                          # pytest's, which would print every thread's stack
            os.kill(os.getpid(), signal.SIGSEGV)
        return torch.zeros(1, 5, 6 + i % 2, dtype=torch.uint8)


@pytest.mark.parametrize("workers", [1, 2])
def test_images_that_kill_their_reader_are_named_and_the_rest_is_read(workers):
    images, summary = Deadly(), Summary()
    for found in check(images, workers):
        summary.add(images, found)
    assert summary.read == 38 and summary.channels == Counter({1: 38}) and summary.sides == Counter({5: 38})
    assert {image.index: image.reason for image in summary.bad} == dict.fromkeys(
        (7, 30), "its reader was killed by SIGSEGV, twice")
    assert "2  its reader was killed by SIGSEGV, twice" in report(images, summary)


def test_reasons_that_differ_in_numbers_are_one(tmp_path):
    images, summary = arrays(torch.zeros(3, 4, 4, dtype=torch.uint8)).train, Summary()
    images.bad = {0: "cut (3 bytes left)", 2: "cut (1,024 bytes left)"}
    for found in check(images, 0):
        summary.add(images, found)
    assert [(reason, len(group)) for reason, group in summary.reasons()] == [("cut (N bytes left)", 2)]
