"""An encoder written in other libraries' formats; what is not proven to be the same encoder is not left behind."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

try:
    import fcntl
except ImportError:
    fcntl = None                                    # type: ignore[assignment]

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from common.config import ConfigError
from common.environment import versions
from common.exchange import graph, images, manifest
from common.exchange.card import README, card
from common.exchange.facts import Facts
from common.exchange.format import LOADER, Format
from common.exchange.formats import by_name
from common.exchange.handed import Handed, source_of
from common.exchange.matching import some
from common.exchange.preprocessing import Preprocessing
from common.exchange.proof import Job, Proof, Unproven, prove


class Exported(NamedTuple):
    """One folder that is there, whole and proven."""

    folder: Path
    format: Format
    facts: Facts
    proof: Proof
    note: str = ""                  # why it was not proven on images of the training


def export(handed: Handed, names: Sequence[str], out: Path, *, data: str | None = None,
           overwrite: bool = False) -> list[Exported]:
    """Write ``handed`` to ``out`` in the format of that name; in several, to ``out``/NAME each.

    A folder is written beside its name, proven and renamed, and none is unless all are proven. ``data``: what the
    user gave to take images from, if anything. Raises ConfigError for a network that a format cannot hold, a folder
    that is there already (but for an export and ``overwrite``), and as Unproven where a proof fails.
    """
    formats = [by_name(name) for name in dict.fromkeys(names)]
    folders = [out / format.name if len(formats) > 1 else out for format in formats]
    if len(formats) > 1 and manifest.is_export(out):
        raise ConfigError(f"--out {out}: it is an export itself, and {len(formats)} formats go to a folder each in "
                          "it. Give another folder.")
    for format, folder in zip(formats, folders, strict=True):
        format.loader(handed)
        _check_place(folder, overwrite)
    with contextlib.ExitStack() as stack:
        partial = [stack.enter_context(_partial(folder)) for folder in folders]
        real = images.real(handed.trained, data)
        inputs = _inputs(handed, real)
        features = _reference(handed, inputs)
        for format, folder in zip(formats, partial, strict=True):
            _write(folder, format, handed, inputs, features)
        proofs = [replace(proof, images=real.words) for proof in
                  prove([Job(folder, inputs, features, ours=format.ours)
                         for format, folder in zip(formats, partial, strict=True)])]
        for format, folder, proof in zip(formats, partial, proofs, strict=True):
            check(folder, proof)
            _describe(folder, format, handed, proof)
        for here, folder in zip(partial, folders, strict=True):
            _put(here, folder)
    return [Exported(folder, format, handed, proof, real.why)
            for folder, format, proof in zip(folders, formats, proofs, strict=True)]


def verify(folders: Sequence[Path], trust: Sequence[str] = ()) -> list[Exported]:
    """Whether exports still are what they were: every file by its hash, and the features of the generated images.

    What runs is the loader that this version writes for such an export, and never the folder's own, which may be
    anybody's. A graph of torch.export is a program: it is loaded if its format's name is in ``trust``. Raises
    ConfigError, naming the file that is not as exported; a proof may not hold (``check``).
    """
    known = [_known(folder, trust) for folder in folders]
    proofs = prove([job for _, _, job in known])
    return [Exported(folder, format, facts, replace(proof, images=f"{len(job.images['generated'])} generated images"))
            for folder, (format, facts, job), proof in zip(folders, known, proofs, strict=True)]


def _known(folder: Path, trust: Sequence[str]) -> tuple[Format, Facts, Job]:
    """What a folder's manifest says, and how to prove it. Raises NotAsExported."""
    content = manifest.read(folder)
    try:
        format, facts = by_name(content["format"]), Facts.of_json(content["network"])
        text, kept = format.loader(facts), load_file(folder / images.FILE)
        job = Job(folder, {"generated": kept["images"]}, {"generated": kept["features"]}, text, format.ours)
    except (ValueError, KeyError, TypeError, OSError, SafetensorError) as error:
        raise manifest.NotAsExported(f"{folder}: not an export that this version knows: {error}") from error
    if (folder / LOADER).read_text(encoding="utf-8") != text:
        raise manifest.NotAsExported(f"{folder / LOADER}: not what this version writes for it, so it was not run, nor "
                                     "are the features checked. Read it before you run it.")
    if format.runs and format.name not in trust:
        raise manifest.NotAsExported(f"{folder / format.runs}: its bytes are as its manifest says, but loading it runs "
                                     "code that is in it, so it was not loaded, nor are the features checked. If you "
                                     f"trust who gave you the folder: --trust {format.name}.")
    return format, facts, job


