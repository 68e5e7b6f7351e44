"""The report of a detector's run: boxes and image-level predictions, and a comparison with another run."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from cxr import schema, storage
from cxr.boxes import areas
from cxr.errors import UserError
from cxr.evaluation import decisions
from cxr.evaluation.classification_data import LabeledScores
from cxr.evaluation.decisions import BoxLimits
from cxr.evaluation.detection_data import DetectionEvaluation, evaluate, one_truth
from cxr.evaluation.ground_truth_boxes import BoxTruth, known_boxes
from cxr.evaluation.localization_data import box_shares, load_scores
from cxr.evaluation.run import (
    Content,
    Measures,
    ReportOptions,
    Run,
    comparison_section,
    coverage,
    findings_of,
    read_other_run,
)
from cxr.imaging.geometry import ResizeTransform
from cxr.metrics import classification, detection
from cxr.metrics.bootstrap import MeanInterval
from cxr.metrics.detection import VOC_IOUS, DetectionSummary
from cxr.metrics.localization import Boxes
from cxr.reporting import classification as label_tables
from cxr.reporting import classification_pictures
from cxr.reporting import detection as tables
from cxr.reporting.detection import PREDICTION, TRUTH
from cxr.reporting.overlays import BoxPair, Overlay, save_overlays, without_repeats
from cxr.reporting.page import Gallery, Picture, Section, save_picture
from cxr.reporting.tables import Table, csv_text, interval
from cxr.schema import NO_FINDING
from cxr.wording import counted

PICTURES = "pictures"
SHOWN = 3  # images in each row of the picture


def report(run: Run, options: ReportOptions, out: str) -> Content:
    """Evaluate a run. Writes the pages, boxes.csv, findings.csv and pictures; returns the job's result."""
    out, archive = storage.normalize(out), storage.normalize(options.archive or run.archive)
    truth = one_truth(known_boxes(archive, options), options.labeling.reader_boxes)
    evaluation = evaluate(load_scores(run), findings_of(run), truth)
    summary = _box_summary(evaluation, options)
    limits = BoxLimits.of(run, evaluation.findings, options)
    images = WholeImages.of(evaluation, limits)
    labels = _image_summary(evaluation, images, options)
    positive = limits.reached(evaluation.predicted)
    confusion = detection.confusion(positive, evaluation.true, len(evaluation.findings), iou=VOC_IOUS[0], score=0)
    lead = _coverage(evaluation)
    print(lead, flush=True)
    box_pictures = _box_pictures(evaluation, images, summary, confusion, positive, truth, limits, options, out)
    label_pictures = _label_pictures(images, labels, storage.join(out, PICTURES))
    box_legend = tables.precision_legend(summary, options.resamples)
    confusions = [tables.confusion_table(confusion, evaluation.findings), _confusion_legend(limits)]
    froc = save_picture(
        tables.froc_figure(summary), storage.join(out, PICTURES), "froc.png", "FROC, one curve for each finding."
    )
    result: dict[str, Any] = {"metrics": metrics(evaluation, summary, labels)}
    joined = images.joined(evaluation)
    own = dict(zip(evaluation.findings, limits.scores.tolist(), strict=True))
    sections = [
        Section("Boxes", [tables.precision_table(summary), box_legend, *box_pictures]),
        Section("FROC", [tables.froc_table(summary), tables.froc_legend(), froc]),
        Section("Whole images", [label_tables.summary_table(labels), _labels_legend(limits), *label_pictures]),
        decisions.operating_section(joined, own, options, out, result),
        Section("Confusion matrix", confusions),
        _hardest(evaluation, positive, truth, out, result),
    ]
    result |= {"boxes": tables.write_findings(summary, out), "findings": label_tables.write_summary(labels, out)}
    if options.compare_with:
        sections.append(compared(evaluation, truth, options, result))
    image_ids = truth.table[schema.IMAGE_ID].take(pa.array(evaluation.rows)).to_pylist()
    measures = Measures(image_ids, evaluation.patients, partial(measure, evaluation, options))
    return Content(run, archive, options, lead, sections, result, measures)


