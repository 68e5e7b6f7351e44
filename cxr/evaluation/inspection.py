"""What an archive or shards contain, before anything is trained: counts, a sample of decoded images, and a page."""

from __future__ import annotations

import posixpath
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cxr import schema, storage
from cxr.data import shards
from cxr.data.decode import make_rows
from cxr.evaluation.ground_truth import PLACES, read_all_truth
from cxr.evaluation.images import read_stored_row
from cxr.imaging.geometry import ResizeTransform
from cxr.imaging.image import to_bits
from cxr.reporting import archive as pictures
from cxr.reporting.archive import Tile
from cxr.reporting.page import Block, Report, Section, save_picture, write_report
from cxr.reporting.tables import Table
from cxr.schema import PixelFormat
from cxr.sources import find_source, open_manifest
from cxr.sources.manifest import Manifest
from cxr.sources.options import Labeling, ReadOptions
from cxr.sources.true_boxes import frames_px
from cxr.wording import counted

SHEET, LABELS, BOXES, PEOPLE = "contact_sheet.png", "labels.png", "boxes.png", "views_and_ages.png"
_SIZES_SHOWN = 8
_SHARD_COLUMNS = (
    schema.PATIENT_ID,
    schema.SOURCE_URI,
    schema.SEX,
    schema.AGE_YEARS,
    schema.VIEW,
    schema.MODALITY,
    schema.LABELS,
    schema.BOXES,
    schema.HEIGHT_PX,
    schema.WIDTH_PX,
)


def inspect(
    archive: str, reading: ReadOptions, labeling: Labeling, out: str, *, images: int = 24, seed: int = 0
) -> dict[str, Any]:
    """Describe an archive or shards; writes a page and pictures into the URI `out` and returns what they show.

    Args:
        images: number of images to decode for the contact sheet; facts that only files tell come from these.
        seed: of the choice of these images, of which half have boxes, masks or positive labels, if any do.

    Raises:
        UserError: no such archive, or its lists or those of `labeling` cannot be read.
    """
    archive, out = storage.normalize(archive), storage.normalize(out)
    if shards.is_shards(archive):
        manifest = read_all_truth(archive, reading, _SHARD_COLUMNS, labeling)
        kind, info = "shards", shards.read_info(archive)
        masks = _stored_mask_counts(info)
    else:
        manifest = open_manifest(archive, reading, labeling)
        kind, info = f"an archive of source {find_source(archive, reading.source).name}", None
        masks = _mask_counts(manifest.table[schema.MASKS])
    manifest.print_notes()
    facts = _facts(manifest) | {"kind": kind, "masks": masks}
    rows = _sample(manifest, images, seed)
    sampled = manifest.table.take(pa.array(rows))
    decoded = _stored_rows(info, sampled) if info else make_rows(sampled, PixelFormat(pictures.TILE_PX), threads=2)
    facts["sample"] = _sample_facts(decoded)
    good = decoded.filter(pc.is_null(decoded[schema.ERROR]))
    sections = [
        _overview(facts),
        _labels_section(facts, out),
        _boxes_section(facts, _unit_boxes(manifest, good), out),
        _people_section(facts, manifest, out),
        _sample_section(facts["sample"], list(_tiles(good, manifest.findings)), out),
        Section("Notes", facts["notes"] or ["None."]),
    ]
    lead = f"{counted(facts['images'], 'image')} of {counted(facts['patients'], 'patient')} in {kind}."
    pages = write_report(out, Report(storage.name(archive), lead, [each for each in sections if each.blocks]))
    return {"archive": archive, **facts, **pages}


# ---- Counts


