"""Reports of masks: metrics, counts, the worst images first, and unknown masks."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cxr import schema
from cxr.cli.commands import export_kaggle_siim
from cxr.cli.commands import report as report_command
from cxr.data.decode import make_rows
from cxr.data.shards import KIND, REJECTS_FILE
from cxr.errors import UserError
from cxr.evaluation import reports
from cxr.evaluation.ground_truth_masks import RawTruth, known_masks
from cxr.evaluation.run import SCORES, ReportOptions, read_run
from cxr.export.kaggle_siim import write_submission
from cxr.imaging.geometry import fit_mask
from cxr.metrics.segmentation import hd95
from cxr.runtime.job import write_result
from cxr.schema import PixelFormat
from cxr.sources import open_manifest, rle
from cxr.sources.manifest import Manifest, manifest_table
from cxr.sources.options import ReadOptions
from tests.made_shards import finish_shards
from tests.written_runs import write_scored

SIDE = 64
IMAGES = 12
UNKNOWN, ABSENT, BROKEN, FAILED, MISSING = 4, 5, 6, 7, 8  # images with something out of the ordinary
JUDGED = [0, 1, 2, 3, 9, 10, 11]


def box(y0: int, y1: int, x0: int, x1: int) -> np.ndarray:
    mask = np.zeros((SIDE, SIDE), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def true_mask(image: int) -> np.ndarray:
    """Every third image has nothing to find."""
    return box(8, 30, 6, 20 + image) | box(40, 44, 40, 60) if image % 3 else box(0, 0, 0, 0)


def found_mask(image: int) -> np.ndarray:
    """Shifted by the image's number; a false alarm in image 9."""
    return box(50, 54, 50, 60) if image == 9 else np.roll(true_mask(image), image, 1)


def name_of(image: int) -> str:
    return f"P{image // 2}/study/{image:02d}.png"


def masks_of(image: int) -> list[dict[str, Any]] | None:
    """As a source gives them; a mask of two entries."""
    lungs = {"label": schema.LUNGS, "rle": rle.encode(box(0, 60, 0, 60)), "uri": None}
    halves = [rle.encode(true_mask(image) & half) for half in (box(0, 32, 0, 64), box(32, 64, 0, 64))]
    entries = [{"label": schema.PNEUMOTHORAX, "rle": code, "uri": None} for code in halves]
    odd = {UNKNOWN: None, ABSENT: [lungs], BROKEN: [{**lungs, "label": schema.PNEUMOTHORAX, "rle": "1 2 3"}]}
    return odd.get(image, [*entries, lungs])


@pytest.fixture
def raw(tmp_path: Path) -> str:
    """Images of 64 x 64 in folders by patient, with their masks."""
    rng = np.random.default_rng(0)
    for image in range(IMAGES):
        path = tmp_path / "raw" / name_of(image)
        path.parent.mkdir(parents=True, exist_ok=True)
        good, data = cv2.imencode(".png", rng.integers(0, 255, (SIDE, SIDE), np.uint8))
        assert good
        path.write_bytes(data.tobytes())
    fields = pa.schema([schema.MANIFEST.field(name) for name in (schema.IMAGE_ID, schema.MASKS)])
    rows = [{"image_id": name_of(image), "masks": masks_of(image)} for image in range(IMAGES)]
    pq.write_table(pa.Table.from_pylist(rows, fields), tmp_path / "raw" / "truth.parquet")
    return str(tmp_path / "raw")


def write_shards(folder: Path, raw: str, size: int) -> str:
    """The same images as two shard files, two rows a row group, with a spacing; the broken one is rejected."""
    pixels = PixelFormat(size)
    rows = make_rows(open_manifest(raw, ReadOptions(source="folder")).table, pixels)
    spacing = pa.array([[0.5, 0.5]] * rows.num_rows, rows.schema.field(schema.SPACING_MM).type)
    rows = rows.set_column(rows.schema.names.index(schema.SPACING_MM), schema.SPACING_MM, spacing)
    good = rows.filter(rows[schema.ERROR].is_null())
    (folder / "test").mkdir(parents=True)
    parts = [{"path": f"test/part-{number:05d}.parquet"} for number in range(2)]
    for part, rows_of in zip(parts, (good.slice(0, 5), good.slice(5)), strict=True):
        pq.write_table(rows_of, folder / part["path"], row_group_size=2)
        part |= {"rows": rows_of.num_rows}
    rejected = rows.filter(rows[schema.ERROR].is_valid()).select(schema.REJECTS.names)
    pq.write_table(rejected, folder / REJECTS_FILE)
    about = {"kind": KIND, "version": 1, "source": "folder", "archive": raw, "findings": []}
    about |= {"pixels": {"size": size, "bits": 8}, "row_group_rows": 2, "rejects": rejected.num_rows}
    about |= {"parts": {"test": parts}}
    finish_shards(folder, about)
    return str(folder)


