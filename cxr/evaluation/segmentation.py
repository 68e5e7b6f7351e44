"""The report of a run that finds masks: evaluation image by image against the archive's own, pictured, compared."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from cxr import storage
from cxr.evaluation import decisions
from cxr.evaluation.classification_data import LabeledScores
from cxr.evaluation.ground_truth_masks import MaskTruth, ShardTruth, known_masks
from cxr.evaluation.images import TruthImages
from cxr.evaluation.run import (
    Content,
    Measures,
    ReportOptions,
    Run,
    comparison_section,
    coverage,
    images_in_common,
    read_other_run,
)
from cxr.evaluation.segmentation_data import MaskScores, SegmentationEvaluation, both_masks, evaluate, load_scores
from cxr.imaging.geometry import ResizeTransform, fit_mask
from cxr.metrics import segmentation
from cxr.metrics.bootstrap import MeanInterval, mean_interval
from cxr.metrics.segmentation.overlap_metrics import PIXELS, PREDICTED, TRUE
from cxr.reporting import segmentation as tables
from cxr.reporting.overlays import MaskPair, Overlay, save_overlays, without_repeats
from cxr.reporting.page import Picture, Section, save_picture
from cxr.sources import rle
from cxr.wording import counted

PICTURES = "pictures"
SHOWN = 3  # images in each row of the picture


def report(run: Run, options: ReportOptions, out: str, *, label: str) -> Content:
    """Evaluate a run that finds masks of `label`: OUT/report.md, images.csv, pictures; the job's result."""
    out, archive = storage.normalize(out), storage.normalize(options.archive or run.archive)
    truth, scores = known_masks(archive, options, label), load_scores(run)
    evaluation = evaluate(scores, truth)
    predicted, confidence = figures(evaluation), intervals(evaluation, options)
    counts = image_counts(evaluation)
    lead = _coverage(evaluation)
    print(lead, flush=True)
    listed = image_rows(evaluation, truth)
    written = save_overlays(
        overlays(evaluation, scores, truth),
        storage.join(out, PICTURES),
        "masks.png",
        "The worst, best and middle images of those with a ground-truth or predicted mask.",
    )
    legend = tables.summary_legend(truth.resolution, options.resamples, counts)
    worst = [tables.worst_table(listed), "Ranks are those of `images.csv`.", *written]
    folder = storage.join(out, PICTURES)
    masks = [tables.summary_table(predicted, confidence), legend, *_distributions(evaluation, folder)]
    sections = [Section("Masks", masks), Section("The worst images", worst)]
    ends = {f"{name}_{end}": getattr(of, end) for name, of in confidence.items() for end in ("low", "high")}
    result = {"metrics": {**predicted, **ends, **counts}, "images": tables.write_images(listed, out)}
    sections += _decisions(evaluation, scores, truth, run, options, out, result)
    if options.compare_with:
        sections.append(compared(evaluation, truth, options, result))
    image_ids = [truth.image_ids[int(row)].as_py() for row in evaluation.rows]
    measures = Measures(image_ids, evaluation.patients, partial(measure, evaluation, options))
    return Content(run, archive, options, lead, sections, result, measures)


def _distributions(evaluation: SegmentationEvaluation, folder: str) -> list[Picture]:
    """Pictures of the Dice of all images, and of the areas of masks predicted beside ground truth."""
    true, dice = evaluation.overlap[:, TRUE].numpy(), segmentation.dice(evaluation.overlap).numpy()
    written = [
        save_picture(
            tables.dice_figure(dice, true > 0),
            folder,
            "dice.png",
            "Distribution of Dice over the images; the red line is the median.",
        )
    ]
    pixels = evaluation.overlap[:, PIXELS].numpy()
    shares = evaluation.overlap[:, PREDICTED].numpy() / pixels, true / pixels
    if any(of.any() for of in shares):
        caption = "Areas of masks that are not empty: distributions, and predicted against ground truth."
        written.append(save_picture(tables.area_figure(*shares), folder, "areas.png", caption))
    return written


