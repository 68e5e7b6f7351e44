"""The report of a classifier's run: tables, pictures, and a comparison with another run."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from cxr import schema, storage
from cxr.data import shards
from cxr.errors import UserError
from cxr.evaluation import decisions
from cxr.evaluation.classification_data import (
    ClassificationScores,
    LabeledScores,
    LabelTruth,
    join,
    known_labels,
    load_scores,
)
from cxr.evaluation.ground_truth import read_truth
from cxr.evaluation.images import TruthImages
from cxr.evaluation.run import Content, Measures, ReportOptions, Run, comparison_section, coverage, read_other_run
from cxr.metrics import classification
from cxr.metrics.bootstrap import MeanInterval, column_means, intervals, resampled_means
from cxr.metrics.classification import ClassificationSummary, FindingRow
from cxr.reporting import classification as tables
from cxr.reporting import classification_pictures as pictures
from cxr.reporting.page import Section, save_picture
from cxr.wording import counted

PICTURES = "pictures"


def summarize(joined: LabeledScores, options: ReportOptions) -> ClassificationSummary:
    """The metrics of these images, with intervals by patient."""
    return classification.summarize(
        joined.probabilities,
        joined.labels,
        joined.predicted_positive,
        joined.patients,
        joined.findings,
        resamples=options.resamples,
        seed=options.seed,
    )


def report(run: Run, options: ReportOptions, out: str) -> Content:
    """Evaluate a run. Writes the pages, findings.csv, pictures and, with `compare_with`, comparison.csv; returns the
    job's result."""
    out, archive = storage.normalize(out), storage.normalize(options.archive or run.archive)
    info = shards.read_info(archive, latents=True) if shards.is_shards(archive) else None
    columns = [schema.PATIENT_ID, schema.SOURCE_URI, schema.LABELS]
    manifest = read_truth(archive, options.reading, options.split, columns, options.labeling)
    manifest.print_notes()
    scores, truth = load_scores(run), known_labels(manifest)
    joined = join(scores, truth)
    evaluation = summarize(joined, options)
    written = pictures.write_pictures(
        evaluation, joined.probabilities, joined.labels, joined.predicted_positive, storage.join(out, PICTURES)
    )
    summary = replace(evaluation, rows=[*evaluation.rows, *one_sided(scores, truth, joined.rows)])
    counted = _counted(joined, summary)
    print(counted, flush=True)
    sections = [Section("Findings", [tables.summary_table(summary), tables.summary_legend(summary), *written])]
    result = {"metrics": metrics(summary, joined), "findings": tables.write_summary(summary, out)}
    images = TruthImages(manifest.table, [info] if info and not info.latents else [])
    sections += decision_sections(joined, images, run, options, out, result)
    if options.compare_with:
        sections.append(compared(joined, truth, options, out, result))
    image_ids = truth.image_ids.take(pa.array(joined.rows)).to_pylist()
    measures = Measures(image_ids, joined.patients, partial(measure, joined, options))
    return Content(run, archive, options, counted, sections, result, measures)


def decision_sections(
    joined: LabeledScores, images: TruthImages, run: Run, options: ReportOptions, out: str, result: dict[str, Any]
) -> list[Section]:
    """Operating points, labels and predictions, and the hardest cases."""
    folder = storage.join(out, PICTURES)
    return [
        decisions.operating_section(joined, decisions.run_thresholds(run), options, out, result),
        Section("Labels and predictions", decisions.label_blocks(joined, folder)),
        decisions.hardest_section(joined, images, run, out, folder, result),
    ]


def measure(joined: LabeledScores, options: ReportOptions, places: np.ndarray) -> dict[str, MeanInterval]:
    """Metrics of some of these images: means over findings, and the AUROC of each finding."""
    some = joined.at(joined.rows[places], joined.findings)
    bootstrap = {"resamples": options.resamples, "seed": options.seed}
    auroc = classification.auroc_intervals(some.probabilities, some.labels, some.patients, **bootstrap)
    shares = {
        "sensitivity": np.where(some.labels == schema.POSITIVE, some.predicted_positive == 1, np.nan),
        "specificity": np.where(some.labels == schema.NEGATIVE, some.predicted_positive != 1, np.nan),
    }
    by_name = {"AUROC": auroc} | {
        name: intervals(column_means(values), resampled_means(values, some.patients, options.resamples, options.seed))
        for name, values in shares.items()
    }
    return {f"mean {name}": of.over_findings for name, of in by_name.items()} | {
        f"AUROC/{finding}": value for finding, value in auroc.by_finding(joined.findings).items()
    }


