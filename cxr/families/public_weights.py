"""Import of public weights: files of other libraries become checkpoints, or weights that training starts from.

    torchxrayvision   DenseNets and ResNets: a checkpoint of family classify, ready to score
    ultralytics       YOLOv5u: a checkpoint of family detect, ready to score
    timm, dinov2      a backbone: a folder of weights for `--backbone-pretrained`, under timm's names

Every folder records where the weights come from, under which license, and the SHA-256 of the file.
"""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cxr import storage
from cxr.errors import UserError
from cxr.families import checkpoint, checkpoint_files
from cxr.families.base import Recipe
from cxr.families.classifier_base import ClassifierTask
from cxr.families.classify import ClassifyRecipe
from cxr.families.detect import DetectRecipe
from cxr.families.torchxrayvision_weights import FINDINGS, PUBLISHED, RELEASE, PublishedWeights
from cxr.models import pickled_modules, pretrained, weight_files
from cxr.models.image_backbone import timm_network
from cxr.models.pretrained import Fit
from cxr.models.weight_files import PythonObjectsError
from cxr.models.yolo import Yolo, YoloSize

Library = Literal["torchxrayvision", "ultralytics", "timm", "dinov2"]
LIBRARIES: tuple[Library, ...] = get_args(Library)
ORIGIN = "origin.json"  # in a folder of weights; a checkpoint has it as `origin` in checkpoint.json
LICENSES: Mapping[Library, str] = {
    "torchxrayvision": "Apache-2.0",
    "ultralytics": "AGPL-3.0",
    "dinov2": "Apache-2.0",
    "timm": "",  # differs between weights
}
_XRV_BACKBONES = ("densenet121", "resnet50", "densenet169", "densenet201", "resnet101")
_YOLO_SIZES: Mapping[int, YoloSize] = {16: "yolov5n", 32: "yolov5s", 48: "yolov5m", 64: "yolov5l", 80: "yolov5x"}
_DINOV2 = {384: "vit_small", 768: "vit_base", 1024: "vit_large", 1536: "vit_giant"}  # by width of the tokens


@dataclass(frozen=True)
class Imported:
    """The result of an import."""

    uri: str
    kind: Literal["checkpoint", "weights"]
    fit: Fit
    origin: Mapping[str, Any]
    recipe: Recipe | None = None
    """Of a checkpoint."""
    findings: tuple[str, ...] = ()
    """Of a checkpoint."""


@dataclass(frozen=True)
class Opened:
    """A file of another library."""

    state: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    """Plain values that the file has besides its tensors."""
    name: str
    sha256: str
    """Of the file; of the names and values of the tensors, if there are several files."""


def open_file(uri: str, *, trust: bool) -> Opened:
    """Read a file or a folder of a model hub.

    Args:
        trust: also read files with Python objects, in a process of its own; see `pickled_modules`.

    Raises:
        UserError: the file holds Python objects, and is not trusted.
        NotWeightsError: the file is damaged, or holds no weights.
    """
    uri = storage.normalize(uri)
    try:
        state, facts = pretrained.from_uri(uri), {}
    except PythonObjectsError:
        if not trust:
            raise UserError(
                f"{uri} contains Python objects, and only tensors are read without --trust. If you trust the source "
                f"of the file, use --trust on a machine outside the hospital's network; a separate process opens it"
            ) from None
        read, facts = pickled_modules.open_in_subprocess(storage.read_bytes(uri))
        state = pretrained.with_current_names(read)
    is_file = uri.endswith(weight_files.SUFFIXES)
    sha256 = hashlib.sha256(storage.read_bytes(uri)).hexdigest() if is_file else pretrained.digest(state)
    return Opened(state, facts, storage.name(uri), sha256)


