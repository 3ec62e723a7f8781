"""Read every image of a data set as training would, and say which cannot be read and why."""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.data.check import Summary
    from common.data.datasets import Images, Splits

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # the checkout, installed or not

EPILOG = """
examples:
  python tools/check_data.py --data /path/to/images
  python tools/check_data.py --config my_images.yaml data.root=/path/to/images --workers 8 --out bad.jsonl

exit status: 0 if all can be read, 1 if some cannot, 2 if the command or the config is wrong, or nothing can be read
"""
_EVERY = 0.5            # seconds between two states of the progress line


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    from common.announce import failure  # only now: --help need not wait for torch

    try:
        if options.out:
            open(options.out, "a").close()          # hours of reading must not end at a file that cannot be written
        bad = [line for images in _splits(options) if images is not None for line in _check(images, options.workers)]
        if options.out:
            with open(options.out, "w", encoding="utf-8") as file:
                file.writelines(bad)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        return failure(error)
    return 1 if bad else 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--config", help="a YAML file, or the name of one in configs/, whose section data is read")
    which.add_argument("--data", metavar="FOLDER", help="a folder of images")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces what the config says")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE",
                        help="a package of yours that the config names (again for another one)")
    parser.add_argument("--workers", type=int, default=4, help="processes that read (%(default)s)")
    parser.add_argument("--out", metavar="BAD.jsonl", help="write index, path and reason of each unreadable image")
    options = parser.parse_intermixed_args(arguments)
    if options.workers < 0:
        parser.error(f"--workers: {options.workers} is negative. Give 0 to read in this process.")
    return options


def _splits(options: argparse.Namespace) -> "Splits":
    from common.config import TRUSTED, Config
    from common.sections import SECTIONS

    trusted = (*TRUSTED, *options.trust)
    if options.data:
        config = Config.parse("data: {name: common.data.folder}", "--data", options.overrides, trusted)
        config.set("data.root", options.data, "--data")
    else:
        config = Config.load(options.config, options.overrides, trusted)
    if config.get("data.name") in ("common.data.folder", "common.data.file_list", "common.data.packed"):
        config.set("data.in_memory", False, "check_data")           # or they would be read before the first word
    return config.build("data", SECTIONS["data"])


def _check(images: "Images", workers: int) -> list[str]:
    """Read the images, show how far it is, print the report; the lines of bad.jsonl."""
    from common.data.check import Summary, check, report

    summary, shown, began = Summary(), 0.0, time.monotonic()
    with closing(check(images, workers)) as found:
        for done, image in enumerate(found, start=1):
            summary.add(images, image)
            if time.monotonic() - shown > _EVERY or done == len(images):
                shown = time.monotonic()
                _show(_line(done, len(images), summary, shown - began))
    _show("")
    print(report(images, summary), flush=True)
    return [json.dumps({"index": image.index, "path": image.path, "reason": image.reason}) + "\n"
            for image in sorted(summary.bad, key=lambda image: image.index)]


def _show(line: str) -> None:
    """In place of the line before; only where somebody looks."""
    if sys.stderr.isatty():
        print(f"\r{line}\x1b[K", end="", file=sys.stderr, flush=True)


def _line(done: int, total: int, summary: "Summary", seconds: float) -> str:
    from common.progress import duration

    left = duration(seconds / done * (total - done))
    return f"{done:,}/{total:,}  {len(summary.bad):,} bad  {done / max(seconds, 1e-9):,.0f} img/s  {left} left"


if __name__ == "__main__":
    sys.exit(main())
