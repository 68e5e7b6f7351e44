"""YOLOv5 with Ultralytics' anchor-free head and its non-maximum suppression, for gray X-rays.

Ultralytics is imported when a network is made, not with this module: it is an optional and heavy dependency
(`pip install '.[detect]'`), and looks at the process when it is imported. `ultralytics` sees to it that nothing of it
leaves the machine: no look whether there is a network, no fonts, weights or packages fetched, no reports.
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

YoloSize = Literal["yolov5n", "yolov5s", "yolov5m", "yolov5l", "yolov5x"]
SIZES: tuple[str, ...] = get_args(YoloSize)
STRIDE = 32  # the network's input must be a multiple
_FIRST = "model.0.conv.weight"
_OURS = "detector."  # what names of our own state dicts begin with
_OFFLINE = {"YOLO_OFFLINE": "true", "YOLO_AUTOINSTALL": "false", "YOLO_VERBOSE": "false"}


def ultralytics(module: str) -> Any:
    """A module of Ultralytics, e.g. "nn.tasks", imported so that it stays on this machine.

    It writes its settings into a folder of this process, takes the process for the only one (else its import waits
    for the others of a group, some of which may have imported it before), and `torch.save` stays PyTorch's.

    Raises:
        ImportError: it is not installed.
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
    """X-rays (B, 1, H, W) in [0, 1], sides multiples of 32, to Ultralytics' outputs.

    In training: raw "boxes" (B, 64, A), "scores" (B, findings, A), "feats". In eval mode: (B, 4 + findings, A), each
    anchor's x, y, width, height in pixels and a probability of each finding; and the raw outputs.

    `strides` are the pixels between the anchors of each level, fine ones first.
    """

    def __init__(self, size: YoloSize, findings: Sequence[str]) -> None:
        super().__init__()
        self.findings = tuple(findings)
        model = ultralytics("nn.tasks").DetectionModel
        self.detector: nn.Module = model(f"{size}.yaml", ch=1, nc=len(self.findings), verbose=False)
        self.strides: tuple[float, ...] = tuple(self.detector.stride.tolist())  # pyright: ignore

    def forward(self, x_B1HW: Tensor) -> Any:
        return self.detector(x_B1HW)

    def load(self, state: Mapping[str, Tensor]) -> list[str]:
        """Take all weights of the same name and shape; returns the names of those that stay as they were.

        Names are Ultralytics' (`model.0.conv.weight`) or ours. A first convolution of color images is summed over
        colors: of gray images it gives the same.

        Raises:
            ValueError: hardly anything fits, so that it must be another network's.
        """
        given = {name.removeprefix(_OURS): values for name, values in state.items()}
        own = self.detector.state_dict()
        if _FIRST in given and given[_FIRST].shape[1] == 3:
            given[_FIRST] = given[_FIRST].sum(1, keepdim=True)
        fitting = {name: values for name, values in given.items() if name in own and own[name].shape == values.shape}
        if len(fitting) < 0.8 * len(own):
            raise ValueError(
                f"of {len(own)} tensors of the network, {len(fitting)} are there with the same name and shape: "
                f"wanted weights of the same size of YOLOv5, as Ultralytics' `ultralytics` package trains it"
            )
        self.detector.load_state_dict(fitting, strict=False)
        return [name for name in own if name not in fitting]


class YoloEnsemble(nn.Module):
    """Networks of the same findings that look at the same images, each at its own size."""

    def __init__(self, members: Sequence[Yolo]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)
        self.findings = members[0].findings


def found(network: Yolo, x_B1HW: Tensor, *, score: float, iou: float, most: int) -> Tensor:
    """Boxes that non-maximum suppression keeps, finding by finding: (B, most, 6), best score first, NaN behind them.

    Each is x_min, y_min, x_max, y_max as shares of the image, its score, and the finding's index.

    Args:
        score: below which a box is left out.
        iou: overlap from which a box of the same finding with a lower score is left out.
    """
    importlib.import_module("torchvision.ops")  # Ultralytics takes its NMS where it finds it imported
    suppress = ultralytics("utils.nms").non_max_suppression
    height, width = x_B1HW.shape[-2:]
    kept = suppress(network(x_B1HW)[0], score, iou, multi_label=True, max_det=most, max_time_img=math.inf)
    boxes = x_B1HW.new_full((len(x_B1HW), most, 6), math.nan)
    for row, one in zip(boxes, kept, strict=True):
        row[: len(one)] = one
    return boxes / boxes.new_tensor([width, height, width, height, 1, 1])