def measure(evaluation: DetectionEvaluation, options: ReportOptions, places: np.ndarray) -> dict[str, MeanInterval]:
    """Metrics of some of these images: mean AP over findings, and the AP of each finding."""
    some = evaluation.at(evaluation.rows[places])
    summary = _box_summary(some, options)
    return {f"mean AP at IoU > {iou:g}": means.over_findings for iou, means in summary.voc.items()} | {
        f"AP at IoU > {VOC_IOUS[0]:g}/{finding}": value
        for finding, value in summary.voc[VOC_IOUS[0]].by_finding(some.findings).items()
    }


@dataclass(frozen=True)
class WholeImages:
    """Image-level scores, labels and decisions derived from boxes, (N, F + 1) each; the last column is no finding."""

    probabilities: np.ndarray
    labels: np.ndarray
    predicted_positive: np.ndarray  # bool: a finding if one of its boxes reaches the score, no finding if no box does

    @classmethod
    def of(cls, evaluation: DetectionEvaluation, limits: BoxLimits) -> WholeImages:
        probabilities = detection.image_probabilities(
            evaluation.predicted, len(evaluation.rows), len(evaluation.findings)
        )
        predicted_positive = probabilities >= np.append(np.maximum(limits.scores, 1e-12), 0)  # not without a box
        predicted_positive[:, -1] = ~predicted_positive[:, :-1].any(1)
        return cls(probabilities, detection.image_labels(evaluation.true, evaluation.known), predicted_positive)

    def joined(self, evaluation: DetectionEvaluation) -> LabeledScores:
        """The same without the last column, as of a classifier."""
        return LabeledScores(
            findings=evaluation.findings,
            rows=evaluation.rows,
            patients=evaluation.patients,
            probabilities=self.probabilities[:, :-1],
            predicted_positive=self.predicted_positive[:, :-1],
            labels=self.labels[:, :-1],
            images_with_error=evaluation.images_with_error,
            images_without_score=evaluation.images_without_score,
            images_without_labels=evaluation.images_without_boxes,
        )


def _box_summary(evaluation: DetectionEvaluation, options: ReportOptions) -> detection.DetectionSummary:
    return detection.summarize(
        evaluation.predicted,
        evaluation.true,
        evaluation.patients,
        evaluation.findings,
        known_NF=evaluation.known,
        resamples=options.resamples,
        seed=options.seed,
    )


def _image_summary(
    evaluation: DetectionEvaluation, images: WholeImages, options: ReportOptions
) -> classification.ClassificationSummary:
    names, bootstrap = [*evaluation.findings, NO_FINDING], {"resamples": options.resamples, "seed": options.seed}
    return classification.summarize(
        images.probabilities, images.labels, images.predicted_positive, evaluation.patients, names, **bootstrap
    )


def _label_pictures(images: WholeImages, summary: classification.ClassificationSummary, out: str) -> list[Picture]:
    return classification_pictures.write_pictures(
        summary, images.probabilities, images.labels, images.predicted_positive, out
    )


def metrics(
    evaluation: DetectionEvaluation, summary: DetectionSummary, labels: classification.ClassificationSummary
) -> dict[str, Any]:
    """Metrics for result.json, with IoU in percent; NaN if they cannot be measured."""
    values: dict[str, Any] = {
        "images": summary.images,
        "patients": summary.patients,
        "ground_truth_boxes": int(summary.true.sum()),
        "predicted_boxes": int(summary.predicted.sum()),
        "findings_measured": len(summary.findings) - len(summary.without_truth),
        "images_with_error": evaluation.images_with_error,
        "images_without_score": evaluation.images_without_score,
        "images_without_boxes": evaluation.images_without_boxes,
        "map_50_95": summary.map_50_95,
        "mean_froc": summary.mean_froc,
    }
    for iou, of in summary.voc.items():
        name = f"map_{100 * iou:.0f}"
        values |= {name: of.mean, f"{name}_low": of.mean_low, f"{name}_high": of.mean_high}
    aps = summary.voc[VOC_IOUS[0]].value.tolist()
    values |= {f"ap_{100 * VOC_IOUS[0]:.0f}/{f}": ap for f, ap in zip(summary.findings, aps, strict=True)}
    shares = ("auroc", "accuracy", "precision", "recall", "f1")
    values |= {f"mean_{name}": getattr(labels.mean, name) for name in shares}
    return values | {f"auroc/{row.finding}": row.auroc for row in labels.rows}


