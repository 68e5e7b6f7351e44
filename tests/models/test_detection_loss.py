"""The loss of a detector: Ultralytics' values and gradients, unknown findings, chunks of a batch, workers."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from cxr.models import detection_loss
from cxr.models.detection_loss import DetectionLoss, anchors, ciou
from cxr.models.yolo import Yolo, ultralytics

FINDINGS = ("Mass", "Nodule", "Effusion")
WEIGHTS = (7.5, 0.5, 1.5)  # of box, class and distribution focal loss
SIZE, IMAGES, MOST = 96, 4, 12


def alone(values: Tensor) -> Tensor:
    return values


@pytest.fixture(scope="module")
def network() -> Yolo:
    torch.manual_seed(0)
    made = Yolo("yolov5n", FINDINGS).train()
    made.detector.args = SimpleNamespace(**dict(zip(("box", "cls", "dfl"), WEIGHTS, strict=True)))  # pyright: ignore[reportArgumentType]
    return made


def loss_of(network: Yolo, workers: int = 1) -> DetectionLoss:
    return DetectionLoss(network.strides, *WEIGHTS, alone, workers)


def raw_of(network: Yolo, seed: int = 0) -> dict[str, Any]:
    """Outputs with some confidence and boxes of all sizes, whose gradients can be taken."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        raw = network(torch.rand(IMAGES, 1, SIZE, SIZE, generator=generator))
    for name, strength in (("boxes", 2), ("scores", 3)):
        noise = strength * torch.randn(raw[name].shape, generator=generator)
        raw[name] = (raw[name] + noise).requires_grad_()
    return raw


def some_boxes(seed: int = 0) -> Tensor:
    """Twelve a crowded image, some of them tiny; then none, one behind gaps, and a few."""
    generator = torch.Generator().manual_seed(seed)
    low = 0.8 * torch.rand(IMAGES, MOST, 2, generator=generator)
    side = 0.02 + 0.5 * torch.rand(IMAGES, MOST, 2, generator=generator) ** 3
    index = torch.randint(len(FINDINGS), (IMAGES, MOST, 1), generator=generator).float()
    boxes = torch.cat([index, low, (low + side).clamp(max=1)], -1)
    boxes[1] = math.nan
    boxes[2, :5] = boxes[2, 6:] = math.nan
    boxes[3, 3:] = math.nan
    return boxes


def of_ultralytics(network: Yolo, raw: dict[str, Any], boxes: Tensor) -> Tensor:
    """Its box, class and dfl, divided by the number of images, by which it multiplies."""
    image, place = torch.nonzero(~boxes[..., 0].isnan(), as_tuple=True)
    rows = boxes[image, place]
    low, high = rows[:, 1:3], rows[:, 3:]
    given = {"batch_idx": image, "cls": rows[:, :1], "bboxes": torch.cat([(low + high) / 2, high - low], 1)}
    return network.detector.init_criterion()(raw, given)[0] / len(boxes)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("seed", range(4))
def test_values_and_gradients_equal_those_of_ultralytics(network: Yolo, seed: int) -> None:
    raw, boxes = raw_of(network, seed), some_boxes(seed)
    ours, theirs = torch.stack([*loss_of(network)(raw, boxes).values()]), of_ultralytics(network, raw, boxes)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert theirs.min() > 0
    for mine, its in zip(
        *(torch.autograd.grad(v.sum(), [raw["boxes"], raw["scores"]]) for v in (ours, theirs)), strict=True
    ):
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-6)
        assert its.any()


def test_a_batch_without_boxes_has_only_the_background_loss(network: Yolo) -> None:
    raw, none = raw_of(network), torch.full((IMAGES, MOST, 5), math.nan)
    ours = torch.stack([*loss_of(network)(raw, none).values()])
    torch.testing.assert_close(ours, of_ultralytics(network, raw, none), rtol=1e-5, atol=1e-6)
    assert ours.tolist()[::2] == [0, 0]
    assert ours[1] > 0


def test_padding_and_chunking_do_not_change_the_loss(network: Yolo, monkeypatch: pytest.MonkeyPatch) -> None:
    raw, boxes = raw_of(network), some_boxes()
    whole = loss_of(network)(raw, boxes)
    padded = torch.cat([boxes.new_full((IMAGES, 9, 5), math.nan), boxes], 1)
    assert {k: v.item() for k, v in loss_of(network)(raw, padded).items()} == pytest.approx(
        {k: v.item() for k, v in whole.items()}, rel=1e-5
    )
    monkeypatch.setattr(detection_loss, "_PAIRS", 1)
    assert loss_of(network)(raw, boxes) == whole


def everywhere(*findings: int) -> Tensor:
    """Regions around a whole image, (R, 5)."""
    return torch.tensor([[finding, 0.0, 0, 1, 1] for finding in findings])


