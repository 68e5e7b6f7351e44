"""`cxr.load`: all kinds of images, in one process, without Ray; what it predicts, explains and shows."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import cv2
import numpy as np
import pyarrow as pa
import pydicom
import pytest
import torch

import cxr
from cxr import schema
from cxr.errors import ImageRejectedError, UserError
from cxr.families import RECIPES, checkpoint
from cxr.families.aecnn import AecnnRecipe
from cxr.families.base import Recipe
from cxr.families.capabilities import Embedder, HeatMaps
from cxr.families.ensemble import EnsembleRecipe
from cxr.families.localize import LocalizeRecipe
from cxr.sources import rle
from cxr.sources.options import ReadOptions
from tests.by_family import by_family
from tests.fake_cuda import DEVICE, FakeCuda
from tests.families.test_recipes import SMALL
from tests.odd_files import dataset, dicom, encoded, radiograph

BROKEN = b"not an image"


def saved(folder: Path, recipe: Recipe) -> Path:
    torch.manual_seed(0)
    network = recipe.network(schema.FINDINGS)
    task = recipe.task(network)
    checkpoint.save(folder, recipe, task, network.state_dict(), findings=schema.FINDINGS, metrics={})
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {family: saved(folder / family, SMALL[family]) for family in RECIPES}


@pytest.fixture(scope="module")
def model(checkpoints: dict[str, Path]) -> cxr.Predictor:
    return cxr.load(checkpoints["aecnn"], batch_size=2)


def probabilities(scores: pa.Table) -> np.ndarray:
    return np.array([row or [np.nan] * len(schema.FINDINGS) for row in scores[schema.PROBABILITIES].to_pylist()])


# ---- The process


@pytest.mark.slow
def test_nothing_but_the_network_is_loaded_and_nothing_is_written(
    checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    file = tmp_path / "a.dcm"
    file.write_bytes(dicom(dataset(radiograph())))
    script = f"""
