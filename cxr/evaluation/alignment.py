"""The report of an aligner's run: pose errors, overlap of lungs, transforms, and images before and after."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cxr import schema, storage
from cxr.data import shards
from cxr.evaluation.alignment_data import (
    COMPARED_PX,
    MOST_MASKS,
    MOST_PICTURES,
    AlignedImages,
    Correlations,
    Overlaps,
    Placed,
    evaluate_masks,
    evaluate_pictures,
    evaluate_poses,
    join,
    load_scores,
    read_masks,
    sample,
    scores_of,
)
from cxr.evaluation.ground_truth import patient_numbers
from cxr.evaluation.ground_truth_masks import MaskTruth, ShardTruth, known_masks
from cxr.evaluation.images import read_pictures
from cxr.evaluation.run import (
    Content,
    Measures,
    ReportOptions,
    Run,
    comparison_section,
    coverage,
    images_in_common,
    read_other_run,
)
from cxr.evaluation.score_summary import Description, Kind, Scored
from cxr.metrics import alignment
from cxr.metrics.bootstrap import MeanInterval, mean_interval
from cxr.models.spatial_transformer import corner_distance
from cxr.reporting import alignment as tables
from cxr.reporting import figures
from cxr.reporting.page import Block, Section, save_picture

PICTURES = "pictures"
SHOWN = 8  # images in a row
ERROR, IOU, CORRELATION = tables.HEADLINES


@dataclass(frozen=True)
class Measured:
    """What was measured of aligned images; values by image are NaN or left out where they are unknown."""

    images: AlignedImages
    error_before: np.ndarray  # (N,) percent of the width
    error: np.ndarray
    fitted: Tensor  # (N, 2, 3) transforms in the frame of the known poses
    overlaps: Overlaps | None
    correlations: Correlations | None

    @property
    def known(self) -> np.ndarray:
        """(N,) bool: the pose is known."""
        return np.isfinite(self.error)

    @property
    def counts(self) -> dict[str, int]:
        """Number of images on which each of HEADLINES was measured."""
        counts = {ERROR: int(self.known.sum())} if self.known.any() else {}
        counts |= {IOU: len(self.overlaps.positions)} if self.overlaps else {}
        return counts | ({CORRELATION: len(self.correlations.positions)} if self.correlations else {})

    def headlines(self, options: ReportOptions) -> dict[str, tuple[MeanInterval, MeanInterval, MeanInterval]]:
        """Before, after, and after minus before, for each of HEADLINES that was measured."""
        patients, bootstrap = self.images.patients, {"resamples": options.resamples, "seed": options.seed}
        measured: dict[str, tuple[MeanInterval, MeanInterval, MeanInterval]] = {}
        if self.known.any():
            before, after = self.error_before, self.error
            b, a, d = (mean_interval(of, patients, **bootstrap) for of in (before, after, after - before))
            measured[ERROR] = b, a, d
        if (overlaps := self.overlaps) is not None:
            before, after, of = overlaps.iou_before, overlaps.iou_after, patients[overlaps.positions]
            b, a, d = (alignment.pair_interval(some, of, **bootstrap) for some in (before, after, after - before))
            measured[IOU] = b, a, d
        if (correlations := self.correlations) is not None:
            before, after, of = (
                correlations.correlation_before,
                correlations.correlation_after,
                patients[correlations.positions],
            )
            b, a, d = (mean_interval(some, of, **bootstrap) for some in (before, after, after - before))
            measured[CORRELATION] = b, a, d
        return measured


def measure(
    images: AlignedImages,
    masks: Mapping[int, Placed],
    pictures: Mapping[int, Placed],
) -> Measured:
    """Evaluate the images, of which some have masks and pictures, by row."""
    before, after, fitted = evaluate_poses(images)
    return Measured(images, before, after, fitted, evaluate_masks(images, masks), evaluate_pictures(images, pictures))


def report(run: Run, options: ReportOptions, out: str) -> Content:
    """Evaluate a run. Writes transforms.csv and pictures."""
    out, archive = storage.normalize(out), storage.normalize(options.archive or run.archive)
    truth = known_masks(archive, options, schema.LUNGS, [schema.TRUE_THETA])
    images = join(load_scores(run), truth)
    masks = read_masks(images, truth, sample(images.rows[images.masked], MOST_MASKS, options.seed).tolist())
    pictures = _pictures_of(truth, sample(images.rows, MOST_PICTURES, options.seed).tolist())
    measures = measure(images, masks, pictures)
    headlines = measures.headlines(options)
    lead = coverage(
        len(images.rows),
        images.patients,
        f"{int(measures.known.sum()):,} with a ground-truth pose, {int(images.masked.sum()):,} with a lung mask",
        {"with an error": images.images_with_error, "without scores": images.images_without_score},
    )
    print(lead, flush=True)
    folder = storage.join(out, PICTURES)
    sections = [
        Section(
            "Alignment",
            [
                tables.headline_table(headlines, measures.counts),
                tables.legend(options.resamples, COMPARED_PX),
                *_improvement(measures, folder),
                *_means(measures, folder),
            ],
        ),
        Section("Transforms", _transforms(measures, folder)),
        Section("Images before and after alignment", _examples(measures, truth, options.seed, folder)),
    ]
    result: dict[str, Any] = {"metrics": metrics(measures, headlines)}
    ids = truth.image_ids.take(pa.array(images.rows)).to_pylist()
    result["transforms"] = tables.write_transforms(image_rows(measures, ids), out)
    if options.compare_with:
        sections.append(compared(images, truth, masks, pictures, options, result))
    measured = Measures(ids, images.patients, partial(_measure_part, images, masks, pictures, options))
    return Content(run, archive, options, lead, sections, result, measured)


def _measure_part(
    images: AlignedImages,
    masks: Mapping[int, Placed],
    pictures: Mapping[int, Placed],
    options: ReportOptions,
    places: np.ndarray,
) -> dict[str, MeanInterval]:
    """Each of HEADLINES after alignment, of some of the images."""
    part = measure(images.at(images.rows[places]), masks, pictures)
    return {tables.SHORT_TITLES[name]: after for name, (_, after, _) in part.headlines(options).items()}


def _pictures_of(truth: MaskTruth, rows: Sequence[int]) -> dict[int, Placed]:
    return read_pictures(truth.table, rows, [truth.info] if isinstance(truth, ShardTruth) else [])


def metrics(
    measures: Measured, headlines: Mapping[str, tuple[MeanInterval, MeanInterval, MeanInterval]]
) -> dict[str, Any]:
    """Metrics for result.json, by the names that training uses."""
    images = measures.images
    values: dict[str, Any] = {
        "images": len(images.rows),
        "patients": len(np.unique(images.patients)),
        "images_with_error": images.images_with_error,
        "images_without_score": images.images_without_score,
    }
    for name, (before, after, change) in headlines.items():
        stem, ending = name.removesuffix("_pct"), "_pct" * name.endswith("_pct")
        for kind, of in (("", after), ("_before", before), ("_change", change)):
            values |= {f"{stem}{kind}{ending}{end}": getattr(of, value) for end, value in _ENDS.items()}
    if measures.known.any():
        values["corner_error_median_pct"] = float(np.median(measures.error[measures.known]))
    return values | _plausibility(images.theta)


_ENDS = {"": "value", "_low": "low", "_high": "high"}


def _plausibility(theta: Tensor) -> dict[str, float]:
    mean = theta.mean(0, keepdim=True)
    return {
        "mean_scale": float(alignment.mean_scale(mean)),
        "mean_translation_pct": 100 * float(alignment.middle_shift(mean)),
        "images_implausible": int(alignment.implausible(theta).sum()),
    }


def image_rows(measures: Measured, image_ids: Sequence[str]) -> list[dict[str, Any]]:
    """One row of plain values for each image, the least usual transform first."""
    images, unusual = measures.images, unusualness(measures.images.theta)
    columns = {name: of.tolist() for name, of in alignment.parameters(images.theta).items()}
    columns["distance_from_mean_pct"] = unusual.tolist()
    columns["implausible"] = alignment.implausible(images.theta).int().tolist()
    if measures.known.any():
        columns |= {"corner_error_before_pct": measures.error_before.tolist(), ERROR: measures.error.tolist()}
    if (overlaps := measures.overlaps) is not None:
        for name, of in zip((f"{IOU}_before", IOU), overlaps.by_image, strict=True):
            values = np.full(len(images.rows), math.nan)
            values[overlaps.positions] = of
            columns[name] = values.tolist()
    order = np.argsort(-unusual, kind="stable").tolist()
    return [{"image_id": image_ids[at]} | {name: of[at] for name, of in columns.items()} for at in order]


def unusualness(theta: Tensor) -> np.ndarray:
    """(N,) distance of each transform from the mean transform, in percent of the width."""
    return 100 * corner_distance(theta, theta.mean(0, keepdim=True)).numpy()


def _improvement(measures: Measured, folder: str) -> list[Block]:
    """Histograms of the headline metrics by image."""
    shown: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    if measures.known.any():
        shown["distance from the ground-truth pose, % of the width"] = (
            measures.error_before[measures.known],
            measures.error[measures.known],
        )
    if measures.overlaps is not None:
        shown["mean IoU with the lungs of other images"] = measures.overlaps.by_image
    if (correlations := measures.correlations) is not None:
        shown["correlation with the mean image"] = correlations.correlation_before, correlations.correlation_after
    if not shown:
        return []
    caption = "Distribution over images before and after alignment."
    return [save_picture(tables.improvement_figure(shown), folder, "improvement.png", caption)]


def _means(measures: Measured, folder: str) -> list[Block]:
    """Mean images and mean lungs before and after alignment."""
    named: dict[str, np.ndarray] = {}
    if (correlations := measures.correlations) is not None:
        named |= {
            "mean image before": correlations.pictures_before.mean(0),
            "mean image after": correlations.pictures_after.mean(0),
        }
    if (overlaps := measures.overlaps) is not None:
        named |= {"mean lungs before": overlaps.mean_before, "mean lungs after": overlaps.mean_after}
    if not named:
        return []
    caption = "Mean over images before and after alignment: the sharper the mean, the better the images are aligned."
    return [save_picture(figures.pictures(named), folder, "means.png", caption)]


def _transforms(measures: Measured, folder: str) -> list[Block]:
    """Distributions of the transforms, beside the known poses where there are any."""
    images, known = measures.images, measures.known
    predicted = _parameters(measures.fitted[known] if known.any() else images.theta)
    true = _parameters(images.pose[known]) if known.any() else {}
    count = int(alignment.implausible(images.theta).sum())
    low, high = alignment.SCALES
    blocks: list[Block] = [
        tables.parameter_table(predicted, true),
        tables.parameter_legend(),
        f"{count:,} of {len(images.rows):,} transforms are implausible: they mirror the image, have a scale outside "
        f"{low:g} to {high:g}, or move its center by more than {alignment.FARTHEST:.0%} of the width.",
        save_picture(
            tables.distributions_figure(predicted, true),
            folder,
            "transforms.png",
            f"Distribution of each part of the predicted transforms{' and of the ground-truth poses' * bool(true)}.",
        ),
    ]
    if true:
        caption = "Each part of the predicted transforms against the ground-truth pose; a point is an image."
        blocks.append(save_picture(tables.pose_figure(predicted, true), folder, "poses.png", caption))
    return blocks


def _parameters(theta: Tensor) -> dict[str, np.ndarray]:
    return {name: of.numpy() for name, of in alignment.parameters(theta.float()).items()}


@dataclass(frozen=True)
class Ranking:
    """Images in the order in which they are shown, with a note for each of all images, or none."""

    title: str
    file: str
    positions: np.ndarray
    notes: Sequence[str] = ()


def _examples(measures: Measured, truth: MaskTruth, seed: int, folder: str) -> list[Block]:
    """A random sample, and the hardest cases: by pose error, by overlap, and by how unusual their transform is."""
    images = measures.images
    rankings = [Ranking("A random sample", "sample.png", np.random.default_rng(seed).permutation(len(images.rows)))]
    if measures.known.any():
        order = np.argsort(-np.nan_to_num(measures.error, nan=-1), kind="stable")
        notes = [f"error {b:.1f} % to {a:.1f} %" for b, a in zip(measures.error_before, measures.error, strict=True)]
        title = "Hardest cases: images with the largest pose errors after alignment"
        rankings.append(Ranking(title, "largest_errors.png", order, notes))
    if (overlaps := measures.overlaps) is not None:
        before, after = overlaps.by_image
        order = overlaps.positions[np.argsort(after, kind="stable")]
        notes = [""] * len(images.rows)
        for position, b, a in zip(overlaps.positions.tolist(), before.tolist(), after.tolist(), strict=True):
            notes[position] = f"lung IoU {b:.2f} to {a:.2f}"
        title = "Hardest cases: images whose lungs overlap least with those of others"
        rankings.append(Ranking(title, "lowest_overlap.png", order, notes))
    if len(rankings) == 1:
        rankings.append(_unusual(images.theta))
    ids = truth.image_ids.take(pa.array(images.rows)).to_pylist()
    return _before_after(rankings, images, ids, lambda rows: _pictures_of(truth, rows), folder)


def _unusual(theta: Tensor) -> Ranking:
    unusual = unusualness(theta)
    notes = [f"{value:.0f} % from the mean" for value in unusual.tolist()]
    order = np.argsort(-unusual, kind="stable")
    title = "Outliers: images whose transforms are farthest from the mean transform"
    return Ranking(title, "outliers.png", order, notes)


def _before_after(
    rankings: Sequence[Ranking],
    images: AlignedImages,
    image_ids: Sequence[str],
    read: Callable[[Sequence[int]], Mapping[int, Placed]],
    folder: str,
) -> list[Block]:
    """A picture for each ranking of positions: the first images in the network's square, and aligned."""
    shown = {position for ranking in rankings for position in ranking.positions[:SHOWN].tolist()}
    pictures = read(sorted(int(images.rows[position]) for position in shown))
    blocks: list[Block] = []
    for ranking in rankings:
        first: list[int] = ranking.positions[:SHOWN].tolist()
        readable = [position for position in first if int(images.rows[position]) in pictures]
        if not readable:
            continue
        pairs = [
            images.before_after(position, pictures[int(images.rows[position])], images.theta[position], COMPARED_PX)
            for position in readable
        ]
        before, after = (torch.stack(some).clamp(0, 1).numpy() for some in zip(*pairs, strict=True))
        figure = figures.picture_rows(
            {"before": before, "aligned": after},
            [image_ids[position] for position in readable],
            notes=[ranking.notes[position] for position in readable] if ranking.notes else (),
        )
        blocks.append(save_picture(figure, folder, ranking.file, f"{ranking.title}, before and after alignment."))
    return blocks


