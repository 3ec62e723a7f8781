"""Take over weights that another project has trained: python tools/import_weights.py moco_v2_800ep_pretrain.pth.tar"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.exchange.architecture import Architecture
    from common.exchange.imported import Imported

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # the checkout, installed or not

EPILOG = """
The layout is recognised from the names of the tensors, the network from their shapes. What is written is a checkpoint
that tools/evaluate.py and tools/export.py read, and tools/train.py begins with (run.weights=FILE). No code in the file
is run; one that would need that is refused.

examples:
  python tools/import_weights.py moco_v2_800ep_pretrain.pth.tar
  python tools/import_weights.py vit-s-300ep.pth.tar --out moco_v3_small.pt
  python tools/import_weights.py weights.pth --arch timm/convnext_atto --config my_images
  python tools/import_weights.py last.ckpt --part key views.mean=[0.5,0.5,0.5]

exit status: 0 if the weights are written, 2 if the file or an option is refused
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit status 130 for a Ctrl-C, wherever it comes: the imports, too, take seconds."""
    try:
        return _done(parse(arguments))
    except KeyboardInterrupt:
        return 130


def _done(options: argparse.Namespace) -> int:
    from common.announce import failure  # only now: --help need not wait for torch
    from common.exchange import imported

    try:
        found = imported.take(options.file, arch=options.arch, config=options.config, layout=options.layout,
                              part=options.part, overrides=options.overrides)
        out = options.out or Path(f"{_stem(options.file)}-imported.pt")
        imported.write(found, out)
    except Exception as error:
        return failure(error, options.debug)
    print(report(found, out))
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="import_weights.py", description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, metavar="FILE", help="what torch.save or safetensors wrote, or an export's "
                        "folder")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="changes to the config")
    parser.add_argument("--out", type=Path, metavar="FILE.pt", help="what to write (NAME-imported.pt in this folder)")
    parser.add_argument("--arch", help="the network, where its shapes do not tell: torchvision/NAME, timm/NAME, w16s1")
    parser.add_argument("--config", metavar="NAME", help="the config for data, views and training (by the layout)")
    parser.add_argument("--layout", help="how the tensors are named, where the names do not tell")
    parser.add_argument("--part", choices=["query", "key"], default="query",
                        help="the trained encoder, or the copy that follows it slowly (%(default)s)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of whatever goes wrong")
    return parser.parse_intermixed_args(arguments)


def report(found: "Imported", out: Path) -> str:
    """What was found, what was left, and what to do next."""
    from common.environment import python_command

    network, python = found.network, python_command()
    size = f", {network.image_size} pixels" if network.image_size else ""
    args = f", {network.arch_args}" if network.arch_args else ""
    return "\n".join([
        f"layout   {found.layout}",
        f"network  {network.arch}, stem {network.stem}, {network.channels} channel{'s' * (network.channels > 1)}{size}"
        f"{args}",
        f"matched  {found.matched} of {found.total} tensors of the backbone",
        f"head     {found.head}",
        f"aside    {_groups(found.aside) or 'nothing'}",
        *(f"note     {note}" for note in found.notes),
        f"written  {out}",
        "",
        f"Measure  {python} tools/evaluate.py knn --checkpoint {out} --data /path/to/images",
        f"Train    {python} tools/train.py --config my_images.yaml data.root=/path/to/images run.weights={out} "
        f"{_settings(network)}"])


def _settings(network: "Architecture") -> str:
    """What my_images.yaml has to be told, so that it builds this network."""
    given = {"method.encoder.arch": network.arch, "method.encoder.stem": network.stem,
             "views.size": network.image_size, "data.channels": network.channels if network.channels != 3 else None,
             "method.key_bn": "none" if "vit" in network.arch else None}
    given |= {f"method.encoder.arch_args.{key}": value for key, value in (network.arch_args or {}).items()}
    return " ".join(f"{key}={value}" for key, value in given.items() if value is not None)


def _groups(names: list[str]) -> str:
    """Names counted by how they begin: 'encoder_k (161), queue, optimizer'."""
    from common.printable import printable

    counts = Counter(name.partition(".")[0] for name in names)
    return ", ".join(printable(name)[:60] + f" ({count})" * (count > 1) for name, count in counts.items())


def _stem(path: Path) -> str:
    name = path.resolve().name
    for suffix in (".tar", ".pth", ".pt", ".ckpt", ".safetensors", ".torch"):
        name = name.removesuffix(suffix)
    return name


if __name__ == "__main__":
    sys.exit(main())
