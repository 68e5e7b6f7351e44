"""Read the headers of many DICOM files into Parquet, each file once.

The files of an archive whose headers have not been read are cut into parts. The name of a part's Parquet file,
`part-ARCHIVE-FILES.parquet`, consists of a hash of the archive's URI and the key of the pseudonyms, and a hash of the
listing of its files (paths, sizes and versions). So a part is complete or absent, an interrupted scan continues with
the files that it has not read, and a later scan reads only files that are new, have changed, or could not be read.
"""

from __future__ import annotations

import ctypes
import hashlib
import io
import json
import multiprocessing
import os
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cxr import schema, storage
from cxr.errors import ImageRejectedError, raised_at
from cxr.sources.image_files import FILE_BYTES, FILE_VERSION, PATH
from cxr.sources.pseudonyms import Pseudonyms, patient_byte
from cxr.wording import counted

VERSION = 2  # of the stored columns; included in the name of every part
_FEWEST, _MOST, _PARTS = 256, 4096, 32  # files of a part; parts of a scan, if that gives such a number
HERE_AT_MOST = 256  # files whose headers are read in this process: more are worth the start of others

DICOM, OTHER, UNREADABLE = "dicom", "other", "unreadable"
KIND = "kind"  # one of these three
SOP_CLASS, SOP_INSTANCE = "sop_class", "sop_instance"  # UIDs
PATIENT_BYTE = "patient_byte"  # see pseudonyms.patient_byte
ACCESSION = "accession_number"
STUDY_DATE, LATERALITY, MANUFACTURER, MODEL = "study_date", "laterality", "manufacturer", "model"
FRAMES, PHOTOMETRIC, TRANSFER_SYNTAX = "frames", "photometric", "transfer_syntax"

HEADERS = pa.schema(
    [
        (PATH, pa.string()),
        (FILE_BYTES, pa.int64()),
        (FILE_VERSION, pa.string()),
        (KIND, pa.string()),
        (schema.ERROR, pa.string()),  # why the header is unreadable
        (SOP_CLASS, pa.string()),
        (SOP_INSTANCE, pa.string()),
        (schema.STUDY_ID, pa.string()),
        (schema.SERIES_ID, pa.string()),
        (schema.PATIENT_ID, pa.string()),  # a pseudonym, or PatientID with --keep-ids
        (PATIENT_BYTE, pa.int16()),
        (ACCESSION, pa.string()),  # likewise
        (schema.SEX, pa.string()),
        (schema.AGE_YEARS, pa.float32()),
        (STUDY_DATE, pa.string()),
        (schema.MODALITY, pa.string()),
        (schema.BODY_PART, pa.string()),
        (schema.VIEW, pa.string()),
        (LATERALITY, pa.string()),
        (MANUFACTURER, pa.string()),
        (MODEL, pa.string()),
        (schema.HEIGHT_PX, pa.int32()),
        (schema.WIDTH_PX, pa.int32()),
        (FRAMES, pa.int32()),
        (schema.SPACING_MM, pa.list_(pa.float32(), 2)),
        (PHOTOMETRIC, pa.string()),
        (TRANSFER_SYNTAX, pa.string()),
    ]
)
_LISTING = pa.schema([HEADERS.field(name) for name in (PATH, FILE_BYTES, FILE_VERSION)])
_FIRST_BYTES, _MORE, _MOST_BYTES = 32 << 10, 8, 16 << 20  # of a file; each attempt reads _MORE times as much
_NOT_READABLE = "file not readable"  # beginning of the error of a file that storage did not give
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_REMOTE_THREADS = 16  # that wait for a remote store, in each process
_READ_THREADS = 8  # that read parts


@dataclass(frozen=True)
class ScanPart:
    """Some files of an archive, columns of `image_files.list_images`, and the name of their part."""

    name: str
    files: pa.Table


