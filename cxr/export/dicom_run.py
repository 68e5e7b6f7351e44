"""Write the DICOM objects of all images of a scoring run, in several processes, so that a second run continues.

    OUT/export.csv               every image of the run: what was written for it, or why not
    OUT/STUDY/KIND-INSTANCE.dcm  the objects, named by UIDs alone
    OUT/parts/part-NNNNNN.json   what is written for some images, from which an interrupted export continues
    OUT/export.json              the run and the model that OUT belongs to

An object is written again only if the scores, the settings or the version of this package have changed. Objects that
are no longer part of the export are deleted.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from cxr import schema, storage
from cxr.data import shards
from cxr.data.identity import read_crosswalk
from cxr.errors import UserError
from cxr.evaluation.run import Run, read_scores
from cxr.export.dicom_objects import KINDS, Kind
from cxr.export.dicom_processes import Work, map_works
from cxr.export.dicom_results import Algorithm, ImageResult, as_uid, image_results, score_columns
from cxr.export.dicom_write import BELOW, COLUMNS, FAILED, NO_MASK, NOT_SCORED, WRITTEN, Export, Row
from cxr.families import recipe_type
from cxr.families.checkpoint_files import read_about
from cxr.reporting.tables import csv_lines
from cxr.runtime.progress import Progress
from cxr.storage.files import atomic_writer
from cxr.wording import counted

CSV_FILE, PARTS, ABOUT_FILE = "export.csv", "parts", "export.json"
_PART_IMAGES = 64

# ---- The model and the images


def find_checkpoint(run: Run, parts: Sequence[pa.Table], checkpoint: str = "") -> tuple[str, dict[str, Any]] | None:
    """URI and checkpoint.json of a run's checkpoint; None if it is not where it was when the run was made.

    Args:
        parts: the run's scores, with their metadata.
        checkpoint: where it is now; "" if it has not moved.

    Raises:
        UserError: there is another checkpoint at `checkpoint`, or none.
    """
    named = json.loads(_metadata(parts).get(schema.MEMBERS_KEY, b"[]"))
    uri = storage.normalize(checkpoint) if checkpoint else named[0]["checkpoint"] if named else ""
    try:
        about = read_about(uri) if uri else {}
    except UserError:
        if checkpoint:
            raise
        return None
    if about.get("sha256") == run.checkpoint_sha256:
        return uri, about
    if checkpoint:
        raise UserError(
            f"{checkpoint} has other weights than the checkpoint that made {run.uri}: give that one, or omit "
            f"--checkpoint"
        )
    return None


def read_algorithm(run: Run, parts: Sequence[pa.Table], kinds: Sequence[Kind], about: Mapping[str, Any]) -> Algorithm:
    """The model of a run.

    Args:
        parts: the run's scores, with their metadata.
        about: checkpoint.json; empty if it is not available. Then only thresholds that replaced its own are known.

    Raises:
        UserError: the family has nothing to export as `kinds`.
    """
    recipe = recipe_type(run.family)
    columns = score_columns(recipe.score_columns.names)
    if not {*columns} - {*score_columns(())}:
        raise UserError(
            f"{run.uri} is a run of family {run.family}, which predicts neither findings nor boxes nor masks: give a "
            f"run of another family"
        )
    has_masks = schema.PRED_MASK_RLE in columns
    if not has_masks and [*kinds] == ["seg"]:
        raise UserError(
            f"{run.uri} is a run of family {run.family}, which predicts no masks: give --kinds sr or sc, or a run of "
            f"family lungs or pneumothorax"
        )
    findings = tuple(json.loads(_metadata(parts).get(schema.FINDINGS_KEY, b"[]")))
    chosen = about.get("learned", {}).get("thresholds", {})
    thresholds = dict(zip(chosen.get("findings", ()), chosen.get("values", ()), strict=True)) | {**run.thresholds}
    mask_label = recipe.mask_label if has_masks else ""
    return Algorithm(run.family, run.checkpoint_sha256, run.member, findings, thresholds, mask_label)


def _metadata(parts: Sequence[pa.Table]) -> Mapping[bytes, bytes]:
    return (parts[0].schema.metadata or {}) if parts else {}


def read_parts(run: Run) -> list[pa.Table]:
    """The scores from which objects are made."""
    return read_scores(run, score_columns(recipe_type(run.family).score_columns.names))


@dataclass(frozen=True)
class Originals:
    """Where the files of scored images are.

    Args:
        moved: (URI of the archive that was scored, URI where it is now), or None if it is there still.
        crosswalk: ids and URIs of the archive's images by the run's pseudonymous ids; None if the run has the
            archive's own ids.
    """

    moved: tuple[str, str] | None = None
    crosswalk: Mapping[str, tuple[str, str]] | None = None

    def find(self, result: ImageResult) -> ImageResult:
        """The result with the URI of its file, and the UIDs that the file must have."""
        if self.crosswalk is not None:
            image_id, uri = self.crosswalk.get(result.image_id, ("", ""))
            result = replace(result, source_uri=uri, study_uid=None, sop_uid=as_uid(image_id))
        if self.moved and storage.is_inside(result.source_uri, self.moved[0]):
            rest = result.source_uri.removeprefix(self.moved[0])
            return replace(result, source_uri=storage.join(self.moved[1], rest))
        return result


def originals(run: Run, archive: str = "", crosswalk: str = "") -> Originals:
    """Where the files of a run's images are.

    Args:
        archive: where the scored archive is now; "" if it has not moved.
        crosswalk: URI of the folder that leads from pseudonyms back to images; required for a run with pseudonyms.

    Raises:
        UserError: the run has pseudonyms, and there is no crosswalk.
    """
    if not crosswalk:
        if run.pseudonymized:
            raise UserError(
                f"{run.uri} contains pseudonyms, by which its images cannot be found: give the folder with which "
                f"cxr score --pseudonymize links them to images with --crosswalk"
            )
        return Originals(_moved(run, archive))
    names = (f"pseudonym_{schema.IMAGE_ID}", schema.IMAGE_ID, schema.SOURCE_URI)
    pseudonyms, ids, uris = (read_crosswalk(crosswalk).table[name].to_pylist() for name in names)
    return Originals(_moved(run, archive), dict(zip(pseudonyms, zip(ids, uris, strict=True), strict=True)))


def _moved(run: Run, archive: str) -> tuple[str, str] | None:
    """Where the URIs of a run's images begin, and with what they begin now.

    Args:
        archive: where the images are now; "" if they have not moved.

    Raises:
        UserError: several archives were scored.
    """
    if not archive:
        return None
    scored = [raw for one in run.archives for raw in shards.made_of(one)]
    if len(scored) != 1:
        raise UserError(
            f"{run.uri} contains scores of {' and '.join(scored)}, so --archive cannot say where all of them are "
            f"now: omit it, or score each archive separately"
        )
    return storage.normalize(scored[0]), storage.normalize(archive)


# ---- All images


def export_run(parts: Sequence[pa.Table], export: Export, originals: Originals, workers: int = 0) -> None:
    """Write the objects of all images of `read_parts`, and OUT/parts.

    Args:
        workers: number of processes; 0: one per CPU.

    Raises:
        UserError: OUT has the objects of another model.
        StorageError: storage failed in a way that concerns more than one file.
    """
    _check_out(export)
    files = {entry.path for entry in storage.list_files(export.out) if entry.path.endswith(".dcm")}
    before = {key: row for key, row in _read_before(export.out).items() if row["file"] in files}
    total = sum(part.num_rows for part in parts)
    progress, unused = Progress("exported", total), set(files)
    owners: dict[str, str] = {}
    shared: set[str] = set()  # files of several images
    for number, rows in enumerate(map_works(_works(parts, export, originals, before), workers, total)):
        storage.write_json(storage.join(export.out, PARTS, f"part-{number:06d}.json"), rows)
        for row in (row for row in rows if row["status"] == WRITTEN):
            if owners.setdefault(row["file"], row["image_id"]) != row["image_id"]:
                shared.add(row["file"])
        unused -= {row["file"] for row in rows}
        progress.add(len({row["image_id"] for row in rows}), sum(row["status"] == FAILED for row in rows))
    progress.show()
    _reject_shared(export.out, shared)
    for file in unused:
        if file.rpartition("/")[2].startswith(tuple(f"{kind}-2.25." for kind in KINDS)):
            storage.delete(storage.join(export.out, file))
    for uri in part_uris(export.out)[-(-total // _PART_IMAGES) :]:  # of an earlier, longer export
        storage.delete(uri)


def _reject_shared(out: str, files: set[str]) -> None:
    """Delete objects that several images would have in common, and record that none of these images has them.

    Such images have the same SOPInstanceUID but different contents, so nothing can refer to one of them.
    """
    if not files:
        return
    reason = "another image of the archive has the same SOPInstanceUID, so objects cannot refer to this one"
    for uri in part_uris(out):
        rows = storage.read_json(uri)
        if any(row["file"] in files for row in rows):
            for row in (row for row in rows if row["file"] in files):
                row.update(status=FAILED, reason=reason, file=None, sop_uid=None)
            storage.write_json(uri, rows)
    for file in files:
        storage.delete(storage.join(out, file))


def _works(
    parts: Sequence[pa.Table], export: Export, originals: Originals, before: Mapping[tuple[str, str], Row]
) -> Iterator[Work]:
    results = itertools.chain.from_iterable(image_results(p, export.algorithm, export.box_score) for p in parts)
    while some := [originals.find(result) for result in itertools.islice(results, _PART_IMAGES)]:
        keys = [(result.image_id, kind) for result in some for kind in export.kinds]
        yield some, export, {key: before[key] for key in keys if key in before}


# ---- OUT


def _check_out(export: Export) -> None:
    about = {"model": export.algorithm.name, "weights_sha256": export.algorithm.sha256}
    uri = storage.join(export.out, ABOUT_FILE)
    if storage.exists(uri) and (earlier := storage.read_json(uri)) != about:
        raise UserError(
            f"{export.out} contains an export of {earlier.get('model')}, but this is one of {about['model']}, with "
            f"weights {export.algorithm.sha256[:16]}: choose another --out"
        )
    storage.write_json(uri, about)


def part_uris(out: str) -> list[str]:
    """The files of OUT/parts, in order."""
    folder = storage.join(out, PARTS)
    try:
        return sorted(entry.uri for entry in storage.list_files(folder) if entry.path.endswith(".json"))
    except storage.NotFoundError:
        return []


def _read_before(out: str) -> dict[tuple[str, str], Row]:
    """The written objects of earlier exports, by image and kind."""
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(storage.read_json, part_uris(out)))
    return {(row["image_id"], row["kind"]): row for rows in parts for row in rows if row["status"] == WRITTEN}


def write_csv(out: str) -> tuple[dict[str, int], list[str]]:
    """Write OUT/export.csv from OUT/parts; returns counts for result.json, and lines for the user."""
    counts, reasons = Counter[str](), Counter[str]()

    def counted_rows() -> Iterator[Row]:
        for uri in part_uris(out):
            rows = storage.read_json(uri)
            counts["images"] += len({row["image_id"] for row in rows})
            counts.update(
                row["kind"] if row["status"] == WRITTEN else row["status"].replace(" ", "_") for row in rows
            )
            counts["pushed"] += sum(bool(row.get("pushed")) for row in rows)
            reasons.update(row["reason"] for row in rows if row["status"] == FAILED)
            yield from rows

    with atomic_writer(storage.join(out, CSV_FILE)) as stream:
        for line in csv_lines(counted_rows(), COLUMNS):
            stream.write(line.encode())
    written = [counted(counts[kind], noun) for kind, noun in _NOUNS.items()]
    lines = [f"{', '.join(written)} for {counted(counts['images'], 'image')}"]
    for status, what in ((BELOW, "nothing found, so not exported"), (NOT_SCORED, "not scored, so not exported")):
        if count := counts[status.replace(" ", "_")]:
            lines.append(f"{what}: {counted(count, 'image')}")
    lines += [f"not exported: {counted(count, 'object')}: {reason}" for reason, count in reasons.most_common(5)]
    names = (
        "images",
        *KINDS,
        *(status.replace(" ", "_") for status in (BELOW, NO_MASK, NOT_SCORED, FAILED)),
        "pushed",
    )
    return {name: counts[name] for name in names}, lines


_NOUNS: dict[Kind, str] = {"sr": "report", "seg": "segmentation", "sc": "secondary capture"}
