"""Measure a pretrained encoder: ``python tools/evaluate.py knn --checkpoint runs/demo``; --help says more."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))       # from a checkout that is not installed

from common import distributed
from common.announce import failure
from common.evaluate import KNN, FewLabels, Linear, table
from common.run import load_run

EXAMPLES = """
examples:
  python tools/evaluate.py knn --checkpoint runs/demo
  python tools/evaluate.py knn --checkpoint runs/demo --k 1 20 --layer head --pixels
  python tools/evaluate.py linear --checkpoint runs/demo/checkpoints/step-00000940.pt
  python tools/evaluate.py few --checkpoint runs/moco_v1 data.root=/other/images
  torchrun --nproc-per-node 8 tools/evaluate.py linear --checkpoint runs/moco_v1
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Load, embed on all processes, measure on the main one, print a table."""
    options = parse(arguments)
    try:
        protocol = options.build(options)
        run = load_run(options.checkpoint, options.overrides, options.trust)
        evaluator = run.evaluator_for([protocol], options.layer)
        rows = {"raw pixels": evaluator.measure_pixels()} if options.pixels else {}
        rows[f"trained {options.layer}"] = evaluator.measure(run.encoder)
        if distributed.is_main():
            print(table(rows))
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        sys.exit(failure(error, options.debug))
    distributed.stop()


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; ``build`` makes its protocol."""
    parser = argparse.ArgumentParser(prog="evaluate.py", description="Measure a pretrained encoder.", epilog=EXAMPLES,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    protocols = parser.add_subparsers(title="protocols", metavar="knn | linear | few", required=True)

    knn = _protocol(protocols, "knn", "weighted nearest neighbours: nothing is trained",
                    lambda given: KNN(given.k, given.temperature, given.normalize, given.backend))
    knn.add_argument("--k", type=int, nargs="+", default=[20, 200], help="numbers of neighbours (%(default)s)")
    knn.add_argument("--temperature", type=float, default=0.07, metavar="TAU",
                     help="of the vote exp(s / tau) (%(default)s; MoCo's notebook has 0.1)")
    knn.add_argument("--normalize", action=argparse.BooleanOptionalAction, default=True,
                     help="give features unit length, so that similarity is the cosine")
    knn.add_argument("--backend", choices=["auto", "faiss", "torch"], default="auto",
                     help="of the search (%(default)s)")

    linear = _protocol(protocols, "linear", "logistic regression with all labels",
                       lambda given: Linear(given.l2, given.max_iter))
    few = _protocol(protocols, "few", "logistic regression with a few labels of each class",
                    lambda given: FewLabels(given.labels, given.draws, given.l2, given.max_iter))
    few.add_argument("--labels", type=int, default=10, help="labels of each class (%(default)s)")
    few.add_argument("--draws", type=int, default=10, help="fixed draws of labels to average over (%(default)s)")
    for probe, l2 in ((linear, 1e-4), (few, 1e-2)):
        probe.add_argument("--l2", type=float, default=l2, help="weight of |W|^2 / 2 (%(default)s)")
        probe.add_argument("--max-iter", type=int, default=100, help="of L-BFGS (%(default)s)")
    return parser.parse_args(arguments)


def _protocol(protocols, name, summary, build):
    parser = protocols.add_parser(name, help=summary, description=f"Measure an encoder by {summary}.")
    parser.set_defaults(build=build)
    parser.add_argument("--checkpoint", required=True, metavar="RUN_OR_FILE",
                        help="a run's folder (its last checkpoint) or one checkpoint")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE",
                        help="a package of yours that the run's config names (again for another one); others than this "
                        "project's are refused")
    parser.add_argument("--layer", choices=["backbone", "head"], default="backbone",
                        help="which features (%(default)s; the head's have unit length)")
    parser.add_argument("--pixels", action="store_true", help="measure the raw pixels too: what an encoder has to beat")
    parser.add_argument("--debug", action="store_true", help="show the traceback of whatever goes wrong")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value",
                        help="changes to the run's config, such as data.root=/other/images or train.workers=8")
    return parser


if __name__ == "__main__":
    main()
