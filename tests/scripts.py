"""Runs scripts in processes of their own."""

from __future__ import annotations

import os
import runpy
import socket
import warnings
from pathlib import Path

from processes import CONTEXT


def run_script(path: Path, ranks: int = 1, timeout: float = 120) -> None:
    """On every rank, in its folder, with torchrun's variables. Fails with what they wrote."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    logs = [path.parent / f"rank-{rank}.log" for rank in range(ranks)]
    running = [
        CONTEXT.Process(target=_run, args=(path, rank, ranks, port, log), daemon=True)
        for rank, log in enumerate(logs)
    ]
    for process in running:
        process.start()
    for process in running:
        process.join(timeout)
        process.kill()
        process.join()
    said = "\n".join(log.read_text() for log in logs if log.exists())
    assert [process.exitcode for process in running] == [0] * ranks, said


def _run(path: Path, rank: int, ranks: int, port: int, log: Path) -> None:
    with log.open("w") as file:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks}
    own |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in own.items() if ranks > 1})
    os.chdir(path.parent)
    if ranks == 1:
        warnings.simplefilter("error", UserWarning)
    runpy.run_path(str(path), run_name="__main__")
