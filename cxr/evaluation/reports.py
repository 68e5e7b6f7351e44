"""Reports of scoring runs: compared with the ground truth, or descriptions of the scores if there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from cxr import schema, storage
from cxr.errors import UserError
from cxr.evaluation import alignment, classification, detection, localization, score_summary, segmentation
from cxr.evaluation.ground_truth import read_once
from cxr.evaluation.page_content import one_run, several_runs, without_nan
from cxr.evaluation.run import Content, NoGroundTruthError, ReportOptions, Run, name_runs, read_run
from cxr.evaluation.score_summary import BOXES, MASKS, PROBABILITIES, Kind
from cxr.evaluation.subgroups import check_columns, with_subgroups
from cxr.reporting.page import pictures, write_report
from cxr.sources.options import HEADERS


@dataclass(frozen=True)
class Reports:
    """How runs of a family are reported.

    Args:
        subject: what the scores are about, for the title of the page.
        evaluate: compares a run with the ground truth, and writes tables and pictures into a URI. Raises
            NoGroundTruthError if there is no ground truth.
        kinds: the kinds of its scores, which are described if there is no ground truth.
    """

    subject: str
    evaluate: Callable[[Run, ReportOptions, str], Content]
    kinds: tuple[Kind, ...]


REPORTS: dict[str, Reports] = {
    "aecnn": Reports("Findings", classification.report, (PROBABILITIES,)),
    "align": Reports("Alignment", alignment.report, (alignment.TRANSFORMS,)),
    "attend": Reports("Findings and boxes", localization.report, (PROBABILITIES, BOXES)),
    "classify": Reports("Findings", classification.report, (PROBABILITIES,)),
    "detect": Reports("Boxes", detection.report, (BOXES,)),
    "localize": Reports("Findings and boxes", localization.report, (PROBABILITIES, BOXES)),
    "lungs": Reports("Lung masks", partial(segmentation.report, label=schema.LUNGS), (MASKS,)),
    "pneumothorax": Reports("Pneumothorax masks", partial(segmentation.report, label=schema.PNEUMOTHORAX), (MASKS,)),
}


def reading_of(run: Run, options: ReportOptions) -> ReportOptions:
    """The options with how to read the archive with the ground truth: only images that have scores, with the run's
    headers, and with pseudonyms if the run has them.

    Raises:
        UserError: the run has pseudonyms and there is no crosswalk, or the other way round.
    """
    if run.pseudonymized and not options.crosswalk:
        raise UserError(
            f"{run.uri} has pseudonyms instead of the archive's ids: use its crosswalk, a folder that cxr score "
            f"--pseudonymize wrote, with --crosswalk"
        )
    if options.crosswalk and not run.pseudonymized:
        raise UserError(f"{run.uri} has the archive's own ids, not pseudonyms: omit --crosswalk")
    reading = replace(options.reading, crosswalk=options.crosswalk)
    if run.select and not reading.select:
        reading = replace(reading, select=run.select)
    same_archive = not options.archive or storage.normalize(options.archive) in run.archives
    read_before = same_archive and storage.exists(storage.join(run.uri, HEADERS))
    return replace(options, reading=reading.with_headers(run.uri) if read_before else reading)


def evaluate(run_uri: str, options: ReportOptions, out: str) -> dict[str, Any]:
    """Compare the run that `cxr score` wrote to `run_uri` with the ground truth; writes tables and pictures into the
    URI `out`, but no page. Returns the contents of the job's result.json.

    Raises:
        UserError: there is no scoring run, it is of several checkpoints and none is named, its family has no report,
            or there is no ground truth.
    """
    check_columns(options)
    run, options = _opened(read_run(run_uri, options.member), options)
    result = with_subgroups(_reports(run).evaluate(run, _of_test_images(options), out), out).result
    return {**result, "metrics": without_nan(result["metrics"])}


@read_once()
def report(runs: str | Sequence[str], options: ReportOptions, out: str) -> dict[str, Any]:
    """Write one page about runs that `cxr score` wrote; returns the contents of the job's result.json.

    Several runs, and the checkpoints of a run of several, have a part each. If a scored archive has no ground truth,
    or if several archives were scored and none is named to compare with, the report describes the scores, and a note
    says so.

    Args:
        runs: their URIs, which may be preceded by a name for the run, as in NAME=URI.

    Raises:
        UserError: there is no scoring run, two have the same name, a family has no report, or the options request a
            comparison without ground truth.
    """
    out = storage.normalize(out)
    check_columns(options)
    named = name_runs([runs] if isinstance(runs, str) else runs, options.member)
    for run in named.values():
        _reports(run)  # raises for an unknown family before anything is computed
    if len(named) == 1:
        (run,) = named.values()
        report, result = one_run(_content(run, options, out, must_compare=bool(options.archive)), out)
    else:
        contents = {name: _content(run, options, storage.join(out, name)) for name, run in named.items()}
        report, result = several_runs(contents, out)
    return {**result, "pictures": pictures(report), **write_report(out, report)}


def _reports(run: Run) -> Reports:
    if run.family not in REPORTS:
        raise UserError(
            f"{run.uri} contains scores of family {run.family!r}, for which there is no report: use a run of "
            f"family {', '.join(REPORTS)}"
        )
    return REPORTS[run.family]


def _content(run: Run, options: ReportOptions, out: str, *, must_compare: bool = False) -> Content:
    """What the report says about a run."""
    content = _evaluated(run, options, out, must_compare=must_compare)
    return replace(with_subgroups(content, out), subject=_reports(run).subject)


def _evaluated(run: Run, options: ReportOptions, out: str, *, must_compare: bool) -> Content:
    """A comparison with the ground truth, or, unless it was requested, a description of the scores."""
    how, scored = _reports(run), " and ".join(run.archives)
    if run.pseudonymized and not (options.crosswalk or options.archive or options.compare_with):
        print(f"note: {run.uri} has pseudonyms, so the report only describes the scores; use --crosswalk to compare")
        options = replace(options, member=run.member)
        return score_summary.report(run, options, out, how.kinds)
    run, options = _opened(run, options)
    if len(run.archives) > 1 and not options.archive and not options.compare_with:
        print(f"note: {scored} were scored, so the report only describes the scores; use --archive to compare")
        return score_summary.report(run, options, out, how.kinds)
    try:
        return how.evaluate(run, _of_test_images(options), out)
    except NoGroundTruthError:
        if must_compare or options.compare_with:
            raise
        scored = options.archive or scored
        print(
            f"note: {scored} has no ground truth for these scores, so the report only describes the scores",
            flush=True,
        )
        return score_summary.report(run, options, out, how.kinds)


def _opened(run: Run, options: ReportOptions) -> tuple[Run, ReportOptions]:
    """The run with the crosswalk, and the options with its checkpoint and with those of reading its archive."""
    return replace(run, crosswalk=options.crosswalk), replace(reading_of(run, options), member=run.member)


def _of_test_images(options: ReportOptions) -> ReportOptions:
    return replace(options, split="test") if options.split == "auto" else options
