"""Write the DICOM objects of all images of a scoring run, in several processes, so that a second run continues.

    OUT/export.csv               every image of the run: what was written for it, or why not
    OUT/STUDY/KIND-INSTANCE.dcm  the objects, named by UIDs alone
    OUT/parts                    see `export.dicom_parts`
    OUT/export.json              the run and the model that OUT belongs to

An object is written again only if the scores, the settings or the version of this package have changed. Objects that
are no longer part of the export are deleted.
"""

from __future__ import annotations

import itertools
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from cxr import schema, storage
from cxr.data import shards
from cxr.data.identity import Crosswalk, read_crosswalk
from cxr.errors import UserError
from cxr.evaluation.run import Run, checkpoint_uri, findings_of, scan_scores, thresholds_of
from cxr.export.dicom_objects import KINDS, Kind
from cxr.export.dicom_parts import EarlierObjects, object_files, part_uri, part_uris, read_parts, short_key
from cxr.export.dicom_processes import Work, map_works
from cxr.export.dicom_results import Algorithm, ImageResult, as_uid, image_results, score_columns
from cxr.export.dicom_write import BELOW, COLUMNS, FAILED, NO_FINDINGS, NO_MASK, NOT_SCORED, WRITTEN, Export, Row
from cxr.families import recipe_type
from cxr.families.checkpoint_files import read_about
from cxr.reporting.tables import csv_lines
from cxr.runtime.progress import Progress
from cxr.storage.files import atomic_writer
from cxr.wording import counted

CSV_FILE, ABOUT_FILE = "export.csv", "export.json"
_PART_IMAGES = 64

# ---- The model and the images


def find_checkpoint(run: Run, checkpoint: str = "") -> tuple[str, dict[str, Any]] | None:
    """URI and checkpoint.json of a run's checkpoint; None if it is not where it was when the run was made.

    Args:
        checkpoint: where it is now; "" if it has not moved.

    Raises:
        UserError: there is another checkpoint at `checkpoint`, or none.
    """
    uri = storage.normalize(checkpoint) if checkpoint else checkpoint_uri(run)
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
            f"expected the checkpoint that made {run.uri}, got {checkpoint}, which has other weights: use the right "
            f"one, or omit --checkpoint"
        )
    return None


def read_algorithm(run: Run, kinds: Sequence[Kind], about: Mapping[str, Any], box_score: float) -> Algorithm:
    """The model of a run.

    Args:
        about: checkpoint.json; empty if it is not available. Then only thresholds that replaced its own are known.
        box_score: minimum score of the boxes of findings without a threshold of their own.

    Raises:
        UserError: the family has nothing to export as `kinds`.
    """
    columns = columns_of(run)
    if not {*columns} - {*score_columns(())}:
        raise UserError(
            f"{run.uri} is a run of family {run.family}, which predicts neither findings nor boxes nor masks: use a "
            f"run of another family"
        )
    has_masks = schema.PRED_MASK_RLE in columns
    if not has_masks and [*kinds] == ["seg"]:
        raise UserError(
            f"{run.uri} is a run of family {run.family}, which predicts no masks: use --kinds sr or sc, or a run of "
            f"family lungs or pneumothorax"
        )
    return Algorithm(
        family=run.family,
        sha256=run.checkpoint_sha256,
        member=run.member,
        findings=findings_of(run),
        thresholds=thresholds_of(run, about),
        mask_label=recipe_type(run.family).mask_label if has_masks else "",
        box_thresholds=dict(run.box_thresholds),
        box_score=box_score,
    )


def columns_of(run: Run) -> list[str]:
    """The columns of a run's scores from which objects are made."""
    return score_columns(recipe_type(run.family).score_columns.names)


@dataclass(frozen=True)
class Originals:
    """Where the files of scored images are.

    Args:
        moved: (URI of the archive that was scored, URI where it is now), or None if it is there still.
        crosswalk: with the ids of images, for a run with pseudonyms; None if the run has the archive's ids.
    """

    moved: tuple[str, str] | None = None
    crosswalk: Crosswalk | None = None

    def find(self, results: Iterable[ImageResult]) -> list[ImageResult]:
        """The results with the URIs of their files, and the UIDs that these must have."""
        found = [replace(result, source_uri=self._place(result.source_uri)) for result in results]
        if self.crosswalk is None:
            return found
        ids = self.crosswalk.originals(schema.IMAGE_ID, pa.array([result.image_id for result in found], pa.string()))
        return [
            replace(result, study_uid=None, sop_uid=as_uid(image_id))
            for result, image_id in zip(found, ids.to_pylist(), strict=True)
        ]

    def _place(self, uri: str) -> str:
        """Where a file is now."""
        if self.moved and storage.is_inside(uri, self.moved[0]):
            return storage.join(self.moved[1], uri.removeprefix(self.moved[0]))
        return uri


