"""The model card of a checkpoint: its README.md, written from the facts in checkpoint.json.

It contains no paths, no URIs and no expressions that selected images, which could name patients.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from cxr import schema, storage
from cxr.families import recipe_type
from cxr.families.base import Recipe
from cxr.models.input_contract import InputContract
from cxr.reporting.tables import markdown

FEW = 50  # images of one class below which a threshold is called uncertain

_SCORES = {
    schema.PROBABILITIES: "probability of each finding, in [0, 1]; NaN: the classifier was not trained",
    schema.DECISIONS: "1 if the probability is at least the finding's threshold, else 0; "
    "-1: the classifier was not trained",
    schema.PRED_BOXES: "boxes with finding and score, in pixels of the original image, highest score first",
    schema.PRED_MASK_RLE: "the mask as run-length code, at the size of the original image",
    schema.PRED_MASK_AREA_PX: "area of the mask in pixels of the original image",
    schema.PRED_MASK_PROBABILITY: "probability that the mask is not empty, in [0, 1]; NaN: not predicted",
    schema.THETA: "2 x 3 transform from the aligned image to the image as stored, row by row, as in PyTorch's "
    "affine_grid",
}
_RULES = {  # others are in words
    "youden": "the largest sum of sensitivity and specificity (Youden's index)",
    "f1": "the largest F1",
    "specificity": "the largest sensitivity with a specificity of at least {at_least:g}",
}
_CROPS = {
    "letterbox": "the whole image, with black bars that make it square",
    "center": "the largest centered square",
}
_NOT_SETTINGS = {"family", "members", "aligner_recipe", "folds", "fold"}  # described elsewhere, or too long

_NOT_INTERVALS = """\
These are estimates without confidence intervals. They were measured on the validation images, on which the epoch,
the thresholds and possibly the settings were selected, so expect lower values on new images. To evaluate the
checkpoint on other images, with confidence intervals, use `cxr score` and `cxr report`.
"""
_LIMITS = """\
- This is not a medical device. It has not been tested for clinical use, and its scores must not be used for diagnosis
  without an evaluation at the place of use.
- It was evaluated only on images like those listed under Data. Performance can differ with other hospitals, devices,
  projections, ages and prevalences; evaluate it on your own images first.
"""
_CLASSIFIER_LIMITS = """\
- Labels of public archives are often extracted from reports and contain errors, which the network learns, too.
- Findings without labels in the training images have probabilities and decisions, too, which mean nothing. This file
  does not name them; those without labels in the validation images have the note "no known label".
- Probabilities are not calibrated. Thresholds were selected at the prevalence of the validation images.
"""
_LICENSE = """\
The software cxr is licensed under AGPL-3.0-or-later. The terms of these weights also depend on the archives and the
initial weights with which they were trained. These terms are not recorded: ask whoever trained the checkpoint.
"""


def model_card(about: Mapping[str, Any]) -> str:
    """The Markdown text for the contents of a checkpoint.json."""
    kind = recipe_type(about["recipe"]["family"])
    recipe = kind.from_dict(about["recipe"])
    members = [recipe_type(member["family"]).from_dict(member) for member in about["recipe"].get("members", ())]
    networks = list(enumerate(members or [recipe]))
    sections = {
        "Scores": _scores(recipe, about["findings"]),
        "Data": _data([network for _, network in networks], about),
        "Metrics": _metrics(recipe, about["metrics"]),
        "Thresholds": _thresholds(about["learned"]),
        "Input": _input(recipe, InputContract.from_dict(about["input"])),
        "Limits": _LIMITS + (_CLASSIFIER_LIMITS if schema.PROBABILITIES in recipe.score_columns.names else ""),
        "How to use it": _USE,
        "Settings": "\n".join(_settings(network, f"Member {n}: " if members else "") for n, network in networks),
        "License": _license(about.get("origin")),
        "Provenance": _provenance(about),
    }
    title = f"# Chest X-ray model of family `{recipe.family}`\n\n{inspect.getdoc(kind)}\n"
    if members:
        title += f"\nMembers: {len(members)} networks of family `{members[0].family}`.\n"
    return title + "".join(f"\n## {name}\n\n{text}" for name, text in sections.items() if text)


_USE = """\
FOLDER is the folder with this file, or its URI:

    cxr score --archive ARCHIVE --checkpoint FOLDER --out OUT
    cxr export onnx --checkpoint FOLDER --out OUT

