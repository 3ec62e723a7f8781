"""``evaluate.py linear``: a linear classifier on frozen features, by a published protocol or fast."""

import argparse
from typing import Any

from common import distributed
from common.measuring import fast
from common.measuring.sgd import RECIPES, Recipe, probe
from common.measuring.shared import add_checkpoint, add_command, opened, report

# Options of one way alone, as they are unless given.
OF_SGD = {"protocol": "moco", "epochs": None, "batch_size": None, "lr": None, "crop_min": None}


def add(parsers: Any) -> None:
    parser = add_command(parsers, "linear", "a linear classifier with all labels", run, check)
    add_checkpoint(parser, layer=False)
    parser.add_argument("--layer", choices=["backbone", "head"], help="which features (backbone; with --fast either, "
                        "as the held-out images say)")
    parser.add_argument("--protocol", choices=list(RECIPES),
                        help=f"whose settings of SGD on augmented images ({OF_SGD['protocol']})")
    parser.add_argument("--epochs", type=int, help="others than the protocol's: named beside the value")
    parser.add_argument("--batch-size", type=int, help="likewise; the learning rate follows it, unless --lr is given")
    parser.add_argument("--lr", type=float, help="likewise: the rate itself, for the batch; a set smaller than that "
                        "takes it along")
    parser.add_argument("--crop-min", type=float, metavar="SHARE", help="likewise: the least share of an image's area "
                        "in a training crop")
    fast.add_arguments(parser)


def check(options: argparse.Namespace) -> None:
    others = OF_SGD if options.fast else fast.OPTIONS
    if given := [name for name in others if getattr(options, name) is not None]:
        words = " ".join("--no-cache" if name == "cache" else f"--{name.replace('_', '-')}" for name in given)
        raise ValueError(f"{words}: of linear {'without' if options.fast else 'with'} --fast only, which is another "
                         f"protocol. Leave {'it' if len(given) == 1 else 'them'} out, or "
                         f"{'leave out' if options.fast else 'give'} --fast.")
    options = filled(options)
    if options.fast:
        fast.protocol(options)
        return
    recipe_of(options)
    if options.pixels:
        raise ValueError("--pixels: no published protocol measures raw pixels by SGD. Give --fast, or measure them by "
                         "knn or few.")


def filled(options: argparse.Namespace) -> argparse.Namespace:
    """What was not given is what it is unless given."""
    defaults = {**OF_SGD, **fast.OPTIONS, "layer": None if options.fast else "backbone"}
    return argparse.Namespace(**vars(options) | {name: value for name, value in defaults.items()
                                                 if getattr(options, name) is None})


def recipe_of(options: argparse.Namespace) -> Recipe:
    return RECIPES[options.protocol].changed(epochs=options.epochs, batch=options.batch_size, lr=options.lr,
                                             crop_min=options.crop_min)


def run(options: argparse.Namespace) -> None:
    options = filled(options)
    if options.fast:
        fast.run(options)
        return
    trained, splits = opened(options)
    result, norm, loss, tensors = probe(trained, splits, recipe_of(options), options.layer)
    if distributed.is_main():
        print(f"features  mean length {norm:.3g}; loss of the last epoch {loss:.3g}\n"
              f"frozen    all {tensors} parameters and buffers of the {options.layer} are what they were, to the bit\n")
    report({f"trained {options.layer}": [result]}, trained, options)
