"""Archives of phantoms in the layouts of SIIM-ACR Pneumothorax (`sources.siim`), some with a pneumothorax.

    siim:      dicom-images-train/STUDY/SERIES/IMAGE.dcm   8-bit gray as JPEG baseline, named by SOP Instance UID
               train-rle.csv                               one row per piece of the pneumothorax; -1 for none
    siim-png:  png_images/, png_masks/                     8-bit gray; 0 and 255
               stage_1_train_images.csv, stage_1_test_images.csv   the latter lists about one image in five
    truth.parquet                                          image_id, true_theta

Image `index` is that of `archive.make_exam`; each image counts as another patient, as in the original. The lists are
written last, so that they mark a complete archive.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Iterator
from typing import Literal, Unpack, get_args

import cv2
import numpy as np

from cxr import storage
from cxr.errors import UserError
from cxr.phantom.archive import Exam, ExamSettings, make_exams, png, write_poses
from cxr.sources import rle, siim

Layout = Literal["siim", "siim-png"]

PREVALENCE = 0.22  # 2,669 of 12,047 images
SPACING_MM = 0.168  # as in most files of the release
_JPEG_QUALITY = 95
_SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"

_HEADERS = {
    siim.CODES_FILE: f"{siim.IMAGE_ID}, {siim.CODE}",
    siim.TRAIN_FILE: f"{siim.FILE_NAME},{siim.IMAGE_ID},{siim.HAS_PNEUMOTHORAX}",
    siim.TEST_FILE: f"{siim.FILE_NAME},{siim.IMAGE_ID},{siim.HAS_PNEUMOTHORAX}",
}

Rows = list[str]


def write_siim_phantom(
    out_uri: str,
    count: int,
    layout: Layout = "siim",
    *,
    prevalence: float = PREVALENCE,
    **settings: Unpack[ExamSettings],
) -> None:
    """Write an archive of `count` images in this layout.

    Args:
        prevalence: fraction of images with a pneumothorax, the only finding.
        settings: see `make_exams`.

    Raises:
        UserError: the layout is unknown, a setting is out of range, or `out_uri` is not writable.
    """
    if layout not in get_args(Layout):
        raise UserError(f"expected layout {' or '.join(get_args(Layout))}, got {layout!r}: choose one of these")
    write = _write_dicom if layout == "siim" else _write_pngs
    lists: dict[str, Rows] = {}
    poses: dict[str, np.ndarray] = {}
    for exam in make_exams(count, findings=(siim.FINDING,), prevalence=prevalence, **settings):
        file, rows = write(out_uri, exam)
        lists.setdefault(file, []).extend(rows)
        poses[image_uid(exam.index, exam.seed)] = exam.phantom.pose_unit
    write_poses(out_uri, poses)
    for file, rows in lists.items():
        storage.write_text(storage.join(out_uri, file), "\n".join([_HEADERS[file], *rows, ""]))


def image_uid(index: int, seed: int, level: str = "image") -> str:
    """The SOP Instance UID of image `index`, or the UID of its "study" or "series", derived from a UUID (PS3.5
    B.2)."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'cxr phantom {seed} {index} {level}').int}"


def _write_dicom(out_uri: str, exam: Exam) -> tuple[str, Rows]:
    """Write an image; return the name of the list that contains it, and its rows there."""
    folders = (image_uid(exam.index, exam.seed, level) for level in ("study", "series"))
    image = image_uid(exam.index, exam.seed)
    location = storage.join(out_uri, "dicom-images-train", *folders, f"{image}.dcm")
    storage.write_bytes(location, dicom(exam))
    return siim.CODES_FILE, [f"{image}, {code}" for code in _codes(exam)]


def _codes(exam: Exam) -> Iterator[str]:
    """One code per connected piece of the pneumothorax; -1 if there is none."""
    mask = exam.phantom.masks.get(siim.FINDING)
    if mask is None:
        yield rle.EMPTY
        return
    count, pieces = cv2.connectedComponents(mask.astype(np.uint8))
    yield from (rle.encode(pieces == number) for number in range(1, count))


def dicom(exam: Exam) -> bytes:
    """A DICOM file like those of the release: JPEG baseline pixels, and tags of a fictitious patient."""
    from pydicom import uid  # pydicom takes half a second to import
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate

    file = FileDataset("", {}, preamble=bytes(128), file_meta=FileMetaDataset())
    file.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    file.SOPClassUID, file.SOPInstanceUID = _SECONDARY_CAPTURE, image_uid(exam.index, exam.seed)
    file.StudyInstanceUID, file.SeriesInstanceUID = (
        image_uid(exam.index, exam.seed, level) for level in ("study", "series")
    )
    file.Modality, file.BodyPartExamined, file.ViewPosition = "CR", "CHEST", exam.view
    file.PatientID = file.PatientName = f"phantom-{exam.seed}-{exam.index}"
    file.PatientAge, file.PatientSex = f"{exam.age:03d}Y", exam.sex
    file.Rows, file.Columns = exam.phantom.pixels.shape
    file.PixelSpacing = [SPACING_MM, SPACING_MM]
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 0
    file.BitsAllocated = file.BitsStored = 8
    file.HighBit, file.LossyImageCompression = 7, "01"
    done, jpeg = cv2.imencode(".jpg", exam.phantom.pixels, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    assert done
    file.PixelData = encapsulate([jpeg.tobytes()])
    file["PixelData"].VR = "OB"
    stream = io.BytesIO()
    file.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _write_pngs(out_uri: str, exam: Exam) -> tuple[str, Rows]:
    """Write an image and its mask; return the name of the list that contains it, and its row there."""
    pixels, mask = exam.phantom.pixels, exam.phantom.masks.get(siim.FINDING)
    part, has_pneumothorax = ("test" if exam.is_test else "train"), int(mask is not None)
    file = f"{exam.index}_{part}_{has_pneumothorax}_.png"
    mask_pixels = np.zeros_like(pixels) if mask is None else mask * np.uint8(255)
    storage.write_bytes(storage.join(out_uri, siim.IMAGES, file), png(pixels))
    storage.write_bytes(storage.join(out_uri, siim.MASKS, file), png(mask_pixels))
    listed_in = siim.TEST_FILE if exam.is_test else siim.TRAIN_FILE
    return listed_in, [f"{file},{image_uid(exam.index, exam.seed)},{has_pneumothorax}"]
