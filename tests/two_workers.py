"""Two processes that train together over gloo, for all tests of a session: starting them takes seconds."""

from __future__ import annotations

import io
import multiprocessing
import os
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


class TwoWorkers:
    """Runs a function in both processes, which find each other through a file in `folder`."""

    def __init__(self, folder: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._connections: list[Connection] = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, f"file://{folder}/meet", theirs), daemon=True)
            process.start()
            theirs.close()
            self._connections.append(ours)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What `function(rank, *arguments)`, a function of a module, returns in each process.

        The results may hold tensors and plain Python values only.
        """
        for connection in self._connections:
            connection.send((function, arguments))
        answers = [connection.recv() for connection in self._connections]
        for rank, (failed, answer) in enumerate(answers):
            assert not failed, f"worker {rank} failed:\n{answer.decode()}"
        return [torch.load(io.BytesIO(answer), weights_only=True) for _, answer in answers]

    def stop(self) -> None:
        for connection in self._connections:
            connection.close()  # ends the process


def _serve(rank: int, meet: str, connection: Connection) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1"}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=2)
    while True:
        try:
            function, arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = io.BytesIO()
            torch.save(function(rank, *arguments), answer)
            connection.send((False, answer.getvalue()))
        except BaseException:
            connection.send((True, traceback.format_exc().encode()))
