"""Detectors compared on one test split: preprocessing, size of ensembles, fusion, and a filter for normal images."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pyarrow as pa

from cxr import schema
from cxr.benchmarks.studies.seed_results import SeedMean, SeedResults, finite, rows_in_common
from cxr.boxes import ScoredBoxes, add_no_finding, nms, nmw, soft_nms, wbf
from cxr.evaluation import detection_data, localization_data
from cxr.evaluation.ground_truth_boxes import BoxTruth
from cxr.evaluation.run import Run, findings_of
from cxr.families.detect import MAX_BOXES
from cxr.metrics.bootstrap import RESAMPLES, column_means
from cxr.metrics.detection import VOC_IOUS, average_precisions, image_labels, image_probabilities, true_positives
from cxr.metrics.detection.precision import resampled_aps
from cxr.metrics.localization import Boxes

IOU = VOC_IOUS[0]  # VinBigData's
PREPROCESSING, SIZE, FUSION, NORMAL = SECTIONS = ("preprocessing", "ensemble size", "fusion", "normal filter")
PLAIN = "none"  # the preprocessing that all others are compared with
MAX_SUBSETS = 10  # ensembles of each size that are evaluated
LOW, HIGH = 0.08, 0.95  # of the published filter, see `boxes.add_no_finding`
BY_CLASSIFIER = f"classifier, low {LOW:g}, high {HIGH:g}"  # the result with the published filter

Fuse = Callable[[Sequence[Sequence[ScoredBoxes]]], list[ScoredBoxes]]


@dataclass(frozen=True, kw_only=True)
class DetectionResult(SeedResults):
    """Average precision at IoU > .4 of networks or ensembles on the test images, for findings with ground-truth
    boxes."""

    section: str  # of SECTIONS
    networks: int  # whose boxes are combined


@dataclass(frozen=True)
class Detections:
    """Boxes that networks predicted in the same N test images, in pixels of the originals."""

    findings: tuple[str, ...]
    image_ids: Sequence[str]
    patients: np.ndarray  # (N,)
    sizes_px: np.ndarray  # (N, 2)
    true: Boxes
    normal: np.ndarray  # (N,) int8: whether the image shows none of the findings, −1 if unknown
    predicted: Mapping[str, Sequence[Boxes]]  # by preprocessing, of each seed

    @classmethod
    def of(cls, runs: Mapping[str, Sequence[Run]], truth: BoxTruth) -> Detections:
        """Compare the runs of each preprocessing, one per seed, with the truth, on the images that all have scored.

        Raises:
            UserError: there are no such images.
        """
        evaluated = {
            name: [detection_data.evaluate(localization_data.load_scores(run), findings_of(run), truth) for run in of]
            for name, of in runs.items()
        }
        every = [evaluation for of in evaluated.values() for evaluation in of]
        rows = rows_in_common(evaluation.rows for evaluation in every)
        first = every[0].at(rows)
        return cls(
            findings=first.findings,
            image_ids=truth.table[schema.IMAGE_ID].take(pa.array(rows)).to_pylist(),
            patients=first.patients,
            sizes_px=first.sizes_px,
            true=first.true,
            normal=image_labels(first.true, first.known)[:, -1],
            predicted={name: [each.at(rows).predicted for each in of] for name, of in evaluated.items()},
        )

    def result(
        self, section: str, name: str, predicted: Sequence[Boxes], *, networks: int = 1, by_seed: bool = False
    ) -> DetectionResult:
        """The result of several sets of boxes."""
        return self._result(section, name, predicted, self.true, self.findings, networks, by_seed)

    def with_normal(self, name: str, predicted: Boxes, networks: int) -> DetectionResult:
        """The result of boxes among which are those of `add_no_finding`, with No finding as another finding."""
        normal, number = np.flatnonzero(self.normal == schema.POSITIVE), len(self.findings)
        true = Boxes(
            image=np.concatenate([self.true.image, normal]),
            finding=np.concatenate([self.true.finding, np.full(len(normal), number)]),
            xyxy=np.concatenate([self.true.xyxy, np.tile([0.0, 0.0, 1.0, 1.0], (len(normal), 1))]),
            score=np.full(len(self.true.image) + len(normal), math.nan),
        )
        true = true.at(np.argsort(true.image, kind="stable"))
        unknown = (predicted.finding == number) & (self.normal[predicted.image] == schema.UNKNOWN)
        findings = (*self.findings, schema.NO_FINDING)
        return self._result(NORMAL, name, [predicted.at(~unknown)], true, findings, networks, by_seed=False)

    def _result(
        self,
        section: str,
        name: str,
        predicted: Sequence[Boxes],
        true: Boxes,
        findings: tuple[str, ...],
        networks: int,
        by_seed: bool,
    ) -> DetectionResult:
        columns, count = np.unique(true.finding), len(findings)
        aps, resamples = [], []
        for boxes in predicted:
            aps.append(average_precisions(boxes, true, count, IOU)[columns])
            correct = true_positives(boxes, true, IOU)
            resampled = resampled_aps(boxes, correct, true, self.patients, count, RESAMPLES, 0)[:, columns]
            resamples.append(column_means(resampled.T))
        names = tuple(findings[number] for number in columns.tolist())
        return DetectionResult(
            name=name,
            findings=names,
            values=np.stack(aps),
            resamples=np.stack(resamples),
            by_seed=by_seed,
            section=section,
            networks=networks,
        )

    def fused(self, networks: Sequence[Boxes], fuse: Fuse) -> Boxes:
        """The boxes of several networks in one, at most `MAX_BOXES` per image, as in an ensemble's checkpoint."""
        count, (width, height) = len(self.patients), self.sizes_px.T
        images = zip(*(boxes.scaled(1 / width, 1 / height).by_image(count) for boxes in networks), strict=True)
        kept = (ScoredBoxes(*(part[:MAX_BOXES] for part in image)) for image in fuse(list(images)))
        return Boxes.of_images(list(kept)).scaled(width, height)

    def filtered(self, predicted: Boxes, p_normal: np.ndarray, low: float, high: float) -> Boxes:
        """The boxes after `add_no_finding` with each image's probability (N,) of being normal. An image without any
        box is normal, as in a submission to VinBigData."""
        number, images = len(self.findings), []
        for boxes, p in zip(predicted.by_image(len(self.patients)), p_normal.tolist(), strict=True):
            known = p if len(boxes.scores) else 1.0
            images.append(add_no_finding(boxes, known, low, high, no_finding=number))
        return Boxes.of_images(images)


