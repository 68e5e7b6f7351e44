"""Whole archives of phantoms in the layouts of SIIM-ACR Pneumothorax (`sources.siim`): some with a pneumothorax.

    siim:      dicom-images-train/STUDY/SERIES/IMAGE.dcm   8-bit gray as JPEG baseline, named by SOP Instance UID
               train-rle.csv                               a row a piece of the pneumothorax, -1 for none
    siim-png:  png_images/, png_masks/                     8-bit gray; 0 and 255
               stage_1_train_images.csv, stage_1_test_images.csv   the latter has about one image in five
    truth.parquet                                          image_id, true_theta

Image `index` is that of `archive.make_study`, and the patient counts as another one each time, as in the original.
The lists are written last, so that they mark a finished archive.
"""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable, Iterator
from typing import Literal, get_args

import cv2
import numpy as np

from cxr import schema, storage
from cxr.errors import UserError
from cxr.phantom.archive import Study, check_settings, make_study, png
from cxr.phantom.nlm import poses_parquet
from cxr.sources import rle, siim
from cxr.sources.sidecar import TRUTH_FILE

Layout = Literal["siim", "siim-png"]

PREVALENCE = 0.22  # 2,669 of 12,047 images
SPACING_MM = 0.168  # as most files there say
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
    size: int = 512,
    seed: int = 0,
    prevalence: float = PREVALENCE,
    pose: float = 1.0,
    on_study: Callable[[Study], None] | None = None,
) -> None:
    """Write an archive of `count` images in that layout.

    Args:
        prevalence: share of the images with a pneumothorax, the only finding drawn.
        size, seed, pose, on_study: as in `archive.write_phantom`.

    Raises:
        UserError: an unknown layout, a setting out of its range, or nothing can be written to `out_uri`.
    """
    if layout not in get_args(Layout):
        raise UserError(f"layout={layout!r}: wanted one of {', '.join(get_args(Layout))}")
    check_settings(count, size, prevalence, pose)
    write = _write_dicom if layout == "siim" else _write_pictures
    lists: dict[str, Rows] = {}
    poses: list[dict[str, object]] = []
    for index in range(count):
        study = make_study(index, size=size, seed=seed, findings=(siim.FINDING,), prevalence=prevalence, pose=pose)
        file, rows = write(out_uri, study, index, seed)
        lists.setdefault(file, []).extend(rows)
        image = image_uid(index, seed)
        poses.append({schema.IMAGE_ID: image, schema.TRUE_THETA: study.phantom.pose_unit.reshape(-1).tolist()})
        if on_study:
            on_study(study)
    storage.write_bytes(storage.join(out_uri, TRUTH_FILE), poses_parquet(poses))
    for file, rows in lists.items():
        storage.write_text(storage.join(out_uri, file), "\n".join([_HEADERS[file], *rows, ""]))


def image_uid(index: int, seed: int, level: str = "image") -> str:
    """The SOP Instance UID of image `index`, or that of its "study" or "series" (PS3.5 B.2: made of a UUID)."""
    return f"2.25.{uuid.uuid5(uuid.NAMESPACE_OID, f'cxr phantom {seed} {index} {level}').int}"


def _write_dicom(out_uri: str, study: Study, index: int, seed: int) -> tuple[str, Rows]:
    """Write one image; the name of the list that speaks of it, and its rows there."""
    folders = (image_uid(index, seed, level) for level in ("study", "series"))
    image = image_uid(index, seed)
    location = storage.join(out_uri, "dicom-images-train", *folders, f"{image}.dcm")
    storage.write_bytes(location, _dicom(study, index, seed))
    return siim.CODES_FILE, [f"{image}, {code}" for code in _codes(study)]


def _codes(study: Study) -> Iterator[str]:
    """A code a piece of the pneumothorax that hangs together; -1 where there is none."""
    mask = study.phantom.masks.get(siim.FINDING)
    if mask is None:
        yield rle.EMPTY
        return
    count, pieces = cv2.connectedComponents(mask.astype(np.uint8))
    yield from (rle.encode(pieces == number) for number in range(1, count))


def _dicom(study: Study, index: int, seed: int) -> bytes:
    """A DICOM file like those of the release: pixels as JPEG baseline, and tags of nobody."""
    from pydicom import uid  # here, for pydicom takes half a second to import
    from pydicom.dataset import FileDataset, FileMetaDataset
    from pydicom.encaps import encapsulate

    file = FileDataset("", {}, preamble=bytes(128), file_meta=FileMetaDataset())
    file.file_meta.TransferSyntaxUID = uid.JPEGBaseline8Bit
    file.SOPClassUID, file.SOPInstanceUID = _SECONDARY_CAPTURE, image_uid(index, seed)
    file.StudyInstanceUID, file.SeriesInstanceUID = (image_uid(index, seed, level) for level in ("study", "series"))
    file.Modality, file.BodyPartExamined, file.ViewPosition = "CR", "CHEST", study.view
    file.PatientID = file.PatientName = f"phantom-{seed}-{index}"
    file.PatientAge, file.PatientSex = f"{study.age:03d}Y", study.sex
    file.Rows, file.Columns = study.phantom.pixels.shape
    file.PixelSpacing = [SPACING_MM, SPACING_MM]
    file.SamplesPerPixel, file.PhotometricInterpretation, file.PixelRepresentation = 1, "MONOCHROME2", 0
    file.BitsAllocated = file.BitsStored = 8
    file.HighBit, file.LossyImageCompression = 7, "01"
    done, jpeg = cv2.imencode(".jpg", study.phantom.pixels, [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    assert done
    file.PixelData = encapsulate([jpeg.tobytes()])
    file["PixelData"].VR = "OB"
    stream = io.BytesIO()
    file.save_as(stream, enforce_file_format=True)
    return stream.getvalue()


def _write_pictures(out_uri: str, study: Study, index: int, seed: int) -> tuple[str, Rows]:
    """Write one image and its mask; the name of the list that speaks of it, and its row there."""
    pixels, mask = study.phantom.pixels, study.phantom.masks.get(siim.FINDING)
    part, has_one = ("test" if study.is_test else "train"), int(mask is not None)
    file = f"{index}_{part}_{has_one}_.png"
    shown = np.zeros_like(pixels) if mask is None else mask * np.uint8(255)
    storage.write_bytes(storage.join(out_uri, siim.IMAGES, file), png(pixels))
    storage.write_bytes(storage.join(out_uri, siim.MASKS, file), png(shown))
    listed_in = siim.TEST_FILE if study.is_test else siim.TRAIN_FILE
    return listed_in, [f"{file},{image_uid(index, seed)},{has_one}"]
