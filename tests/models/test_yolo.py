"""YOLOv5 by Ultralytics: pretrained weights, sorted boxes, and no network access."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from cxr.models.yolo import Yolo, predict_boxes
from tests.conftest import REPOSITORY

FINDINGS = ("Mass", "Nodule", "Effusion")


@pytest.fixture(scope="module")
def network() -> Yolo:
    torch.manual_seed(0)
    return Yolo("yolov5n", FINDINGS)


def test_boxes_are_sorted_fractions_of_the_image(network: Yolo) -> None:
    with torch.inference_mode():
        boxes = predict_boxes(network.eval(), torch.rand(2, 1, 96, 96), min_score=0.0, nms_iou=0.5, max_boxes=7)
    assert boxes.shape == (2, 7, 6)
    assert boxes[..., :4].abs().max() < 6, "of edges up to 16 strides away"
    assert (boxes[:, :-1, 4] >= boxes[:, 1:, 4]).all()
    assert set(boxes[..., 5].flatten().tolist()) <= {0, 1, 2}
    with torch.inference_mode():
        assert (
            predict_boxes(network, torch.rand(1, 1, 96, 96), min_score=0.99, nms_iou=0.5, max_boxes=7).isnan().all()
        )


def test_color_weights_are_summed_and_class_layers_skipped(network: Yolo) -> None:
    other = Yolo("yolov5n", (*FINDINGS, "Mass again"))
    colors = {name: values.clone() for name, values in other.detector.state_dict().items()}
    colors["model.0.conv.weight"] = torch.rand(16, 3, 6, 6)
    fresh = Yolo("yolov5n", FINDINGS)
    left = fresh.load(colors).kept
    assert {name.split(".")[2] for name in left} == {"cv3"}, "the last layers of the classes"
    first = fresh.detector.state_dict()["model.0.conv.weight"]
    assert torch.allclose(first, colors["model.0.conv.weight"].sum(1, keepdim=True))
    assert Yolo("yolov5n", FINDINGS).load(network.state_dict()).kept == (), "our own names"


def test_weights_of_another_network_are_rejected(network: Yolo) -> None:
    with pytest.raises(ValueError, match="of YOLOv5 of this size"):
        Yolo("yolov5s", FINDINGS).load(network.state_dict())


SHUT = """
import socket, subprocess
calls = []
def no(*args, **kwargs):
    calls.append(args)
    raise OSError("the network is shut")
for name in ("connect", "connect_ex", "sendto"):
    setattr(socket.socket, name, no)
socket.getaddrinfo = socket.gethostbyname = socket.create_connection = no
import torch
save = torch.save
from cxr import schema
from cxr.families.base import SingleProcess
from cxr.families.detect import DetectRecipe
from cxr.training.engine import Engine
from tests.families.test_recipes import some_batches
torch.set_num_threads(1)
subprocess.Popen = no  # Ultralytics is imported from here on
recipe = DetectRecipe(size=32, batch_size=4, epochs=1, close_mosaic=0)
engine = Engine(recipe.task(recipe.network(schema.FINDINGS)), recipe, SingleProcess(), steps_per_epoch=2,
                device=torch.device("cpu"))
engine.epoch(some_batches())
assert "map_50_95" in engine.finish_epoch(some_batches)
assert torch.save is save, "PyTorch's own"
import ultralytics.utils
assert not ultralytics.utils.ONLINE and not ultralytics.utils.AUTOINSTALL
print("calls", len(calls))
"""


def test_nothing_leaves_the_machine() -> None:
    """A whole epoch where every way out is shut, and each that is tried is counted."""
    done = subprocess.run([sys.executable, "-c", SHUT], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.strip().splitlines()[-1] == "calls 0"
