"""Average precision in validation and reports is close to what Ultralytics' validator computes."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cxr.families.base import SingleProcess
from cxr.metrics.detection import BoxMeter
from cxr.models.yolo import ultralytics

IMAGES, FINDINGS = 60, 3
IOUS = torch.linspace(0.5, 0.95, 10)


def made(seed: int) -> tuple[Tensor, Tensor]:
    """Predictions (B, N, 6), best score first, and ground-truth boxes (B, 3, 5); half of the predictions are near
    true boxes."""
    rng = torch.Generator().manual_seed(seed)
    low = 0.6 * torch.rand(IMAGES, 3, 2, generator=rng)
    corners = torch.cat([low, low + 0.1 + 0.3 * torch.rand(low.shape, generator=rng)], -1)
    finding = torch.randint(FINDINGS, (IMAGES, 3, 1), generator=rng).float()
    near = corners + 0.03 * torch.randn(corners.shape, generator=rng)
    far = torch.cat([low.flip(0), low.flip(0) + 0.2], -1)
    score = torch.cat(
        [0.3 + 0.7 * torch.rand(finding.shape, generator=rng), torch.rand(finding.shape, generator=rng)], 1
    )
    predicted = torch.cat([torch.cat([near, far], 1), score, finding.repeat(1, 2, 1)], -1)
    order = predicted[..., 4].argsort(1, descending=True)
    return predicted.gather(1, order[..., None].expand_as(predicted)), torch.cat([finding, corners], -1)


def of_ultralytics(predicted_BN6: Tensor, true_BM5: Tensor) -> dict[str, float]:
    """The means of Ultralytics' validator."""
    match = ultralytics("engine.validator").BaseValidator.match_predictions
    iou, rows = ultralytics("utils.metrics").box_iou, []
    for predicted, true in zip(predicted_BN6, true_BM5, strict=True):
        overlaps = iou(1024 * true[:, 1:], 1024 * predicted[:, :4])
        rows.append(match(SimpleNamespace(iouv=IOUS), predicted[:, 5], true[:, 0], overlaps).float())
    metrics = ultralytics("utils.metrics").DetMetrics({i: str(i) for i in range(FINDINGS)})
    true = true_BM5[..., 0].flatten().numpy()
    metrics.stats = {
        "tp": [torch.cat(rows).numpy()],
        "conf": [predicted_BN6[..., 4].flatten().numpy()],
        "pred_cls": [predicted_BN6[..., 5].flatten().numpy()],
        "target_cls": [true],
        "target_img": [true],
    }
    metrics.process()
    return dict(zip(("precision", "recall", "map_50", "map_50_95"), map(float, metrics.mean_results()), strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_is_within_a_hundredth_of_ultralytics(seed: int) -> None:
    """Ultralytics samples the curve at 101 points and extends it to a recall of 1; map_50 here has all points."""
    predicted, true = made(seed)
    meter = BoxMeter(torch.device("cpu"))
    meter.add(predicted, true)
    ours, theirs = meter.results(SingleProcess(), FINDINGS), of_ultralytics(predicted, true)
    assert 0.1 < ours["map_50_95"] < ours["map_50"] < 0.95
    for name, tolerance in {"map_50": 0.01, "map_50_95": 0.01, "precision": 0.03, "recall": 0.03}.items():
        assert ours[name] == pytest.approx(theirs[name], abs=tolerance), name
