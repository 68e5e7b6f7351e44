"""Damaged label files: the archive opens, or a single UserError is raised within a second."""

from __future__ import annotations

import io
import json
import random
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema
from cxr.errors import UserError
from cxr.sources import find_source, open_manifest, padchest, rsna_pneumonia
from cxr.sources.options import SOURCE_LABELS, Labeling, ReadOptions

LIMIT_S = 1.0  # of CPU time, for one archive
NAMES = [f"{number:08d}_000" for number in range(1, 9)]
BOX = "10,20.5,300,400"


def _lines(header: str, row: str, footer: str = "") -> bytes:
    return "\n".join([header, *(row.format(name=name, n=n) for n, name in enumerate(NAMES)), footer]).encode()


def _truth() -> bytes:
    masks = [[{schema.LABEL: "Lungs", schema.MASK_RLE: None, schema.MASK_URI: f"m/{name}.png"}] for name in NAMES]
    columns = {
        schema.IMAGE_ID: [f"{name}.png" for name in NAMES],
        schema.TRUE_THETA: [[1.0, 0.0, 0.25, 0.0, 1.0, -0.5]] * len(NAMES),
        schema.MASKS: masks,
    }
    stream = io.BytesIO()
    pq.write_table(pa.table(columns, schema=pa.schema([schema.MANIFEST.field(name) for name in columns])), stream)
    return stream.getvalue()


def _coco() -> bytes:
    content = {
        "images": [{"id": n, "file_name": f"{name}.png", "height": 99, "width": 99} for n, name in enumerate(NAMES)],
        "categories": [{"id": 0, "name": "Mass"}, {"id": 1, "name": "Heart"}],
        "annotations": [{"image_id": n, "category_id": n % 2, "bbox": [1, 2, 3, 4]} for n in range(len(NAMES))],
    }
    return json.dumps(content).encode()


ENTRIES = _lines(
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],",
    "{name}.png,Mass|Effusion,0,{n},58,M,PA,2682,2749,0.143,0.143,",
)
VINBIGDATA = _lines("image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max", "{name},Nodule/Mass,8,R{n}," + BOX)
CHEXPERT = "Path,Sex,Age,Frontal/Lateral,AP/PA,No Finding,Enlarged Cardiomediastinum,Edema,Pneumonia"
ARCHIVES: dict[str, tuple[str, dict[str, bytes]]] = {
    "chestxray14": (
        "chestxray14",
        {
            "Data_Entry_2017.csv": ENTRIES,
            "BBox_List_2017.csv": _lines(
                "Image Index,Finding Label,Bbox [x,y,w,h],,,", "{name}.png,Infiltrate," + BOX
            ),
            "train_val_list.txt": "\n".join(f"{name}.png" for name in NAMES[:5]).encode(),
            "test_list.txt": "\n".join(f"{name}.png" for name in NAMES[5:]).encode(),
        },
    ),
    "siim, codes": ("siim", {"train-rle.csv": _lines("ImageId, EncodedPixels", "{name}, 10 3 90 4", "x,-1")}),
    "siim, stage 2": ("siim", {"stage_2_train.csv": _lines("ImageId,EncodedPixels", "{name},-1")}),
    "siim, pictures": (
        "siim",
        {
            "stage_1_train_images.csv": _lines("new_filename,ImageId,has_pneumo", "{name}.png,{n}.1.2,1"),
            "stage_1_test_images.csv": _lines("new_filename,ImageId,has_pneumo", "t{name}.png,{n}.1.3,0"),
        },
    ),
    "vinbigdata": (
        "vinbigdata",
        {"train.csv": VINBIGDATA, "train_meta.csv": _lines("image_id,dim0,dim1", "{name}.png,3000.0,2500")},
    ),
    "vinbigdata, sizes": (
        "vinbigdata",
        {
            "train.csv": _lines(
                "image_id,class_name,class_id,rad_id,x_min,y_min,x_max,y_max,width,height",
                "{name},ILD,5,R{n}," + BOX + ",2500,3000",
            )
        },
    ),
    "vindr-cxr": (
        "vindr-cxr",
        {
            "annotations_train.csv": _lines(
                "image_id,rad_id,class_name,x_min,y_min,x_max,y_max", "{name},R{n},Pleural effusion," + BOX
            ),
            "image_labels_train.csv": _lines("image_id,rad_id,Edema,ILD,No finding", "{name},R{n},0,1,0"),
        },
    ),
    "chexpert": (
        "chexpert",
        {"train.csv": _lines(CHEXPERT, "train/patient{n}/study1/view1_frontal.jpg,Male,68,Frontal,AP,1.0,-1.0,,0.0")},
    ),
    "mimic-cxr-jpg": (
        "mimic-cxr-jpg",
        {
            "mimic-cxr-2.0.0-split.csv": _lines("dicom_id,study_id,subject_id,split", "{name},5{n},1{n},train"),
            "mimic-cxr-2.0.0-metadata.csv": _lines(
                "dicom_id,subject_id,study_id,ViewPosition", "{name},1{n},5{n},PA"
            ),
            "mimic-cxr-2.0.0-chexpert.csv": _lines("subject_id,study_id,Edema,No Finding", "1{n},5{n},-1.0,1.0"),
        },
    ),
    "padchest": (
        "padchest",
        {
            padchest.LIST: _lines(
                "ImageID,PatientID,PatientBirth,Projection,Labels", "{name}.png,{n},1930,L,\"['normal']\""
            )
        },
    ),
    "rsna-pneumonia": (
        "rsna-pneumonia",
        {
            "stage_2_train_labels.csv": _lines("patientId,x,y,width,height,Target", "{name}," + BOX + ",1"),
            "stage_2_detailed_class_info.csv": _lines("patientId,class", "{name},Lung Opacity"),
            rsna_pneumonia.MAPPING_FILE: json.dumps(
                [{"subset_img_id": name, "img_id": f"{name}.png", "StudyInstanceUID": "1.2"} for name in NAMES]
            ).encode(),
        },
    ),
    "boxes, VinBigData": ("chestxray14", {"Data_Entry_2017.csv": ENTRIES, "boxes": VINBIGDATA}),
    "boxes, RSNA": ("folder", {"boxes": _lines("patientId,x,y,width,height,Target", "{name}," + BOX + ",1")}),
    "boxes, COCO": ("folder", {"boxes": _coco()}),
    "truth": ("folder", {"truth.parquet": _truth()}),
}

