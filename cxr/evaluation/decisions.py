"""What reports say about decisions by finding: operating points, labels and predictions, hardest cases."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from cxr import storage
from cxr.evaluation.classification_data import LabeledScores
from cxr.evaluation.heat_maps import heat_maps
from cxr.evaluation.images import TruthImages
from cxr.evaluation.run import ReportOptions, Run, checkpoint_uri, thresholds_of
from cxr.metrics import classification
from cxr.metrics.classification import Criterion, OperatingPoint
from cxr.metrics.localization import Boxes
from cxr.reporting import classification_pictures, thresholds
from cxr.reporting.attention import heated
from cxr.reporting.detection import LABEL, PREDICTION, distribution_figure
from cxr.reporting.overlays import BoxPair, MaskPair, Message, Overlay, save_overlays
from cxr.reporting.page import Block, Details, Section, save_picture
from cxr.reporting.tables import csv_text
from cxr.schema import NEGATIVE, POSITIVE, UNKNOWN

OWN, YOUDEN, SENSITIVE = "this run", "Youden's index", "sensitivity of at least 0.95"
SHOWN = 4  # images of each kind of error
PER_FINDING = 2  # of them with the same finding
LISTED = 50  # errors of each kind in hardest.csv
FALSE_POSITIVES, FALSE_NEGATIVES = "false positives", "false negatives"


def run_thresholds(run: Run) -> dict[str, float]:
    """The thresholds by finding with which a run decided, as far as they are known; see `thresholds_of`."""
    uri = checkpoint_uri(run)
    return thresholds_of(run, _about(storage.join(uri, "checkpoint.json")) if uri else {})


@dataclass(frozen=True)
class BoxLimits:
    """The lowest scores of boxes that count as predicted: the run's thresholds, else the score of the options."""

    scores: np.ndarray  # (F,)
    text: str

    @classmethod
    def of(cls, run: Run, findings: Sequence[str], options: ReportOptions) -> BoxLimits:
        own = run.box_thresholds
        scores = np.array([own.get(finding, options.box_score) for finding in findings], np.float64)
        of_run = any(finding in own for finding in findings)
        return cls(scores, "of at least the finding's threshold" if of_run else f"of {options.box_score:g} or more")

    def reached(self, boxes: Boxes) -> Boxes:
        """The boxes that count as predicted."""
        return boxes.at(boxes.score >= self.scores[boxes.finding])


def _about(uri: str) -> dict[str, Any]:
    try:
        return json.loads(storage.read_bytes(uri))
    except (OSError, ValueError):  # moved, deleted, or not accessible from here
        return {}


def operating_section(
    joined: LabeledScores,
    own_thresholds: Mapping[str, float],
    options: ReportOptions,
    out: str,
    result: dict[str, Any],
) -> Section:
    """Sensitivity, specificity and predictive values with the run's thresholds, and with others for comparison.

    Writes operating_points.csv, which is added to `result`.
    """
    bootstrap = {"resamples": options.resamples, "seed": options.seed}
    own = [own_thresholds.get(finding, math.nan) for finding in joined.findings]
    decided = {OWN: (joined.predicted_positive == 1, own)}
    for name, criterion in ((YOUDEN, Criterion("youden")), (SENSITIVE, Criterion("sensitivity", 0.95))):
        chosen = classification.choose_thresholds(
            joined.probabilities, joined.labels, criterion.rule, criterion.at_least
        )
        values = np.where([note == "" for note in chosen.notes], chosen.values, math.nan)
        decided[name] = (joined.probabilities >= chosen.values, values.tolist())
    points = {
        name: classification.operating_points(positive, joined.labels, joined.patients, **bootstrap)
        for name, (positive, _) in decided.items()
    }
    values = {name: value for name, (_, value) in decided.items()}
    result["operating_points"] = storage.join(out, "operating_points.csv")
    rows = [
        {"finding": finding, "chosen_by": name, "threshold": values[name][f]} | _plain(points[name][f])
        for f, finding in enumerate(joined.findings)
        for name in decided
    ]
    storage.write_text(result["operating_points"], csv_text(rows))
    for f, finding in enumerate(joined.findings):
        for share in ("sensitivity", "specificity"):
            result["metrics"][f"{share}/{finding}"] = getattr(points[OWN][f], share).value
    others = [
        Details(
            f"Thresholds chosen on these images: {name}",
            [thresholds.points_table(points[name], values[name], joined.findings)],
        )
        for name in (YOUDEN, SENSITIVE)
    ]
    return Section(
        "Operating points",
        [
            thresholds.points_table(points[OWN], own, joined.findings),
            thresholds.points_legend(options.resamples),
            *others,
        ],
    )


