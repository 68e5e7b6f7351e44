"""A checkpoint as one ONNX file: stored images in, the tensors of `Recipe.predict` out, facts in the metadata.

The graph contains all that happens on the device: the conversion to [0, 1], the resize to the network's input, the
network, test-time augmentation, thresholds and non-maximum suppression. What NumPy does with these tensors in
`Recipe.scored` remains to be done, and the metadata say what that is.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import json
import logging
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import cxr
from cxr import schema
from cxr.errors import UserError
from cxr.families import recipe_type
from cxr.families.attend import LOGITS
from cxr.families.base import Recipe
from cxr.families.checkpoint import Checkpoint
from cxr.families.detect import PREDICTIONS
from cxr.families.localize import BOX_OFFSETS, BOX_THRESHOLDS, HEAT
from cxr.families.segmentation import MASK_VALUES
from cxr.models.input_contract import CropRule

OPSET = 20  # of ONNX; ONNX Runtime reads it from version 1.17 on
BATCH = "batch"  # name of the first axis of the input and of all outputs
TOLERANCE = 1e-4  # largest difference from PyTorch, relative to values above 1

OUTPUTS = {
    schema.PROBABILITIES: "float32 (batch, findings): probability of each finding, in [0, 1]; NaN: the classifier "
    "was not trained",
    schema.DECISIONS: "int8 (batch, findings): 1 if the probability is at least the finding's threshold, else 0; "
    "-1: the classifier was not trained",
    schema.THETA: "float32: 2 x 3 transform, row by row, from points of the aligned image to points of the given "
    "one, both from -1 to 1 between the image's outer edges (x, then y)",
    HEAT: "uint8 (batch, findings, rows, columns): heat maps of the whole image; 255 is heat 1",
    BOX_THRESHOLDS: "float32 (batch, findings): fraction of a heat map's maximum above which cells belong to a box",
    BOX_OFFSETS: "float32 (batch, findings, 4): how boxes are moved, in widths and heights of the box (x, y), and "
    "the logarithms of the factors by which they are scaled (x, y)",
    LOGITS: "float32 (batch, findings, rows, columns): logits of each cell of the aligned image",
    PREDICTIONS: "float32 (batch, boxes, 6): x_min, y_min, x_max, y_max as fractions of the image, score in "
    "[0, 1], index of the finding; best box first, padded with NaN",
    MASK_VALUES: "float32 (batch, rows, columns) over the whole image: the mask contains the pixels from 0.5 on; all "
    "0 if the mask is empty",
    schema.PRED_MASK_PROBABILITY: "float32 (batch,): probability that the mask is not empty, in [0, 1]; NaN if the "
    "checkpoint predicts none",
}
CONTENTS: dict[CropRule, str] = {
    "letterbox": "gray values from 0 to 255, dense tissue bright: the whole image, its long side resized to the full "
    "width or height, centered, the rest 0",
    "center": "gray values from 0 to 255, dense tissue bright: the largest centered square of the image, resized",
}
REMAINING = {
    HEAT: "Boxes are drawn around connected regions of the heat maps above a threshold (cxr/boxes/from_heatmaps.py), "
    "and then moved and scaled by an offset (cxr/boxes/offsets.py).",
    LOGITS: "Boxes are drawn around connected regions of the logits' sigmoid, and moved to the image by theta "
    "(predict_boxes in cxr/families/attend.py).",
    MASK_VALUES: "The mask is resized to the original image (linear interpolation of mask_values, then >= 0.5). "
    "Family lungs retains only the two largest connected regions.",
}


class Predictions(nn.Module):
    """`Recipe.predict` as a module from stored pixels, uint8 (B, S, S), to a tuple of tensors."""

    outputs: tuple[str, ...] = ()
    """Names of the tensors, known after the first call."""

    def __init__(self, recipe: Recipe, network: nn.Module) -> None:
        super().__init__()
        self.recipe, self.network = recipe, network

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        predicted = self.recipe.predict(self.network, {schema.PIXELS: pixels})
        self.outputs = tuple(predicted)
        return tuple(predicted.values())


def export(saved: Checkpoint, stored_size: int = 0, *, prepared: bool = False) -> bytes:
    """A checkpoint as the contents of an ONNX file.

    Args:
        stored_size: height and width of the images that the file takes, in pixels; 0: the network's own input size.
        prepared: export also if the images must be cropped or enhanced beforehand, which the graph cannot contain.

    Raises:
        UserError: packages are missing, the images must be prepared, they would be too small, or boxes of several
            networks would have to be fused.
    """
    require_packages()
    stored_size = stored_size or saved.recipe.size
    if stored_size < saved.recipe.size:
        raise UserError(
            f"stored_size: expected at least the network's input size, {saved.recipe.size} px, got {stored_size} px: "
            f"use a larger one, or 0 for the input size"
        )
    steps = preparation(saved)
    if steps and not prepared:
        raise UserError(
            f"this checkpoint needs prepared images: {'; '.join(steps)}. This happens before the network, in full "
            f"resolution, and an ONNX file cannot contain it. Use --prepared-images if your program prepares them"
        )
    model = to_onnx(saved.recipe, saved.network, stored_size)
    for key, value in metadata(saved, stored_size, [output.name for output in model.graph.output]).items():
        model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value))
    return model.SerializeToString()


def require_packages() -> None:
    """Raise UserError unless the packages of the extra `onnx` are installed."""
    missing = [name for name in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"expected the packages onnx, onnxscript and onnxruntime, got no {' and no '.join(missing)}: run pip "
            f"install 'cxr[onnx]'"
        )


def preparation(saved: Checkpoint) -> list[str]:
    """What must be done to an image before it is resized to the stored size; usually nothing."""
    recipe, steps = saved.recipe, list[str]()
    if recipe.crop_setting == "lung_crop":
        steps.append(f"crop to the square around the lungs, with a margin of {recipe.lung_margin:g}")
    if recipe.crop_setting == "aligner":
        steps.append("align with the aligner's checkpoint")
    if recipe.enhancement:
        steps.append(f"enhance with {recipe.enhancement.options()}")
    return steps


def to_onnx(recipe: Recipe, network: nn.Module, stored_size: int) -> Any:
    """The graph as an `onnx.ModelProto`, without metadata."""
    import onnx

    module = Predictions(recipe, copy.deepcopy(network).cpu()).eval()  # a copy, because tracing may change it
    example = torch.zeros(2, stored_size, stored_size, dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it warns of buffers that predictions do not use
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export")  # Ultralytics' anchors
        traced = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim(BATCH)},), strict=False)
        program = torch.onnx.export(
            traced,
            opset_version=OPSET,
            input_names=[schema.PIXELS],
            output_names=module.outputs,
            custom_translation_table={torch.ops.cxr.suppress.default: _suppress_in_onnx},
            verbose=False,
        )
    assert program is not None
    (batch,) = (axis.dim_param for axis in program.model_proto.graph.input[0].type.tensor_type.shape.dim[:1])
    program.rename_axes({batch: BATCH})
    model = program.model_proto
    onnx.checker.check_model(model)
    return model


def _suppress_in_onnx(boxes: Any, scores: Any, iou: float, min_score: float, max_boxes: int) -> Any:
    """`models.suppression.suppress` as ONNX operations. A box's corners may be given with x or with y first."""
    op: Any = importlib.import_module("onnxscript").opset20
    limits = (op.Constant(value_ints=[max_boxes]), *(op.Constant(value_floats=[at]) for at in (iou, min_score)))
    remaining = op.NonMaxSuppression(boxes, scores, *limits)  # (N, 3) indices of image, finding and box
    none = op.CastLike(op.ConstantOfShape(op.Shape(scores)), scores)
    return op.ScatterND(none, remaining, op.GatherND(scores, remaining))