import sys
import cxr
print(cxr.__version__, *(name for name in ("torch", "pyarrow", "numpy", "cv2") if name in sys.modules))
assert {{"load", "Predictor"}} <= {{*dir(cxr)}}
model = cxr.load({str(checkpoints["aecnn"])!r})
model.predict({str(file)!r}, on_error="raise")
print(*(name for name in ("ray", "matplotlib", "ultralytics") if name in sys.modules))
model.show({str(file)!r})
print(*(name for name in ("ray", "matplotlib.pyplot") if name in sys.modules))
"""
    work = tmp_path / "work"
    work.mkdir()
    environment = {
        "PYTHONPATH": ":".join(sys.path),
        "HOME": str(work),
        "TMPDIR": str(work),
        "MPLCONFIGDIR": "/tmp",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=work, env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [cxr.__version__, "", ""]
    assert [path for path in work.rglob("*") if path.is_file()] == []


def test_threads_get_the_scores_of_their_own_images(model: cxr.Predictor) -> None:
    images = [radiograph(seed=seed) for seed in range(8)]
    expected = [probabilities(model.predict(image)) for image in images]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda number: probabilities(model.predict(images[number % 8])), range(32)))
    for number, scores in enumerate(got):
        np.testing.assert_allclose(scores, expected[number % 8], rtol=1e-6)
    assert len(np.unique(np.concatenate(expected), axis=0)) == 8


def test_an_iterator_is_read_only_as_far_as_needed(model: cxr.Predictor) -> None:
    taken: list[int] = []

    def endless() -> Iterator[bytes]:
        for number in itertools.count():
            taken.append(number)
            yield encoded(radiograph(seed=number % 3))

    batches = model.predict_batches(endless())
    assert [next(batches).num_rows, next(batches).num_rows] == [2, 2]
    assert taken == [0, 1, 2, 3]


@pytest.mark.parametrize("family", by_family(RECIPES))
def test_every_family_computes_in_bfloat16(
    family: str, checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "cxr.inference.scorer._CLOSE", 0.0
    )  # otherwise probabilities close to .5 are those in float32
    images = [radiograph(), BROKEN]
    wide, narrow = (cxr.load(checkpoints[family], precision=name).predict(images) for name in ("float32", "bfloat16"))
    assert narrow.schema.equals(wide.schema)
    assert narrow[schema.ERROR].to_pylist() == wide[schema.ERROR].to_pylist()
    if schema.PROBABILITIES in wide.column_names:
        first, second = probabilities(wide)[0], probabilities(narrow)[0]
        assert 0 < np.abs(first - second).max() < 0.05


@pytest.mark.parametrize("family", by_family(RECIPES))
def test_every_method_works_on_a_device(family: str, checkpoints: dict[str, Path]) -> None:
    images = [radiograph(), BROKEN, radiograph(seed=1)]
    expected = cxr.load(checkpoints[family], device="cpu").predict(images)
    with FakeCuda():
        model = cxr.load(checkpoints[family], device=DEVICE, precision="float32")
        scores = model.predict(images)
        model.show(images)
        if isinstance(SMALL[family], HeatMaps):
            assert [heat_map.error is None for heat_map in model.explain(images)] == [True, False, True]
        if isinstance(SMALL[family], Embedder):
            assert np.isfinite(model.embed(images)[:, 0]).tolist() == [True, False, True]
    assert scores.column_names == expected.column_names
    if schema.PROBABILITIES in scores.column_names:
        np.testing.assert_allclose(probabilities(scores), probabilities(expected), atol=1e-5)


# ---- Images


def test_all_kinds_of_images_give_the_same_scores(model: cxr.Predictor, tmp_path: Path) -> None:
    pixels = radiograph(12)
    as_dataset = dataset(pixels, BitsStored=12, HighBit=11)
    file = tmp_path / "a.dcm"
    file.write_bytes(dicom(as_dataset))
    read = pydicom.dcmread(file)
    images = [str(file), file, file.read_bytes(), bytearray(file.read_bytes()), read, as_dataset, pixels]
    scores = model.predict([*images, encoded(pixels), (pixels << 4) / np.float32(65535)])
    assert scores[schema.ERROR].null_count == 9
    assert scores[schema.IMAGE_ID].to_pylist() == [str(file), str(file), *map(str, range(2, 9))]
    assert scores[schema.HEIGHT_PX].to_pylist() == [96] * 9
    np.testing.assert_allclose(probabilities(scores), probabilities(scores)[:1].repeat(9, 0), atol=2e-4)
    for image in (str(file), read, pixels):
        np.testing.assert_allclose(probabilities(model.predict(image)), probabilities(scores)[:1], atol=2e-4)


def test_archives_are_folders_containers_lists_and_members(model: cxr.Predictor, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(encoded(radiograph(seed=number)))
    (folder / "bad.png").write_bytes(encoded(radiograph())[:100])
    with ZipFile(tmp_path / "all.zip", "w") as container:
        for file in folder.iterdir():
            container.write(file, file.name)
    (tmp_path / "list.csv").write_text("path\n" + "".join(f"folder/{file.name}\n" for file in folder.iterdir()))
    expected = model.predict(sorted(folder.iterdir()))
    assert expected[schema.ERROR].null_count == 3
    for archive in (folder, str(folder), tmp_path / "all.zip", f"{tmp_path}/list.csv"):
        scores = model.predict(archive).sort_by(schema.IMAGE_ID)
        assert scores[schema.ERROR].to_pylist() == expected[schema.ERROR].to_pylist()
        np.testing.assert_allclose(probabilities(scores), probabilities(expected), atol=1e-6)
    member = model.predict(f"{tmp_path}/all.zip!/1.png")
    np.testing.assert_allclose(probabilities(member), probabilities(expected)[1:2], atol=1e-6)
    selected = model.predict(folder, reading=ReadOptions(source="folder", gate="off"))
    assert selected[schema.GATE].null_count == 4


def test_images_are_cropped_as_the_checkpoint_was_trained(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    recipe = SMALL["align"].replace(lung_crop=str(checkpoints["lungs"]))
    scores = cxr.load(saved(tmp_path / "cropped", recipe)).predict([radiograph(), BROKEN])
    assert scores[schema.CROP_STATUS].to_pylist()[0] is not None


REASONS: dict[str, tuple[Any, str]] = {
    "other bytes": (BROKEN, "unsupported file type: text; expected DICOM, PNG or JPEG"),
    "no bytes": (b"", "empty file"),
    "a missing file": ("/none/such.dcm", "file not found"),
    "a data set without pixels": (dataset(radiograph(), PixelData=None), "DICOM without pixel data"),
    "a data set with too few": (dataset(radiograph(), PixelData=bytes(10)), "truncated DICOM"),
    "an array of floats": (radiograph() / 1.0, "expected values from 0 to 1, got 0 to 255; scale it"),
    "an array of integers": (radiograph().astype(np.int64), "int64 array: expected uint8, uint16, or floats"),
    "several images": (
        np.zeros((5, 64, 64), np.uint8),
        r"shape \(5, 64, 64\): expected .*as a list",
    ),
    "one color": (np.zeros((64, 64), np.uint16), "blank image"),
    "a photograph": (np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8), "color image"),
}


@pytest.mark.parametrize("kind", REASONS)
def test_an_unusable_image_is_a_row_with_the_reason_or_an_exception(model: cxr.Predictor, kind: str) -> None:
    image, reason = REASONS[kind]
    scores = model.predict([radiograph(), image])
    assert scores[schema.PROBABILITIES].null_count == 1
    first, second = scores[schema.ERROR].to_pylist()
    assert first is None
    with pytest.raises(ValueError, match=reason):
        raise ValueError(second)
    with pytest.raises(ImageRejectedError, match=f"image ({image if isinstance(image, str) else 1}): .*{reason}"):
        model.predict([radiograph(), image], on_error="raise")


MISTAKES: dict[str, tuple[Any, str]] = {
    "nothing": ([], "expected at least one image, got none: use a path"),
    "a number": (3, "expected a path or URI, .* got int: convert it"),
    "None": ([None], "image 0: expected a path or URI, .* got NoneType"),
    "a tensor": ([radiograph(), torch.zeros(9, 9)], r"image 1: expected .* got torch\.Tensor: convert it"),
    "a path that is missing": ("/none/such", "expected an image or an archive, got /none/such, which does not exist"),
    "an unsupported URI": ("http://host/a.dcm", "expected a local path, .* got 'http://host/a.dcm'"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_mistakes_say_what_to_give(model: cxr.Predictor, kind: str) -> None:
    images, message = MISTAKES[kind]
    with pytest.raises(UserError, match=message):
        model.predict(images)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"uri": "/none/such"}, "/none/such contains no checkpoint.json: use the folder of a checkpoint"),
        ({"uri": None}, "expected the path or URI of a checkpoint, got NoneType: use a string"),
        ({"device": "tpu"}, "device: expected one of cpu.*, got tpu"),
        ({"precision": "fp16"}, "precision: expected one of auto, float32, bfloat16, got fp16"),
        ({"batch_size": 0}, "batch_size: expected 1 or more, got 0"),
    ],
)
def test_mistakes_in_loading(checkpoints: dict[str, Path], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        cxr.load(**({"uri": checkpoints["align"]} | arguments))


# ---- Heat maps, embeddings, figures


def test_heat_maps_lie_on_the_original_image(checkpoints: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def one_cell(self: Recipe, network: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        maps = torch.zeros(len(batch[schema.PIXELS]), len(schema.FINDINGS), 8, 8)
        maps[:, 2, 3, 6] = 1
        return maps

    monkeypatch.setattr(LocalizeRecipe, "heat_maps", one_cell)
    wide = cv2.resize(radiograph(), (320, 160))
    bad, good = cxr.load(checkpoints["localize"]).explain([BROKEN, wide])
    assert (bad.maps.size, bad.error) == (0, "unsupported file type: text; expected DICOM, PNG or JPEG")
    assert good.maps.shape == (len(schema.FINDINGS), 8, 8)
    np.testing.assert_allclose(good.transform.to_original(np.array([[6.5, 3.5]])), [[260, 60]])  # 40 px a cell
    on_original = good.on_original("Effusion")
    assert on_original.shape == (160, 320)
    row, column = np.unravel_index(on_original.argmax(), on_original.shape)
    assert abs(column + 0.5 - 260) <= 1
    assert abs(row + 0.5 - 60) <= 1
    assert good.on_original("Mass").max() == 0
    with pytest.raises(UserError, match="finding: expected one of Atelectasis"):
        good.on_original("Cold")
    with pytest.raises(UserError, match="expected an image with heat maps, got one with an error"):
        bad.on_original("Mass")


@pytest.mark.parametrize("family", ["attend", "classify", "localize"])
def test_heat_maps_are_between_0_and_1(family: str, checkpoints: dict[str, Path]) -> None:
    (heat_map,) = cxr.load(checkpoints[family]).explain(radiograph())
    assert heat_map.maps.shape[0] == len(heat_map.findings)
    assert 0 <= heat_map.maps.min() < heat_map.maps.max() <= 1


def test_embeddings_are_in_the_order_of_the_images(model: cxr.Predictor, monkeypatch: pytest.MonkeyPatch) -> None:
    def mean(self: Recipe, network: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        return batch[schema.PIXELS].float().mean((1, 2))[:, None].expand(-1, 3)

    images = [BROKEN, *(np.full((32, 32), level, np.uint8) for level in (50, 100, 150))]
    for image in images[1:]:
        image[0] = 0  # not blank
    with pytest.raises(UserError, match=r"expected a checkpoint of a family with embeddings, .* family 'aecnn'"):
        model.embed(images)
    for name in ("embed", "predict_and_embed"):
        monkeypatch.setattr(AecnnRecipe, name, mean, raising=False)
    vectors = model.embed(images)
    assert vectors.dtype == np.float32
    np.testing.assert_allclose(vectors[:, 0], [np.nan, *(31 / 32 * level for level in (50, 100, 150))], rtol=0.01)
    assert model.embed([BROKEN]).shape[0] == 1


@pytest.mark.parametrize("joined", [False, True])
def test_masks_consist_of_probable_pixels(joined: bool, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    uri = checkpoints["lungs"]
    if joined:
        uri = saved(tmp_path / "ensemble", EnsembleRecipe.of([SMALL["lungs"], SMALL["lungs"]]))
    predictor, image = cxr.load(uri), radiograph()
    (found,) = predictor.segment(image)
    probabilities = found.on_original(schema.LUNGS)
    assert probabilities.shape == image.shape
    assert 0 <= probabilities.min() < probabilities.max() <= 1
    cut = float(np.median(probabilities))
    predictor._model.network.get_buffer("rule").copy_(torch.tensor([cut, 0.0, cut]))  # an untrained network's mask
    scores = predictor.predict(image)
    mask = rle.decode(scores[schema.PRED_MASK_RLE][0].as_py(), *image.shape)
    assert 0 < mask.sum() < mask.size
    np.testing.assert_array_less(cut - 1e-4, probabilities[mask])


def test_families_without_masks_say_so(model: cxr.Predictor) -> None:
    with pytest.raises(UserError, match=r"expected a checkpoint of a family that predicts masks"):
        model.segment(radiograph())


def test_families_without_heat_maps_say_so(model: cxr.Predictor) -> None:
    with pytest.raises(UserError, match=r"expected a checkpoint of a family with heat maps, .* use predict or show"):
        model.explain(radiograph())


ROWS = {"align": ["image", "aligned"], "aecnn": ["prediction", "decoded"], "attend": ["prediction", "heat map"]}
ROWS |= {family: ["prediction", "heat map"] for family in ("classify", "localize")}


@pytest.mark.parametrize("family", by_family(RECIPES))
def test_a_figure_shows_the_predictions_of_every_family(family: str, checkpoints: dict[str, Path]) -> None:
    figure = cxr.load(checkpoints[family]).show([radiograph(), BROKEN, radiograph(seed=1)], min_score=0)
    titles = [axes.get_title(loc="left") for axes in figure.axes]
    rows = ROWS.get(family, ["prediction"])
    assert len(titles) == 3 * len(rows)
    assert [title.split("\n")[1].partition(":")[0] for title in titles[::3]] == rows
    texts = [text.get_text().replace("\n", " ") for text in figure.axes[1].texts]
    assert texts == ["unsupported file type: text; expected DICOM, PNG or JPEG"]
    shown = figure.axes[0].images[0].get_array()
    assert shown is not None
    assert shown.shape == (512, 512)


@pytest.mark.parametrize(
    ("images", "options", "message"),
    [
        ([radiograph()] * 9, {}, "expected at most 8 images in a figure, got more"),
        (str(Path(__file__).parent), {}, "expected images to show, got the archive .*: use some of its files"),
        (radiograph(), {"finding": "Cold"}, "finding: expected one of Atelectasis"),
    ],
)
def test_mistakes_in_figures(model: cxr.Predictor, images: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        model.show(images, **options)
