"""Compare scores with the ground truth of an archive: metrics with confidence intervals, as JSON and CSV.

Writes tables (CSV) and result.json, but no page and no pictures; for those, see `cxr report`.

cxr evaluate --run runs/scores --archive /data/chestxray14

cxr evaluate --run s3://xrays/scores/new --compare-with s3://xrays/scores/old --json
"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cxr import storage
from cxr.cli.commands import report
from cxr.cli.exports import show_notes
from cxr.evaluation.run import ReportOptions, read_run


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the evaluation."""

    run: str = report.RUN
    """OUT of `cxr score`: a folder, s3://bucket/prefix or gs://bucket/prefix."""
    out: str = "runs/evaluation"
    """Folder or URI of the results: the metrics in result.json, and tables (CSV)."""
    report: ReportOptions = field(default_factory=ReportOptions)


def main(options: Options) -> dict[str, Any]:
    # Raises where there is no such run, before torch and matplotlib are imported.
    show_notes(read_run(options.run, options.report.member))

    from cxr.evaluation.reports import evaluate

    out = storage.normalize(options.out)
    with tempfile.TemporaryDirectory(prefix="cxr-evaluate-") as folder:  # for the page and its pictures
        metrics = evaluate(options.run, options.report, folder)["metrics"]
        tables = []
        for table in sorted(Path(folder).glob("*.csv")):
            tables.append(storage.join(out, table.name))
            storage.write_bytes(tables[-1], table.read_bytes())
    report.print_metrics(metrics)
    for uri in tables:
        print(f"table: {uri}", flush=True)
    return {"metrics": metrics, "tables": tables}
