"""Write a detector's scores as a submission (CSV) to the VinBigData Chest X-ray Abnormalities Detection challenge.

cxr export kaggle-vinbigdata --run runs/scores --normal-run runs/classified --out runs/submission
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cxr import storage
from cxr.cli.exports import ExportOptions
from cxr.evaluation.run import Split, read_run
from cxr.sources.vinbigdata import META_FILES


@dataclass(frozen=True, kw_only=True)
class Options(ExportOptions):
    """Settings of the job."""

    run: str = "runs/score"
    """OUT of `cxr score` with a checkpoint that detects VinBigData's findings: a folder or URI."""
    split: Split = "test"
    """Split whose images are submitted. The challenge accepts only its own test images, so test images that are
    listed in train.csv are left out."""
    normal_run: str = ""
    """OUT of `cxr score` with a classifier whose scores contain the probability that an image is normal. Default: no
    filter."""
    low: float = 0.08
    """Images whose probability of being normal is at least this get a "No finding" box in addition to their boxes."""
    high: float = 0.95
    """Images whose probability of being normal is at least this get a "No finding" box instead of their boxes."""
    out: str = "runs/submission"
    """Folder or URI of the result: OUT/submission.csv."""


def main(options: Options) -> dict[str, Any]:
    run = options.open_run(own_ids=True)
    normal_run = read_run(options.normal_run) if options.normal_run else None

    from cxr.export.kaggle_vinbigdata import NormalFilter, normal_probabilities, write_submission  # torch: seconds

    uri = storage.join(storage.normalize(options.out), "submission.csv")
    known = normal_probabilities(normal_run) if normal_run else None
    normal = None if known is None else NormalFilter(known, options.low, options.high)
    counts = write_submission(run, uri, normal, options.split)
    print(
        "{images:,} images, {normal:,} submitted as normal ({errors:,} because of an error)".format(**counts), end=""
    )
    print("; {boxes_left_out:,} boxes of other findings left out".format(**counts))
    if counts["training_images_left_out"]:
        print("note: {training_images_left_out:,} images left out because train.csv lists them".format(**counts))
    if counts["of_unknown_size"]:
        print(
            "note: {of_unknown_size:,} images with boxes are not DICOM, and their original sizes are unknown: "
            "their boxes are submitted in pixels of the files. Add {} to correct this".format(
                " and ".join(META_FILES), **counts
            )
        )
    print(f"submission: {uri}")
    return {"submission": uri, "metrics": counts}
