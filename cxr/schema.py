"""Column names, types and label lists: the contract between sources, shards, training and scores.

A source reads an archive into a *manifest* (one row per image, nothing decoded yet), which decoding turns
into *rows* (pixels of one fixed size). Box coordinates are in pixels of the original image: x to the right,
y down, edges at integers: pixel i covers [i, i + 1].
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# ChestX-ray14's findings (Wang et al. 2017), in the order in which `labels` holds them.
FINDINGS = (
    "Atelectasis",
    "Cardiomegaly",
    "Effusion",
    "Infiltration",
    "Mass",
    "Nodule",
    "Pneumonia",
    "Pneumothorax",
    "Consolidation",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Pleural_Thickening",
    "Hernia",
)
# VinBigData's classes 0 to 13 (Nguyen et al. 2022), as published; the next class is NO_FINDING.
VINBIGDATA_FINDINGS = (
    "Aortic enlargement",
    "Atelectasis",
    "Calcification",
    "Cardiomegaly",
    "Consolidation",
    "ILD",
    "Infiltration",
    "Lung Opacity",
    "Nodule/Mass",
    "Other lesion",
    "Pleural effusion",
    "Pleural thickening",
    "Pneumothorax",
    "Pulmonary fibrosis",
)
NO_FINDING, NO_FINDING_CLASS = "No finding", len(VINBIGDATA_FINDINGS)
# VinDr-CXR's local findings (annotated with boxes), in PhysioNet's order: VinBigData's, then the rarer
# ones that the challenge left out. Its global findings are diagnoses of the whole image.
VINDR_LOCAL_FINDINGS = (
    *VINBIGDATA_FINDINGS,
    "Clavicle fracture",
    "Edema",
    "Emphysema",
    "Enlarged PA",
    "Lung cavity",
    "Lung cyst",
    "Mediastinal shift",
    "Rib fracture",
)
VINDR_GLOBAL_FINDINGS = ("COPD", "Lung tumor", "Pneumonia", "Tuberculosis", "Other disease")
LUNGS = "Lungs"  # mask label: both lung fields together
PNEUMOTHORAX = "Pneumothorax"  # mask label; the same as the finding's name
ANY_FINDING = "any finding"  # in place of a finding's name: at least one of all findings
SPLITS = ("train", "val", "test")
MOST_BOXES = 64  # boxes per image in a batch, if the shards do not say how many there are at most

POSITIVE, NEGATIVE, UNKNOWN = 1, 0, -1

IMAGE_ID = "image_id"
PATIENT_ID = "patient_id"
SPLIT = "split"
SOURCE_URI = "source_uri"
STUDY_ID = "study_id"  # the exam: StudyInstanceUID, or the number that the source publishes; null if unknown
SERIES_ID = "series_id"  # SeriesInstanceUID; null if unknown
SEX = "sex"  # "F", "M" or "O" (other), as in DICOM PatientSex; null if unknown
AGE_YEARS = "age_years"  # at the time of the exam; null if unknown
VIEW = "view"  # "PA", "AP", "LATERAL", …, a code of imaging.dicom_terms.VIEWS; null if unknown
BODY_PART = "body_part"  # "CHEST", "HAND", … of dicom_terms.BODY_PARTS; null if unknown
MODALITY = "modality"  # "DX", "CR", … of dicom_terms.MODALITIES; null if unknown
HEIGHT_PX = "height_px"  # of the original image
WIDTH_PX = "width_px"
SPACING_MM = "spacing_mm"  # [between rows, between columns] of the original's pixels; null if unknown
PIXELS = "pixels"  # size x size, uint8 or uint16, row-major; null where `error` is set
RESIZE_TRANSFORM = "resize_transform"  # maps `pixels` back to the original: see `imaging.geometry.ResizeTransform`
CROP_STATUS = "crop_status"  # "lungs", "aligned" or "center"; "whole image: REASON" if it failed; null: not asked
GATE = "gate"  # "frontal", or why it is no upright frontal chest X-ray, see `data.gate`; null if not checked
GATE_SCORE = "gate_score"  # estimated probability that it is one, in [0, 1]
LABELS = "labels"  # one int8 per finding: 1, 0, −1 unknown
BOXES = "boxes"
BOXES_FRAME = "boxes_frame_px"  # in manifests: [height, width] that its boxes refer to; null: see sources.manifest
MASKS = "masks"
TRUE_THETA = "true_theta"  # phantoms: known 2 x 3 pose, canonical to whole image in affine_grid coordinates
EXTRA = "extra"  # JSON object with the source's own columns, as published
ERROR = "error"  # why there are no pixels; null for a good row
THETA = "theta"  # score of `align`: 2 x 3, output to input, as in F.affine_grid
# Scores of classifiers, one value per finding in the checkpoint's order, also of findings without training labels.
PROBABILITIES = "probabilities"  # in [0, 1]; NaN: untrained classifier
DECISIONS = (
    "decisions"  # 1 if the probability is at least the checkpoint's threshold, else 0; −1: untrained classifier
)
# Scores of segmentation models.
PRED_MASK_RLE = "mask_rle"  # the mask as relative RLE at the original size (sources/rle.py)
PRED_MASK_AREA_PX = "mask_area_px"  # area of the mask in pixels of the original image
PRED_MASK_PROBABILITY = "mask_probability"  # that the mask is not empty, in [0, 1]; NaN if the family gives none

PRED_BOXES = "pred_boxes"  # score of detectors and localizers: boxes in the original's pixels, highest score first

INCREMENT = "increment"  # column of stored scores: number of the increment that scored the image, see data.run_ledger
SHARD_FILE = "shard_file"  # where an image is stored: index in `data.shards.ShardInfo.files`; null: nowhere
SHARD_ROW = "shard_row"  # row of that file
EMBEDDING = "embedding"  # column of stored embeddings: float16 numbers, see `data.embeddings`

# Metadata keys of a scores file.
FINDINGS_KEY = b"cxr.findings"  # the findings of a single checkpoint in order, a JSON list
MEMBERS_KEY = b"cxr.members"  # the checkpoints: a JSON list of {name, family, checkpoint, sha256, findings}

LABEL, READER, SCORE = "label", "reader", "score"
X_MIN, Y_MIN, X_MAX, Y_MAX = "x_min", "y_min", "x_max", "y_max"
MASK_RLE, MASK_URI, MASK_BITS = "rle", "uri", "bits"
MASK_FORM, MASK_HEIGHT_PX, MASK_WIDTH_PX = "form", "height_px", "width_px"

BOX_TYPE = pa.struct(
    [(LABEL, pa.string()), (READER, pa.string())] + [(n, pa.float32()) for n in (X_MIN, Y_MIN, X_MAX, Y_MAX)]
)
PRED_BOX_TYPE = pa.struct(
    [(LABEL, pa.string()), (SCORE, pa.float32())] + [(n, pa.float32()) for n in (X_MIN, Y_MIN, X_MAX, Y_MAX)]
)
# A mask as published: the URI of an image file, or a code in one of the forms of `sources.rle.FORMS` (null: relative)
# for an image of that size (null: the original's).
MASK_SOURCE_TYPE = pa.struct(
    [
        (LABEL, pa.string()),
        (MASK_RLE, pa.string()),
        (MASK_URI, pa.string()),
        (MASK_FORM, pa.string()),
        (MASK_HEIGHT_PX, pa.int32()),
        (MASK_WIDTH_PX, pa.int32()),
    ]
)
# A mask in a row: numpy.packbits of size x size booleans on the pixel grid of `pixels`.
MASK_TYPE = pa.struct([(LABEL, pa.string()), (MASK_BITS, pa.binary())])
RESIZE_TRANSFORM_TYPE = pa.struct(
    [(n, pa.float64()) for n in ("x_scale", "y_scale", "x_offset", "y_offset", "x_skew", "y_skew")]
)

_IDENTITY = [
    (IMAGE_ID, pa.string()),
    (PATIENT_ID, pa.string()),
    (SPLIT, pa.string()),
    (SOURCE_URI, pa.string()),
    (STUDY_ID, pa.string()),
    (SERIES_ID, pa.string()),
    (SEX, pa.string()),
    (AGE_YEARS, pa.float32()),
]
_DICOM_CODES = [(VIEW, pa.string()), (BODY_PART, pa.string()), (MODALITY, pa.string())]
_GATE = [(GATE, pa.string()), (GATE_SCORE, pa.float32())]
_TRUTH = [
    (LABELS, pa.list_(pa.int8())),
    (BOXES, pa.list_(BOX_TYPE)),
    (TRUE_THETA, pa.list_(pa.float32(), 6)),
    (EXTRA, pa.string()),
]

MANIFEST = pa.schema(
    [
        *_IDENTITY,
        *_DICOM_CODES,
        *_TRUTH,
        (BOXES_FRAME, pa.list_(pa.int32(), 2)),
        (MASKS, pa.list_(MASK_SOURCE_TYPE)),
        (SPACING_MM, pa.list_(pa.float32(), 2)),
    ]
)
REJECTS = pa.schema([(IMAGE_ID, pa.string()), (SOURCE_URI, pa.string()), (SPLIT, pa.string()), (ERROR, pa.string())])
SCORES = pa.schema(
    [
        *_IDENTITY,
        (ERROR, pa.string()),
        *_DICOM_CODES,
        (HEIGHT_PX, pa.int32()),
        (WIDTH_PX, pa.int32()),
        (RESIZE_TRANSFORM, RESIZE_TRANSFORM_TYPE),
        (CROP_STATUS, pa.string()),
        *_GATE,
    ]
)  # first columns of every family's scores; `Recipe.score_columns` adds the family's own
_INPUT_SCORES = (RESIZE_TRANSFORM, CROP_STATUS)  # of SCORES: depend on the input of the network


def member_column(member: str, column: str) -> str:
    """Name of a column in scores of several checkpoints: "MEMBER/COLUMN", or COLUMN if it is the same for all.

    Args:
        member: name of a checkpoint; empty in scores of a single checkpoint.
    """
    shared = column == INCREMENT or (column in SCORES.names and column not in _INPUT_SCORES)
    return column if shared or not member else f"{member}/{column}"


MASK_SCORES = pa.schema(
    [(PRED_MASK_RLE, pa.string()), (PRED_MASK_AREA_PX, pa.int64()), (PRED_MASK_PROBABILITY, pa.float32())]
)  # added by segmentation families
BOX_SCORES = pa.schema([(PRED_BOXES, pa.list_(PRED_BOX_TYPE))])  # added by families that predict boxes
# The version of all columns of scores, which docs/reference/scores.md describes. Increase it when a column is
# renamed, removed or changes its meaning.
SCORES_VERSION, SCORES_VERSION_KEY = 2, b"cxr.scores_version"  # the key is one of a scores file's metadata


@dataclass(frozen=True)
class PixelFormat:
    """Format of the column `pixels`: `size` x `size`, 8 or 16 bits, full range [0, 2**bits − 1].

    32 bits are float32 in [0, 1]: for scoring originals, never stored.
    """

    size: int = 256
    bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in (8, 16, 32) or not 16 <= self.size <= 4096:
            raise ValueError(
                f"expected 16 to 4096 pixels and 8, 16 or 32 bits, got {self.size} pixels and {self.bits} bits"
            )

    @property
    def dtype(self) -> np.dtype:
        return np.dtype({8: np.uint8, 16: np.uint16, 32: np.float32}[self.bits])

    @property
    def row_bytes(self) -> int:
        return self.size * self.size * self.dtype.itemsize


def row_schema(pixels: PixelFormat) -> pa.Schema:
    """The Arrow schema of decoded rows; its metadata contain `pixels`, so that a shard describes itself."""
    fields = [
        *_IDENTITY,
        *_DICOM_CODES,
        (HEIGHT_PX, pa.int32()),
        (WIDTH_PX, pa.int32()),
        (SPACING_MM, pa.list_(pa.float32(), 2)),
        (PIXELS, pa.binary(pixels.row_bytes)),
        (RESIZE_TRANSFORM, RESIZE_TRANSFORM_TYPE),
        (CROP_STATUS, pa.string()),
        *_GATE,
        *_TRUTH,
        (MASKS, pa.list_(MASK_TYPE)),
        (ERROR, pa.string()),
    ]
    return pa.schema(fields, metadata={"cxr.pixels": json.dumps({"size": pixels.size, "bits": pixels.bits})})


def conform_to_schema(rows: pa.Table, expected: pa.Schema) -> pa.Table:
    """Select and cast the columns of a schema; columns missing from `rows` (older files) become null."""
    columns = [
        rows[field.name].cast(field.type) if field.name in rows.column_names else pa.nulls(rows.num_rows, field.type)
        for field in expected
    ]
    return pa.table(columns, schema=expected)


def pixel_format(schema: pa.Schema) -> PixelFormat:
    """The pixel format that `row_schema` stored in a schema's metadata."""
    return PixelFormat(**json.loads((schema.metadata or {})[b"cxr.pixels"]))


def pixels_array(column: pa.Array | pa.ChunkedArray, pixels: PixelFormat) -> np.ndarray:
    """Column `pixels` without nulls -> (B, size, size); a view on Arrow's memory if the column is one chunk."""
    if isinstance(column, pa.ChunkedArray):
        column = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
    if isinstance(column, pa.ChunkedArray):  # no chunks at all
        return np.empty((0, pixels.size, pixels.size), pixels.dtype)
    assert column.null_count == 0, "rows with an error have no pixels: filter them out first"
    flat = np.frombuffer(column.buffers()[1], pixels.dtype)
    first = column.offset * pixels.size * pixels.size
    flat = flat[first : first + len(column) * pixels.size * pixels.size]
    return flat.reshape(len(column), pixels.size, pixels.size)


def patients_of(table: pa.Table) -> pa.ChunkedArray:
    """(N,) patient ids; an image whose patient is unknown counts as a patient of its own."""
    alone = pc.binary_join_element_wise("image", table[IMAGE_ID], "\0")
    return pc.coalesce(table[PATIENT_ID], alone)
