"""The comparison of ways to store X-rays: a page, a CSV file, metrics by name, and a picture."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from cxr import storage
from cxr.benchmarks.studies.compression import AS_STORED, ORIGINAL, RAW, RESIZED, DecodedImage, StorageResult
from cxr.reporting import tables
from cxr.reporting.figures import TILE_INCHES, save_figure

HEAD = (
    "way",
    "size of latents",
    "bytes",
    "ratio",
    "quality",
    "PSNR",
    "mean PSNR of images",
    "SSIM",
    "mean AUROC (95 %)",
)
ERROR_GAIN = 8  # factor by which errors are enlarged in the picture
FAR = 0.05  # relative to the target size: larger differences are reported


def table(rows: Sequence[StorageResult]) -> str:
    """Markdown."""
    return tables.markdown(HEAD, [_cells(row, rows[0].bytes_per_image) for row in rows])


def _cells(row: StorageResult, full: float) -> list[str]:
    return [
        row.way,
        row.at or "–",
        f"{row.bytes_per_image:,.0f}",
        f"{full / row.bytes_per_image:.1f}",
        "–" if math.isnan(row.quality) else f"{row.quality:.4g}",
        *(_db(value) for value in (row.psnr, row.psnr_mean_per_image)),
        tables.number(row.ssim, 4),
        tables.interval(row.auroc, row.auroc_low, row.auroc_high),
    ]


def _db(value: float) -> str:
    return "exact" if value == math.inf else tables.number(value, 2)


def csv(rows: Sequence[StorageResult]) -> str:
    return tables.csv_text([dataclasses.asdict(row) for row in rows])


def metrics(rows: Sequence[StorageResult]) -> dict[str, float]:
    """For result.json: "psnr/jpeg_2000/as_stored"; values that are not finite are omitted."""
    values = {}
    for row in rows:
        name = "/".join(filter(None, (row.way, row.at))).lower().replace(",", "").replace(" ", "_").replace(":", "_")
        for field in dataclasses.fields(StorageResult)[2:]:
            value = getattr(row, field.name)
            if math.isfinite(value):
                values[f"{field.name}/{name}"] = float(value)
    return values


# ---- Summary


def summary(rows: Sequence[StorageResult], codec: str) -> str:
    """Sentences that summarize the results."""
    parts = [_ranked([row for row in rows if row.at == at], codec, at) for at in (AS_STORED, RAW)]
    return "\n".join(f"- {part}" for part in [*parts, *_out_of_reach(rows, codec), *_findings(rows, codec)])


def _ranked(rows: Sequence[StorageResult], codec: str, at: str) -> str:
    """All ways at one size, the highest PSNR first."""
    own = next(row for row in rows if row.way == codec)
    best = sorted((row for row in rows if math.isfinite(row.psnr)), key=lambda row: -row.psnr)
    order = ", ".join(f"{row.way} {row.psnr:.2f}" for row in best)
    most_similar = max(best, key=lambda row: row.ssim)
    return (
        f"PSNR in dB at {own.bytes_per_image:,.0f} bytes, the size of the "
        f"{'stored' if at == AS_STORED else 'raw'} latents: {order}; {codec} ranks {best.index(own) + 1} of "
        f"{len(best)}. {most_similar.way} has the highest SSIM, {most_similar.ssim:.4f}; {codec} has {own.ssim:.4f}."
    )


def _out_of_reach(rows: Sequence[StorageResult], codec: str) -> list[str]:
    sizes = {row.at: row.bytes_per_image for row in rows if row.way == codec}
    return [
        f"{row.way} is not compared at the same size: its files have at least {row.bytes_per_image:,.0f} bytes, not "
        f"{sizes[row.at]:,.0f}."
        for row in rows
        if row.at and not row.way.startswith((codec, RESIZED)) and abs(row.bytes_per_image / sizes[row.at] - 1) > FAR
    ]


def _findings(rows: Sequence[StorageResult], codec: str) -> list[str]:
    original = next(row for row in rows if row.way == ORIGINAL)
    if math.isnan(original.auroc):
        return ["There is no AUROC: no finding has both positives and negatives here, or no classifier was trained."]
    latent = next((row for row in rows if row.way.startswith(f"{codec}, ")), None)
    measured = [row for row in rows if row.at and math.isfinite(row.auroc)]
    outside = [row for row in measured if not original.auroc_low <= row.auroc <= original.auroc_high]
    named = ", ".join(f"{row.way} ({row.at})" for row in outside)
    apart = f"outside of this interval: {named}" if outside else "all other values are within this interval"
    found = [
        f"Mean AUROC on the originals is {tables.interval(original.auroc, original.auroc_low, original.auroc_high)}; "
        f"{apart}."
    ]
    if latent:
        interval = tables.interval(latent.auroc, latent.auroc_low, latent.auroc_high)
        found.append(f"With only the latents it is {interval}.")
    return found


# ---- Picture


def picture(shown: Sequence[DecodedImage], folder: str) -> str:
    """compression.png: a detail of one X-ray in each way at the size of stored latents, and its errors below."""
    images = [image for image in shown if image.at in ("", AS_STORED)]
    original = _cut(images[0].picture)
    figure = Figure(figsize=(1.6 * TILE_INCHES * len(images), 3.5 * TILE_INCHES), layout="constrained")
    upper, lower = figure.subplots(2, len(images), squeeze=False)
    for image, top, bottom in zip(images, upper, lower, strict=True):
        cut = _cut(image.picture)
        error = cut - original
        psnr = -10 * math.log10(max(1e-10, float(np.square(error).mean())))
        top.set_title(f"{image.way}\n{image.bytes_per_image:,.0f} bytes", fontsize=9)
        top.imshow(cut, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        bottom.set_title(f"{ERROR_GAIN} x error, {psnr:.1f} dB" if error.any() else "no error", fontsize=8)
        bottom.imshow(0.5 + ERROR_GAIN * error, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
        top.set_axis_off()
        bottom.set_axis_off()
    return save_figure(figure, folder, "compression.png")


def _cut(picture_HW: np.ndarray) -> np.ndarray:
    """The region of the heart and the lower lung, half as wide as the image; float64 in [0, 1]."""
    side = len(picture_HW)
    top, left = round(0.35 * side), round(0.25 * side)
    return picture_HW[top : top + side // 2, left : left + side // 2] / 255


def write(
    rows: Sequence[StorageResult], shown: Sequence[DecodedImage], codec: str, about: str, out: str
) -> dict[str, str]:
    """OUT/compression.md, .csv and .png; their URIs."""
    uris = {name: storage.join(out, f"compression.{name}") for name in ("md", "csv")}
    page = ["# X-rays stored in few bytes", about, table(rows), summary(rows, codec), "![One X-ray](compression.png)"]
    storage.write_text(uris["md"], "\n\n".join(part.strip() for part in page) + "\n")
    storage.write_text(uris["csv"], csv(rows))
    return {"report": uris["md"], "table": uris["csv"], "picture": picture(shown, out)}
