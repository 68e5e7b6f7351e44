"""Scores as CSV: every family's columns, text that looks like a formula, and rows per study and patient."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pytest

from cxr import schema
from cxr.cli.commands.export_csv import Options, main
from cxr.cli.exports import export_all
from cxr.errors import UserError
from cxr.export import score_tables
from cxr.export.score_tables import Per, write_csv
from cxr.families import RECIPES
from cxr.reporting.tables import csv_text
from tests.export.scored_parts import box, image, part, probabilities, write_panel_run, write_run


def read(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as stream:
        return list(csv.DictReader(stream))


def exported(tmp_path: Path, family: str, *rows: dict[str, Any], per: Per = "image") -> list[dict[str, str]]:
    """The rows of the file, from parts of two images each."""
    parts = [part(family, rows[start : start + 2]) for start in range(0, len(rows), 2)]
    counts = write_csv(parts, str(tmp_path / "table.csv"), per)
    table = read(tmp_path / "table.csv")
    assert counts["rows"] == len(table)
    assert counts["images"] == len(rows)
    return table


def test_a_classifier_has_a_probability_and_a_decision_for_each_finding(tmp_path: Path) -> None:
    rows = exported(
        tmp_path,
        "classify",
        image("a.png", age_years=61.0, view="PA", **probabilities(0.75, math.nan)),
        image("b.png", error="truncated PNG", width_px=None, height_px=None),
        image("c.png", **probabilities(0.25, 0.5)),
    )
    assert [row["image_id"] for row in rows] == ["a.png", "b.png", "c.png"]
    assert (rows[0]["age_years"], rows[0]["view"], rows[0]["width_px"]) == ("61", "PA", "40")
    assert [(row["probability/Mass"], row["decision/Mass"]) for row in rows] == [
        ("0.75", "1"),
        ("", ""),
        ("0.25", "0"),
    ]
    assert [(row["probability/Nodule"], row["decision/Nodule"]) for row in rows] == [("", ""), ("", ""), ("0.5", "1")]
    assert [row["error"] for row in rows] == ["", "truncated PNG", ""]


def test_boxes_are_counted_and_the_best_score_of_each_finding_is_named(tmp_path: Path) -> None:
    boxes = [box("Nodule", 0.5, 1, 2, 3, 4), box("Nodule", 0.25, 1, 2, 3, 4)]
    rows = exported(
        tmp_path,
        "detect",
        image("a.png", pred_boxes=boxes),
        image("b.png", pred_boxes=[]),
        image("c.png", error="blank"),
    )
    assert [row["boxes"] for row in rows] == ["2", "0", ""]
    assert [row["box_score/Nodule"] for row in rows] == ["0.5", "", ""]
    assert {row["box_score/Mass"] for row in rows} == {""}


def test_the_thresholds_of_a_detector_decide_by_its_best_box(tmp_path: Path) -> None:
    first, second = {"study_id": "1"}, {"study_id": "2"}
    rows = [
        image("a", **first, pred_boxes=[box("Nodule", 0.5, 1, 2, 3, 4), box("Mass", 0.9, 1, 2, 3, 4)]),
        image("b", **first, pred_boxes=[box("Nodule", 0.25, 1, 2, 3, 4)]),
        image("c", **first, error="blank"),
        image("d", **second, pred_boxes=[]),
    ]
    for per, expected in (("image", ["1", "0", "", "0"]), ("study", ["1", "0"])):
        write_csv([part("detect", rows)], str(tmp_path / "table.csv"), per, {"Nodule": 0.5})  # pyright: ignore[reportArgumentType]
        table = read(tmp_path / "table.csv")
        assert [row["decision/Nodule"] for row in table] == expected
        assert "decision/Mass" not in table[0]


def test_masks_have_an_area_and_aligners_six_numbers(tmp_path: Path) -> None:
    mask = {"mask_rle": "5 4", "mask_area_px": 4, "mask_probability": math.nan}
    (row,) = exported(tmp_path, "lungs", image("a.png", **mask))
    assert (row["mask_area_px"], row["mask_probability"]) == ("4", "")
    assert "mask_rle" not in row
    (row,) = exported(tmp_path, "align", image("a.png", theta=[1, 0, 0.5, 0, 1, 0]))
    assert [row[f"theta/{number}"] for number in range(6)] == ["1", "0", "0.5", "0", "1", "0"]


@pytest.mark.parametrize("family", sorted(RECIPES))
def test_every_score_of_every_family_has_a_column(family: str, tmp_path: Path) -> None:
    (row,) = exported(tmp_path, family, image("a.png"))
    kinds = {name.partition("/")[0] for name in row}
    columns = {"probabilities": "probability", "decisions": "decision", "pred_boxes": "boxes", "mask_rle": ""}
    score_columns = RECIPES_COLUMNS[family]
    assert {columns.get(name, name) for name in score_columns} - {""} <= kinds
    assert {name for name in schema.SCORES.names if name != schema.RESIZE_TRANSFORM} <= kinds


RECIPES_COLUMNS = {family: part(family, []).column_names[len(schema.SCORES) :] for family in RECIPES}


@pytest.mark.parametrize("name", ["=1+1", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "\r=1", "\n=1"])
def test_text_is_never_a_formula(name: str, tmp_path: Path) -> None:
    rows = exported(tmp_path, "classify", image(name, patient_id=name, error=name), image("a=b", study_id="-1"))
    assert [rows[0][column] for column in ("image_id", "patient_id", "error")] == [f"'{name}"] * 3
    assert (rows[1]["image_id"], rows[1]["study_id"]) == ("a=b", "-1")
    assert rows[0]["source_uri"] == f"/archive/{name}"
    assert csv_text([{name: name, "value": -0.5, "text": "-1"}]) == csv_text(
        [{f"'{name}": f"'{name}", "value": -0.5, "text": "-1"}]
    )


def test_text_with_quotes_commas_and_line_breaks_is_read_back(tmp_path: Path) -> None:
    name = 'a "b", c;\nd.png'
    (row,) = exported(tmp_path, "classify", image(name))
    assert row["image_id"] == name


def test_a_study_has_the_maximum_over_its_frontal_images(tmp_path: Path) -> None:
    first, second = {"study_id": "1", "patient_id": "p"}, {"study_id": "2", "patient_id": "p"}
    rows = exported(
        tmp_path,
        "classify",
        image("a", **first, view="PA", **probabilities(0.25, 0.75)),
        image("b", **second, gate="lateral", **probabilities(0.9, 0.9)),
        image("c", **first, view="AP", **probabilities(0.5, 0.125)),
        image("d", **first, view="LATERAL", **probabilities(0.99, 0.99)),
        image("e", **first, gate="frontal", view=None, error="truncated"),
        image("f", patient_id="q", gate="frontal", **probabilities(0.5, 0.5)),
        per="study",
    )
    one, two, unknown = rows
    assert (one["study_id"], one["patient_id"], one["images"], one["frontal_images"], one["errors"]) == (
        *("1", "p", "4"),
        *("2", "1"),
    )
    assert (one["probability/Mass"], one["decision/Mass"], one["image/Mass"]) == ("0.5", "1", "c")
    assert (one["probability/Nodule"], one["decision/Nodule"], one["image/Nodule"]) == ("0.75", "1", "a")
    assert (two["study_id"], two["frontal_images"], two["probability/Mass"], two["image/Mass"]) == ("2", "0", "", "")
    assert (unknown["study_id"], unknown["patient_id"], unknown["image/Mass"]) == ("", "q", "f")


def test_studies_of_different_patients_with_the_same_id_have_different_rows(tmp_path: Path) -> None:
    rows = exported(
        tmp_path,
        "classify",
        image("a", study_id="study1", patient_id="p", **probabilities(0.25, 0.5)),
        image("b", study_id="study1", patient_id="q", **probabilities(0.75, 0.5)),
        image("c", study_id="study1", patient_id="p", **probabilities(0.5, 0.5)),
        image("d", study_id="study1", **probabilities(0.125, 0.5)),
        per="study",
    )
    assert [(row["study_id"], row["patient_id"], row["images"], row["probability/Mass"]) for row in rows] == [
        ("study1", "", "1", "0.125"),
        ("study1", "p", "2", "0.5"),
        ("study1", "q", "1", "0.75"),
    ]


def test_a_patient_has_the_maximum_over_all_studies(tmp_path: Path) -> None:
    rows = exported(
        tmp_path,
        "detect",
        image("a", study_id="1", patient_id="p", pred_boxes=[box("Mass", 0.25, 1, 2, 3, 4)]),
        image("b", study_id="2", patient_id="p", pred_boxes=[box("Mass", 0.5, 1, 2, 3, 4)] * 2),
        image("c", study_id="3", patient_id="o", pred_boxes=[]),
        per="patient",
    )
    assert [(row["patient_id"], row["images"], row["boxes"]) for row in rows] == [("o", "1", "0"), ("p", "2", "3")]
    assert [(row["box_score/Mass"], row["box_image/Mass"]) for row in rows] == [("", ""), ("0.5", "b")]
    assert "study_id" not in rows[0]


def test_masks_of_a_study_name_the_image_with_the_largest(tmp_path: Path) -> None:
    rows = exported(
        tmp_path,
        "pneumothorax",
        image("a", study_id="1", mask_area_px=3, mask_probability=0.75),
        image("b", study_id="1", mask_area_px=9, mask_probability=0.5),
        per="study",
    )
    (row,) = rows
    assert (row["mask_area_px"], row["mask_image"], row["mask_probability"]) == ("9", "b", "0.75")


def test_what_cannot_be_combined_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="none of 1 images has a study"):
        exported(tmp_path, "classify", image("a"), per="study")
    with pytest.raises(UserError, match="those of an aligner: export them per image"):
        exported(tmp_path, "align", image("a", study_id="1"), per="study")


def parts_of_a_large_run(parts: int, allocated: list[int]) -> Iterator[pa.Table]:
    """100 images in each part, two in each study; notes how much memory Arrow holds when a part is requested."""
    for number in range(parts):
        allocated.append(pa.total_allocated_bytes())
        names = range(100 * number, 100 * number + 100)
        yield part("classify", [image(f"{n:06d}", study_id=f"s{n // 2}", **probabilities(0.5, 0.5)) for n in names])


@pytest.mark.parametrize("per", get_args(Per))
def test_memory_does_not_grow_with_the_run(per: Per, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_tables, "_SORTED_ROWS", 100)
    monkeypatch.setattr(score_tables, "_SPLIT_ROWS", 200)
    groups, in_memory = score_tables._groups, []
    monkeypatch.setattr(
        score_tables, "_groups", lambda rows, per: in_memory.append(rows.num_rows) or groups(rows, per)
    )
    allocated: list[int] = []
    write_csv(parts_of_a_large_run(40, allocated), str(tmp_path / "table.csv"), per)
    assert max(allocated[30:]) < 1.5 * max(allocated[:10]) + 100_000
    assert sum(in_memory) in (0, 4000)
    assert max(in_memory, default=0) < 4000 / 16
    if per == "study":
        table = read(tmp_path / "table.csv")
        assert sorted(row["study_id"] for row in table) == sorted(f"s{n}" for n in range(2000))
        assert {row["images"] for row in table} == {"2"}


def test_the_command_reads_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [image(name, study_id="1", **probabilities(0.5, 0.25)) for name in "ab"]
    run = write_run(tmp_path / "run", "classify", [rows[:1], rows[1:]])
    result = main(Options(run=run, out=str(tmp_path / "out")))
    assert result["metrics"] == {"rows": 2, "images": 2, "errors": 0}
    assert [row["image_id"] for row in read(tmp_path / "out" / "scores.csv")] == ["a", "b"]
    assert main(Options(run=run, per="study", out=str(tmp_path / "out")))["table"].endswith("out/studies.csv")
    assert "1 row for 2 images" in capsys.readouterr().out
    with pytest.raises(UserError, match="is the folder of the run: use another one"):
        main(Options(run=run, out=run))


def test_one_of_several_checkpoints_is_exported_by_its_name(tmp_path: Path) -> None:
    boxes, p = {"pred_boxes": [box("Mass", 0.5, 1, 2, 3, 4)]}, probabilities(0.25, 0.75)
    members = {"lesions": part("detect", [image("a", **boxes)]), "findings": part("classify", [image("a", **p)])}
    run, out = write_panel_run(tmp_path / "run", members), str(tmp_path / "out")
    with pytest.raises(UserError, match="name one with --member: lesions, findings"):
        main(Options(run=run, out=out))
    main(Options(run=run, member="findings", out=out))
    (row,) = read(tmp_path / "out" / "scores.csv")
    assert (row["image_id"], row["probability/Nodule"]) == ("a", "0.75")
    assert "boxes" not in row
    written = [str(Path(uri).relative_to(run)) for uri in export_all(run, ["csv", "coco"])]
    assert written == ["exports/lesions/scores.csv", "exports/lesions/coco.json", "exports/findings/scores.csv"]
