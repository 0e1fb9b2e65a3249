"""MPI jobs for tests: programs under mpiexec, and long-lived ranks that run functions."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection
from pathlib import Path
from typing import Any

import pytest

from support.ranks import GRACE, World, serve
from support.scripts import Ended

START = 120.0  # seconds that ranks may take to import torch, on a busy machine
# Variables of a job around the tests would make mpiexec take part in it.
AROUND = ("HYDRA_", "MPI", "OMPI_", "PBS_", "PMI", "PRTE_", "SLURM_")
# Processes of this machine, more than it has cores if need be, whoever runs the tests.
OWN = {
    "HYDRA_LAUNCHER": "fork",
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
}


def mpiexec() -> str | None:
    """Beside this Python, where pip puts it, or on PATH."""
    beside = shutil.which("mpiexec", path=str(Path(sys.executable).parent))
    return beside or shutil.which("mpiexec")


def missing() -> str:
    """What keeps MPI jobs from running here, if anything does."""
    if importlib.util.find_spec("mpi4py") is None:
        return "mpi4py is not installed: pip install 'syncbn[mpi]'"
    return "" if mpiexec() else "no mpiexec beside Python or on PATH: pip install mpich"


needs_mpi = pytest.mark.skipif(bool(missing()), reason=missing())


def start(size: int, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """``mpiexec -n size python arguments``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(AROUND)}
    path = os.pathsep.join(entry for entry in sys.path if entry)
    return subprocess.Popen(
        [str(mpiexec()), "-n", str(size), sys.executable, *arguments],
        env=kept | OWN | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.DEVNULL,
        text=True,
        **options,
    )


def end(job: subprocess.Popen[str]) -> None:
    """Let mpiexec end its processes; should it be killed, they go too."""
    job.terminate()
    try:
        job.wait(GRACE)
    except subprocess.TimeoutExpired:
        job.kill()
        job.wait()


def remove_segments(since: float) -> None:
    """Remove what MPICH left in /dev/shm since then: its jobs that are killed leave it there."""
    left = {str(path): path for path in Path("/dev/shm").glob("mpich_shm_*")}
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):
            used = maps.read_text()
            for name in [name for name in left if name in used]:
                del left[name]
    for path in left.values():
        with contextlib.suppress(OSError):
            found = path.stat()
            if found.st_uid == os.getuid() and found.st_ctime >= since:
                path.unlink()


def execute(size: int, *arguments: str, timeout: float = 80) -> Ended:
    """Run ``python arguments`` on ``size`` ranks to its end."""
    with start(size, *arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as job:
        try:
            said = job.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            end(job)
            pytest.fail(f"no end within {timeout:g} s\n{''.join(job.communicate())}")
    return Ended(job.returncode, *said)


@dataclass
class Rank:
    """One process of a job, as a World sees it: MPI ends all of them with any of them."""

    pid: int
    job: subprocess.Popen[str]

    @property
    def exitcode(self) -> int | None:
        return self.job.poll()

    def is_alive(self) -> bool:
        return self.exitcode is None

    def kill(self) -> None:
        end(self.job)

    def join(self, timeout: float | None = None) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.job.wait(timeout)


class Job(World):
    """``size`` processes under mpiexec, without torch.distributed."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._folder = tempfile.TemporaryDirectory(prefix="syncbn-mpi-")
        folder = Path(self._folder.name)
        said = folder / "said"
        with socket.socket(socket.AF_UNIX) as listener, said.open("w") as stream:
            listener.bind(str(folder / "socket"))
            listener.listen(size)
            listener.settimeout(0.5)
            program = ("-m", "mpi4py", "-m", __name__, str(folder))
            job = start(size, *program, stdout=stream, stderr=subprocess.STDOUT)
            met = {}
            for _ in range(size):
                connection = _accepted(listener, job, said)
                rank, pid = connection.recv()
                met[rank] = connection, Rank(pid, job)
        self._connections, self._processes = zip(*(met[r] for r in range(size)), strict=True)

    def _describe(self, rank: int, *args: Any) -> str:
        said = Path(self._folder.name, "said").read_text() if rank == self.size - 1 else ""
        return f"{super()._describe(rank, *args)}\n{said}"


def _accepted(listener: socket.socket, job: subprocess.Popen[str], said: Path) -> Connection:
    deadline = time.monotonic() + START
    while job.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(TimeoutError):
            return Connection(listener.accept()[0].detach())
    job.kill()
    pytest.fail(
        f"mpiexec started no ranks, code {job.poll()}, within {START:g} s\n{said.read_text()}"
    )


def _answer(folder: str) -> None:
    import torch  # noqa: F401  before the first call's clock runs
    from mpi4py import MPI

    rank = MPI.COMM_WORLD.rank
    connection = Client(str(Path(folder, "socket")), "AF_UNIX")
    connection.send((rank, os.getpid()))
    serve(rank, connection, folder)
    MPI.Finalize()
    os._exit(0)  # without an interpreter's end, a second of each: as multiprocessing's children


if __name__ == "__main__":
    _answer(sys.argv[1])
