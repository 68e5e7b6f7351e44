"""A pool of workers over the parts of a plan, and how all of our Ray datasets are configured."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import cv2
import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import RayTaskError
from ray.util.annotations import RayDeprecationWarning

from cxr.data.ledger import Part
from cxr.data.manifest_files import StoredPart
from cxr.data.shards import RowGroup
from cxr.errors import ClusterError, UserError
from cxr.runtime import cluster, ray_private
from cxr.runtime.progress import with_stall_notes
from cxr.runtime.user_errors import PROCESS_DEATHS, user_error_in

_REPLY = pa.schema([("name", pa.string()), ("summary", pa.string())])
_RESTARTS = 5  # of a process that died, mostly with its machine; images do not kill processes (decode_pool)
_NAMED = 3  # number of parts that a message names
_EARLY_DEATHS = 5  # consecutive failed starts of a pool's workers that are tolerated, for busy machines

Work = Callable[[Part], Mapping[str, Any]]


def map_blocks(rows: Dataset, work: Any, *, pool: ActorPoolStrategy | None = None, **options: Any) -> Dataset:
    """`rows.map_batches` on whole blocks, with limits to how often a process is started again after it died.

    Work that needs no GPU runs on the cluster's machines for data, if it has any. Ray Data itself retries without
    limit. It does not fuse tasks that have a limit with the pool that follows them. Retries on a worker of a pool are
    not limited, because those that Ray makes before it notices the loss of the worker's machine fail at once.
    """
    limits = {"max_restarts": _RESTARTS, "max_task_retries": -1} if pool else {"max_retries": _RESTARTS}
    if not options.get("num_gpus"):
        options["label_selector"] = cluster.data_machines()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RayDeprecationWarning)  # there is no other way to set these limits yet
        return rows.map_batches(work, batch_format="pyarrow", batch_size=None, compute=pool, **limits, **options)


def configured(rows: Dataset) -> Dataset:
    """Configure a dataset to show no progress bars, never to time out, and to raise the errors of our functions."""
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger(ray_private.DATA_PROGRESS_LOGGER).setLevel(logging.ERROR)  # warns that bars are off
    context: DataContext = rows.context
    context.enable_progress_bars = False
    context.raise_original_map_exception = True  # otherwise a UserError would arrive as the text of a traceback
    context.execution_no_progress_timeout_s = -1  # otherwise slow parts, or waiting for CPUs, would end the job
    context.max_consecutive_actor_init_deaths = _EARLY_DEATHS
    return rows


def map_parts(
    parts: Sequence[StoredPart], make: Callable[..., Work], args: Sequence[Any] = ()
) -> Iterator[dict[str, Any]]:
    """Call `make(*args)` in each worker of a pool, then its result with every part; yield the summaries.

    The pool has one worker per CPU, fewer while the cluster is busy, and more when it grows. Summaries are small
    JSON-serializable dicts and arrive in any order; they should not contain the part's data.

    Raises:
        UserError: as raised in a worker.
        ClusterError: workers died repeatedly.
    """
    if not parts:
        return
    blocks = ray.data.from_items([_key(part) for part in parts], override_num_blocks=len(parts))
    replies = map_blocks(blocks, _OnPart, pool=_pool(len(parts)), fn_constructor_args=(make, tuple(args)))
    for reply in finished(replies, [part.name for part in parts]):
        yield json.loads(reply["summary"])


def finished(replies: Dataset, names: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yield the rows of `replies` as they arrive, one for each of the parts in `names`.

    Raises:
        UserError: as raised by the work on a part.
        ClusterError: processes that worked on a part died repeatedly.
    """
    missing = dict.fromkeys(names)

    def waiting_for() -> str:
        return f"{_some(missing)}, while {cluster.free()}"

    try:
        batches = configured(replies).iter_batches(batch_size=None, batch_format="pyarrow")
        for batch in with_stall_notes(batches, waiting_for):
            for reply in cast(pa.Table, batch).to_pylist():
                missing.pop(reply["name"], None)
                yield reply
    except RayTaskError as error:
        if (mistake := user_error_in(error)) is None:
            raise
        raise UserError(str(mistake).partition("\n")[0]) from error  # the rest is Ray's advice on retries
    except PROCESS_DEATHS as error:
        raise ClusterError(
            f"the process that worked on one of these parts died {_RESTARTS + 1} times: {_some(missing)} "
            f"({type(error).__name__}). Most likely its machine has too little memory: use machines with more "
            f"memory, or fewer CPUs of each. Finished parts are saved: run the same command again to continue"
        ) from error


def _some(names: Iterable[str]) -> str:
    """A few of the names, and the number of the others."""
    names = list(names)
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more


def _key(part: StoredPart) -> dict[str, Any]:
    """What passes through Ray in place of a part's rows: where they are."""
    return {"name": part.name, "uri": part.group.uri, "row_group": part.group.index}


class _OnPart:
    """A worker of a pool: created once, called with each part."""

    def __init__(self, make: Callable[..., Work], args: Sequence[Any]) -> None:
        cv2.setNumThreads(0)  # every core has a worker of its own
        self._work = make(*args)

    def __call__(self, key: pa.Table) -> pa.Table:
        (each,) = key.to_pylist()
        part = StoredPart(each["name"], RowGroup(each["uri"], each["row_group"], 0, ()))
        return pa.table([[part.name], [json.dumps(dict(self._work(part.read())))]], schema=_REPLY)


def _pool(parts: int) -> ActorPoolStrategy:
    return ActorPoolStrategy(
        min_size=1,
        max_size=parts,
        initial_size=max(1, min(int(cluster.total("CPU")), parts)),
        max_tasks_in_flight_per_actor=2,  # with more, the last parts would wait for a single worker
    )
