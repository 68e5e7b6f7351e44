"""Make an archive of synthetic chest X-rays with known truth, in a published archive's layout.

python jobs/make_phantom.py --out runs/phantom --count 200 --preview runs/phantom.jpg
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import cv2

from cxr import storage
from cxr.job import run_job
from cxr.phantom.archive import Study, write_phantom
from cxr.phantom.nlm import write_masked_phantom
from cxr.phantom.preview import contact_sheet

PREVIEWED = 36


@dataclass(frozen=True)
class Options:
    """How many phantoms of what kind."""

    out: str = "runs/phantom"
    """Folder or bucket prefix of the archive."""
    layout: Literal["chestxray14", "montgomery", "shenzhen"] = "chestxray14"
    """Source whose files it looks like; the last two have lung masks as pictures, and neither findings nor boxes."""
    count: int = 64
    """Number of images; one to four a patient."""
    size: int = 512
    """Height and width, pixels."""
    seed: int = 0
    """The same seed gives the same images; a larger count adds to them."""
    prevalence: float = 0.5
    """Share of images with a finding."""
    pose: float = 1.0
    """Strength of the random shift, turn, scale and shear; 0 for none."""
    preview: str | None = None
    """JPEG of the first images with findings and boxes drawn in; keep it outside of OUT/images."""


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

    write = write_phantom
    if options.layout != "chestxray14":
        write = partial(write_masked_phantom, layout=options.layout)
    write(
        options.out,
        options.count,
        size=options.size,
        seed=options.seed,
        prevalence=options.prevalence,
        pose=options.pose,
        on_study=on_study,
    )
    archive = storage.normalise(options.out)
    if options.preview:
        _, data = cv2.imencode(".jpg", contact_sheet(shown))
        storage.write_bytes(options.preview, data.tobytes())
    return {"archive": archive, "images": made}


if __name__ == "__main__":
    run_job(main, Options)
