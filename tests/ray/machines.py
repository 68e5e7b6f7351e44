"""A Ray cluster of several machines, which are raylets on this one: tests lose, freeze and add machines."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
from ray.cluster_utils import Cluster

from cxr.runtime import cluster, ray_private
from tests.ray_private import announce_loss, write_no_address_file

_ADDRESS: dict[str, Any] = {"node_ip_address": cluster.LOOPBACK}


class Machines:
    """A head without CPUs, and machines with `cpus` each, on loopback.

    Attributes:
        variables: the environment of jobs that join the cluster.
    """

    def __init__(self, count: int, cpus: float = 1) -> None:
        write_no_address_file()
        ray_private.stay_on_loopback()
        port = cluster.free_port()
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_host": cluster.LOOPBACK, "dashboard_port": port}
        self._cluster = Cluster(initialize_head=True, head_node_args=head | _ADDRESS)
        self._cpus, self._machines = cpus, list[Any]()
        for _ in range(count):
            self.add()
        self.variables = os.environ | {
            "RAY_ADDRESS": str(self._cluster.address),
            "RAY_API_SERVER_ADDRESS": f"http://{cluster.LOOPBACK}:{port}",
        }
        self.variables.pop("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", None)  # which other tests shorten

    def add(self) -> None:
        self._machines.append(self._cluster.add_node(num_cpus=self._cpus, **_ADDRESS))

    def lose(self) -> None:
        """Kill all processes of the newest machine at once."""
        node = self._machines.pop()
        _signal(_processes(node), signal.SIGKILL)
        self._cluster.remove_node(node, allow_graceful=False)

    def log(self) -> str:
        """What the raylets, Ray's process on each machine, have logged."""
        folder = Path(self._cluster.head_node.get_logs_dir_path())
        return "".join(file.read_text() for file in folder.glob("raylet*"))

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop all processes of the newest machine while the block runs."""
        processes = _processes(self._machines[-1])
        _signal(processes, signal.SIGSTOP)
        try:
            yield
        finally:
            _signal(processes, signal.SIGCONT)

    def announce_loss(self, seconds: int) -> None:
        """Tell the cluster that the newest machine will be lost in so many seconds."""
        announce_loss(str(self._cluster.address), self._machines[-1].node_id, seconds)

    @contextmanager
    def slow(self, share: float) -> Iterator[None]:
        """Let the newest machine work for this share of each second only while the block runs."""
        ended = threading.Event()

        def pace() -> None:
            while not ended.is_set():
                with self.frozen():
                    time.sleep(1 - share)
                ended.wait(share)

        thread = threading.Thread(target=pace)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def shutdown(self) -> None:
        self._cluster.shutdown()


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with suppress(psutil.NoSuchProcess):
            process.send_signal(number)


def _processes(node: Any) -> list[psutil.Process]:
    """The processes of a machine: those that were started for it, and their children."""
    pids = [info.process.pid for infos in node.all_processes.values() for info in infos]
    started = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    return [*started, *(child for process in started for child in process.children(recursive=True))]


@contextmanager
def machines(count: int, cpus: float = 1) -> Iterator[Machines]:
    cluster = Machines(count, cpus)
    try:
        yield cluster
    finally:
        cluster.shutdown()
