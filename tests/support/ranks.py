"""Long-lived worker processes, one per rank, that run functions sent to them.

Worlds are started once per test session and reused: hundreds of multi-rank cases cost milliseconds
each. A call has a timeout; a rank that raises, hangs or dies fails the test with every rank's
traceback, and the world is replaced by a fresh one.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import cloudpickle

from support.processes import CONTEXT

GRACE = 5.0  # seconds that the other ranks get after the first failure


class RankFailure(AssertionError):
    """At least one rank raised, hung or died; the message holds every rank's traceback."""


class World:
    """``size`` processes joined in a gloo group."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="syncbn-ranks-")
        self._processes, self._connections = [], []
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe()
            process = CONTEXT.Process(
                target=_serve, args=(rank, size, theirs, self._folder.name), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """``function(rank, *args)`` on every rank; the results in the order of ranks."""
        message = cloudpickle.dumps((function, args))
        for connection in self._connections:
            connection.send_bytes(message)
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + timeout
        while len(answers) < self.size and (left := deadline - time.monotonic()) > 0:
            pending = {c: r for r, c in enumerate(self._connections) if r not in answers}
            for connection in wait(list(pending), left):
                rank = pending[connection]
                answers[rank] = self._receive(rank)
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + GRACE)
        if len(answers) == self.size and all(good for good, _ in answers.values()):
            return [answers[rank][1] for rank in range(self.size)]
        hanging = [rank for rank in range(self.size) if rank not in answers]
        for rank in hanging:
            os.kill(self._processes[rank].pid, signal.SIGUSR1)
        for rank in hanging:  # it writes its stacks, then it ends
            self._processes[rank].join(GRACE)
        report = [self._describe(rank, answers, timeout) for rank in range(self.size)]
        for process in self._processes:
            process.kill()
        self.close()
        raise RankFailure("\n".join(report))

    @property
    def alive(self) -> bool:
        return all(process.is_alive() for process in self._processes)

    def close(self) -> None:
        """The ranks end by themselves, as their connections do; who doesn't is killed."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.join(GRACE)
            process.kill()
            process.join()
        self._folder.cleanup()

    def _receive(self, rank: int) -> tuple[bool, Any]:
        try:
            return cloudpickle.loads(self._connections[rank].recv_bytes())
        except (EOFError, OSError):
            self._processes[rank].join(GRACE)
            return False, f"died with exit code {self._processes[rank].exitcode}"

    def _describe(self, rank: int, answers: dict[int, tuple[bool, Any]], timeout: float) -> str:
        if rank in answers:
            good, value = answers[rank]
            return f"--- rank {rank}: {'finished' if good else value}"
        stacks = _stacks(self._folder.name, rank).read_text()
        waited = f"{timeout:g} s, or {GRACE:g} s after the first failure"
        return f"--- rank {rank}: no answer after {waited}\n{stacks}"


def _stacks(folder: str, rank: int) -> Path:
    return Path(folder, f"stacks-{rank}")


def _serve(rank: int, size: int, connection: Connection, folder: str) -> None:
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=size
    )
    serve(rank, connection, folder)


def serve(rank: int, connection: Connection, folder: str) -> None:
    """Answer calls until the connection closes; on SIGUSR1 write stacks to ``folder`` and end."""
    stacks = _stacks(folder, rank).open("w")
    faulthandler.register(signal.SIGUSR1, file=stacks, all_threads=True, chain=True)
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            message = connection.recv_bytes()
        except EOFError:
            return
        try:
            torch.manual_seed(0)
            function, args = cloudpickle.loads(message)
            answer = (True, function(rank, *args))
        except BaseException:
            answer = (False, traceback.format_exc())
        connection.send_bytes(cloudpickle.dumps(answer))


class Worlds:
    """Worlds by size, started when first asked for and replaced when broken."""

    def __init__(self, kind: type[World] = World) -> None:
        self._kind = kind
        self._worlds: dict[int, World] = {}

    def __call__(
        self, size: int, function: Callable[..., Any], *args: Any, timeout: float = 60
    ) -> list[Any]:
        """``function(rank, *args)`` on each of ``size`` ranks; see :meth:`World.run`."""
        world = self._worlds.get(size)
        if world is None or not world.alive:
            world = self._worlds[size] = self._kind(size)
        return world.run(function, *args, timeout=timeout)

    def close(self) -> None:
        for world in self._worlds.values():
            world.close()
