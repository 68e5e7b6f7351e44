"""Whole archives of phantoms, in ChestX-ray14's native layout with the known truth beside it.

    images/NNNNNNNN_FFF.png        8-bit gray, patient and follow-up number
    Data_Entry_2017_v2020.csv      findings, age, sex, view; written last, so that it marks a finished archive
    BBox_List_2017.csv             exact boxes of every finding, in pixels of a 1024 x 1024 frame whatever the
                                   images' size, as the published list has them; here for training images too
    train_val_list.txt, test_list.txt     disjoint by patient, about one patient in five is for testing
    truth.parquet                  image_id, true_theta, masks at the images' own size

How image `index` of `seed` looks depends on nothing else, not on how many are made: the parts of an archive
can be made in parallel, and a larger one begins with the smaller one.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.errors import UserError
from cxr.phantom.anatomy import Anatomy
from cxr.phantom.film import Film
from cxr.phantom.findings import check_findings, sample_findings
from cxr.phantom.render import Phantom, render, sample_pose
from cxr.schema import FINDINGS
from cxr.sources import chestxray14, rle
from cxr.sources.sidecar import TRUTH_FILE

ENTRY_HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
BOXES_HEADER = "Image Index,Finding Label,Bbox [x,y,w,h],,,"
_ORIGINAL_PX, _ORIGINAL_SPACING_MM = 2048, 0.186  # of the detector that phantoms pretend to come from
_BLOCK = 8  # images among which patients are dealt out
_PATIENT, _IMAGE = 0, 1  # streams of randomness


@dataclass(frozen=True)
class Study:
    """One image of an archive: whose it is, and the phantom itself."""

    patient: int
    follow_up: int
    age: int
    sex: str
    view: str
    phantom: Phantom

    @property
    def image_id(self) -> str:
        return f"{self.patient:08d}_{self.follow_up:03d}.png"

    @property
    def is_test(self) -> bool:
        return self.patient % 5 == 3


def make_study(
    index: int,
    *,
    size: int = 512,
    seed: int = 0,
    findings: Sequence[str] = FINDINGS,
    prevalence: float = 0.5,
    pose: float = 1.0,
) -> Study:
    """Image `index` of the archive that `seed` stands for; see `write_phantom` for the settings."""
    patient, follow_up = patient_of(index, seed)
    anatomy = Anatomy.sample(np.random.default_rng([seed, _PATIENT, patient]))
    rng = np.random.default_rng([seed, _IMAGE, index])
    view = "AP" if rng.random() < 0.35 else "PA"
    anatomy = anatomy.breathing(rng.normal(-0.03 if view == "AP" else 0.0, 0.015))
    phantom = render(
        anatomy,
        sample_findings(rng, findings, prevalence),
        rng,
        size=size,
        pose_unit=sample_pose(rng, pose),
        film=Film.sample(rng, view),
    )
    return Study(patient, follow_up, anatomy.age + follow_up // 2, anatomy.sex, view, phantom)


def patient_of(index: int, seed: int) -> tuple[int, int]:
    """Patient number and follow-up number of image `index`: one to four images a patient, in runs."""
    block, place = divmod(index, _BLOCK)
    sizes = np.random.default_rng([seed, _PATIENT, 0, block]).choice(4, _BLOCK, p=[0.4, 0.25, 0.2, 0.15]) + 1
    ends = np.cumsum(sizes)
    order = int(np.searchsorted(ends, place, side="right"))
    return block * _BLOCK + order + 1, place - int(ends[order] - sizes[order])


def write_phantom(
    out_uri: str,
    count: int,
    *,
    size: int = 512,
    seed: int = 0,
    findings: Sequence[str] = FINDINGS,
    prevalence: float = 0.5,
    pose: float = 1.0,
    on_study: Callable[[Study], None] | None = None,
) -> None:
    """Write an archive of `count` images of `size` x `size` px.

    Args:
        findings: those that may occur.
        prevalence: share of the images that have a finding.
        pose: strength of the random affine pose; 0 leaves every chest upright in the middle.
        on_study: called after each image, to show progress or collect pictures.

    Raises:
        UserError: a setting out of its range, an unknown finding, or nothing can be written to `out_uri`.
    """
    check_settings(count, size, prevalence, pose)
    check_findings(findings)
    entries: list[Sequence[object]] = []
    boxes: list[Sequence[object]] = []
    truth: list[dict[str, object]] = []
    lists: dict[bool, list[str]] = {False: [], True: []}
    for index in range(count):
        study = make_study(index, size=size, seed=seed, findings=findings, prevalence=prevalence, pose=pose)
        storage.write_bytes(storage.join(out_uri, "images", study.image_id), png(study.phantom.pixels))
        entries.append(_entry(study))
        boxes.extend(_boxes(study))
        truth.append(_truth(study))
        lists[study.is_test].append(study.image_id)
        if on_study:
            on_study(study)
    storage.write_bytes(storage.join(out_uri, TRUTH_FILE), _parquet(truth))
    storage.write_text(storage.join(out_uri, chestxray14.BOXES_FILE), _csv(BOXES_HEADER, boxes))
    storage.write_text(storage.join(out_uri, chestxray14.TRAIN_VAL_FILE), "\n".join([*lists[False], ""]))
    storage.write_text(storage.join(out_uri, chestxray14.TEST_FILE), "\n".join([*lists[True], ""]))
    storage.write_text(storage.join(out_uri, chestxray14.ENTRY_FILES[0]), _csv(ENTRY_HEADER, entries))


def check_settings(count: int, size: int, prevalence: float, pose: float) -> None:
    """Raise UserError where a setting is out of its range."""
    if count < 1:
        raise UserError(f"count={count}: wanted 1 or more images")
    if not 64 <= size <= 4096:
        raise UserError(f"size={size}: wanted 64 to 4096 pixels")
    if not 0 <= prevalence <= 1:
        raise UserError(f"prevalence={prevalence}: wanted a share, from 0 to 1")
    if not 0 <= pose <= 2:
        raise UserError(f"pose={pose}: wanted a strength from 0 (none) to 2")


def png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W) as a PNG file."""
    done, data = cv2.imencode(".png", pixels)
    assert done
    return data.tobytes()