def _facts(manifest: Manifest) -> dict[str, Any]:
    table, findings = manifest.table, manifest.findings
    splits = [split or "unknown" for split in table[schema.SPLIT].to_pylist()]
    labels = np.array(
        [row if row is not None else [schema.UNKNOWN] * len(findings) for row in table[schema.LABELS].to_pylist()],
        np.int8,
    ).reshape(table.num_rows, len(findings))
    split_names = [name for name in (*schema.SPLITS, "unknown") if name in splits]
    of_split = {name: np.array([split == name for split in splits]) for name in split_names}
    by_finding = {
        finding: {
            "positive": int((column == schema.POSITIVE).sum()),
            "negative": int((column == schema.NEGATIVE).sum()),
            "unknown": int((column == schema.UNKNOWN).sum()),
            "positive_by_split": {
                name: int((column[own] == schema.POSITIVE).sum()) for name, own in of_split.items()
            },
        }
        for finding, column in zip(findings, labels.T, strict=True)
    }
    per_image = pc.list_value_length(table[schema.BOXES]).to_numpy(zero_copy_only=False)
    boxes = _struct_values(table[schema.BOXES], schema.LABEL)
    years = table[schema.AGE_YEARS].drop_null().to_numpy()
    return {
        "images": table.num_rows,
        "patients": int(pc.count_distinct(schema.patients_of(table)).as_py()),
        "splits": {name: int(own.sum()) for name, own in of_split.items()},
        "findings": by_finding,
        "boxes": {
            "images_known": int(np.isfinite(per_image).sum()),
            "images_with": int((per_image > 0).sum()),
            "total": len(boxes),
            "most_per_image": int(np.nanmax(per_image, initial=0)),
            "by_finding": dict(Counter(boxes).most_common()),
        },
        "views": _counts(table, schema.VIEW),
        "sex": _counts(table, schema.SEX),
        "modalities": _counts(table, schema.MODALITY),
        "age_years": {
            "known": len(years),
            **(
                {"min": float(years.min()), "median": float(np.median(years)), "max": float(years.max())}
                if len(years)
                else {}
            ),
        },
        "file_kinds": dict(Counter(map(_suffix, table[schema.SOURCE_URI].to_pylist())).most_common()),
        "notes": list(manifest.notes),
    }


def _suffix(uri: str | None) -> str:
    return posixpath.splitext(uri or "")[1].lower() or "no suffix"


def _counts(table: pa.Table, column: str) -> dict[str, int]:
    """Rows by value; without nulls, and empty if the table lacks the column."""
    if column not in table.column_names:
        return {}
    return dict(Counter(table[column].drop_null().to_pylist()).most_common())


def _struct_values(lists: pa.ChunkedArray, name: str) -> list[Any]:
    return [value for chunk in lists.chunks for value in pc.struct_field(pc.list_flatten(chunk), name).to_pylist()]


def _mask_counts(column: pa.ChunkedArray) -> dict[str, int]:
    """Images with a mask, which may be empty, by label."""
    labels: Counter[str] = Counter()
    for chunk in column.chunks:
        images = pc.list_parent_indices(chunk).to_pylist()
        labels.update(
            name for _, name in {*zip(images, _struct_values(pa.chunked_array([chunk]), schema.LABEL), strict=True)}
        )
    return dict(labels)


def _stored_mask_counts(info: shards.ShardInfo) -> dict[str, int]:
    """The same for shards, without reading the masks themselves."""
    labels: Counter[str] = Counter()
    for file in info.files:
        column = storage.read_parquet(file.uri, columns=[f"{schema.MASKS}.list.element.{schema.LABEL}"])[schema.MASKS]
        labels.update(_mask_counts(column))
    return dict(labels)


# ---- Sample