@dataclass(frozen=True)
class Scan:
    """The scan of an archive.

    Args:
        folder: URI of the folder of its parts.
        files: all files of the archive, sorted, with the columns of `image_files.list_images`.
        read: names of the parts that earlier scans have written.
        parts: the files whose headers none of them has.
    """

    folder: str
    pseudonyms: Pseudonyms
    files: pa.Table
    read: tuple[str, ...]
    parts: list[ScanPart]

    def uri(self, name: str) -> str:
        return storage.join(self.folder, f"{name}.parquet")

    def write(self, part: ScanPart) -> int:
        """Read the headers of a part's files and write its Parquet file; returns the number of files."""
        rows = read_headers(part.files, self.pseudonyms)
        sink = io.BytesIO()
        pq.write_table(rows, sink)
        storage.write_bytes(self.uri(part.name), sink.getvalue())
        return rows.num_rows

    def run_here(self) -> None:
        """Read all parts that earlier scans have not written, on the CPUs of this machine.

        Raises:
            StorageError: storage failed in a way that concerns more than one file.
            RuntimeError: a process of the scan ended unexpectedly.
        """
        missing = self.parts
        files = sum(part.files.num_rows for part in missing)
        if files <= HERE_AT_MOST:
            for part in missing:
                self.write(part)
            return
        workers = min(_cpus(), len(missing))
        print(
            f"note: reading the headers of {counted(files, 'file')} in {counted(workers, 'process', 'processes')}",
            flush=True,
        )
        if _can_fork(self.folder) and _can_fork(missing[0].files[schema.SOURCE_URI][0].as_py()):
            self._run_forked(missing, workers)
            return
        todo: queue.SimpleQueue[ScanPart] = queue.SimpleQueue()
        for part in missing:
            todo.put(part)
        with ThreadPoolExecutor(workers) as pool:
            running = [pool.submit(self._work, todo) for _ in range(workers)]
            try:
                for work in running:
                    work.result()
            except BaseException:  # also an interruption: start no other part
                while not todo.empty():
                    todo.get_nowait()
                raise

    def _run_forked(self, missing: list[ScanPart], workers: int) -> None:
        """Copies of this process begin at once, while new processes would import pydicom and Arrow first."""
        import cxr.imaging.dicom_header  # noqa: F401  # the copies share it

        context = multiprocessing.get_context("fork")
        with ProcessPoolExecutor(workers, context, initializer=_prepare_fork, initargs=(os.getpid(),)) as pool:
            try:
                for _ in pool.map(_write_requested, [request(self, part) for part in missing]):
                    pass
            except BaseException:  # also an interruption: begin no other part
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def table(self) -> pa.Table:
        """The headers of all files, in their order; every part must have been read."""
        names = dict.fromkeys([*(part.name for part in self.parts), *self.read])  # the latest row of a file first
        tables = _read_all(self.folder, [*names], HEADERS)
        stored = pa.concat_tables(tables)
        del tables
        row, columns = _rows_of(self.files, stored), []
        for name in HEADERS.names:  # each column is freed once it is copied
            columns.append(stored[name].take(row))
            stored = stored.drop_columns(name)
        return pa.table(columns, schema=HEADERS)

    def _work(self, todo: queue.SimpleQueue[ScanPart]) -> None:
        """Let a child process read one part after another, until none is left."""
        with _child() as ask:
            while True:
                try:
                    part = todo.get_nowait()
                except queue.Empty:
                    return
                ask(request(self, part))


