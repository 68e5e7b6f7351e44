"""Tables show the measured values."""

from __future__ import annotations

import math

from cxr.metrics.bootstrap import MeanInterval
from cxr.reporting import segmentation


def test_the_empty_baseline_is_below_the_dice() -> None:
    found = {"dice": 0.81, "empty_prediction_dice": 0.7785, "hd95_px": 12.34, "hd95_mm": math.nan, "images": 10}
    lines = segmentation.summary_table(found, {"dice": MeanInterval(0.81, 0.8, 0.82)}).markdown().splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert [value for _, value in cells] == ["0.810 (0.800 to 0.820)", "0.778", "12.3", "–"]
    assert "if all predicted masks were empty" in cells[1][0]


def test_a_submission_has_a_row_an_image() -> None:
    assert segmentation.siim_submission({"a": "3 2 5 1", "b": "-1"}) == "ImageId,EncodedPixels\na,3 2 5 1\nb,-1\n"
