"""metrics.jsonl is whole after any kill, wandb never stops a run, and the progress line can be read by anyone."""

import importlib
import io
import json
import logging
import math
import os
import re
import resource
import shutil
import socket
import sys
import tempfile
import threading
from pathlib import Path

import pytest
import torch

from common import mirror
from common.log import Records
from common.progress import Progress, Speed, duration
from common.rng import rng_state
from common.tree import digest


def not_json(name: str):
    pytest.fail(f"{name} is not JSON")


def lines(folder: Path) -> list[dict]:
    text = (folder / "metrics.jsonl").read_text()
    assert text.endswith("\n")
    return [json.loads(line, parse_constant=not_json) for line in text.splitlines()]


def written(folder: Path, steps: int) -> Records:
    records = Records(folder)
    for step in range(1, steps + 1):
        records.write("train", step, step / 4, loss=1 / step)
    records.flush()
    return records


# metrics.jsonl and summary.json

def test_each_record_is_one_line_of_json(tmp_path):
    records = Records(tmp_path)
    records.write("train", 3, 0.5, loss=torch.tensor(1.5), lr=0.1, top1=torch.tensor(1, dtype=torch.int64))
    records.flush()
    assert lines(tmp_path) == [{"step": 3, "epoch": 0.5, "kind": "train", "loss": 1.5, "lr": 0.1, "top1": 1}]
    records.write("eval", 3, 0.5, value=71.2, protocol={"k": [20, 200], "layer": "backbone", "norm": None})
    records.flush()
    assert lines(tmp_path)[1]["protocol"] == {"k": [20, 200], "layer": "backbone", "norm": None}


def test_what_is_not_finite_stays_valid_json_and_can_be_read_back(tmp_path):
    records = Records(tmp_path)
    values = [math.nan, math.inf, -math.inf]
    records.write("health", 1, 0, a=values[0], b={"c": values[1:]}, d=torch.tensor(math.nan))
    records.flush()
    record = lines(tmp_path)[0]
    assert str([float(record["a"]), *map(float, record["b"]["c"])]) == str(values) and record["d"] == "nan"


@pytest.mark.parametrize("text", ["line\nbreak", "é ü 画像", os.fsdecode(b"not-utf8-\xff.jpg"), '"quoted"'])
def test_any_text_stays_one_line_and_comes_back(tmp_path, text):
    records = Records(tmp_path)
    records.write("event", 1, 0, path=text)
    records.flush()
    assert lines(tmp_path)[0]["path"] == text


def test_a_last_line_cut_anywhere_by_a_kill_is_repaired(tmp_path):
    written(tmp_path, 3)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    last = whole.splitlines(keepends=True)[-1]
    for cut in range(1, len(last) + 1):
        (tmp_path / "metrics.jsonl").write_bytes(whole[:-cut])
        records = Records(tmp_path)
        records.write("train", 3, 0.75, loss=1 / 3)
        records.flush()
        assert (tmp_path / "metrics.jsonl").read_bytes() == whole


@pytest.mark.parametrize("rubbish", [b"\0" * 50 + b"\n", b"[1]\n", b"5\n", b"{}\n", b"\xff\xfe\n", b"\n",
                                     b'{"step": "x"}\n'])
def test_lines_that_are_no_records_are_dropped_on_opening(tmp_path, rubbish):
    written(tmp_path, 2)
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    (tmp_path / "metrics.jsonl").write_bytes(whole + rubbish)
    Records(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole


@pytest.mark.parametrize("resumed", [-1, 0, 4, 9, 10, 99])
def test_rewind_leaves_one_record_a_step_after_a_resume(tmp_path, resumed):
    written(tmp_path, 10)
    records = Records(tmp_path)
    records.rewind(resumed)
    left = [record["step"] for record in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())]
    assert left == [step for step in range(1, 11) if step <= resumed]
    for step in range(max(resumed, 0) + 1, 13):
        records.write("train", step, step / 4, loss=1 / step)
    records.flush()
    written(tmp_path / "straight", 12)
    if resumed <= 12:
        assert lines(tmp_path) == lines(tmp_path / "straight")