def _plain(point: OperatingPoint) -> dict[str, float]:
    values: dict[str, float] = {}
    for name, of in vars(point).items():
        if isinstance(of, int):
            values[name] = of
        else:
            values |= {name: of.value, f"{name}_low": of.low, f"{name}_high": of.high}
    return values


def label_blocks(joined: LabeledScores, folder: str, value: str = "probability") -> list[Block]:
    """Pictures of labels beside predictions, and of the values of images with and without each finding."""
    known = joined.labels != UNKNOWN
    labeled = (joined.labels == POSITIVE).sum(0)
    predicted = ((joined.predicted_positive == 1) & known).sum(0)
    blocks: list[Block] = []
    if labeled.any() or predicted.any():
        title = "Images by finding, among those with a known label"
        figure = distribution_figure({LABEL: labeled, PREDICTION: predicted}, joined.findings, title, "images")
        caption = "Number of images that are labeled with each finding, and of images in which it is predicted."
        blocks.append(save_picture(figure, folder, "labels_predicted.png", caption))
    figure = classification_pictures.separation_figure(joined.findings, joined.probabilities, joined.labels, value)
    if figure is not None:
        caption = f"Distribution of the {value} over the images with and without each finding."
        blocks.append(save_picture(figure, folder, "separation.png", caption))
    return blocks


@dataclass(frozen=True)
class Case:
    """A wrong decision: the place of the image among the evaluated ones, and of the finding."""

    image: int
    finding: int


def wrong_decisions(joined: LabeledScores) -> dict[str, list[Case]]:
    """False positives and false negatives, the most confident first.

    Probabilities of different findings cannot be compared. A false positive is the more confident, the fewer images
    have a higher probability of the finding; a false negative, the fewer have a lower one.
    """
    known = joined.labels != UNKNOWN
    called = joined.predicted_positive == 1
    cases = {}
    for name, wrong, sign in (
        (FALSE_POSITIVES, called & (joined.labels == NEGATIVE), -1),
        (FALSE_NEGATIVES, ~called & (joined.labels == POSITIVE), 1),
    ):
        images, findings = np.nonzero(wrong & known)
        ahead = np.zeros(len(images))  # share of the known images whose value is beyond that of the case
        for f in np.unique(findings).tolist():
            values, own = np.sort(sign * joined.probabilities[known[:, f], f]), findings == f
            ahead[own] = np.searchsorted(values, sign * joined.probabilities[images[own], f]) / len(values)
        order = np.lexsort((sign * joined.probabilities[images, findings], ahead)) if len(images) else []
        cases[name] = [Case(int(images[at]), int(findings[at])) for at in order]
    return cases


def varied(cases: Sequence[Case], shown: set[int]) -> list[Case]:
    """The first cases, without repeating an image, and with few of the same finding if there are several. Adds to
    `shown`."""
    chosen: list[Case] = []
    most = PER_FINDING if len({case.finding for case in cases}) > 1 else SHOWN
    for case in cases:
        if case.image not in shown and sum(case.finding == other.finding for other in chosen) < most:
            chosen.append(case)
            shown.add(case.image)
        if len(chosen) == SHOWN:
            break
    return chosen