In Python, `cxr.load("FOLDER").predict(["image.dcm"])` returns a table of the scores above.
"""


def _license(origin: Mapping[str, Any] | None) -> str:
    if not origin:
        return _LICENSE
    where = f" from {origin['source_url']}" if origin["source_url"] else ""
    return (
        f"The software cxr is licensed under AGPL-3.0-or-later. These weights were not trained with it: they were "
        f"imported from {origin['library']}, file {origin['file']}{where}, SHA-256 {origin['sha256']}. Their license "
        f"is {origin['license']}. The images that they were trained on may have their own terms.\n"
    )


def _scores(recipe: Recipe, findings: Sequence[str]) -> str:
    text = markdown(("column", "contents"), [(f"`{n}`", _SCORES.get(n, "")) for n in recipe.score_columns.names])
    if {schema.PROBABILITIES, schema.PRED_BOXES} & {*recipe.score_columns.names}:
        text += f"\n{len(findings)} findings, in this order: {', '.join(findings)}.\n"
    return text


def _data(networks: Sequence[Recipe], about: Mapping[str, Any]) -> str:
    data = about.get("data") or {}
    if not data:
        return "The archives and numbers of images are not recorded.\n"
    rows = [(split, f"{count:,}", _used(split, networks)) for split, count in data["images"].items()]
    text = f"X-rays in the layout of {data['source']}.\n\n" + markdown(("split", "images", "used for"), rows)
    if data.get("rejects"):
        text += f"\n{data['rejects']:,} more images could not be used.\n"
    if about.get("reading"):
        text += "\nOnly selected images of the archive were used; `reading` in checkpoint.json has the selection.\n"
    return text + "\nSplits are those of the archive, or made by patient where it has none.\n"


def _used(split: str, networks: Sequence[Recipe]) -> str:
    if split == "test":
        return "nothing"
    if networks[0].folds:
        folds = " or ".join(dict.fromkeys(str(recipe.fold) for recipe in networks))
        return f"fold {folds} of {networks[0].folds} (counted from 0) for validation, the others for training"
    return {"train": "training", "val": "validation"}.get(split, "nothing")


def _metrics(recipe: Recipe, metrics: Mapping[str, float | None]) -> str:
    if not metrics:
        return ""
    rows = [
        (f"`{name}`", _number(value), "selected the epoch" * (name == recipe.monitor))
        for name, value in sorted(metrics.items())
    ]
    return f"{markdown(('metric', 'value', 'note'), rows)}\n{_NOT_INTERVALS}"


def _number(value: float | None) -> str:
    return "not measured" if value is None or math.isnan(value) else f"{value:.4g}"


def _thresholds(learned: Mapping[str, Any]) -> str:
    text = ""
    if chosen := learned.get("thresholds"):
        columns = (chosen[name] for name in ("findings", "values", "positives", "negatives", "notes"))
        rows = [
            (finding, _number(value), f"{positives:,}", f"{negatives:,}", note or _few(positives, negatives))
            for finding, value, positives, negatives, note in zip(*columns, strict=True)
        ]
        how = str(_RULES.get(chosen["rule"], chosen["rule"])).format(at_least=chosen.get("at_least"))
        text += f"A finding is present if its probability is at least the threshold. Rule: {how}.\n\n"
        text += markdown(("finding", "threshold", "positives", "negatives", "note"), rows)
        text += "\nPositives and negatives: numbers of validation images with which the threshold was selected.\n"
    if rule := learned.get("mask_rule"):
        text += (
            f"A mask contains the pixels with a probability above {rule['bottom']:g}. It is empty if fewer than "
            f"{rule['min_area']:.2%} of the image's pixels have a probability above {rule['top']:g}.\n"
        )
    return text


def _few(positives: int, negatives: int) -> str:
    return f"uncertain: fewer than {FEW} images" if min(positives, negatives) < FEW else ""


def _input(recipe: Recipe, contract: InputContract) -> str:
    rows = [
        ("size", f"{contract.size} x {contract.size} pixels"),
        ("channels", "1" if contract.channels == 1 else "3, equal before normalization"),
        ("values of black and white", " to ".join(f"{value:g}" for value in contract.range)),
        ("mean, standard deviation", " and ".join(str(list(values)) for values in (contract.mean, contract.std))),
        ("part of the image", _CROPS[contract.crop]),
        ("lung crop", f"yes, with a margin of {recipe.lung_margin:g}" if recipe.lung_crop else "no"),
        ("aligned", "yes" if recipe.crop_setting == "aligner" else "no"),
        ("enhancement", recipe.enhancement.options() or "none"),
    ]
    table = markdown(("property", "value"), rows)
    return f"Gray X-rays with bright dense tissue. cxr prepares images like this itself.\n\n{table}"


def _settings(recipe: Recipe, whose: str) -> str:
    """Settings that differ from the family's defaults; of locations only the last part, which names the weights.

    Args:
        whose: member of an ensemble; empty for a single network.
    """
    default = type(recipe)().to_dict()
    rows = []
    for name, value in recipe.to_dict().items():
        if value == default[name] or name in _NOT_SETTINGS:
            continue
        location = name in recipe.LOCATION_SETTINGS or (isinstance(value, str) and "/" in value)
        rows.append((f"`{name}`", storage.name(value) if location else json.dumps(value)))
    if not rows:
        return f"{whose}The defaults of family `{recipe.family}`.\n"
    return f"{whose}Settings that differ from the defaults of the family:\n\n{markdown(('setting', 'value'), rows)}"


def _provenance(about: Mapping[str, Any]) -> str:
    rows = [
        ("SHA-256 of the weights", f"`{about['sha256']}`"),
        ("commit of cxr", f"`{about['commit']}`" if about["commit"] else "not recorded"),
        *about["versions"].items(),
    ]
    return markdown(("property", "value"), rows)
