"""Archives of phantoms in the layout of the RSNA Pneumonia Detection Challenge (`sources.rsna_pneumonia`).

    stage_2_train_images/IMAGE.dcm, stage_2_test_images/IMAGE.dcm    8-bit gray as JPEG baseline
    stage_2_train_labels.csv, stage_2_detailed_class_info.csv        boxes and classes of the training images
    pneumonia-challenge-dataset-mappings_2018.json                   the patients, under names as in ChestX-ray14
    truth.parquet                                                    image_id, true_theta

Image `index` is that of `archive.make_exam`. A phantom with pneumonia, infiltration or consolidation has the class
Lung Opacity, and a box around each; one with other findings is not normal. Boxes are in pixels of a 1024 x 1024
image.
"""

from __future__ import annotations

import json
import uuid
from typing import Unpack

import numpy as np

from cxr import storage
from cxr.phantom.archive import Exam, ExamSettings, make_exams, write_poses
from cxr.phantom.siim import dicom
from cxr.schema import FINDINGS
from cxr.sources import rsna_pneumonia

OPACITIES = ("Pneumonia", "Infiltration", "Consolidation")
PREVALENCE = 0.67  # 17,833 of 26,684 images are not normal


def write_rsna_phantom(
    out_uri: str,
    count: int,
    *,
    prevalence: float = PREVALENCE,
    **settings: Unpack[ExamSettings],
) -> None:
    """Write an archive of `count` images.

    Args:
        prevalence: fraction of images with a finding of any kind.
        settings: see `make_exams`.

    Raises:
        UserError: a setting is out of range, or `out_uri` is not writable.
    """
    labels = [",".join((rsna_pneumonia.IMAGE, *rsna_pneumonia.BOX, rsna_pneumonia.TARGET))]
    classes = [f"{rsna_pneumonia.IMAGE},{rsna_pneumonia.CLASS}"]
    mapping: list[dict[str, str]] = []
    poses: dict[str, np.ndarray] = {}
    for exam in make_exams(count, findings=FINDINGS, prevalence=prevalence, **settings):
        image = image_id(exam.index, exam.seed)
        folder = "stage_2_test_images" if exam.is_test else "stage_2_train_images"
        storage.write_bytes(storage.join(out_uri, folder, f"{image}.dcm"), dicom(exam))
        if not exam.is_test:
            boxes = opacities(exam)
            labels += [f"{image},{','.join(map(str, box))},1" for box in boxes] or [f"{image},,,,,0"]
            normal_class = "No Lung Opacity / Not Normal" if exam.phantom.labels else "Normal"
            classes += [f"{image},{'Lung Opacity' if boxes else normal_class}"] * max(1, len(boxes))
        mapping.append({rsna_pneumonia.MAPPED_IMAGE: image, rsna_pneumonia.NIH_IMAGE: exam.image_id})
        poses[image] = exam.phantom.pose_unit
    write_poses(out_uri, poses)
    storage.write_text(storage.join(out_uri, rsna_pneumonia.MAPPING_FILE), json.dumps(mapping))
    storage.write_text(storage.join(out_uri, rsna_pneumonia.CLASSES_FILE), "\n".join([*classes, ""]))
    storage.write_text(storage.join(out_uri, rsna_pneumonia.LABELS_FILE), "\n".join([*labels, ""]))


def image_id(index: int, seed: int) -> str:
    return str(uuid.uuid5(uuid.NAMESPACE_OID, f"cxr phantom rsna {seed} {index}"))


def opacities(exam: Exam) -> list[tuple[float, ...]]:
    """x, y, width and height of each opacity, in pixels of a 1024 x 1024 image."""
    scale = rsna_pneumonia.FRAME_PX / len(exam.phantom.pixels)
    corners = [box.xyxy_px for box in exam.phantom.boxes if box.label in OPACITIES]
    return [(scale * x, scale * y, scale * (right - x), scale * (lower - y)) for x, y, right, lower in corners]