def _coverage(evaluation: DetectionEvaluation) -> str:
    """How many images were evaluated, and why others were not."""
    true = counted(len(evaluation.true.image), "ground-truth box", "ground-truth boxes")
    boxed = counted(len(np.unique(evaluation.true.image)), "image")
    predicted = counted(len(evaluation.predicted.image), "predicted box", "predicted boxes")
    unknown = evaluation.predictions_of_unknown_findings
    text = coverage(
        len(evaluation.rows),
        evaluation.patients,
        f"{true} in {boxed}, {predicted}",
        {
            "with an error": evaluation.images_with_error,
            "without scores": evaluation.images_without_score,
            "without known boxes": evaluation.images_without_boxes,
        },
    )
    note = f" {counted(unknown, 'predicted box', 'predicted boxes')} of findings unknown in their image not counted."
    return text + note if unknown else text


def _labels_legend(limits: BoxLimits) -> str:
    return (
        f"An image's probability of a finding is the highest score of its boxes; that of {NO_FINDING!r} is one minus "
        f"the highest score of all boxes. AUROC ranks images by it. For accuracy, precision, recall and F1, a "
        f"finding is predicted if a box has a score {limits.text}. Brier score and ECE treat scores as "
        f"probabilities, although a detector's scores may not be calibrated."
    )


def _confusion_legend(limits: BoxLimits) -> str:
    return (
        f"Predicted boxes with a score {limits.text}, matched one to one with ground-truth boxes of any finding at "
        f"IoU > {VOC_IOUS[0]:g}, the highest IoU first. The row {tables.BACKGROUND!r} counts ground-truth boxes that "
        f"were missed; the column counts predicted boxes that match no ground-truth box."
    )


def _box_pictures(
    evaluation: DetectionEvaluation,
    images: WholeImages,
    summary: DetectionSummary,
    confusion: np.ndarray,
    counted_boxes: Boxes,
    truth: BoxTruth,
    limits: BoxLimits,
    options: ReportOptions,
    out: str,
) -> list[Picture | Gallery]:
    """All pictures of boxes."""
    count, names = len(evaluation.findings), evaluation.findings
    shown_by = {TRUTH: (images.labels == 1).sum(0), PREDICTION: images.predicted_positive.sum(0)}
    boxes = {TRUTH: summary.true, PREDICTION: np.bincount(counted_boxes.finding, minlength=count)}
    shares = {
        name: box_shares(of, evaluation.sizes_px, count)
        for name, of in ((TRUTH, evaluation.true), (PREDICTION, counted_boxes))
    }
    figures = {
        "box_precision_recall.png": (
            tables.curves_figure(summary),
            "Precision and recall of boxes, one curve for each finding.",
        ),
        "confusion.png": (
            tables.confusion_figure(confusion, names),
            "Confusion matrix of boxes; shades are shares of a column.",
        ),
        "labels.png": (
            tables.distribution_figure({TRUTH: shown_by[TRUTH]}, [*names, NO_FINDING], "Images by finding", "images"),
            "Number of images with each finding.",
        ),
        "labels_predicted.png": (
            tables.distribution_figure(
                shown_by, [*names, NO_FINDING], f"Images by finding, box scores {limits.text}", "images"
            ),
            "Number of images in which each finding is present, and in which it is predicted.",
        ),
        "boxes_predicted.png": (
            tables.distribution_figure(boxes, names, f"Boxes by finding, scores {limits.text}", "boxes"),
            "Number of ground-truth and predicted boxes of each finding.",
        ),
        "box_area.png": (
            tables.area_figure(shares, names),
            "Area of ground-truth and predicted boxes, as a share of the image.",
        ),
    }
    folder, shown = storage.join(out, PICTURES), overlays(evaluation, counted_boxes, truth, options.seed)
    examples = save_overlays(
        shown, folder, "boxes.png", "Images with the lowest and the highest F1, and a random sample."
    )
    charts = [save_picture(figure, folder, name, caption) for name, (figure, caption) in figures.items()]
    return [*examples, *charts]


