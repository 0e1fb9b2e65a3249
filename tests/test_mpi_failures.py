"""What ends an MPI job, and what syncbn.comm.MPI refuses: programs of their own under mpiexec."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from mpijob import execute, needs_mpi
from ranks import RankFailure

FINISHED = """
import syncbn
from mpi4py import MPI
MPI.Finalize()
try:
    syncbn.comm.MPI()
except RuntimeError as error:
    print(error)
"""


@needs_mpi
def test_mpi_must_be_running():
    ended = execute(1, "-c", FINISHED)
    assert "expected a running MPI, but it was finalised; call mpi4py.MPI.Init()" in ended.stdout


LEVEL = """
import sys, threading, mpi4py, torch
mpi4py.rc.thread_level = sys.argv[1]
import syncbn
comm = syncbn.comm.MPI()
comm.all_gather(torch.ones(3))
def call():
    try:
        print(f"total {comm.all_reduce(torch.ones(1)).item()}\\n", end="")
    except RuntimeError as error:
        print(f"{error}\\n", end="")
thread = threading.Thread(target=call)
thread.start()
thread.join()
"""


@needs_mpi
@pytest.mark.parametrize("level", ["funneled", "serialized"])
def test_calls_from_other_threads_need_a_level(level):
    ended = execute(2, "-c", LEVEL, level)
    assert ended.code == 0, ended.stderr
    if level == "funneled":
        assert "rank 1 expected a call from the thread that initialised MPI" in ended.stdout
        assert "thread_level = 'multiple'" in ended.stdout
    else:
        assert ended.stdout.split() == ["total", "2.0"] * 2


LEAVES = """
import os, signal, torch, syncbn
comm = syncbn.comm.MPI()
comm.all_gather(torch.ones(3))
if comm.rank == 1:
    {leave}
comm.all_gather(torch.ones(3))
print("went on")
"""


@pytest.mark.parametrize(
    "leave",
    ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(3)", "raise RuntimeError('out of data')"],
)
def test_a_peer_that_is_gone_ends_the_job(mpi_ranks, leave):
    ended = execute(2, "-m", "mpi4py", "-c", LEAVES.format(leave=leave), timeout=60)
    assert ended.code != 0
    assert "went on" not in ended.stdout
    if "raise" in leave:
        assert "out of data" in ended.stderr


EARLY = """
import time, torch, syncbn
comm = syncbn.comm.MPI(timeout=3)
comm.all_gather(torch.ones(3))
if comm.rank == 0:
    waited = []
    for _ in range(2):
        start = time.monotonic()
        try:
            comm.{call}(torch.ones(3))
        except RuntimeError as error:
            print(error, flush=True)
        waited.append(time.monotonic() - start)
    assert waited[1] < waited[0] / 2, "the second call waits as well"
    raise SystemExit("done")
"""


@needs_mpi
@pytest.mark.parametrize("call", ["all_gather", "all_reduce"])
def test_a_peer_that_ends_early_ends_the_call(call):
    ended = execute(2, "-m", "mpi4py", "-c", EARLY.format(call=call), timeout=60)
    assert ended.stdout.count(f"MPI: {call}: rank 0 of 2 waited 3 s for other ranks; every") == 2
    assert "syncbn.until_all_done(loader, comm)" in ended.stdout
    assert ended.code != 0
    assert "done" in ended.stderr


WITHOUT = """
import sys
import syncbn
assert "mpi4py" not in sys.modules, "importing syncbn imports mpi4py"
if sys.argv[1:]:
    sys.path.insert(0, sys.argv[1])
else:
    sys.modules["mpi4py"] = None
try:
    syncbn.comm.MPI()
except ImportError as error:
    print(error)
"""


def said_without(*arguments):
    command = [sys.executable, "-c", WITHOUT, *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=True).stdout


def test_without_mpi4py_there_is_a_remedy():
    assert said_without() == "MPI: needs mpi4py; run pip install 'syncbn[mpi]'\n"


def test_without_an_mpi_library_there_is_a_remedy(tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py/__init__.py").touch()
    (tmp_path / "mpi4py/MPI.py").write_text("raise RuntimeError('no libmpi.so')")
    said = said_without(str(tmp_path))
    assert said.startswith("MPI: mpi4py found no MPI library (no libmpi.so); install one")


def test_a_rank_that_dies_fails_its_test(mpi_ranks):
    with pytest.raises(RankFailure, match="rank 0: died with exit code 3"):
        mpi_ranks(1, lambda rank: os._exit(3))
    assert mpi_ranks(1, lambda rank: rank) == [0]
