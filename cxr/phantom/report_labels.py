"""Archives of phantoms in the layouts of archives whose labels come from reports, one column or word per finding.

    chexpert:       train.csv, valid.csv, train/patient00001/study1/view1_frontal.jpg …   8-bit JPEG
    mimic-cxr-jpg:  mimic-cxr-2.0.0-{split,metadata,chexpert}.csv.gz, files/p10/p10000001/s5…/….jpg
    padchest:       PADCHEST_….csv.gz, 0/….png: 16-bit gray
    truth.parquet   image_id, true_theta

Image `index` is that of `archive.make_exam`; each is an exam of its own. A report of the first two layouts mentions a
part of what it could: it leaves most absent findings blank, and is uncertain about a few that are there. Lists are
written last, so that they mark a complete archive.
"""

from __future__ import annotations

import csv
import gzip
import io
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Unpack, get_args

import cv2
import numpy as np

from cxr import storage
from cxr.errors import UserError
from cxr.phantom.archive import Exam, ExamSettings, make_exams, png, write_poses
from cxr.schema import FINDINGS
from cxr.sources import chexpert, labeler, mimic_cxr_jpg, padchest

Layout = Literal["chexpert", "mimic-cxr-jpg", "padchest"]
Row = Sequence[object]

PREVALENCE = 0.7  # most images of these archives have a finding
DENIED, UNCERTAIN = 0.25, 0.1  # fraction of absent findings that a report denies, of present ones that it doubts
_JPEG_QUALITY = 95
_REPORT = 3  # another random stream besides those of `archive`
_EXAM_YEAR = 2015

# The labeler's name for each finding of a phantom.
OBSERVATIONS = {
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Effusion": "Pleural Effusion",
    "Infiltration": "Lung Opacity",
    "Mass": "Lung Lesion",
    "Nodule": "Lung Lesion",
    "Pneumonia": "Pneumonia",
    "Pneumothorax": "Pneumothorax",
    "Consolidation": "Consolidation",
    "Edema": "Edema",
    "Emphysema": "Lung Opacity",
    "Fibrosis": "Lung Opacity",
    "Pleural_Thickening": "Pleural Other",
    "Hernia": "Enlarged Cardiomediastinum",
}
# PadChest's word for each finding of a phantom.
WORDS = {
    "Atelectasis": "laminar atelectasis",
    "Cardiomegaly": "cardiomegaly",
    "Effusion": "pleural effusion",
    "Infiltration": "infiltrates",
    "Mass": "pulmonary mass",
    "Nodule": "nodule",
    "Pneumonia": "pneumonia",
    "Pneumothorax": "pneumothorax",
    "Consolidation": "consolidation",
    "Edema": "pulmonary edema",
    "Emphysema": "emphysema",
    "Fibrosis": "pulmonary fibrosis",
    "Pleural_Thickening": "apical pleural thickening",
    "Hernia": "hiatal hernia",
}

SPLIT, METADATA, OBSERVED = (
    f"{file}.gz" for file in (mimic_cxr_jpg.SPLIT_FILE, mimic_cxr_jpg.METADATA_FILE, mimic_cxr_jpg.LABELS_FILES[0])
)
PADCHEST_LIST = f"{padchest.LIST}.gz"
_CHEXPERT_HEADER = (
    chexpert.PATH_COLUMN,
    chexpert.SEX,
    chexpert.AGE,
    chexpert.FRONTAL,
    chexpert.VIEW,
    *labeler.COLUMNS,
)
_HEADERS: dict[str, Row] = {
    "train.csv": _CHEXPERT_HEADER,
    "valid.csv": _CHEXPERT_HEADER,
    SPLIT: (mimic_cxr_jpg.IMAGE, mimic_cxr_jpg.STUDY, mimic_cxr_jpg.SUBJECT, mimic_cxr_jpg.SPLIT),
    METADATA: (
        mimic_cxr_jpg.IMAGE,
        mimic_cxr_jpg.SUBJECT,
        mimic_cxr_jpg.STUDY,
        mimic_cxr_jpg.PROCEDURE,
        mimic_cxr_jpg.VIEW,
    ),
    OBSERVED: (mimic_cxr_jpg.SUBJECT, mimic_cxr_jpg.STUDY, *labeler.COLUMNS),
    PADCHEST_LIST: (
        padchest.IMAGE,
        "ImageDir",
        padchest.STUDY_DATE,
        padchest.STUDY,
        padchest.PATIENT,
        padchest.BIRTH,
        padchest.SEX,
        padchest.PROJECTION,
        padchest.METHOD,
        padchest.LABELS,
    ),
}


