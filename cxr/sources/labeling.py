"""Labels, boxes and masks that the user gives beside an archive, joined to the images of its manifest.

Boxes and masks are joined to images by the `image_files.image_key` of the image id or the file name; `labels` joins
tables. Notes say what matched before anything is decoded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources import rater_agreement, rle
from cxr.sources.annotations import frames_of
from cxr.sources.box_files import read_boxes
from cxr.sources.image_files import image_key, image_keys
from cxr.sources.labels import mapped, with_label_table
from cxr.sources.manifest import Manifest, labels_column, replace_column
from cxr.sources.mask_files import read_masks
from cxr.sources.options import Labeling, ReaderBoxes
from cxr.wording import counted

_EXAMPLES = 3  # names of images that did not match, in a note


def labeled(manifest: Manifest, labeling: Labeling) -> Manifest:
    """Replace a manifest's labels and boxes as `labeling` says.

    With a table of labels or else a file of boxes, only the images that it lists remain; files are those of the
    source, as are patients and splits that the table does not give. The table's labels take precedence over those
    that follow from boxes.

    Raises:
        UserError: a file lists none of the images, or readers are to agree but the boxes name no readers.
    """
    if labeling.boxes:
        manifest = with_boxes(manifest, storage.normalize(labeling.boxes), listed_only=not labeling.labels)
    if labeling.labels:
        manifest = with_label_table(manifest, labeling)
    elif labeling.label_mapping or labeling.uncertain_as != "unknown":
        manifest = mapped(manifest, labeling)
    if labeling.masks:
        manifest = with_masks(manifest, labeling)
    return agreed(manifest, labeling.min_readers) if labeling.min_readers > 1 else manifest


def one_reader(manifest: Manifest, how: ReaderBoxes) -> Manifest:
    """Combine the boxes of several readers into one set per image. Each image is processed by itself, so that parts
    of a manifest can be processed by different workers."""
    table = manifest.table
    several = rater_agreement.reader_counts(table[schema.BOXES], table[schema.EXTRA]) > 1
    if not several.any():
        return manifest
    boxes, extras = (table[name].filter(pa.array(several)).to_pylist() for name in (schema.BOXES, schema.EXTRA))
    fused = pa.array(rater_agreement.one_set(boxes, extras, how), schema.MANIFEST.field(schema.BOXES).type)
    row = np.arange(table.num_rows)
    row[several] = table.num_rows + np.arange(len(fused))
    combined = pa.concat_arrays([table[schema.BOXES].combine_chunks(), fused]).take(pa.array(row))
    return Manifest(replace_column(table, schema.BOXES, combined), manifest.findings, manifest.notes)


def readers_note(manifest: Manifest, how: ReaderBoxes) -> list[str]:
    """A note that counts the images whose boxes `one_reader` combines."""
    table = manifest.table
    several = int((rater_agreement.reader_counts(table[schema.BOXES], table[schema.EXTRA]) > 1).sum())
    return [f"boxes of several readers combined by {how}: {counted(several, 'image')}"] if several else []


def with_boxes(manifest: Manifest, location: str, *, listed_only: bool = True) -> Manifest:
    """The images with the labels and boxes of a file.

    Args:
        listed_only: leave out images that the file does not list; otherwise their labels and boxes are unknown.

    Raises:
        UserError: as `read_boxes`, or the file lists none of the images.
    """
    read = read_boxes(location)
    file, table = storage.name(location), manifest.table
    ids, files = (image_keys(table[column]) for column in (schema.IMAGE_ID, schema.SOURCE_URI))
    by_file = pc.and_(read.rows_of(ids).is_null(), read.rows_of(files).is_valid())
    images = pc.if_else(by_file, files, ids)
    listed = read.rows_of(images).is_valid()
    here, entries = images.to_pylist(), dict.fromkeys(read.images.to_pylist())
    if not pc.any(listed).as_py():
        raise _no_match(location, here, entries)
    rows = images
    if listed_only:
        table, rows = table.filter(listed), images.filter(listed)
    row = read.rows_of(rows)
    boxes = read.boxes.take(row)
    frames = pc.coalesce(frames_of(read.sizes, rows), table[schema.BOXES_FRAME].combine_chunks())
    table = replace_column(table, schema.BOXES, boxes)
    table = replace_column(table, schema.BOXES_FRAME, frames)
    table = replace_column(table, schema.LABELS, labels_column(read.labels_of(rows)))
    notes = [
        *manifest.notes,
        *read.notes,
        f"labels and boxes of {pc.sum(listed).as_py():,} of {counted(len(images), 'image')}: {file}",
        *_count_notes(boxes.filter(row.is_valid()), read.findings),
        *_unmatched_notes(file, here, entries, "skipped" if listed_only else "so that their boxes are unknown"),
    ]
    return Manifest(table, read.findings, notes)


def with_masks(manifest: Manifest, labeling: Labeling) -> Manifest:
    """The same images with the masks of `labeling`, which replace the archive's own of the same labels.

    Raises:
        UserError: as `read_masks`, or there is a mask of none of the images.
    """
    location = storage.normalize(labeling.masks)
    ids, files = (_keys(manifest.table[column]) for column in (schema.IMAGE_ID, schema.SOURCE_URI))
    read = read_masks(
        location,
        {*ids, *files},
        label=labeling.mask_label,
        form=labeling.mask_code,
        quality=labeling.mask_quality,
    )
    images = _image_keys(manifest.table, read.masks)
    if read.masks.keys().isdisjoint(images):
        raise _no_match(location, images, read.masks)
    masks: list[list[dict[str, Any]] | None] = []
    for image, own in zip(images, manifest.table[schema.MASKS].to_pylist(), strict=True):
        of_image = read.masks.get(image, ())
        replaced = {mask[schema.LABEL] for mask in of_image}
        remaining = [mask for mask in own or () if mask[schema.LABEL] not in replaced]
        masks.append([*remaining, *of_image] if own is not None or of_image else None)
    file = storage.name(location)
    listed = [read.masks[image] for image in images if image in read.masks]
    notes = [
        *manifest.notes,
        *read.notes,
        *_mask_notes(file, listed, read.labels),
        *_unmatched_notes(file, images, read.masks, "so that their masks are unknown"),
    ]
    column = pa.array(masks, schema.MANIFEST.field(schema.MASKS).type)
    return Manifest(replace_column(manifest.table, schema.MASKS, column), manifest.findings, notes)


def _mask_notes(file: str, of_images: Sequence[Sequence[Mapping[str, Any]]], labels: Sequence[str]) -> list[str]:
    """How many images have a mask of each label, and in how many of them it is empty."""
    notes = []
    for label in labels:
        codes = [{mask.get(schema.MASK_RLE) for mask in masks if mask[schema.LABEL] == label} for masks in of_images]
        known, empty = sum(map(bool, codes)), sum(of_image == {rle.EMPTY} for of_image in codes)
        notes.append(f"masks of {label} in {file}: {counted(known, 'image')}, of which {empty:,} empty")
    return notes


def _image_keys(images: pa.Table, entries: Collection[str]) -> list[str]:
    """The key by which a file may list each image: of its id or, if there is no such entry, of its file's name."""
    ids, files = (_keys(images[column]) for column in (schema.IMAGE_ID, schema.SOURCE_URI))
    return [file if key not in entries and file in entries else key for key, file in zip(ids, files, strict=True)]


