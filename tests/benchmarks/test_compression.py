"""The comparison of ways to store X-rays: input, metrics, and the report."""

from __future__ import annotations

import csv
import math
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pyarrow.compute as pc
import pytest
import torch

from cxr import schema, storage
from cxr.benchmarks.studies import codecs, compression, compression_report, xrays
from cxr.benchmarks.studies.compression import AS_STORED, RAW, Evaluator, StorageResult
from cxr.benchmarks.studies.xrays import XRays
from cxr.data.decode import make_rows
from cxr.errors import UserError
from cxr.families import image_crop
from cxr.families.aecnn import AecnnRecipe
from cxr.families.align import AlignRecipe
from cxr.families.checkpoint import Checkpoint
from cxr.inference import latents
from cxr.phantom.archive import write_phantom
from cxr.schema import PixelFormat
from cxr.sources import open_manifest
from tests.families.test_image_crop import chest
from tests.lung_rule import save_finder
from tests.made_shards import chest_like, write_shards

SIZE, COUNT = 64, 24
CODEC = "aecnn 16:1"


@pytest.fixture(scope="module")
def compressor() -> Checkpoint:
    torch.manual_seed(0)
    recipe = AecnnRecipe(size=SIZE, patch=16, depth=1, width=8, backbone="resnet18", stem_stride=1)
    return Checkpoint(
        "/kept",
        recipe,
        recipe.network(schema.FINDINGS[:3]).eval(),
        schema.FINDINGS[:3],
        {"metrics": {"mean_auroc": 0.5}},
    )


@pytest.fixture(scope="module")
def originals() -> XRays:
    rng = np.random.default_rng(0)
    pictures = np.stack([chest_like(rng, SIZE) for _ in range(COUNT)])
    labels = rng.integers(0, 2, (COUNT, 3)).astype(np.int8)
    return XRays(pictures, labels, ("Hernia", *schema.FINDINGS[:2]), np.arange(COUNT).astype(str))


@pytest.fixture(scope="module")
def evaluator(originals: XRays, compressor: Checkpoint) -> Evaluator:
    return Evaluator(originals, compressor, shown=1, resamples=20, seed=0)


@pytest.fixture(scope="module")
def rows(originals: XRays, compressor: Checkpoint, evaluator: Evaluator) -> list[StorageResult]:
    return [*compression.compare(originals, compressor, evaluator)]


@pytest.mark.slow
def test_every_way_is_compared_at_both_sizes(
    rows: list[StorageResult], originals: XRays, compressor: Checkpoint
) -> None:
    group = [CODEC, f"{CODEC}, from latents", "resized", "JPEG", "JPEG 2000", "WebP"]
    assert [row.way for row in rows] == ["original", "original, PNG", *group, *group]
    sizes = {row.at: row.bytes_per_image for row in rows if row.way == CODEC}
    assert sizes == {RAW: 256, AS_STORED: latents.stored_bytes(compression.encode(compressor, originals.pixels))}
    for row in rows:
        if row.way == "JPEG 2000":
            assert row.bytes_per_image == pytest.approx(sizes[row.at], rel=0.05)


@pytest.mark.slow
def test_latents_and_their_images_have_the_same_auroc(rows: list[StorageResult]) -> None:
    original, latent = rows[0], rows[3]
    assert math.isfinite(original.auroc)
    assert (latent.auroc, latent.auroc_low, latent.auroc_high) == (
        original.auroc,
        original.auroc_low,
        original.auroc_high,
    )
    assert math.isnan(latent.psnr)


def test_an_untrained_residual_codec_equals_resizing(rows: list[StorageResult]) -> None:
    codec, resized = rows[2], rows[4]
    assert codec.psnr == pytest.approx(resized.psnr, abs=0.05)
    assert codec.bytes_per_image == pytest.approx(resized.bytes_per_image, rel=0.01)


def test_fidelity_of_known_errors(originals: XRays) -> None:
    better = np.maximum(originals.pixels[:2], 50)
    worse = better.copy()
    worse[0] -= 5
    worse[1] -= 50
    errors = np.array([5 / 255, 50 / 255]) ** 2
    psnr, own, similarity = compression.fidelity(better, worse)
    assert psnr == pytest.approx(-10 * np.log10(errors.mean()), abs=1e-4)
    assert own == pytest.approx((-10 * np.log10(errors)).mean(), abs=1e-4)
    assert similarity < 1
    assert compression.fidelity(originals.pixels, originals.pixels) == (math.inf, math.inf, pytest.approx(1))


def test_ssim_equals_the_published_formula_on_flat_pictures() -> None:
    """Without structure only the luminance term remains: (2 a b + c) / (a² + b² + c), c = .01²."""
    a, b = (np.full((1, 32, 32), value, np.uint8) for value in (100, 150))
    x, y = 100 / 255, 150 / 255
    assert compression.fidelity(a, b)[2] == pytest.approx((2 * x * y + 1e-4) / (x * x + y * y + 1e-4), abs=3e-4)


def test_findings_are_matched_by_name(evaluator: Evaluator, compressor: Checkpoint, originals: XRays) -> None:
    scores = np.full((COUNT, 3), 0.5)
    scores[:, 0] = originals.labels[:, 1]  # Atelectasis: first in the checkpoint, second in the archive
    assert evaluator.with_auroc(StorageResult("", "", 1), scores, compressor).auroc == pytest.approx(0.75)
    stranger = replace(compressor, findings=("Cat", "Dog", "Cow"))
    assert math.isnan(evaluator.with_auroc(StorageResult("", "", 1), scores, stranger).auroc)


