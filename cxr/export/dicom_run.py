"""Write the DICOM objects of all images of a scoring run, in several processes, so that a second run continues.

    OUT/export.csv               every image of the run: what was written for it, or why not
    OUT/STUDY/KIND-INSTANCE.dcm  the objects, named by UIDs alone
    OUT/parts/part-NNNNNN.json   what is written for some images, from which an interrupted export continues
    OUT/export.json              the run and the model that OUT belongs to

An object is written again only if the scores, the settings or the version of this package have changed. Objects that
are no longer part of the export are deleted.
"""

from __future__ import annotations

import csv
import ctypes
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

import cxr
from cxr import schema, storage
from cxr.data import shards
from cxr.data.identity import read_crosswalk
from cxr.errors import ImageRejectedError, UserError
from cxr.evaluation.run import Run, read_scores
from cxr.export.dicom_objects import KINDS, Kind, instance_uid, series_uid
from cxr.export.dicom_results import Algorithm, ImageResult, as_uid, image_results, score_columns
from cxr.export.dicom_source import SourceImage, quiet_libraries, read_source
from cxr.families import recipe_type
from cxr.families.checkpoint_files import read_about
from cxr.runtime.progress import Progress
from cxr.wording import counted

CSV_FILE, PARTS, ABOUT_FILE = "export.csv", "parts", "export.json"
WRITTEN = "written"
NOT_SCORED, BELOW, NO_MASK, FAILED = "not scored", "below threshold", "no mask", "failed"
COLUMNS = ("image_id", "kind", "status", "reason", "file", "study_uid", "series_uid", "sop_uid", "pushed")
_VERSION = 1  # of the objects' content; part of each digest
_PART_IMAGES = 64
_PSEUDONYM = re.compile(r"[0-9a-f]{32}")  # of data.identity; the URI of a file contains a slash
_HERE_AT_MOST = 24  # images of which so few are exported in this process: others take seconds to start
_PR_SET_PDEATHSIG = 1  # linux/prctl.h

Row = dict[str, Any]  # COLUMNS, and `digest` of what a written object was made from
MaskProbabilities = Callable[[str], np.ndarray]
"""From the URI of an image: the probability of each of its pixels, float32 (height, width). Can be pickled."""


@dataclass(frozen=True)
class Export:
    """Everything that a process needs to write objects.

    Args:
        out: URI of the folder of the objects.
        box_score: boxes with a lower score are left out.
        mask_probabilities: for segmentations of type FRACTIONAL; None: BINARY.
    """

    out: str
    algorithm: Algorithm
    kinds: tuple[Kind, ...] = KINDS
    all_images: bool = False
    box_score: float = 0.25
    mask_probabilities: MaskProbabilities | None = None

    def digest(self, kind: Kind, result: ImageResult) -> str:
        """Changes whenever the object must be written again."""
        scores = asdict(replace(result, source_uri=""))  # an archive may move
        made_from = [_VERSION, cxr.__version__, asdict(self.algorithm), self.box_score, scores]
        options = ["seg" in self.kinds] if kind == "sr" else [self.mask_probabilities is not None]
        return hashlib.sha256(json.dumps([made_from, options]).encode()).hexdigest()


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
        about: checkpoint.json; empty if it is not available, so that thresholds are unknown.

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
    thresholds = dict(zip(chosen.get("findings", ()), chosen.get("values", ()), strict=True))
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


def originals(run: Run, parts: Sequence[pa.Table], archive: str = "", crosswalk: str = "") -> Originals:
    """Where the files of a run's images are.

    Args:
        parts: the run's scores.
        archive: where the scored archive is now; "" if it has not moved.
        crosswalk: URI of the folder that leads from pseudonyms back to images; required for a run with pseudonyms.

    Raises:
        UserError: the run has pseudonyms, and there is no crosswalk.
    """
    if not crosswalk:
        if any(_PSEUDONYM.fullmatch(uri or "") for part in parts for uri in part[schema.SOURCE_URI].to_pylist()):
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


# ---- One image


def export_image(result: ImageResult, export: Export, before: Mapping[Kind, Row]) -> list[Row]:
    """Write the objects of one image; returns a row for each kind, or one row that says why there is none.

    Args:
        before: rows of an earlier export whose files are still there, by kind.

    Raises:
        StorageError: storage failed in a way that concerns more than one file.
    """
    nothing: Row = dict.fromkeys(COLUMNS) | {"image_id": result.image_id}
    if result.error is not None:
        return [nothing | {"status": NOT_SCORED, "reason": result.error}]
    if not (export.all_images or result.is_positive):
        return [nothing | {"status": BELOW}]
    kept: dict[Kind, Row] = {
        kind: row
        for kind in export.kinds
        if (row := before.get(kind)) is not None and row["digest"] == export.digest(kind, result)
    }
    wanted: list[Kind] = [
        kind for kind in export.kinds if kind not in kept and not (kind == "seg" and not result.has_mask)
    ]
    rows = [*kept.values()]
    if "seg" in export.kinds and result.mask is not None and not result.has_mask:
        rows.append(nothing | {"kind": "seg", "status": NO_MASK})
    if not wanted:
        return rows
    try:
        source = read_source(result.source_uri)
        _check_same_image(source, result)
    except ImageRejectedError as error:
        return [*rows, *(nothing | {"kind": kind, "status": FAILED, "reason": str(error)} for kind in wanted)]
    for kind in wanted:
        row = nothing | {"kind": kind, "study_uid": source.study_uid}
        try:
            with quiet_libraries():
                data = _made(kind, source, result, export)
        except ImageRejectedError as error:
            rows.append(row | {"status": FAILED, "reason": str(error)})
            continue
        sop_uid = instance_uid(source, export.algorithm, kind)
        file = f"{source.study_uid}/{kind}-{sop_uid}.dcm"
        storage.write_bytes(storage.join(export.out, file), data)
        made_from = {"series_uid": series_uid(source, export.algorithm, kind), "digest": export.digest(kind, result)}
        rows.append(row | made_from | {"status": WRITTEN, "file": file, "sop_uid": sop_uid})
    return rows


