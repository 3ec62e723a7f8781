"""Pretrain a backbone: torchrun tools/train.py --config moco_v1.yaml data.root=/path/to/imagenet"""

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from common.config import Config
    from common.run import Run

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))     # the checkout, installed or not

EPILOG = """
Give settings as section.key=value, such as train.batch_size=128 or method.encoder.arch=timm/resnet26.
Run again with the same command, a run goes on from its last checkpoint; Ctrl-C or SIGTERM saves first.
"""


def main() -> int:
    """Exit status 130 for a Ctrl-C, wherever it comes: the imports, too, take seconds."""
    try:
        return _run(_options())
    except KeyboardInterrupt:
        print("\ninterrupted: the same command goes on from the last checkpoint, if there is one", file=sys.stderr)
        return 130
    finally:
        _part_with_output()


def _part_with_output() -> None:
    """What standard output or error does not take at the end is dropped, and leaves the exit status as it is."""
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is not None:
                stream.flush()
        except (OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _run(options: argparse.Namespace) -> int:
    from common import signals

    signals.say_preempted()
    logging.basicConfig(format="%(message)s", level=logging.WARNING if _is_main() else logging.ERROR)
    warnings.showwarning = _show_warning
    faulthandler.enable()           # a segmentation fault, too, shows where
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")       # a rank that has gone is named by us, on one screen
    config = _checked_config(options)
    if config is None:
        return 2
    if not (options.print_config or options.dry_run or options.show_views):
        config = _ready(config, Path(options.config))
    from common import distributed  # only now: neither --help nor a mistake in the config need wait for torch
    from common.announce import failure
    from common.run import Run, show_config

    try:
        if options.print_config:
            print(show_config(config), end="", flush=True)
        elif options.dry_run:
            from common.dry_run import dry_run
            dry_run(config)
        elif options.show_views:
            _show_views(Run(config), options.show_views)
        else:
            Run(config).train()
            signals.ignore()
    except signals.Stopped as stopped:
        signals.ignore()
        distributed.stop()
        return stopped.code
    except Exception as error:          # and no goodbye to the other processes, which may be waiting for this one
        signals.ignore()                # a launcher ends all when one has failed: first it is said which, and why
        return failure(error, options.debug)
    distributed.stop()
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a YAML file, or the name of one in configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="replaces what the file says")
    parser.add_argument("--debug", action="store_true", help="show the traceback of whatever ends the run")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE",
                        help="a package of yours that the config names (again for another one); others than this "
                        "project's are refused")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--print-config", action="store_true", help="show every setting and where it came from, and stop")
    what.add_argument("--dry-run", action="store_true",
                      help="do one step of everything, say what a full run takes in time and memory, and stop")
    what.add_argument("--show-views", metavar="OUT.png",
                      help="draw what the network will see of a few images, and stop")
    return parser.parse_intermixed_args()


def _checked_config(options: argparse.Namespace) -> "Config | None":
    """The config, checked as far as that is possible without torch; None, and why is said, if it has a mistake."""
    from common.printable import screen
    from common.sections import check_early, open_config

    try:
        config = open_config(options.config, overrides=options.overrides, trust=options.trust)
        check_early(config, with_data=not options.print_config)
        return config
    except ValueError as error:
        if _is_main():                      # a mistake is every process's, and said once
            if options.debug:
                traceback.print_exception(error)
            print(screen(f"\nerror: {error}"), file=sys.stderr)
        return None


def _ready(config: "Config", path: Path) -> "Config":
    """The config in its run's folder, which says no longer that the run waits to go on, until a signal comes."""
    from common import signals
    from common.sections import folder_of

    config = _in_its_folder(config, path)
    folder = folder_of(config) if _is_main() else None
    if folder is not None:
        with contextlib.suppress(OSError):
            (folder / signals.MARKER).unlink(missing_ok=True)
    signals.say_preempted(folder)
    return config


def _in_its_folder(config: "Config", path: Path) -> "Config":
    """A run's own config.yaml goes on with the run, wherever it lies; a finished one is repeated in a new folder."""
    first, summary = path.parent, path.parent / "summary.json"
    given = config.origin.get("run.dir") == "command line"
    if given or path.name != "config.yaml" or not (first / "checkpoints").is_dir():
        return config
    config.set("run.dir", str(first), "chosen: where config.yaml lies")
    if summary.exists() and json.loads(summary.read_text()).get("finished"):
        number = next(number for number in range(2, 10**6) if not first.with_name(f"{first.name}-{number}").exists())
        config.set("run.dir", str(first.with_name(f"{first.name}-{number}")), "chosen: a repetition")
    return config


def _show_views(run: "Run", path: str) -> None:
    from common.data.show import show_views

    if _is_main():
        show_views(run.splits.train, run.views, run.settings.seed, path)
        print(f"{path}: the first images of {run.splits.train.name} and what the network sees of them\n{run.views}")


def _show_warning(message: Warning | str, category: type[Warning], filename: str, lineno: int,
                  file: TextIO | None = None, line: str | None = None) -> None:
    """By the main process only: ours as a sentence, a library's with the place that it speaks of."""
    ours = Path(filename).is_relative_to(Path(__file__).resolve().parent.parent / "common")
    where = "warning" if ours else f"{filename}:{lineno}: {category.__name__}"
    if _is_main():
        print(f"{where}: {message}", file=file or sys.stderr)


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    sys.exit(main())
