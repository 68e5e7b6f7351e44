"""The files of a checkpoint: a folder with everything that scoring and further training need.

    checkpoint.json       recipe, findings in order, input contract (`cxr.models.input_contract`), metrics, versions,
                          commit, SHA-256 of weights.safetensors
    weights.safetensors   the network's state
    README.md             the model card, written from checkpoint.json
    task.safetensors      what the task has learned besides the network, such as the alignment target
    resume.pt             optimizer, schedule and step, for resuming; scoring does not read it
    crop/                 the checkpoint by which images are cropped or aligned, if there is one; in copies only

`resume.pt` is loaded with `weights_only=True`, so that no pickle is ever run.
"""

from __future__ import annotations

from typing import Any

from cxr import storage
from cxr.errors import UserError

ABOUT, WEIGHTS, TASK, RESUME = "checkpoint.json", "weights.safetensors", "task.safetensors", "resume.pt"
CARD = "README.md"
CROP = "crop"
CROPPED_BY = "cropped_by"  # in ABOUT: URI of the checkpoint by which images are cropped; empty if they are not
KIND, VERSION = "cxr-checkpoint", 2


def read_about(uri: str) -> dict[str, Any]:
    """The contents of checkpoint.json, checked to be of a kind and version that can be read here."""
    if not storage.exists(storage.join(uri, ABOUT)):
        raise UserError(
            f"{uri} contains no {ABOUT}: use the folder of a checkpoint, for example `checkpoint` in a result.json"
        )
    about = storage.read_json(storage.join(uri, ABOUT))
    if not isinstance(about, dict):
        raise UserError(f"{uri}/{ABOUT}: expected a JSON object, got a {type(about).__name__}: copy the file again")
    if (about.get("kind"), about.get("version")) != (KIND, VERSION):
        raise UserError(
            f"{uri}: expected {KIND!r} version {VERSION}, got {about.get('kind')!r} version {about.get('version')}: "
            f"use the version of cxr that wrote it, or train again"
        )
    return about


def copy_for_scoring(source: str, target: str) -> str:
    """Copy a checkpoint without the files that only resuming needs. Replaces `target`, which is never incomplete.

    The checkpoint by which its images are cropped is copied too, so that scoring needs nothing else.
    """
    if storage.exists(storage.join(target, ABOUT)):
        storage.delete(storage.join(target, ABOUT))
    if cropping := crop_checkpoint_of(source, read_about(source).get(CROPPED_BY, "")):
        copy_for_scoring(cropping, storage.join(target, CROP))
    card = [CARD] if storage.exists(storage.join(source, CARD)) else []  # earlier versions wrote none
    for name in (WEIGHTS, TASK, *card, ABOUT):
        storage.write_bytes(storage.join(target, name), storage.read_bytes(storage.join(source, name)))
    return target


def crop_checkpoint_of(uri: str, recorded: str) -> str:
    """Where the checkpoint lies by which images for the one at `uri` are cropped: in its folder, or where it was in
    training; empty if they are not cropped."""
    inside = storage.join(uri, CROP)
    return inside if recorded and storage.exists(storage.join(inside, ABOUT)) else recorded
