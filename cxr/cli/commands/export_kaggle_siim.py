"""Write the scores of a run as a submission (CSV) to the SIIM-ACR Pneumothorax Segmentation challenge.

cxr export kaggle-siim --run runs/scores --out runs/submission
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cxr import storage
from cxr.cli.exports import ExportOptions
from cxr.evaluation.run import Split


@dataclass(frozen=True, kw_only=True)
class Options(ExportOptions):
    """Settings of the job."""

    run: str = "runs/score"
    """OUT of `cxr score` with a checkpoint of family pneumothorax: a folder or URI."""
    split: Split = "test"
    """Split whose images are submitted. The challenge accepts only its test images."""
    out: str = "runs/submission"
    """Folder or URI of the result: OUT/submission.csv."""


def main(options: Options) -> dict[str, Any]:
    run = options.open_run(own_ids=True)

    from cxr.export.kaggle_siim import write_submission  # torch takes seconds to import

    uri = storage.join(storage.normalize(options.out), "submission.csv")
    counts = write_submission(run, uri, options.split)
    print(
        "{images:,} images, {positives:,} with a mask; {errors:,} could not be scored and are submitted without a "
        "mask".format(**counts)
    )
    print(f"submission: {uri}")
    return {"submission": uri, "metrics": counts}