def _entry(study: Study) -> Sequence[object]:
    labels = "|".join(study.phantom.labels) or chestxray14.NO_FINDING
    original = (_ORIGINAL_PX, _ORIGINAL_PX, _ORIGINAL_SPACING_MM, _ORIGINAL_SPACING_MM)
    return study.image_id, labels, study.follow_up, study.patient, study.age, study.sex, study.view, *original


def _boxes(study: Study) -> Iterable[Sequence[object]]:
    scale = chestxray14.FRAME_PX / len(study.phantom.pixels)
    for box in study.phantom.boxes:
        x_min, y_min, x_max, y_max = (scale * edge for edge in box.xyxy_px)
        yield (
            study.image_id,
            chestxray14.BOX_WORDS.get(box.label, box.label),
            x_min,
            y_min,
            x_max - x_min,
            y_max - y_min,
        )


def _truth(study: Study) -> dict[str, object]:
    masks = [
        {schema.LABEL: label, schema.MASK_RLE: rle.encode(mask), schema.MASK_URI: None}
        for label, mask in study.phantom.masks.items()
    ]
    pose = study.phantom.pose_unit.reshape(-1).tolist()
    return {schema.IMAGE_ID: study.image_id, schema.TRUE_THETA: pose, schema.MASKS: masks}


def _parquet(rows: list[dict[str, object]]) -> bytes:
    columns = pa.schema([schema.MANIFEST.field(n) for n in (schema.IMAGE_ID, schema.TRUE_THETA, schema.MASKS)])
    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, columns), data)
    return data.getvalue()


def _csv(header: str, rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return f"{header}\n{text.getvalue()}"
