"""The report of a run that predicts boxes from maps: localization accuracy, pictures, and a comparison."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from cxr import schema, storage
from cxr.errors import UserError
from cxr.evaluation import classification, classification_data
from cxr.evaluation.classification_data import LabeledScores
from cxr.evaluation.ground_truth_boxes import BoxTruth, known_boxes
from cxr.evaluation.images import TruthImages
from cxr.evaluation.localization_data import (
    LocalizationEvaluation,
    baseline_boxes,
    box_shares,
    evaluate,
    load_scores,
)
from cxr.evaluation.run import Content, Measures, ReportOptions, Run, comparison_section, coverage, read_other_run
from cxr.imaging.geometry import ResizeTransform
from cxr.metrics.bootstrap import MeanInterval
from cxr.metrics.localization import MEASURES, THRESHOLDS, LocalizationRates, paired_gain, summarize
from cxr.reporting import classification as label_tables
from cxr.reporting import localization as tables
from cxr.reporting.classification_pictures import write_pictures
from cxr.reporting.detection import PREDICTION, TRUTH, area_figure
from cxr.reporting.overlays import BoxPair, Overlay, save_overlays, without_repeats
from cxr.reporting.page import Section, save_picture
from cxr.wording import counted

PICTURES = "pictures"
SHOWN = 3  # images in each row of the picture
_THRESHOLDS_BY_SUBGROUP = (0.1, 0.5)
_THRESHOLDS_BY_FINDING = (0.1, 0.3, 0.5)  # thresholds for which result.json has the accuracy of each finding


def report(run: Run, options: ReportOptions, out: str) -> Content:
    """Evaluate a run. Writes the pages, boxes.csv, findings.csv and pictures; returns the job's result.

    If the archive has labels but no boxes, the report is that of a classifier.
    """
    out, archive = storage.normalize(out), storage.normalize(options.archive or run.archive)
    truth, classified, predicted = (
        known_boxes(archive, options),
        classification_data.load_scores(run),
        load_scores(run),
    )
    if not truth.listed and _labeled(classified, truth):
        return classification.report(run, options, out)
    evaluation, joined = evaluate(predicted, classified.findings, truth), _labeled(classified, truth)
    lead = _coverage(evaluation)
    print(lead, flush=True)
    result: dict[str, Any] = {}
    sections = _localization_sections(evaluation, truth, options, out, result)
    if joined:
        sections += _classification_sections(joined, truth, run, options, out, result)
    if options.compare_with:
        sections += compared(evaluation, joined, truth, options, out, result)
    image_ids = truth.table[schema.IMAGE_ID].take(pa.array(evaluation.rows)).to_pylist()
    measures = Measures(image_ids, evaluation.patients, partial(measure, evaluation, options))
    return Content(run, archive, options, lead, sections, result, measures)


def measure(
    evaluation: LocalizationEvaluation, options: ReportOptions, places: np.ndarray
) -> dict[str, MeanInterval]:
    """Metrics of some of these images: means over findings, and the accuracy of each finding."""
    rates = summarize(
        evaluation.located.at(places),
        evaluation.patients[places],
        evaluation.findings,
        resamples=options.resamples,
        seed=options.seed,
    )
    means = {
        f"localization accuracy at IoU {at:g}": rates.at("iou", at).over_findings for at in _THRESHOLDS_BY_SUBGROUP
    }
    at = _THRESHOLDS_BY_SUBGROUP[0]
    return {**means, "pointing game": rates.pointing.over_findings} | {
        f"Localization accuracy at IoU {at:g}/{finding}": value
        for finding, value in rates.at("iou", at).by_finding(rates.findings).items()
    }


def _labeled(scores: classification_data.ClassificationScores, truth: BoxTruth) -> LabeledScores | None:
    """Probabilities with labels; None if the archive has no labels."""
    common = set(scores.findings) & set(truth.labels.findings)
    return classification_data.join(scores, truth.labels) if common and truth.labels.labeled.any() else None


def _coverage(evaluation: LocalizationEvaluation) -> str:
    """How many images were evaluated, and why others were not."""
    true = counted(len(evaluation.true.image), "ground-truth box", "ground-truth boxes")
    boxed = counted(len(np.unique(evaluation.true.image)), "image")
    predicted = counted(len(evaluation.predicted.image), "predicted box", "predicted boxes")
    lead = coverage(
        len(evaluation.rows),
        evaluation.patients,
        f"{true} of {counted(len(evaluation.findings), 'finding')} in {boxed}, {predicted}",
        {"with an error": evaluation.images_with_error, "without scores": evaluation.images_without_score},
    )
    if evaluation.pairs_not_scored:
        lead += f" {counted(evaluation.pairs_not_scored, 'image')} with a box of a finding that was not scored."
    return lead + (f" No ground-truth box of {', '.join(evaluation.left_out)}." if evaluation.left_out else "")


def _localization_sections(
    evaluation: LocalizationEvaluation, truth: BoxTruth, options: ReportOptions, out: str, result: dict[str, Any]
) -> list[Section]:
    """The sections about boxes; their metrics and file are added to `result`."""
    ways = {
        "run": evaluation.located,
        **baseline_boxes(evaluation, truth.training_boxes(evaluation.findings), options.seed),
    }
    rates_of = partial(summarize, resamples=options.resamples, seed=options.seed)
    rates = {name: rates_of(of, evaluation.patients, evaluation.findings) for name, of in ways.items()}
    result["boxes"] = storage.join(out, "boxes.csv")
    storage.write_text(result["boxes"], tables.csv(rates))
    own = rates.pop("run")
    result["metrics"] = metrics(evaluation, own, rates)
    folder, count = storage.join(out, PICTURES), len(evaluation.findings)
    curves = save_picture(
        tables.curves_figure(own, rates),
        folder,
        "accuracy.png",
        "Localization accuracy at each threshold, for each finding and for the baselines.",
    )
    examples = save_overlays(
        overlays(evaluation, truth, options.seed),
        folder,
        "boxes.png",
        "Images with the smallest and the largest overlap, and a random sample.",
    )
    areas_of: dict[str, list[np.ndarray]] = {
        TRUTH: box_shares(evaluation.true, evaluation.sizes_px, count),
        PREDICTION: box_shares(evaluation.predicted, evaluation.sizes_px, count),
    }
    box_areas = save_picture(
        area_figure(areas_of, evaluation.findings),
        folder,
        "box_area.png",
        "Area of ground-truth and predicted boxes, as a share of the image.",
    )
    accuracy = [tables.accuracy_table(own, rates, measure) for measure in MEASURES]
    missed = [tables.false_positives_table(own, rates), tables.legend(own, options.resamples)]
    return [
        Section("Localization accuracy", [*accuracy, curves, box_areas, *examples]),
        Section("False positives per image, and the pointing game", missed),
    ]


def _classification_sections(
    joined: LabeledScores, truth: BoxTruth, run: Run, options: ReportOptions, out: str, result: dict[str, Any]
) -> list[Section]:
    """The sections about classification; their metrics and files are added to `result`."""
    summary = classification.summarize(joined, options)
    figures = classification.metrics(summary, joined)
    result["metrics"] |= {name: figures[name] for name in figures if "auroc" in name or name == "mean_ap"}
    result["metrics"]["images_with_labels"] = summary.images
    result["findings"] = label_tables.write_summary(summary, out)
    head = f"Classification of the {summary.images:,} images with labels"
    written = write_pictures(
        summary, joined.probabilities, joined.labels, joined.predicted_positive, storage.join(out, PICTURES)
    )
    blocks = [label_tables.summary_table(summary), label_tables.summary_legend(summary), *written]
    images = TruthImages(truth.table, [truth.info] if truth.info else [])
    return [
        Section(head, blocks),
        *classification.decision_sections(joined, images, run, options, out, result),
    ]


def metrics(
    evaluation: LocalizationEvaluation, rates: LocalizationRates, baselines: Mapping[str, LocalizationRates]
) -> dict[str, Any]:
    """Metrics for result.json, with thresholds in percent; NaN if they cannot be measured."""
    values: dict[str, Any] = {
        "images": len(evaluation.rows),
        "patients": len(np.unique(evaluation.patients)),
        "pairs": int(rates.pairs.sum()),
        "findings_located": len(rates.findings),
        "images_with_error": evaluation.images_with_error,
        "images_without_score": evaluation.images_without_score,
        "mean_pointing": rates.pointing.mean,
        "mean_pointing_low": rates.pointing.mean_low,
        "mean_pointing_high": rates.pointing.mean_high,
    }
    for measure, at, key in ((m, t, f"{m}{100 * t:.0f}") for m in MEASURES for t in THRESHOLDS):
        mean = rates.at(measure, at)
        values |= {
            f"localization_accuracy_{key}{end}": v for end, v in _ends(mean.mean, mean.mean_low, mean.mean_high)
        }
        values[f"false_positives_per_image_{key}"] = rates.false_positives[measure][THRESHOLDS.index(at)].mean
        values |= {f"{name}_localization_accuracy_{key}": of.at(measure, at).mean for name, of in baselines.items()}
        if at in _THRESHOLDS_BY_FINDING:
            values |= {
                f"localization_accuracy_{key}/{finding}": mean.value[f] for f, finding in enumerate(rates.findings)
            }
    values |= {f"pointing/{finding}": rates.pointing.value[f] for f, finding in enumerate(rates.findings)}
    return {name: value if isinstance(value, int) else float(value) for name, value in values.items()}


def _ends(value: float, low: float, high: float) -> tuple[tuple[str, float], ...]:
    return ("", value), ("_low", low), ("_high", high)


def overlays(evaluation: LocalizationEvaluation, truth: BoxTruth, seed: int) -> dict[str, list[Overlay]]:
    """Image-finding pairs with the smallest and the largest overlap, and a random sample."""
    pairs = np.argwhere(np.isfinite(evaluation.located.pointed))
    order = np.argsort(evaluation.located.best["iou"][tuple(pairs.T)], kind="stable")
    shuffled = np.random.default_rng(seed).permutation(len(order))
    chosen = without_repeats({"worst": order, "best": order[::-1], "random": shuffled}, SHOWN)
    rows = evaluation.rows[pairs[:, 0]].tolist()
    pictures = truth.pictures(sorted({rows[pair] for part in chosen.values() for pair in part}))
    return {
        name: [
            _overlay(evaluation, truth, pairs[pair], *pictures[rows[pair]]) for pair in part if rows[pair] in pictures
        ]
        for name, part in chosen.items()
    }


def _overlay(
    evaluation: LocalizationEvaluation,
    truth: BoxTruth,
    pair: np.ndarray,
    picture: np.ndarray,
    transform: ResizeTransform,
) -> Overlay:
    image, finding = pair.tolist()
    true, predicted = (
        some.at((some.image == image) & (some.finding == finding)) for some in (evaluation.true, evaluation.predicted)
    )
    placed = [transform.boxes_from_original(some.xyxy) for some in (true, predicted)]
    overlap = evaluation.located.best["iou"][image, finding]
    boxes = BoxPair(placed[0], [""] * len(placed[0]), placed[1], [f"{score:.2f}" for score in predicted.score])
    image_id = truth.table[schema.IMAGE_ID][int(evaluation.rows[image])].as_py()
    return Overlay(image_id, f"{evaluation.findings[finding]}, IoU {overlap:.2f}", picture, boxes)


def compared(
    evaluation: LocalizationEvaluation,
    joined: LabeledScores | None,
    truth: BoxTruth,
    options: ReportOptions,
    out: str,
    result: dict[str, Any],
) -> list[Section]:
    """The comparison with `options.compare_with`; its metrics are added to `result`.

    Raises:
        UserError: the other run has no image in common with this one.
    """
    other = read_other_run(options)
    scored = tuple(
        finding for finding in classification_data.load_scores(other).findings if finding in evaluation.findings
    )
    theirs = evaluate(load_scores(other), scored, truth)
    rows = np.intersect1d(evaluation.rows, theirs.rows)
    common = [evaluation.findings.index(finding) for finding in theirs.findings]
    ours, theirs = evaluation.at(rows), theirs.at(rows)
    if not np.isfinite(theirs.located.pointed).any():
        raise UserError(
            f"{other.uri} and this run have no scored image with a box in common: score the same archive with both"
        )
    gains = paired_gain(
        ours.located.of(common), theirs.located, ours.patients, resamples=options.resamples, seed=options.seed
    )
    result["metrics"]["images_compared"] = len(rows)
    for measure, at, of in ((m, t, of) for m in MEASURES for t, of in zip(THRESHOLDS, gains[m], strict=True)):
        name = f"localization_accuracy_gain_{measure}{100 * at:.0f}"
        result["metrics"] |= {f"{name}{end}": v for end, v in _ends(of.mean, of.mean_low, of.mean_high)}
    sections = [comparison_section(other, len(rows), [tables.gain_table(gains)])]
    if joined:
        sections.append(classification.compared(joined, truth.labels, options, out, result, "Classification"))
    return sections
