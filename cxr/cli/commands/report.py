"""Write a report on scores: metrics with confidence intervals and pictures, for one or several runs.

If the archive has no ground truth, the report describes the scores: their distributions, examples, and the images
that could not be scored.

cxr report --run runs/scores --archive /data/chestxray14

cxr report --run s3://xrays/scores/new --compare-with s3://xrays/scores/old --out s3://xrays/reports/new

cxr report --run new=runs/a --run old=runs/b --by sex,age,site --groups sites.csv
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tyro

from cxr.cli.exports import show_notes
from cxr.evaluation.run import ReportOptions, name_runs

RUN = "runs/score"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    run: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """OUT of `cxr score`: a folder, s3://bucket/prefix or gs://bucket/prefix. Repeat the option to show several runs
    side by side, each with a name of your choice, as in --run new=runs/a --run old=runs/b. Default: runs/score."""
    out: str = "runs/report"
    """Folder or URI of the results: report.html to open in a browser, report.md with the same content, tables and
    pictures."""
    report: ReportOptions = field(default_factory=ReportOptions)


def main(options: Options) -> dict[str, Any]:
    runs = options.run or (RUN,)
    # Raises where there is none, before torch and matplotlib are imported.
    show_notes(*name_runs(runs, options.report.member).values())

    from cxr.evaluation.reports import report

    result = report(runs, options.report, options.out)
    print_metrics(result["metrics"])
    print(f"text and tables: {result['report']}\nopen in a browser: {result['page']}", flush=True)
    return result


def print_metrics(metrics: Mapping[str, float | None]) -> None:
    """Print each metric on a line."""
    for name, value in metrics.items():
        print(f"{name} {value:.4g}" if value is not None else f"{name} not measured", flush=True)
