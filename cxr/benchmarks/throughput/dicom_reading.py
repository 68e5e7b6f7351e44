"""Throughput of reading DICOM files by transfer syntax, compared with a loop over pydicom, in alternating rounds."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import cv2
import imagecodecs
import numpy as np
import pyarrow as pa
from pydicom import Dataset, dcmread, dcmwrite, uid
from pydicom.dataset import FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

from cxr import schema
from cxr.data.decode import make_rows
from cxr.phantom.archive import make_exam
from cxr.schema import PixelFormat
from cxr.sources.manifest import manifest_table

HEIGHT_PX, WIDTH_PX, BITS = 2500, 2048, 12
SYNTAXES = {
    "uncompressed": uid.ExplicitVRLittleEndian,
    "rle": uid.RLELossless,
    "jpeg_baseline": uid.JPEGBaseline8Bit,
    "jpeg_extended": uid.JPEGExtended12Bit,
    "jpeg_lossless": uid.JPEGLosslessSV1,
    "jpeg_ls": uid.JPEGLSLossless,
    "jpeg_2000": uid.JPEG2000Lossless,
    "htj2k": uid.HTJ2KLossless,
}
_DIFFERENT = 4  # images; others are links to these
_ROWS_PER_CALL = 16  # images of a call of make_rows; ingest uses parts of 16 to 512


@dataclass(frozen=True)
class Compared:
    """Images per second, in each round."""

    ours: tuple[float, ...]
    pydicom: tuple[float, ...]

    @property
    def ratios(self) -> list[float]:
        """Ratio of the two measurements of each round."""
        return [ours / theirs for ours, theirs in zip(self.ours, self.pydicom, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)


def dicom_over_pydicom(
    scratch: Path,
    images: int,
    rounds: int,
    *,
    size: int = 512,
    syntaxes: Sequence[str] = tuple(SYNTAXES),
    cores: int | None = None,
    height_px: int = HEIGHT_PX,
    width_px: int = WIDTH_PX,
) -> dict[str, Compared]:
    """Compare `make_rows`, with which archives are ingested and scored, with one process per core that reads images
    with pydicom, applies their windows, and resizes them with OpenCV.

    Both read the same X-rays of 12 bits (JPEG baseline: 8 bits), as files of each transfer syntax.

    Args:
        scratch: an empty folder for the files.
        images: number of images in each measurement.
        rounds: number of pairs of measurements.
    """
    cores = cores or len(os.sched_getaffinity(0))
    workers = max(1, cores // 2)  # each has two decoder processes
    context = get_context("forkserver")
    paths = {name: _write_files(scratch / name, SYNTAXES[name], images, height_px, width_px) for name in syntaxes}
    compared = {}
    with (
        ProcessPoolExecutor(workers, mp_context=context) as ours,
        ProcessPoolExecutor(cores, mp_context=context) as theirs,
    ):
        for name in syntaxes:
            batches = [paths[name][first : first + _ROWS_PER_CALL] for first in range(0, images, _ROWS_PER_CALL)]
            list(ours.map(_read_rows, batches[:1] * workers, repeat(size)))  # starts all processes
            list(theirs.map(_read_with_pydicom, paths[name][:1] * cores, repeat(size)))
            paces: dict[str, list[float]] = {"ours": [], "pydicom": []}
            for turn in range(rounds):
                measures = {
                    "ours": partial(ours.map, _read_rows, batches, repeat(size)),
                    "pydicom": partial(theirs.map, _read_with_pydicom, paths[name], repeat(size)),
                }
                for reader in sorted(measures, reverse=turn % 2 == 1):
                    start = time.perf_counter()
                    assert sum(measures[reader]()) == images
                    paces[reader].append(images / (time.perf_counter() - start))
            compared[name] = Compared(tuple(paces["ours"]), tuple(paces["pydicom"]))
            faster = f"{compared[name].ratio:.2f} times pydicom's"
            print(f"{name:<16} {statistics.median(paces['ours']):>9,.2f} images/s, {faster}", flush=True)
    return compared


def _read_rows(paths: Sequence[str], size: int) -> int:
    names = pa.array(paths)
    manifest = manifest_table({schema.IMAGE_ID: names, schema.SOURCE_URI: names})
    errors = make_rows(manifest, PixelFormat(size))[schema.ERROR]
    assert errors.null_count == len(errors), errors.drop_null()[0]
    return len(errors)


def _read_with_pydicom(path: str, size: int) -> int:
    cv2.setNumThreads(0)
    ds = dcmread(path)
    values = apply_voi_lut(apply_modality_lut(ds.pixel_array, ds), ds)  # 0 to the largest stored value
    pixels = np.rint(values * (255 / ((1 << ds.BitsStored) - 1))).astype(np.uint8)
    pixels = cv2.resize(pixels, (size, size), interpolation=cv2.INTER_AREA)
    assert np.ptp(pixels) > 0
    return 1


def _write_files(folder: Path, syntax: uid.UID, images: int, height_px: int, width_px: int) -> list[str]:
    """Files in one transfer syntax: a few different X-rays under many names."""
    folder.mkdir(parents=True)
    files = [folder / f"{number:05d}.dcm" for number in range(images)]
    for number, file in enumerate(files):
        if number < _DIFFERENT:
            dcmwrite(file, _dataset(_xray(number, height_px, width_px), syntax), enforce_file_format=True)
        else:
            os.link(files[number % _DIFFERENT], file)
    return [str(file) for file in files]


def _xray(index: int, height_px: int, width_px: int) -> np.ndarray:
    """A phantom (H, W), uint16, of 12 bits with as much noise as makes it as hard to compress as a real X-ray."""
    smooth = make_exam(index, size=512).phantom.pixels.astype(np.float32) * 16
    smooth = cv2.resize(smooth, (width_px, height_px), interpolation=cv2.INTER_CUBIC).clip(0)
    noise = np.random.default_rng(index).standard_normal(smooth.shape, np.float32)
    return np.rint(smooth + (4 + 0.1 * np.sqrt(smooth)) * noise).clip(0, (1 << BITS) - 1).astype(np.uint16)


def _dataset(pixels: np.ndarray, syntax: uid.UID) -> Dataset:
    """A digital X-ray with a window, as scanners write it."""
    bits = 8 if syntax == uid.JPEGBaseline8Bit else BITS
    stored = (pixels >> (BITS - bits)).astype(np.uint8 if bits == 8 else np.uint16)
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID = uid.DigitalXRayImageStorageForPresentation, uid.generate_uid()
    ds.Modality, ds.BodyPartExamined, ds.ViewPosition = "DX", "CHEST", "PA"
    ds.Rows, ds.Columns = stored.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8 * stored.itemsize, bits, bits - 1
    ds.WindowCenter, ds.WindowWidth = 1 << (bits - 1), 1 << bits
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = uid.ExplicitVRLittleEndian
    ds.PixelData = stored.tobytes()
    ds["PixelData"].VR = "OW"
    if syntax == uid.RLELossless:
        ds.compress(syntax, generate_instance_uid=False)
    elif syntax.is_encapsulated:
        ds.PixelData = encapsulate([bytes(_compressed(stored, bits, syntax))])
        ds["PixelData"].VR = "OB"
        ds.file_meta.TransferSyntaxUID = syntax
    return ds


def _compressed(pixels: np.ndarray, bits: int, syntax: uid.UID) -> bytes | bytearray:
    if syntax == uid.JPEGLosslessSV1:
        return imagecodecs.jpeg8_encode(pixels, lossless=True, predictor=1, bitspersample=bits)
    if syntax in (uid.JPEGBaseline8Bit, uid.JPEGExtended12Bit):
        return imagecodecs.jpeg8_encode(pixels, level=92, bitspersample=bits)
    if syntax == uid.JPEGLSLossless:
        return imagecodecs.jpegls_encode(pixels)
    if syntax == uid.HTJ2KLossless:
        return imagecodecs.htj2k_encode(pixels, reversible=True)
    assert syntax == uid.JPEG2000Lossless
    return imagecodecs.jpeg2k_encode(pixels, level=0, reversible=True, codecformat="j2k", bitspersample=bits)