def _decisions(
    evaluation: SegmentationEvaluation,
    scores: MaskScores,
    truth: MaskTruth,
    run: Run,
    options: ReportOptions,
    out: str,
    result: dict[str, Any],
) -> list[Section]:
    """Whether there is a mask at all: the operating point and the hardest cases. Nothing unless some ground-truth
    masks are empty and others are not."""
    labels = (evaluation.overlap[:, TRUE].numpy() > 0).astype(np.int8)[:, None]
    if labels.all() or not labels.any():
        return []
    places = evaluation.places
    shares = scores.areas_px[places] / np.maximum(1, scores.sizes[places].prod(1))
    joined = LabeledScores(
        findings=(truth.label,),
        rows=evaluation.rows,
        patients=evaluation.patients,
        probabilities=shares[:, None],
        predicted_positive=shares[:, None] > 0,
        labels=labels,
        images_with_error=evaluation.images_with_error,
        images_without_score=evaluation.images_without_score,
        images_without_labels=evaluation.images_without_truth,
    )

    def draw(case: decisions.Case, picture: np.ndarray, transform: ResizeTransform) -> MaskPair:
        row, place = int(evaluation.rows[case.image]), int(places[case.image])
        height, width = scores.sizes[place].tolist()
        true, to_original = truth.true_mask(row, height, width)
        predicted = rle.decode(scores.codes[place].as_py(), height, width)
        side = len(picture)
        return MaskPair(
            fit_mask(true, side, transform.then(to_original.inverse())), fit_mask(predicted, side, transform)
        )

    images = TruthImages(truth.table, [truth.info] if isinstance(truth, ShardTruth) else [])
    folder, value = storage.join(out, PICTURES), "area of the mask"
    return [
        decisions.operating_section(joined, run.thresholds, options, out, result),
        decisions.hardest_section(joined, images, run, out, folder, result, value=value, digits=4, draw=draw),
    ]


def measure(
    evaluation: SegmentationEvaluation, options: ReportOptions, places: np.ndarray
) -> dict[str, MeanInterval]:
    """Means of some of these images."""
    some = evaluation.at(evaluation.rows[places])
    means = intervals(some, options)
    return {
        "mean Dice": means["dice"],
        "mean Dice where there is a mask": means["positive_dice"],
        "mean HD95, px": _interval(some.hd95_px, some, options),
    }


def figures(evaluation: SegmentationEvaluation) -> dict[str, float]:
    """All metrics over the images; NaN if they cannot be measured."""
    return {
        **segmentation.summary(evaluation.overlap),
        **segmentation.image_level(evaluation.overlap, torch.from_numpy(evaluation.probabilities)),
        "hd95_px": _mean_of_known(evaluation.hd95_px),
        "hd95_mm": _mean_of_known(evaluation.hd95_mm),
    }


