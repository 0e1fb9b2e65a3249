"""Processes that are ranks on this machine: start them, hear from them, leave none behind.

Not torch.multiprocessing.spawn: that blocks, reports whichever dead rank it finds first (often
one that merely lost its peer), and leaves traceback files in the temporary directory.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import pickle
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from datetime import timedelta
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist

Worker = Callable[[int, Any, Path, Callable[[Any], None]], Any]
_SECONDS_BETWEEN_LOOKS = 0.1
_LINES_OF_LOG = 20


class RankFailed(Exception):
    """A rank raised, was killed or left early. The text: which and how, then its traceback."""


class RanksTimedOut(RankFailed):
    """The ranks had not ended in time, and have been ended."""


def launch(
    worker: Worker,
    task: Any,
    *,
    ranks: int,
    on_message: Callable[[Any], None],
    folder: Path | None = None,
    timeout: float | None = None,
) -> Any:
    """Run ``worker(rank, task, folder, send)`` in ``ranks`` processes; rank 0's result.

    Every process has one thread of torch's and the same ``folder``: a temporary one, or one that
    the caller reads and removes (which ranks do where the caller is killed). What rank 0 gives to
    ``send`` (a few hundred bytes) reaches ``on_message`` here. Call it from the main thread.

    Raises:
        RankFailed: a rank did not end well; all others have been ended.
        RanksTimedOut: some rank had not ended after ``timeout`` seconds; all have been ended.
        KeyboardInterrupt, SystemExit: SIGINT, SIGTERM to this process; all ranks have been ended.
    """
    spawn = multiprocessing.get_context("spawn")
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    used = nullcontext(folder) if folder else tempfile.TemporaryDirectory(prefix="syncbn-")
    with _noted_signals() as noted, used as name:
        folder = Path(name)
        # By a file: a large argument would make each start wait for the previous rank's imports.
        _write(folder / "task", (worker, task))
        receiver, sender = spawn.Pipe(duplex=False)
        processes = [
            spawn.Process(
                target=_rank_main, args=(rank, folder, None if rank else sender), daemon=True
            )
            for rank in range(ranks)
        ]
        try:
            _start(processes)
            sender.close()  # rank 0's copy is the last: its end shows as the end of the pipe
            for looked in _watch(processes, receiver, on_message, folder):
                if noted:
                    _raise_for(noted[0])
                if looked > deadline:
                    raise RanksTimedOut(f"no result after {timeout:g} s")
            return pickle.loads((folder / "result").read_bytes())
        finally:
            _end(processes)
            receiver.close()


@contextmanager
def joined(
    rank: int, ranks: int, meeting: Path, *, timeout: float, gpu: torch.device | None = None
) -> Iterator[None]:
    """In a rank: the default group, over gloo, or NCCL with a GPU each, who meet at a file."""
    if sys.platform == "linux":
        # One machine only: nothing needs to be open to the network, or to resolve a host name.
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if gpu else "gloo",
        init_method=meeting.as_uri(),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(seconds=timeout),
        device_id=gpu,
    )
    yield
    # Not after a failure, when they might wait for ever. Who leaves before all have met ends them.
    dist.barrier()
    dist.destroy_process_group()


@contextmanager
def _noted_signals() -> Iterator[list[int]]:
    """Notes SIGINT and SIGTERM instead of raising, so that no step of starting or ending is cut."""
    noted: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: noted.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _start(processes: list[Any]) -> None:
    # Ctrl-C reaches the whole process group; the ranks leave it to their parent to end them,
    # without a traceback each. A blocked signal stays blocked in what is started now.
    # The tracker first: the first start() would start it, and that unblocks SIGINT again.
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        for process in processes:
            process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end(processes: list[Any]) -> None:
    started = [process for process in processes if process.pid is not None]
    for process in started:
        process.kill()  # nothing to save, and a rank inside a collective hears nothing gentler
    for process in started:
        process.join()


def _watch(
    processes: list[Any],
    receiver: Connection,
    on_message: Callable[[Any], None],
    folder: Path,
) -> Iterator[float]:
    """Yields the time of each look, until all have ended well and all messages are handed on."""
    running = {process.sentinel: process for process in processes}
    listening: list[Connection] = [receiver]
    while running or listening:
        for ready in wait([*listening, *running], timeout=_SECONDS_BETWEEN_LOOKS):
            if isinstance(ready, Connection):
                try:
                    on_message(receiver.recv())
                except EOFError:
                    listening.clear()
            else:
                assert isinstance(ready, int)
                running.pop(ready).join()
        yield time.monotonic()
        if any(process.exitcode not in (None, 0) for process in processes):
            raise RankFailed(_cause([process.exitcode for process in processes], folder))
    if not (folder / "result").exists():  # something called os._exit(0)
        raise RankFailed(f"rank 0 left with exit status 0 before its end{_log(0, folder)}")


def _raise_for(number: int) -> NoReturn:
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    raise SystemExit(128 + number)


def _cause(exit_codes: list[int | None], folder: Path) -> str:
    """The first failure. Ranks that lost their peer fail as well, always later."""
    for rank, code in enumerate(exit_codes):
        if code is not None and code < 0:
            return f"rank {rank} was ended by {_signal_name(-code)}{_log(rank, folder)}"
    failure = folder / "failure"
    if failure.exists():
        return failure.read_text(encoding="utf-8").rstrip()
    rank, code = next((rank, code) for rank, code in enumerate(exit_codes) if code)
    return f"rank {rank} left with exit status {code}{_log(rank, folder)}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _log(rank: int, folder: Path) -> str:
    log = folder / f"log-{rank}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    return "\n".join(["", *lines[-_LINES_OF_LOG:]]) if lines else ""


def _rank_main(rank: int, folder: Path, sender: Connection | None) -> None:
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    # gloo prints on standard output, torch warns on standard error: neither is for the reader of
    # a table, or of JSON. It is shown when the rank dies without a traceback.
    with (folder / f"log-{rank}").open("wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
    code = 1
    try:
        worker, task = pickle.loads((folder / "task").read_bytes())
        result = worker(rank, task, folder, sender.send if sender else lambda _: None)
        if rank == 0:
            _write(folder / "result", result)
        code = 0
    except (Exception, SystemExit) as error:  # sys.exit(0) is no good end either
        _write_failure(rank, folder, error)
    # Without the interpreter's shutdown, which has nothing left to save: after a failure it may
    # wait for a stuck process group, and after success torch 2.13 aborted there now and then.
    os._exit(code)


def _end_with_parent(folder: Path) -> None:
    """Even a parent that was killed leaves no rank and no file."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _write_failure(rank: int, folder: Path, error: BaseException) -> None:
    # In one line what it is, for who shows no more; below it the traceback.
    what = " ".join("".join(traceback.format_exception_only(error)).split())
    text = f"rank {rank} failed: {what}\n{traceback.format_exc()}"
    mine = folder / f"failure-{rank}"
    mine.write_text(text, encoding="utf-8")
    with suppress(FileExistsError):  # the first rank's stays
        os.link(mine, folder / "failure")


def _write(path: Path, content: Any) -> None:
    path.write_bytes(pickle.dumps(content))
