"""Phantom archives in other layouts: files like the published ones, without patient data."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
from PIL import Image
from pydicom import dcmread

from cxr.cli.commands import phantom
from cxr.errors import UserError
from cxr.phantom.jsrt import write_jsrt_phantom
from cxr.phantom.siim import image_uid, write_siim_phantom
from cxr.sources import find_source, rle, siim


@pytest.mark.parametrize("layout", get_args(phantom.Layout))
def test_every_layout_of_the_job_is_detected(layout: str, tmp_path: Path) -> None:
    result = phantom.main(phantom.Options(str(tmp_path), layout=layout, count=2, size=64))
    assert result == {"archive": str(tmp_path), "images": 2}
    assert find_source(str(tmp_path)).name == layout.removesuffix("-png")


@pytest.mark.parametrize("layout", ["siim", "siim-png"])
def test_siim_headers_are_the_published_ones(layout: str, tmp_path: Path, real_data: Path) -> None:
    write_siim_phantom(str(tmp_path), 4, layout, size=64)  # type: ignore[arg-type]
    headers = {path.name: path.read_text().splitlines()[0] for path in tmp_path.glob("*.csv")}
    with (real_data / "siim" / siim.CODES_FILE).open() as file:
        published = {siim.CODES_FILE: file.readline().strip()}
    pictures = dict.fromkeys((siim.TRAIN_FILE, siim.TEST_FILE), "new_filename,ImageId,has_pneumo")
    assert headers == (published if layout == "siim" else pictures)


def test_siim_dicoms_are_like_the_published_one(tmp_path: Path, real_data: Path) -> None:
    write_siim_phantom(str(tmp_path), 1, size=64)
    (path,) = tmp_path.rglob("*.dcm")
    (published,) = [each for each in (real_data / "siim" / "dicom").iterdir() if not each.name.startswith("Fake")]
    made, real = dcmread(path), dcmread(published)
    assert path.stem == made.SOPInstanceUID == image_uid(0, 0)
    assert path.parts[-3:-1] == (made.StudyInstanceUID, made.SeriesInstanceUID)
    assert made.file_meta.TransferSyntaxUID == real.file_meta.TransferSyntaxUID
    for tag in (
        "SOPClassUID",
        "Modality",
        "PhotometricInterpretation",
        "BitsStored",
        "PixelSpacing",
        "BodyPartExamined",
    ):
        assert made[tag].value == real[tag].value, tag
    assert made.PatientName == made.PatientID == "phantom-0-0"


def test_siim_has_one_row_per_connected_piece(tmp_path: Path) -> None:
    write_siim_phantom(str(tmp_path), 24, size=128, prevalence=1.0)
    rows = [line.split(", ") for line in (tmp_path / siim.CODES_FILE).read_text().splitlines()[1:]]
    assert len(rows) > len({image for image, _ in rows}) == 24
    areas = {image: np.zeros((128, 128), int) for image, _ in rows}
    for image, code in rows:
        areas[image] += rle.decode(code, 128, 128)
    assert {area.max() for area in areas.values()} == {1}


def test_a_larger_siim_archive_starts_with_the_smaller_one(tmp_path: Path) -> None:
    for count in (2, 3):
        write_siim_phantom(str(tmp_path / str(count)), count, size=64, seed=5)
    smaller = {path.relative_to(tmp_path / "2"): path.read_bytes() for path in (tmp_path / "2").rglob("*.dcm")}
    assert all((tmp_path / "3" / path).read_bytes() == data for path, data in smaller.items())
    assert len(smaller) == 2


def test_jsrt_files_have_the_databases_sizes_and_left_is_the_patients_left(tmp_path: Path) -> None:
    write_jsrt_phantom(str(tmp_path), 3, size=64)
    assert {path.stat().st_size for path in tmp_path.glob("*.IMG")} == {8_388_608}
    masks = sorted(tmp_path.glob("fold1/masks/left lung/*.gif"))
    assert {int(path.stem[-3:]) % 2 for path in masks} == {1}
    for path in masks:
        left, right = (
            np.asarray(Image.open(path.parents[1] / side / path.name).convert("L"))
            for side in ("left lung", "right lung")
        )
        assert left.shape == right.shape == (1024, 1024)
        assert set(np.unique(left)) == {0, 255}
        assert not (left & right).any()
        assert np.nonzero(left)[1].mean() > np.nonzero(right)[1].mean() + 256


@pytest.mark.parametrize("write", [write_siim_phantom, write_jsrt_phantom])
@pytest.mark.parametrize("wrong", [{"count": 0}, {"size": 8}, {"prevalence": 1.5}, {"pose": -1}])
def test_settings_out_of_range_are_rejected(write, wrong: dict[str, object], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=next(iter(wrong))):
        write(str(tmp_path), **{"count": 1, "size": 64, **wrong})
    assert not list(tmp_path.iterdir())
