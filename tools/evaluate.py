"""Measure a pretrained encoder: ``python tools/evaluate.py knn --checkpoint runs/demo``; --help says more."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # from a checkout that is not installed

try:
    from common import distributed
    from common.announce import failure
    from common.measuring import classify, compare, draw, few, finetune, knn, linear, retrieval
    from common.measuring.shared import is_override
except KeyboardInterrupt:               # these take seconds
    sys.exit(130)

COMMANDS = (knn, linear, few, finetune, retrieval, classify, compare, draw)
EXAMPLES = """
examples:
  python tools/evaluate.py knn --checkpoint runs/demo
  python tools/evaluate.py knn --checkpoint runs/demo --k 1 20 --tau 0.07 0.1 --layer head --pixels
  python tools/evaluate.py linear --checkpoint runs/demo/checkpoints/step-00000940.pt
  python tools/evaluate.py linear --checkpoint runs/moco_v1 --protocol lightly
  python tools/evaluate.py linear --fast --checkpoint runs/moco_v1
  python tools/evaluate.py few --checkpoint runs/moco_v1 --data /other/images
  python tools/evaluate.py finetune --checkpoint runs/moco_v1 --labels 1% --draws 5 --scratch
  python tools/evaluate.py retrieval --checkpoint runs/demo
  python tools/evaluate.py classify --checkpoint runs/centre_loss
  python tools/evaluate.py compare runs/a runs/b pixels untrained --by "knn --k 20"
  python tools/evaluate.py draw runs/a runs/b --picture features.png
  torchrun --nproc-per-node 8 tools/evaluate.py linear --checkpoint runs/moco_v1
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line asks for, on all processes together."""
    options = parse(arguments)
    try:
        options.check(options)          # before a checkpoint is read
        options.run(options)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sys.exit(failure(error, options.debug))
    distributed.stop()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``run`` is what does it, and ``words`` are its own."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Measure a pretrained encoder.", epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in COMMANDS:
        command.add(parsers)
    words = sys.argv[1:] if arguments is None else list(arguments)
    options, more = parser.parse_known_args(words, argparse.Namespace(words=words))
    if strays := [word for word in more if not is_override(word)]:
        parser.error(f"unrecognized arguments: {' '.join(strays)}")
    options.overrides = [*options.overrides, *more]         # those that stand after an option
    return options


if __name__ == "__main__":
    main()
