"""Which metrics a report shows in large type at its top, and what they mean to a radiologist."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from cxr.reporting.page import KeyFigure


@dataclass(frozen=True)
class Headline:
    """How a metric of result.json is shown."""

    title: str
    explanation: str
    digits: int = 3
    share: bool = True  # between 0 and 1


def _count(title: str, explanation: str = "") -> Headline:
    return Headline(title, explanation, 0, share=False)


HEADLINES: dict[str, Headline] = {
    "localization_accuracy_iou10": Headline(
        "Localization accuracy at IoU 0.1",
        "Share of the findings with a ground-truth box for which a predicted box has an IoU of more than 0.1 with "
        "one.",
    ),
    "localization_accuracy_iou50": Headline(
        "Localization accuracy at IoU 0.5", "The same at an IoU of more than 0.5."
    ),
    "mean_pointing": Headline(
        "Pointing game",
        "Share of the findings with a ground-truth box for which the center of the highest-scoring box is in one.",
    ),
    "map_40": Headline(
        "mAP at IoU > 0.4",
        "Average precision of boxes, averaged over findings. A predicted box is correct if its IoU with a "
        "ground-truth box is more than 0.4.",
    ),
    "map_50": Headline("mAP at IoU > 0.5", "The same at an IoU of more than 0.5."),
    "mean_auroc": Headline(
        "Mean AUROC",
        "Probability that a random image with a finding scores higher than one without it, averaged over findings. "
        "0.5 is chance, 1 is perfect.",
    ),
    "mean_ap": Headline(
        "Mean average precision",
        "Area under the precision-recall curve, averaged over findings. Chance is the prevalence of a finding.",
    ),
    "mean_froc": Headline(
        "Mean FROC sensitivity",
        "Share of the ground-truth boxes that are detected, averaged over 1/8 to 8 false positives per image and "
        "over findings.",
    ),
    "dice": Headline(
        "Mean Dice",
        "Overlap of the predicted and the ground-truth mask: 1 if they are equal, 0 if they are disjoint. Two empty "
        "masks count as 1.",
    ),
    "positive_dice": Headline(
        "Mean Dice where there is a mask", "Over the images whose ground-truth mask is not empty."
    ),
    "iou": Headline(
        "Mean IoU", "Intersection of the predicted and the ground-truth mask, as a share of their union."
    ),
    "hd95_mm": Headline(
        "Distance between outlines, mm",
        "95 % of the points on one outline are at most this far from the other (HD95), averaged over images.",
        1,
        share=False,
    ),
    "hd95_px": Headline(
        "Distance between outlines, px",
        "95 % of the points on one outline are at most this far from the other (HD95), averaged over images.",
        1,
        share=False,
    ),
    "image_auroc": Headline(
        "AUROC of the image's score",
        "Probability that an image with a mask scores higher than one without.",
    ),
    "mask_iou": Headline(
        "IoU of lungs after alignment",
        "Overlap of the ground-truth lung masks of two aligned images, averaged over pairs of images.",
    ),
    "mask_iou_before": Headline("IoU of lungs before alignment", "The same for the original images."),
    "corner_error_pct": Headline(
        "Pose error, % of the width",
        "Distance of the image's corners from their ground-truth positions, after the best-fitting constant "
        "transform.",
        1,
        share=False,
    ),
    "corner_error_before_pct": Headline("Pose error before alignment, % of the width", "", 1, share=False),
    "group_correlation": Headline(
        "Correlation with the mean image", "Average over the aligned images; 1 if all are equal."
    ),
    "images_implausible": _count(
        "Implausible transforms", "They mirror the image, or zoom or shift it more than is plausible."
    ),
    "predicted_boxes": _count("Predicted boxes"),
    "images_with_boxes": _count("Images with a box"),
    "images_with_mask": _count("Images with a mask"),
    "median_area_share": Headline(
        "Median area of a mask", "As a share of the image, over the masks that are not empty."
    ),
    "images": _count("Images"),
    "patients": _count("Patients"),
    "images_with_error": _count("Images without scores", "The reasons are listed below."),
}


def key_figures(metrics: Mapping[str, float | None]) -> list[KeyFigure]:
    """The metrics among these that have a headline and a value, in the order of the headlines."""
    return [
        KeyFigure(
            name,
            headline.title,
            value,
            _or_nan(metrics.get(f"{name}_low")),
            _or_nan(metrics.get(f"{name}_high")),
            headline.explanation,
            headline.digits,
            headline.share,
        )
        for name, headline in HEADLINES.items()
        if (value := metrics.get(name)) is not None and math.isfinite(value)
    ]


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
