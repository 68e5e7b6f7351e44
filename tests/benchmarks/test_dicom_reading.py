"""The comparison of reading DICOM files runs in every transfer syntax."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydicom import dcmread

from cxr.benchmarks.throughput import dicom_reading
from cxr.benchmarks.throughput.dicom_reading import SYNTAXES, Compared, dicom_over_pydicom


@pytest.mark.parametrize("name", SYNTAXES)
def test_the_files_are_in_their_syntax_and_lossless_ones_are_exact(name: str, tmp_path: Path) -> None:
    first, *_ = dicom_reading._write_files(tmp_path / name, SYNTAXES[name], 2, 150, 100)
    ds = dcmread(first)
    assert SYNTAXES[name] == ds.file_meta.TransferSyntaxUID
    assert ds.pixel_array.shape == (150, 100)
    expected = dicom_reading._xray(0, 150, 100)
    if name not in ("jpeg_baseline", "jpeg_extended"):
        assert (ds.pixel_array == expected).all()


@pytest.mark.slow
def test_both_readers_are_timed_in_each_round(tmp_path: Path) -> None:
    compared = dicom_over_pydicom(tmp_path, 3, 2, size=32, syntaxes=["jpeg_lossless"], height_px=150, width_px=100)
    assert set(compared) == {"jpeg_lossless"}
    assert len(compared["jpeg_lossless"].ours) == len(compared["jpeg_lossless"].pydicom) == 2
    assert compared["jpeg_lossless"].ratio > 0


def test_the_ratio_is_the_median_of_the_rounds() -> None:
    assert Compared((10.0, 3.0, 8.0), (5.0, 3.0, 2.0)).ratio == 2
