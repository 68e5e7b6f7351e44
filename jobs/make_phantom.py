"""Make an archive of synthetic chest X-rays with known truth, in a published archive's layout.

python jobs/make_phantom.py --out runs/phantom --count 200 --preview runs/phantom.jpg
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
from cxr.phantom.archive import Study, write_phantom
from cxr.phantom.findings import check_findings
from cxr.phantom.jsrt import write_jsrt_phantom
from cxr.phantom.nlm import write_masked_phantom
from cxr.phantom.preview import contact_sheet
from cxr.phantom.siim import write_siim_phantom
from cxr.phantom.vinbigdata import write_vinbigdata_phantom
from cxr.runtime.job import run_job
from cxr.schema import FINDINGS

PREVIEWED = 36
WITH_FINDINGS = ("chestxray14", "montgomery", "shenzhen")  # layouts in which any finding may occur

Layout = Literal["chestxray14", "montgomery", "shenzhen", "siim", "siim-png", "jsrt", "vinbigdata", "vinbigdata-png"]
WRITE: dict[Layout, Callable[..., None]] = {
    "chestxray14": write_phantom,
    "montgomery": partial(write_masked_phantom, layout="montgomery"),
    "shenzhen": partial(write_masked_phantom, layout="shenzhen"),
    "siim": partial(write_siim_phantom, layout="siim"),
    "siim-png": partial(write_siim_phantom, layout="siim-png"),
    "jsrt": write_jsrt_phantom,
    "vinbigdata": partial(write_vinbigdata_phantom, layout="vinbigdata"),
    "vinbigdata-png": partial(write_vinbigdata_phantom, layout="vinbigdata-png"),
}


@dataclass(frozen=True)
class Options:
    """How many phantoms of what kind."""

    out: str = "runs/phantom"
    """Folder or bucket prefix of the archive."""
    layout: Layout = "chestxray14"
    """Source whose files it looks like; montgomery, shenzhen, jsrt: lung masks; siim, siim-png: of pneumothorax;
    vinbigdata, vinbigdata-png: boxes of three readers an image."""
    count: int = 64
    """Number of images; one to four a patient."""
    size: int = 512
    """Height and width, pixels; those of jsrt are then enlarged to 2048, copies of vinbigdata-png halved."""
    seed: int = 0
    """The same seed gives the same images; a larger count adds to them."""
    prevalence: float | None = None
    """Share of images with a finding; left out, .5, and as in the original for siim (.22), jsrt (.62), vinbigdata
    (.29)."""
    findings: tuple[str, ...] = ()
    """Findings that may occur; left out, all. Of chestxray14, montgomery and shenzhen: the others have their own."""
    pose: float = 1.0
    """Strength of the random shift, turn, scale and shear; 0 for none."""
    preview: str | None = None
    """JPEG of the first images with findings and boxes drawn in; keep it outside of OUT."""


def main(options: Options) -> dict[str, Any]:
    start, shown, made = time.monotonic(), [], 0

    def on_study(study: Study) -> None:
        nonlocal made
        made += 1
        if options.preview and len(shown) < PREVIEWED:
            shown.append(study)
        if made % 100 == 0 or made == options.count:
            print(
                f"{made} of {options.count} images, {made / (time.monotonic() - start):.1f} a second",
                flush=True,
            )

    given = _given(options)
    WRITE[options.layout](
        options.out,
        options.count,
        size=options.size,
        seed=options.seed,
        pose=options.pose,
        on_study=on_study,
        **given,
    )
    archive = storage.normalize(options.out)
    if options.preview:
        _, data = cv2.imencode(".jpg", contact_sheet(shown))
        storage.write_bytes(options.preview, data.tobytes())
    return {"archive": archive, "images": made}


def _given(options: Options) -> dict[str, Any]:
    """Settings that differ from the layout's own."""
    given: dict[str, Any] = {} if options.prevalence is None else {"prevalence": options.prevalence}
    if options.findings:
        if options.layout not in WITH_FINDINGS:
            raise UserError(
                f"findings={' '.join(options.findings)}: --layout {options.layout} has its own; leave them out"
            )
        given["findings"] = tuple(finding for finding in FINDINGS if finding in options.findings)
        check_findings(options.findings)
    return given


if __name__ == "__main__":
    run_job(main, Options)
