"""Score every image of an archive with a checkpoint of any family.

cxr score --archive s3://xrays/nih --checkpoint s3://xrays/align
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

import tyro

from cxr import storage
from cxr.cli.phantoms import phantom_archive
from cxr.families.checkpoint_files import read_about
from cxr.inference.options import ScoreOptions, check_archives


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    archive: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """Archive, shards or the latents of an earlier run: a folder, s3://bucket/prefix or gs://bucket/prefix; a ZIP or
    TAR file; or a CSV or Parquet file that lists images. Repeat the option to score several archives into one result.
    Default: a small phantom archive."""
    checkpoint: str = ""
    """Folder or URI of a checkpoint. Default: train an aligner for a minute on the first archive, or with
    --save-latents a compressor."""
    out: str = "runs/score"
    """Folder or URI of the results: OUT/scores/*.parquet, OUT/latents, OUT/embeddings."""
    score: ScoreOptions = field(default_factory=ScoreOptions)


def main(options: Options) -> dict[str, Any]:
    for archive in check_archives(options.archive, options.score):
        storage.check_readable(archive)
    if options.checkpoint:
        read_about(options.checkpoint)

    # These import torch and Ray, which takes seconds: mistakes above are reported without them.
    from cxr.data import gate
    from cxr.inference.score import score
    from cxr.runtime import cluster

    cluster.connect()
    out = storage.normalize(options.out)
    archives = options.archive or (phantom_archive(out),)
    checkpoint = options.checkpoint or _demo_checkpoint(archives[0], out, latents=options.score.save_latents)
    scored = score(archives, checkpoint, out, options.score)
    print(f"scores: {scored.scores}: {scored.images} images, {scored.rejects} of them with an error", flush=True)
    if scored.latents:
        print(f"latents: {scored.latents}")
    if scored.embeddings:
        print(f"embeddings: {scored.embeddings}")
    for reason, count in scored.reasons.items():
        print(f"  {count:6d}  {reason}")
    if scored.not_frontal_chest:
        print(f"note: {gate.describe(scored.not_frontal_chest)}", flush=True)
    metrics = {"images": scored.images, "rejects": scored.rejects, "images_per_s": scored.images_per_s}
    return {**dataclasses.asdict(scored), "checkpoint": checkpoint, "metrics": metrics}


def _demo_checkpoint(archive: str, out: str, *, latents: bool) -> str:
    from cxr.cli.training_jobs import demo_aligner_checkpoint, demo_compressor_checkpoint

    return (demo_compressor_checkpoint if latents else demo_aligner_checkpoint)(archive, out)
