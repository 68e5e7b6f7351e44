"""Archives of phantoms in ChestX-ray14's layout, with ground truth.

    images/NNNNNNNN_FFF.png        8-bit gray, patient and follow-up number
    Data_Entry_2017_v2020.csv      findings, age, sex, view; written last, so that it marks a complete archive
    BBox_List_2017.csv             exact boxes of every finding, in pixels of a 1024 x 1024 image as in the published
                                   list, but for training images too
    train_val_list.txt, test_list.txt     disjoint by patient; about one in five is a test patient
    truth.parquet                  image_id, true_theta, masks at the images' own size

An image depends only on its `index` and the `seed`, not on the number of images: parts of an archive can be made in
parallel, and a larger archive begins with the images of a smaller one.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict, Unpack

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
SMALLEST_PX, LARGEST_PX = 64, 4096  # height and width of an image
_ORIGINAL_PX, _ORIGINAL_SPACING_MM = 2048, 0.186  # of the simulated detector
_BLOCK = 8  # images; a patient's images are within one block
_PATIENT, _IMAGE = 0, 1  # random streams


@dataclass(frozen=True)
class Exam:
    """An image of an archive: its patient, and the phantom itself."""

    index: int
    seed: int
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


def make_exam(
    index: int,
    *,
    size: int = 512,
    seed: int = 0,
    findings: Sequence[str] = FINDINGS,
    prevalence: float = 0.5,
    pose: float = 1.0,
) -> Exam:
    """Image `index` of the archive with this `seed`; see `write_phantom` for the settings."""
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
    return Exam(index, seed, patient, follow_up, anatomy.age + follow_up // 2, anatomy.sex, view, phantom)


class ExamSettings(TypedDict, total=False):
    """Settings that the writers of all layouts share."""

    size: int
    """Height and width of the images in pixels; 512 by default."""
    seed: int
    """Random seed; 0 by default."""
    pose: float
    """Strength of the random affine pose; 0 leaves every chest upright and centered. 1 by default."""
    on_exam: Callable[[Exam], None] | None
    """Called after each image has been written, for example to show progress."""


def make_exams(
    count: int,
    *,
    findings: Sequence[str],
    prevalence: float,
    size: int = 512,
    seed: int = 0,
    pose: float = 1.0,
    on_exam: Callable[[Exam], None] | None = None,
) -> Iterator[Exam]:
    """The images of an archive, in order; see `ExamSettings`.

    Args:
        findings: findings that may occur.
        prevalence: fraction of images with a finding.

    Raises:
        UserError: a setting is out of range, or a finding is unknown.
    """
    check_settings(count, size, prevalence, pose)
    check_findings(findings)
    for index in range(count):
        exam = make_exam(index, size=size, seed=seed, findings=findings, prevalence=prevalence, pose=pose)
        yield exam
        if on_exam:
            on_exam(exam)


def patient_of(index: int, seed: int) -> tuple[int, int]:
    """Patient number and follow-up number of image `index`; a patient has one to four consecutive images."""
    block, position = divmod(index, _BLOCK)
    sizes = np.random.default_rng([seed, _PATIENT, 0, block]).choice(4, _BLOCK, p=[0.4, 0.25, 0.2, 0.15]) + 1
    ends = np.cumsum(sizes)
    order = int(np.searchsorted(ends, position, side="right"))
    return block * _BLOCK + order + 1, position - int(ends[order] - sizes[order])


def write_phantom(
    out_uri: str,
    count: int,
    *,
    findings: Sequence[str] = FINDINGS,
    prevalence: float = 0.5,
    **settings: Unpack[ExamSettings],
) -> None:
    """Write an archive of `count` images; see `make_exams` for the settings.

    Raises:
        UserError: a setting is out of range, a finding is unknown, or `out_uri` is not writable.
    """
    entries: list[Sequence[object]] = []
    boxes: list[Sequence[object]] = []
    truth: list[dict[str, object]] = []
    lists: dict[bool, list[str]] = {False: [], True: []}
    for exam in make_exams(count, findings=findings, prevalence=prevalence, **settings):
        storage.write_bytes(storage.join(out_uri, "images", exam.image_id), png(exam.phantom.pixels))
        entries.append(_entry(exam))
        boxes.extend(_boxes(exam))
        truth.append(_truth(exam))
        lists[exam.is_test].append(exam.image_id)
    storage.write_bytes(storage.join(out_uri, TRUTH_FILE), _parquet(truth))
    storage.write_text(storage.join(out_uri, chestxray14.BOXES_FILE), _csv(BOXES_HEADER, boxes))
    storage.write_text(storage.join(out_uri, chestxray14.TRAIN_VAL_FILE), "\n".join([*lists[False], ""]))
    storage.write_text(storage.join(out_uri, chestxray14.TEST_FILE), "\n".join([*lists[True], ""]))
    storage.write_text(storage.join(out_uri, chestxray14.ENTRY_FILES[0]), _csv(ENTRY_HEADER, entries))


def check_settings(count: int, size: int, prevalence: float, pose: float) -> None:
    """Raise UserError if a setting is out of range."""
    if count < 1:
        raise UserError(f"expected a count of 1 or more, got {count}")
    if not SMALLEST_PX <= size <= LARGEST_PX:
        raise UserError(f"expected a size from {SMALLEST_PX} to {LARGEST_PX} pixels, got {size}")
    if not 0 <= prevalence <= 1:
        raise UserError(f"expected a prevalence from 0 to 1, got {prevalence}")
    if not 0 <= pose <= 2:
        raise UserError(f"expected a pose from 0 (none) to 2, got {pose}")


def png(pixels: np.ndarray) -> bytes:
    """Encode uint8 (H, W) as a PNG file."""
    done, data = cv2.imencode(".png", pixels)
    assert done
    return data.tobytes()


def _entry(exam: Exam) -> Sequence[object]:
    labels = "|".join(exam.phantom.labels) or chestxray14.NO_FINDING
    original = (_ORIGINAL_PX, _ORIGINAL_PX, _ORIGINAL_SPACING_MM, _ORIGINAL_SPACING_MM)
    return exam.image_id, labels, exam.follow_up, exam.patient, exam.age, exam.sex, exam.view, *original


def _boxes(exam: Exam) -> Iterable[Sequence[object]]:
    scale = chestxray14.FRAME_PX / len(exam.phantom.pixels)
    for box in exam.phantom.boxes:
        x_min, y_min, x_max, y_max = (scale * edge for edge in box.xyxy_px)
        yield (
            exam.image_id,
            chestxray14.BOX_WORDS.get(box.label, box.label),
            x_min,
            y_min,
            x_max - x_min,
            y_max - y_min,
        )


def _truth(exam: Exam) -> dict[str, object]:
    masks = [
        {schema.LABEL: label, schema.MASK_RLE: rle.encode(mask), schema.MASK_URI: None}
        for label, mask in exam.phantom.masks.items()
    ]
    pose = exam.phantom.pose_unit.reshape(-1).tolist()
    return {schema.IMAGE_ID: exam.image_id, schema.TRUE_THETA: pose, schema.MASKS: masks}


def _parquet(rows: list[dict[str, object]]) -> bytes:
    columns = pa.schema([schema.MANIFEST.field(n) for n in (schema.IMAGE_ID, schema.TRUE_THETA, schema.MASKS)])
    data = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, columns), data)
    return data.getvalue()


def write_poses(out_uri: str, poses: Mapping[str, np.ndarray]) -> None:
    """Write a truth.parquet with image_id and true_theta, from each image's (2, 3) pose."""
    columns = pa.schema([schema.MANIFEST.field(name) for name in (schema.IMAGE_ID, schema.TRUE_THETA)])
    rows = pa.table([list(poses), [pose.reshape(-1).tolist() for pose in poses.values()]], schema=columns)
    data = io.BytesIO()
    pq.write_table(rows, data)
    storage.write_bytes(storage.join(out_uri, TRUTH_FILE), data.getvalue())


def _csv(header: str, rows: Iterable[Sequence[object]]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return f"{header}\n{text.getvalue()}"