PIECES = (
    b'"',
    b"\0",
    b"\r",
    b"\n",
    b"\xff",
    b"\xef\xbb\xbf",
    b",",
    b";",
    b"\t",
    b"|",
    b"nan",
    b"-1",
    b"1e400",
    b"inf",
)
PIECES += (b"9" * 400, b"w" * 200_000, b"[,]" * 30_000, b".png" * 30_000, b"1 " * 100_000, b'"' * 1_001)
PIECES += ("٣".encode(), "\u2028".encode(), "ä".encode("latin-1"), b"../../x", b"\\", b" ", b"")


def _cut(rng: random.Random, data: bytes) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _flipped(rng: random.Random, data: bytes) -> bytes:
    made = bytearray(data)
    for _ in range(rng.randint(1, 8) if data else 0):
        made[rng.randrange(len(made))] = rng.randrange(256)
    return bytes(made)


def _inserted(rng: random.Random, data: bytes) -> bytes:
    at, over = rng.randrange(len(data) + 1), rng.choice((0, 0, 1, 5, 40))
    return data[:at] + rng.choice(PIECES) + data[at + over :]


def _field_replaced(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    fields = lines[at].split(b",")
    fields[rng.randrange(len(fields))] = rng.choice(PIECES)
    return b"\n".join([*lines[:at], b",".join(fields), *lines[at + 1 :]])


def _columns_moved(rng: random.Random, data: bytes) -> bytes:
    """Remove or repeat a column, or swap two, in all lines."""
    rows = [line.split(b",") for line in data.split(b"\n")]
    one, other, how = rng.randrange(4), rng.randrange(4), rng.randrange(3)
    for row in rows:
        if max(one, other) < len(row):
            if how == 0:
                del row[one]
            elif how == 1:
                row.insert(other, row[one])
            else:
                row[one], row[other] = row[other], row[one]
    return b"\n".join(b",".join(row) for row in rows)


def _lines_mixed(rng: random.Random, data: bytes) -> bytes:
    lines = data.split(b"\n")
    lines += rng.choices(lines, k=rng.randrange(5))
    rng.shuffle(lines)
    return rng.choice((b"\n", b"\r", b"\r\n", b"\n\n", b"")).join(lines)


def _encoded(rng: random.Random, data: bytes) -> bytes:
    return data.decode("latin-1").encode(rng.choice(("utf-16", "utf-16-le", "utf-32", "utf-8-sig")))


def _separated(rng: random.Random, data: bytes) -> bytes:
    return data.replace(b",", rng.choice((b";", b"\t", b" ", b"|", b",,", b'","')))


MUTATIONS: tuple[Callable[[random.Random, bytes], bytes], ...] = (
    _cut,
    _flipped,
    _inserted,
    _field_replaced,
    _columns_moved,
    _lines_mixed,
    _encoded,
    _separated,
)


@pytest.mark.parametrize("kind", ARCHIVES)
@pytest.mark.parametrize("damages", [20, pytest.param(125, marks=pytest.mark.slow)])
def test_damaged_lists_open_or_are_user_errors_within_a_second(kind: str, damages: int, tmp_path: Path) -> None:
    source, files = ARCHIVES[kind]
    images = tmp_path / "png_images" if "pictures" in kind else tmp_path
    images.mkdir(exist_ok=True)
    for name in NAMES:
        (images / f"{name}.png").write_bytes(b"?")
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    labeling = Labeling(boxes=str(tmp_path / "boxes")) if "boxes" in kind else SOURCE_LABELS
    assert find_source(str(tmp_path)).name == source
    assert open_manifest(str(tmp_path), labeling=labeling).table.num_rows == len(NAMES)
    rng, opened = random.Random(kind), 0
    trials = damages * (4 if kind == "truth" else 1)  # few changes leave a Parquet file readable
    for number in range(trials):
        file = rng.choice(list(files))
        data = files[file]
        for mutation in rng.choices(MUTATIONS, k=rng.choice((1, 1, 2))):
            data = mutation(rng, data)
        (tmp_path / file).write_bytes(data)
        start = time.process_time()
        try:
            opened += _is_sound(
                open_manifest(str(tmp_path), ReadOptions(source=rng.choice((source, "auto"))), labeling).table
            )
        except UserError:
            pass
        except Exception as error:
            raise AssertionError(f"mutation {number} of {file} in {kind}") from error
        took = time.process_time() - start
        assert took < LIMIT_S, f"mutation {number} of {file} in {kind} took {took:.1f} s"
        (tmp_path / file).write_bytes(files[file])
    assert opened < trials
    assert opened or trials < 100


def _is_sound(table: pa.Table) -> bool:
    assert table.schema.equals(schema.MANIFEST)
    table.validate(full=True)
    ids = table[schema.IMAGE_ID].to_pylist()
    assert len(set(ids)) == len(ids)
    assert {label for labels in table[schema.LABELS].to_pylist() for label in labels} <= {-1, 0, 1}
    assert set(table[schema.SPLIT].to_pylist()) <= set(schema.SPLITS)
    return True
