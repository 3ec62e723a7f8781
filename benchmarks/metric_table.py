"""What labels add, loss by loss: each config trained from scratch and from a pretrained backbone, in one table.

    python -m benchmarks.metric_table --data fashion --weights runs/moco_fashion --seeds 3
    python -m benchmarks.metric_table --data cifar10 --root FOLDER --weights RUN --configs contrastive,triplet
    python -m benchmarks.metric_table --data fashion --tables           what is there already, and nothing is trained

Same data, network, images and views for all: those of the config on Fashion-MNIST, with ``SETS`` for others. The first
table is of all classes: accuracy of the nearest training image (k = 1; it is recall@1 of the test images among those),
and AUC of verification on pairs drawn from the test images. In the second the last three classes are not trained on,
and of their test images are recall@1, leave-one-out, and AUC. Features are those of the config's ``evaluate.layer``; of
the backbone where there was no training with labels. AUC is by their cosine for all, also where the loss is on
Euclidean distances or a classifier of pairs was learned. The budget is epochs: steps are of 64 images, or of 60 and 66
where the loss takes pairs or triplets, and a method with two views (supcon) passes each image twice. The pretrained
backbone has seen images of all classes, and no labels. Mean and standard deviation over seeds. A record goes to
``metric_table.jsonl`` after each training; what is there by the same settings is not trained again, whatever has become
of the code.
"""

import argparse
import contextlib
import json
import statistics
from pathlib import Path
from typing import Any

from benchmarks.harness import Report, arguments, figure, machine
from benchmarks.metric_runs import SCRATCH, SETS, Case, Experiment, key, measure
from common.chosen import choose
from common.data.pack_index import INDEX

CONFIGS = ("contrastive,softmax_contrastive,centre_loss,triplet,ranked_triplet,offline_triplet,n_pair,supcon,"
           "cross_batch_memory,siamese")


def table(records: list[dict[str, Any]], unseen: bool) -> str:
    """Markdown, in the order in which the rows were first measured."""
    head = "recall@1" if unseen else "1-NN"
    lines = [f"| trained by | begins | {head}, % | AUC, % | CPU s | n |", "|---|---|---|---|---|---|"]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        if record["unseen"] == unseen:
            groups.setdefault((record["row"], record["begins"]), []).append(record)
    for (row, begins), group in groups.items():
        nearest, auc = (spread([record[name] for record in group]) for name in ("nearest", "auc"))
        seconds = statistics.mean(record["seconds"] for record in group)
        lines.append(f"| {row} | {begins} | {nearest} | {auc} | {f'{seconds:.0f}' if begins else ''} | {len(group)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean, and the standard deviation of two or more."""
    more = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{more}"


def read(file: Path) -> list[dict[str, Any]]:
    """The records, but for a line that a kill cut off."""
    found = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def append(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = not file.exists() or not file.stat().st_size or file.read_bytes().endswith(b"\n")
    with file.open("a", encoding="utf-8") as lines:
        lines.write(("" if whole else "\n") + json.dumps(record) + "\n")


def add(report: Report, record: dict[str, Any]) -> None:
    what = f"{record['data']}{', classes not trained on' * record['unseen']}, seed {record['seed']}"
    for name in ("nearest", "auc"):
        report.add(figure(what, f"{record['row']} {record['begins']}".strip() + f": {name}", [record[name]], "%"))


def planned(options: argparse.Namespace) -> Experiment:
    """Raises SystemExit for what is not there."""
    if options.data not in SETS:
        raise SystemExit(f"--data: {options.data} given. Give one of {', '.join(SETS)}.")
    of, weights = SETS[options.data], ""
    if options.root:
        packed = {"name": "common.data.packed"} if (Path(options.root) / INDEX).is_file() else {}
        of = of._replace(data={**of.data, **packed, "root": options.root})
    if options.weights:
        weights = str(choose(Path(options.weights), "last")[0])
    overrides = [f"train.epochs={options.epochs}"] if options.epochs else []
    configs = [name.strip().removesuffix(".yaml") for name in options.configs.split(",") if name.strip()]
    first = Experiment(of, [], weights, configs, options.seeds, overrides)
    classes = first.config(Case(configs[0], SCRATCH, 0, False)).build("data").train.classes
    return first._replace(classes=classes)


def main() -> None:
    options = arguments(__doc__, quick={"data": "digits", "configs": "contrastive", "seeds": 1, "epochs": 1},
                        in_rounds=False, data="fashion", root="", weights="", configs=CONFIGS, seeds=3, epochs=0,
                        tables=False)
    experiment = planned(options)
    report, file = Report("metric_table", options.quick, options.out), options.out / "metric_table.jsonl"
    known, found = {record["key"]: record for record in read(file)}, []
    for case in experiment.cases():
        config = experiment.config(case)
        name = key(case, config, experiment.weights)
        if name not in known and not options.tables:
            measured = measure(case, config, experiment.weights, experiment.classes)
            known[name] = {"key": name, "data": options.data, **case._asdict(), **measured, **machine()}
            append(file, known[name])
        if name in known:
            found.append(known[name])
            add(report, known[name])
    for unseen in (False, True):
        print(f"\n{options.data}, {'classes not trained on' if unseen else 'all classes'}\n\n{table(found, unseen)}")


if __name__ == "__main__":
    main()
