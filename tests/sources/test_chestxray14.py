"""ChestX-ray14's layout: labels and metadata from the lists, and lists that do not match the images."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.compute as pc
import pytest

from cxr import schema
from cxr.errors import UserError
from cxr.sources import chestxray14
from cxr.sources.manifest import Manifest

HEADER = (
    "Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,"
    "OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y]"
)
ENTRIES = [
    "00000001_000.png,Cardiomegaly|Effusion,0,1,57,M,PA,2682,2749,0.143,0.143",
    "00000001_001.png,No Finding,1,1,58,M,AP,2500,2048,0.168,0.168",
    "00000002_000.png,Mass,0,2,81,F,PA,2992,2991,0.139,0.139",
    "00000003_000.png,No Finding,0,3,20,F,PA,2048,2048,0.2,0.2",
]
NAMES = [entry.partition(",")[0] for entry in ENTRIES]
BOXES = "Image Index,Finding Label,Bbox [x,y,w,h],,,\n00000003_000.png,Infiltrate,10.5,20,30,40.25\n"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    (tmp_path / "Data_Entry_2017_v2020.csv").write_text("\n".join([HEADER, *ENTRIES, ""]))
    (tmp_path / "BBox_List_2017.csv").write_text(BOXES)
    (tmp_path / "train_val_list.txt").write_text("\n".join(NAMES[:3]))
    (tmp_path / "test_list.txt").write_text("\n".join(NAMES[3:]))
    _images(tmp_path, *(f"images/{name}" for name in NAMES))
    return tmp_path


def _images(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"?")


def _read(archive: Path) -> tuple[Manifest, dict[str, dict]]:
    manifest = chestxray14.manifest(str(archive))
    return manifest, {row[schema.IMAGE_ID]: row for row in manifest.table.to_pylist()}


def test_labels_and_metadata_from_the_lists(archive: Path) -> None:
    manifest, rows = _read(archive)
    assert manifest.table.schema.equals(schema.MANIFEST)
    assert manifest.findings == schema.FINDINGS
    assert list(rows) == NAMES
    row = rows["00000001_000.png"]
    assert row[schema.LABELS] == [int(finding in ("Cardiomegaly", "Effusion")) for finding in schema.FINDINGS]
    assert row[schema.PATIENT_ID] == "1"
    assert row[schema.VIEW] == "PA"
    assert row[schema.SOURCE_URI] == str(archive / "images" / "00000001_000.png")
    assert rows["00000001_001.png"][schema.LABELS] == [schema.NEGATIVE] * 14
    assert rows["00000003_000.png"][schema.SPLIT] == "test"


def test_sex_and_age_in_either_release(archive: Path) -> None:
    _, rows = _read(archive)
    assert [(row[schema.SEX], row[schema.AGE_YEARS]) for row in rows.values()] == [
        ("M", 57),
        ("M", 58),
        ("F", 81),
        ("F", 20),
    ]
    ages = ["058Y,M", "018M,F", "411,F", "old,?"]
    entries = [f"{name},Mass,0,1,{age},PA,1,1,1,1" for name, age in zip(NAMES, ages, strict=True)]
    _entries(archive, *entries, columns=HEADER.replace("Patient Gender", "Patient Sex"))
    _, rows = _read(archive)
    assert [(row[schema.SEX], row[schema.AGE_YEARS]) for row in rows.values()] == [
        ("M", 58),
        ("F", 1.5),
        ("F", None),
        (None, None),
    ]


def test_spacing_is_that_of_the_resized_image_down_and_across(archive: Path) -> None:
    _, rows = _read(archive)
    down, across = 0.143 * 2749 / 1024, 0.143 * 2682 / 1024
    assert rows["00000001_000.png"][schema.SPACING_MM] == pytest.approx([down, across])


def test_boxes_are_corners_in_the_1024_px_image(archive: Path) -> None:
    manifest, rows = _read(archive)
    assert manifest.boxes_frame_px == 1024
    (box,) = rows["00000003_000.png"][schema.BOXES]
    assert box.pop(schema.LABEL) == "Infiltration"
    assert box == {"reader": None, "x_min": 10.5, "y_min": 20, "x_max": 40.5, "y_max": 60.25}
    assert rows["00000001_000.png"][schema.BOXES] is None


def test_extra_has_every_column_as_published(archive: Path) -> None:
    _, rows = _read(archive)
    extra = json.loads(rows["00000002_000.png"][schema.EXTRA])
    assert list(extra.values()) == ENTRIES[2].split(",")
    assert extra["Patient Age"] == "81"
    assert extra["OriginalImage[Width]"] == "2992"
    assert extra["OriginalImagePixelSpacing[y]"] == "0.139"


def test_listed_images_that_are_missing_are_counted(archive: Path) -> None:
    (archive / "images" / NAMES[1]).unlink()
    manifest, rows = _read(archive)
    assert len(rows) == 3
    expected = "missing from the archive: 1 of 4 images listed in Data_Entry_2017_v2020.csv; continuing with 3 images"
    assert expected in manifest.notes


def test_unlisted_images_have_unknown_labels(archive: Path) -> None:
    _images(archive, "images/00000003_007.png", "images/other.dcm")
    manifest, rows = _read(archive)
    assert rows["other.dcm"][schema.LABELS] == [schema.UNKNOWN] * 14
    assert rows["other.dcm"][schema.PATIENT_ID] == "other.dcm"
    assert rows["other.dcm"][schema.EXTRA] is None
    assert rows["other.dcm"][schema.SPACING_MM] is None
    assert rows["00000003_007.png"][schema.PATIENT_ID] == "3"
    assert rows["00000003_007.png"][schema.SPLIT] == "test"  # as the patient's other image
    expected = "not listed in Data_Entry_2017_v2020.csv, so labels are unknown: 2 images"
    assert expected in manifest.notes


def test_numbered_folders_and_repeated_names(archive: Path) -> None:
    _images(archive, f"images_001/images/{NAMES[0]}", "images_002/images/00000009_000.png")
    manifest, rows = _read(archive)
    twice = [f"images/{NAMES[0]}", f"images_001/images/{NAMES[0]}"]
    assert set(rows) == {*twice, *NAMES[1:], "00000009_000.png"}
    assert rows[twice[0]][schema.LABELS] == rows[twice[1]][schema.LABELS]
    assert rows[twice[0]][schema.SPLIT] == rows[twice[1]][schema.SPLIT]
    assert any("image names shared by several files: 1" in note for note in manifest.notes)


def _entries(archive: Path, *entries: str, file: str = "Data_Entry_2017_v2020.csv", columns: str = HEADER) -> None:
    """Write an entry file with these rows, and their images."""
    (archive / file).write_text("\n".join([columns, *entries, ""]))
    _images(archive, *{f"images/{entry.partition(',')[0].strip()}" for entry in entries})


def _positive(row: dict) -> set[str]:
    return {
        finding
        for finding, label in zip(schema.FINDINGS, row[schema.LABELS], strict=True)
        if label == schema.POSITIVE
    }


@pytest.mark.parametrize("suffix", [".jpg", ".PNG", ".dcm", "", ".png.jpeg"])
def test_copies_in_another_format_keep_labels_boxes_patients_and_official_splits(archive: Path, suffix: str) -> None:
    published = list(_read(archive)[1].values())
    for path in (archive / "images").iterdir():
        path.rename(archive / f"{path.stem}{suffix}")
    copies = list(_read(archive)[1].values())
    assert [row[schema.IMAGE_ID] for row in copies] == [f"{Path(name).stem}{suffix}" for name in NAMES]
    for name in (schema.LABELS, schema.BOXES, schema.PATIENT_ID, schema.SPLIT, schema.VIEW, schema.EXTRA):
        assert [row[name] for row in copies] == [row[name] for row in published]


def test_names_in_the_lists_may_have_folders_other_suffixes_and_blanks(archive: Path) -> None:
    published = list(_read(archive)[1].values())
    (archive / "test_list.txt").write_bytes(" images\\00000003_000.JPG \r\r".encode("utf-16"))
    entries = [HEADER, *(f"images/{entry.replace('.png', '.PNG ')}" for entry in ENTRIES)]
    (archive / "Data_Entry_2017_v2020.csv").write_text("\n".join(entries))
    copies = list(_read(archive)[1].values())
    for name in (schema.LABELS, schema.PATIENT_ID, schema.SPLIT):
        assert [row[name] for row in copies] == [row[name] for row in published]


@pytest.mark.parametrize(
    ("text", "findings"),
    [
        (" Cardiomegaly |Effusion", {"Cardiomegaly", "Effusion"}),
        ("mass| NODULE", {"Mass", "Nodule"}),
        ("Pleural Thickening|pleural-thickening", {"Pleural_Thickening"}),
        ("Infiltrate", {"Infiltration"}),
        ("Hernia;Edema", {"Hernia", "Edema"}),
        (" no  finding ", set()),
        ("NO_FINDING|", set()),
    ],
)
def test_findings_ignore_case_blanks_and_spelling_variants(archive: Path, text: str, findings: set[str]) -> None:
    _entries(archive, f"a.png,{text},0,1,,,,,,,")
    manifest, rows = _read(archive)
    assert _positive(rows["a.png"]) == findings
    assert rows["a.png"][schema.LABELS].count(schema.NEGATIVE) == 14 - len(findings)
    assert not any("unrecognized" in note for note in manifest.notes)


def test_an_unrecognized_word_makes_the_other_findings_unknown(archive: Path) -> None:
    _entries(
        archive,
        "a.png,Mass|Gallstones,0,1,,,,,,,",
        "b.png,,0,2,,,,x,9,0.1,",
        "c.png,Gallstones,0,3,,,,0,0,1,1",
        "d.png,No Finding|gall bladder,0,3,,,pa,1e400,inf,nan,1e9",
    )
    manifest, rows = _read(archive)
    assert _positive(rows["a.png"]) == {"Mass"}
    assert rows["a.png"][schema.LABELS].count(schema.UNKNOWN) == 13
    assert all(rows[f"{each}.png"][schema.LABELS] == [schema.UNKNOWN] * 14 for each in "bcd")
    assert [rows[f"{each}.png"][schema.VIEW] for each in "abcd"] == [None, None, None, "PA"]
    assert [rows[f"{each}.png"][schema.SPACING_MM] for each in "abcd"] == [None] * 4
    (note,) = [note for note in manifest.notes if "unrecognized" in note]
    assert note.endswith("'Gallstones' (2), 'gall bladder' (1): the other findings of these rows are unknown")


def test_repeated_rows_count_once(archive: Path) -> None:
    _entries(archive, *ENTRIES, ENTRIES[0], ENTRIES[0].replace("Cardiomegaly|Effusion", "effusion|cardiomegaly"))
    manifest, rows = _read(archive)
    assert manifest.notes == ["skipped files that are not images: 2 .csv, 2 .txt"]
    assert _positive(rows[NAMES[0]]) == {"Cardiomegaly", "Effusion"}


def test_contradictory_rows_make_differing_values_unknown(archive: Path) -> None:
    _entries(
        archive,
        *ENTRIES,
        ENTRIES[0].replace("|Effusion", "").replace(",PA", ",AP"),
        ENTRIES[2].replace("Mass", ""),
        ENTRIES[3].replace("No Finding", "No Finding|Hernia"),
    )
    manifest, rows = _read(archive)
    first = rows[NAMES[0]]
    assert _positive(first) == {"Cardiomegaly"}
    assert [finding for finding, label in zip(schema.FINDINGS, first[schema.LABELS], strict=True) if label < 0] == [
        "Effusion"
    ]
    assert (first[schema.VIEW], first[schema.PATIENT_ID]) == (None, "1")
    assert json.loads(first[schema.EXTRA])["View Position"] == ""
    assert _positive(rows[NAMES[2]]) == {"Mass"}
    assert rows[NAMES[3]][schema.LABELS].count(schema.UNKNOWN) == 1
    assert manifest.notes[1:] == [
        "contradictory rows in Data_Entry_2017_v2020.csv: 2 images; the values that differ are unknown"
    ]


def test_an_image_in_both_official_lists_is_a_test_image(archive: Path) -> None:
    (archive / "train_val_list.txt").write_text("\n".join(NAMES))
    manifest, rows = _read(archive)
    assert rows[NAMES[3]][schema.SPLIT] == "test"
    assert manifest.notes[1:] == ["listed in both test_list.txt and train_val_list.txt, used for testing: 1 image"]


def test_names_only_in_an_official_list_are_counted(archive: Path) -> None:
    (archive / "test_list.txt").write_text('"00000003_000.png",\nno-such-image.png\n\n')
    manifest, rows = _read(archive)
    assert rows[NAMES[3]][schema.SPLIT] == "test"
    assert manifest.notes[1:] == ["listed in test_list.txt but not in Data_Entry_2017_v2020.csv: 1 of 2 images"]


def test_two_files_of_an_image_share_labels_and_split(archive: Path) -> None:
    _images(archive, f"jpeg/{Path(NAMES[3]).stem}.jpeg")
    one, other = (_read(archive)[1][f"{Path(NAMES[3]).stem}{suffix}"] for suffix in (".png", ".jpeg"))
    for name in (schema.LABELS, schema.BOXES, schema.PATIENT_ID, schema.SPLIT, schema.EXTRA):
        assert one[name] == other[name]


def test_patient_ids_ignore_leading_zeros(archive: Path) -> None:
    _entries(archive, "00000007_000.png,Mass,0,00000007,,,,,,,", "00000008_000.png,Mass,0,8.0,,,,,,,")
    _images(archive, "00000007_001.jpg", "00000008_001.png")
    patients = {image: row[schema.PATIENT_ID] for image, row in _read(archive)[1].items()}
    assert [patients[f"0000000{each}"] for each in ("7_000.png", "7_001.jpg", "8_000.png", "8_001.png")] == [*"7788"]


@pytest.mark.parametrize("separator", [";", "\t"])
def test_lists_with_other_separators(archive: Path, separator: str) -> None:
    published = _read(archive)[1]
    for file in ("Data_Entry_2017_v2020.csv", "BBox_List_2017.csv"):
        (archive / file).write_text((archive / file).read_text().replace(",", separator))
    assert _read(archive)[1] == published


@pytest.mark.parametrize(
    "header",
    [
        "Image Index,Finding Label,Bbox [x,y,w,h],,,",
        'Image Index,Finding Label,"Bbox [x,y,w,h]",,,',
        "Image Index,Finding Label,x,y,w,h",
    ],
)
def test_the_box_list_may_have_blank_lines_fields_and_repeated_rows(archive: Path, header: str) -> None:
    row = "images/00000003_000.jpg, infiltrate ,10.5,20,30,40.25"
    (archive / "BBox_List_2017.csv").write_text(
        f"\n{header}\n{row},,,\n\n{row}\n00000003_000.png,Bone,1,2,3,4\n,,\n\n"
    )
    manifest, rows = _read(archive)
    (box,) = rows["00000003_000.png"][schema.BOXES]
    assert box == {"label": "Infiltration", "reader": None, "x_min": 10.5, "y_min": 20, "x_max": 40.5, "y_max": 60.25}
    assert manifest.notes[1:] == ["unrecognized words in BBox_List_2017.csv, 'Bone' (1): these boxes are dropped"]


def test_the_older_release_and_precedence_of_the_newer_one(archive: Path) -> None:
    older = archive / "Data_Entry_2017.csv"
    older.write_bytes("\r\n".join([f"\ufeff{HEADER},", *(f"{e},".replace(",M,", ",X,") for e in ENTRIES)]).encode())
    assert json.loads(_read(archive)[1][NAMES[0]][schema.EXTRA])["Patient Gender"] == "M"
    (archive / "Data_Entry_2017_v2020.csv").unlink()
    extra = json.loads(_read(archive)[1][NAMES[0]][schema.EXTRA])
    assert extra["Patient Gender"] == "X"
    assert len(extra) == 11
    assert extra["OriginalImagePixelSpacing[y]"] == "0.143"


def test_without_lists_the_patients_are_split_by_hash(archive: Path) -> None:
    for name in ("train_val_list.txt", "test_list.txt", "BBox_List_2017.csv"):
        (archive / name).unlink()
    _, rows = _read(archive)
    assert {row[schema.SPLIT] for row in rows.values()} >= {"train", "val"}
    assert rows[NAMES[0]][schema.SPLIT] == rows[NAMES[1]][schema.SPLIT]
    assert {row[schema.BOXES] for row in rows.values()} == {None}


@pytest.mark.parametrize(
    ("file", "text", "trouble"),
    [
        ("Data_Entry_2017_v2020.csv", "name,label\nx.png,Mass\n", "line 1: expected the columns Image Index"),
        ("Data_Entry_2017_v2020.csv", HEADER, "expected one row per image, got none"),
        (
            "Data_Entry_2017_v2020.csv",
            f"{HEADER}\na.png,Mass\n",
            "line 2: expected 11 fields, as in the header, got 2",
        ),
        ("Data_Entry_2017_v2020.csv", f"{HEADER}\n,Mass,0,1,,,,,,,\n", "line 2: expected an image name"),
        ("Data_Entry_2017_v2020.csv", "a" * 1_000_000, "line 1: expected the columns Image Index"),
        ("BBox_List_2017.csv", "header\n00000003_000.png,Mass,1,2,3,4\n", "line 1: expected the columns Image Index"),
        (
            "BBox_List_2017.csv",
            "Image Index,Finding Label,x,w,y,h\na,Mass,1,2,3,4\n",
            "expected adjacent columns x, y, w, h",
        ),
        (
            "BBox_List_2017.csv",
            BOXES + "a.png,Mass,1,2,three,4\n",
            "line 3: expected x, y, width and height as numbers",
        ),
        ("BBox_List_2017.csv", BOXES + "a.png,Mass,1,2\n", "line 3: expected 6 fields, as in the header, got 4"),
    ],
)
def test_damaged_lists_are_errors_that_name_the_file(archive: Path, file: str, text: str, trouble: str) -> None:
    (archive / file).write_text(text)
    with pytest.raises(UserError, match=rf"{file}.*{trouble}"):
        chestxray14.manifest(str(archive))


def test_the_published_lists_with_a_part_of_the_images(real_data: Path) -> None:
    manifest = chestxray14.manifest(str(real_data / "chestxray14"))
    table = manifest.table
    assert table.num_rows == 393
    listed = "missing from the archive: 111,727 of 112,120 images listed in Data_Entry_2017_v2020.csv"
    missing = f"{listed}; continuing with 393 images"
    assert missing in manifest.notes
    boxes = pc.list_value_length(table[schema.BOXES])
    assert (pc.count(boxes).as_py(), pc.sum(boxes).as_py()) == (25, 29)
    in_test = set((real_data / "chestxray14" / "test_list.txt").read_text().split())
    for image, split in zip(*(table[name].to_pylist() for name in (schema.IMAGE_ID, schema.SPLIT)), strict=True):
        assert (split == "test") == (image in in_test)


@pytest.mark.slow
def test_the_published_lists_with_all_images(
    real_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cxr.sources import image_files
    from cxr.storage import FileEntry

    root = real_data / "chestxray14"
    names = [line.partition(",")[0] for line in (root / "Data_Entry_2017_v2020.csv").read_text().splitlines()[1:]]
    entries = [FileEntry(f"{root}/images/{name}", f"images/{name}", 1) for name in names]
    monkeypatch.setattr(image_files, "list_files", lambda uri, *_: iter(entries))
    manifest = chestxray14.manifest(str(root))
    table = manifest.table
    assert manifest.notes == []
    count = {item["values"]: item["counts"] for item in table[schema.SPLIT].value_counts().to_pylist()}
    assert count["test"] == 25_596
    assert count["train"] + count["val"] == 86_524
    assert count["val"] == pytest.approx(8_652, rel=0.05)
    boxes = pc.list_value_length(table[schema.BOXES])
    assert (pc.count(boxes).as_py(), pc.sum(boxes).as_py()) == (880, 984)
    assert len(table.group_by([schema.PATIENT_ID, schema.SPLIT]).aggregate([])) == 30_805
    assert len(table[schema.PATIENT_ID].unique()) == 30_805
    assert pc.count(table[schema.SPACING_MM]).as_py() == 112_120
