"""That an export is what was trained: loaded in a fresh process by its target's loader, it gives the same features."""

import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.config import ConfigError
from common.exchange import fresh
from common.exchange.format import LOADER

LIMIT = 1e-4                    # in float32; of the largest feature, where that is below 1
SECONDS = 600.0                 # for which a fresh process may be silent
ROOT = Path(__file__).parents[2]
OURS = ("common", "moco", "instdisc", "metric_learning", "configs", "tools", "tests")


class Unproven(ConfigError):
    """An export that does not load, or not to what was trained."""


@dataclass(frozen=True)
class Proof:
    """``difference``: the largest between the two sides' features; ``scale``: the largest feature, without sign."""

    difference: float
    scale: float
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    images: str = ""                    # what the features are of
    @property
    def limit(self) -> float:
        return LIMIT * min(1.0, self.scale)

    @property
    def holds(self) -> bool:
        """A difference that is not a number does not."""
        return not self.missing and not self.unexpected and self.difference <= self.limit


class Job(NamedTuple):
    """``images``: name -> [B, c, H, W], normalised; ``features``: what they must become, by the same names."""

    folder: Path
    images: Mapping[str, Tensor]
    features: Mapping[str, Tensor]
    loader: str | None = None           # the text of load.py; None: the folder's own
    ours: bool = False                  # whether the loader may import this project


def prove(jobs: Sequence[Job]) -> list[Proof]:
    """One proof a job; all jobs share a fresh process, or two, where some loaders are this project's and some not.

    This project cannot be imported in the process of the others. Raises Unproven, naming the folder, for an export
    that does not load; a proof of features that differ is returned, and does not hold.
    """
    proofs: dict[int, Proof] = {}
    with tempfile.TemporaryDirectory() as place:
        for ours in {job.ours for job in jobs}:
            _run(Path(place), [(i, job) for i, job in enumerate(jobs) if job.ours == ours], ours)
            for i, job in enumerate(jobs):
                if job.ours == ours:
                    proofs[i] = _judged(job, Path(place), i)
    return [proofs[i] for i in range(len(jobs))]


def _run(place: Path, jobs: list[tuple[int, Job]], ours: bool) -> None:
    packages = [folder for folder in sys.path if Path(folder).name in ("site-packages", "dist-packages")]
    plan: dict[str, Any] = {"packages": packages + [str(ROOT)] * ours, "absent": [] if ours else OURS,
                            "jobs": [_job(place, i, job) for i, job in jobs]}
    path = place / f"plan-{int(ours)}.json"
    path.write_text(json.dumps(plan), encoding="utf-8")
    command = [sys.executable, "-I", "-S", "-B", str(Path(fresh.__file__)), str(path)]
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}         # what a loader may need lies in the folder
    try:
        done = subprocess.run(command, cwd=place, env=offline, capture_output=True, text=True, timeout=SECONDS)
        ended = f"ended with {done.returncode}: {done.stderr.strip()[-2000:]}" if done.returncode else ""
    except subprocess.TimeoutExpired:
        ended = f"was stopped after {SECONDS:.0f} seconds"
    if ended:
        of = next((job for job, told in zip(jobs, plan["jobs"], strict=True) if not Path(told["said"]).exists()),
                  jobs[0])
        raise Unproven(f"{of[1].folder}: the fresh process that was to load it {ended}")


def _job(place: Path, i: int, job: Job) -> dict[str, Any]:
    loader = job.folder / LOADER
    if job.loader is not None:
        loader = place / f"load_{i}.py"
        loader.write_text(job.loader, encoding="utf-8")
    save_file({name: x.contiguous() for name, x in job.images.items()}, place / f"in-{i}")
    return {"folder": str(job.folder.resolve()), "loader": str(loader.resolve()), "inputs": str(place / f"in-{i}"),
            "outputs": str(place / f"out-{i}"), "said": str(place / f"said-{i}"), "threads": torch.get_num_threads()}


def _judged(job: Job, place: Path, i: int) -> Proof:
    said = json.loads((place / f"said-{i}").read_text(encoding="utf-8"))
    if "error" in said:
        raise Unproven(f"{job.folder}: it does not load: {said['error']}")
    found = load_file(place / f"out-{i}")
    for name, features_BD in job.features.items():
        if found[name].shape != features_BD.shape:
            raise Unproven(f"{job.folder}: {name} images: features {list(found[name].shape)}; those of the trainer are "
                           f"{list(features_BD.shape)}.")
    difference = _largest([found[name] - features_BD for name, features_BD in job.features.items()])
    return Proof(difference, _largest(job.features.values()), tuple(said["missing"]), tuple(said["unexpected"]))


def _largest(xs: Iterable[Tensor]) -> float:
    """Without sign; not a number where one of the values is none."""
    value = torch.cat([x.flatten() for x in xs]).abs().max().item()
    return value if math.isfinite(value) else math.nan
