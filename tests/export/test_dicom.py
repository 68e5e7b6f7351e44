"""`cxr export dicom`: objects read back and compared with the scores, references, repeated exports, failures."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from highdicom import seg, sr
from pydicom import Dataset, dcmread
from pydicom.sr._concepts_dict import concepts

import cxr
from cxr import schema
from cxr.cli.commands.export_dicom import Options, main
from cxr.data.identity import Identity
from cxr.errors import ImageRejectedError, UserError
from cxr.export import dicom_codes, dicom_sc, dicom_seg
from cxr.export.dicom_results import Algorithm, BoxScore, ImageResult
from cxr.export.dicom_source import read_source
from cxr.imaging.decode import decode
from cxr.reporting.palette import MARK, PREDICTION, rgb
from cxr.schema import FINDINGS, NO_FINDING, VINDR_GLOBAL_FINDINGS, VINDR_LOCAL_FINDINGS
from cxr.sources import rle
from cxr.sources.pseudonyms import Pseudonyms
from tests.families.test_recipes import SMALL
from tests.made_dicoms import SHA256, SYNTAXES, made_uid, scored, write_run, xray, xray_file
from tests.saved_checkpoint import save_untrained
from tests.written_runs import set_settings, settings_of

CLASSES = pa.schema(
    [(schema.PROBABILITIES, pa.list_(pa.float32())), (schema.DECISIONS, pa.list_(pa.int8())), *schema.BOX_SCORES]
)
NAMES = ("Mass", "Pleural_Thickening", "Hernia")
CORNERS = (3.25, 4.0, 40.5, 90.125)
NAN = float("nan")


def box(score: float = 0.8, label: str = "Mass") -> dict[str, Any]:
    corners = dict(zip((schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX), CORNERS, strict=True))
    return {schema.LABEL: label, schema.SCORE: score, **corners}


def positive(**columns: Any) -> dict[str, Any]:
    return {schema.PROBABILITIES: [0.7, 0.2, NAN], schema.DECISIONS: [1, 0, -1], schema.PRED_BOXES: [box()]} | columns


def negative() -> dict[str, Any]:
    return {schema.PROBABILITIES: [0.1, 0.2, NAN], schema.DECISIONS: [0, 0, -1], schema.PRED_BOXES: [box(0.1)]}


def write_images(archive: Path, datasets: list[Dataset]) -> list[Path]:
    archive.mkdir(parents=True, exist_ok=True)
    paths = [archive / f"{number}.dcm" for number in range(len(datasets))]
    for number, (path, ds) in enumerate(zip(paths, datasets, strict=True)):
        path.write_bytes(xray_file(ds, SYNTAXES[number % len(SYNTAXES)]))
    return paths


def localizer_run(tmp_path: Path, rows: list[dict[str, Any]], **settings: Any) -> str:
    archive = tmp_path / "archive"
    return write_run(tmp_path / "run", rows, CLASSES, family="localize", findings=NAMES, archive=archive, **settings)


def export(run: str, out: Path, **options: Any) -> dict[tuple[str, str], dict[str, str]]:
    """Run the command; returns the rows of export.csv by image and kind."""
    main(Options(**{"run": run, "out": str(out), "workers": 1} | options))
    with (out / "export.csv").open() as file:
        return {(row["image_id"], row["kind"]): row for row in csv.DictReader(file)}


@pytest.fixture
def two(tmp_path: Path) -> tuple[str, list[Dataset]]:
    """A run on a positive and a negative image of one study."""
    images = [xray(0), xray(1, PhotometricInterpretation="MONOCHROME1")]
    paths = write_images(tmp_path / "archive", images)
    rows = [scored(images[0], paths[0], **positive()), scored(images[1], paths[1], **negative())]
    return localizer_run(tmp_path, rows), images


def masked_run(tmp_path: Path, masks: list[np.ndarray], family: str = "pneumothorax") -> tuple[str, list[Dataset]]:
    images = [xray(number) for number in range(len(masks))]
    paths = write_images(tmp_path / "archive", images)
    rows = [
        scored(ds, path, mask_rle=rle.encode(mask), mask_area_px=int(mask.sum()), mask_probability=0.75)
        for ds, path, mask in zip(images, paths, masks, strict=True)
    ]
    archive = tmp_path / "archive"
    return write_run(tmp_path / "run", rows, schema.MASK_SCORES, family=family, archive=archive), images


# ---- Contents


def test_report_contains_probabilities_thresholds_decisions_and_boxes(two: Any, tmp_path: Path) -> None:
    run, images = two
    (tmp_path / "checkpoint").mkdir()
    learned = {"thresholds": {"findings": [*NAMES], "values": [0.625, 0.25, 0.5]}}
    about = {"kind": "cxr-checkpoint", "version": 2, "sha256": SHA256, "learned": learned}
    (tmp_path / "checkpoint/checkpoint.json").write_text(json.dumps(about))
    rows = export(run, tmp_path / "out", checkpoint=str(tmp_path / "checkpoint"))
    report = sr.srread(tmp_path / "out" / rows[images[0].SOPInstanceUID, "sr"]["file"])
    assert report.SOPClassUID.name == "Comprehensive SR Storage"
    assert report.content[0].ContentTemplateSequence[0].TemplateIdentifier == "1500"

    mass, thickening = report.content.get_image_measurement_groups()  # the untrained finding is left out
    assert mass.finding_type == dicom_codes.finding_code("Mass")
    assert thickening.finding_type.scheme_designator == "99CXR"
    for group, probability, threshold, decision in (
        (mass, 0.7, 0.625, dicom_codes.PRESENT),
        (thickening, 0.2, 0.25, dicom_codes.ABSENT),
    ):
        values = {measurement.name.value: measurement.value for measurement in group.get_measurements()}
        assert np.float32(values[dicom_codes.PROBABILITY.value] / 100) == np.float32(probability)
        assert values[dicom_codes.THRESHOLD.value] == 100 * threshold
        assert [evaluation.value for evaluation in group.get_qualitative_evaluations()] == [decision]
        (image,) = group.source_images
        assert image.referenced_sop_instance_uid == images[0].SOPInstanceUID

    (found,) = report.content.get_planar_roi_measurement_groups()
    x0, y0, x1, y1 = CORNERS  # exact in float32
    np.testing.assert_array_equal(found.roi.value, [[x0, y0], [x1, y0], [x1, y1], [x0, y1], [x0, y0]])
    assert np.float32(found.get_measurements()[0].value / 100) == np.float32(0.8)
    names = {item.ConceptNameCodeSequence[0].CodeMeaning: item for item in found[0].ContentSequence}
    assert names["Algorithm Name"].TextValue == "cxr localize"
    assert SHA256[:16] in names["Algorithm Version"].TextValue
    assert SHA256 in names["Algorithm Parameters"].TextValue


def test_boxes_below_the_limit_and_of_no_finding_are_left_out(tmp_path: Path) -> None:
    images = [xray(0)]
    paths = write_images(tmp_path / "archive", images)
    boxes = [box(0.9), box(0.3, "ILD"), box(0.99, NO_FINDING)]
    rows = [scored(images[0], paths[0], **{schema.PRED_BOXES: boxes})]
    findings = ["Mass", "ILD", "Hernia"]
    archive = tmp_path / "archive"
    run = write_run(tmp_path / "run", rows, schema.BOX_SCORES, family="detect", findings=findings, archive=archive)
    written = export(run, tmp_path / "out", box_score=0.5, kinds=("sr",))
    content = sr.srread(tmp_path / "out" / written[images[0].SOPInstanceUID, "sr"]["file"]).content
    assert [group.finding_type for group in content.get_planar_roi_measurement_groups()] == [
        dicom_codes.finding_code("Mass")
    ]
    decisions = [group.get_qualitative_evaluations()[0].value for group in content.get_image_measurement_groups()]
    assert decisions == [dicom_codes.PRESENT, dicom_codes.ABSENT, dicom_codes.ABSENT]

    set_settings(run, settings_of(run) | {"thresholds": {"Mass": 0.95, "ILD": 0.25}})
    written = export(run, tmp_path / "out", box_score=0.5, kinds=("sr",))
    content = sr.srread(tmp_path / "out" / written[images[0].SOPInstanceUID, "sr"]["file"]).content
    (group,) = content.get_planar_roi_measurement_groups()
    assert group.finding_type == dicom_codes.finding_code("ILD")
    groups = content.get_image_measurement_groups()
    decisions = [group.get_qualitative_evaluations()[0].value for group in groups]
    assert decisions == [dicom_codes.ABSENT, dicom_codes.PRESENT, dicom_codes.ABSENT]
    thresholds = [
        measurement.value for group in groups for measurement in group.get_measurements(dicom_codes.THRESHOLD)
    ]
    assert thresholds == pytest.approx([95, 25, 50])


@pytest.mark.parametrize("spelling", [NO_FINDING, "No Finding", "Normal"])
def test_no_finding_is_not_a_finding(spelling: str, tmp_path: Path) -> None:
    columns = pa.schema([*CLASSES][:2])
    images = [xray(0), xray(1)]
    paths = write_images(tmp_path / "archive", images)
    values = [([0.1, 0.9], [0, 1]), ([0.9, 0.8], [1, 1])]
    rows = [
        scored(ds, path, **{schema.PROBABILITIES: probabilities, schema.DECISIONS: decisions})
        for ds, path, (probabilities, decisions) in zip(images, paths, values, strict=True)
    ]
    about: dict[str, Any] = {"family": "classify", "findings": ["Mass", spelling], "archive": tmp_path / "archive"}
    written = export(write_run(tmp_path / "run", rows, columns, **about), tmp_path / "out", kinds=("sr",))
    assert written[images[0].SOPInstanceUID, ""]["status"] == "below threshold"
    report = sr.srread(tmp_path / "out" / written[images[1].SOPInstanceUID, "sr"]["file"])
    (group,) = report.content.get_image_measurement_groups()
    assert group.finding_type == dicom_codes.finding_code("Mass")


@pytest.mark.parametrize("family", ["pneumothorax", "lungs"])
def test_segmentation_has_the_mask_bit_for_bit_and_the_report_refers_to_it(family: str, tmp_path: Path) -> None:
    mask = np.random.default_rng(0).random((96, 80)) < 0.3
    run, images = masked_run(tmp_path, [mask], family)
    rows = export(run, tmp_path / "out")
    uid = images[0].SOPInstanceUID
    made = seg.segread(tmp_path / "out" / rows[uid, "seg"]["file"])
    np.testing.assert_array_equal(made.get_pixels_by_source_instance([uid])[0, ..., 0].astype(bool), mask)
    assert made.segmentation_type.value == "BINARY"
    (segment,) = made.SegmentSequence
    assert segment.SegmentAlgorithmType == "AUTOMATIC"
    label = "Lungs" if family == "lungs" else "Pneumothorax"
    category = dicom_codes.ANATOMY if family == "lungs" else dicom_codes.ABNORMALITY
    assert segment.SegmentedPropertyTypeCodeSequence[0].CodeValue == dicom_codes.finding_code(label).value
    assert segment.SegmentedPropertyCategoryCodeSequence[0].CodeValue == category.value
    report = sr.srread(tmp_path / "out" / rows[uid, "sr"]["file"])
    assert {uid, made.SOPInstanceUID} <= {*_values(report, "ReferencedSOPInstanceUID")}
    assert segment.TrackingUID in _values(report, "UID")
    assert float(mask.sum()) in [float(value) for value in _values(report, "NumericValue")]


def _values(ds: Dataset, keyword: str) -> list[Any]:
    return [element.value for element in ds.iterall() if element.keyword == keyword]


def test_fractional_segmentation_has_the_probability_of_each_pixel(tmp_path: Path) -> None:
    run, images = masked_run(tmp_path, [np.ones((96, 80), bool)], "lungs")
    with pytest.raises(UserError, match="--fractional needs the run's checkpoint"):
        export(run, tmp_path / "out", fractional=True)
    checkpoint = save_untrained(tmp_path / "checkpoint", SMALL["lungs"])
    with pytest.raises(UserError, match="other weights"):
        export(run, tmp_path / "out", fractional=True, checkpoint=checkpoint)
    sha256 = json.loads(Path(checkpoint, "checkpoint.json").read_text())["sha256"]
    set_settings(run, settings_of(run) | {"checkpoint_sha256": sha256})
    rows = export(run, tmp_path / "out", fractional=True, checkpoint=checkpoint)
    uid = images[0].SOPInstanceUID
    made = seg.segread(tmp_path / "out" / rows[uid, "seg"]["file"])
    assert (made.segmentation_type.value, made.segmentation_fractional_type.value) == ("FRACTIONAL", "PROBABILITY")
    (found,) = cxr.load(checkpoint, precision="float32").segment([str(tmp_path / "archive/0.dcm")])
    expected = found.on_original(schema.LUNGS)
    assert np.ptp(expected) > 0.05
    written = made.get_pixels_by_source_instance([uid], rescale_fractional=True)[0, ..., 0]
    np.testing.assert_allclose(written, expected, atol=0.51 / 255)


def test_an_empty_mask_has_no_segmentation(tmp_path: Path) -> None:
    run, images = masked_run(tmp_path, [np.zeros((96, 80), bool)])
    uid = images[0].SOPInstanceUID
    assert export(run, tmp_path / "out")[uid, ""]["status"] == "below threshold"
    rows = export(run, tmp_path / "out", all_images=True)
    assert [rows[uid, kind]["status"] for kind in ("sr", "seg", "sc")] == ["written", "no mask", "written"]


def test_an_image_without_any_result_has_no_report(tmp_path: Path) -> None:
    ds = xray(0)
    (path,) = write_images(tmp_path / "archive", [ds])
    unknown = {schema.PROBABILITIES: [NAN] * 3, schema.DECISIONS: [-1] * 3, schema.PRED_BOXES: []}
    written = export(localizer_run(tmp_path, [scored(ds, path, **unknown)]), tmp_path / "out", all_images=True)
    assert written[ds.SOPInstanceUID, "sr"]["status"] == "no findings"
    assert "nothing to report" in written[ds.SOPInstanceUID, "sr"]["reason"]
    assert written[ds.SOPInstanceUID, "sc"]["status"] == "written"


def test_a_report_refers_to_a_segmentation_only_if_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> bytes:
        raise ImageRejectedError("no segmentation today")

    run, images = masked_run(tmp_path, [np.eye(96, 80, dtype=bool)])
    uid, out = images[0].SOPInstanceUID, tmp_path / "out"

    def references(rows: Any) -> int:
        return len(sr.srread(out / rows[uid, "sr"]["file"]).content.get_planar_roi_measurement_groups())

    with monkeypatch.context() as failing:
        failing.setattr(dicom_seg, "segmentation", fail)
        rows = export(run, out)
        assert [rows[uid, kind]["status"] for kind in ("sr", "seg")] == ["written", "failed"]
        assert references(rows) == 0
        time_ns = (out / rows[uid, "sr"]["file"]).stat().st_mtime_ns
        assert export(run, out) == rows
        assert (out / rows[uid, "sr"]["file"]).stat().st_mtime_ns == time_ns
    rows = export(run, out)
    assert [rows[uid, kind]["status"] for kind in ("sr", "seg")] == ["written", "written"]
    assert references(rows) == 1


def test_the_picture_shows_the_displayed_image_with_boxes_and_the_warning() -> None:
    pixels = decode(xray_file(xray(1, PhotometricInterpretation="MONOCHROME1"))).pixels
    assert pixels.dtype == np.uint16
    result = ImageResult("1", "", None, None, None, 96, 80, boxes=(BoxScore("Mass", 0.8, CORNERS),))
    picture = dicom_sc.drawn(pixels, result, Algorithm("detect", SHA256))
    scale = 1024 / 96
    assert picture.shape[0] == 1024
    edge = picture[round((CORNERS[1] + CORNERS[3]) / 2 * scale), round(CORNERS[0] * scale)]
    np.testing.assert_array_equal(edge, rgb(PREDICTION))
    for color in (PREDICTION, MARK):
        assert (picture == np.array(rgb(color), np.uint8)).all(-1).sum() > 1000
    shown = picture[200:800:50, 500:800:50, 0].astype(int)
    expected = pixels[(np.arange(200, 800, 50) / scale).astype(int)][:, (np.arange(500, 800, 50) / scale).astype(int)]
    assert np.corrcoef(shown.ravel(), expected.ravel())[0, 1] > 0.99


def test_secondary_capture_says_that_it_is_derived_and_annotated(two: Any, tmp_path: Path) -> None:
    run, images = two
    uid = images[0].SOPInstanceUID
    made = dcmread(tmp_path / "out" / export(run, tmp_path / "out")[uid, "sc"]["file"])
    assert (made.BurnedInAnnotation, made.ConversionType, made.ImageType[0]) == ("YES", "WSD", "DERIVED")
    assert made.SourceImageSequence[0].ReferencedSOPInstanceUID == uid
    assert made.pixel_array.shape == (made.Rows, made.Columns, 3)


def test_large_images_are_shrunk_to_a_sensible_size() -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (2600, 3000), np.uint8)
    picture = dicom_sc.drawn(pixels, ImageResult("1", "", None, None, None, 2600, 3000), Algorithm("aecnn", SHA256))
    assert picture.shape[0] == round(2600 * 2048 / 3000)


# ---- Identity and references


def test_objects_carry_the_patient_and_study_of_the_original_and_nothing_else_does(
    two: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, images = two
    rows = export(run, tmp_path / "out")
    printed = capsys.readouterr()
    original = images[0]
    keywords = ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "PatientAge", "StudyInstanceUID")
    keywords += ("StudyDate", "StudyTime", "StudyID", "AccessionNumber", "ReferringPhysicianName", "StudyDescription")
    for kind in ("sr", "sc"):
        made = dcmread(tmp_path / "out" / rows[original.SOPInstanceUID, kind]["file"])
        assert {name: made[name].value for name in keywords} == {name: original[name].value for name in keywords}
    texts = [printed.out, printed.err, (tmp_path / "out/export.csv").read_text()]
    texts += [str(path) for path in (tmp_path / "out").rglob("*")]
    texts += [path.read_text() for path in (tmp_path / "out/parts").iterdir()]
    for value in ("Doe", "ID-0", "ACC0", "House", "19700102"):
        assert not [text for text in texts if value in text]


@pytest.mark.parametrize(
    ("character_set", "name"),
    [("ISO_IR 100", "Müller^Zoë"), ("ISO_IR 192", "山田^太郎"), (["", "ISO 2022 IR 87"], "Yamada^Tarou=山田^太郎")],
)
def test_names_keep_their_characters(character_set: Any, name: str, tmp_path: Path) -> None:
    ds = xray(0, SpecificCharacterSet=character_set)
    ds.PatientName = name
    (path,) = write_images(tmp_path / "archive", [ds])
    run = localizer_run(tmp_path, [scored(ds, path, **positive())])
    for row in export(run, tmp_path / "out").values():
        made = dcmread(tmp_path / "out" / row["file"])
        assert str(made.PatientName) == name
        assert made.SpecificCharacterSet == ds.SpecificCharacterSet


@pytest.mark.parametrize(
    ("character_set", "name"),
    [(None, "Doe^Jane"), ("ISO_IR 100", "Müller^Zoë"), (["", "ISO 2022 IR 87"], "山田^太郎")],
)
def test_findings_in_any_script_are_written_in_utf8_with_the_original_texts(
    character_set: Any, name: str, tmp_path: Path
) -> None:
    procedure = Dataset()
    procedure.CodeValue, procedure.CodingSchemeDesignator, procedure.CodeMeaning = "1", "99X", name.partition("^")[0]
    ds = xray(0, ProcedureCodeSequence=[procedure])
    if character_set:
        ds.SpecificCharacterSet = character_set
    ds.PatientName = name
    (path,) = write_images(tmp_path / "archive", [ds])
    findings = {"findings": ["気胸", "Épanchement", "Hernia"], "archive": tmp_path / "archive"}
    run = write_run(
        tmp_path / "run",
        [scored(ds, path, **positive(pred_boxes=[box(0.9, "気胸")]))],
        CLASSES,
        family="localize",
        **findings,
    )
    written = export(run, tmp_path / "out")
    report = sr.srread(tmp_path / "out" / written[ds.SOPInstanceUID, "sr"]["file"])
    assert report.SpecificCharacterSet == "ISO_IR 192"
    assert str(report.PatientName) == name
    assert report.ProcedureCodeSequence[0].CodeMeaning == procedure.CodeMeaning
    groups = report.content.get_image_measurement_groups()
    assert [group.finding_type.meaning for group in groups] == ["気胸", "Épanchement"]
    assert [group.tracking_identifier for group in groups] == ["finding: 気胸", "finding: Épanchement"]
    picture = dcmread(tmp_path / "out" / written[ds.SOPInstanceUID, "sc"]["file"])
    assert picture.get("SpecificCharacterSet") == (character_set or None)


def test_identifiers_with_several_values_stay_as_they_are(tmp_path: Path) -> None:
    ds = xray(0, AccessionNumber=["A1", "A2"], StudyID=["S1", "S2"])
    (path,) = write_images(tmp_path / "archive", [ds])
    for row in export(localizer_run(tmp_path, [scored(ds, path, **positive())]), tmp_path / "out").values():
        made = dcmread(tmp_path / "out" / row["file"])
        assert (made.AccessionNumber, made.StudyID) == (["A1", "A2"], ["S1", "S2"])


@pytest.mark.filterwarnings("ignore:Invalid value for VR")
@pytest.mark.parametrize(
    ("tags", "spacing_mm", "orientation"),
    [
        ({}, (0.2, 0.2), ["L", "F"]),
        ({"PixelSpacing": "0.1", "ImagerPixelSpacing": [0.3, 0.4]}, (0.3, 0.4), ["L", "F"]),
        ({"PixelSpacing": "0.1", "PatientOrientation": "LF"}, None, None),
        ({"PixelSpacing": [0, 0.1], "PatientOrientation": ["L", "F", "H"]}, None, None),
    ],
)
def test_spacing_and_orientation_of_the_original(
    tags: dict[str, Any], spacing_mm: Any, orientation: Any, tmp_path: Path
) -> None:
    ds = xray(0, **tags)
    (path,) = write_images(tmp_path / "archive", [ds])
    source = read_source(str(path))
    assert source.spacing_mm == spacing_mm
    assert source.reference.PatientOrientation == orientation
    written = export(localizer_run(tmp_path, [scored(ds, path, **positive())]), tmp_path / "out")
    assert {row["status"] for row in written.values()} == {"written"}


def test_one_series_per_kind_model_and_study_and_the_same_uids_again(tmp_path: Path) -> None:
    images = [xray(number) for number in range(4)]  # two studies
    paths = write_images(tmp_path / "archive", images)
    run = localizer_run(tmp_path, [scored(ds, path, **positive()) for ds, path in zip(images, paths, strict=True)])
    first, second = export(run, tmp_path / "a"), export(run, tmp_path / "b")
    assert first == second
    assert len({row["series_uid"] for row in first.values()}) == 4
    assert len({row["sop_uid"] for row in first.values()}) == 8
    written = dcmread(tmp_path / "a" / first[images[0].SOPInstanceUID, "sr"]["file"])
    assert written.SeriesInstanceUID == first[images[1].SOPInstanceUID, "sr"]["series_uid"]


# ---- Repeated exports


def test_a_second_export_writes_only_what_has_changed(two: Any, tmp_path: Path) -> None:
    run, images = two
    out = tmp_path / "out"
    rows = export(run, out, all_images=True)
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.dcm")}
    assert len(times) == 4
    assert export(run, out, all_images=True) == rows
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.dcm")} == times
    lost = out / rows[images[0].SOPInstanceUID, "sc"]["file"]
    lost.unlink()
    scores = Path(run, "scores/part-00000.parquet")
    table = pq.read_table(scores)
    changed = [[0.7, 0.2, NAN], [0.15, 0.2, NAN]]
    column = pa.array(changed, table[schema.PROBABILITIES].type)
    place = table.schema.get_field_index(schema.PROBABILITIES)
    pq.write_table(table.set_column(place, schema.PROBABILITIES, column), scores)
    export(run, out, all_images=True)
    again = {path for path, time in times.items() if path.stat().st_mtime_ns != time}
    assert again == {lost, *(out / rows[images[1].SOPInstanceUID, kind]["file"] for kind in ("sr", "sc"))}
    export(run, out)
    assert len([*out.rglob("*.dcm")]) == 2  # those of the image without a finding are deleted


def test_an_export_continues_after_an_interruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cxr.export import dicom_run, dicom_write

    images = [xray(number) for number in range(5)]
    paths = write_images(tmp_path / "archive", images)
    run = localizer_run(tmp_path, [scored(ds, path, **positive()) for ds, path in zip(images, paths, strict=True)])
    whole = export(run, tmp_path / "whole", kinds=("sr",))
    monkeypatch.setattr(dicom_run, "_PART_IMAGES", 2)
    read, seen = dicom_write.read_source, []

    def interrupted(uri: str) -> Any:
        seen.append(uri)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return read(uri)

    monkeypatch.setattr(dicom_write, "read_source", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(run, tmp_path / "out", kinds=("sr",))
    assert export(run, tmp_path / "out", kinds=("sr",)) == whole
    assert len(seen) == 4 + 3  # the two images of the complete part are not read again


def test_several_processes_write_the_same_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cxr.export import dicom_processes, dicom_run

    images = [xray(number) for number in range(6)]
    paths = write_images(tmp_path / "archive", images)
    paths[3].write_bytes(b"no DICOM file")
    rows = [scored(ds, path, **positive()) for ds, path in zip(images, paths, strict=True)]
    run = localizer_run(tmp_path, [*rows, scored(xray(9), paths[0], **negative())])
    expected = export(run, tmp_path / "one", kinds=("sr",))
    monkeypatch.setattr(dicom_processes, "_HERE_AT_MOST", 0)
    monkeypatch.setattr(dicom_run, "_PART_IMAGES", 2)
    for _ in range(2):  # the second time, only the file that is no DICOM file is read
        assert export(run, tmp_path / "several", kinds=("sr",), workers=2) == expected
    assert len([*(tmp_path / "several").rglob("*.dcm")]) == 5


@pytest.mark.slow
def test_an_interrupted_command_ends_soon_and_continues(tmp_path: Path) -> None:
    images = [xray(number) for number in range(400)]
    paths = write_images(tmp_path / "archive", images)
    run = localizer_run(tmp_path, [scored(ds, path, **positive()) for ds, path in zip(images, paths, strict=True)])
    out = tmp_path / "out"
    options = ["--run", run, "--out", str(out), "--workers", "2", "--kinds", "sr"]
    command = [sys.executable, "-m", "cxr.cli.main", "export", "dicom", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    while process.poll() is None and not [*out.glob("parts/*")]:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    assert not [path for path in out.rglob("*") if path.name.endswith(".partial")]
    written = {path: path.stat().st_mtime_ns for path in out.rglob("*.dcm")}
    recorded = {row["file"] for part in out.glob("parts/*") for row in json.loads(part.read_text())}
    assert 0 < len(recorded) < len(images)
    assert len(export(run, out, kinds=("sr",))) == len(images)
    again = {str(path.relative_to(out)) for path, at in written.items() if path.stat().st_mtime_ns != at}
    assert not again & recorded


def test_out_belongs_to_one_model(two: Any, tmp_path: Path) -> None:
    run, _ = two
    export(run, tmp_path / "out", kinds=("sr",))
    set_settings(run, settings_of(run) | {"checkpoint_sha256": "f" * 64})
    with pytest.raises(UserError, match="use another --out"):
        export(run, tmp_path / "out", kinds=("sr",))


# ---- Images that cannot be exported


@pytest.mark.filterwarnings("ignore:Invalid value for VR")  # of the test's own broken files
def test_every_image_that_cannot_be_exported_has_a_row_with_the_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [
        xray(0, StudyInstanceUID=None),
        xray(1, SeriesInstanceUID=None),
        xray(2),
        xray(3, StudyInstanceUID="Doe^Jane"),
        xray(4),
        xray(5),
        xray(6),
        xray(8, PatientID=["ID-8", "ID-9"]),
        xray(7, PatientSex="unknown", PatientBirthDate="last May", StudyDate="??", PatientID=None, StudyTime=None),
    ]
    archive = tmp_path / "archive"
    paths = write_images(archive, images)
    paths[2].write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(500))
    paths[4].unlink()
    paths[5].write_bytes(xray_file(xray(50)))  # another image at the same place
    paths[6].write_bytes(paths[6].read_bytes()[:300])
    rows = [scored(ds, path, **positive()) for ds, path in zip(images, paths, strict=True)]
    rows.append({schema.IMAGE_ID: "broken", schema.ERROR: "truncated DICOM: the file ends"})
    written = export(localizer_run(tmp_path, rows), tmp_path / "out")
    reasons = [written[ds.SOPInstanceUID, "sr"]["reason"] for ds in images]
    missing = ("StudyInstanceUID", "SeriesInstanceUID", "not a DICOM", "StudyInstanceUID", "NotFoundError")
    for reason, expected in zip(
        reasons, [*missing, "has changed since it was scored", "DICOM", "several values", ""], strict=True
    ):
        assert expected in reason
    assert [written[ds.SOPInstanceUID, "sr"]["status"] for ds in images] == ["failed"] * 8 + ["written"]
    assert written["broken", ""]["status"] == "not scored"
    printed = capsys.readouterr()
    assert "Doe" not in printed.out + printed.err + (tmp_path / "out/export.csv").read_text()


def test_images_with_the_same_uid_have_no_objects(tmp_path: Path) -> None:
    images = [xray(0), xray(1), xray(2, SOPInstanceUID=xray(0).SOPInstanceUID)]
    paths = write_images(tmp_path / "archive", images)
    ids = ["a.dcm", images[1].SOPInstanceUID, "c.dcm"]  # as the source `dicom` names images with the same UID
    rows = [
        scored(ds, path, **positive()) | {schema.IMAGE_ID: name, schema.STUDY_ID: None}
        for ds, path, name in zip(images, paths, ids, strict=True)
    ]
    images[2].StudyInstanceUID = images[0].StudyInstanceUID
    paths[2].write_bytes(xray_file(images[2]))
    run = localizer_run(tmp_path, rows)
    for _ in range(2):
        written = export(run, tmp_path / "out", kinds=("sr",))
        assert [written[name, "sr"]["status"] for name in ids] == ["failed", "written", "failed"]
        assert "same SOPInstanceUID" in written["a.dcm", "sr"]["reason"]
        assert len([*(tmp_path / "out").rglob("*.dcm")]) == 1


@pytest.mark.parametrize(
    ("family", "columns", "kinds", "message"),
    [
        ("align", pa.schema([(schema.THETA, pa.list_(pa.float32(), 6))]), ("sr",), "neither findings"),
        ("localize", CLASSES, ("seg",), "no masks"),
    ],
)
def test_families_without_such_results_are_refused(
    family: str, columns: pa.Schema, kinds: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run", [{schema.IMAGE_ID: "a"}], columns, family=family, archive=tmp_path)
    with pytest.raises(UserError, match=message):
        export(run, tmp_path / "out", kinds=kinds)


def test_wrong_options_are_refused() -> None:
    wrong: list[dict[str, Any]] = [{"kinds": ("pdf",)}, {"kinds": ()}, {"box_score": 1.5}, {"workers": -1}]
    for options in wrong:
        with pytest.raises(UserError, match="expected"):
            Options(**options)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    with pytest.raises(UserError, match=r"cxr\[dicom-export\]"):
        main(Options(run=str(tmp_path)))


# ---- Where the images are


def test_images_that_have_moved_are_found_with_archive(two: Any, tmp_path: Path) -> None:
    run, images = two
    shutil.move(tmp_path / "archive", tmp_path / "elsewhere")
    uid = images[0].SOPInstanceUID
    with pytest.raises(UserError, match=r"nothing could be exported .*NotFoundError.*export.csv"):
        export(run, tmp_path / "out")
    assert export(run, tmp_path / "out", archive=str(tmp_path / "elsewhere"))[uid, "sr"]["status"] == "written"


def test_pseudonyms_need_the_crosswalk(two: Any, tmp_path: Path) -> None:
    _, images = two
    archive = tmp_path / "archive"
    identity = Identity(Pseudonyms(b"a key of sixteen bytes"), str(tmp_path / "private"), (str(archive),))
    rows = [scored(ds, archive / f"{number}.dcm", **positive()) for number, ds in enumerate(images)]
    run = Path(localizer_run(tmp_path / "hidden", rows, pseudonyms="a key"))
    scores = run / "scores/part-00000.parquet"
    table = pq.read_table(scores)
    moved = pa.array([str(tmp_path / "earlier/0.dcm")])
    place = table.column_names.index(schema.SOURCE_URI)
    identity.record(table.slice(0, 1).set_column(place, schema.SOURCE_URI, moved))
    identity.record(table.slice(0, 1))  # in its new place; the second image is missing
    pq.write_table(identity.applied(table), scores)
    with pytest.raises(UserError, match="--crosswalk"):
        export(str(run), tmp_path / "out")
    written = export(str(run), tmp_path / "out", crosswalk=str(tmp_path / "private"))
    assert sorted({(row["status"], row["reason"]) for row in written.values()}) == [
        ("failed", "the scores, or the crosswalk, do not say where the file is"),
        ("written", ""),
    ]
    assert not {ds.SOPInstanceUID for ds in images} & {image_id for image_id, _ in written}
    (report,) = (tmp_path / "out").rglob("sr-*")
    assert {*_values(dcmread(report), "ReferencedSOPInstanceUID")} == {images[0].SOPInstanceUID}


def test_one_of_several_checkpoints_is_exported(two: Any, tmp_path: Path) -> None:
    run, images = two
    scores = Path(run, "scores/part-00000.parquet")
    table = pq.read_table(scores)
    settings = settings_of(run)
    of_one = {name: settings.pop(name) for name in ("checkpoint_sha256", "recipe")}
    settings |= {"panel": ["a", "b"], "members": {"a": of_one, "b": of_one | {"checkpoint_sha256": "b" * 64}}}
    set_settings(run, settings)
    record = {"name": "b", "family": "localize", "checkpoint": "", "sha256": "b" * 64, "findings": [*NAMES]}
    metadata = {schema.MEMBERS_KEY: json.dumps([record | {"name": "a"}, record])}
    table = table.rename_columns([schema.member_column("b", name) for name in table.column_names])
    pq.write_table(table.replace_schema_metadata(metadata), scores)
    with pytest.raises(UserError, match="--member: a, b"):
        export(run, tmp_path / "out")
    rows = export(run, tmp_path / "out", member="b")
    made = dcmread(tmp_path / "out" / rows[images[0].SOPInstanceUID, "sr"]["file"])
    assert (made.ManufacturerModelName, made.DeviceSerialNumber) == ("cxr localize b", "b" * 64)


# ---- Codes


def test_all_findings_of_the_data_sets_have_documented_codes() -> None:
    for name in (*FINDINGS, *VINDR_LOCAL_FINDINGS, *VINDR_GLOBAL_FINDINGS):
        code = dicom_codes.finding_code(name)
        assert name in dicom_codes.FINDING_CODES
        assert len(code.value) <= 16
        assert len(code.meaning) <= 64
    assert dicom_codes.finding_code("pleural thickening") == dicom_codes.finding_code("Pleural_Thickening")


def test_codes_that_dicom_lists_are_as_it_lists_them() -> None:
    listed = {(scheme, value): named[0] for scheme in ("SCT", "DCM") for values in concepts[scheme].values()
              for value, named in values.items()}  # fmt: skip
    used = [*dicom_codes.FINDING_CODES.values(), dicom_codes.PRESENT, dicom_codes.ABSENT, dicom_codes.PRESENCE]
    used += [dicom_codes.PROBABILITY, dicom_codes.ANATOMY, dicom_codes.ABNORMALITY, dicom_codes.AREA]
    found = 0
    for code in used:
        meaning = listed.get((code.scheme_designator, code.value))
        if meaning is not None:
            found += 1
            assert code.meaning.casefold() in meaning.casefold() or meaning.casefold() in code.meaning.casefold()
        else:
            assert code.scheme_designator != "DCM"
    assert found >= 14


def test_other_findings_get_stable_private_codes() -> None:
    code = dicom_codes.finding_code("Tree-in-bud ✓ at the left upper lobe")
    assert code.scheme_designator == "99CXR"
    assert code == dicom_codes.finding_code("Tree-in-bud ✓ at the left upper lobe")
    assert code.meaning == "Tree-in-bud ✓ at the left upper lobe"
    assert code.value != dicom_codes.finding_code("Tree-in-bud").value


# ---- Validation


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Invalid value for VR")  # of the test's own files
def test_objects_of_all_transfer_syntaxes_are_valid(tmp_path: Path) -> None:
    if shutil.which("dciodvfy") is None:
        pytest.skip("dciodvfy of Debian's package dicom3tools is not installed")
    mask = np.zeros((96, 80), bool)
    mask[20:40, 10:30] = True
    run, _ = masked_run(tmp_path / "masks", [mask] * len(SYNTAXES))
    export(run, tmp_path / "masks/out")
    images = [xray(number) for number in range(len(SYNTAXES))]
    images += [xray(52, PatientAge="62")]  # invalid: "062Y" is expected
    images += [xray(50, PatientOrientation=None, PixelSpacing=None, PatientSex=None, Modality="CR")]
    images += [xray(51, FrameOfReferenceUID=made_uid("frame"), PhotometricInterpretation="MONOCHROME1")]
    paths = write_images(tmp_path / "archive", images)
    run = localizer_run(tmp_path, [scored(ds, path, **positive()) for ds, path in zip(images, paths, strict=True)])
    export(run, tmp_path / "out")
    files = [*(tmp_path / "out").rglob("*.dcm"), *(tmp_path / "masks/out").rglob("*.dcm")]
    assert len(files) == 2 * len(images) + 3 * len(SYNTAXES)
    for file in files:
        said = subprocess.run(["dciodvfy", file], capture_output=True, text=True, check=False)
        errors = [line for line in (said.stdout + said.stderr).splitlines() if line.startswith("Error")]
        assert not errors, f"{file.name}: {errors}"
