"""Whole archives of phantoms in the layouts of VinBigData (`sources.vinbigdata`), each image read by three readers.

    vinbigdata:      train/IMAGE_ID.dicom, test/IMAGE_ID.dicom   12 bits, uncompressed; every third MONOCHROME1
    vinbigdata-png:  train/IMAGE_ID.png, test/IMAGE_ID.png       8-bit gray of half the size
                     train_meta.csv, test_meta.csv               the size before that, to which boxes refer
    train.csv        what three readers of seventeen drew in the images of train/; of test/ it says nothing
    truth.csv        in the same columns, and of all images, what is really there: for `--annotations`
    truth.parquet    image_id, true_theta

A reader sees most findings, draws around them with a hand that is not sure, sometimes mistakes one for another, and
sometimes draws one that is not there. Image `index` is that of `archive.make_study`, and the patient counts as
another one each time. train.csv is written last, so that it marks a finished archive.
"""

from __future__ import annotations

import csv
import io
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, get_args

import cv2
import numpy as np

from cxr import schema, storage
from cxr.errors import UserError
from cxr.phantom.archive import Study, check_settings, make_study, png
from cxr.phantom.nlm import poses_parquet
from cxr.schema import FINDINGS, VINBIGDATA_FINDINGS
from cxr.sources import vinbigdata
from cxr.sources.annotations import HEADER, IMAGE, NO_FINDING, NO_FINDING_ID
from cxr.sources.sidecar import TRUTH_FILE

Layout = Literal["vinbigdata", "vinbigdata-png"]
Drawn = tuple[str, Sequence[float]]  # a class's name, and corners in pixels
Row = Sequence[object]

EXACT_FILE = "truth.csv"
PREVALENCE = 0.29  # 4,394 of 15,000 images
READERS, READERS_OF_IMAGE = 17, 3
MISSED, MISTAKEN, IMAGINED = 0.22, 0.08, 0.06  # shares: of findings, of those drawn, of images
UNSURE = 0.09  # standard deviation of an edge, as a share of the box's side
TRUTH = "truth"  # the reader of `EXACT_FILE`
COPY_SHARE = 0.5  # of the side, that copies as PNG keep
_BITS, _READING = 12, 2  # stored; a stream of randomness besides those of `archive`
_DIGITAL_X_RAY = "1.2.840.10008.5.1.4.1.1.1.1"

# VinBigData's word for each finding of a phantom. Aortic enlargement, Calcification and ILD are not drawn.
CLASSES = {
    "Atelectasis": "Atelectasis",
    "Cardiomegaly": "Cardiomegaly",
    "Effusion": "Pleural effusion",
    "Infiltration": "Infiltration",
    "Mass": "Nodule/Mass",
    "Nodule": "Nodule/Mass",
    "Pneumonia": "Lung Opacity",
    "Pneumothorax": "Pneumothorax",
    "Consolidation": "Consolidation",
    "Edema": "Lung Opacity",
    "Emphysema": "Other lesion",
    "Fibrosis": "Pulmonary fibrosis",
    "Pleural_Thickening": "Pleural thickening",
    "Hernia": "Other lesion",
}


def write_vinbigdata_phantom(
    out_uri: str,
    count: int,
    layout: Layout = "vinbigdata",
    *,
    size: int = 512,
    seed: int = 0,
    prevalence: float = PREVALENCE,
    pose: float = 1.0,
    on_study: Callable[[Study], None] | None = None,
) -> None:
    """Write an archive of `count` images in that layout.

    Args:
        size: of the originals; PNG copies have half of it.
        prevalence, seed, pose, on_study: as in `archive.write_phantom`.

    Raises:
        UserError: an unknown layout, a setting out of its range, or nothing can be written to `out_uri`.
    """
    if layout not in get_args(Layout):
        raise UserError(f"layout={layout!r}: wanted one of {', '.join(get_args(Layout))}")
    check_settings(count, size, prevalence, pose)
    files: dict[str, list[Row]] = {vinbigdata.META_FILES[0]: [], vinbigdata.META_FILES[1]: [], EXACT_FILE: []}
    readings: list[Row] = []
    poses: list[dict[str, object]] = []
    for index in range(count):
        study = make_study(index, size=size, seed=seed, findings=FINDINGS, prevalence=prevalence, pose=pose)
        image = image_id(index, seed)
        _write_image(out_uri, study, index, image, layout)
        files[vinbigdata.META_FILES[study.is_test]].append((image, size, size))
        files[EXACT_FILE] += _rows(image, TRUTH, exact(study))
        readings += [] if study.is_test else read_by_three(study, index, seed)
        poses.append({schema.IMAGE_ID: image, schema.TRUE_THETA: study.phantom.pose_unit.reshape(-1).tolist()})
        if on_study:
            on_study(study)
    storage.write_bytes(storage.join(out_uri, TRUTH_FILE), poses_parquet(poses))
    storage.write_text(storage.join(out_uri, EXACT_FILE), _csv(HEADER, files.pop(EXACT_FILE)))
    for file, sizes in files.items() if layout == "vinbigdata-png" else ():
        header = (IMAGE, vinbigdata.HEIGHT, vinbigdata.WIDTH)
        storage.write_text(storage.join(out_uri, file), _csv(header, sizes))
    storage.write_text(storage.join(out_uri, vinbigdata.ANNOTATIONS_FILE), _csv(HEADER, readings))