Drawn = Callable[[Case, np.ndarray, Any], BoxPair | MaskPair | Message | None]
"""What to draw over the picture of a case, from the picture and its transform to the original."""


def hardest_section(
    joined: LabeledScores,
    images: TruthImages,
    run: Run,
    out: str,
    folder: str,
    result: dict[str, Any],
    *,
    value: str = "probability",
    digits: int = 2,
    draw: Drawn | None = None,
    with_heat_maps: bool = True,
) -> Section:
    """The most confident wrong decisions as pictures. Writes hardest.csv, which is added to `result`.

    Args:
        value: what a threshold is compared with, shown with so many `digits`.
        draw: what to draw over the pictures, such as boxes.
    """
    cases, ids = wrong_decisions(joined), images.ids(joined.rows)
    if not any(cases.values()):
        return Section("Hardest cases", ["There are no wrong decisions."])
    result["hardest"] = storage.join(out, "hardest.csv")
    storage.write_text(result["hardest"], csv_text(_listed(cases, joined, ids, value)))
    shown = set[int]()
    chosen = {kind: varied(some, shown) for kind, some in cases.items()}
    pictures = images.pictures(sorted(int(joined.rows[image]) for image in shown))
    visible = {
        kind: [case for case in some if int(joined.rows[case.image]) in pictures] for kind, some in chosen.items()
    }
    maps = {}
    if with_heat_maps:
        sources = {ids[case.image]: images.source(int(joined.rows[case.image])) for case in chain(*visible.values())}
        maps = heat_maps(run, {image_id: uri for image_id, uri in sources.items() if uri})
    overlays: dict[str, list[Overlay]] = {}
    for kind, some in visible.items():
        label = "absent" if kind == FALSE_POSITIVES else "present"
        plain: list[Overlay] = []
        heat: list[Overlay] = []
        for case in some:
            (picture, transform), image_id = pictures[int(joined.rows[case.image])], ids[case.image]
            finding = joined.findings[case.finding]
            said = f"{joined.probabilities[case.image, case.finding]:.{digits}f}"
            pair = draw(case, picture, transform) if draw else None
            plain.append(Overlay(image_id, f"{finding}, {value} {said}, label: {label}", picture, pair))
            if (heat_map := maps.get(image_id)) is not None and finding in heat_map.findings:
                map_HW = heat_map.on_picture(finding, transform, len(picture))
                warm = heated(picture, map_HW / max(1e-6, float(map_HW.max())))
                heat.append(Overlay(image_id, f"heat map of {finding}", warm))
        overlays |= {kind: plain, f"{kind} with heat maps": heat}
    text = _hardest_text(cases, value, with_maps=bool(maps))
    caption = "The most confident wrong decisions."
    return Section("Hardest cases", [text, *save_overlays(overlays, folder, "hardest.png", caption)])


def _listed(
    cases: Mapping[str, Sequence[Case]], joined: LabeledScores, ids: Sequence[str], value: str
) -> list[dict[str, Any]]:
    """The rows of hardest.csv."""
    return [
        {
            "kind": kind.removesuffix("s"),
            "image_id": ids[case.image],
            "finding": joined.findings[case.finding],
            value.replace(" ", "_"): float(joined.probabilities[case.image, case.finding]),
        }
        for kind, some in cases.items()
        for case in some[:LISTED]
    ]


def _hardest_text(cases: Mapping[str, Sequence[Case]], value: str, *, with_maps: bool) -> str:
    text = (
        f"{len(cases[FALSE_POSITIVES]):,} false positives and {len(cases[FALSE_NEGATIVES]):,} false negatives. Shown "
        f"are the most confident ones: false positives whose {value} few images exceed, and false negatives with the "
        f"lowest. Labels can be wrong, too: check these images first. `hardest.csv` lists up to {LISTED} of each."
    )
    if with_maps:
        text += " Each heat map is scaled to its own maximum: it shows where the evidence is, not how much."
    return text
