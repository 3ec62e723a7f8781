"""Real processes that start at once: each is forked from a server that has imported torch, and computed nothing.

A signal goes to a real process, and a restart does not cost the seconds of an import.
"""

import contextlib
import multiprocessing
import os
import runpy
import socket
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
IMPORTED = ["common.session", "common.dry_run", "moco", "instdisc", "common.data.recipes", "common.data.show",
            "common.optim", "common.schedule", "sklearn.datasets", "torch.distributed.run"]
PATIENCE = 120          # seconds after which a process is held to hang; none of them needs more than a few


class Finished(NamedTuple):
    code: int
    out: str
    err: str


def start(target: Callable, *arguments: object, output: Path, cwd: Path = ROOT,
          env: Mapping[str, str] | None = None) -> BaseProcess:
    """Call ``target`` in a new process, standard output and error to ``output``.out and .err."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    with _python_path():
        process = context.Process(target=_life, args=(target, arguments, str(output), str(cwd), dict(env or {})))
        process.start()
    return process


def finish(process: BaseProcess, output: Path) -> Finished:
    """What became of it; a signal that ended it counts below zero."""
    process.join(PATIENCE)
    if process.exitcode is None:
        process.kill()
        process.join()
    return Finished(process.exitcode, *(Path(f"{output}.{name}").read_text() for name in ("out", "err")))


def tool(name: str, *arguments: str, cwd: Path) -> Finished:
    """``python tools/NAME.py ARGUMENTS`` in the folder ``cwd``, to its end."""
    output = cwd / "said"
    return finish(start(run_tool, name, *arguments, output=output, cwd=cwd), output)


def run_tool(name: str, *arguments: str) -> None:
    trust = ["--trust", "tests"] if name == "train" and "--trust" not in arguments else []      # tests.tiny's encoder
    sys.argv = [f"tools/{name}.py", *arguments, *trust]
    runpy.run_path(str(ROOT / "tools" / f"{name}.py"), run_name="__main__")


def start_ranks(target: Callable, *arguments: object, output: Path, world: int = 2) -> list[BaseProcess]:
    """The same call by ``world`` processes that torchrun might have started; rank r speaks to ``output``r."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [start(target, *arguments, output=Path(f"{output}{rank}"),
                  env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]


def ranks(target: Callable, *arguments: object, output: Path, world: int = 2) -> list[Finished]:
    """The same call by ``world`` ranks, to their end."""
    started = start_ranks(target, *arguments, output=output, world=world)
    return [finish(process, Path(f"{output}{rank}")) for rank, process in enumerate(started)]


def wait_for_lines(file: Path, count: int, process: BaseProcess) -> None:
    """Until ``file`` holds so many lines; or the process ends, or takes far too long."""
    until = time.monotonic() + PATIENCE
    while process.is_alive() and time.monotonic() < until:
        if file.exists() and file.read_bytes().count(b"\n") >= count:
            return
        time.sleep(0.001)


@contextlib.contextmanager
def _python_path():
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)        # the server reads it once, when the first process starts it
    try:
        yield
    finally:
        os.environ.pop("PYTHONPATH") if before is None else os.environ.update(PYTHONPATH=before)


def _life(target, arguments, output, cwd, env):
    for name, number in (("out", 1), ("err", 2)):
        os.dup2(os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    os.environ.update(env)
    os.chdir(cwd)
    torch.set_num_threads(1)
    target(*arguments)
