"""Write the DICOM objects of many images in several processes, which end soon after Ctrl-C.

Imports neither torch nor Ray, because every process would import them, too.
"""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool, ProcessPoolExecutor
from multiprocessing.synchronize import Event

from cxr.export.dicom_results import ImageResult
from cxr.export.dicom_write import Export, Row, export_image, outdated_kinds
from cxr.runtime.child_processes import available_cpus, prepare_child

_HERE_AT_MOST = 24  # images of which so few are exported in this process: others take seconds to start
_PRELOADED = [f"cxr.export.dicom_{kind}" for kind in ("processes", "sr", "seg", "sc")]  # imported once, by the server

Work = tuple[list[ImageResult], Export, dict[tuple[str, str], Row]]
"""Some images, how to export them, and what an earlier export has written for them, by image and kind."""


def _export_some(work: Work) -> list[Row]:
    results, export, before = work
    rows: list[Row] = []
    for result in results:
        if _stopping is not None and _stopping.is_set():
            raise InterruptedError
        rows += export_image(result, export, _own(result, export, before))
    return rows


def _is_quick(work: Work) -> bool:
    """Whether there is nothing to write for these images."""
    results, export, before = work
    return not any(outdated_kinds(result, export, _own(result, export, before)) for result in results)


def _own(result: ImageResult, export: Export, before: dict[tuple[str, str], Row]) -> dict[str, Row]:
    """What an earlier export has written for an image, by kind."""
    return {kind: before[result.image_id, kind] for kind in export.kinds if (result.image_id, kind) in before}


def map_works(works: Iterable[Work], workers: int, images: int) -> Iterator[list[Row]]:
    """The rows of each work in order.

    Args:
        workers: number of processes; 0: one per CPU. Few images are exported in this process.
        images: number of images of all works.
    """
    workers = workers or available_cpus()
    if workers == 1 or images <= _HERE_AT_MOST:
        yield from map(_export_some, works)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    stopping = context.Event()
    pool = ProcessPoolExecutor(workers, context, initializer=_prepare_process, initargs=(stopping,))
    running: deque[Future[list[Row]] | list[Row]] = deque()

    def first() -> list[Row]:
        made = running.popleft()
        return made if isinstance(made, list) else made.result()

    try:
        for work in works:
            running.append(_export_some(work) if _is_quick(work) else pool.submit(_export_some, work))
            while running and (isinstance(running[0], list) or len(running) > 2 * workers):
                yield first()
        while running:
            yield first()
    except BrokenProcessPool:
        raise RuntimeError("a process of the export ended unexpectedly: run the same command again") from None
    except BaseException:  # also an interruption: each process ends after its current image
        stopping.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_stopping: Event | None = None  # in a process of the export: set when it must end


def _prepare_process(stopping: Event) -> None:
    global _stopping
    _stopping = stopping
    prepare_child()
