"""Archives of phantoms in the layouts of VinBigData and VinDr-CXR, each image read by three readers.

    vinbigdata:      train/IMAGE_ID.dicom, test/IMAGE_ID.dicom   12 bits, uncompressed; every third MONOCHROME1
    vinbigdata-png:  train/IMAGE_ID.png, test/IMAGE_ID.png       8-bit gray at half the size
                     train_meta.csv, test_meta.csv               the original size, to which boxes refer
    train.csv        boxes drawn by three of seventeen readers on the images in train/
    vindr-cxr:       the same DICOM files, and the lists of `sources.vindr` instead of train.csv:
                     annotations/annotations_train.csv, annotations/image_labels_train.csv   by reader
                     annotations/annotations_test.csv, annotations/image_labels_test.csv     exact
    truth.csv        the exact boxes of all images in the columns of train.csv, for `--boxes`
    truth.parquet    image_id, true_theta

A simulated reader detects most findings, draws boxes with random errors, sometimes confuses findings, and sometimes
draws one that does not exist. Image `index` is that of `archive.make_exam`; each image counts as another patient.
The lists of boxes are written last, so that they mark a complete archive.
"""

from __future__ import annotations

import csv
import io
import uuid
from collections.abc import Iterable, Sequence
from typing import Literal, Unpack, get_args

import cv2
import numpy as np

from cxr import schema, storage
from cxr.errors import UserError
from cxr.phantom.archive import Exam, ExamSettings, make_exams, png, write_poses
from cxr.schema import FINDINGS, VINBIGDATA_FINDINGS
from cxr.sources import vinbigdata, vindr
from cxr.sources.annotations import CLASS_NAME, HEADER, IMAGE, READER

Layout = Literal["vinbigdata", "vinbigdata-png", "vindr-cxr"]
ReaderBox = tuple[str, Sequence[float]]  # a class's name, and corners in pixels
Row = Sequence[object]

EXACT_FILE = "truth.csv"
PREVALENCE = 0.29  # 4,394 of 15,000 images
READERS, READERS_OF_IMAGE = 17, 3
MISSED, CONFUSED, INVENTED = 0.22, 0.08, 0.06  # fractions of findings, of drawn findings, of images
EDGE_ERROR = 0.09  # standard deviation of an edge, as a fraction of the box's side
TRUTH = "truth"  # the reader of `EXACT_FILE`
COPY_SHARE = 0.5  # scale of PNG copies
_IMAGE_LABELS = (*schema.VINDR_LOCAL_FINDINGS, *schema.VINDR_GLOBAL_FINDINGS, schema.NO_FINDING)
_BITS, _READING = 12, 2  # stored bits; another random stream besides those of `archive`
_DIGITAL_X_RAY = "1.2.840.10008.5.1.4.1.1.1.1"

# VinBigData's name for each finding of a phantom. Aortic enlargement, Calcification and ILD do not occur.
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
    prevalence: float = PREVALENCE,
    **settings: Unpack[ExamSettings],
) -> None:
    """Write an archive of `count` images in this layout.

    Args:
        prevalence: fraction of images with a finding.
        settings: see `make_exams`; `size` is that of the originals, and PNG copies have half of it.

    Raises:
        UserError: the layout is unknown, a setting is out of range, or `out_uri` is not writable.
    """
    if layout not in get_args(Layout):
        raise UserError(f"expected layout {' or '.join(get_args(Layout))}, got {layout!r}: choose one of these")
    files: dict[str, list[Row]] = {vinbigdata.META_FILES[0]: [], vinbigdata.META_FILES[1]: [], EXACT_FILE: []}
    readings: list[Row] = []
    vindr_lists = _VinDrLists()
    poses: dict[str, np.ndarray] = {}
    for exam in make_exams(count, findings=FINDINGS, prevalence=prevalence, **settings):
        image = image_id(exam.index, exam.seed)
        _write_image(out_uri, exam, image, layout)
        files[vinbigdata.META_FILES[exam.is_test]].append((image, *exam.phantom.pixels.shape))
        files[EXACT_FILE] += _rows(image, TRUTH, exact(exam))
        read = [] if exam.is_test else read_by_three(exam)
        readings += read
        vindr_lists.add(exam, image, read)
        poses[image] = exam.phantom.pose_unit
    write_poses(out_uri, poses)
    storage.write_text(storage.join(out_uri, EXACT_FILE), _csv(HEADER, files.pop(EXACT_FILE)))
    for file, sizes in files.items() if layout == "vinbigdata-png" else ():
        header = (IMAGE, vinbigdata.HEIGHT, vinbigdata.WIDTH)
        storage.write_text(storage.join(out_uri, file), _csv(header, sizes))
    if layout == "vindr-cxr":
        vindr_lists.write(storage.join(out_uri, vindr.FOLDER))
    else:
        storage.write_text(storage.join(out_uri, vinbigdata.ANNOTATIONS_FILE), _csv(HEADER, readings))


