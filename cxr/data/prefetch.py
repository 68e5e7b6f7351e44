"""Iterate in threads that are ahead of their consumer. Does not import torch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import Full, Queue
from threading import Event, Thread
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def read_ahead(read: Callable[[S], T], items: Iterable[S], ahead: int) -> Iterator[T]:
    """`map(read, items)`, with up to `ahead` results that are read or wait at a time, in as many threads."""
    with ThreadPoolExecutor(ahead) as pool:
        waiting = deque[Future[T]]()
        try:
            for item in items:
                waiting.append(pool.submit(read, item))
                if len(waiting) == ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def prefetched(items: Iterable[T], depth: int = 3) -> Iterator[T]:
    """Iterate over `items` in a thread that is up to `depth` ahead. Its exceptions are raised here."""
    queue: Queue[tuple[bool, object]] = Queue(depth)
    stop = Event()
    worker = Thread(target=_fill, args=(iter(items), queue, stop), daemon=True)
    worker.start()
    try:
        while True:
            good, item = queue.get()
            if good:
                yield item  # pyright: ignore[reportReturnType]
            elif item is None:
                return
            else:
                raise item  # pyright: ignore[reportGeneralTypeIssues]
    finally:
        stop.set()
        worker.join()


def _fill(items: Iterator[object], queue: Queue[tuple[bool, object]], stop: Event) -> None:
    end: object = None
    try:
        for item in items:
            if not _put(queue, (True, item), stop):
                return
    except BaseException as error:
        end = error
    _put(queue, (False, end), stop)


def _put(queue: Queue[tuple[bool, object]], entry: tuple[bool, object], stop: Event) -> bool:
    while not stop.is_set():
        try:
            queue.put(entry, timeout=0.1)
            return True
        except Full:
            continue
    return False
