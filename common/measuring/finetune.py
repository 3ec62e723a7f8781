"""``evaluate.py finetune``: the backbone is trained on labels, from the checkpoint and from random weights."""

import argparse
from pathlib import Path
from typing import Any

from torch import nn

from common import checkpoint, distributed
from common.evaluate.draws import amount, difference, draw_labels, over_draws
from common.evaluate.result import Result
from common.measuring.labelled import CROP_MIN, Labelled, labelled
from common.measuring.layers import first_trained, layer_groups
from common.measuring.shared import add_checkpoint, add_command, opened, report
from common.measuring.teaching import Answers
from common.measuring.tuning import DEFAULTS, EPOCHS, STEPS, Tuning, tune
from common.trained import Trained

TUNED, SCRATCH, PAIRED = "fine-tuned", "from scratch", "fine-tuned less from scratch"


def add(parsers: Any) -> None:
    parser = add_command(parsers, "finetune", "training it on labels, all layers or the last ones", run, check)
    add_checkpoint(parser, layer=False, pixels=False)
    lr, decay = ("; ".join(f"{rates[place]:g} for {name}" for name, rates in DEFAULTS.items()) for place in (0, 1))
    parser.add_argument("--labels", type=amount, default="100%", metavar="N | N%", help="images of each "
                        "class whose labels are given, or a share of all labels, such as 1%% (%(default)s)")
    parser.add_argument("--draws", type=int, default=1, help="fixed draws of labels, order and first weights to "
                        "average over (%(default)s)")
    parser.add_argument("--scratch", action="store_true", help="the same from random weights, and the difference")
    parser.add_argument("--layers", default="all", metavar="all | head | N | NAME", help="which layers are trained: "
                        "all, the classifier alone, the last N stages or blocks, or those from NAME on (%(default)s)")
    parser.add_argument("--layer-decay", type=float, default=1.0, help="factor on the learning rate from each group of "
                        "layers to the one before it (%(default)s; 0.65 is usual for ViTs)")
    parser.add_argument("--optimizer", choices=list(DEFAULTS), default="sgd", help="(%(default)s)")
    parser.add_argument("--lr", type=float, help=f"for a batch ({lr})")
    parser.add_argument("--weight-decay", type=float, help=f"({decay})")
    parser.add_argument("--epochs", type=int, help=f"({EPOCHS}, or as many as make {STEPS:,} steps)")
    parser.add_argument("--batch-size", type=int, default=64, help="images of a step (%(default)s)")
    parser.add_argument("--crop-min", type=float, default=CROP_MIN, metavar="SHARE",
                        help="the least share of an image's area in a training crop (%(default)s)")
    parser.add_argument("--precision", choices=["float32", "bf16", "fp16"], default="float32", help="(%(default)s)")
    parser.add_argument("--save", metavar="FILE", type=Path, help="keep the fine-tuned backbone as a checkpoint that "
                        "all tools here read (one draw)")


def check(options: argparse.Namespace) -> None:
    tuning_of(options)
    if options.draws < 1 or (options.save and options.draws > 1):
        raise ValueError(f"--draws: {options.draws} given. Give 1 or more, and 1 with --save, which keeps one.")


def tuning_of(options: argparse.Namespace) -> Tuning:
    return Tuning(options.labels, options.layers, options.layer_decay, options.optimizer, options.lr,
                  options.weight_decay, options.epochs, options.batch_size, options.crop_min, options.precision)


def run(options: argparse.Namespace) -> None:
    trained, splits = opened(options)
    data, tuning = labelled(splits), tuning_of(options)
    announce(trained, tuning)
    answers = {start: [teach_draw(options, trained, data, tuning, start, draw) for draw in range(options.draws)]
               for start in ([TUNED, SCRATCH] if options.scratch else [TUNED])}
    report(results(answers, trained, data, tuning), trained, options, random=[SCRATCH])


def teach_draw(options: argparse.Namespace, trained: Trained, data: Labelled, tuning: Tuning, start: str,
               draw: int) -> Answers:
    """What the classifier of a draw says of the test images; its backbone is saved if that was asked for."""
    what = f"{start}, draw {draw + 1} of {options.draws}" if options.draws > 1 else start
    backbone, answers = tune(trained, data, tuning, draw, start == SCRATCH, what)
    if options.save and start == TUNED:
        save(options.save, backbone, trained, tuning)
    return answers


def announce(trained: Trained, tuning: Tuning) -> None:
    """What will be trained; ConfigError, before anything is, for layers that the backbone does not have."""
    groups = layer_groups(trained.encoder.backbone)
    first = first_trained(groups, tuning.layers)
    if distributed.is_main():
        names = [group.name for group in groups]
        print(f"trained  {', '.join([*names[first:], 'classifier'])}\n"
              f"frozen   {', '.join(names[:first]) or 'nothing'}\n")


def results(answers: dict[str, list[Answers]], trained: Trained, data: Labelled,
            tuning: Tuning) -> dict[str, list[Result]]:
    """The rows of the table: each start's accuracy, and the difference of the two where there are two.

    A difference is no accuracy: it is another metric, in a column of its own.
    """
    count = len(draw_labels(data.train.labels, tuning.labels, 0))
    protocol = tuning.protocol(trained, data, count, len(answers[TUNED]))
    protocol["test"] = len(answers[TUNED][0].label_m)           # those that could be read
    rows = {start: [over_draws("finetune", draws, protocol)] for start, draws in answers.items()}
    if SCRATCH in answers:
        rows[PAIRED] = [difference(answers[TUNED], answers[SCRATCH], "ahead", protocol)]
    return rows


def save(path: Path, backbone: nn.Module, trained: Trained, tuning: Tuning) -> None:
    """The backbone as weights that ``load_trained`` opens; the classifier is not kept."""
    if distributed.is_main():
        weights = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
        origin = {"checkpoint": str(trained.file), "labels": str(tuning.labels), "layers": tuning.layers}
        checkpoint.save(path, {"config": trained.config.text(), "facts": trained.facts, "weights": weights,
                               "parts": ["backbone"], "origin": origin})