class _VinDrLists:
    """The four lists of `sources.vindr`: what readers drew on training images, and the truth of test images.

    The image labels of a reader are those of the boxes, and Pneumonia, a global finding, which all readers see.
    """

    def __init__(self) -> None:
        self.boxes: dict[str, list[Row]] = {file: [] for file in vindr.BOXES_FILES}
        self.labels: dict[str, list[Row]] = {file: [] for file in vindr.LABELS_FILES}

    def add(self, exam: Exam, image: str, read: Sequence[Row]) -> None:
        """Add a test image, or a training image with its rows of train.csv."""
        has_pneumonia = "Pneumonia" in exam.phantom.labels
        if exam.is_test:
            rows = _rows(image, TRUTH, exact(exam))
            self.boxes[vindr.BOXES_FILES[1]] += [(image, name, *corners) for _, name, _, _, *corners in rows]
            labels = _image_labels({str(name) for _, name, *_ in rows}, has_pneumonia)
            self.labels[vindr.LABELS_FILES[1]].append((image, *labels))
            return
        self.boxes[vindr.BOXES_FILES[0]] += [(image, reader, name, *corners) for _, name, _, reader, *corners in read]
        for reader in dict.fromkeys(reader for _, _, _, reader, *_ in read):
            names = {str(name) for _, name, _, own, *_ in read if own == reader}
            self.labels[vindr.LABELS_FILES[0]].append((image, reader, *_image_labels(names, has_pneumonia)))

    def write(self, folder: str) -> None:
        corners = HEADER[4:]
        headers = {
            vindr.LABELS_FILES[0]: (IMAGE, READER, *_IMAGE_LABELS),
            vindr.LABELS_FILES[1]: (IMAGE, *_IMAGE_LABELS),
            vindr.BOXES_FILES[0]: (IMAGE, READER, CLASS_NAME, *corners),
            vindr.BOXES_FILES[1]: (IMAGE, CLASS_NAME, *corners),
        }
        for file, header in headers.items():
            storage.write_text(storage.join(folder, file), _csv(header, {**self.labels, **self.boxes}[file]))


def _image_labels(names: set[str], has_pneumonia: bool) -> list[int]:
    """0 or 1 for each of `_IMAGE_LABELS`."""
    seen = (names | ({"Pneumonia"} if has_pneumonia else set())) - {schema.NO_FINDING}
    return [int(label in seen) for label in _IMAGE_LABELS[:-1]] + [int(not seen)]


def image_id(index: int, seed: int) -> str:
    """32 hexadecimal digits."""
    return uuid.uuid5(uuid.NAMESPACE_OID, f"cxr phantom vinbigdata {seed} {index}").hex


# ---- Readers


def exact(exam: Exam) -> list[ReaderBox]:
    """The exact boxes, with VinBigData's names of findings."""
    return [(CLASSES[box.label], box.xyxy_px) for box in exam.phantom.boxes]