def test_unknown_findings_have_no_gradient(network: Yolo) -> None:
    """Unknown images and unknown findings of an image have no gradient."""
    raw, boxes = raw_of(network), some_boxes()
    unknown = torch.full((IMAGES, len(FINDINGS), 5), math.nan)
    unknown[1], unknown[3, 1] = everywhere(0, 1, 2), everywhere(1)[0]
    boxes[3, boxes[3, :, 0] == 1] = math.nan
    sum(loss_of(network)(raw, boxes, unknown).values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    assert not raw["boxes"].grad[1].any()
    known = unknown[..., 0].isnan()
    assert not raw["scores"].grad[~known].any()
    assert raw["scores"].grad[known].abs().amin(1).min() > 0
    values = [{k: v.item() for k, v in loss_of(network)(raw, boxes, u).items()} for u in (unknown, None)]
    assert values[0]["box"] == pytest.approx(values[1]["box"])
    assert values[0]["class"] < values[1]["class"]


def test_a_finding_that_is_unknown_in_a_region_is_not_background_there(
    network: Yolo, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The left half of the third image may show the second finding; one box of it is known there."""
    raw, boxes = raw_of(network), torch.full((IMAGES, MOST, 5), math.nan)
    boxes[2, 3] = torch.tensor([1, 0.05, 0.1, 0.3, 0.4])
    unknown = torch.full((IMAGES, 2, 5), math.nan)
    unknown[2, 1] = torch.tensor([1.0, 0, 0, 0.5, 1])
    points, strides = anchors([one.shape[-2:] for one in raw["feats"]], network.strides, torch.device("cpu"))
    points = points * strides / SIZE
    left, inside = points[:, 0] <= 0.5, ((points > boxes[2, 3, 1:3]) & (points < boxes[2, 3, 3:])).all(1)
    (gradient,) = torch.autograd.grad(loss_of(network)(raw, boxes, unknown)["class"], raw["scores"])
    assert (gradient[[0, 1, 3]] != 0).all()
    assert (gradient[2, [0, 2]] != 0).all(), "other findings are background wherever they have no box"
    assert (gradient[2, 1, ~left] != 0).all()
    assert (gradient[2, 1, left & ~inside] == 0).all()
    assert (gradient[2, 1, inside] < 0).any(), "a box teaches all the same"
    monkeypatch.setattr(detection_loss, "_PAIRS", 1)
    (again,) = torch.autograd.grad(loss_of(network)(raw, boxes, unknown)["class"], raw["scores"])
    torch.testing.assert_close(gradient, again)


def test_images_with_only_unknown_findings_have_zero_gradients(network: Yolo) -> None:
    """All there, as a group of workers needs them."""
    network.zero_grad()
    nothing, unknown = torch.full((IMAGES, MOST, 5), math.nan), everywhere(0, 1, 2).expand(IMAGES, -1, -1)
    terms = loss_of(network)(network(torch.rand(IMAGES, 1, SIZE, SIZE)), nothing, unknown)
    sum(terms.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]
    gradients = [p.grad for p in network.parameters() if p.requires_grad]
    assert all(g is not None and not g.any() for g in gradients)


def test_workers_divide_by_the_targets_of_all_workers(network: Yolo) -> None:
    """The mean of two workers' terms, of two images each, equals the terms of all four images."""
    raw, boxes = raw_of(network), some_boxes()
    whole = loss_of(network)(raw, boxes)
    halves = [
        {
            name: values[part] if isinstance(values, Tensor) else [one[part] for one in values]
            for name, values in raw.items()
        }
        for part in (slice(2), slice(2, 4))
    ]
    sums: list[Tensor] = []

    def noted(values: Tensor) -> Tensor:
        sums.append(values)
        return values

    for half, part in zip(halves, boxes.split(2), strict=True):
        DetectionLoss(network.strides, *WEIGHTS, noted, 2)(half, part)
    both = [
        DetectionLoss(network.strides, *WEIGHTS, lambda _: sums[0] + sums[1], 2)(half, part)
        for half, part in zip(halves, boxes.split(2), strict=True)
    ]
    for name, value in whole.items():
        assert torch.stack([one[name] for one in both]).mean().item() == pytest.approx(value.item(), rel=1e-5)


def test_overlap_and_anchors_equal_those_of_ultralytics() -> None:
    generator = torch.Generator().manual_seed(0)
    low = torch.rand(2, 300, 2, generator=generator)
    a, b = torch.cat([low, low + torch.rand(2, 300, 2, generator=generator)], -1)
    theirs = ultralytics("utils.metrics").bbox_iou(a, b, xywh=False, CIoU=True)[:, 0]
    torch.testing.assert_close(ciou(a, b), theirs)
    feats = [torch.zeros(1, 1, *shape) for shape in ((4, 6), (2, 3))]
    points, strides = ultralytics("utils.tal").make_anchors(feats, torch.tensor([8.0, 16.0]), 0.5)
    ours = anchors([one.shape[-2:] for one in feats], (8.0, 16.0), torch.device("cpu"))
    assert torch.equal(ours[0], points)
    assert torch.equal(ours[1], strides)