def _check_same_image(source: SourceImage, result: ImageResult) -> None:
    """Raise ImageRejectedError if the file is not the image that was scored."""
    expected = (
        ("StudyInstanceUID", result.study_uid, source.study_uid),
        ("SOPInstanceUID", result.sop_uid, source.sop_uid),
    )
    for name, scored, there in expected:
        if scored is not None and scored != there:
            raise ImageRejectedError(f"the file has another {name} than when it was scored: score the archive again")
    if (source.height, source.width) != (result.height, result.width):
        raise ImageRejectedError(
            f"expected the scored image of {result.width} x {result.height} pixels, got one of {source.width} x "
            f"{source.height}: the file has changed since it was scored"
        )


def _made(kind: Kind, source: SourceImage, result: ImageResult, export: Export) -> bytes:
    if kind == "sr":
        from cxr.export.dicom_sr import structured_report  # highdicom takes seconds to import

        with_mask = "seg" in export.kinds and result.has_mask
        return structured_report(source, result, export.algorithm, with_mask=with_mask)
    if kind == "seg":
        from cxr.export.dicom_seg import segmentation

        probabilities = export.mask_probabilities(result.source_uri) if export.mask_probabilities else None
        return segmentation(source, result, export.algorithm, probabilities)
    from cxr.data.decode_pool import decode_image
    from cxr.export.dicom_sc import secondary_capture

    decoded = decode_image(storage.read_bytes(result.source_uri))
    return secondary_capture(source, result, export.algorithm, decoded.image.pixels)


# ---- All images

Work = tuple[list[ImageResult], Export, dict[tuple[str, Kind], Row]]


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
    for number, rows in enumerate(_map(_works(parts, export, originals, before), workers or _cpus(), total)):
        storage.write_json(storage.join(export.out, PARTS, f"part-{number:06d}.json"), rows)
        unused -= {row["file"] for row in rows}
        progress.add(len({row["image_id"] for row in rows}), sum(row["status"] == FAILED for row in rows))
    progress.show()
    for file in unused:
        if file.rpartition("/")[2].startswith(tuple(f"{kind}-2.25." for kind in KINDS)):
            storage.delete(storage.join(export.out, file))
    for uri in part_uris(export.out)[-(-total // _PART_IMAGES) :]:  # of an earlier, longer export
        storage.delete(uri)


def _works(
    parts: Sequence[pa.Table], export: Export, originals: Originals, before: Mapping[tuple[str, Kind], Row]
) -> Iterator[Work]:
    results = itertools.chain.from_iterable(image_results(p, export.algorithm, export.box_score) for p in parts)
    while some := [originals.find(result) for result in itertools.islice(results, _PART_IMAGES)]:
        keys: list[tuple[str, Kind]] = [(result.image_id, kind) for result in some for kind in export.kinds]
        yield some, export, {key: before[key] for key in keys if key in before}


def _export_part(work: Work) -> list[Row]:
    results, export, before = work
    rows: list[Row] = []
    for result in results:
        own: dict[Kind, Row] = {
            kind: before[result.image_id, kind] for kind in export.kinds if (result.image_id, kind) in before
        }
        rows += export_image(result, export, own)
    return rows


def _map(works: Iterable[Work], workers: int, images: int) -> Iterator[list[Row]]:
    """The rows of each work in order, from several processes unless there is little to do."""
    if workers == 1 or images <= _HERE_AT_MOST:
        yield from map(_export_part, works)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, context, initializer=_prepare_process, initargs=(os.getpid(),))
    running: deque[Any] = deque()
    try:
        for work in works:
            running.append(pool.submit(_export_part, work))
            if len(running) > 2 * workers:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
    except BrokenProcessPool:
        raise RuntimeError("a process of the export ended unexpectedly: run the same command again") from None
    finally:  # also after an interruption: begin no other part
        pool.shutdown(wait=False, cancel_futures=True)


def _prepare_process(parent: int) -> None:
    """Leave Ctrl-C to the parent process, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # the parent has already ended
            os._exit(1)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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


def _read_before(out: str) -> dict[tuple[str, Kind], Row]:
    """The written objects of earlier exports, by image and kind."""
    with ThreadPoolExecutor(8) as pool:
        parts = list(pool.map(storage.read_json, part_uris(out)))
    return {(row["image_id"], row["kind"]): row for rows in parts for row in rows if row["status"] == WRITTEN}


def write_csv(out: str) -> tuple[dict[str, int], list[str]]:
    """Write OUT/export.csv from OUT/parts; returns counts for result.json, and lines for the user."""
    counts, reasons, text = Counter[str](), Counter[str](), io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for uri in part_uris(out):
        rows = storage.read_json(uri)
        writer.writerows(rows)
        counts["images"] += len({row["image_id"] for row in rows})
        counts.update(row["kind"] if row["status"] == WRITTEN else row["status"].replace(" ", "_") for row in rows)
        counts["pushed"] += sum(bool(row.get("pushed")) for row in rows)
        reasons.update(row["reason"] for row in rows if row["status"] == FAILED)
    storage.write_text(storage.join(out, CSV_FILE), text.getvalue())
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
