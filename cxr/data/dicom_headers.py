"""Read the headers of large DICOM archives on the Ray cluster, before `open_manifest` needs them."""

from __future__ import annotations

from dataclasses import replace

from cxr import storage
from cxr.data.ledger import Part
from cxr.data.manifest_files import write_parts
from cxr.runtime.progress import Progress
from cxr.sources import dicom, find_source
from cxr.sources.header_scan import Scan, ScanPart
from cxr.sources.options import ReadOptions

ON_CLUSTER = 20_000  # files: fewer are read sooner on this machine than a cluster starts


def read_large_archive(archive: str, reading: ReadOptions) -> None:
    """Read the missing headers of a DICOM archive on the cluster if there are at least `ON_CLUSTER`.

    Does nothing for other archives: `open_manifest` reads the headers of smaller ones on this machine, without Ray.

    Raises:
        UserError: no such archive, or this machine's disk is not shared by the cluster.
        ClusterError: workers died again and again.
    """
    archive = storage.archive_root(archive)
    if not reading.headers or find_source(archive, reading.source) is not dicom:
        return
    with dicom.planned(archive, reading) as (scan, _):
        files, left = scan.files.num_rows, sum(part.files.num_rows for part in scan.parts)
        if left < ON_CLUSTER:
            return
        from cxr.data.ray_data import map_parts  # these import Ray
        from cxr.runtime import cluster

        cluster.connect()
        for uri in (archive, scan.folder):
            cluster.check_shared(uri)
        progress = Progress("headers read", files, done=files - left, unit="files")
        listed = storage.join(scan.folder, f"files-{scan.parts[0].name}")
        parts = write_parts(listed, (Part(part.name, part.files) for part in scan.parts))
        here = replace(scan, files=scan.files.slice(0, 0), parts=[])  # workers need neither
        for summary in map_parts(parts, HeaderReader, (here,)):
            progress.add(summary["files"])
        storage.delete(listed)
        progress.show()


class HeaderReader:
    """A worker that reads the headers of a part's files and writes them."""

    def __init__(self, scan: Scan) -> None:
        self._scan = scan

    def __call__(self, part: Part) -> dict[str, int]:
        return {"files": self._scan.write(ScanPart(part.name, part.rows))}
