"""Write the scores of a run as CSV, with a row for each image, study or patient.

cxr export csv --run runs/score --out runs/export

cxr export csv --run s3://xrays/scores --per study --out s3://xrays/export
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cxr.cli.exports import ExportOptions, export_csv
from cxr.export.score_tables import Per
from cxr.wording import counted


@dataclass(frozen=True, kw_only=True)
class Options(ExportOptions):
    """Settings of the job."""

    per: Per = "image"
    """What a row describes. image: an image, in OUT/scores.csv. study: a study, in OUT/studies.csv, with the maximum
    of each score over its frontal images, and the id of that image. patient: a patient, in OUT/patients.csv, with the
    same for all of the patient's studies."""


def main(options: Options) -> dict[str, Any]:
    uri, counts = export_csv(options.open_run(), options.out, options.per, options.split)
    rows, images = counted(counts["rows"], "row"), counted(counts["images"], "image")
    print(f"{rows} for {images}, {counts['errors']:,} of them with an error")
    print(f"table: {uri}")
    return {"table": uri, "metrics": counts}
