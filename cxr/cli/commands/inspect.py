"""Show what an archive or shards contain, before you train: counts, figures and a contact sheet.

Labels, boxes and masks of your own are matched with the images as in training, and notes say what matched.

cxr inspect --archive /data/hospital --labels /data/labels.csv --out runs/inspect
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cxr import storage
from cxr.cli.options import check_described
from cxr.cli.phantoms import some_phantoms
from cxr.errors import UserError
from cxr.sources.options import Labeling, ReadOptions


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    archive: str = ""
    """Archive or shards: a folder, s3://bucket/prefix or gs://bucket/prefix. Default: a small phantom archive,
    written to OUT/phantoms."""
    out: str = "runs/inspect"
    """Folder or URI of the results: report.html to open in a browser, report.md with the same content, and
    pictures."""
    images: int = 24
    """Number of images to decode for the contact sheet."""
    seed: int = 0
    """Random seed for choosing these images."""
    reading: ReadOptions = field(default_factory=ReadOptions)
    labeling: Labeling = field(default_factory=Labeling)

    def __post_init__(self) -> None:
        check_described(self.archive, self.reading, self.labeling)
        if not 1 <= self.images <= 400:
            raise UserError(f"expected --images from 1 to 400, got {self.images}: show at least 1 and at most 400")


def main(options: Options) -> dict[str, Any]:
    if options.archive:
        storage.check_readable(options.archive)

    # Imports matplotlib, which takes a second: the mistake above is reported without it.
    from cxr.evaluation.inspection import inspect

    archive = options.archive or some_phantoms(options.out, count=60)
    result = inspect(
        archive, options.reading, options.labeling, options.out, images=options.images, seed=options.seed
    )
    print(f"{result['images']:,} images, {result['patients']:,} patients; splits: {result['splits']}")
    for name, each in result["findings"].items():
        print(f"{name}: {each['positive']:,} positive, {each['negative']:,} negative, {each['unknown']:,} unknown")
    sample = result["sample"]
    print(f"sample: {sample['readable']:,} of {sample['images']:,} images could be read")
    for reason, count in sample["reasons"].items():
        print(f"{count:>8,}  {reason}")
    print(f"text and tables: {result['report']}\nopen in a browser: {result['page']}", flush=True)
    return result
