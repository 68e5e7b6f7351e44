"""Classifiers of initial, aligned and ECC-aligned images: AUROC over seeds and patients, and overlap of lungs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.nn import functional as F

from cxr import schema
from cxr.benchmarks.studies import align
from cxr.benchmarks.studies.align import Masked
from cxr.benchmarks.studies.classifiers import LEGEND
from cxr.benchmarks.studies.seed_results import SeedResults
from cxr.data import shards
from cxr.data.batch import NO_MASK, to_columns, to_tensors
from cxr.data.decode import WHOLE
from cxr.families import lung_pretraining
from cxr.imaging.aligned_frame import from_units
from cxr.imaging.geometry import ResizeTransform
from cxr.metrics.alignment import off_diagonal_mean
from cxr.models.backbones import normalize_contrast
from cxr.reporting.forest import ForestLine, forest_figure
from cxr.reporting.tables import csv_text, markdown, number
from cxr.wording import counted

INITIAL, ALIGNED, ECC = "initial", "aligned", "ecc"
VARIANTS = (INITIAL, ALIGNED, ECC)
# DenseNet-121, the official split of ChestX-ray14, 14 findings; one network each.
PUBLISHED = {INITIAL: 0.8110, ALIGNED: 0.8124}
SEED_SD = 0.0032  # of the mean AUROC of like networks that differ in their seed, on the same split
MOST_LUNGS = 256  # images whose lungs are compared
_LUNGS_PX = 128  # at which lungs are predicted
_AUROC, _GAIN = "mean AUROC (95 %)", f"minus {INITIAL} (95 %)"


@dataclass(frozen=True)
class ArchiveResult:
    """Results of an archive's variants, of which `INITIAL` is the first, on the same test images.

    Attributes:
        variants: mean AUROCs of the networks of each variant.
        lung_iou: mean IoU of the lungs of two images, by variant.
        whole: test images that could not be aligned, by variant.
    """

    archive: str
    images: int
    patients: int
    variants: tuple[SeedResults, ...]
    lung_iou: Mapping[str, float]
    whole: Mapping[str, int]


# ---- Overlap of lungs


def tested_rows(data: str, columns: Sequence[str]) -> pa.Table:
    """These columns of the test images of shards, in the order of their ids."""
    info = shards.read_info(data)
    rows = pa.concat_tables(shards.read_rows(file, columns, info.findings) for file in info.parts.get("test", ()))
    return rows.sort_by(schema.IMAGE_ID)


def stored_whole(data: str) -> int:
    """How many test images of shards were stored whole because they could not be aligned."""
    status = tested_rows(data, [schema.IMAGE_ID, schema.CROP_STATUS])[schema.CROP_STATUS]
    return pc.sum(pc.starts_with(status, WHOLE)).as_py() or 0


def lung_overlap(data: Mapping[str, str]) -> dict[str, float]:
    """Mean pairwise IoU of the lungs of the same test images by variant, with each variant's mean transform removed.

    Lungs are the archive's own masks if each of these images has one. Otherwise, they are those that the network
    shipped with this package predicts in the initial images.

    Args:
        data: URI of the shards of each variant; the initial ones have whole images.
    """
    pixels = shards.read_info(data[INITIAL]).pixels
    columns = [schema.IMAGE_ID, schema.RESIZE_TRANSFORM]
    initial = tested_rows(data[INITIAL], [*columns, schema.PIXELS, schema.MASKS]).slice(0, MOST_LUNGS)
    batch = to_tensors(to_columns(initial, [schema.PIXELS, schema.MASKS], pixels), pixels)
    known = batch[schema.MASKS][:, 0, 0] != NO_MASK
    masks = batch[schema.MASKS].bool() if known.all() else predicted_lungs(batch[schema.PIXELS])
    ids = initial[schema.IMAGE_ID].to_pylist()
    images = Masked(ids, [""] * len(ids), batch[schema.PIXELS], masks)
    frames = {name: _transforms(tested_rows(uri, columns).slice(0, MOST_LUNGS)) for name, uri in data.items()}
    thetas = {
        name: torch.stack([_theta(own, whole, pixels.size) for own, whole in zip(of, frames[INITIAL], strict=True)])
        for name, of in frames.items()
    }
    return {name: float(off_diagonal_mean(iou)) for name, iou in align.overlaps(images, thetas).iou.items()}


@torch.inference_mode()
def predicted_lungs(pixels_BHW: Tensor) -> Tensor:
    """Bool masks (B, H, W) of the lungs in uint8 images, by the network shipped with this package."""
    network = lung_pretraining.load_network(lung_pretraining.SHIPPED)
    masks = []
    for part in pixels_BHW.split(32):
        x = part[:, None].float() / 255
        small = F.interpolate(x, (_LUNGS_PX, _LUNGS_PX), mode="bilinear", antialias=True)
        masks.append(F.interpolate(network(normalize_contrast(small)), x.shape[-2:], mode="bilinear")[:, 0] > 0.5)
    return torch.cat(masks)


def _transforms(rows: pa.Table) -> list[ResizeTransform]:
    return [ResizeTransform.from_dict(row) for row in rows[schema.RESIZE_TRANSFORM].to_pylist()]


def _theta(own: ResizeTransform, whole: ResizeTransform, size: int) -> Tensor:
    """(2, 3) from a variant's square to that of the whole image, both from −1 to 1."""
    to_pixels = from_units(size)
    matrix = to_pixels.then(own).then(whole.inverse()).then(to_pixels.inverse()).matrix
    return torch.from_numpy(matrix.astype(np.float32))