def _mean_of_known(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if len(known) else float("nan")


def intervals(evaluation: SegmentationEvaluation, options: ReportOptions) -> dict[str, MeanInterval]:
    """Means over images with their intervals by patient."""
    dice, positive = segmentation.dice(evaluation.overlap).numpy(), evaluation.overlap[:, TRUE].numpy() > 0
    values = {
        "dice": dice,
        "positive_dice": np.where(positive, dice, np.nan),
        "iou": segmentation.iou(evaluation.overlap).numpy(),
    }
    return {name: _interval(of, evaluation, options) for name, of in values.items()}


def _interval(values: np.ndarray, evaluation: SegmentationEvaluation, options: ReportOptions) -> MeanInterval:
    return mean_interval(values, evaluation.patients, resamples=options.resamples, seed=options.seed)


def image_counts(evaluation: SegmentationEvaluation) -> dict[str, int]:
    """Numbers of images by kind."""
    return {
        "patients": len(np.unique(evaluation.patients)),
        "hd95_images": int(np.isfinite(evaluation.hd95_px).sum()),
        "hd95_mm_images": int(np.isfinite(evaluation.hd95_mm).sum()),
        "hd95_one_empty": evaluation.one_empty,
        "images_with_error": evaluation.images_with_error,
        "images_without_score": evaluation.images_without_score,
        "images_without_ground_truth": evaluation.images_without_truth,
        "images_refused": sum(evaluation.rejected.values()),
    }


def _coverage(evaluation: SegmentationEvaluation) -> str:
    """How many images were evaluated, and why others were not."""
    positives = counted(int((evaluation.overlap[:, TRUE] > 0).sum()), "image")
    return coverage(
        len(evaluation.rows),
        evaluation.patients,
        f"{positives} with a ground-truth mask that is not empty",
        {
            "with an error": evaluation.images_with_error,
            "without scores": evaluation.images_without_score,
            "without a ground-truth mask": evaluation.images_without_truth,
            **{f"with a mask that cannot be compared ({reason})": n for reason, n in evaluation.rejected.items()},
        },
    )


def image_rows(evaluation: SegmentationEvaluation, truth: MaskTruth) -> list[dict[str, Any]]:
    """One row of plain values for each image, the worst first."""
    columns = {
        "dice": segmentation.dice(evaluation.overlap).tolist(),
        "iou": segmentation.iou(evaluation.overlap).tolist(),
        "hd95_px": evaluation.hd95_px.tolist(),
        "hd95_mm": evaluation.hd95_mm.tolist(),
        "predicted_px": evaluation.overlap[:, PREDICTED].tolist(),
        "ground_truth_px": evaluation.overlap[:, TRUE].tolist(),
        "probability": evaluation.probabilities.tolist(),
    }
    return [
        {"rank": rank, "image_id": truth.image_ids[int(evaluation.rows[at])].as_py()}
        | {name: values[at] for name, values in columns.items()}
        for rank, at in enumerate(evaluation.worst_first().tolist(), 1)
    ]


def overlays(evaluation: SegmentationEvaluation, scores: MaskScores, truth: MaskTruth) -> dict[str, list[Overlay]]:
    """The worst, best and middle images among those with a mask that is not empty, or among all if there is none."""
    order = evaluation.worst_first()
    ranks = np.flatnonzero((evaluation.overlap[:, [PREDICTED, TRUE]] > 0).any(1).numpy()[order])
    ranks = ranks if len(ranks) else np.arange(len(order))
    middle = max(0, (len(ranks) - SHOWN) // 2)
    ranked = {"worst": ranks, "best": ranks[::-1], "middle": ranks[middle : middle + SHOWN]}
    chosen = without_repeats(ranked, SHOWN)
    rows = evaluation.rows[order]
    pictures = truth.pictures(sorted({int(rows[rank]) for part in chosen.values() for rank in part}))
    dice = segmentation.dice(evaluation.overlap).numpy()[order]
    shown: dict[str, list[Overlay]] = {name: [] for name in chosen}
    for name, part in chosen.items():
        for rank in part:
            if rows[rank] in pictures:
                predicted, true = both_masks(scores, truth, int(rows[rank]), int(evaluation.places[order][rank]))
                picture, frame = pictures[int(rows[rank])]
                masks = (fit_mask(mask, len(picture), frame) for mask in (true, predicted))
                image_id, note = truth.image_ids[int(rows[rank])].as_py(), f"rank {rank + 1}, Dice {dice[rank]:.3f}"
                shown[name].append(Overlay(image_id, note, picture, MaskPair(*masks)))
    return shown


def compared(
    evaluation: SegmentationEvaluation, truth: MaskTruth, options: ReportOptions, result: dict[str, Any]
) -> Section:
    """The comparison with `options.compare_with`; its figures are added to the result.

    Raises:
        UserError: the other run has no image in common with this one.
    """
    other = read_other_run(options)
    theirs = evaluate(load_scores(other), truth)
    rows = images_in_common(evaluation.rows, theirs.rows, other)
    ours, theirs = evaluation.at(rows), theirs.at(rows)
    gain = segmentation.dice(ours.overlap).numpy() - segmentation.dice(theirs.overlap).numpy()
    positive = ours.overlap[:, TRUE].numpy() > 0
    gains = {
        "dice_gain": _interval(gain, ours, options),
        "positive_dice_gain": _interval(np.where(positive, gain, np.nan), ours, options),
    }
    result["metrics"]["images_compared"] = len(rows)
    for name, of in gains.items():
        result["metrics"] |= {name: of.value, f"{name}_low": of.low, f"{name}_high": of.high}
    return comparison_section(other, len(rows), [tables.gain_table(gains)])
