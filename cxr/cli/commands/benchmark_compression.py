"""Compare an AE-CNN's latents with plain resizing, JPEG, JPEG 2000 and WebP of the same size.

cxr benchmark compression  # on phantoms, with a compressor trained for a few minutes

cxr benchmark compression --archive /data/shards --checkpoint s3://xrays/aecnn --classifier s3://xrays/whole
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from cxr import storage
from cxr.benchmarks.studies import compression, compression_report, xrays
from cxr.benchmarks.studies.compression import Evaluator
from cxr.cli.phantoms import some_phantoms
from cxr.cli.training_jobs import demo_compressor_checkpoint
from cxr.families import checkpoint, image_crop
from cxr.families.capabilities import latent_encoder
from cxr.families.checkpoint import Checkpoint
from cxr.metrics.bootstrap import RESAMPLES
from cxr.wording import counted


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    archive: str = ""
    """URI of an archive or shards. Default: a small phantom archive."""
    checkpoint: str = ""
    """URI of a compressor's checkpoint. Default: train a compressor for a few minutes on the archive."""
    classifier: str = ""
    """URI of the checkpoint that classifies all decoded images, for example one with compressor=none. Default: the
    compressor's own classifier."""
    split: Literal["train", "val", "test"] = "test"
    """Split whose images are compared."""
    limit: int = 2000
    """Maximum number of images, spread evenly over the split. 0: all."""
    out: str = "runs/benchmark_compression"
    """Folder or URI of the results: OUT/compression.md, .csv, .png."""
    shown: int = 0
    """Index of the image in the picture."""
    resamples: int = RESAMPLES
    """Number of bootstrap resamples over patients."""
    seed: int = 0
    """Random seed of the bootstrap."""


def main(options: Options) -> dict[str, Any]:
    out = storage.normalize(options.out)
    archive = options.archive or some_phantoms(out)
    compressor = checkpoint.load(options.checkpoint or demo_compressor_checkpoint(archive, out))
    classifier = checkpoint.load(options.classifier) if options.classifier else compressor
    compression.check_compressor(compressor)
    compression.check_classifier(classifier)
    crop = image_crop.of_checkpoint(compressor)
    originals, notes = xrays.read(archive, options.split, compressor.recipe, options.limit, crop=crop)
    for note in notes:
        print(f"note: {note}", flush=True)
    evaluator = Evaluator(
        originals, classifier, options.shown % len(originals.pixels), options.resamples, options.seed
    )
    rows = []
    for row in compression.compare(originals, compressor, evaluator):
        rows.append(row)
        print(f"{row.way}, {row.at or 'own size'}: {row.bytes_per_image:,.0f} bytes, PSNR {row.psnr:.2f}", flush=True)
    codec, about = compression.codec_name(compressor), _about(options, compressor, classifier, archive, originals)
    written = compression_report.write(rows, evaluator.shown, codec, about, out)
    print(f"{about}\n\n{compression_report.table(rows)}\n{compression_report.summary(rows, codec)}", flush=True)
    print(f"picture: {written['picture']}", flush=True)
    metrics = {"images": float(len(originals.pixels))} | compression_report.metrics(rows)
    return {"checkpoint": compressor.uri, "classifier": classifier.uri, "metrics": metrics, **written}


def _about(
    options: Options, compressor: Checkpoint, classifier: Checkpoint, archive: str, originals: xrays.XRays
) -> str:
    size, latents = compressor.recipe.size, latent_encoder(compressor.recipe).latent_format()
    own = "the compressor's own classifier"
    by = f"{own}, which encodes them again" if classifier is compressor else f"the classifier {classifier.uri}"
    return (
        f"{counted(len(originals.pixels), 'image')} of {counted(len(set(originals.patients)), 'patient')}, split "
        f"{options.split} of {archive}, at {size} x {size} pixels of 8 bits; latents of {compressor.uri}, "
        f"{latents.size} x {latents.size} values of {latents.bits} bits. Bytes are means per image. Those of files "
        "include their headers; latents and resized images are either raw or stored in the compressed Parquet files "
        "of a latent archive. JPEG, JPEG 2000 and WebP use the quality whose mean file size is closest to that of "
        "the latents. PSNR in dB is that of the mean squared error over all images; the next column is the mean "
        f"PSNR of the images. AUROC is that of decoded images, classified by {by}; `from latents` is classified by "
        f"{own}, without decoding."
    )
