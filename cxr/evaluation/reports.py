"""Reports of scoring runs: compared with the ground truth, or descriptions of the scores if there is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

from cxr import schema, storage
from cxr.errors import UserError
from cxr.evaluation import alignment, classification, detection, localization, score_summary, segmentation
from cxr.evaluation.about import about_section, unscored_section
from cxr.evaluation.headlines import key_figures
from cxr.evaluation.run import Content, NoGroundTruthError, ReportOptions, Run, read_run
from cxr.evaluation.score_summary import BOXES, MASKS, PROBABILITIES, Kind
from cxr.evaluation.subgroups import check_columns, with_subgroups
from cxr.reporting.page import Report, pictures, write_report
from cxr.sources.options import HEADERS


@dataclass(frozen=True)
class Reports:
    """How runs of a family are reported.

    Args:
        evaluate: compares a run with the ground truth, and writes tables and pictures into a URI. Raises
            NoGroundTruthError if there is no ground truth.
        kinds: the kinds of its scores, which are described if there is no ground truth.
    """

    evaluate: Callable[[Run, ReportOptions, str], Content]
    kinds: tuple[Kind, ...]


REPORTS: dict[str, Reports] = {
    "aecnn": Reports(classification.report, (PROBABILITIES,)),
    "align": Reports(alignment.report, (alignment.TRANSFORMS,)),
    "attend": Reports(localization.report, (PROBABILITIES, BOXES)),
    "classify": Reports(classification.report, (PROBABILITIES,)),
    "detect": Reports(detection.report, (BOXES,)),
    "localize": Reports(localization.report, (PROBABILITIES, BOXES)),
    "lungs": Reports(partial(segmentation.report, label=schema.LUNGS), (MASKS,)),
    "pneumothorax": Reports(partial(segmentation.report, label=schema.PNEUMOTHORAX), (MASKS,)),
}


def reading_of(run: Run, options: ReportOptions) -> ReportOptions:
    """The options with how to read the archive with the ground truth: only images that have scores, and with the
    run's headers."""
    reading = options.reading
    if run.select and not reading.select:
        reading = replace(reading, select=run.select)
    same_archive = not options.archive or storage.normalize(options.archive) in run.archives
    read_before = same_archive and storage.exists(storage.join(run.uri, HEADERS))
    return replace(options, reading=reading.with_headers(run.uri) if read_before else reading)


def evaluate(run_uri: str, options: ReportOptions, out: str) -> dict[str, Any]:
    """Compare the run that `cxr score` wrote to `run_uri` with the ground truth; writes tables and pictures into the
    URI `out`, but no page. Returns the contents of the job's result.json.

    Raises:
        UserError: there is no scoring run, its family has no report, or there is no ground truth.
    """
    run, options = _opened(run_uri, options)
    result = with_subgroups(REPORTS[run.family].evaluate(run, _of_test_images(options), out), out).result
    return {**result, "metrics": _without_nan(result["metrics"])}


def report(run_uri: str, options: ReportOptions, out: str) -> dict[str, Any]:
    """Write the report of the run that `cxr score` wrote to `run_uri`; returns the contents of the job's result.json.

    If the scored archive has no ground truth, or if several archives were scored and none is named to compare with,
    the report describes the scores, and a note says so.

    Raises:
        UserError: there is no scoring run, its family has no report, or the options request a comparison without
            ground truth.
    """
    out = storage.normalize(out)
    run, options = _opened(run_uri, options)
    content = with_subgroups(_content(run, options, out), out)
    result = {**content.result, "metrics": _without_nan(content.result["metrics"])}
    ground_truth = content.archive or "none"
    page = Report(
        title=f"{run.family} on {storage.name(content.archive or run.archives[0])}",
        lead=content.lead,
        figures=key_figures(result["metrics"]),
        facts={
            "Model": run.family,
            "Checkpoint": f"SHA-256 {run.checkpoint_sha256[:12]}",
            "Scored archive": ", ".join(run.archives),
            "Ground truth": "the scored archive" if (ground_truth,) == run.archives else ground_truth,
            "Report written": datetime.now(UTC).strftime("%B %-d, %Y, %H:%M UTC"),
        },
        sections=[*content.sections, unscored_section(run, out, result)],
        closing=[about_section(content)],
    )
    return {**result, "pictures": pictures(page.sections), **write_report(out, page)}


def _content(run: Run, options: ReportOptions, out: str) -> Content:
    """What the report says: a comparison with the ground truth, or a description of the scores."""
    how, scored = REPORTS[run.family], " and ".join(run.archives)
    if len(run.archives) > 1 and not options.archive and not options.against:
        print(f"note: {scored} were scored, so the report only describes the scores; give --archive to compare")
        return score_summary.report(run, options, out, how.kinds)
    try:
        return how.evaluate(run, _of_test_images(options), out)
    except NoGroundTruthError:
        if options.archive or options.against:
            raise
        print(f"note: {scored} has no ground truth for these scores: the report covers only them", flush=True)
        return score_summary.report(run, options, out, how.kinds)


def _without_nan(metrics: Mapping[str, float]) -> dict[str, float | None]:
    """Metrics for JSON: null in place of NaN."""
    return {name: None if value != value else value for name, value in metrics.items()}


def _opened(run_uri: str, options: ReportOptions) -> tuple[Run, ReportOptions]:
    """The run, and the options with those of reading its archive."""
    run = read_run(run_uri)
    check_columns(options)
    if run.family not in REPORTS:
        raise UserError(
            f"{run.uri} contains scores of family {run.family!r}, for which there is no report; expected one of "
            f"{', '.join(REPORTS)}"
        )
    return run, reading_of(run, options)


def _of_test_images(options: ReportOptions) -> ReportOptions:
    return replace(options, split="test") if options.split == "auto" else options