def one_sided(scores: ClassificationScores, truth: LabelTruth, rows: np.ndarray) -> list[FindingRow]:
    """Rows for the findings that only the archive or only the checkpoint has, with their counts and a note."""
    unscored = []
    for finding, labels in zip(truth.findings, truth.labels[rows].T, strict=True):
        counts = (int((labels == kind).sum()) for kind in (schema.POSITIVE, schema.NEGATIVE, schema.UNKNOWN))
        if finding not in scores.findings:
            unscored.append(FindingRow(finding, *counts, note="not scored by the checkpoint"))
    unlabeled = [finding for finding in scores.findings if finding not in truth.findings]
    return unscored + [
        FindingRow(finding, unknown=len(rows), note="no labels in the archive") for finding in unlabeled
    ]


def metrics(summary: ClassificationSummary, joined: LabeledScores) -> dict[str, float]:
    """Metrics for result.json; NaN if they cannot be measured."""
    mean = summary.mean
    return {
        "mean_auroc": mean.auroc,
        "mean_auroc_low": mean.auroc_low,
        "mean_auroc_high": mean.auroc_high,
        "mean_ap": mean.average_precision,
        "findings_measured": len(summary.measured),
        **{f"auroc/{row.finding}": row.auroc for row in summary.rows},
        "images": summary.images,
        "patients": summary.patients,
        "images_with_error": joined.images_with_error,
        "images_without_score": joined.images_without_score,
        "images_without_labels": joined.images_without_labels,
    }


def _counted(joined: LabeledScores, summary: ClassificationSummary) -> str:
    """How many images were evaluated, and why others were not."""
    return coverage(
        summary.images,
        joined.patients,
        counted(len(summary.measured), "finding") + " with both classes",
        {
            "with an error": joined.images_with_error,
            "without scores": joined.images_without_score,
            "without labels": joined.images_without_labels,
        },
    )


def compared(
    joined: LabeledScores,
    truth: LabelTruth,
    options: ReportOptions,
    out: str,
    result: dict[str, Any],
    subject: str = "",
) -> Section:
    """The comparison with `options.compare_with`; its files and metrics are added to `result`.

    Args:
        subject: what is compared, if the page has another comparison.

    Raises:
        UserError: the other run has no image or finding in common with this one.
    """
    other = read_other_run(options)
    ours, theirs = in_common(joined, join(load_scores(other), truth), other.uri)
    tested = classification.delong(ours.probabilities, theirs.probabilities, ours.labels)
    gain = classification.paired_gain(
        ours.probabilities,
        theirs.probabilities,
        ours.labels,
        ours.patients,
        resamples=options.resamples,
        seed=options.seed,
    )
    written = []
    if np.isfinite(gain.value).any():
        caption = "Difference in AUROC between the two runs, with 95 % intervals by patient."
        figure = pictures.gain_figure(ours.findings, gain)
        written = [save_picture(figure, storage.join(out, PICTURES), "gain.png", caption)]
    result["comparison"] = tables.write_comparison(ours.findings, tested, gain, out)
    result["metrics"] |= {
        "images_compared": len(ours.rows),
        "mean_auroc_gain": gain.mean,
        "mean_auroc_gain_low": gain.mean_low,
        "mean_auroc_gain_high": gain.mean_high,
        **{f"p/{finding}": float(p) for finding, p in zip(ours.findings, tested.p, strict=True)},
    }
    table = tables.comparison_table(ours.findings, tested, gain)
    return comparison_section(other, len(ours.rows), [table, tables.comparison_legend(gain), *written], subject)


def in_common(ours: LabeledScores, theirs: LabeledScores, their_uri: str) -> tuple[LabeledScores, LabeledScores]:
    """Both runs restricted to the images and findings that both have scored."""
    rows = np.intersect1d(ours.rows, theirs.rows)
    findings = [finding for finding in ours.findings if finding in theirs.findings]
    if not len(rows) or not findings:
        raise UserError(
            f"{their_uri} and this run have no scored images or findings in common: score the same archive with both"
        )
    return ours.at(rows, findings), theirs.at(rows, findings)