def _keys(names: pa.ChunkedArray) -> list[str]:
    return [image_key(name) for name in names.to_pylist()]


def _no_match(location: str, images: Sequence[str], entries: Collection[str]) -> UserError:
    return UserError(
        f"expected images of this archive in {location}, got a list with none of its "
        f"{counted(len(images), 'image')}; the archive has {_examples(images)}, the list {_examples(entries)}: use "
        f"the list of these images"
    )


def _count_notes(boxes: pa.Array, labels: Sequence[str]) -> list[str]:
    """How many boxes the images have, in total and of each label, and how many images have none."""
    each = pc.struct_field(boxes.flatten(), schema.LABEL)
    counts = {entry["values"]: entry["counts"] for entry in each.value_counts().to_pylist()}
    by_label = ", ".join(f"{label} {counts[label]:,}" for label in labels if label in counts)
    filled = pc.sum(pc.greater(pc.list_value_length(boxes), 0)).as_py() or 0
    return [
        f"boxes listed for these images: {len(each):,}{f' ({by_label})' if by_label else ''}; "
        f"images without any: {len(boxes) - filled:,}"
    ]


def _unmatched_notes(file: str, images: Sequence[str], entries: Collection[str], consequence: str) -> list[str]:
    """Which images of the archive have no entry in a file, which entries have no image, and examples of both."""
    notes, here = [], set(images)
    unlisted = [image for image in dict.fromkeys(images) if image not in entries]
    missing = [entry for entry in entries if entry not in here]
    if unlisted:
        notes.append(
            f"not listed in {file}, {consequence}: {len(unlisted):,} of {counted(len(here), 'image')}, "
            f"such as {_examples(unlisted)}"
        )
    if missing:
        notes.append(
            f"missing from the archive: {len(missing):,} of {counted(len(entries), 'image')} listed in {file}, such "
            f"as {_examples(missing)}"
        )
    return notes


def _examples(names: Iterable[str]) -> str:
    return ", ".join(map(repr, islice(names, _EXAMPLES)))


def agreed(manifest: Manifest, min_readers: int) -> Manifest:
    """Labels by the number of readers who marked a finding; labels not given by named readers are unchanged."""
    boxes, extras = (manifest.table[name].to_pylist() for name in (schema.BOXES, schema.EXTRA))
    if not any(box[schema.READER] for of_image in boxes for box in of_image or ()):
        raise UserError("expected boxes with named readers for --min-readers, got none: omit --min-readers")
    labels = np.array(manifest.table[schema.LABELS].to_pylist(), np.int8)
    labels = labels_column(rater_agreement.agreed(labels, boxes, extras, manifest.findings, min_readers))
    note = f"a finding is positive if at least {counted(min_readers, 'reader')} marked it"
    return Manifest(replace_column(manifest.table, schema.LABELS, labels), manifest.findings, [*manifest.notes, note])