def compared(
    ours: AlignedImages,
    truth: MaskTruth,
    masks: Mapping[int, Placed],
    pictures: Mapping[int, Placed],
    options: ReportOptions,
    result: dict[str, Any],
) -> Section:
    """The comparison with `options.compare_with`; its metrics are added to `result`.

    Raises:
        UserError: the other run has no image in common with this one.
    """
    other = read_other_run(options)
    theirs = join(load_scores(other), truth)
    rows = images_in_common(ours.rows, theirs.rows, other)
    measured = [measure(images.at(rows), masks, pictures) for images in (ours, theirs)]
    gains = paired_gains(measured[0], measured[1], options)
    result["metrics"]["images_compared"] = len(rows)
    for name, gain in gains.items():
        stem, ending = name.removesuffix("_pct"), "_pct" * name.endswith("_pct")
        result["metrics"] |= {f"{stem}_gain{ending}{end}": getattr(gain, value) for end, value in _ENDS.items()}
    return comparison_section(
        other, len(rows), [tables.gain_table(gains), "A negative difference of distances is an improvement."]
    )


def paired_gains(ours: Measured, theirs: Measured, options: ReportOptions) -> dict[str, MeanInterval]:
    """Ours minus theirs after alignment, for each of HEADLINES, on the same images and resamples."""
    patients, bootstrap = ours.images.patients, {"resamples": options.resamples, "seed": options.seed}
    gains: dict[str, MeanInterval] = {}
    if ours.known.any():
        gains[ERROR] = mean_interval(ours.error - theirs.error, patients, **bootstrap)
    if ours.overlaps and theirs.overlaps:
        difference = ours.overlaps.iou_after - theirs.overlaps.iou_after
        gains[IOU] = alignment.pair_interval(difference, patients[ours.overlaps.positions], **bootstrap)
    if ours.correlations and theirs.correlations:
        difference = ours.correlations.correlation_after - theirs.correlations.correlation_after
        gains[CORRELATION] = mean_interval(difference, patients[ours.correlations.positions], **bootstrap)
    return gains