def plan_scan(archive: str, files: pa.Table, folder: str, pseudonyms: Pseudonyms) -> Scan:
    """The scan of an archive from its sorted listing (`image_files.list_images`); `folder` may have earlier scans."""
    about = {"version": VERSION, "archive": archive, **pseudonyms.describe()}
    prefix = f"part-{_digest(about)}-"
    try:
        names = (entry.path.removesuffix(".parquet") for entry in storage.list_files(folder))
        read = tuple(sorted(name for name in names if name.startswith(prefix)))
    except storage.NotFoundError:
        read = ()
    with_errors = pa.schema([*_LISTING, HEADERS.field(schema.ERROR)])
    stored = pa.concat_tables([with_errors.empty_table(), *_read_all(folder, read, with_errors)])
    was_read = pc.invert(pc.starts_with(stored[schema.ERROR], _NOT_READABLE))
    stored = stored.filter(pc.fill_null(was_read, True))
    left = files.filter(pc.is_null(_rows_of(files, stored)))
    parts, size = [], min(max(left.num_rows // _PARTS, _FEWEST), _MOST)
    for start in range(0, left.num_rows, size):
        some = left.slice(start, size)
        parts.append(ScanPart(f"{prefix}{_digest(some.select(_LISTING.names).to_pydict())}", some))
    return Scan(folder, pseudonyms, files, read, parts)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:24]


def _read_all(folder: str, names: Sequence[str], columns: pa.Schema) -> list[pa.Table]:
    """These columns of some parts in a folder."""

    def read(name: str) -> pa.Table:
        return storage.read_parquet(storage.join(folder, f"{name}.parquet"), columns=columns.names).cast(columns)

    with ThreadPoolExecutor(_READ_THREADS) as pool:
        return list(pool.map(read, names))


def _rows_of(files: pa.Table, stored: pa.Table) -> pa.Array:
    """int32 (N): the row of `stored` for each of the files, with the same path, size and version; null if none."""

    def keys(table: pa.Table) -> pa.Array:
        size = table[FILE_BYTES].cast(pa.string())
        joined = pc.binary_join_element_wise(table[PATH], size, table[FILE_VERSION], "\0")
        return joined.cast(pa.large_string()).combine_chunks()

    return pc.index_in(keys(files), value_set=keys(stored))


def read_headers(files: pa.Table, pseudonyms: Pseudonyms) -> pa.Table:
    """One row of `HEADERS` per file; a file that cannot be read is a row with the reason.

    Raises:
        StorageError: storage failed in a way that concerns more than one file.
    """
    uris = files[schema.SOURCE_URI].to_pylist()
    if uris and not storage.is_local(uris[0]):
        with ThreadPoolExecutor(_REMOTE_THREADS) as pool:
            rows = list(pool.map(lambda uri: _row(uri, pseudonyms), uris))
    else:
        rows = [_row(uri, pseudonyms) for uri in uris]
    columns = {field.name: pa.array([row.get(field.name) for row in rows], field.type) for field in HEADERS}
    columns |= {name: files[name].combine_chunks() for name in _LISTING.names}
    return pa.table(columns, schema=HEADERS)


def _row(uri: str, pseudonyms: Pseudonyms) -> dict[str, Any]:
    from cxr.imaging.dicom_header import is_dicom, read_header  # imports pydicom, which takes half a second

    header, size = None, _FIRST_BYTES
    try:
        while header is None:
            data, total = storage.read_start(uri, size)
            if not is_dicom(data):
                return {KIND: OTHER}
            header = read_header(data, complete=len(data) >= total or size >= _MOST_BYTES)
            size *= _MORE
    except ImageRejectedError as error:
        return {KIND: UNREADABLE, schema.ERROR: str(error)}
    except storage.DamagedError as error:
        return {KIND: UNREADABLE, schema.ERROR: f"unusable file: {type(error).__name__}"}
    except (storage.NotFoundError, storage.UnreadableError) as error:
        return {KIND: UNREADABLE, schema.ERROR: f"{_NOT_READABLE}: {type(error).__name__}"}
    return {
        KIND: DICOM,
        SOP_CLASS: header.sop_class,
        SOP_INSTANCE: header.sop_instance,
        schema.STUDY_ID: header.study,
        schema.SERIES_ID: header.series,
        schema.PATIENT_ID: pseudonyms.of("PatientID", header.patient_id),
        PATIENT_BYTE: patient_byte(header.patient_id) if header.patient_id else None,
        ACCESSION: pseudonyms.of("AccessionNumber", header.accession_number),
        schema.SEX: header.sex,
        schema.AGE_YEARS: header.age_years,
        STUDY_DATE: header.study_date,
        schema.MODALITY: header.modality,
        schema.BODY_PART: header.body_part,
        schema.VIEW: header.view,
        LATERALITY: header.laterality,
        MANUFACTURER: header.manufacturer,
        MODEL: header.model,
        schema.HEIGHT_PX: header.rows,
        schema.WIDTH_PX: header.columns,
        FRAMES: header.frames,
        schema.SPACING_MM: header.spacing_mm,
        PHOTOMETRIC: header.photometric,
        TRANSFER_SYNTAX: header.transfer_syntax,
    }


# ---- Child processes


def request(scan: Scan, part: ScanPart) -> dict[str, Any]:
    """The JSON from which a child process writes a part."""
    secret = {"key": scan.pseudonyms.key.hex(), "keep_ids": scan.pseudonyms.keep_ids}
    return {"folder": scan.folder, "pseudonyms": secret, "name": part.name, "files": part.files.to_pydict()}


def _write_requested(work: dict[str, Any]) -> None:
    """Write the part that `request` describes."""
    secret = work["pseudonyms"]
    pseudonyms, files = Pseudonyms(bytes.fromhex(secret["key"]), secret["keep_ids"]), pa.table(work["files"])
    Scan(work["folder"], pseudonyms, files, (), []).write(ScanPart(work["name"], files))


def serve() -> None:
    """The main function of a child process: write the parts that are requested on standard input, one per line."""
    for line in sys.stdin:
        work = json.loads(line)
        try:
            _write_requested(work)
            answer = {"name": work["name"]}
        except storage.StorageError as error:
            answer = {"storage": str(error)}
        except Exception as error:  # its text may quote a header
            answer = {"error": f"{type(error).__name__}{raised_at(error)}"}
        print(json.dumps(answer), flush=True)


@contextmanager
def _child() -> Iterator[Callable[[dict[str, Any]], None]]:
    """A process that writes parts; it ends when its standard input is closed, also if this process is killed."""
    paths = [*filter(None, [os.environ.get("PYTHONPATH"), *sys.path])]
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "cxr.sources.header_worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,  # a library's warning may quote a header
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"},
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stdin, stdout = process.stdin, process.stdout

    def ask(request: dict[str, Any]) -> None:
        try:
            stdin.write(json.dumps(request) + "\n")
            stdin.flush()
        except BrokenPipeError:
            pass
        answer = json.loads(stdout.readline() or "{}")
        if "storage" in answer:
            raise storage.StorageError(answer["storage"])
        if "name" not in answer:
            reason = answer.get("error", "it ended without an answer")
            raise RuntimeError(f"a process that reads DICOM headers failed ({reason}): run the same command again")

    try:
        yield ask
    finally:
        process.kill()
        process.communicate()


def _can_fork(uri: str) -> bool:
    """Whether this process can be copied safely for work on a URI: it has no other threads, and no connections."""
    return sys.platform == "linux" and threading.active_count() == 1 and storage.is_local(uri)


def _prepare_fork(parent: int) -> None:
    """Leave Ctrl-C to the parent process, and end with it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # the parent has already ended
        os._exit(1)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