def image_id(index: int, seed: int) -> str:
    """32 hexadecimal digits."""
    return uuid.uuid5(uuid.NAMESPACE_OID, f"cxr phantom vinbigdata {seed} {index}").hex


# ---- Readers


def exact(study: Study) -> list[Drawn]:
    """What is there, in VinBigData's words."""
    return [(CLASSES[box.label], box.xyxy_px) for box in study.phantom.boxes]


def read_by_three(study: Study, index: int, seed: int) -> list[Row]:
    """Rows of train.csv for image `index`: which readers, and what they draw, hangs on it and the seed alone."""
    rng = np.random.default_rng([seed, _READING, index])
    chosen = np.sort(rng.choice(READERS, READERS_OF_IMAGE, replace=False)) + 1
    side = len(study.phantom.pixels)
    return [
        row for number in chosen for row in _rows(image_id(index, seed), f"R{number}", _read(exact(study), side, rng))
    ]


def _read(truth: Sequence[Drawn], side: int, rng: np.random.Generator) -> list[Drawn]:
    """What one reader makes of an image of `side` x `side` pixels."""
    seen = [drawn for drawn in truth if rng.random() >= MISSED]
    if rng.random() < IMAGINED:
        low = rng.uniform(0.1, 0.7, 2) * side
        seen.append((str(rng.choice(VINBIGDATA_FINDINGS)), (*low, *(low + rng.uniform(0.04, 0.25, 2) * side))))
    return [(_called(name, rng), _drawn(corners, side, rng)) for name, corners in seen]


def _called(name: str, rng: np.random.Generator) -> str:
    return str(rng.choice(VINBIGDATA_FINDINGS)) if rng.random() < MISTAKEN else name


def _drawn(corners: Sequence[float], side: int, rng: np.random.Generator) -> Sequence[float]:
    """A box as a hand draws it: edges moved, in whole pixels, within the image, of one pixel at least."""
    box = np.asarray(corners, np.float64).reshape(2, 2)
    box = np.sort(box + rng.normal(0, UNSURE, (2, 2)) * (box[1] - box[0]), 0)
    low = np.clip(np.floor(box[0]), 0, side - 1)
    return *low.tolist(), *np.clip(np.ceil(box[1]), low + 1, side).tolist()


def _rows(image: str, reader: str, drawn: Iterable[Drawn]) -> list[Row]:
    rows = [(image, name, VINBIGDATA_FINDINGS.index(name), reader, *map(float, corners)) for name, corners in drawn]
    return list(rows) or [(image, NO_FINDING, NO_FINDING_ID, reader, "", "", "", "")]


def _csv(header: Sequence[str], rows: Iterable[Row]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


# ---- Images


def _write_image(out_uri: str, study: Study, index: int, image: str, layout: Layout) -> None:
    folder = storage.join(out_uri, vinbigdata.TEST if study.is_test else vinbigdata.TRAIN)
    if layout == "vinbigdata":
        storage.write_bytes(storage.join(folder, f"{image}.dicom"), _dicom(study.phantom.pixels, index, image))
    else:
        copy = cv2.resize(study.phantom.pixels, None, fx=COPY_SHARE, fy=COPY_SHARE, interpolation=cv2.INTER_AREA)
        storage.write_bytes(storage.join(folder, f"{image}.png"), png(copy))


def _dicom(pixels: np.ndarray, index: int, image: str) -> bytes:
    """A DICOM file without a word on the patient, as in the release; uint8 pixels as 12 bits."""
    from pydicom import uid  # here, for pydicom takes half a second to import
    from pydicom.dataset import FileDataset, FileMetaDataset

    most = (1 << _BITS) - 1
    stored = np.rint(pixels * (most / 255)).astype(np.uint16)
    inverted = index % 3 == 2
    file = FileDataset("", {}, preamble=bytes(128), file_meta=FileMetaDataset())
    file.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    file.SOPClassUID, file.SOPInstanceUID = _DIGITAL_X_RAY, f"2.25.{int(image, 16)}"
    file.Modality = "DX"
    file.Rows, file.Columns = pixels.shape
    file.SamplesPerPixel, file.PixelRepresentation = 1, 0
    file.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, _BITS, _BITS - 1
    file.WindowCenter, file.WindowWidth = (most + 1) / 2, most + 1
    file.PixelData = (most - stored if inverted else stored).astype("<u2").tobytes()
    file["PixelData"].VR = "OW"
    stream = io.BytesIO()
    file.save_as(stream, enforce_file_format=True)
    return stream.getvalue()