def read_by_three(exam: Exam) -> list[Row]:
    """Rows of train.csv for an image; readers and boxes depend only on its index and seed."""
    rng = np.random.default_rng([exam.seed, _READING, exam.index])
    readers = np.sort(rng.choice(READERS, READERS_OF_IMAGE, replace=False)) + 1
    image, side = image_id(exam.index, exam.seed), len(exam.phantom.pixels)
    return [row for number in readers for row in _rows(image, f"R{number}", _read(exact(exam), side, rng))]


def _read(truth: Sequence[ReaderBox], side: int, rng: np.random.Generator) -> list[ReaderBox]:
    """The boxes that a reader draws on an image of `side` x `side` pixels."""
    seen = [box for box in truth if rng.random() >= MISSED]
    if rng.random() < INVENTED:
        low = rng.uniform(0.1, 0.7, 2) * side
        seen.append((str(rng.choice(VINBIGDATA_FINDINGS)), (*low, *(low + rng.uniform(0.04, 0.25, 2) * side))))
    return [(_name_by_reader(name, rng), _box_by_reader(corners, side, rng)) for name, corners in seen]


def _name_by_reader(name: str, rng: np.random.Generator) -> str:
    return str(rng.choice(VINBIGDATA_FINDINGS)) if rng.random() < CONFUSED else name


def _box_by_reader(corners: Sequence[float], side: int, rng: np.random.Generator) -> Sequence[float]:
    """A box with random errors of its edges, in whole pixels, within the image, at least one pixel large."""
    box = np.asarray(corners, np.float64).reshape(2, 2)
    box = np.sort(box + rng.normal(0, EDGE_ERROR, (2, 2)) * (box[1] - box[0]), 0)
    low = np.clip(np.floor(box[0]), 0, side - 1)
    return *low.tolist(), *np.clip(np.ceil(box[1]), low + 1, side).tolist()


def _rows(image: str, reader: str, boxes: Iterable[ReaderBox]) -> list[Row]:
    rows = [(image, name, VINBIGDATA_FINDINGS.index(name), reader, *map(float, corners)) for name, corners in boxes]
    return list(rows) or [(image, schema.NO_FINDING, schema.NO_FINDING_CLASS, reader, "", "", "", "")]


def _csv(header: Sequence[str], rows: Iterable[Row]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue()


# ---- Images


def _write_image(out_uri: str, exam: Exam, image: str, layout: Layout) -> None:
    folder = storage.join(out_uri, vinbigdata.TEST if exam.is_test else vinbigdata.TRAIN)
    if layout != "vinbigdata-png":
        storage.write_bytes(storage.join(folder, f"{image}.dicom"), _dicom(exam, image))
    else:
        copy = cv2.resize(exam.phantom.pixels, None, fx=COPY_SHARE, fy=COPY_SHARE, interpolation=cv2.INTER_AREA)
        storage.write_bytes(storage.join(folder, f"{image}.png"), png(copy))


def _dicom(exam: Exam, image: str) -> bytes:
    """A DICOM file without patient data, as in the release; uint8 pixels are stored with 12 bits."""
    from pydicom import uid  # pydicom takes half a second to import
    from pydicom.dataset import FileDataset, FileMetaDataset

    largest = (1 << _BITS) - 1
    stored = np.rint(exam.phantom.pixels * (largest / 255)).astype(np.uint16)
    inverted = exam.index % 3 == 2
    file = FileDataset("", {}, preamble=bytes(128), file_meta=FileMetaDataset())
    file.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    file.SOPClassUID, file.SOPInstanceUID = _DIGITAL_X_RAY, f"2.25.{int(image, 16)}"
    file.Modality = "DX"
    file.Rows, file.Columns = exam.phantom.pixels.shape
    file.SamplesPerPixel, file.PixelRepresentation = 1, 0
    file.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    file.BitsAllocated, file.BitsStored, file.HighBit = 16, _BITS, _BITS - 1
    file.WindowCenter, file.WindowWidth = (largest + 1) / 2, largest + 1
    file.PixelData = (largest - stored if inverted else stored).astype("<u2").tobytes()
    file["PixelData"].VR = "OW"
    stream = io.BytesIO()
    file.save_as(stream, enforce_file_format=True)
    return stream.getvalue()
