"""YOLOv5 with Ultralytics' anchor-free head and its non-maximum suppression, for grayscale X-rays.

Ultralytics is imported when a network is made, not with this module: it is an optional, heavy dependency
(`pip install 'cxr[detect]'`) that inspects the process on import. The function `ultralytics` keeps it offline: it
does not probe the network, download fonts, weights or packages, or send reports.
"""

from __future__ import annotations

import atexit
import importlib
import math
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from cxr.models import pretrained
from cxr.models.pretrained import Fit
from cxr.models.suppression import best_boxes, suppress

YoloSize = Literal["yolov5n", "yolov5s", "yolov5m", "yolov5l", "yolov5x"]
SIZES: tuple[str, ...] = get_args(YoloSize)
STRIDE = 32  # the sides of the network's input are multiples of it
_CLASS_LAYERS = ".cv3."  # in the names of layers whose widths depend on the number of findings
_OFFLINE = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}


def ultralytics(module: str) -> Any:
    """A module of Ultralytics, such as "nn.tasks", imported offline.

    It writes its settings to a temporary folder of this process. It does not see a process group (its import would
    wait for the other processes, some of which may have imported it already), and `torch.save` stays PyTorch's.

    Raises:
        ImportError: Ultralytics is not installed.
    """
    if "YOLO_CONFIG_DIR" not in os.environ:
        os.environ["YOLO_CONFIG_DIR"] = tempfile.mkdtemp(prefix="cxr-yolo-")
        atexit.register(shutil.rmtree, os.environ["YOLO_CONFIG_DIR"], ignore_errors=True)
    os.environ.pop("ULTRALYTICS_API_KEY", None)
    os.environ.update(_OFFLINE)
    save, world = torch.save, os.environ.pop("WORLD_SIZE", None)
    try:
        return importlib.import_module(f"ultralytics.{module}")
    finally:
        torch.save = save
        if world is not None:
            os.environ["WORLD_SIZE"] = world


class Yolo(nn.Module):
    """X-rays (B, 1, H, W) in [0, 1], whose sides are multiples of 32, to Ultralytics' outputs.

    In training mode, raw "boxes" (B, 64, A), "scores" (B, findings, A) and "feats". In evaluation mode, a tuple of
    (B, 4 + findings, A), with each anchor's x, y, width and height in pixels and the findings' probabilities, and the
    raw outputs.

    `strides` are the distances between the anchors of each level in pixels, fine levels first.
    """

    def __init__(self, size: YoloSize, findings: Sequence[str]) -> None:
        super().__init__()
        self.findings = tuple(findings)
        model = ultralytics("nn.tasks").DetectionModel
        self.detector: nn.Module = model(f"{size}.yaml", ch=1, nc=len(self.findings), verbose=False)
        self.strides: tuple[float, ...] = tuple(self.detector.stride.tolist())  # pyright: ignore

    def forward(self, x_B1HW: Tensor) -> Any:
        return self.detector(x_B1HW)

    def load(self, state: Mapping[str, Tensor]) -> Fit:
        """Load a state dict with Ultralytics' names (`model.0.conv.weight`), with any prefix.

        Class layers of another number of findings are skipped (`kept` of the result). The first convolution of a
        network for color images is summed over colors, which gives the same output for gray images.

        Raises:
            ValueError: the weights do not fit this network.
        """
        shapes = {name[name.find("model.") :]: values.shape for name, values in state.items()}
        own = self.detector.state_dict()
        skipped = [name for name in own if _CLASS_LAYERS in name and shapes.get(name) != own[name].shape]
        return pretrained.load(
            self.detector, state, "YOLOv5 of this size, as the `ultralytics` package trains it", skip=skipped
        )


def predict_boxes(network: Yolo, x_B1HW: Tensor, *, min_score: float, nms_iou: float, max_boxes: int) -> Tensor:
    """Boxes after non-maximum suppression per finding: (B, max_boxes, 6), best score first, padded with NaN.

    Each row is x_min, y_min, x_max, y_max as fractions of the image, the score, and the finding's index.

    Args:
        min_score: boxes with lower scores are dropped.
        nms_iou: of two boxes of a finding that overlap more than this, the one with the lower score is dropped.
    """
    height, width = x_B1HW.shape[-2:]
    suppressed = _suppressed_in_graph if torch.compiler.is_exporting() else _suppressed
    boxes = suppressed(network, x_B1HW, min_score, nms_iou, max_boxes)
    return boxes / boxes.new_tensor([width, height, width, height, 1, 1])


def _suppressed(network: Yolo, x_B1HW: Tensor, min_score: float, nms_iou: float, max_boxes: int) -> Tensor:
    """`predict_boxes` in pixels, by Ultralytics, whose loop over images is fast but cannot be exported."""
    importlib.import_module("torchvision.ops")  # Ultralytics uses torchvision's NMS if it has been imported
    suppress = ultralytics("utils.nms").non_max_suppression
    suppressed = suppress(
        network(x_B1HW)[0], min_score, nms_iou, multi_label=True, max_det=max_boxes, max_time_img=math.inf
    )
    boxes = x_B1HW.new_full((len(x_B1HW), max_boxes, 6), math.nan)
    for row, image_boxes in zip(boxes, suppressed, strict=True):
        row[: len(image_boxes)] = image_boxes
    return boxes


def _suppressed_in_graph(network: Yolo, x_B1HW: Tensor, min_score: float, nms_iou: float, max_boxes: int) -> Tensor:
    """`_suppressed` in operations whose shapes do not depend on values."""
    detector: Any = network.detector
    detector.model[-1].dynamic = True  # else the anchors of an earlier batch would be reused
    center_xy, size_xy, scores_BFA = network(x_B1HW)[0].split([2, 2, len(network.findings)], 1)
    boxes_BA4 = torch.cat([center_xy - size_xy / 2, center_xy + size_xy / 2], 1).transpose(1, 2)
    return best_boxes(boxes_BA4, suppress(boxes_BA4, scores_BFA, nms_iou, min_score, max_boxes), max_boxes)