def fusions(iou: float) -> dict[str, Fuse]:
    """The ways to fuse the boxes of several networks, by name; the first is that of ensembles in checkpoints.

    Args:
        iou: from which on boxes are fused by WBF and NMW. NMS and soft-NMS use .5, as published.
    """
    return {
        "WBF, avg": partial(wbf, iou_thr=iou),
        "WBF, max": partial(wbf, iou_thr=iou, conf_type="max"),
        "WBF, box_and_model_avg": partial(wbf, iou_thr=iou, conf_type="box_and_model_avg"),
        "WBF, absent_model_aware_avg": partial(wbf, iou_thr=iou, conf_type="absent_model_aware_avg"),
        "NMW": partial(nmw, iou_thr=iou),
        "NMS": nms,
        "soft-NMS": soft_nms,
    }


def compare(detections: Detections, fuse: Mapping[str, Fuse], p_normal: np.ndarray | None) -> list[DetectionResult]:
    """All results. In each section, the first one is what the others are compared with.

    Args:
        fuse: ways to fuse boxes, see `fusions`.
        p_normal: (N,) a classifier's probability that each image is normal; None: the filter is left out.
    """
    results = [detections.result(PREPROCESSING, name, of, by_seed=True) for name, of in detections.predicted.items()]
    by_default = next(iter(fuse.values()))
    plain = detections.predicted[PLAIN]
    results += _by_size(detections, by_default)
    if len(plain) > 1:
        results += [
            detections.result(FUSION, name, [detections.fused(plain, how)], networks=len(plain))
            for name, how in fuse.items()
        ]
    if p_normal is not None:
        results += _with_filters(detections, detections.fused(plain, by_default), p_normal, len(plain))
    return results


def _by_size(detections: Detections, fuse: Fuse) -> Iterator[DetectionResult]:
    """Ensembles of 1, 2, … of the networks without preprocessing, and those of networks with different ones."""
    by_name = detections.predicted
    plain, variants = by_name[PLAIN], len(by_name)
    yield detections.result(SIZE, "1 network", plain)
    for size in range(1, len(plain) + 1):
        sets = _some(list(itertools.combinations(plain, size)))
        fused = [detections.fused(networks, fuse) for networks in sets]
        name = "1 network, its own boxes fused" if size == 1 else f"{size} networks"
        yield detections.result(SIZE, name, fused, networks=size)
    if variants > 1:
        fused = [detections.fused(networks, fuse) for networks in zip(*by_name.values(), strict=True)]
        yield detections.result(SIZE, f"{variants}, one of each preprocessing", fused, networks=variants)
        if len(plain) > 1:
            every = [network for of in by_name.values() for network in of]
            yield detections.result(SIZE, "all networks", [detections.fused(every, fuse)], networks=len(every))


def _some(sets: Sequence[tuple[Boxes, ...]]) -> list[tuple[Boxes, ...]]:
    """At most `MAX_SUBSETS` of the sets, spread evenly."""
    chosen = np.unique(np.linspace(0, len(sets) - 1, min(len(sets), MAX_SUBSETS)).astype(int))
    return [sets[number] for number in chosen.tolist()]


def _with_filters(
    detections: Detections, boxes: Boxes, p_normal: np.ndarray, networks: int
) -> Iterator[DetectionResult]:
    count = len(detections.patients)
    own = image_probabilities(boxes, count, len(detections.findings))[:, -1]
    for name, p, low, high in (
        ("no filter", np.zeros(count), LOW, HIGH),
        ("1 − highest score, always added", own, 0.0, math.inf),
        ("classifier, always added", p_normal, 0.0, math.inf),
        (BY_CLASSIFIER, p_normal, LOW, HIGH),
    ):
        yield detections.with_normal(name, detections.filtered(boxes, p, low, high), networks)


def baselines(results: Sequence[DetectionResult]) -> dict[str, DetectionResult]:
    """The result that the others of each section are compared with."""
    return {result.section: result for result in reversed(results)}


def metrics(results: Sequence[DetectionResult]) -> dict[str, float]:
    """Finite metrics by name: SECTION/NAME/map_40 and SECTION/NAME/gain, with _low, _high and _sd."""
    means, first = dict[str, SeedMean](), baselines(results)
    for result in results:
        key = f"{result.section}/{result.name}"
        means |= {f"{key}/map_40": result.mean(), f"{key}/gain": result.gain(first[result.section])}
    return finite(means)
