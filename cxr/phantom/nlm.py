"""Archives of phantoms in the layouts of Montgomery and Shenzhen (`sources.nlm`): X-rays with lung masks.

    CXR_png/PREFIX_NNNN_{0,1}.png         8-bit gray; 1 if the image has any finding
    ManualMask/{left,right}Mask/*.png     montgomery: 0 and 255, the patient's left and right lung
    mask/*_mask.png                       shenzhen: both lungs
    truth.parquet                         image_id, true_theta

Image `index` is that of `archive.make_exam`; each image counts as another patient, as in the originals.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, Unpack, get_args

import numpy as np

from cxr import schema, storage
from cxr.errors import UserError
from cxr.phantom.archive import ExamSettings, make_exams, png, write_poses
from cxr.phantom.render import Phantom
from cxr.schema import FINDINGS
from cxr.sources import nlm

Layout = Literal["montgomery", "shenzhen"]
_SOURCES: dict[Layout, nlm.MaskedLungs] = {"montgomery": nlm.montgomery, "shenzhen": nlm.shenzhen}


def write_masked_phantom(
    out_uri: str,
    count: int,
    layout: Layout,
    *,
    findings: Sequence[str] = FINDINGS,
    prevalence: float = 0.5,
    **settings: Unpack[ExamSettings],
) -> None:
    """Write an archive of `count` images in this layout; see `make_exams` for the settings.

    Raises:
        UserError: the layout is unknown, a setting is out of range, or `out_uri` is not writable.
    """
    if layout not in _SOURCES:
        raise UserError(f"expected layout {' or '.join(get_args(Layout))}, got {layout!r}: choose one of these")
    poses: dict[str, np.ndarray] = {}
    for exam in make_exams(count, findings=findings, prevalence=prevalence, **settings):
        stem = f"{_SOURCES[layout].prefix}{exam.index + 1:04d}_{int(bool(exam.phantom.labels))}"
        name = f"{stem}.png"
        storage.write_bytes(storage.join(out_uri, nlm.IMAGES, name), png(exam.phantom.pixels))
        masks = zip(_SOURCES[layout].masks, _masks(exam.phantom, layout), strict=True)
        for path, mask in masks:
            storage.write_bytes(storage.join(out_uri, path.format(stem)), png(mask * np.uint8(255)))
        poses[name] = exam.phantom.pose_unit
    write_poses(out_uri, poses)


def _masks(phantom: Phantom, layout: Layout) -> Iterator[np.ndarray]:
    """The lungs in the order of the source's `masks`, uint8 of 0 and 1."""
    lungs = phantom.masks[schema.LUNGS]
    if layout == "shenzhen":
        yield lungs.astype(np.uint8)
        return
    left = lungs & patients_left(phantom)
    yield left.astype(np.uint8)
    yield (lungs & ~left).astype(np.uint8)


def patients_left(phantom: Phantom) -> np.ndarray:
    """bool (size, size): whether canonical x > 0, which is on the right of the image."""
    size = len(phantom.pixels)
    centers = (2 * np.arange(size) + 1) / size - 1
    inverse = np.linalg.inv(np.vstack([phantom.pose_unit, [0, 0, 1]]))
    return inverse[0, 0] * centers[None, :] + inverse[0, 1] * centers[:, None] + inverse[0, 2] > 0