# ---- Table and figure


def table(results: Sequence[ArchiveResult]) -> str:
    """Markdown, a row for each archive and variant."""
    head = [
        "",
        "images",
        _AUROC,
        "SD over seeds",
        _GAIN,
        "pairwise lung IoU",
    ]
    rows = []
    for of_archive in results:
        initial = of_archive.variants[0]
        for each in of_archive.variants:
            mean, gain = each.mean(), each.gain(initial)
            rows.append(
                [
                    of_archive.archive,
                    each.name,
                    mean.cell(),
                    number(mean.sd),
                    "–" if each is initial else gain.cell(),
                    number(of_archive.lung_iou[each.name]),
                ]
            )
    return markdown(head, rows)


def summary(results: Sequence[ArchiveResult], seeds: int) -> str:
    """The test images of each archive, and how many of them are stored whole, in a sentence or two."""
    tested = [
        f"{each.archive}: {each.images:,} test images of {each.patients:,} patients, "
        f"{counted(len(each.variants[0].findings), 'finding')}"
        for each in results
    ]
    failed = [f"{count} of {each.archive}, {name}" for each in results for name, count in each.whole.items() if count]
    stored = f" Stored whole, because their alignment was implausible: {'; '.join(failed)}." if failed else ""
    return f"{'; '.join(tested)}; {counted(seeds, 'seed')}.{stored}"


def page(results: Sequence[ArchiveResult], seeds: int) -> str:
    """The table with what its figures are."""
    return (
        f"{table(results)}\n{summary(results, seeds)}\n\n{LEGEND}\n"
        f"The lung IoU is the mean over all pairs of at most {MOST_LUNGS} test images, after each variant's mean "
        f"transform was removed. Published for the official split of ChestX-ray14, with a DenseNet-121 each: a mean "
        f"AUROC of {PUBLISHED[INITIAL]:.4f} on initial and {PUBLISHED[ALIGNED]:.4f} on aligned images. Networks that "
        f"differ only in their seed have a standard deviation of {SEED_SD} there, more than this gain of "
        f"{PUBLISHED[ALIGNED] - PUBLISHED[INITIAL]:.4f}.\n"
    )


def csv(results: Sequence[ArchiveResult]) -> str:
    """A row for each archive and variant."""
    return csv_text([_row(of_archive, each) for of_archive in results for each in of_archive.variants])


def _row(of_archive: ArchiveResult, each: SeedResults) -> dict[str, Any]:
    return {
        "archive": of_archive.archive,
        "variant": each.name,
        "test_images": of_archive.images,
        "test_patients": of_archive.patients,
        "seeds": len(each.values),
        **each.mean().named("auroc"),
        **each.gain(of_archive.variants[0]).named("gain"),
        "lung_iou": of_archive.lung_iou[each.name],
        "stored_whole": of_archive.whole[each.name],
    }


def metrics(results: Sequence[ArchiveResult]) -> dict[str, float]:
    """Finite metrics by name, ARCHIVE/VARIANT/NAME."""
    values = {
        f"{of_archive.archive}/{each.name}/{name}": value
        for of_archive in results
        for each in of_archive.variants
        for name, value in _row(of_archive, each).items()
        if name not in ("archive", "variant")
    }
    return {name: float(value) for name, value in values.items() if math.isfinite(value)}


def picture(results: Sequence[ArchiveResult]) -> Figure:
    """Mean AUROC of each variant, and its difference from the initial images, with their intervals."""
    lines = []
    for of_archive in results:
        lines.append(ForestLine(of_archive.archive))
        for each in of_archive.variants:
            values = {_AUROC: each.mean().mean_interval}
            if each.name != INITIAL:
                values[_GAIN] = each.gain(of_archive.variants[0]).mean_interval
            lines.append(ForestLine(each.name, values))
    return forest_figure(lines, [_AUROC, _GAIN], differences=[_GAIN])