def metadata(saved: Checkpoint, stored_size: int, outputs: Sequence[str]) -> dict[str, Any]:
    """Facts for the file's metadata, by key; all values but strings are stored as JSON."""
    about = saved.about
    return {
        "cxr": cxr.__version__,
        "family": saved.recipe.family,
        "findings": list(saved.findings),
        "sha256": about["sha256"],
        "commit": about["commit"] or "",
        "recipe": without_locations(about["recipe"]),
        "input": {
            "name": schema.PIXELS,
            "type": "uint8",
            "shape": [BATCH, stored_size, stored_size],
            "contents": CONTENTS[saved.recipe.input_contract.crop],
            "preparation": preparation(saved),
        },
        "network_input": about["input"],
        "outputs": {name: OUTPUTS[name] for name in outputs},
        "remaining_steps": [REMAINING[name] for name in outputs if name in REMAINING],
        "learned": about["learned"],
        "metrics": about["metrics"],
    }


def without_locations(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """A recipe as in checkpoint.json, and those of its members, without paths and URIs of where they were trained."""
    locations = recipe_type(recipe["family"]).LOCATION_SETTINGS

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict) and "family" in value:
            return without_locations(value)
        return [cleaned(one) for one in value] if isinstance(value, list) else value

    return {
        name: cleaned(value)
        for name, value in recipe.items()
        if name not in locations and not (isinstance(value, str) and "/" in value)
    }


def session(model: bytes, threads: int = 0) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU; 0 threads: one per core."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def differences(model: bytes, recipe: Recipe, network: nn.Module, images: int = 3) -> dict[str, float]:
    """The largest difference between ONNX Runtime's and PyTorch's floating-point outputs, by name.

    They predict images of noise. Differences are divided by values above 1. NaN in one of them only is an infinite
    difference. Of predicted boxes, only scores are compared: boxes with nearly equal scores may change places.
    Decisions and heat maps are left out, because a difference in the last digit may be rounded to a whole one.
    """
    running = session(model)
    size = running.get_inputs()[0].shape[1]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, size, size), generator=generator).to(torch.uint8)
    with torch.inference_mode():
        expected = recipe.predict(network, {schema.PIXELS: pixels})
    names = [output.name for output in running.get_outputs()]
    results = running.run(names, {schema.PIXELS: pixels.numpy()})
    compared: dict[str, float] = {}
    for name, got in zip(names, results, strict=True):
        if not np.issubdtype(got.dtype, np.floating):
            continue
        index = 4 if name == PREDICTIONS else slice(None)
        compared[name] = _difference(got[..., index], expected[name].numpy()[..., index])
    return compared


def _difference(got: np.ndarray, expected: np.ndarray) -> float:
    assert got.shape == expected.shape
    a, b = got.astype(np.float64), expected.astype(np.float64)
    if (np.isnan(a) != np.isnan(b)).any():
        return math.inf
    return float(np.nanmax(np.abs(a - b) / np.maximum(1, np.abs(b)), initial=0))
