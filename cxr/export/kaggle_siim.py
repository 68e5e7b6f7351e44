"""Submissions to the SIIM-ACR Pneumothorax Segmentation challenge (2019) from a scoring run."""

from __future__ import annotations

import re

from cxr import storage
from cxr.errors import UserError
from cxr.evaluation.run import Run, Split, check_family
from cxr.evaluation.segmentation_data import load_scores
from cxr.reporting.segmentation import siim_submission
from cxr.sources import rle

_ENDING = re.compile(r"\.(dcm|dicom|png|jpe?g)$", re.IGNORECASE)


FAMILIES = ("pneumothorax",)


def write_submission(run: Run, uri: str, split: Split = "test") -> dict[str, int]:
    """Write a row for each image of a split to `uri`, sorted by ImageId; returns counts of images, positives, errors.

    ImageId is the file's name without folders and extension. The challenge expects every image: an image with an
    error is submitted with an empty mask, and counted.

    Raises:
        UserError: the run does not segment pneumothorax or has no image of that split, or two images have the same
            name.
    """
    check_family(run, FAMILIES, "a submission to SIIM-ACR")
    scores = load_scores(run, split)
    codes: dict[str, str] = {}
    rows = zip(scores.image_ids.to_pylist(), scores.codes.to_pylist(), scores.good.tolist(), strict=True)
    for image_id, code, good in rows:
        name = _ENDING.sub("", image_id.rpartition("/")[2])
        if name in codes:
            raise UserError(f"{run.uri} has scored two images named {name}: score the challenge's archive by itself")
        codes[name] = code if good else rle.EMPTY
    storage.write_text(storage.normalize(uri), siim_submission(dict(sorted(codes.items()))))
    errors = int((~scores.good).sum())
    return {"images": len(codes), "positives": sum(code != rle.EMPTY for code in codes.values()), "errors": errors}
