"""The report of a run without ground truth: distributions of its scores, examples, and images without scores."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.boxes import areas
from cxr.data import shards
from cxr.evaluation.decisions import BoxLimits
from cxr.evaluation.ground_truth import patient_numbers
from cxr.evaluation.images import read_pictures
from cxr.evaluation.run import Content, Measures, ReportOptions, Run, read_scores
from cxr.imaging.geometry import ResizeTransform, fit_mask
from cxr.metrics.bootstrap import MeanInterval, mean_interval
from cxr.metrics.localization import Boxes
from cxr.reporting import score_summary as tables
from cxr.reporting.detection import PREDICTION, area_figure, distribution_figure
from cxr.reporting.overlays import BoxPair, MaskPair, Overlay, save_overlays, without_repeats
from cxr.reporting.page import Section, save_picture
from cxr.reporting.tables import csv_text
from cxr.sources import rle
from cxr.wording import counted

PICTURES = "pictures"
SHOWN = 3  # images in each row of the picture
_COLUMNS = (
    schema.IMAGE_ID,
    schema.PATIENT_ID,
    schema.SOURCE_URI,
    schema.ERROR,
    schema.HEIGHT_PX,
    schema.WIDTH_PX,
    schema.RESIZE_TRANSFORM,
)


@dataclass(frozen=True)
class Scored:
    """The images of a run that were scored without an error, in the order of their ids."""

    run: Run
    options: ReportOptions
    table: pa.Table
    findings: tuple[str, ...]  # of the checkpoint; empty if its scores do not name them

    @cached_property
    def sizes_px(self) -> np.ndarray:
        """(N, 2) width and height of the originals."""
        return np.stack([self.table[name].to_numpy() for name in (schema.WIDTH_PX, schema.HEIGHT_PX)], 1)

    @property
    def random(self) -> np.random.Generator:
        return np.random.default_rng(self.options.seed)

    def overlays(
        self, chosen: dict[str, np.ndarray], draw: Callable[[int, np.ndarray, ResizeTransform], Overlay]
    ) -> dict[str, list[Overlay]]:
        """The first `SHOWN` rows of each name that no earlier name shows, without images that can no longer be read.

        Args:
            draw: takes a row, its picture (S, S) in [0, 1], and the transform of the picture to the original.
        """
        shown = without_repeats(chosen, SHOWN)
        stored = [shards.read_info(archive) for archive in self.run.archives if shards.is_shards(archive)]
        pictures = read_pictures(self.table, sorted({row for rows in shown.values() for row in rows}), stored)
        rendered = {
            name: [draw(row, *pictures[row]) for row in rows if row in pictures] for name, rows in shown.items()
        }
        return {name: some for name, some in rendered.items() if some}


@dataclass(frozen=True)
class Description:
    """A section of the report, and its entries in the job's result.

    Args:
        positive: (N, K) which images count as positive, for K findings, and their names; for reports by subgroup.
    """

    section: Section
    metrics: dict[str, float] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    positive: tuple[np.ndarray, Sequence[str]] | None = None


@dataclass(frozen=True)
class Kind:
    """One kind of scores.

    Args:
        columns: in which a run holds them.
        describe: writes its files and pictures into a URI.
    """

    columns: tuple[str, ...]
    describe: Callable[[Scored, str], Description]


def report(run: Run, options: ReportOptions, out: str, kinds: Sequence[Kind]) -> Content:
    """Describe a run without ground truth: a table and pictures of each kind of scores.

    Raises:
        UserError: the run has scored no image of the split.
    """
    out = storage.normalize(out)
    columns = [*_COLUMNS, *(name for kind in kinds for name in kind.columns)]
    parts = read_scores(run, columns, "all" if options.split == "auto" else options.split)
    named = {(part.schema.metadata or {}).get(schema.FINDINGS_KEY, b"[]") for part in parts}
    table = pa.concat_tables(part.replace_schema_metadata() for part in parts).sort_by(schema.IMAGE_ID)
    good = table.filter(pc.is_null(table[schema.ERROR]))
    patients, failed = len(np.unique(patient_numbers(table))), table.num_rows - good.num_rows
    text = f"{counted(table.num_rows, 'image')} of {counted(patients, 'patient')}, {failed:,} of them without scores."
    print(text, flush=True)
    metrics: dict[str, Any] = {"images": table.num_rows, "patients": patients, "images_with_error": failed}
    scored = Scored(run, options, good, tuple(json.loads(named.pop())) if len(named) == 1 else ())
    described = [kind.describe(scored, out) for kind in kinds if good.num_rows]
    result: dict[str, Any] = {"metrics": metrics}
    for part in described:
        metrics |= part.metrics
        result |= part.files
    positive = next((part.positive for part in described if part.positive), None)
    return Content(
        run,
        "",
        options,
        text,
        [part.section for part in described],
        result,
        Measures(good[schema.IMAGE_ID].to_pylist(), patient_numbers(good), partial(_shares, good, options, *positive))
        if positive
        else None,
    )


def _shares(
    good: pa.Table, options: ReportOptions, positive_NK: np.ndarray, names: Sequence[str], places: np.ndarray
) -> dict[str, MeanInterval]:
    """The share of positive images among some of the images: of any kind, and of each if there are several."""
    shares: dict[str, np.ndarray] = {"share of positive images": np.asarray(positive_NK.any(1))}
    if len(names) > 1:
        shares |= {f"Share of positive images/{name}": of for name, of in zip(names, positive_NK.T, strict=True)}
    patients, bootstrap = patient_numbers(good)[places], {"resamples": options.resamples, "seed": options.seed}
    return {name: mean_interval(of[places].astype(np.float64), patients, **bootstrap) for name, of in shares.items()}


def _describe_probabilities(scored: Scored, out: str) -> Description:
    """findings.csv; a histogram per finding."""
    head = "Probabilities of findings"
    probabilities, decisions = (
        np.array(scored.table[name].to_pylist(), np.float64).reshape(scored.table.num_rows, -1)
        for name in (schema.PROBABILITIES, schema.DECISIONS)
    )
    if not np.isfinite(probabilities).any():
        return Description(
            Section(head, ["There are no probabilities: the checkpoint's classifier was not trained."])
        )
    rows = [
        {"finding": finding, "images": len(p), "positive": int(hit.sum()), "positive_share": float(hit.mean())}
        | tables.quantiles(p)
        for finding, p, hit in zip(scored.findings, probabilities.T, decisions.T == 1, strict=True)
    ]
    named = dict(zip(scored.findings, probabilities.T, strict=True))
    picture = save_picture(
        tables.histograms_figure(named, "Probabilities, all images", "probability", "images"),
        storage.join(out, PICTURES),
        "probabilities.png",
        "Distribution of each finding's probability over all images, on a logarithmic axis.",
    )
    legend = "An image is positive if its probability reaches the checkpoint's threshold."
    return Description(
        Section(head, [tables.finding_table(rows), legend, picture]),
        positive=(decisions == 1, scored.findings),
        metrics={f"positive_share/{row['finding']}": row["positive_share"] for row in rows},
        files={"findings": _write(rows, out, "findings.csv")},
    )


def _describe_boxes(scored: Scored, out: str) -> Description:
    """boxes.csv; distributions of scores, counts and areas, and example images."""
    limits, images = BoxLimits.of(scored.run, scored.findings, scored.options), scored.table.num_rows
    predicted = Boxes.of(scored.table[schema.PRED_BOXES], scored.findings)
    positive = limits.reached(predicted)
    rows = []
    for f, finding in enumerate(scored.findings):
        own = positive.at(positive.finding == f)
        with_box = len(np.unique(own.image))
        rows.append(
            {"finding": finding, "images": images, "positive": with_box, "positive_share": with_box / images}
            | {"boxes": len(own.image)}
            | tables.quantiles(own.score)
        )
    folder, names = storage.join(out, PICTURES), scored.findings
    by_finding = {finding: predicted.score[predicted.finding == f] for f, finding in enumerate(names)}
    shares = areas(positive.xyxy) / scored.sizes_px.prod(1)[positive.image]
    counts = np.bincount(positive.finding, minlength=len(names))
    title = f"Boxes with a score {limits.text}"
    examples = save_overlays(
        _box_overlays(scored, positive),
        folder,
        "boxes.png",
        "Images with the highest scores, a random sample of images with boxes, and images without a box.",
    )
    areas_by_finding = {PREDICTION: [shares[positive.finding == f] for f in range(len(names))]}
    charts = [
        save_picture(figure, folder, name, caption)
        for name, figure, caption in (
            (
                "box_scores.png",
                tables.histograms_figure(by_finding, "Scores of all boxes", "score", "boxes"),
                "Distribution of the boxes' scores for each finding, on a logarithmic axis.",
            ),
            (
                "box_counts.png",
                distribution_figure({PREDICTION: counts}, names, title, "boxes"),
                "Number of boxes of each finding.",
            ),
            (
                "box_area.png",
                area_figure(areas_by_finding, names),
                "Area of the boxes of each finding, as a share of the image.",
            ),
        )
    ]
    legend = f"An image is positive if it has a box with a score {limits.text}. Only such boxes are counted."
    with_box_NF = np.zeros((images, len(names)), bool)
    with_box_NF[positive.image, positive.finding] = True
    boxed = int(with_box_NF.any(1).sum())
    count = f"{counted(len(positive.image), 'box', 'boxes')} in {counted(boxed, 'image')}."
    return Description(
        Section("Boxes", [count, tables.finding_table(rows), legend, *examples, *charts]),
        positive=(with_box_NF, names),
        metrics={"predicted_boxes": len(positive.image), "images_with_boxes": float(boxed)}
        | {f"images_with_boxes/{row['finding']}": row["positive"] for row in rows},
        files={"boxes": _write(rows, out, "boxes.csv")},
    )


def _box_overlays(scored: Scored, positive: Boxes) -> dict[str, list[Overlay]]:
    """Images with the highest scores, a random sample of images with boxes, and images without a box."""
    best = np.zeros(scored.table.num_rows)
    np.maximum.at(best, positive.image, positive.score)
    boxed, empty = np.flatnonzero(best > 0), np.flatnonzero(best == 0)
    chosen = {
        "highest score": boxed[np.argsort(-best[boxed], kind="stable")],
        "random": scored.random.permutation(boxed),
        "no box": scored.random.permutation(empty),
    }

    def draw(row: int, picture: np.ndarray, frame: ResizeTransform) -> Overlay:
        own = positive.at(positive.image == row)
        placed = frame.boxes_from_original(own.xyxy)
        words = [f"{scored.findings[f]} {score:.2f}" for f, score in zip(own.finding, own.score, strict=True)]
        image_id, note = scored.table[schema.IMAGE_ID][row].as_py(), f"{best[row]:.2f}" if words else ""
        return Overlay(image_id, note, picture, BoxPair(None, (), placed, words))

    return scored.overlays(chosen, draw)


def _describe_masks(scored: Scored, out: str) -> Description:
    """images.csv; distributions of area and probability, and example images with outlines."""
    area = scored.table[schema.PRED_MASK_AREA_PX].to_numpy()
    share = area / scored.sizes_px.prod(1)
    probability = scored.table[schema.PRED_MASK_PROBABILITY].cast(pa.float64()).to_numpy()
    not_empty = np.flatnonzero(area > 0)
    images = [
        {"image_id": image_id, "area_px": pixels, "area_share": part, "probability": p}
        for image_id, pixels, part, p in zip(
            scored.table[schema.IMAGE_ID].to_pylist(),
            area.tolist(),
            share.tolist(),
            probability.tolist(),
            strict=True,
        )
    ]
    folder = storage.join(out, PICTURES)
    rate = tables.share(len(not_empty), len(area))
    panels = {"area of masks that are not empty": share[not_empty]}
    if np.isfinite(probability).any():
        panels["probability of a mask"] = probability[np.isfinite(probability)]
    examples = save_overlays(
        _mask_overlays(scored, share, not_empty),
        folder,
        "masks.png",
        "The largest, smallest and middle masks, and images without a mask.",
    )
    histograms = save_picture(
        tables.histograms_figure(panels, "Masks", "share of the image; probability", "images"),
        folder,
        "mask_area.png",
        "Distribution of the masks' areas and of the images' probabilities, on a logarithmic axis.",
    )
    count = f"{len(not_empty):,} of {len(area):,} images ({rate}) have a mask that is not empty."
    return Description(
        Section("Masks", [count, tables.quantile_table(panels), *examples, histograms]),
        positive=(area[:, None] > 0, ["mask"]),
        metrics={
            "images_with_mask": len(not_empty),
            "median_area_share": tables.quantiles(share[not_empty])["median"],
        },
        files={"images": _write(images, out, "images.csv")},
    )


def _mask_overlays(scored: Scored, share: np.ndarray, not_empty: np.ndarray) -> dict[str, list[Overlay]]:
    """The largest, smallest and middle masks, and images without a mask."""
    order = not_empty[np.argsort(-share[not_empty], kind="stable")]
    middle = max(0, (len(order) - SHOWN) // 2)
    empty = np.setdiff1d(np.arange(len(share)), not_empty)
    chosen = {
        "largest": order,
        "smallest": order[::-1],
        "middle": order[middle : middle + SHOWN],
        "no mask": scored.random.permutation(empty),
    }

    def draw(row: int, picture: np.ndarray, frame: ResizeTransform) -> Overlay:
        width, height = scored.sizes_px[row].tolist()
        mask = rle.decode(scored.table[schema.PRED_MASK_RLE][row].as_py(), height, width)
        note = f"{share[row]:.1%} of the image" if share[row] else ""
        return Overlay(
            scored.table[schema.IMAGE_ID][row].as_py(),
            note,
            picture,
            MaskPair(None, fit_mask(mask, len(picture), frame)),
        )

    return scored.overlays(chosen, draw)


def _write(rows: Sequence[dict[str, Any]], out: str, name: str) -> str:
    uri = storage.join(out, name)
    storage.write_text(uri, csv_text(rows))
    return uri


PROBABILITIES = Kind((schema.PROBABILITIES, schema.DECISIONS), _describe_probabilities)
BOXES = Kind(schema.BOX_SCORES.names, _describe_boxes)
MASKS = Kind(schema.MASK_SCORES.names, _describe_masks)
