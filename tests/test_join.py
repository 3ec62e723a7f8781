"""What is said when the processes of a job do not meet."""

import re
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist

from common import distributed

JOB = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize("wrong, said", [
    ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' in the environment is no whole number from 1 up"),
    ({"RANK": "-1"}, "RANK='-1' in the environment is no whole number from 0 up"),
    ({"RANK": "2"}, "RANK=2 with WORLD_SIZE=2 in the environment: ranks go from 0 to 1"),
    ({"MASTER_PORT": None, "MASTER_ADDR": None}, "WORLD_SIZE=2 in the environment, but no MASTER_ADDR and no MASTER_P"),
    ({"MASTER_PORT": "http"}, "MASTER_PORT='http' in the environment is no whole number"),
])
def test_an_environment_that_no_launcher_makes_is_refused_by_the_variables_name(wrong, said, monkeypatch):
    for name, value in {**JOB, **wrong}.items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=said):
        distributed.start("cpu")


def join(monkeypatch, rank, port):
    monkeypatch.setattr(distributed, "JOIN", 1.0)
    for name, value in {**JOB, "RANK": str(rank), "MASTER_PORT": str(port)}.items():
        monkeypatch.setenv(name, value)
    distributed.start("cpu")


def test_a_port_that_is_taken_is_named_with_what_to_do(monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        said = rf"MASTER_ADDR:MASTER_PORT=127.0.0.1:{port}: .*the port is taken.*--master-port"
        with pytest.raises(ConnectionError, match=said):
            join(monkeypatch, 0, port)


def test_a_first_process_that_is_not_there_is_named_with_what_to_do(monkeypatch):
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))                                # and nobody listens
        port = other.getsockname()[1]
        with pytest.raises(ConnectionError, match=rf"127.0.0.1:{port}: the 2 processes do not meet.*were started"):
            join(monkeypatch, 1, port)


def test_processes_of_a_restart_never_meet_those_of_before(monkeypatch):
    """Rank 1 is there first, each time, in a store that outlives the processes."""
    store = dist.HashStore()
    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            asked = pool.submit(distributed._meet, store, 1, 2)
            time.sleep(0.1)
            met = [pool.submit(distributed._meet, store, 0, 2).result(), asked.result()]
        assert not met[0].check(["word"]) and not met[1].check(["word"])
        met[0].set("word", "of this start")
        assert met[1].get("word") == b"of this start"
    monkeypatch.setattr(distributed, "JOIN", 0.2)
    with pytest.raises(ConnectionError, match=r"rank 2 did not come within 0.2 s"), ThreadPoolExecutor(1) as pool:
        pool.submit(distributed._meet, store, 1, 3)
        distributed._meet(store, 0, 3)


def test_more_processes_than_gpus_are_refused_with_both_numbers(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    with pytest.raises(ValueError, match="process 4 of this machine needs a GPU of its own, and there are 4"):
        distributed._device("cuda", 4)
    assert re.search("cuda:3", str(distributed._device("cuda", 3)))
