"""Compare an AE-CNN's latents with plain resizing, JPEG, JPEG 2000 and WebP of the same size.

python jobs/benchmark_compression.py  # on phantoms, with a compressor trained for a few minutes

python jobs/benchmark_compression.py --archive /data/shards --checkpoint s3://xrays/aecnn --classifier s3://xrays/whole
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cxr import storage
from cxr.benchmarks.studies import compression, compression_report, xrays
from cxr.benchmarks.studies.compression import Judge
from cxr.cli.phantoms import phantom_archive
from cxr.cli.training_jobs import demo_compressor_checkpoint
from cxr.families import checkpoint, lung_crop
from cxr.families.capabilities import latent_encoder
from cxr.families.checkpoint import Checkpoint
from cxr.metrics.bootstrap import RESAMPLES
from cxr.runtime.job import run_job


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    archive: str = ""
    """Archive or shards, any URI; left out, a small phantom archive."""
    checkpoint: str = ""
    """Folder of a compressor's checkpoint, any URI; left out, one trained for a few minutes on the archive."""
    classifier: str = ""
    """Folder of a checkpoint that judges all pictures, e.g. of compressor=none; left out, the compressor itself."""
    split: Literal["train", "val", "test"] = "test"
    """Images that are compared."""
    limit: int = 2000
    """Take at most so many images, spread evenly; 0 for all."""
    out: str = "runs/benchmark_compression"
    """Folder or URI of the results: OUT/compression.md, .csv, .png."""
    shown: int = 0
    """Number of the image in the picture."""
    resamples: int = RESAMPLES
    """Of the bootstrap over patients."""
    seed: int = 0
    """Of the bootstrap."""


def main(options: Options) -> dict[str, Any]:
    out = storage.normalize(options.out)
    archive = options.archive or phantom_archive(out)
    kept = checkpoint.load(options.checkpoint or demo_compressor_checkpoint(archive, out))
    classifier = checkpoint.load(options.classifier) if options.classifier else kept
    compression.check_compressor(kept)
    compression.check_classifier(classifier)
    crop = lung_crop.of_checkpoint(kept)
    given, notes = xrays.read(archive, options.split, kept.recipe, options.limit, crop=crop)
    for note in notes:
        print(f"note: {note}", flush=True)
    judge = Judge(given, classifier, options.shown % len(given.pixels), options.resamples, options.seed)
    rows = []
    for row in compression.compare(given, kept, judge):
        rows.append(row)
        print(f"{row.way}, {row.at or 'own size'}: {row.bytes_per_image:,.0f} bytes, PSNR {row.psnr:.2f}", flush=True)
    codec, about = compression.codec_name(kept), _about(options, kept, classifier, archive, given)
    written = compression_report.write(rows, judge.shown, codec, about, out)
    print(f"{about}\n\n{compression_report.table(rows)}\n{compression_report.said(rows, codec)}", flush=True)
    print(f"picture: {written['picture']}", flush=True)
    metrics = {"images": float(len(given.pixels))} | compression_report.metrics(rows)
    return {"checkpoint": kept.uri, "classifier": classifier.uri, "metrics": metrics, **written}


def _about(options: Options, kept: Checkpoint, classifier: Checkpoint, archive: str, given: xrays.XRays) -> str:
    size, latents = kept.recipe.size, latent_encoder(kept.recipe).latent_format()
    own = "the compressor's own classifier"
    by = f"{own}, which encodes them again" if classifier is kept else f"the classifier {classifier.uri}"
    return (
        f"{len(given.pixels):,} images of {len(set(given.patients)):,} patients, split {options.split} of {archive}, "
        f"at {size} x {size} pixels of 8 bits; latents of {kept.uri}, {latents.size} x {latents.size} values of "
        f"{latents.bits} bits. Bytes are means an image: of files with their headers, of latents and resized "
        f"pictures raw or as a latent archive's compressed Parquet stores them. JPEG, JPEG 2000 and WebP have the "
        f"one quality whose mean file comes nearest to the latents' size. PSNR in dB, of the mean squared error over "
        f"all pictures and the mean of the pictures' own. AUROC: decoded pictures judged by {by}; `from latents`: by "
        f"{own}, without decoding."
    )


if __name__ == "__main__":
    run_job(main, Options)