def test_the_report_and_the_results_agree(rows: list[StorageResult], evaluator: Evaluator, tmp_path: Path) -> None:
    written = compression_report.write(rows, evaluator.shown, CODEC, "About.", str(tmp_path))
    page = Path(written["report"]).read_text()
    assert "About." in page
    assert "| exact " in page
    stored = next(row for row in rows if row.way == CODEC).bytes_per_image
    assert f"bytes, not {stored:,.0f}." in page  # its header alone is larger
    table = [*csv.DictReader(Path(written["table"]).read_text().splitlines())]
    assert [row["way"] for row in table] == [row.way for row in rows]
    assert Path(written["picture"]).stat().st_size > 10_000
    metrics = compression_report.metrics(rows)
    assert metrics["psnr/jpeg_2000/raw"] == rows[12].psnr
    assert all(map(math.isfinite, metrics.values()))


def test_the_summary_follows_the_results() -> None:
    ways = {"resized": 30.0, CODEC: 33.0, "JPEG": 35.0}
    rows = [
        StorageResult(way, at, 100, psnr=psnr, ssim=psnr / 40)
        for at in (AS_STORED, RAW)
        for way, psnr in ways.items()
    ]
    rows = [
        StorageResult("original", "", 1600, psnr=math.inf, ssim=1),
        *rows,
        StorageResult(f"{CODEC}, from latents", RAW, 100),
    ]
    text = compression_report.summary(rows, CODEC)
    assert "JPEG 35.00, aecnn 16:1 33.00, resized 30.00; aecnn 16:1 ranks 2 of 3" in text
    assert "There is no AUROC" in text
    measured = [replace(row, auroc=0.8, auroc_low=0.7, auroc_high=0.9) for row in rows]
    measured[1] = replace(measured[1], auroc=0.6)
    assert "outside of this interval: resized (as stored)." in compression_report.summary(measured, CODEC)


def test_shards_and_their_archive_give_the_same_split(tmp_path: Path, compressor: Checkpoint) -> None:
    shards = write_shards(tmp_path / "shards", {"train": 3, "test": 25}, size=SIZE)
    whole, notes = xrays.read(shards, "test", compressor.recipe)
    assert (whole.pixels.shape, whole.labels.shape, notes) == ((25, SIZE, SIZE), (25, 14), [])
    assert (whole.labels == schema.UNKNOWN).all()
    assert len(set(whole.patients)) == 25
    some, _ = xrays.read(shards, "test", compressor.recipe, limit=4)
    np.testing.assert_array_equal(some.pixels, whole.pixels[[0, 8, 16, 24]])
    with pytest.raises(UserError, match="no usable image in its val split"):
        xrays.read(shards, "val", compressor.recipe)


def test_a_raw_archive_is_decoded_and_bad_images_are_reported(tmp_path: Path, compressor: Checkpoint) -> None:
    write_phantom(str(tmp_path), 30, size=80)
    read, _ = xrays.read(str(tmp_path), "train", compressor.recipe)
    assert read.pixels.shape == (len(read.labels), SIZE, SIZE)
    assert set(np.unique(read.labels)) == {0, 1}
    for path in (tmp_path / "images").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match="can be used"):
        xrays.read(str(tmp_path), "train", compressor.recipe)


def test_images_are_cropped_and_enhanced_as_in_scoring(tmp_path: Path, compressor: Checkpoint) -> None:
    crop = image_crop.by_lungs(save_finder(tmp_path / "finder"))
    recipe = compressor.recipe.replace(normalize="percentile", equalize="clahe")
    raw = str(tmp_path / "raw")
    for number in range(4):
        storage.write_bytes(f"{raw}/{number}.png", cv2.imencode(".png", chest(100 + number, 80)[0])[1].tobytes())
    read, _ = xrays.read(raw, "train", recipe, crop=crop)
    table = open_manifest(raw).table.filter(pc.field(schema.SPLIT) == "train")
    scored = make_rows(table, PixelFormat(SIZE), crop=crop.loaded(), enhance=recipe.enhancement)
    np.testing.assert_array_equal(read.pixels, schema.pixels_array(scored[schema.PIXELS], PixelFormat(SIZE)))
    for changes in ({"recipe": compressor.recipe, "crop": crop}, {"recipe": recipe}):
        assert not np.array_equal(xrays.read(raw, "train", **changes)[0].pixels, read.pixels)
    shards = write_shards(tmp_path / "shards", {"train": 3}, size=SIZE)
    with pytest.raises(
        UserError, match="with no enhancement, but this run needs --normalize percentile --equalize clahe"
    ):
        xrays.read(shards, "train", recipe)
    with pytest.raises(UserError, match="contains whole images, but crops"):
        xrays.read(shards, "train", compressor.recipe, crop=crop)


def test_other_checkpoints_are_rejected(compressor: Checkpoint) -> None:
    compression.check_compressor(compressor)
    aligner = replace(compressor, recipe=AlignRecipe(size=SIZE, lungs=False))
    with pytest.raises(UserError, match="has no latents"):
        compression.check_compressor(aligner)
    with pytest.raises(UserError, match="does not predict findings"):
        compression.check_classifier(aligner)


def test_qualities_are_chosen_on_a_sample(monkeypatch: pytest.MonkeyPatch, originals: XRays) -> None:
    monkeypatch.setattr(codecs, "_SAMPLE", 2)
    expected = codecs.quality_near(codecs.JPEG, originals.pixels[[0, 12]], 900)
    assert codecs.quality_near(codecs.JPEG, originals.pixels, 900) == expected