def write_report_phantom(
    out_uri: str,
    count: int,
    layout: Layout,
    *,
    prevalence: float = PREVALENCE,
    **settings: Unpack[ExamSettings],
) -> None:
    """Write an archive of `count` images in this layout.

    Args:
        prevalence: fraction of images with a finding.
        settings: see `make_exams`.

    Raises:
        UserError: the layout is unknown, a setting is out of range, or `out_uri` is not writable.
    """
    if layout not in get_args(Layout):
        raise UserError(f"expected layout {', '.join(get_args(Layout))}, got {layout!r}: choose one of these")
    describe = {"chexpert": _chexpert, "mimic-cxr-jpg": _mimic, "padchest": _padchest}[layout]
    lists: dict[str, list[Row]] = {}
    poses: dict[str, np.ndarray] = {}
    for exam in make_exams(count, findings=FINDINGS, prevalence=prevalence, **settings):
        image = describe(exam)
        data = png(exam.phantom.pixels.astype(np.uint16) << 4) if layout == "padchest" else _jpeg(exam.phantom.pixels)
        storage.write_bytes(storage.join(out_uri, image.path), data)
        for file, row in image.rows.items():
            lists.setdefault(file, []).append(row)
        poses[image.id] = exam.phantom.pose_unit
    write_poses(out_uri, poses)
    for file, rows in lists.items():
        text = _csv([_HEADERS[file], *rows]).encode()
        storage.write_bytes(
            storage.join(out_uri, file), gzip.compress(text, mtime=0) if file.endswith(".gz") else text
        )


@dataclass(frozen=True)
class _Image:
    """An image's id in the manifest, its path, and its row in each list."""

    id: str
    path: str
    rows: dict[str, Row]


def _chexpert(exam: Exam) -> _Image:
    part = "valid" if exam.is_test else "train"
    key = f"patient{exam.patient:05d}/study{exam.follow_up + 1}/view1_frontal"
    path = f"{part}/{key}.jpg"
    sex = {"F": "Female", "M": "Male"}[exam.sex]
    row = (f"CheXpert-v1.0-small/{path}", sex, exam.age, "Frontal", exam.view, *observations(exam))
    return _Image(key, path, {f"{part}.csv": row})


def _mimic(exam: Exam) -> _Image:
    digits = uuid.uuid5(uuid.NAMESPACE_OID, f"cxr phantom mimic {exam.seed} {exam.index}").hex
    image = "-".join((digits + digits)[start : start + 8] for start in range(0, 40, 8))
    subject, study = 10_000_000 + exam.patient, 50_000_000 + exam.index
    split = "test" if exam.is_test else "validate" if exam.patient % 5 == 1 else "train"
    rows: dict[str, Row] = {
        SPLIT: (image, study, subject, split),
        METADATA: (
            image,
            subject,
            study,
            f"CHEST ({'PORTABLE AP' if exam.view == 'AP' else 'PA AND LAT'})",
            exam.view,
        ),
        OBSERVED: (subject, study, *observations(exam)),
    }
    return _Image(image, f"files/p{str(subject)[:2]}/p{subject}/s{study}/{image}.jpg", rows)


def _padchest(exam: Exam) -> _Image:
    study = uuid.uuid5(uuid.NAMESPACE_OID, f"cxr phantom padchest {exam.seed} {exam.index}").int
    image = f"{study}_{exam.index:06x}.png"
    words = [WORDS[finding] for finding in exam.phantom.labels] or ["normal"]
    birth, method = float(_EXAM_YEAR - exam.age), "Physician" if exam.index % 4 == 0 else "RNN_model"
    row = (image, 0, f"{_EXAM_YEAR}0701", study, exam.patient, birth, exam.sex, exam.view, method, words)
    return _Image(image, f"0/{image}", {PADCHEST_LIST: row})


def observations(exam: Exam) -> list[str]:
    """The labels of a report on the image, in the order of `labeler.COLUMNS`; see the module."""
    rng = np.random.default_rng([exam.seed, _REPORT, exam.index])
    present = {OBSERVATIONS[finding] for finding in exam.phantom.labels}
    values = []
    for name, draw in zip(labeler.FINDINGS, rng.random(len(labeler.FINDINGS)), strict=True):
        if name in present:
            values.append("-1.0" if draw < UNCERTAIN else "1.0")
        else:
            values.append("0.0" if draw < DENIED else "")
    return ["" if present else "1.0", *values]


def _jpeg(pixels: np.ndarray) -> bytes:
    done, data = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    assert done
    return data.tobytes()


def _csv(rows: Iterable[Row]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue()