def import_weights(
    library: Library,
    opened: Opened,
    out: str,
    *,
    name: str = "",
    findings: Sequence[str] = (),
    size: int = 0,
    license: str = "",
    source_url: str = "",
) -> Imported:
    """Write the checkpoint or weights that `opened` contains to the folder `out`.

    Args:
        name: TorchXRayVision's name of the weights, such as densenet121-res224-all, or timm's name of the network.
            Empty: recognized by the file's name and tensors.
        findings: names of the network's outputs; empty: those that the file or the library says.
        size: height and width of the network's input in pixels; 0: as published.
        license: SPDX identifier; empty: the library's.
        source_url: where the file was downloaded.

    Raises:
        UserError: the file does not hold a network of this library, or its license is not known.
    """
    license = license or LICENSES[library]
    if not license:
        raise UserError(
            f"the license of {opened.name} is not known: look it up in its model card, and name its SPDX identifier "
            f"with --license"
        )
    out = storage.normalize(out)
    published = _published(name, opened.name) if library == "torchxrayvision" else None
    origin = {
        "library": library,
        "file": opened.name,
        "sha256": opened.sha256,
        "license": license,
        "source_url": source_url or (RELEASE + published.file if published else ""),
    }
    try:
        if library == "torchxrayvision":
            return _torchxrayvision(opened, out, origin, published, findings, size)
        if library == "ultralytics":
            return _ultralytics(opened, out, origin, findings, size)
        return _backbone(opened, out, origin, name or _dinov2_name(opened.state))
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{opened.name} does not fit --from {library}: {error}") from error


def _published(name: str, file: str) -> PublishedWeights | None:
    by_name = [weights for weights in PUBLISHED if name == weights.name]
    if name and not by_name:
        raise UserError(f"name: expected one of {', '.join(weights.name for weights in PUBLISHED)}, got {name}")
    return next(iter(by_name or [weights for weights in PUBLISHED if weights.file == file]), None)


def _torchxrayvision(
    opened: Opened,
    out: str,
    origin: Mapping[str, Any],
    published: PublishedWeights | None,
    findings: Sequence[str],
    size: int,
) -> Imported:
    """Outputs that were not trained are left out. The operating thresholds become the checkpoint's thresholds.

    The library's own output is op_norm(p, threshold), which is p scaled in two pieces so that the threshold becomes
    0.5; scores here are p itself, and decisions are the same.
    """
    state = {name.removeprefix("model."): values for name, values in opened.state.items()}
    thresholds = state.pop("op_threshs", None)
    head = "classifier" if "classifier.weight" in state else "fc"
    if f"{head}.weight" not in state:
        raise ValueError("expected a DenseNet or a ResNet, got a network without a last layer")
    outputs = len(state[f"{head}.weight"])
    names = tuple(findings) or _targets(opened.facts, outputs)
    if len(names) != outputs:
        raise UserError(f"findings: expected a name for each of the {outputs} outputs, got {len(names)}: {names}")
    values: list[float | None] = [0.5] * outputs
    if published is not None:
        values = list(published.thresholds)
    elif thresholds is not None:
        values = [None if math.isnan(value) else value for value in thresholds.tolist()]
    trained = [i for i, (name, value) in enumerate(zip(names, values, strict=True)) if name and value is not None]

    size = size or (published.size if published else 512 if head == "fc" else 224)
    recipe, network, fit = _fitting_classifier(state, [names[i] for i in trained], size)
    with torch.no_grad():
        network.head.weight.copy_(state[f"{head}.weight"][trained])
        network.head.bias.copy_(state[f"{head}.bias"][trained])
        network.thresholds.copy_(torch.tensor([values[i] for i in trained], dtype=torch.float64))
    task = recipe.task(network)
    assert isinstance(task, ClassifierTask)
    rule = "published operating points" if published or thresholds is not None else "0.5, since none are published"
    task.chosen_thresholds = {
        "findings": list(network.findings),
        "rule": rule,
        "values": network.thresholds.tolist(),
        "positives": [0] * len(trained),
        "negatives": [0] * len(trained),
        "notes": ["from the library, which does not say by how many images"] * len(trained),
    }
    origin = {**origin, "weights": published.name if published else "", "fit": fit.describe()}
    _save_checkpoint(out, recipe, task, network, network.findings, origin)
    return Imported(out, "checkpoint", fit, origin, recipe, network.findings)


def _targets(facts: Mapping[str, Any], outputs: int) -> tuple[str, ...]:
    for key in ("pathologies", "targets"):
        if isinstance(facts.get(key), list) and len(facts[key]) == outputs:
            return tuple(facts[key])
    if outputs != len(FINDINGS):
        raise UserError(f"expected {len(FINDINGS)} outputs, got {outputs}: name them with --findings")
    return FINDINGS