def _describe(scored: Scored, out: str) -> Description:
    """transforms.csv; distributions of the transforms, and images before and after alignment, without truth."""
    scores = scores_of(scored.table, scored.run)
    count = scored.table.num_rows
    images = AlignedImages(
        rows=np.arange(count),
        patients=patient_numbers(scored.table),
        theta=scores.theta,
        squares=scores.squares,
        sizes_px=scores.sizes_px,
        pose=torch.full((count, 2, 3), math.nan),
        masked=np.zeros(count, bool),
    )
    stored = [shards.read_info(archive) for archive in scored.run.archives if shards.is_shards(archive)]

    def read(rows: Sequence[int]) -> dict[int, Placed]:
        return read_pictures(scored.table, rows, stored)

    measures = measure(images, {}, read(sample(images.rows, MOST_PICTURES, scored.options.seed).tolist()))
    headlines, folder = measures.headlines(scored.options), storage.join(out, PICTURES)
    ids = scored.table[schema.IMAGE_ID].to_pylist()
    rankings = [Ranking("A random sample", "sample.png", scored.random.permutation(count)), _unusual(images.theta)]
    blocks: list[Block] = []
    if headlines:
        blocks += [
            tables.headline_table(headlines, measures.counts),
            tables.legend(scored.options.resamples, COMPARED_PX),
            *_improvement(measures, folder),
            *_means(measures, folder),
        ]
    blocks += _transforms(measures, folder)
    blocks += _before_after(rankings, images, ids, read, folder)
    values = metrics(measures, headlines)
    counted = ("images", "patients", "images_with_error", "images_without_score")  # by `score_summary`
    return Description(
        Section("Alignment", blocks),
        metrics={name: value for name, value in values.items() if name not in counted},
        files={"transforms": tables.write_transforms(image_rows(measures, ids), out)},
    )


TRANSFORMS = Kind((schema.CROP_STATUS, schema.THETA), _describe)
