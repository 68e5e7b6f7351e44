"""Decode an archive of X-rays once, into shards that training reads fast.

ray job submit --working-dir . -- python jobs/ingest_archive.py --archive s3://xrays/nih --out s3://xrays/shards
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from cxr import cluster, lung_crop, storage
from cxr.imaging.lung_square import MARGIN
from cxr.ingest import IngestResult, ingest
from cxr.job import run_job
from cxr.schema import PixelFormat
from cxr.workflow import phantom_archive


@dataclass(frozen=True)
class Options:
    """What to ingest and how."""

    archive: str | None = None
    """Folder or bucket with X-rays; unset for a small phantom archive, written to OUT/phantoms."""
    out: str = "runs/ingest"
    """Where the shards go; a run that was stopped goes on from there."""
    source: str = "auto"
    """Layout of the archive, or auto to find it out."""
    size: int = 256
    """Height and width of the stored pixels; the aspect is kept by padding."""
    bits: Literal[8, 16] = 8
    """Bits a stored pixel."""
    max_rejects: float = 0.05
    """Share of unusable images above which the job fails, after writing everything."""
    limit: int | None = None
    """Take only so many images, spread evenly over the archive."""
    lung_crop: str = ""
    """URI of a checkpoint of family lungs: images are cropped to the square around the lungs; empty: whole images."""
    lung_margin: float = MARGIN
    """Added on each side of the smallest square around the lungs, as a share of its side."""


def main(options: Options) -> dict[str, Any]:
    if options.archive:
        storage.check_readable(options.archive)
    crop = lung_crop.by_checkpoint(options.lung_crop, options.lung_margin) if options.lung_crop else None
    cluster.connect()
    result = ingest(
        options.archive or phantom_archive(options.out, count=60),
        options.out,
        source=options.source,
        pixels=PixelFormat(options.size, options.bits),
        max_rejects=options.max_rejects,
        limit=options.limit,
        crop=crop,
    )
    _tell(result)
    return asdict(result)


def _tell(result: IngestResult) -> None:
    for split, count in result.counts.items():
        print(f"{split:>8} {count:>9,}")
    print(f"rejected {result.rejects:>9,}")
    for reason, count in result.reasons.items():
        print(f"{count:>18,}  {reason}")


if __name__ == "__main__":
    run_job(main, Options)