def _sample(manifest: Manifest, images: int, seed: int) -> list[int]:
    """Rows to show: up to half of them with boxes, masks or a positive label, the others at random; in order."""
    table, rng = manifest.table, np.random.default_rng(seed)
    shown = np.zeros(table.num_rows, bool)
    for column in {schema.BOXES, schema.MASKS} & {*table.column_names}:
        shown |= pc.fill_null(pc.greater(pc.list_value_length(table[column]), 0), False).to_numpy()
    if not shown.any():
        shown = np.array([schema.POSITIVE in (row or ()) for row in table[schema.LABELS].to_pylist()], bool)
    if schema.HEIGHT_PX in table.column_names:  # rejected images of shards have no pixels
        shown &= table[schema.HEIGHT_PX].is_valid().to_numpy()
    order = rng.permutation(table.num_rows)
    first = order[shown[order]][: -(-images // 2)]
    others = order[~np.isin(order, first)][: images - len(first)]
    return sorted(np.concatenate([first, others]).tolist())


def _stored_rows(info: shards.ShardInfo, sampled: pa.Table) -> pa.Table:
    """The rows of shards with these ids; images that ingest rejected have only their reasons."""
    places = [tuple(place.values()) for place in sampled.select(PLACES.names).to_pylist()]
    found = [read_stored_row(info, info.files[file], row) for file, row in places if file is not None]
    row_schema = schema.row_schema(info.pixels)
    if info.rejects:
        rejects = storage.read_parquet(storage.join(info.uri, shards.REJECTS_FILE))
        ids = sampled[schema.IMAGE_ID].combine_chunks()
        found.append(rejects.filter(pc.is_in(rejects[schema.IMAGE_ID], value_set=ids)))
    return pa.concat_tables([schema.conform_to_schema(rows, row_schema) for rows in found]).sort_by(schema.IMAGE_ID)


def _sample_facts(decoded: pa.Table) -> dict[str, Any]:
    good = decoded.filter(pc.is_null(decoded[schema.ERROR]))
    sizes = Counter(
        f"{width} x {height}"
        for width, height in zip(good[schema.WIDTH_PX].to_pylist(), good[schema.HEIGHT_PX].to_pylist(), strict=True)
    )
    return {
        "images": decoded.num_rows,
        "readable": good.num_rows,
        "reasons": dict(Counter(decoded[schema.ERROR].drop_null().to_pylist()).most_common()),
        "sizes_px": dict(sizes.most_common()),
        "views": _counts(good, schema.VIEW),
        "body_parts": _counts(good, schema.BODY_PART),
        "modalities": _counts(good, schema.MODALITY),
    }


def _tiles(good: pa.Table, findings: Sequence[str]) -> Iterator[Tile]:
    """Decoded rows as tiles."""
    pixels = schema.pixel_format(good.schema)
    for row, picture in zip(good.to_pylist(), schema.pixels_array(good[schema.PIXELS], pixels), strict=True):
        transform = ResizeTransform.from_dict(row[schema.RESIZE_TRANSFORM])
        boxes = row[schema.BOXES] or []
        corners = np.array([[box[name] for name in _CORNERS] for box in boxes], float).reshape(-1, 4)
        age = None if row[schema.AGE_YEARS] is None else f"{row[schema.AGE_YEARS]:.0f} y"
        size = f"{row[schema.WIDTH_PX]} x {row[schema.HEIGHT_PX]} px"
        known = [row[schema.SPLIT], row[schema.MODALITY], row[schema.VIEW], row[schema.SEX], age, size]
        positive = [name for name, label in zip(findings, row[schema.LABELS] or (), strict=False) if label == 1]
        unknown = row[schema.LABELS] is None or all(label == schema.UNKNOWN for label in row[schema.LABELS])
        labels = ", ".join(positive) or ("" if not findings else "labels unknown" if unknown else "no positive label")
        yield Tile(
            row[schema.IMAGE_ID],
            to_bits(picture, 8) / np.float32(255),
            [" · ".join(filter(None, known)), labels],
            transform.boxes_from_original(corners),
            [box[schema.LABEL] for box in boxes],
            {mask[schema.LABEL]: _mask(mask[schema.MASK_BITS], pixels.size) for mask in row[schema.MASKS] or ()},
        )


_CORNERS = (schema.X_MIN, schema.Y_MIN, schema.X_MAX, schema.Y_MAX)


def _mask(bits: bytes, size: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(bits, np.uint8), count=size * size).astype(bool).reshape(size, size)


def _unit_boxes(manifest: Manifest, good: pa.Table) -> dict[str, np.ndarray]:
    """Boxes in shares of the image by finding, of all images whose size is known, else of the sample."""
    table = manifest.table
    if schema.BOXES_FRAME in table.column_names:
        frames = frames_px(table[schema.BOXES_FRAME], manifest.boxes_frame_px)
    else:
        frames = _sizes(table)
    if not np.isfinite(frames).any():
        table, frames = good, _sizes(good)
    boxes: dict[str, list[np.ndarray]] = {}
    for of_image, frame in zip(table[schema.BOXES].to_pylist(), frames, strict=True):
        for box in of_image or () if np.isfinite(frame).all() else ():
            corners = np.array([box[name] for name in _CORNERS]) / np.tile(frame, 2)
            boxes.setdefault(box[schema.LABEL], []).append(corners)
    return {finding: np.stack(each) for finding, each in boxes.items()}


def _sizes(table: pa.Table) -> np.ndarray:
    """(N, 2) width and height; NaN if unknown."""
    sides = (table[name].to_numpy().astype(float) for name in (schema.WIDTH_PX, schema.HEIGHT_PX))
    return np.stack([*sides], 1)


# ---- Page


def _overview(facts: Mapping[str, Any]) -> Section:
    boxes, ages = facts["boxes"], facts["age_years"]
    years = f"{ages['min']:.0f} to {ages['max']:.0f}, median {ages['median']:.0f}" if ages["known"] else ""
    rows = [
        ["images", f"{facts['images']:,}"],
        ["patients", f"{facts['patients']:,}"],
        ["splits", _listed(facts["splits"])],
        ["images with known boxes", f"{boxes['images_known']:,}, of which {boxes['images_with']:,} have any"],
        ["boxes", f"{boxes['total']:,}; at most {boxes['most_per_image']:,} in an image"],
        ["images with masks", _listed(facts["masks"])],
        ["views", _listed(facts["views"])],
        ["modalities", _listed(facts["modalities"])],
        ["sex", _listed(facts["sex"])],
        ["age", years],
        ["files", _listed(facts["file_kinds"])],
        [f"width x height of {facts['sample']['readable']:,} opened images", _sizes_text(facts["sample"])],
    ]
    return Section("Overview", [Table(["", ""], [[name, value or "unknown"] for name, value in rows])])


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.items())


def _sizes_text(sample: Mapping[str, Any]) -> str:
    sizes = list(sample["sizes_px"].items())
    more = f" and {len(sizes) - _SIZES_SHOWN:,} other sizes" if len(sizes) > _SIZES_SHOWN else ""
    return ", ".join(f"{size} px ({count:,})" for size, count in sizes[:_SIZES_SHOWN]) + more


def _labels_section(facts: Mapping[str, Any], out: str) -> Section:
    findings = facts["findings"]
    if not findings:
        return Section("Labels", ["This archive has no labels. Add some with `--labels` or `--boxes`."])
    by_finding = facts["boxes"]["by_finding"]
    head = ["finding", "positive", "negative", "unknown", *facts["splits"], "boxes"]
    rows = [
        [
            name,
            *(f"{each[kind]:,}" for kind in ("positive", "negative", "unknown")),
            *(f"{count:,}" for count in each["positive_by_split"].values()),
            f"{by_finding.get(name, 0):,}",
        ]
        for name, each in findings.items()
    ]
    positives = {name: each["positive_by_split"] for name, each in findings.items()}
    known = {name: each["positive"] + each["negative"] for name, each in findings.items()}
    caption = "Images with each finding by split, and their share of the images in which the finding is known."
    blocks: list[Block] = [Table(head, rows), "The columns of the splits have the numbers of positive images."]
    if any(each["positive"] for each in findings.values()):
        blocks.append(save_picture(pictures.labels_by_split(positives, known), out, LABELS, caption))
    return Section("Labels", blocks)


def _boxes_section(facts: Mapping[str, Any], boxes: Mapping[str, np.ndarray], out: str) -> Section:
    if not boxes:
        return Section("Boxes", [])
    shown = sum(map(len, boxes.values()))
    total = counted(facts["boxes"]["total"], "box", "boxes")
    which = (
        f"all {total}" if shown == facts["boxes"]["total"] else f"{shown:,} of {total}, those in images of known size"
    )
    caption = f"Areas and centers of {which}. The left side of the image is usually the patient's right."
    return Section("Boxes", [save_picture(pictures.box_places(boxes), out, BOXES, caption)])


def _people_section(facts: Mapping[str, Any], manifest: Manifest, out: str) -> Section:
    sample = facts["sample"]
    of_sample = f"in {counted(sample['readable'], 'decoded image')}"
    counts = {}
    for name, column in {"views": "views", "modalities": "modalities"}.items():
        counts[name if facts[column] else f"{name} {of_sample}"] = facts[column] or sample[column]
    counts["sex"] = facts["sex"]
    table = manifest.table.filter(pc.is_valid(manifest.table[schema.AGE_YEARS]))
    sexes = pc.fill_null(table[schema.SEX], "unknown")
    ages = {
        sex: table.filter(pc.equal(sexes, sex))[schema.AGE_YEARS].to_numpy() for sex in sorted(set(sexes.to_pylist()))
    }
    if not any(counts.values()) and not ages:
        return Section("Views, sex and age", ["No view, modality, sex or age is known."])
    caption = "Views, modalities and sex, where known, and ages."
    return Section("Views, sex and age", [save_picture(pictures.counts_and_ages(counts, ages), out, PEOPLE, caption)])


def _sample_section(sample: Mapping[str, Any], tiles: Sequence[Tile], out: str) -> Section:
    blocks: list[Block] = [
        f"{counted(sample['images'], 'image')} chosen and opened, of which {sample['readable']:,} could be read."
    ]
    if sample["reasons"]:
        rows = [[reason, f"{count:,}"] for reason, count in sample["reasons"].items()]
        blocks.append(Table(["reason why images cannot be used", "images"], rows))
    if tiles:
        caption = "A sample of the images with their ids, labels, boxes and outlines of masks."
        blocks.append(save_picture(pictures.contact_sheet(tiles), out, SHEET, caption))
    return Section("Sample", blocks)