def originals(run: Run, archive: str = "") -> Originals:
    """Where the files of a run's images are.

    Args:
        archive: where the scored archive is now; "" if it has not moved.

    Raises:
        UserError: the run has pseudonyms and no crosswalk, or the other way round.
    """
    if run.crosswalk and not run.pseudonymized:
        raise UserError(f"{run.uri} has the archive's own ids, not pseudonyms: omit --crosswalk")
    if run.pseudonymized and not run.crosswalk:
        raise UserError(
            f"{run.uri} has pseudonyms instead of the archive's ids: use its crosswalk, a folder that cxr score "
            f"--pseudonymize wrote, with --crosswalk"
        )
    crosswalk = read_crosswalk(run.crosswalk, [schema.IMAGE_ID]) if run.crosswalk else None
    return Originals(_moved(run, archive), crosswalk)


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
            f"{run.uri} contains scores of {' and '.join(scored)}, but --archive names only one: omit it, "
            f"or score each archive into an --out of its own"
        )
    return storage.normalize(scored[0]), storage.normalize(archive)


# ---- All images


def export_run(run: Run, export: Export, originals: Originals, workers: int = 0) -> None:
    """Write the objects of all images of a run, and OUT/parts.

    Args:
        workers: number of processes; 0: one per CPU.

    Raises:
        UserError: OUT has the objects of another model.
        StorageError: storage failed in a way that concerns more than one file.
    """
    _check_out(export)
    total = sum(part.num_rows for part in scan_scores(run, [schema.IMAGE_ID]))
    progress, written = Progress("exported", total), array("Q")  # keys of the files of all objects
    for number, rows in enumerate(map_works(_works(run, export, originals), workers, total)):
        storage.write_json(part_uri(export.out, number), rows)
        written.extend(short_key(row["file"]) for row in rows if row["status"] == WRITTEN)
        progress.add(len({row["image_id"] for row in rows}), sum(row["status"] == FAILED for row in rows))
    progress.show()
    for uri in part_uris(export.out)[-(-total // _PART_IMAGES) :]:  # of an earlier, longer export
        storage.delete(uri)
    files, counts = np.unique(written, return_counts=True)
    _reject_shared(export.out, {*files[counts > 1].tolist()})
    _delete_others(export.out, files[counts == 1])


def _works(run: Run, export: Export, originals: Originals) -> Iterator[Work]:
    parts = scan_scores(run, columns_of(run))
    results = itertools.chain.from_iterable(image_results(p, export.algorithm) for p in parts)
    earlier = EarlierObjects(export.out)
    for number in itertools.count():
        some = originals.find(itertools.islice(results, _PART_IMAGES))
        if not some:
            return
        before = earlier.take(number, [result.image_id for result in some])
        yield some, export, {key: row for key, row in before.items() if key[1] in export.kinds}


def _reject_shared(out: str, files: set[int]) -> None:
    """Record that no image has an object that several images would have in common.

    Such images have the same SOPInstanceUID but different contents, so nothing can refer to one of them.

    Args:
        files: the short keys of these objects' files.
    """
    if not files:
        return
    reason = "another image of the archive has the same SOPInstanceUID, so objects cannot refer to this one"
    for uri in part_uris(out):
        rows = storage.read_json(uri)
        shared = [row for row in rows if row["status"] == WRITTEN and short_key(row["file"]) in files]
        for row in shared:
            row.update(status=FAILED, reason=reason, file=None, sop_uid=None)
        if shared:
            storage.write_json(uri, rows)


def _delete_others(out: str, keys: np.ndarray) -> None:
    """Delete the objects in OUT that are not, or no longer, part of the export.

    Args:
        keys: ascending short keys of the files of those that are.
    """
    others = []
    for file in object_files(out):
        is_ours = file.rpartition("/")[2].startswith(tuple(f"{kind}-2.25." for kind in KINDS))
        key = np.uint64(short_key(file))
        at = np.searchsorted(keys, key)
        if is_ours and (at == len(keys) or keys[at] != key):
            others.append(file)
    for file in others:
        storage.delete(storage.join(out, file))


# ---- OUT


def _check_out(export: Export) -> None:
    about = {"model": export.algorithm.name, "weights_sha256": export.algorithm.sha256}
    uri = storage.join(export.out, ABOUT_FILE)
    if storage.exists(uri) and (earlier := storage.read_json(uri)) != about:
        raise UserError(
            f"expected an export of {about['model']}, weights {about['weights_sha256'][:16]}, in {export.out}, got "
            f"one of {earlier['model']}, weights {earlier['weights_sha256'][:16]}: use another --out"
        )
    storage.write_json(uri, about)


def write_csv(out: str) -> tuple[dict[str, int], list[str]]:
    """Write OUT/export.csv from OUT/parts; returns counts for result.json, and lines for the user."""
    counts, reasons = Counter[str](), Counter[str]()

    def counted_rows() -> Iterator[Row]:
        for rows in read_parts(part_uris(out)):
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
        *(status.replace(" ", "_") for status in (BELOW, NO_FINDINGS, NO_MASK, NOT_SCORED, FAILED)),
        "pushed",
    )
    return {name: counts[name] for name in names}, lines


_NOUNS: dict[Kind, str] = {"sr": "report", "seg": "segmentation", "sc": "secondary capture"}
