"""Verify by a pretrained encoder: are two images of the same thing? --help says more."""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # from a checkout that is not installed

try:
    from common import distributed
    from common.announce import failure
    from common.measuring import answering, verifying
    from common.measuring.shared import add_checkpoint, add_options, is_override
    from common.printable import printable
except KeyboardInterrupt:               # these take seconds
    sys.exit(130)

EXAMPLES = """
examples:
  python tools/verify.py --checkpoint runs/demo
  python tools/verify.py --checkpoint runs/demo --draw 6000 --classes 7 8 9
  python tools/verify.py --checkpoint runs/moco_v1 --pairs pairs.txt --root /path/to/images
  python tools/verify.py --checkpoint runs/moco_v1 --pairs train1.txt train2.txt --far 0.001
  python tools/verify.py --checkpoint runs/moco_v1 --pairs test.txt --threshold-from val.txt --far 0.01
  python tools/verify.py --checkpoint runs/moco_v1 --image a.jpg --image b.jpg
  python tools/verify.py --checkpoint runs/moco_v1 --subject /images/of/one --impostors /images/of/others --image a.jpg
"""
FAR = [0.01, 0.001]
MOST = 10_000_000       # pairs that are drawn


def main(arguments: Sequence[str] | None = None) -> None:
    """Do what the command line asks for, on all processes together."""
    options = parse(arguments)
    try:
        check(options)                  # before a checkpoint is read
        act = answering.identify if options.subject else answering.compare if options.image else verifying.measure
        act(options)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sys.exit(failure(error, options.debug))
    distributed.stop()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``words`` are its own, ``far_given`` tells whether --far is among them."""
    parser = argparse.ArgumentParser(prog="verify.py", description=__doc__, epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    add_checkpoint(parser, layer=False)
    _add_what(parser)
    _add_how(parser)
    words = sys.argv[1:] if arguments is None else list(arguments)
    options, more = parser.parse_known_args(words, argparse.Namespace(words=words))
    if strays := [word for word in more if not is_override(word)]:
        parser.error(f"unrecognized arguments: {' '.join(strays)}")
    options.overrides = [*options.overrides, *more]         # those that stand after an option
    options.far_given, options.far = options.far is not None, options.far or FAR
    return options


def check(options: argparse.Namespace) -> None:
    """Raises ValueError for values that no run could use."""
    if options.subject or options.impostors:
        if not (options.subject and options.impostors and options.image):
            raise ValueError("--subject: the probability needs images of the subject, of others, and in question. Give "
                             "--subject, --impostors and --image.")
    elif len(options.image) not in (0, 2):
        raise ValueError(f"--image: {len(options.image)} given. Give two, to compare them with each other.")
    if options.threshold_from and (options.threshold is not None or options.subject):
        raise ValueError("--threshold-from: chooses the threshold for pairs. Leave out --threshold and --subject.")
    if options.threshold_from and {*map(Path.absolute, options.threshold_from)} & {*map(Path.absolute, options.pairs)}:
        raise ValueError("--threshold-from: a threshold is not judged by the pairs that it was chosen on. Give another "
                         "list.")
    if options.pairs and (options.image or options.subject or options.classes):
        raise ValueError("--pairs: a list is measured by itself. Leave out --image, --subject and --classes.")
    if not all(0 <= far <= 1 for far in options.far) or (options.image and len(options.far) > 1 and options.far_given):
        raise ValueError(f"--far: {' '.join(map(str, options.far))} given. Give false accept rates from 0 to 1; with "
                         "--image one of them.")
    if options.threshold is not None and not math.isfinite(options.threshold):
        raise ValueError(f"--threshold: {options.threshold} given. Give a finite score.")
    if options.folds < 2 or options.draw < 2 * options.folds:
        raise ValueError(f"--folds, --draw: {options.folds} and {options.draw} given. Give at least 2 folds, and two "
                         "pairs for each.")
    if options.draw > MOST:
        raise ValueError(f"--draw: {options.draw} given. Give {MOST:,} pairs at most.")
    if folders := [path for path in options.image if path.is_dir() and not options.subject]:
        raise ValueError(f"--image: {printable(str(folders[0]))} is a folder. Give two image files, to compare them.")


def _add_what(parser: argparse.ArgumentParser) -> None:
    what = parser.add_argument_group("what is verified (without these: pairs drawn from the labelled test images)")
    what.add_argument("--pairs", type=Path, nargs="+", default=[], metavar="FILE",
                      help="a file with a line 'path path 0|1' for each pair, or two files with 'path 0|1', whose "
                      "lines i are a pair; 1: the same")
    what.add_argument("--root", type=Path, metavar="FOLDER", help="where their paths start (where the first file is)")
    what.add_argument("--draw", type=int, default=6000, metavar="N", help="how many pairs are drawn (%(default)s)")
    what.add_argument("--split", choices=["test", "train"], default="test", help="from which images (%(default)s)")
    what.add_argument("--classes", nargs="+", default=[], metavar="NAME",
                      help="from these classes alone, such as those not seen in training")
    what.add_argument("--image", type=Path, action="append", default=[], metavar="FILE",
                      help="an image file; two of them are compared")
    what.add_argument("--subject", type=Path, nargs="+", default=[], metavar="PATH",
                      help="images of one subject, files or folders: the probability that each --image is of it")
    what.add_argument("--impostors", type=Path, nargs="+", default=[], metavar="PATH", help="images of other subjects")


def _add_how(parser: argparse.ArgumentParser) -> None:
    how = parser.add_argument_group("how")
    how.add_argument("--measure", choices=["cosine", "euclidean", "learned"],
                     help="the score: the cosine, the Euclidean distance below zero, or what the method has learned of "
                     "the head's features, as log-odds (learned where it has, else cosine)")
    how.add_argument("--layer", choices=["backbone", "head"],
                     help="which features (the backbone's; the head's for a measure that the method has learned)")
    how.add_argument("--folds", type=int, default=10, help="for the accuracy (%(default)s)")
    how.add_argument("--far", type=float, nargs="+", metavar="RATE",
                     help=f"false accept rates to give TAR and threshold for ({' '.join(map(str, FAR))}); with "
                     "--image: the one whose threshold decides")
    how.add_argument("--threshold", type=float, help="the score from which on two are the same: what it makes of the "
                     "pairs is measured, too; with --image it decides (that which was last found for these weights)")
    how.add_argument("--threshold-from", type=Path, nargs="+", default=[], metavar="FILE",
                     help="validation pairs to choose the threshold on, one list or two, or the word train for pairs "
                     "drawn from the training images")
    how.add_argument("--shrinkage", type=float, metavar="A", help="of the subject's covariance towards a sphere, 0 to "
                     "1 (chosen by Ledoit and Wolf's formula)")
    how.add_argument("--scores", type=Path, metavar="FILE.csv",
                     help=f"where each pair's score is written ({verifying.SCORES} in the run's folder)")
    how.add_argument("--picture", type=Path, metavar="FILE.png",
                     help=f"where the curves are drawn ({verifying.PICTURE} in the run's folder)")
    how.add_argument("--no-picture", action="store_true", help="draw none")


if __name__ == "__main__":
    main()
