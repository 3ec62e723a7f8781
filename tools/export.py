"""Hand a pretrained encoder on to other libraries: ``python tools/export.py --checkpoint RUN --format F --out DIR``."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # from a checkout that is not installed

if TYPE_CHECKING:
    from common.exchange.export import Exported

EPILOG = """
examples:
  python tools/export.py --checkpoint runs/demo --format torchvision --out demo-backbone
  python tools/export.py --checkpoint runs/moco_v2 --format timm --out moco-timm --license cc-by-nc-4.0
  python tools/export.py --checkpoint runs/moco_v2 --format torchvision timm --out handed-on
  python tools/export.py --checkpoint runs/moco_v2 --format moco --what encoder --out moco-encoder
  python tools/export.py --checkpoint runs/moco_v2 --format timm --out moco-timm --push-to-hub me/moco-timm --private
  python tools/export.py --verify moco-timm

An export is loaded again in a fresh process by the other library alone, and its features are compared with those of the
training; if they differ, nothing is left behind.

exit status: 0 if all is written and proven, 2 if the command is wrong, the network does not fit or a proof fails
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 130 for a Ctrl-C, wherever it comes: the imports, too, take seconds."""
    try:
        return _done(parse(arguments))
    except KeyboardInterrupt:
        return 130


def _done(options: argparse.Namespace) -> int:
    from common import hub
    from common.announce import failure  # only now: --help need not wait for torch

    try:
        if options.push:
            hub.check_repository(options.push)          # before anything is written
        exported = _verify(options.verify, options.trust) if options.verify else _export(options)
        print("\n\n".join(map(_said, exported)))
        if options.push:
            print(f"sent to {hub.push(_only(exported), options.push, options.private)}")
        return 0
    except Exception as error:
        return failure(error, options.debug)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="export.py", description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", metavar="RUN_OR_FILE",
                       help="a run's folder (its last checkpoint), one checkpoint, or imported weights")
    which.add_argument("--verify", metavar="DIR", type=Path, help="check an export: its files, and its features")
    parser.add_argument("--format", nargs="+", metavar="F", dest="formats", default=[],
                        help="torchvision, timm, safetensors, torch_export, onnx, detectron2, moco; several "
                        "go to DIR/F each")
    parser.add_argument("--out", metavar="DIR", type=Path, help="the folder to write")
    parser.add_argument("--what", choices=["backbone", "encoder", "key_backbone", "second_backbone"],
                        default="backbone", help="which part: encoder is the backbone with the head, key_backbone "
                        "MoCo's slowly moving one, second_backbone that of a siamese network's second tower "
                        "(%(default)s)")
    parser.add_argument("--epoch", default="last", metavar="last | best | N",
                        help="which checkpoint of a run's folder (%(default)s)")
    parser.add_argument("--data", metavar="PATH", help="images for the proof (those of the run's config)")
    parser.add_argument("--license", metavar="NAME", help="what the weights may be used under, such as cc-by-nc-4.0")
    parser.add_argument("--push-to-hub", metavar="USER/NAME", dest="push", help="send the export to this model "
                        "repository of the Hugging Face hub; without it nothing leaves this machine")
    parser.add_argument("--private", action="store_true", help="make that repository private")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is at DIR")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE",
                        help="a package of yours that the run's config names (again for another one); with --verify "
                        "torch_export, whose files run code: that whoever gave you the folder is trusted")
    parser.add_argument("--debug", action="store_true", help="show the traceback of whatever goes wrong")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the run's config")
    options = parser.parse_intermixed_args(arguments)
    if options.checkpoint and not (options.formats and options.out):
        parser.error("--checkpoint needs --format and --out, too")
    if options.private and not options.push:
        parser.error("--private is of --push-to-hub")
    if options.push and len(options.formats) > 1:
        parser.error("--push-to-hub: a repository holds one export; give one --format")
    return options


def _export(options: argparse.Namespace) -> "list[Exported]":
    from common.exchange.export import export
    from common.exchange.formats import by_name
    from common.exchange.handed import hand
    from common.measuring.shared import epoch
    from common.trained import load_trained

    for name in options.formats:
        by_name(name)                           # before a checkpoint is read
    trained = load_trained(options.checkpoint, ["train.device=cpu", *options.overrides], options.trust,
                           data=options.data, epoch=epoch(options.epoch))
    return export(hand(trained, options.what, options.license), options.formats, options.out, data=options.data,
                  overwrite=options.overwrite)


def _verify(folder: Path, trust: Sequence[str]) -> "list[Exported]":
    """An export, or all that lie in a folder. Says what is sound, and raises ConfigError for what is not."""
    from common.exchange import manifest
    from common.exchange.export import check, verify

    below = sorted(path.parent for path in folder.glob(f"*/{manifest.FILE}"))
    found = verify(below if below and not (folder / manifest.FILE).exists() else [folder], trust)
    sound = [each for each in found if each.proof.holds]
    if len(sound) < len(found):
        print("\n\n".join(map(_said, sound)))
    for each in found:
        check(each.folder, each.proof)
    return found


def _only(exported: "list[Exported]") -> Path:
    """The folder to send: of one export, and with nothing in it that the export did not write."""
    from common.exchange import manifest
    from common.exchange.matching import some

    if len(exported) > 1:
        raise ValueError("--push-to-hub: a repository holds one export; give the folder of one.")
    folder = exported[0].folder
    if strays := manifest.strays(folder):
        raise ValueError(f"--push-to-hub: {folder} holds what the export did not write: {some(strays)}. Nothing was "
                         "sent. Move it away.")
    return folder


def _said(exported: "Exported") -> str:
    """Its files, the proof, and how to load it."""
    folder, format, facts, proof, note = exported
    files = [f"  {path.name:<24} {path.stat().st_size:>12,} bytes" for path in sorted(folder.iterdir())]
    lines = format.lines(facts, str(folder.resolve())).splitlines()
    on = proof.images + (f": {note}" if note else "")
    return "\n".join([f"{format.name}: {facts.what} {facts.arch or ''} in {folder}", *files,
                      f"proof  largest difference {proof.difference:.3g}, of features up to {proof.scale:.3g} "
                      f"(limit {proof.limit:.1g}); no key missing, none unexpected; {on}",
                      "load", *(f"  {line}" for line in lines)])


if __name__ == "__main__":
    sys.exit(main())
