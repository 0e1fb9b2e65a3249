"""What ends an MPI job, and what syncbn.comm.MPI refuses: programs of their own under mpiexec."""

from __future__ import annotations

from functools import cache

import pytest

from support import scripts
from support.mpijob import execute, needs_mpi

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
mpi4py.MPI.Finalize()
try:
    syncbn.comm.MPI()
except RuntimeError as error:
    print(f"{error}\\n", end="")
"""


@cache
def job_of(level):
    return execute(2, "-c", LEVEL, level)


@needs_mpi
@pytest.mark.slow  # half a minute on a busy machine: all processes import torch
def test_mpi_must_be_running():
    finished = "expected a running MPI, but it was finalised; call mpi4py.MPI.Init()"
    assert job_of("serialized").stdout.count(finished) == 2


@needs_mpi
@pytest.mark.parametrize("level", ["funneled", pytest.param("serialized", marks=pytest.mark.slow)])
def test_calls_from_other_threads_need_a_level(level):
    ended = job_of(level)
    assert ended.code == 0, ended.stderr
    if level == "funneled":
        assert "rank 1 expected a call from the thread that initialised MPI" in ended.stdout
        assert "thread_level = 'multiple'" in ended.stdout
    else:
        assert ended.stdout.count("total 2.0") == 2


LEAVES = """
import os, signal, torch, syncbn
comm = syncbn.comm.MPI()
comm.all_gather(torch.ones(3))
if comm.rank == 1:
    {leave}
comm.all_gather(torch.ones(3))
print("went on")
"""


@needs_mpi
@pytest.mark.parametrize(
    "leave",
    [
        pytest.param("os.kill(os.getpid(), signal.SIGKILL)", marks=pytest.mark.slow),
        pytest.param("os._exit(3)", marks=pytest.mark.slow),
        "raise RuntimeError('out of data')",
    ],
)
def test_a_peer_that_is_gone_ends_the_job(leave):
    ended = execute(2, "-m", "mpi4py", "-c", LEAVES.format(leave=leave), timeout=60)
    assert ended.code != 0
    assert "went on" not in ended.stdout
    if "raise" in leave:
        assert "out of data" in ended.stderr


EARLY = """
import torch, syncbn
comms = {call: syncbn.comm.MPI() for call in ("all_gather", "all_reduce")}
for call, comm in comms.items():
    comm.all_gather(torch.ones(3))
for call, comm in comms.items():
    if comm.rank == 0:
        for comm.timeout in (1, 1000):  # the second call does not wait
            try:
                getattr(comm, call)(torch.ones(3))
            except RuntimeError as error:
                print(error, flush=True)
if comm.rank == 0:
    raise SystemExit("done")
"""


@pytest.fixture(scope="module")
def early():
    return execute(2, "-m", "mpi4py", "-c", EARLY, timeout=60)


@needs_mpi
@pytest.mark.parametrize("call", ["all_gather", "all_reduce"])
def test_a_peer_that_ends_early_ends_the_call(early, call):
    said = f"MPI: rank 0 of 2: {call}: rank 1 has not arrived within 1 s, the group's timeout"
    assert early.stdout.count(said) == 2
    assert "syncbn.until_all_done(loader, comm)" in early.stdout
    assert early.code != 0
    assert "done" in early.stderr


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
    (ended,) = scripts.execute(WITHOUT, *arguments)
    assert ended.code == 0, ended.stderr
    return ended.stdout


def test_without_mpi4py_there_is_a_remedy():
    assert said_without() == "MPI: needs mpi4py; run pip install 'syncbn[mpi]'\n"


def test_without_an_mpi_library_there_is_a_remedy(tmp_path):
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py/__init__.py").touch()
    (tmp_path / "mpi4py/MPI.py").write_text("raise RuntimeError('no libmpi.so')")
    said = said_without(str(tmp_path))
    assert said.startswith("MPI: mpi4py found no MPI library (no libmpi.so); install one")