def _inputs(handed: Handed, real: images.Real) -> dict[str, Tensor]:
    found = {"generated": images.generated(handed.trained.views)}
    return found if real.images_BcSS is None else {**found, "real": real.images_BcSS}


@torch.inference_mode()
def _reference(handed: Handed, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the trainer itself makes of the images: with its BatchNorm, not the plain copy's."""
    source = source_of(handed.trained, handed.what).cpu().eval()
    return {name: source(images_BcSS).float() for name, images_BcSS in inputs.items()}


def _write(folder: Path, format: Format, handed: Handed, inputs: dict[str, Tensor],
           features: dict[str, Tensor]) -> None:
    format.write(folder, handed)
    (folder / LOADER).write_text(format.loader(handed), encoding="utf-8")
    save_file({"images": inputs["generated"], "features": features["generated"]}, folder / images.FILE)


def check(folder: Path, proof: Proof) -> None:
    """Raises Unproven where the proof does not hold."""
    if proof.missing or proof.unexpected:
        raise Unproven(f"{folder}: keys missing: {list(proof.missing)}; unexpected: {list(proof.unexpected)}. The "
                       "library here builds another network than the one that was trained.")
    if not proof.holds:
        raise Unproven(f"{folder}: its features differ from the trainer's by up to {proof.difference:.3g} where the "
                       f"largest is {proof.scale:.3g}; {proof.limit:.1g} is allowed. Export again; if it "
                       "differs again, the versions here build another network than the one that was trained.")


def _describe(folder: Path, format: Format, handed: Handed, proof: Proof) -> None:
    """All that lies beside the weights; the manifest last, since it lists the others."""
    trained = handed.trained
    Preprocessing.of(trained.views, handed.channels).write(folder, hugging_face=format.name != "timm")
    (folder / README).write_text(card(handed, format, proof, graph.notes(folder)), encoding="utf-8")
    content: dict[str, Any] = {
        "format": format.name, "network": handed.as_json(), "proof": asdict(proof), "versions": versions(),
        "source": {"checkpoint": trained.file.name, "sha256": trained.sha256(), "step": trained.step,
                   "epoch": trained.epoch, "chosen": trained.chosen}}
    manifest.write(folder, content)


def _check_place(folder: Path, overwrite: bool) -> None:
    if folder.is_symlink():
        raise ConfigError(f"--out {folder}: it is a link. Give the folder itself.")
    for place in (_partial_of(folder), _replaced(folder)):
        if os.path.lexists(place) and (place.is_symlink() or not manifest.is_export(place)):
            raise ConfigError(f"{place}: in the way, and not of an export. Move it away.")
    if not folder.exists():
        return
    if not manifest.is_export(folder):
        raise ConfigError(f"--out {folder}: it is there already and no export, so it stays as it is. Give another "
                          "folder.")
    if not overwrite:
        raise ConfigError(f"--out {folder}: an export is there already. Give another folder, or --overwrite.")
    if strays := manifest.strays(folder):
        raise ConfigError(f"--out {folder}: --overwrite would delete what the export did not write: {some(strays)}. "
                          "Move it away, or give another folder.")


def _partial_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.partial")


def _replaced(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.replaced")


@contextlib.contextmanager
def _partial(folder: Path) -> Iterator[Path]:
    """``folder``.partial, empty; gone afterwards, unless it has been renamed, with the folders made for it."""
    here = _partial_of(folder)
    made = [parent for parent in here.parents if not parent.exists()]
    here.mkdir(parents=True, exist_ok=True)
    with _alone(here) if fcntl else contextlib.nullcontext():       # Windows has no such locks
        for left in here.iterdir():                 # by a kill
            left.unlink()
        manifest.write(here, {})                    # so that what a kill leaves here is known as ours
        try:
            yield here
        finally:
            shutil.rmtree(here, ignore_errors=True)
            with contextlib.suppress(OSError):      # those in which an export is now are not empty
                for parent in made:
                    parent.rmdir()


@contextlib.contextmanager
def _alone(here: Path) -> Iterator[None]:
    """With no other process in ``here``; the system lets go of a lock when its process dies. Raises ConfigError."""
    folder = os.open(here, os.O_RDONLY)
    try:
        if not _locked(folder) or not here.exists() or not os.path.samestat(os.fstat(folder), here.stat()):
            raise ConfigError(f"{here}: another export is being written there. Wait for it, or give another folder.")
        yield
    finally:
        os.close(folder)


def _locked(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:                                 # a disk that knows no locks
        pass
    return True


def _put(here: Path, folder: Path) -> None:
    """Give ``here`` its name; an export that has it goes, and has it again if that fails."""
    old = _replaced(folder)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)      # left by a kill
        folder.rename(old)
    try:
        here.rename(folder)
    except BaseException:
        if old.exists() and not folder.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)