def write_run(folder: Path, archive: str, found: dict[int, np.ndarray], family: str = "pneumothorax") -> str:
    """A run of `score_archive` in two parts, in another order than the archive's; a mask of no pixels: an error."""
    settings = {"archive": archive, "checkpoint_sha256": "0", "recipe": {"family": family}}
    fields = pa.schema([*schema.SCORES, *schema.MASK_SCORES])
    rows = [score_row(image, mask) for image, mask in reversed(found.items())]
    return write_scored(folder, settings, *(pa.Table.from_pylist(part, fields) for part in (rows[:3], rows[3:])))


def score_row(image: int, mask: np.ndarray) -> dict[str, Any]:
    if not mask.size:
        return {schema.IMAGE_ID: name_of(image), schema.SPLIT: "test", schema.ERROR: "no image"}
    return {
        schema.IMAGE_ID: name_of(image),
        schema.SPLIT: "test" if image % 2 else "train",
        schema.HEIGHT_PX: SIDE,
        schema.WIDTH_PX: SIDE,
        schema.PRED_MASK_RLE: rle.encode(mask),
        schema.PRED_MASK_AREA_PX: int(mask.sum()),
        schema.PRED_MASK_PROBABILITY: 0.1 + 0.04 * image + 0.3 * bool(mask.any()),
    }


@pytest.fixture
def run(raw: str, tmp_path: Path) -> str:
    found = {image: found_mask(image) for image in range(IMAGES) if image != MISSING}
    return write_run(tmp_path / "run", raw, found | {FAILED: np.empty(0)})


def dice_of(image: int) -> float:
    found, true = found_mask(image), true_mask(image)
    return 2 * (found & true).sum() / (found.sum() + true.sum()) if found.any() or true.any() else 1.0


def read_csv(uri: str) -> list[dict[str, str]]:
    return list(csv.DictReader(Path(uri).read_text().splitlines()))


COUNTS = {
    "images": 7,
    "positives": 4,
    "patients": 4,
    "images_with_error": 1,
    "images_without_score": 1,
    "images_without_ground_truth": 2,
    "images_refused": 1,
}


@pytest.mark.draws
def test_the_job_evaluates_masks_and_counts_the_rest(run: str, tmp_path: Path) -> None:
    options = report_command.Options(
        run=(run,), out=str(tmp_path / "out"), report=ReportOptions(split="all", resamples=50)
    )
    write_result("report", options, report_command.main(options), 0)
    result = json.loads((tmp_path / "out" / "result.json").read_text(), parse_constant=pytest.fail)
    metrics = result["metrics"]
    assert {name: metrics[name] for name in COUNTS} == COUNTS
    positive = [image for image in JUDGED if true_mask(image).any()]
    assert metrics["dice"] == pytest.approx(np.mean([dice_of(image) for image in JUDGED]))
    assert metrics["positive_dice"] == pytest.approx(np.mean([dice_of(image) for image in positive]))
    assert metrics["empty_prediction_dice"] == pytest.approx(3 / 7)
    assert metrics["hd95_px"] == pytest.approx(np.mean([hd95(found_mask(i), true_mask(i)) for i in positive]))
    assert (metrics["hd95_mm"], metrics["hd95_one_empty"]) == (None, 1)
    assert (metrics["image_sensitivity"], metrics["image_specificity"]) == pytest.approx((1, 2 / 3))
    assert metrics["image_auroc"] == pytest.approx(10 / 12)
    assert metrics["sensitivity/Pneumothorax"] == metrics["image_sensitivity"]
    assert metrics["specificity/Pneumothorax"] == metrics["image_specificity"]
    assert {Path(uri).stem for uri in result["pictures"]} == {"dice", "areas", "masks", "hardest"}
    kinds = [line.split(",")[0] for line in Path(result["hardest"]).read_text().splitlines()]
    assert kinds == ["kind", "false positive"]
    assert metrics["dice_low"] < metrics["dice"] < metrics["dice_high"]
    page = Path(result["report"]).read_text()
    assert (
        "7 images of 4 patients evaluated: 4 images with a ground-truth mask that is not empty. Left out: 1 image"
        in page
    )
    assert "2 images without a ground-truth mask, 1 image with a mask that cannot be compared (" in page
    assert "mean Dice if all predicted masks were empty" in page
    assert all(cv2.imread(uri) is not None and f"(pictures/{Path(uri).name})" in page for uri in result["pictures"])