def _fitting_classifier(state: Mapping[str, Tensor], findings: Sequence[str], size: int) -> tuple[Any, Any, Fit]:
    """The recipe, network and fit of the first backbone of TorchXRayVision that has these tensors."""
    reasons = []
    for backbone in _XRV_BACKBONES:
        if backbone.startswith("densenet") != any(name.startswith("features.") for name in state):
            continue
        recipe = ClassifyRecipe(backbone=backbone, input="torchxrayvision", size=size)
        network = recipe.network(findings)
        own = sum(not name.endswith(pretrained.COUNTER) for name in network.backbone.body.state_dict())
        given = sum(name.rpartition(".")[0] not in ("fc", "classifier") for name in state)
        given -= sum(name.endswith(pretrained.COUNTER) for name in state)
        if given != own:
            reasons.append(f"{backbone} has {own} tensors")
            continue
        fit = recipe.load_backbone(network, state)
        return recipe, network, replace(fit, loaded=fit.loaded + 2, unused=())  # the head is loaded, too
    raise ValueError(f"expected one of {', '.join(_XRV_BACKBONES)}, but {' and '.join(reasons)}")


def _ultralytics(opened: Opened, out: str, origin: Mapping[str, Any], findings: Sequence[str], size: int) -> Imported:
    first = opened.state.get("model.0.conv.weight")
    architecture = _YOLO_SIZES.get(len(first)) if first is not None else None
    if architecture is None:
        raise ValueError("expected YOLOv5u (yolov5nu.pt to yolov5xu.pt), got another network")
    named = opened.facts.get("names") or {}
    names = tuple(findings) or tuple(named.values() if isinstance(named, dict) else named)
    trained_at = (opened.facts.get("train_args") or {}).get("imgsz")
    size = size or (trained_at if isinstance(trained_at, int) else 640)
    recipe = DetectRecipe(architecture=architecture, size=size)
    outputs = next(len(v) for k, v in opened.state.items() if k.endswith("cv3.0.2.weight"))
    if len(names) != outputs:
        raise UserError(f"findings: expected a name for each of the {outputs} outputs, got {len(names)}")
    network = recipe.network(names)
    assert isinstance(network, Yolo)
    fit = network.load(opened.state)
    origin = {**origin, "fit": fit.describe()}
    _save_checkpoint(out, recipe, recipe.task(network), network, names, origin)
    return Imported(out, "checkpoint", fit, origin, recipe, names)


def _backbone(opened: Opened, out: str, origin: Mapping[str, Any], name: str) -> Imported:
    """Weights under timm's names, at the size at which timm has the network."""
    if not name:
        raise UserError("expected timm's name of the network, such as vit_base_patch14_dinov2, got none: add --name")
    network = timm_network(name)
    fit = pretrained.load(network, opened.state, name)
    origin = {**origin, "network": name, "backbone": f"timm:{name}", "fit": fit.describe()}
    storage.write_bytes(
        storage.join(out, weight_files.CHECKPOINT_WEIGHTS), weight_files.to_safetensors(network.state_dict())
    )
    storage.write_json(storage.join(out, ORIGIN), origin)
    return Imported(out, "weights", fit, origin)


def _dinov2_name(state: Mapping[str, Tensor]) -> str:
    """timm's name of a DINOv2, by the width of its tokens and whether it has registers."""
    tokens = next((v for k, v in state.items() if k.endswith("cls_token")), None)
    width = _DINOV2.get(tokens.shape[-1]) if tokens is not None else None
    registers = "_reg4" if any(name.endswith("register_tokens") for name in state) else ""
    return f"{width}_patch14{registers}_dinov2" if width else ""


def _save_checkpoint(
    out: str, recipe: Recipe, task: Any, network: nn.Module, findings: Sequence[str], origin: Mapping[str, Any]
) -> None:
    with tempfile.TemporaryDirectory(prefix="cxr-import-") as folder:
        checkpoint.save(
            Path(folder), recipe, task, network.state_dict(), findings=findings, metrics={}, origin=origin
        )
        checkpoint_files.copy_for_scoring(folder, out)
