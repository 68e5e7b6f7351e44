"""Labels, boxes and masks that the user gives beside an archive, joined to the images of its manifest.

All of them name images in the ways that `image_match` recognizes. Notes say what matched before anything is decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.errors import UserError
from cxr.sources import rater_agreement, rle
from cxr.sources.annotations import frames_of
from cxr.sources.box_files import read_boxes
from cxr.sources.image_files import image_keys
from cxr.sources.image_match import Match, image_paths, match_images
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
    match = _matched(table, read.images, location)
    row = pa.array(match.rows, mask=match.rows < 0)
    unmatched = _unmatched_notes(
        table, read.images, match, file, "skipped" if listed_only else "so that their boxes are unknown"
    )
    if listed_only:
        table, row = table.filter(row.is_valid()), row.drop_null()
    images, boxes = read.images.take(row), read.boxes.take(row)
    frames = pc.coalesce(frames_of(read.sizes, images), table[schema.BOXES_FRAME].combine_chunks())
    table = replace_column(table, schema.BOXES, boxes)
    table = replace_column(table, schema.BOXES_FRAME, frames)
    table = replace_column(table, schema.LABELS, labels_column(read.labels_of(images)))
    notes = [
        *manifest.notes,
        *read.notes,
        f"labels and boxes of {np.sum(match.rows >= 0):,} of {counted(len(match.rows), 'image')}: {file}",
        *_count_notes(boxes.filter(row.is_valid()), read.findings),
        *unmatched,
    ]
    return Manifest(table, read.findings, notes)


def with_masks(manifest: Manifest, labeling: Labeling) -> Manifest:
    """The same images with the masks of `labeling`, which replace the archive's own of the same labels.

    Raises:
        UserError: as `read_masks`, or there is a mask of none of the images.
    """
    location = storage.normalize(labeling.masks)
    table = manifest.table
    ids, files = (image_keys(table[column]).to_pylist() for column in (schema.IMAGE_ID, schema.SOURCE_URI))
    read = read_masks(
        location,
        {*ids, *files},
        label=labeling.mask_label,
        form=labeling.mask_code,
        quality=labeling.mask_quality,
    )
    entries = pa.array(list(read.masks), pa.string())
    match = _matched(table, entries, location)
    listed = list(read.masks.values())
    masks: list[list[dict[str, Any]] | None] = []
    for row, own in zip(match.rows.tolist(), table[schema.MASKS].to_pylist(), strict=True):
        of_image = listed[row] if row >= 0 else ()
        replaced = {mask[schema.LABEL] for mask in of_image}
        remaining = [mask for mask in own or () if mask[schema.LABEL] not in replaced]
        masks.append([*remaining, *of_image] if own is not None or of_image else None)
    file = storage.name(location)
    of_images = [listed[row] for row in match.rows[match.rows >= 0]]
    notes = [
        *manifest.notes,
        *read.notes,
        *_mask_notes(file, of_images, read.labels),
        *_unmatched_notes(table, entries, match, file, "so that their masks are unknown"),
    ]
    column = pa.array(masks, schema.MANIFEST.field(schema.MASKS).type)
    return Manifest(replace_column(table, schema.MASKS, column), manifest.findings, notes)


def _mask_notes(file: str, of_images: Sequence[Sequence[Mapping[str, Any]]], labels: Sequence[str]) -> list[str]:
    """How many images have a mask of each label, and in how many of them it is empty."""
    notes = []
    for label in labels:
        codes = [{mask.get(schema.MASK_RLE) for mask in masks if mask[schema.LABEL] == label} for masks in of_images]
        known, empty = sum(map(bool, codes)), sum(of_image == {rle.EMPTY} for of_image in codes)
        notes.append(f"masks of {label} in {file}: {counted(known, 'image')}, of which {empty:,} empty")
    return notes


def _matched(images: pa.Table, entries: pa.Array, location: str) -> Match:
    """The entry of a list, by its `image_paths`, for each image.

    Raises:
        UserError: there is none for any image.
    """
    if not len(entries):
        raise UserError(f"expected images of this archive in {location}, got an empty list: add entries, or omit it")
    match = match_images(images, pa.chunked_array([entries.cast(pa.large_string())]))
    if (match.rows < 0).all():
        ids = image_paths(images[schema.IMAGE_ID])
        paths = "use the images' paths in it, because file names are not unique"
        remedy = paths if match.ambiguous else "use the list of these images"
        raise UserError(
            f"expected images of this archive in {location}, got a list with none of its "
            f"{counted(len(ids), 'image')}; the archive has {_examples(ids)}, the list {_examples(entries)}: {remedy}"
        )
    return match


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


def _unmatched_notes(images: pa.Table, entries: pa.Array, match: Match, file: str, consequence: str) -> list[str]:
    """Which images of the archive have no entry in a file, which entries have no image, and examples of both."""
    notes = []
    unlisted = np.flatnonzero(match.rows < 0)
    missing = np.setdiff1d(np.arange(len(entries)), match.rows)
    if len(unlisted):
        examples = _examples(image_paths(images[schema.IMAGE_ID].take(pa.array(unlisted[:_EXAMPLES]))))
        notes.append(
            f"not listed in {file}, {consequence}: {len(unlisted):,} of {counted(len(match.rows), 'image')}, "
            f"such as {examples}{match.ambiguity(file)}"
        )
    if len(missing):
        notes.append(
            f"missing from the archive: {len(missing):,} of {counted(len(entries), 'image')} listed in {file}, such "
            f"as {_examples(entries.take(pa.array(missing[:_EXAMPLES])))}"
        )
    return notes


def _examples(names: pa.Array) -> str:
    return ", ".join(map(repr, names[:_EXAMPLES].to_pylist()))


def agreed(manifest: Manifest, min_readers: int) -> Manifest:
    """Labels by the number of readers who marked a finding; labels not given by named readers are unchanged."""
    boxes, extras = (manifest.table[name].to_pylist() for name in (schema.BOXES, schema.EXTRA))
    if not any(box[schema.READER] for of_image in boxes for box in of_image or ()):
        raise UserError("expected boxes with named readers for --min-readers, got none: omit --min-readers")
    labels = np.array(manifest.table[schema.LABELS].to_pylist(), np.int8)
    labels = labels_column(rater_agreement.agreed(labels, boxes, extras, manifest.findings, min_readers))
    note = f"a finding is positive if at least {counted(min_readers, 'reader')} marked it"
    return Manifest(replace_column(manifest.table, schema.LABELS, labels), manifest.findings, [*manifest.notes, note])
