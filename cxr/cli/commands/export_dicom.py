"""Write a run's scores as DICOM objects for a PACS: structured reports, segmentations, secondary captures.

cxr export dicom --run runs/scores --out runs/dicom

cxr export dicom --run runs/scores --out runs/dicom --kinds sr seg --push https://pacs.example.org/dicomweb
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from cxr import schema, storage
from cxr.cli.exports import show_notes
from cxr.errors import UserError
from cxr.evaluation.run import read_run


@dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of the job."""

    run: str = "runs/score"
    """OUT of `cxr score` on DICOM files: a folder or URI."""
    out: str = "runs/dicom"
    """Folder or URI of the results: OUT/STUDY/KIND-INSTANCE.dcm, and OUT/export.csv, which says for each image what
    was written or why not. The files contain the identity of patients."""
    kinds: tuple[str, ...] = ("sr", "seg", "sc")
    """Objects to write: sr (structured report with findings, boxes, probabilities and thresholds), seg (segmentation
    with the predicted mask), sc (secondary capture: the image with its predictions drawn on it)."""
    all_images: bool = False
    """Export all scored images, also those without a finding, box or mask."""
    box_score: float = 0.25
    """Minimum score of the boxes that are exported. Findings with a threshold from `cxr score --thresholds` use that
    instead."""
    fractional: bool = False
    """Write segmentations with the probability of each pixel (FRACTIONAL) instead of masks (BINARY). The run contains
    only masks, so the exported images are segmented again, in this process, with the run's checkpoint."""
    member: str = ""
    """Name of the checkpoint to export, if the run has several."""
    checkpoint: str = ""
    """New location of the run's checkpoint, if it has moved. Reports take their thresholds from it."""
    archive: str = ""
    """New location of the scored archive, if it has moved."""
    crosswalk: str = ""
    """Folder that maps pseudonyms back to images, for runs with --pseudonymize: the --crosswalk of cxr score."""
    workers: int = 0
    """Number of processes. Default: one per CPU."""
    push: str = ""
    """URL of a DICOMweb service (STOW-RS) to which the objects are sent, such as https://pacs.example.org/dicomweb.
    Default: do not send them."""
    credentials: str = ""
    """JSON file with a user and password, or a token, for --push. Default: the variables CXR_PACS_USER and
    CXR_PACS_PASSWORD, or CXR_PACS_TOKEN."""

    def __post_init__(self) -> None:
        if unknown := set(self.kinds) - {"sr", "seg", "sc"}:
            raise UserError(
                f"expected --kinds sr, seg or sc, got {', '.join(sorted(unknown))}: use one or more of these"
            )
        if not self.kinds:
            raise UserError("expected one or more --kinds, got none: use sr, seg or sc")
        if not 0 <= self.box_score <= 1:
            raise UserError(f"expected --box-score from 0 to 1, got {self.box_score}")
        if self.workers < 0:
            raise UserError(f"expected --workers of 0 or more, got {self.workers}")


def main(options: Options) -> dict[str, Any]:
    from cxr.export.dicom_objects import KINDS, Kind, require_packages
    from cxr.export.dicom_push import check_service, push

    require_packages()
    service = check_service(options.push, options.credentials) if options.push else None
    run = read_run(options.run, options.member)
    show_notes(run)

    from cxr.export import dicom_run  # torch takes seconds to import
    from cxr.export.dicom_write import Export

    run = replace(run, crosswalk=options.crosswalk)
    originals = dicom_run.originals(run, options.archive)
    kinds: tuple[Kind, ...] = tuple(kind for kind in KINDS if kind in options.kinds)
    checkpoint = dicom_run.find_checkpoint(run, options.checkpoint)
    algorithm = dicom_run.read_algorithm(run, kinds, checkpoint[1] if checkpoint else {}, options.box_score)
    if checkpoint is None and schema.PROBABILITIES in dicom_run.columns_of(run):
        print(
            "note: the run's checkpoint has been moved or deleted, so reports contain decisions without thresholds; "
            "name its new location with --checkpoint",
            flush=True,
        )
    mask_probabilities, workers = None, options.workers
    if options.fractional:
        if checkpoint is None:
            raise UserError(
                "--fractional needs the run's checkpoint, which has been moved or deleted: name its new location "
                "with --checkpoint"
            )

        from cxr.inference.pixel_probabilities import PixelProbabilities

        mask_probabilities, workers = PixelProbabilities(checkpoint[0]), 1
    out = storage.normalize(options.out)
    export = Export(
        out,
        algorithm,
        kinds=kinds,
        all_images=options.all_images,
        mask_probabilities=mask_probabilities,
    )
    dicom_run.export_run(run, export, originals, workers)
    counts, lines = dicom_run.write_csv(out)
    if counts["failed"] and not any(counts[kind] for kind in KINDS):
        reasons = [line.partition(": ")[2] for line in lines if line.startswith("not exported")]
        raise UserError(f"nothing could be exported ({reasons[0]}): see {storage.join(out, dicom_run.CSV_FILE)}")
    if service is not None:
        try:
            push(out, service)
        finally:
            counts, lines = dicom_run.write_csv(out)
    for line in lines:
        print(line, flush=True)
    table = storage.join(out, dicom_run.CSV_FILE)
    print(f"what was written for each image: {table}", flush=True)
    return {"objects": out, "table": table, "metrics": counts}
