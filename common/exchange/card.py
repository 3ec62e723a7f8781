"""The model card: what stands in README.md beside weights that are handed on, and what the hub reads of it."""

import re
from collections.abc import Mapping, Sequence

import yaml

from common.config import Config
from common.evaluate.table import table
from common.exchange import public
from common.exchange.format import Format
from common.exchange.handed import Handed
from common.exchange.measured import measured
from common.exchange.preprocessing import FILE, Preprocessing
from common.exchange.proof import Proof
from common.trained import Trained

README = "README.md"
UNKNOWN = "unknown: ask whoever trained it"
# Identifiers of the hub (huggingface.co/docs/hub/repositories-licenses) that models are often given under.
LICENSES = ("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0",
            "cc-by-nc-sa-4.0", "cc-by-nc-nd-4.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "openrail", "unlicense")
# A format -> what the hub calls its library; of all others: pytorch.
LIBRARIES = {"timm": "timm", "onnx": "onnx", "detectron2": "detectron2"}
SHOWN = ("views", "method", "optimizer", "schedule", "train")


def card(handed: Handed, format: Format, proof: Proof, notes: Sequence[str] = ()) -> str:
    """Markdown with the hub's front matter; names neither the machine nor its user. ``notes``: sentences on what these
    files can do and cannot."""
    trained, license = handed.trained, handed.license
    parts = [_front_matter(handed, format), f"# {public.markdown(handed.arch or handed.what)}, by {_method(trained)}",
             _about(handed, format), "## Load it", public.block(format.lines(handed, "FOLDER"), "python"),
             _proven(proof), "## Pictures", _pictures(trained), "## Training", _facts(_training(trained)),
             public.block(_settings(trained), "yaml"), "## Measured", _measured(handed),
             "## Licence", f"{public.markdown(license or UNKNOWN)}. That of the training images is not known here.",
             "## Limits", _bullets([*_limits(handed), *notes])]
    if trained.method.citation:
        parts += ["## Citation", public.block(trained.method.citation, "bibtex")]
    return "\n\n".join(parts) + "\n"


def _front_matter(handed: Handed, format: Format) -> str:
    """What the hub reads: huggingface.co/docs/hub/model-cards, section on metadata."""
    method = str(settled(handed.trained).get("method.name")).rpartition(".")[2].lower()
    kind = "metric-learning" if handed.trained.method.supervised else "self-supervised-learning"
    tags = ["image-feature-extraction", kind, "contrastive-learning", method, format.name]
    values = {**license_fields(handed.license), "library_name": LIBRARIES.get(format.name, "pytorch"),
              "pipeline_tag": "image-feature-extraction", "tags": list(dict.fromkeys(tags))}
    return f"---\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}---"


def license_fields(given: str | None) -> dict[str, str]:
    """The hub's identifier of a licence, or ``other`` with a name made of letters, digits, dots and dashes."""
    known = (given or "unknown").lower()
    if known in (*LICENSES, "unknown"):
        return {"license": known}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", known).strip("-") or "other"}


def settled(trained: Trained) -> Config:
    """The config that the weights were trained with, whatever was changed to open them."""
    return trained.recorded or trained.config


def _method(trained: Trained) -> str:
    return public.markdown(str(settled(trained).get("method.name")).rpartition(".")[2])


def _about(handed: Handed, format: Format) -> str:
    """What it is, and its sizes."""
    given = {"backbone": "the backbone",
             "encoder": f"the backbone with its projection head{', at unit length' * handed.unit}",
             "key_backbone": "the backbone of the key encoder (the moving average)",
             "second_backbone": "the backbone of the second tower, for the second images of pairs"}[handed.what]
    parameters = sum(parameter.numel() for parameter in handed.module.parameters())
    size = handed.image_size
    return _facts({
        "what": f"{given}: images [B, {handed.channels}, {size}, {size}] to features [B, {handed.dim}]",
        "parameters": f"{parameters:,}", "format": f"{format.name}: {format.about}",
        "use": "features of images without labels: nearest neighbours, a linear classifier, a start for fine-tuning"})


def _proven(proof: Proof) -> str:
    near = f"up to {proof.difference:.2g}, of features up to {proof.scale:.3g}" if proof.difference else "to the bit"
    return (f"Loaded again in a process of its own, it gave the features of the training {near} (on "
            f"{public.markdown(proof.images)}).")


def _pictures(trained: Trained) -> str:
    found = Preprocessing.of(trained.views, trained.facts["channels"])
    whole = "" if found.short_side == found.size else (
        f" A picture of exactly {found.size} x {found.size} is taken whole, without the resize.")
    return (f"Upright, {found.plain()['colour']}, the shorter side resized to {found.short_side} pixels (bilinear, "
            f"antialiased), the central {found.size} x {found.size} cut out, values scaled to 0..1, then the mean "
            f"{_numbers(found.mean)} taken off and divided by {_numbers(found.std)}.{whole} The same stands in "
            f"`{FILE}`.")


def _numbers(values: Sequence[float]) -> str:
    return "(" + ", ".join(f"{value:.4g}" for value in values) + ")"


def _training(trained: Trained) -> dict[str, str]:
    """The facts of the run, or of the file that the weights are from."""
    data = public.settings(settled(trained).get("data", {}), local=True)
    root = f", {data['root']}" if isinstance(data.get("root"), str) else ""
    found = {"method": str(settled(trained).get("method.name")), "data": f"{data.get('name', 'unknown')}{root}"}
    if trained.origin:
        origin = public.settings(trained.origin, local=True)
        return found | {f"origin, {name}": str(value) for name, value in origin.items()}
    return found | {
        "images": f"{trained.facts['num_samples']:,}, with{'' if trained.method.supervised else 'out'} their labels",
        "hash of the list of images": trained.data or "unknown",
        "checkpoint": f"epoch {trained.epoch:.6g}, step {trained.step:,}{_chosen(trained)}", "seed": str(trained.seed),
        "hash of the weights": trained.sha256(), "hash of the settings": settled(trained).digest()}


def _chosen(trained: Trained) -> str:
    return "" if trained.chosen == "this file" else f" ({trained.chosen})"


def _settings(trained: Trained) -> str:
    shown = {name: settled(trained).get(name) for name in SHOWN if settled(trained).has(name)}
    return yaml.safe_dump(public.settings(shown), sort_keys=False, allow_unicode=True)


def _measured(handed: Handed) -> str:
    rows = measured(handed.trained)
    if not rows:
        return "Not measured: nothing is recorded of this checkpoint."
    whose = {"key_backbone": "Of the query encoder, not of this one:\n\n",
             "second_backbone": "Of both towers, or of the first:\n\n"}.get(handed.what, "")
    return whose + public.block(table(rows, intervals=True), "text")


def _limits(handed: Handed) -> list[str]:
    images = handed.trained.facts["num_samples"]
    return [
        "Trained with labels: it says which pictures are of one class. Classes that it has not seen are less certain."
        if handed.trained.method.supervised else
        "Trained without labels: it says which pictures are alike, by the augmentations above, and names nothing.",
        *([] if handed.trained.origin else
          [f"It has seen {images:,} images; of others, nothing is known beyond what is measured above."]),
        "Biases of the training images are in the features, and were not examined.",
        f"Trained on views of {handed.image_size} pixels; other sizes were not measured."]


def _facts(values: Mapping[str, str]) -> str:
    rows = "\n".join(f"| {public.markdown(name)} | {public.markdown(value)} |" for name, value in values.items())
    return f"| | |\n|---|---|\n{rows}"


def _bullets(sentences: Sequence[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