def overlays(
    evaluation: DetectionEvaluation, predictions: Boxes, truth: BoxTruth, seed: int
) -> dict[str, list[Overlay]]:
    """Among images with ground-truth boxes: the lowest F1, the highest F1, and a random sample."""
    f1 = image_f1(evaluation, predictions)
    boxed = np.flatnonzero(np.isfinite(f1))
    order = boxed[np.argsort(f1[boxed], kind="stable")]
    shuffled = np.random.default_rng(seed).permutation(order)
    chosen = without_repeats({"worst": order, "best": order[::-1], "random": shuffled}, SHOWN)
    pictures = truth.pictures(sorted({int(evaluation.rows[image]) for part in chosen.values() for image in part}))
    shown: dict[str, list[Overlay]] = {name: [] for name in chosen}
    for name, part in chosen.items():
        for image in part:
            if (pictured := pictures.get(int(evaluation.rows[image]))) is None:
                continue
            picture, transform = pictured
            pair = _pair(evaluation, predictions, transform, image)
            image_id = truth.table[schema.IMAGE_ID][int(evaluation.rows[image])].as_py()
            shown[name].append(Overlay(image_id, f"F1 {f1[image]:.2f}", picture, pair))
    return shown


def _hardest(
    evaluation: DetectionEvaluation, positive: Boxes, truth: BoxTruth, out: str, result: dict[str, Any]
) -> Section:
    """False boxes with the highest scores, and the largest missed boxes. Writes hardest.csv."""
    false = positive.at(~detection.true_positives(positive, evaluation.true, VOC_IOUS[0]))
    missed = evaluation.true.at(detection.missed_boxes(positive, evaluation.true, VOC_IOUS[0]))
    share = areas(missed.xyxy) / np.maximum(1, evaluation.sizes_px.prod(1))[missed.image]
    groups = {
        "false boxes": (false, false.score, [f"score {score:.2f}" for score in false.score]),
        "missed boxes": (missed, share, [f"missed, {part:.1%} of the image" for part in share]),
    }
    ids = truth.table[schema.IMAGE_ID].take(pa.array(evaluation.rows)).to_pylist()
    rows, shown, chosen = [], set[int](), {}
    for name, (boxes, worth, notes) in groups.items():
        order = np.argsort(-worth, kind="stable").tolist()
        cases = [decisions.Case(int(boxes.image[at]), int(boxes.finding[at])) for at in order]
        notes_of = dict(reversed(list(zip(cases, (notes[at] for at in order), strict=True))))  # of the first box
        chosen[name] = [(case, notes_of[case]) for case in decisions.varied(cases, shown)]
        rows += [
            {"kind": name.removesuffix("es"), "image_id": ids[boxes.image[at]]}
            | {"finding": evaluation.findings[boxes.finding[at]], "score": float(boxes.score[at])}
            | dict(zip(("x_min", "y_min", "x_max", "y_max"), boxes.xyxy[at].tolist(), strict=True))
            for at in order[: decisions.LISTED]
        ]
    if not rows:
        return Section("Hardest cases", ["There are no false positives and no missed boxes."])
    result["hardest"] = storage.join(out, "hardest.csv")
    storage.write_text(result["hardest"], csv_text(rows))
    pictures = truth.pictures(sorted(int(evaluation.rows[image]) for image in shown))
    overlays: dict[str, list[Overlay]] = {name: [] for name in chosen}
    for name, cases in chosen.items():
        for case, note in cases:
            if (pictured := pictures.get(int(evaluation.rows[case.image]))) is not None:
                pair = _pair(evaluation, positive, pictured[1], case.image, case.finding)
                text = f"{evaluation.findings[case.finding]}, {note}"
                overlays[name].append(Overlay(ids[case.image], text, pictured[0], pair))
    text = (
        f"{len(false.image):,} predicted boxes match no ground-truth box at IoU > {VOC_IOUS[0]:g}, and "
        f"{len(missed.image):,} ground-truth boxes are missed. Shown are false positives with the highest scores, "
        "and the largest missed boxes, with all boxes of the same finding in the image. Annotations can be wrong, "
        f"too. `hardest.csv` lists up to {decisions.LISTED} of each."
    )
    caption = "False positives with the highest scores, and the largest missed boxes."
    return Section(
        "Hardest cases", [text, *save_overlays(overlays, storage.join(out, PICTURES), "hardest.png", caption)]
    )