def test_opening_again_changes_nothing_that_is_sound(tmp_path):
    written(tmp_path, 3)
    before = (tmp_path / "metrics.jsonl").stat()
    Records(tmp_path).rewind(3)
    after = (tmp_path / "metrics.jsonl").stat()
    assert (before.st_ino, before.st_mtime_ns) == (after.st_ino, after.st_mtime_ns)


def test_the_summary_is_replaced_as_a_whole(tmp_path):
    records = Records(tmp_path)
    records.summary(loss=math.nan, knn=71.2)
    records.summary(knn=72.0, protocol={"k": 20})
    records.flush()
    assert json.loads((tmp_path / "summary.json").read_text()) == {"knn": 72.0, "protocol": {"k": 20}}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


# A disk that is slow, or full

def steps_in(folder: Path) -> list[int]:
    return [record["step"] for record in lines(folder)]


def test_a_disk_that_takes_nothing_for_a_while_holds_up_nothing_and_gets_all_in_order(tmp_path):
    records, metrics = Records(tmp_path), tmp_path / "metrics.jsonl"
    os.mkfifo(metrics)                                      # whoever writes to it waits for a reader
    for step in range(500):
        records.write("train", step, 0, loss=1.0)
    with open(metrics, "rb") as file:
        found = [json.loads(file.readline())["step"] for _ in range(500)]
        assert records.flush() == 0
    assert found == list(range(500))


def test_records_that_a_full_disk_refuses_wait_in_memory_and_are_written_once(tmp_path, caplog):
    records, metrics = Records(tmp_path), tmp_path / "metrics.jsonl"
    records.write("train", 1, 0, loss=1.0)
    records.flush()
    metrics.rename(tmp_path / "kept")
    metrics.symlink_to("/dev/full")
    for step in (2, 3, 4):
        records.write("train", step, 0, loss=1.0)
        assert records.flush() == step - 1
    metrics.unlink()
    (tmp_path / "kept").rename(metrics)
    records.write("train", 5, 0, loss=1.0)
    assert records.flush() == 0 and steps_in(tmp_path) == [1, 2, 3, 4, 5]
    assert len(caplog.messages) == 1 and "No space left" in caplog.text and "training goes on" in caplog.text


