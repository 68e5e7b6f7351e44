"""Compare an aligner with OpenCV's ECC, no alignment and the best affine transform, by the overlap of the lungs.

cxr benchmark align  # on phantoms, with an aligner trained for a minute

cxr benchmark align --archive /data/montgomery --archive /data/shenzhen --checkpoint s3://xrays/align

Choose settings with --half development, and report results with --half test.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tyro

from cxr import storage
from cxr.benchmarks.studies import align
from cxr.benchmarks.studies.align import Half
from cxr.benchmarks.studies.align_pictures import save_pictures
from cxr.benchmarks.studies.ecc import Ecc
from cxr.cli.phantoms import some_phantoms
from cxr.cli.training_jobs import demo_aligner_checkpoint
from cxr.families import checkpoint
from cxr.models.spatial_transformer import identity
from cxr.wording import counted

AS_IS = "_as_is"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    archive: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Folder or URI of an archive with lung masks; may be repeated. Default: a small phantom archive."""
    checkpoint: str = ""
    """URI of an aligner's checkpoint. Default: train an aligner for a minute on the first archive."""
    out: str = "runs/benchmark_align"
    """Folder or URI of the results: metrics, pictures, OUT/transforms.parquet."""
    seed: int = 0
    """Random seed of the transforms and of the bootstrap."""
    limit: int = 0
    """Maximum number of images per archive. 0: all."""
    half: Half = "all"
    """Use only the images of one half of the patients, who are divided by a hash of their ids. development: the half
    for choosing settings; test: the half for reporting results."""
    size: int = 256
    """Height and width, in pixels, at which images and masks are compared."""


def main(options: Options) -> dict[str, Any]:
    out = storage.normalize(options.out)
    archives = options.archive or (some_phantoms(out),)
    aligner = checkpoint.load(options.checkpoint or demo_aligner_checkpoint(archives[0], out))
    images, notes = align.read(archives, options.size, options.limit, options.half)
    for note in notes:
        print(f"note: {note}", flush=True)
    print(f"{counted(len(images), 'image')} with lung masks", flush=True)
    poses = align.random_poses(images.image_ids, options.seed)
    transforms, metrics, pictures = [], {"images": float(len(images))}, []
    for ending, posed, pose in (("", images.transformed(poses), poses), (AS_IS, images, identity(len(images)))):
        comparison = align.compare(posed, aligner, Ecc())
        metrics |= align.metrics(comparison, images.sources, ending, options.seed)
        pictures += save_pictures(posed, comparison, storage.join(out, "pictures"), ending)
        transforms.append(align.transforms(images, comparison, pose))
        _print_metrics(metrics, ending)
    table = storage.join(out, "transforms.parquet")
    data = io.BytesIO()
    pq.write_table(pa.concat_tables(transforms), data)
    storage.write_bytes(table, data.getvalue())
    for uri in pictures:
        print(f"picture: {uri}", flush=True)
    return {"checkpoint": aligner.uri, "metrics": metrics, "transforms": table, "pictures": pictures}


def _print_metrics(metrics: dict[str, float], ending: str) -> None:
    names = ["iou_given", "iou_ecc", "iou_cxr", "iou_best_affine", "gain_over_ecc"]
    values = (f"{name}{ending} {metrics[name + ending]:.4f}" for name in names)
    low, high = (metrics[f"gain_over_ecc_{end}{ending}"] for end in ("low", "high"))
    print(f"{'  '.join(values)} (95 % interval {low:.4f} to {high:.4f})", flush=True)