def _pair(
    evaluation: DetectionEvaluation,
    predictions: Boxes,
    transform: ResizeTransform,
    image: int,
    finding: int | None = None,
) -> BoxPair:
    """True and predicted boxes of an image, of all findings or of one, on its picture."""
    true, predicted = (
        boxes.at((boxes.image == image) & ((boxes.finding == finding) | (finding is None)))
        for boxes in (evaluation.true, predictions)
    )
    placed = [transform.boxes_from_original(boxes.xyxy) for boxes in (true, predicted)]
    names = [evaluation.findings[f] for f in true.finding]
    scored = [
        f"{evaluation.findings[f]} {score:.2f}" for f, score in zip(predicted.finding, predicted.score, strict=True)
    ]
    return BoxPair(placed[0], names, placed[1], scored)


def image_f1(evaluation: DetectionEvaluation, predictions: Boxes) -> np.ndarray:
    """(N,) F1 of the boxes that count as predicted; NaN for images without a ground-truth box."""
    correct = detection.true_positives(predictions, evaluation.true, VOC_IOUS[0])
    count = len(evaluation.rows)
    true, predicted = (np.bincount(boxes.image, minlength=count) for boxes in (evaluation.true, predictions))
    hits = np.bincount(predictions.image[correct], minlength=count)
    return np.where(true > 0, 2 * hits / np.maximum(1, true + predicted), math.nan)


def compared(
    evaluation: DetectionEvaluation, truth: BoxTruth, options: ReportOptions, result: Mapping[str, Any]
) -> Section:
    """The comparison with `options.compare_with`; its metrics are added to `result`.

    Raises:
        UserError: the other run has no image in common with this one.
    """
    other = read_other_run(options)
    theirs = evaluate(load_scores(other), findings_of(other), truth)
    rows = np.intersect1d(evaluation.rows, theirs.rows)
    if not len(rows) or theirs.findings != evaluation.findings:
        raise UserError(
            f"{other.uri} and this run have no scored images or findings in common: score the same archive with both"
        )
    ours, theirs = evaluation.at(rows), theirs.at(rows)
    bootstrap = {"resamples": options.resamples, "seed": options.seed}
    lines: list[Sequence[str]] = []
    result["metrics"]["images_compared"] = len(rows)
    for iou in VOC_IOUS:
        gain = detection.paired_gain(
            ours.predicted, theirs.predicted, ours.true, ours.patients, len(ours.findings), iou=iou, **bootstrap
        )
        name = f"map_{100 * iou:.0f}_gain"
        result["metrics"].update({name: gain.mean, f"{name}_low": gain.mean_low, f"{name}_high": gain.mean_high})
        lines.append([f"mean AP at IoU > {iou:g}", interval(gain.mean, gain.mean_low, gain.mean_high)])
    return comparison_section(other, len(rows), [Table(["figure", "this run minus the other (95 %)"], lines)])
