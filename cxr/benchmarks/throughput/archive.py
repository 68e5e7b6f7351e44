"""An archive of many files made from few images, for measurements that depend only on files and bytes."""

from __future__ import annotations

import os
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import cv2
import pyarrow as pa

from cxr.phantom.archive import make_exam
from cxr.sources.splits import split_by_patient

VAL_ROWS = 64


def make_pictures(folder: Path, count: int, size: int) -> list[Path]:
    """Write `count` phantoms as gray PNGs of `size` px with adaptive row filters, as in published archives."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{index:04d}.png" for index in range(count)]
    with ProcessPoolExecutor(mp_context=get_context("forkserver")) as pool:
        for file, data in zip(files, pool.map(_png, range(count), repeat(size)), strict=True):
            file.write_bytes(data)
    return files


def _png(index: int, size: int) -> bytes:
    cv2.setNumThreads(0)
    pixels = make_exam(index, size=size).phantom.pixels
    done, data = cv2.imencode(".png", pixels, [cv2.IMWRITE_PNG_FILTER, cv2.IMWRITE_PNG_ALL_FILTERS])
    assert done
    return data.tobytes()


def make_archive(folder: Path, pictures: list[Path], rows: int) -> list[Path]:
    """Make a folder archive with exactly `rows` training images and VAL_ROWS validation images, all links to
    `pictures`.

    Returns:
        the paths of the training images.
    """
    patients = ["a", "b"]
    splits = split_by_patient(pa.array(patients)).to_pylist()
    made = {
        split: _link_files(folder / patients[splits.index(split)] / "study", pictures, count)
        for split, count in (("train", rows), ("val", VAL_ROWS))
    }
    return made["train"]


def _link_files(folder: Path, pictures: list[Path], count: int) -> list[Path]:
    folder.mkdir(parents=True)
    files = [folder / f"{number:06d}.png" for number in range(count)]
    for number, file in enumerate(files):
        os.link(pictures[number % len(pictures)], file)
    return files
