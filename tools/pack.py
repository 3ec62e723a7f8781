"""Write a set of images once, small and in few files, so that training reads it several times as fast."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from common.data.datasets import Splits
    from common.packing import Settings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # the checkout, installed or not

EPILOG = """
examples:
  python tools/pack.py --data /path/to/images --out store --workers 8
  python tools/pack.py --config my_images.yaml data.root=/path/to/images --out store --raw
  python tools/pack.py --verify store
  python tools/train.py --config my_images.yaml data.name=common.data.packed data.root=store

Stopped in any way, the same command goes on and writes the same bytes.

exit status: 0 if all images are in the store, 1 if some cannot be read (the store holds the others) or --verify finds
damage, 2 if the command or the config is wrong, 74 if the disk is full or fails
"""
_EVERY = 0.5            # seconds between two states of the progress line
_EVERY_LINE = 60.0      # and where no terminal is


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    from common.announce import failure  # only now: --help need not wait for torch
    from common.pack_writer import NotPacked

    try:
        return _verify(options.verify) if options.verify else _pack(options)
    except KeyboardInterrupt:
        print("\nStopped; the same command goes on.", file=sys.stderr)
        return 130
    except NotPacked as error:
        failure(error)
        return error.code
    except Exception as error:
        return failure(error)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--data", metavar="PATH", help="a folder of images, or a text or CSV file that lists them")
    which.add_argument("--config", help="a YAML file, or the name of one in configs/, whose section data is packed")
    which.add_argument("--verify", metavar="STORE", help="read all of a store, and compare it with its SHA-256")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces what the config says")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE",
                        help="a package of yours that the config names (again for another one)")
    parser.add_argument("--out", metavar="STORE", help="the folder to write")
    parser.add_argument("--short-side", type=int, default=256, metavar="PIXELS",
                        help="larger images are made smaller, to this shorter side (%(default)s)")
    parser.add_argument("--quality", type=int, default=90, help="of the JPEGs (%(default)s)")
    parser.add_argument("--raw", action="store_true", help="pixels in place of JPEGs: faster to read, 8 times the disk")
    parser.add_argument("--workers", type=int, default=4, help="processes that pack (%(default)s)")
    options = parser.parse_intermixed_args(arguments)
    if options.workers < 0:
        parser.error(f"--workers: {options.workers} is negative. Give 0 to pack in this process.")
    if not options.verify and not options.out:
        parser.error("--out: no folder to write. Give --out STORE.")
    if options.verify and (options.out or options.overrides):
        parser.error(f"--verify: reads {options.verify} and writes nothing. Leave out "
                     f"{' '.join(['--out'] * bool(options.out) + options.overrides)}.")
    return options


def _pack(options: argparse.Namespace) -> int:
    from common.data.packed import open_store
    from common.packing import Settings, pack

    settings = Settings(options.short_side, options.quality, options.raw)
    splits, out = _splits(options), Path(os.path.abspath(Path(options.out).expanduser()))
    progress = _Progress(sum(len(split) for split in splits if split is not None))
    with closing(pack(splits, out, settings, options.workers)) as members:
        for member in members:
            progress.add(member.number, len(member.data), bool(member.reason))
    progress.close()
    index, _ = open_store(out)
    print(_report(splits, out, settings, index.bad, progress), flush=True)
    return 1 if index.bad else 0


def _splits(options: argparse.Namespace) -> "Splits":
    from common.config import TRUSTED, Config
    from common.sections import SECTIONS

    trusted = (*TRUSTED, *options.trust)
    if options.data:
        listed = os.path.isfile(options.data)
        config = Config.parse(f"data: {{name: common.data.{'file_list' if listed else 'folder'}}}", "--data",
                              options.overrides, trusted)
        config.set("data.train" if listed else "data.root", options.data, "--data")
    else:
        config = Config.load(options.config, options.overrides, trusted)
    if config.get("data.name") in ("common.data.folder", "common.data.file_list"):
        config.set("data.in_memory", False, "pack")
        if not config.has("data.channels"):
            config.set("data.channels", None, "pack")           # as they are: grey stays grey
    return config.build("data", SECTIONS["data"])


class _Progress:
    """Images done, how fast, how long it will take: in place on a terminal, else a line each minute."""

    def __init__(self, total: int):
        self.total, self.bytes, self.bad, self.count = total, 0, 0, 0
        self.began = self._shown = time.monotonic()
        self._in_place = sys.stderr.isatty()

    def add(self, number: int, size: int, bad: bool) -> None:
        self.count, self.bytes, self.bad = self.count + 1, self.bytes + size, self.bad + bad
        now = time.monotonic()
        if now - self._shown > (_EVERY if self._in_place else _EVERY_LINE):
            self._shown = now
            self._write(self._line(number + 1, now - self.began))

    def close(self) -> None:
        self.seconds = time.monotonic() - self.began
        if self._in_place:
            self._write("")

    def _line(self, done: int, seconds: float) -> str:
        from common.progress import duration

        left = duration(seconds / self.count * (self.total - done))
        return (f"{done:,}/{self.total:,}  {self.bad:,} bad  {self.bytes / 1e9:,.1f} GB  "
                f"{self.count / max(seconds, 1e-9):,.0f} img/s  {left} left")

    def _write(self, line: str) -> None:
        print(f"\r{line}\x1b[K" if self._in_place else line, end="" if self._in_place else "\n", file=sys.stderr,
              flush=True)


def _report(splits: "Splits", out: Path, settings: "Settings", bad: dict[int, str], progress: _Progress) -> str:
    """What is in the store, what is not and why, and how to train from it."""
    from common.data.check import Summary, bad_table
    from common.data.reading import Unreadable
    from common.environment import python_command
    from common.packing import Joined
    from common.printable import printable
    from common.progress import duration

    images, shards = Joined(splits), sorted(out.glob("*.tar"))
    kind = "pixels" if settings.raw else f"JPEG of quality {settings.quality}"
    speed = f"{progress.count / max(progress.seconds, 1e-9):,.0f} images/s, {duration(progress.seconds)}"
    return "\n".join([
        f"{printable(str(out))}: {len(images) - len(bad):,} of {len(images):,} images",
        f"  {kind}, shorter side {settings.short_side} or less",
        f"  {_size(sum(shard.stat().st_size for shard in shards))} in {len(shards)} file{'s' * (len(shards) != 1)}",
        f"  {speed if progress.count else 'was whole already'}",
        *bad_table(Summary(bad=[Unreadable(i, images.path(i), reason) for i, reason in sorted(bad.items())])),
        f"Train    {python_command()} tools/train.py --config my_images.yaml data.name=common.data.packed "
        f"data.root={shlex.quote(printable(str(out)))}"])


def _size(count: int) -> str:
    """With the unit that leaves it at least two digits."""
    unit, size = next(((unit, size) for unit, size in (("GB", 1e9), ("MB", 1e6)) if count >= 10 * size), ("kB", 1e3))
    return f"{count / size:,.0f} {unit}"


def _verify(store: str) -> int:
    """Read all of a store; 1 if an image is not what was packed."""
    from common.data.packed import damaged, open_store
    from common.printable import printable

    index, shards = open_store(Path(store))
    count = len(index.keys) - len(index.bad)
    progress, found = _Progress(count), 0
    for done, (i, fault) in enumerate(damaged(index, shards)):
        progress.add(done, int(index.columns["length"][i]), bool(fault))
        if fault:
            found += 1
            shard = shards.folder / shards.names[index.columns["shard"][i]]
            print(f"{printable(f'{shard}:{index.keys[i]}')}: {fault}", flush=True)
    progress.close()
    print(f"{printable(store)}: {count - found:,} of {count:,} images are what was packed"
          + f"; {len(index.bad):,} could not be read when it was" * bool(index.bad), flush=True)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
