"""What the judgement of predicted masks looks like: a page, a table by image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from cxr import storage
from cxr.metrics.bootstrap import MeanInterval
from cxr.reporting.tables import Table, csv_text, interval, number

_WORST = 10  # images in the page's table


def summary_table(predicted: Mapping[str, float], sure: Mapping[str, MeanInterval]) -> Table:
    """A row a figure, those of `sure` with their intervals."""
    named = [(title, name) for name, title in _TITLES.items() if name in predicted]
    return Table(["figure", "value (95 %)"], [[title, _cell(name, predicted, sure)] for title, name in named])


_TITLES = {
    "dice": "mean Dice, two empty masks count 1",
    "empty_prediction_dice": "… of finding nothing in any image",
    "positive_dice": "mean Dice of the images with something to find",
    "iou": "mean IoU, two empty masks count 1",
    "mean_iou": "mean IU of background and target, all pixels together",
    "pixel_accuracy": "pixel accuracy",
    "hd95_px": "HD95, px",
    "hd95_mm": "HD95, mm",
    "image_auroc": "AUROC of the image's probability",
    "image_sensitivity": "sensitivity of a mask that is not empty",
    "image_specificity": "specificity of a mask that is not empty",
}


def _cell(name: str, predicted: Mapping[str, float], sure: Mapping[str, MeanInterval]) -> str:
    digits = 1 if name.startswith("hd95") else 3
    if name in sure:
        return interval(predicted[name], sure[name].low, sure[name].high, digits)
    return number(predicted[name], digits)


def summary_legend(resolution: str, resamples: int, counts: Mapping[str, int]) -> str:
    """What the figures mean, in Markdown."""
    measured, in_mm, one_empty = (f"{counts[name]:,}" for name in ("hd95_images", "hd95_mm_images", "hd95_one_empty"))
    return (
        f"Masks are compared at {resolution}. Intervals are percentile intervals of {resamples:,} bootstrap "
        f"resamples of patients with all of their images. Mean Dice must be read beside that of finding nothing, "
        f"which is the share of images with nothing to find. Mean IU is that of Long et al. (2015). HD95 is the "
        f"larger of the two 95th percentiles of the distances between the outlines, mean over the {measured} images "
        f"where neither mask is empty, {in_mm} of them with a known spacing; in {one_empty} images one of the two is "
        f"empty and there is no distance. A dash is what could not be measured."
    )


def gain_table(gains: Mapping[str, MeanInterval]) -> Table:
    """How much better one run is than another on the same images, by patient."""
    named = {"dice_gain": "mean Dice", "positive_dice_gain": "mean Dice of the images with something to find"}
    rows = [[named[name], interval(gain.value, gain.low, gain.high)] for name, gain in gains.items()]
    return Table(["difference", "this run minus the other (95 %)"], rows)


def write_images(rows: Sequence[Mapping[str, Any]], out: str) -> str:
    """Write every image's figures, worst first, as OUT/images.csv; returns its URI."""
    uri = storage.join(out, "images.csv")
    storage.write_text(uri, csv_text(rows))
    return uri


def worst_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """The first of the rows that `write_images` takes."""
    head = ["rank", "image", "Dice", "IoU", "HD95, px", "predicted, px", "true, px"]
    cells = [
        [
            str(row["rank"]),
            row["image_id"],
            number(row["dice"]),
            number(row["iou"]),
            number(row["hd95_px"], 1),
            f"{row['predicted_px']:,}",
            f"{row['true_px']:,}",
        ]
        for row in rows[:_WORST]
    ]
    return Table(head, cells)


def siim_submission(codes: Mapping[str, str]) -> str:
    """The CSV that SIIM-ACR (2019) takes: a row an image, its mask as relative RLE, "-1" for an empty one."""
    return csv_text([{"ImageId": name, "EncodedPixels": code} for name, code in codes.items()])
