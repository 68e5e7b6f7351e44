"""Archives of phantoms in the layout of JSRT and SCR (`sources.jsrt`): lung masks, and nodules in some images.

    JPCLN001.IMG …, JPCNN001.IMG …            with and without nodule: 2048 x 2048, 12 bits, big-endian, 0 is white
    fold{1,2}/masks/{left,right} lung/*.gif   1024 x 1024, 0 and 255; odd numbers in fold 1, even ones in fold 2
    truth.parquet                             image_id, true_theta

Image `index` is that of `archive.make_exam`; each image counts as another patient. Images are drawn at any size and
resized to those of the databases.
"""

from __future__ import annotations

import io
from typing import Unpack

import cv2
import numpy as np
from PIL import Image

from cxr import schema, storage
from cxr.phantom.archive import Exam, ExamSettings, make_exams, write_poses
from cxr.phantom.nlm import patients_left
from cxr.sources import jsrt

PREVALENCE = 0.62  # 154 of 247 images
MASK_PX = 1024
_BLACK = 4095  # 12 bits, as stored


def write_jsrt_phantom(
    out_uri: str,
    count: int,
    *,
    prevalence: float = PREVALENCE,
    **settings: Unpack[ExamSettings],
) -> None:
    """Write an archive of `count` images.

    Args:
        prevalence: fraction of images with a nodule, the only finding.
        settings: see `make_exams`; images are drawn at `size` and then resized to 2048 x 2048.

    Raises:
        UserError: a setting is out of range, or `out_uri` is not writable.
    """
    numbers = {jsrt.NODULE: 0, jsrt.NO_NODULE: 0}
    poses: dict[str, np.ndarray] = {}
    for exam in make_exams(count, findings=(jsrt.FINDING,), prevalence=prevalence, **settings):
        kind = jsrt.NODULE if exam.phantom.labels else jsrt.NO_NODULE
        numbers[kind] += 1
        name = _write(out_uri, exam, kind, numbers[kind])
        poses[name] = exam.phantom.pose_unit
    write_poses(out_uri, poses)


def _write(out_uri: str, exam: Exam, kind: str, number: int) -> str:
    """Write an image and its masks; return the image's name."""
    stem, fold = f"{kind}{number:03d}", f"fold{2 - number % 2}"
    lungs, left = exam.phantom.masks[schema.LUNGS], patients_left(exam.phantom)
    for side, half in zip(jsrt.SIDES, (left, ~left), strict=True):
        location = storage.join(out_uri, fold, jsrt.MASKS, side, f"{stem}.gif")
        storage.write_bytes(location, _gif(lungs & half))
    storage.write_bytes(storage.join(out_uri, f"{stem}.IMG"), _raw(exam.phantom.pixels))
    return f"{stem}.IMG"


def _raw(pixels: np.ndarray) -> bytes:
    """Encode uint8 (H, W) with dense tissue bright as a raw image of the database."""
    side = (jsrt.FRAME_PX, jsrt.FRAME_PX)
    enlarged = cv2.resize(pixels.astype(np.float32), side, interpolation=cv2.INTER_LINEAR)
    return (_BLACK - np.rint(enlarged * (_BLACK / 255))).astype(">u2").tobytes()


def _gif(mask: np.ndarray) -> bytes:
    """Encode bool (H, W) as a GIF of `MASK_PX` x `MASK_PX`."""
    pixels = cv2.resize(mask * np.uint8(255), (MASK_PX, MASK_PX), interpolation=cv2.INTER_NEAREST_EXACT)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "GIF")
    return stream.getvalue()
