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
from cxr.job import run_job
from cxr.phantom.archive import Study, write_phantom
from cxr.phantom.jsrt import write_jsrt_phantom
from cxr.phantom.nlm import write_masked_phantom
from cxr.phantom.preview import contact_sheet
from cxr.phantom.siim import write_siim_phantom

PREVIEWED = 36

Layout = Literal["chestxray14", "montgomery", "shenzhen", "siim", "siim-png", "jsrt"]
WRITE: dict[Layout, Callable[..., None]] = {
    "chestxray14": write_phantom,
    "montgomery": partial(write_masked_phantom, layout="montgomery"),
    "shenzhen": partial(write_masked_phantom, layout="shenzhen"),
    "siim": partial(write_siim_phantom, layout="siim"),
    "siim-png": partial(write_siim_phantom, layout="siim-png"),
    "jsrt": write_jsrt_phantom,
}


@dataclass(frozen=True)
class Options:
    """How many phantoms of what kind."""

    out: str = "runs/phantom"
    """Folder or bucket prefix of the archive."""
    layout: Layout = "chestxray14"
    """Source whose files it looks like; montgomery, shenzhen, jsrt: lung masks; siim, siim-png: of pneumothorax."""
    count: int = 64
    """Number of images; one to four a patient."""
    size: int = 512
    """Height and width, pixels; those of jsrt are then enlarged to 2048."""
    seed: int = 0
    """The same seed gives the same images; a larger count adds to them."""
    prevalence: float | None = None
    """Share of images with a finding; left out, .5, and as in the original for siim (.22) and jsrt (.62)."""
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

    given = {} if options.prevalence is None else {"prevalence": options.prevalence}
    WRITE[options.layout](
        options.out,
        options.count,
        size=options.size,
        seed=options.seed,
        pose=options.pose,
        on_study=on_study,
        **given,
    )
    archive = storage.normalise(options.out)
    if options.preview:
        _, data = cv2.imencode(".jpg", contact_sheet(shown))
        storage.write_bytes(options.preview, data.tobytes())
    return {"archive": archive, "images": made}


if __name__ == "__main__":
    run_job(main, Options)
