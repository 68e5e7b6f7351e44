"""`--select`: the grammar, unknown values, and messages about mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pyarrow as pa
import pytest

from cxr import schema
from cxr.errors import UserError
from cxr.sources import open_manifest, selection
from cxr.sources.options import ReadOptions
from tests.odd_files import radiograph

ROWS = [
    ("a", "PA", "F", 50.0, "DX", {"manufacturer": "Acme Imaging", "kvp": 120}),
    ("b", "AP", "M", 17.0, "CR", {"manufacturer": "Other"}),
    ("c", "LATERAL", "F", None, "DX", {"kvp": 90}),
    ("d", None, None, 80.0, "DX", {}),
]


def table() -> pa.Table:
    ids, views, sexes, ages, modalities, extra = zip(*ROWS, strict=True)
    columns = {
        schema.IMAGE_ID: ids,
        schema.PATIENT_ID: ["patient-1"] * 4,
        schema.VIEW: views,
        schema.SEX: sexes,
        schema.AGE_YEARS: ages,
        schema.MODALITY: modalities,
        schema.EXTRA: [json.dumps(entry) for entry in extra],
    }
    fields = [schema.row_schema(schema.PixelFormat()).field(name) for name in selection.COLUMNS]
    arrays = [pa.array(columns.get(field.name, [None] * 4), field.type) for field in fields]
    return pa.table(arrays, schema=pa.schema(fields))


def chosen(expression: str) -> str:
    return "".join(selection.select(table(), expression, "source test")[0][schema.IMAGE_ID].to_pylist())


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("", "abcd"),
        ("view in PA,AP", "ab"),
        ("view in (PA, AP)", "ab"),
        ("view == pa", "a"),
        ("VIEW=PA", "a"),
        ("view != PA", "bcd"),
        ("view not in LATERAL,LL", "abd"),
        ("not view in LATERAL", "abd"),
        ("view in PA,unknown", "ad"),
        ("view == unknown or sex == M", "bd"),
        ("age_years >= 18", "ad"),
        ("age_years < 18", "b"),
        ("not age_years < 18", "acd"),
        ("age_years == unknown", "c"),
        ("age_years in 17, 80", "bd"),
        ("modality in CR,DX and view in PA,AP", "ab"),
        ("view == PA or view == AP and sex == F", "a"),
        ("(view == PA or view == AP) and sex == M", "b"),
        ("not (sex == F or sex == M)", "d"),
        ("not not sex == F", "ac"),
        ("manufacturer == 'acme imaging'", "a"),
        ('manufacturer in "Acme Imaging",Other', "ab"),
        ("kvp > 100", "a"),
        ("image_id in a,d", "ad"),
    ],
)
def test_expressions(expression: str, expected: str) -> None:
    assert chosen(expression) == expected


def test_excluded_images_are_counted() -> None:
    _, (note,) = selection.select(table(), "view in PA,AP and age_years > 18", "source test")
    assert (
        note
        == "--select 'view in PA,AP and age_years > 18' left out 3 of 4 images (view: AP 1, LATERAL 1, unknown 1)"
    )


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("view in", "expected a value, got the end"),
        ("view PA", "expected a comparison after view, such as == or in, got 'PA'"),
        ("(view == PA", "expected ), got the end"),
        ("view == PA view == AP", "expected and, or, or the end, got 'view'"),
        ("and view == PA", "expected a column, got 'and'"),
        ("view not PA", "expected in, got 'PA'"),
        ("view == PA and", "expected a column, got the end"),
        ("view == 'PA", 'cannot read "\'PA"'),
        ("view == PA;drop", "no image has view 'PA;drop'"),
        ("view < PA", "expected == or in after view, which is text, got <"),
        ("age_years > old", "expected a number after age_years, got 'old'"),
        (
            "veiw == PA",
            "--select names 'veiw', which source test does not have: expected one of image_id, .*view.*kvp",
        ),
        ("view == FRONT", "no image has view 'FRONT'; the images have AP, LATERAL, PA"),
        ("manufacturer == nobody", "no image has manufacturer 'nobody'; the images have acme imaging, other"),
        ("split == train", "--select names split, which source test does not know before"),
        ("view == RAO", "left out 4 of 4 images"),
    ],
)
def test_mistakes(expression: str, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(").replace(")", r"\)")):
        selection.select(table(), expression, "source test")


def test_ids_are_not_quoted_in_messages() -> None:
    with pytest.raises(UserError) as caught:
        selection.select(table(), "patient_id == nobody", "source test")
    assert "patient-1" not in str(caught.value)


def test_options_reject_an_invalid_expression_and_record_a_valid_one() -> None:
    with pytest.raises(UserError, match="expected a value"):
        ReadOptions(select="view in")
    assert ReadOptions(select="view in PA").describe() == {"select": "view in PA"}
    with pytest.raises(UserError, match="omit --select"):
        ReadOptions(select="view in PA").check_raw("/shards")


def test_a_folder_of_pictures_does_not_know_views(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        cv2.imwrite(str(tmp_path / name), radiograph())
    with pytest.raises(UserError, match="which source folder does not know before the images are decoded"):
        open_manifest(str(tmp_path), ReadOptions(select="view in PA"))
    manifest = open_manifest(str(tmp_path), ReadOptions(select="image_id == b.png"))
    assert manifest.table[schema.IMAGE_ID].to_pylist() == ["b.png"]
    assert manifest.notes[-1] == "--select 'image_id == b.png' left out 1 of 2 images"
