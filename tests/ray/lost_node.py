"""A run or a search that loses one of its machines: python -m tests.ray.lost_node fixed|elastic|search FOLDER."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

from cxr.families.align import AlignRecipe
from cxr.runtime import cluster, ray_private
from cxr.training.fit import fit
from cxr.training.options import RunOptions, SearchOptions
from cxr.training.run_log import read_metrics
from cxr.training.search import search
from tests.made_shards import write_shards
from tests.ray_private import write_no_address_file

EPOCHS, TRIALS = 8, 2
RECIPE = AlignRecipe(size=32, epochs=EPOCHS, batch_size=8, backbone="conv3", lungs=False)
ADDRESS = {"node_ip_address": cluster.LOOPBACK}


def start() -> tuple[Cluster, Any]:
    """A head without CPUs and two machines with one each, all on loopback; the second one is to be lost."""
    write_no_address_file()
    ray_private.stay_on_loopback()
    port = cluster.free_port()
    os.environ["RAY_API_SERVER_ADDRESS"] = f"http://{cluster.LOOPBACK}:{port}"
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_host": cluster.LOOPBACK, "dashboard_port": port}
    machines = Cluster(initialize_head=True, connect=True, head_node_args=head | ADDRESS)
    machines.add_node(num_cpus=1, **ADDRESS)
    return machines, machines.add_node(num_cpus=1, **ADDRESS)


def runs(how: str, made: str, out: str) -> Callable[[], object]:
    once = RunOptions(max_failures=2)
    if how == "search":
        options = SearchOptions(trials=TRIALS, grace_period=EPOCHS)
        return lambda: search(RECIPE, made, out, options, once)
    workers = RunOptions(workers="1:2" if how == "elastic" else 2, max_failures=2)
    return lambda: fit(RECIPE, made, out, workers)


def epochs(folder: Path) -> list[int]:
    """Of each run below `folder`, how many are done."""
    return [len(read_metrics(str(path.parent))) for path in folder.rglob("metrics.jsonl")]


def main(how: str, folder: str) -> None:
    machines, second = start()
    made = write_shards(Path(folder) / "shards", {"train": 64, "val": 8}, size=32)
    work = threading.Thread(target=runs(how, made, str(Path(folder) / "out")))
    work.start()
    begun = TRIALS if how == "search" else 1
    while work.is_alive() and sum(done >= 2 for done in epochs(Path(folder, "out"))) < begun:
        time.sleep(0.1)
    print("lost at", epochs(Path(folder, "out")), file=sys.__stdout__, flush=True)  # a search hides sys.stdout
    machines.remove_node(second, allow_graceful=False)
    if how == "fixed":
        machines.add_node(num_cpus=1, **ADDRESS)
    work.join()
    ray.shutdown()  # a cluster does not remove the machine that this process is connected to
    machines.shutdown()
    print("ended at", epochs(Path(folder, "out")), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