def test_the_table_of_images_starts_with_the_worst(run: str, tmp_path: Path) -> None:
    table = read_csv(reports.report(run, ReportOptions(split="all", resamples=5), str(tmp_path / "out"))["images"])
    wanted = sorted(JUDGED, key=dice_of)
    assert [row["image_id"] for row in table][:5] == [name_of(image) for image in wanted][:5]
    assert [float(row["dice"]) for row in table] == pytest.approx([dice_of(image) for image in wanted])
    assert table[0]["hd95_px"] == ""
    assert (int(table[0]["predicted_px"]), int(table[0]["ground_truth_px"])) == (40, 0)


def test_shards_contain_the_same_masks(raw: str, run: str, tmp_path: Path) -> None:
    options = ReportOptions(split="all", resamples=5)
    by_raw = reports.report(run, options, str(tmp_path / "by_raw"))["metrics"]
    stored = write_shards(tmp_path / "shards", raw, SIDE)
    result = reports.report(run, ReportOptions(archive=stored, split="all", resamples=5), str(tmp_path / "by_shards"))
    metrics = result["metrics"]
    assert (metrics.pop("images_refused"), metrics.pop("images_without_ground_truth")) == (0, 3)  # it was rejected
    assert metrics.pop("hd95_mm") == pytest.approx(by_raw["hd95_px"] / 2)
    assert metrics.pop("hd95_mm_images") == 4
    assert metrics == {name: by_raw[name] for name in metrics}
    assert "Masks are compared at 64 x 64 px, the shards' resolution" in Path(result["report"]).read_text()
    smaller = write_shards(tmp_path / "smaller", raw, SIDE // 2)
    options = ReportOptions(archive=smaller, split="all", resamples=5)
    halved = reports.report(run, options, str(tmp_path / "halved"))["metrics"]
    assert halved["dice"] == pytest.approx(by_raw["dice"], abs=0.03)
    assert halved["hd95_px"] == pytest.approx(by_raw["hd95_px"] / 2, abs=0.5)
    assert halved["hd95_mm"] == pytest.approx(halved["hd95_px"])


def test_shown_pixels_are_the_images_own(raw: str, run: str, tmp_path: Path) -> None:
    stored = write_shards(tmp_path / "shards", raw, SIDE)
    options = ReportOptions(split="all")
    for archive in (raw, stored):
        truth = known_masks(archive, options, schema.PNEUMOTHORAX)
        rows = [truth.image_ids.to_pylist().index(name_of(image)) for image in (10, 3)]
        shown = truth.pictures(rows)
        assert set(shown) == set(rows)
        for row, image in zip(rows, (10, 3), strict=True):
            picture, frame = shown[row]
            pixels = cv2.imread(str(Path(raw) / name_of(image)), cv2.IMREAD_GRAYSCALE)
            assert pixels is not None
            wanted = fit_mask(pixels > 127, len(picture), frame)
            assert np.corrcoef(picture.reshape(-1), wanted.reshape(-1))[0, 1] > 0.7


def test_lungs_are_evaluated_with_lung_masks(raw: str, tmp_path: Path) -> None:
    found = {image: box(0, 60, 0, 60) for image in range(IMAGES)}
    lungs = write_run(tmp_path / "lungs", raw, found, family="lungs")
    metrics = reports.report(lungs, ReportOptions(split="all", resamples=5), str(tmp_path / "out"))["metrics"]
    assert (metrics["images"], metrics["dice"], metrics["empty_prediction_dice"]) == (10, 1, 0)
    assert metrics["images_without_ground_truth"] == 2


def test_two_runs_are_compared_on_the_images_that_both_have_scored(raw: str, run: str, tmp_path: Path) -> None:
    other = write_run(tmp_path / "other", raw, {image: box(0, 0, 0, 0) for image in (1, 2, 3, 9, 10, MISSING)})
    options = ReportOptions(compare_with=other, split="all", resamples=200)
    result = reports.report(run, options, str(tmp_path / "out"))
    metrics = result["metrics"]
    gains = [dice_of(1), dice_of(2), 0, -1, dice_of(10)]
    assert metrics["images_compared"] == 5
    assert metrics["dice_gain"] == pytest.approx(np.mean(gains))
    assert metrics["dice_gain_low"] < metrics["dice_gain"] < metrics["dice_gain_high"]
    assert metrics["positive_dice_gain"] == pytest.approx(np.mean([gains[0], gains[1], gains[4]]))
    assert f"Compared with {other}, on the 5 images" in Path(result["report"]).read_text()
    alone = write_run(tmp_path / "alone", raw, {FAILED: found_mask(FAILED)})
    with pytest.raises(UserError, match="no scored images in common"):
        reports.report(run, ReportOptions(compare_with=alone, split="all", resamples=5), str(tmp_path / "none"))


def test_spacing_is_that_of_the_files_own_pixels() -> None:
    columns = {
        schema.IMAGE_ID: pa.array(["a", "b"]),
        schema.SPACING_MM: pa.array([[0.2, 0.4], None], schema.MANIFEST.field(schema.SPACING_MM).type),
    }
    own = RawTruth(Manifest(manifest_table(columns), ()), schema.LUNGS)
    assert own.spacing_mm(0, 512, 256) == pytest.approx((0.2, 0.4))
    assert own.spacing_mm(1, 512, 256) is None
    of_square = RawTruth(Manifest(manifest_table(columns, frame_px=1024), ()), schema.LUNGS)
    assert of_square.spacing_mm(0, 512, 256) == pytest.approx((0.4, 1.6))


def test_mistakes_are_reported(raw: str, run: str, tmp_path: Path) -> None:
    out, options = str(tmp_path / "out"), ReportOptions(split="all", resamples=5)
    strangers = write_run(tmp_path / "strangers", raw, {99: found_mask(1)})
    with pytest.raises(UserError, match="have a mask of Pneumothorax, 0 are in"):
        reports.report(strangers, options, out)
    unknown = write_run(tmp_path / "unknown", raw, {UNKNOWN: found_mask(1), ABSENT: found_mask(1)})
    with pytest.raises(UserError, match=r"there is nothing to evaluate.* 2 are in "):
        reports.report(unknown, options, out)
    broken = write_run(tmp_path / "broken", raw, {BROKEN: found_mask(1)})
    with pytest.raises(UserError, match="none of 1 image can be evaluated: invalid mask code"):
        reports.report(broken, options, out)
    part = Path(run) / SCORES / "part-00000.parquet"
    pq.write_table(pq.read_table(part).drop_columns([schema.PRED_MASK_RLE]), part)
    with pytest.raises(UserError, match="no column mask_rle"):
        reports.report(run, options, out)


def test_a_run_becomes_a_submission(run: str, tmp_path: Path) -> None:
    options = export_kaggle_siim.Options(run=run, split="all", out=str(tmp_path / "out"))
    result = export_kaggle_siim.main(options)
    lines = Path(result["submission"]).read_text().splitlines()
    assert lines[0] == "ImageId,EncodedPixels"
    codes = {row["ImageId"]: row["EncodedPixels"] for row in read_csv(result["submission"])}
    assert list(codes) == [f"{image:02d}" for image in range(IMAGES) if image != MISSING]
    for name, code in codes.items():
        wanted = found_mask(int(name)) if int(name) != FAILED else box(0, 0, 0, 0)
        np.testing.assert_array_equal(rle.decode(code, SIDE, SIDE), wanted)
    assert codes["00"] == codes[f"{FAILED:02d}"] == "-1"
    assert result["metrics"] == {"images": 11, "positives": 7, "errors": 1}


def test_a_submission_contains_the_test_images_and_prints_its_path(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = export_kaggle_siim.main(export_kaggle_siim.Options(run=run, out=str(tmp_path / "out")))
    assert [row["ImageId"] for row in read_csv(result["submission"])] == ["01", "03", "05", "07", "09", "11"]
    assert f"submission: {result['submission']}" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no image in split 'val' \(test 6, train 5\)"):
        export_kaggle_siim.main(export_kaggle_siim.Options(run=run, split="val", out=str(tmp_path / "out")))


@pytest.mark.parametrize("family", ["lungs", "detect"])
def test_a_run_of_another_family_is_no_submission(family: str, raw: str, tmp_path: Path) -> None:
    run = write_run(tmp_path / "other", raw, {1: found_mask(1)}, family=family)
    with pytest.raises(UserError, match=f"is a run of family {family}, but .* needs family pneumothorax"):
        export_kaggle_siim.main(export_kaggle_siim.Options(run=run, out=str(tmp_path / "out")))


def test_two_images_with_the_same_name_cannot_be_submitted(run: str, tmp_path: Path) -> None:
    part = Path(run) / SCORES / "part-00000.parquet"
    table = pq.read_table(part)
    ids = pa.array(["another/11.dcm", *table[schema.IMAGE_ID].to_pylist()[1:]])
    pq.write_table(pa.concat_tables([table.set_column(0, schema.IMAGE_ID, ids), table.slice(0, 1)]), part)
    with pytest.raises(UserError, match="two images named 11"):
        write_submission(read_run(run), str(tmp_path / "submission.csv"), "all")
