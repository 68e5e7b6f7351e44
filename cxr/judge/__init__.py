"""Scoring runs judged by what is known of their images: one report a family."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from cxr import schema
from cxr.errors import UserError
from cxr.judge import classifiers, detections, localization, masks
from cxr.judge.base import ReportOptions, Run, read_run

# Family -> what reads its scores, writes the report into a URI and returns what the job's result.json holds.
REPORTS: dict[str, Callable[[Run, ReportOptions, str], dict[str, Any]]] = {
    "aecnn": classifiers.report,
    "attend": localization.report,
    "detect": detections.report,
    "localize": localization.report,
    "lungs": partial(masks.report, label=schema.LUNGS),
    "pneumothorax": partial(masks.report, label=schema.PNEUMOTHORAX),
}


def report(run_uri: str, options: ReportOptions, out: str) -> dict[str, Any]:
    """Judge what `score_archive` wrote to `run_uri`.

    Raises:
        UserError: no scoring run lies there, or its family has no report.
    """
    run = read_run(run_uri)
    if run.family not in REPORTS:
        raise UserError(
            f"{run.uri} holds scores of family {run.family!r}, for which there is no report yet; "
            f"there is one for {', '.join(REPORTS)}"
        )
    return REPORTS[run.family](run, options, out)
