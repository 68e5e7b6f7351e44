"""YOLOv5 by Ultralytics: the loss is theirs, weights are taken where they fit, and nothing leaves the machine."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from cxr.models.yolo import DetectionLoss, Yolo, found, targets
from tests.conftest import REPOSITORY

FINDINGS = ("Mass", "Nodule", "Effusion")
GAINS = {"box": 7.5, "cls": 0.5, "dfl": 1.5}


@pytest.fixture(scope="module")
def network() -> Yolo:
    torch.manual_seed(0)
    return Yolo("yolov5n", FINDINGS)


def some_boxes() -> Tensor:
    """Of four images the first has two, the second one, and one stands behind a gap."""
    boxes = torch.full((4, 6, 5), math.nan)
    boxes[0, 0] = torch.tensor([2, 0.1, 0.2, 0.5, 0.6])
    boxes[0, 4] = torch.tensor([0, 0.5, 0.5, 0.7, 0.9])
    boxes[1, 1] = torch.tensor([1, 0.0, 0.0, 0.3, 0.2])
    return boxes


def alone(values: Tensor) -> Tensor:
    return values


def test_targets_are_centres_and_sizes() -> None:
    rows = targets(some_boxes())
    assert rows["batch_idx"].tolist() == [image for image in range(4) for _ in range(6)]
    real = rows["bboxes"][:, 2] > 0
    assert real.nonzero()[:, 0].tolist() == [0, 4, 7]
    assert rows["cls"][real].tolist() == [[2], [0], [1]]
    assert rows["bboxes"][0].tolist() == pytest.approx([0.3, 0.4, 0.4, 0.4])
    assert not rows["bboxes"][~real].any()


def test_the_loss_is_that_of_ultralytics(network: Yolo) -> None:
    loss = DetectionLoss(network, GAINS, alone, 1)
    raw = network.train()(torch.rand(4, 1, 96, 96))
    terms = loss(raw, some_boxes())
    rows = targets(some_boxes())
    real = rows["bboxes"][:, 2] > 0  # Ultralytics has no rows without a box
    theirs, _ = network.detector.init_criterion()(raw, {name: values[real] for name, values in rows.items()})
    assert [4 * terms[name].item() for name in ("box", "class", "dfl")] == pytest.approx(theirs.tolist(), rel=1e-5)
    assert min(theirs.tolist()) > 0


def test_what_is_not_known_teaches_nothing(network: Yolo) -> None:
    loss = DetectionLoss(network, GAINS, alone, 1)
    network.zero_grad()
    known = torch.zeros(4, dtype=torch.bool)
    terms = loss(network.train()(torch.rand(4, 1, 96, 96)), some_boxes(), known)
    sum(terms.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    gradients = [p.grad for p in network.parameters() if p.requires_grad]
    assert all(g is not None and not g.any() for g in gradients), "all there, as a group needs them, and 0"


def test_found_boxes_are_sorted_shares(network: Yolo) -> None:
    with torch.inference_mode():
        boxes = found(network.eval(), torch.rand(2, 1, 96, 96), score=0.0, iou=0.5, most=7)
    assert boxes.shape == (2, 7, 6)
    assert boxes[..., :4].abs().max() < 6, "of edges up to 16 strides away"
    assert (boxes[:, :-1, 4] >= boxes[:, 1:, 4]).all()
    assert set(boxes[..., 5].flatten().tolist()) <= {0, 1, 2}
    with torch.inference_mode():
        assert found(network, torch.rand(1, 1, 96, 96), score=0.99, iou=0.5, most=7).isnan().all()


def test_colour_weights_are_summed_and_other_classes_left_out(network: Yolo) -> None:
    other = Yolo("yolov5n", (*FINDINGS, "Mass again"))
    colours = {name: values.clone() for name, values in other.detector.state_dict().items()}
    colours["model.0.conv.weight"] = torch.rand(16, 3, 6, 6)
    fresh = Yolo("yolov5n", FINDINGS)
    left = fresh.load(colours)
    assert {name.split(".")[2] for name in left} == {"cv3"}, "the last layers of the classes"
    first = fresh.detector.state_dict()["model.0.conv.weight"]
    assert torch.allclose(first, colours["model.0.conv.weight"].sum(1, keepdim=True))
    assert Yolo("yolov5n", FINDINGS).load(network.state_dict()) == [], "our own names"


def test_weights_of_another_network_are_refused(network: Yolo) -> None:
    with pytest.raises(ValueError, match="same size of YOLOv5"):
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
from cxr import batches, schema
from cxr.recipes.base import Alone
from cxr.recipes.detect import DetectRecipe
from cxr.train.engine import Engine
from tests.test_recipes import some_batches
torch.set_num_threads(1)
subprocess.Popen = no  # Ultralytics is imported from here on
recipe = DetectRecipe(size=32, batch_size=4, epochs=1, close_mosaic=0)
engine = Engine(recipe.task(recipe.network(schema.FINDINGS)), recipe, Alone(), steps_per_epoch=2,
                device=torch.device("cpu"))
engine.epoch(some_batches())
assert "map50_95" in engine.finish_epoch(some_batches)
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