def test_a_line_that_fits_the_disk_in_part_is_not_left_there(tmp_path):
    records = Records(tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        for step in range(10):
            records.write("train", step, 0, loss=1.0)
            records.flush()
            assert steps_in(tmp_path) == [0]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert records.flush() == 0 and steps_in(tmp_path) == list(range(10))


def test_what_could_not_be_written_to_the_end_is_put_elsewhere_and_said(tmp_path, caplog, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    records = Records(tmp_path / "run")
    shutil.rmtree(tmp_path / "run")
    records.write("train", 1, 0, loss=1.0)
    records.summary(loss=1.0)
    records.close()
    assert "the last 2 records could not be written; they are in " in caplog.messages[-1]
    folder, = (tmp_path / "temporary").iterdir()
    assert str(folder) in caplog.messages[-1] and json.loads((folder / "metrics.jsonl").read_text())["loss"] == 1
    assert json.loads((folder / "summary.json").read_text())["loss"] == 1


def test_going_back_needs_no_room_and_mends_what_a_kill_has_torn(tmp_path, monkeypatch):
    records = Records(tmp_path)
    for step in range(1, 5):
        records.write("train", step, 0, loss=1.0)
    records.append("bad_images.jsonl", {"index": 1})
    records.flush()
    with open(tmp_path / "bad_images.jsonl", "ab") as file:
        file.write(b'{"index": 2, "pa')
    monkeypatch.setattr("common.log.replace_file", None)                # would write a second file
    records.rewind(2)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert (tmp_path / "bad_images.jsonl").read_text() == '{"index": 1}\n'


# wandb

@pytest.fixture
def alone(monkeypatch, tmp_path):
    """No account, no settings, and no server but one that nobody listens at."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_SILENT", "true")


def run_with(mode: str, folder: Path, caplog) -> list[str]:
    """A short run; its warnings."""
    with caplog.at_level(logging.WARNING, logger="common"):
        records = Records(folder, mode, project="test", run_id="abc123", name="a run", config={"train": {"epochs": 2}})
        for step in range(1, 4):
            records.write("train", step, step / 3, loss=1 / step, bad=math.nan)
        records.summary(loss=1 / 3)
        records.close()
        records.write("event", 3, 1, text="after the end")
        records.flush()
    assert [record["step"] for record in lines(folder)] == [1, 2, 3, 3]
    return [record.getMessage() for record in caplog.records if record.name.startswith("common.")]


def test_wandb_offline_needs_no_network_and_no_account_and_draws_no_random_number(alone, tmp_path, caplog, monkeypatch):
    pytest.importorskip("wandb")
    connect = socket.socket.connect

    def only_local(self, address):
        assert self.family == socket.AF_UNIX or address[0] in ("127.0.0.1", "localhost", "::1"), address
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", only_local)
    before = digest(rng_state())
    assert run_with("offline", tmp_path / "run", caplog) == []
    assert digest(rng_state()) == before
    assert len(list((tmp_path / "run" / "wandb").glob("offline-run-*-abc123/run-abc123.wandb"))) == 1


def test_wandb_without_an_account_warns_once_and_the_run_goes_on(alone, tmp_path, caplog, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)      # nor does it ask
    warnings = run_with("online", tmp_path / "run", caplog)
    assert len(warnings) == 1 and "run 'wandb login' once" in warnings[0]


def test_wandb_not_installed_warns_once_and_the_run_goes_on(tmp_path, caplog, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    warnings = run_with("online", tmp_path, caplog)
    assert len(warnings) == 1 and warnings[0].startswith("wandb: ")


STAND_IN = """
calls = []
class Run:
    step, url, summary = 3, "https://example.org/run", {}
    def log(self, values, step): calls.append((step, values))
    def finish(self): calls.append("finish")
def broken(*arguments, **settings):
    raise ConnectionError("the server is gone\\nand a long tale follows")
def setup(settings): pass
def Settings(**settings): pass
def login(**settings): return True
def init(**settings):
    calls.append(settings["id"])
    return Run()
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A module in the place of wandb, whose server had taken steps up to 3 of this run."""
    (tmp_path / "wandb.py").write_text(STAND_IN)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    module = importlib.import_module("wandb")
    yield module
    sys.modules.pop("wandb")


@pytest.mark.parametrize("breaks", ["login", "init", "Run.log", "Run.summary", "Run.finish"])
def test_wandb_failing_anywhere_warns_once_and_the_run_goes_on(stand_in, tmp_path, caplog, monkeypatch, breaks):
    owner = stand_in.Run if breaks.startswith("Run.") else stand_in
    broken = property(stand_in.broken) if breaks == "Run.summary" else stand_in.broken
    monkeypatch.setattr(owner, breaks.removeprefix("Run."), broken)
    assert run_with("online", tmp_path / "run", caplog) == [
        "wandb: ConnectionError: the server is gone. The run goes on without it; metrics.jsonl has everything."]


def test_a_resumed_run_keeps_its_id_and_sends_no_step_that_wandb_has(stand_in, tmp_path):
    records = Records(tmp_path / "run", "online", run_id="abc123")
    for step in (2, 3, 4):
        records.write("train", step, 0.5, loss=1.0)
    records.close()
    values = {"epoch": 0.5, "train/loss": 1.0}
    assert stand_in.calls == ["abc123", (3, values), (4, values), "finish"]
    assert records.url == stand_in.Run.url


def test_a_slow_wandb_holds_up_nothing_and_what_it_could_not_take_is_counted_once(stand_in, tmp_path, caplog,
                                                                                  monkeypatch):
    monkeypatch.setattr(mirror, "WAITING", 5)
    answers, log = threading.Event(), stand_in.Run.log
    monkeypatch.setattr(stand_in.Run, "log", lambda self, values, step: (answers.wait(60), log(self, values, step)))
    with caplog.at_level(logging.WARNING, logger="common"):
        records = Records(tmp_path / "run", "online")
        for step in range(3, 103):
            records.write("train", step, 0.5, loss=1.0)
        sent = 100 - records._mirror._dropped
        answers.set()
        records.close()
    assert [record["step"] for record in lines(tmp_path / "run")] == list(range(3, 103))
    assert sent in (5, 6) and [call[0] for call in stand_in.calls[1:-1]] == list(range(3, 3 + sent))
    assert caplog.messages == [f"wandb: it was too slow for {100 - sent} records. The run goes on without it; "
                               "metrics.jsonl has everything."]


def test_a_wandb_that_never_answers_delays_the_start_and_the_end_by_no_more_than_it_may(stand_in, tmp_path, caplog,
                                                                                         monkeypatch):
    answers = threading.Event()
    for name in ("START_SECONDS", "FINISH_SECONDS"):
        monkeypatch.setattr(mirror, name, 0.1)
    monkeypatch.setattr(stand_in, "init", lambda **settings: answers.wait(60))
    assert run_with("online", tmp_path / "run", caplog) == [
        "wandb: it did not end. The run goes on without it; metrics.jsonl has everything."]
    answers.set()


def test_the_run_id_is_kept_when_given_and_made_when_not(tmp_path):
    made = Records(tmp_path).run_id
    assert re.fullmatch("[0-9a-f]{8}", made) and Records(tmp_path).run_id != made
    assert Records(tmp_path, run_id=made).run_id == made


def test_wandb_is_imported_only_when_it_is_used(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    Records(tmp_path).write("train", 1, 0, loss=1.0)
    assert "wandb" not in sys.modules


# The progress line

VALUES = {"loss": 5.12, "chance": math.log(1024), "pos": 0.71, "neg": 0.02, "queue": 1.0, "lr": 0.0592,
          "images_per_second": 2410.4, "data_wait": 0.013, "top1": 0.5}


class Terminal(io.StringIO):
    """What stands on the screen of a terminal that knows carriage return and erase-to-end-of-line."""

    def isatty(self):
        return True

    def screen(self, columns: int) -> list[str]:
        rows, column = [""], 0
        for part in re.findall(r"\r|\n|\x1b\[K|[^\r\n\x1b]", self.getvalue()):
            if part == "\n":
                rows, column = [*rows, ""], 0
            elif part == "\r":
                column = 0
            elif part == "\x1b[K":
                rows[-1] = rows[-1][:column]
            else:
                if column == columns:
                    rows, column = [*rows, ""], 0
                rows[-1] = rows[-1][:column] + part + rows[-1][column + 1:]
                column += 1
        return rows


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def test_in_a_log_file_there_is_a_plain_whole_line_each_n_steps_and_at_the_end():
    stream, clock = io.StringIO(), Clock()
    progress = Progress(920, 20, every=100, stream=stream, clock=clock)
    for step in range(1, 921):
        clock.now = step * 0.02
        progress.show(step, VALUES)
    progress.close()
    shown = [line for line in stream.getvalue().splitlines() if line.startswith("epoch")]
    assert [int(line.split("step")[1].split("/")[0]) for line in shown] == [*range(100, 901, 100), 920]
    assert shown[0] == ("epoch  5/46  step 100/920  loss 5.120 (chance 6.931)  pos 0.71 neg 0.02  top1 50%  queue 100%"
                        "  lr 0.0592  2,410 img/s  data wait 1%  16 s left")
    assert shown[-1].endswith("done in 18 s")
    assert "\r" not in stream.getvalue() and "\x1b" not in stream.getvalue()


def test_a_method_says_itself_what_its_values_mean():
    stream = io.StringIO()
    Progress(10, 5, every=1, stream=stream, legend={"top1": "how often it is right"}).show(1, VALUES)
    assert [line.split("  ")[-1].strip() for line in stream.getvalue().splitlines() if line.startswith("top1")] == \
        ["how often it is right"]
    assert "queue      how much of the dictionary" in stream.getvalue()         # as usual


@pytest.mark.parametrize("columns", [40, 80, 120, 200])
def test_on_a_terminal_one_line_is_rewritten_and_never_wraps(columns, monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((columns, 24)))
    stream = Terminal()
    progress = Progress(920, 20, stream=stream, clock=Clock())
    for step in range(1, 921):
        progress.show(step, {**VALUES, "images_per_second": 10.0 ** (6 - step % 7)})
    progress.close()
    shown = [line for line in stream.screen(columns) if "step" in line]
    assert len(shown) == 1 and len(shown[0]) < columns and "step 920/920  loss 5.120 (chance 6.931)" in shown[0]
    assert shown[0].endswith("(chance 6.931)" if columns == 40 else "done in 0 s")      # no rest of a longer line
    assert ("img/s" in shown[0]) == (columns >= 80) and ("pos 0.71" in shown[0]) == (columns >= 120)


def test_a_note_stands_above_the_line_that_goes_on(monkeypatch):
    monkeypatch.setattr(shutil, "get_terminal_size", lambda: os.terminal_size((80, 24)))
    stream = Terminal()
    progress = Progress(10, 5, stream=stream, clock=Clock())
    progress.show(5, {"loss": 2.0})
    progress.note("knn 71.2 %")
    progress.show(6, {"loss": 1.0})
    progress.close()
    assert stream.screen(80)[-3:-1] == ["knn 71.2 %", "epoch 2/2  step  6/10  loss 1.000  0 s left"]


def test_what_a_method_does_not_have_is_neither_shown_nor_explained():
    stream = io.StringIO()
    Progress(10, 5, stream=stream, every=1, clock=Clock()).show(10, {"loss": 2.0, "lr": 1e-5})
    assert stream.getvalue().splitlines() == ["epoch 2/2  step 10/10  loss 2.000  lr 1e-05  done in 0 s"]


def test_the_explanation_comes_once_and_fits_80_columns():
    stream = io.StringIO()
    progress = Progress(10, 5, stream=stream, every=1, clock=Clock())
    for step in (1, 2):
        progress.show(step, VALUES)
    explained = stream.getvalue().splitlines()[:-2]
    assert [line[:10].strip() for line in explained] == ["loss", "pos, neg", "top1", "queue", "data wait"]
    assert max(map(len, explained)) <= 79


def test_time_left_counts_from_where_a_resumed_run_began():
    clock, stream = Clock(), io.StringIO()
    progress = Progress(1000, 10, start=900, every=1, stream=stream, clock=clock)
    clock.now = 30.0
    progress.show(910, {"loss": 1.0})                       # 10 steps took 30 s: the other 90 take 270 s
    assert stream.getvalue().endswith("4 min left\n")


def test_speed_counts_since_it_was_last_read():
    clock = Clock()
    speed = Speed(clock)
    for window in (1, 2):
        for _ in range(4):
            speed.add(images=50 * window, waited=0.5)
        clock.now += 10
        assert speed.read() == {"images_per_second": 20.0 * window, "data_wait": 0.2}


@pytest.mark.parametrize(("seconds", "text"), [(0, "0 s"), (59, "59 s"), (59.6, "1 min"), (3599, "1 h 00 min"),
                                               (7500, "2 h 05 min"), (86399, "1 d 0 h"), (273600, "3 d 4 h")])
def test_durations_are_told_as_a_person_would(seconds, text):
    assert duration(seconds) == text
