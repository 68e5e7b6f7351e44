"""Generate an archive of synthetic chest X-rays (phantoms) with ground truth, in the layout of a published archive.

cxr phantom --out runs/phantom --count 200 --preview runs/phantom.jpg
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import cv2

from cxr import storage
from cxr.errors import UserError
from cxr.phantom.archive import Exam, write_phantom
from cxr.phantom.findings import check_findings
from cxr.phantom.jsrt import write_jsrt_phantom
from cxr.phantom.nlm import write_masked_phantom
from cxr.phantom.preview import contact_sheet
from cxr.phantom.report_labels import write_report_phantom
from cxr.phantom.rsna import write_rsna_phantom
from cxr.phantom.siim import write_siim_phantom
from cxr.phantom.vinbigdata import write_vinbigdata_phantom
from cxr.schema import FINDINGS

PREVIEWED = 36
WITH_FINDINGS = ("chestxray14", "montgomery", "shenzhen")  # layouts in which any finding may occur

Layout = Literal[
    "chestxray14",
    "montgomery",
    "shenzhen",
    "siim",
    "siim-png",
    "jsrt",
    "vinbigdata",
    "vinbigdata-png",
    "vindr-cxr",
    "chexpert",
    "mimic-cxr-jpg",
    "padchest",
    "rsna-pneumonia",
]
WRITE: dict[Layout, Callable[..., None]] = {
    "chestxray14": write_phantom,
    "montgomery": partial(write_masked_phantom, layout="montgomery"),
    "shenzhen": partial(write_masked_phantom, layout="shenzhen"),
    "siim": partial(write_siim_phantom, layout="siim"),
    "siim-png": partial(write_siim_phantom, layout="siim-png"),
    "jsrt": write_jsrt_phantom,
    "vinbigdata": partial(write_vinbigdata_phantom, layout="vinbigdata"),
    "vinbigdata-png": partial(write_vinbigdata_phantom, layout="vinbigdata-png"),
    "vindr-cxr": partial(write_vinbigdata_phantom, layout="vindr-cxr"),
    "chexpert": partial(write_report_phantom, layout="chexpert"),
    "mimic-cxr-jpg": partial(write_report_phantom, layout="mimic-cxr-jpg"),
    "padchest": partial(write_report_phantom, layout="padchest"),
    "rsna-pneumonia": write_rsna_phantom,
}


@dataclass(frozen=True)
class Options:
    """Settings of the phantom archive."""

    out: str = "runs/phantom"
    """Folder or bucket prefix of the new archive."""
    layout: Layout = "chestxray14"
    """Published archive whose layout to imitate. montgomery, shenzhen and jsrt have lung masks; siim and siim-png
    pneumothorax masks; vinbigdata, vinbigdata-png and vindr-cxr boxes by three readers per image; rsna-pneumonia
    boxes around opacities; chexpert, mimic-cxr-jpg and padchest report-level labels."""
    count: int = 64
    """Number of images; chestxray14, chexpert, mimic-cxr-jpg, padchest and rsna-pneumonia have one to four per
    patient, other layouts one."""
    size: int = 512
    """Height and width in pixels. Images of jsrt are enlarged to 2048; those of vinbigdata-png have half of this
    size."""
    seed: int = 0
    """Random seed. The same seed gives the same images; a larger count adds images."""
    prevalence: float | None = None
    """Fraction of images with a finding. Default: .5, or as in the original for siim (.22), jsrt (.62), vinbigdata
    and vindr-cxr (.29), rsna-pneumonia (.67), and chexpert, mimic-cxr-jpg and padchest (.7)."""
    findings: tuple[str, ...] = ()
    """Findings that may occur, for chestxray14, montgomery and shenzhen; the other layouts have fixed findings.
    Default: all."""
    pose: float = 1.0
    """Strength of the random shift, rotation, scale and shear. 0: none."""
    preview: str | None = None
    """Path of a JPEG file to write, which shows the first images with findings and boxes. It must be outside OUT."""

    def __post_init__(self) -> None:
        if self.preview and storage.is_inside(storage.normalize(self.preview), storage.normalize(self.out)):
            raise UserError(
                f"preview: expected a file outside --out {self.out}, where it would be an image of the archive, got "
                f"{self.preview}: use another path"
            )


def main(options: Options) -> dict[str, Any]:
    start, previewed, made = time.monotonic(), [], 0

    def on_exam(exam: Exam) -> None:
        nonlocal made
        made += 1
        if options.preview and len(previewed) < PREVIEWED:
            previewed.append(exam)
        if made % 100 == 0 or made == options.count:
            print(
                f"{made} of {options.count} images, {made / (time.monotonic() - start):.1f} images/s",
                flush=True,
            )

    settings = _layout_settings(options)
    WRITE[options.layout](
        options.out,
        options.count,
        size=options.size,
        seed=options.seed,
        pose=options.pose,
        on_exam=on_exam,
        **settings,
    )
    archive = storage.normalize(options.out)
    if options.preview:
        _, data = cv2.imencode(".jpg", contact_sheet(previewed))
        storage.write_bytes(options.preview, data.tobytes())
    return {"archive": archive, "images": made}


def _layout_settings(options: Options) -> dict[str, Any]:
    """Settings that replace the layout's defaults."""
    settings: dict[str, Any] = {} if options.prevalence is None else {"prevalence": options.prevalence}
    if options.findings:
        if options.layout not in WITH_FINDINGS:
            raise UserError(
                f"expected no --findings for --layout {options.layout}, which has fixed findings, got "
                f"{' '.join(options.findings)}: omit them"
            )
        settings["findings"] = tuple(finding for finding in FINDINGS if finding in options.findings)
        check_findings(options.findings)
    return settings
