"""The last exchanges of each rank: what is kept, when it is written, and that it does no harm."""

from __future__ import annotations

import json
import os
import signal
import warnings

import pytest
import torch
from torch import nn

import syncbn
from support.in_threads import attempts, in_threads
from support.mpijob import needs_mpi
from support.scripts import execute
from syncbn.comm import tracing
from syncbn.diagnose import desync

WIDTH = 4


def model(group=None):
    layers = {name: nn.BatchNorm1d(WIDTH) for name in ("first", "second")}
    return syncbn.convert(nn.ModuleDict(layers), group)


def step(layers, *names):
    for name in names:
        layers[name](torch.randn(3, WIDTH)).sum()


def read(path):
    return json.loads(path.read_text())


def kept(content, rank=0, engine=""):
    """The words and outcomes of one rank's calls."""
    comms = enumerate(content["communicators"])
    own = [at for at, one in comms if one["rank"] == rank and engine in ("", one["engine"])]
    found = [each for each in content["exchanges"] if each["communicator"] in own]
    for each in found:
        assert each["began"] <= (each["ended"] or content["written"])
    return [(each["call"], each["words"], each["outcome"]) for each in found]


def forward(layer):
    return f"all_gather of (9,) float64, forward of layer '{layer}' ({WIDTH} channels)"


def test_ranks_out_of_step_are_written(tmp_path):
    def out_of_step(comm):
        layers = model(comm)
        step(layers, "first")
        step(layers, "second" if comm.rank else "first")

    with syncbn.trace(tmp_path / "new"):
        found = attempts(2, out_of_step)
        content = read(tmp_path / "new/rank-0.json")
    assert all(isinstance(error, syncbn.DesyncError) for error in found)
    assert content["why"].startswith("DesyncError: ")
    for rank, layer in enumerate(("first", "second")):
        done, failed = kept(content, rank)
        assert done == (1, forward("first"), "done")
        assert failed[0] == 2
        assert failed[1].startswith(forward(layer))
        assert failed[2] == f"failed: DesyncError: {found[rank]}"


def test_what_only_flags_tell_is_in_words(tmp_path):
    def with_and_without(comm):
        layer = model(comm)["first"]
        with torch.set_grad_enabled(comm.rank == 0):
            layer(torch.randn(3, WIDTH, requires_grad=True))

    with syncbn.trace(tmp_path):
        found = attempts(2, with_and_without)
    content = read(tmp_path / "rank-0.json")
    words = {rank: kept(content, rank)[0][1] for rank in range(2)}
    assert words == found[0].ranks
    assert words[0].endswith("gradients wanted")
    assert words[0] != words[1]


def test_the_last_thousand_are_kept(tmp_path):
    def many(comm):
        for _ in range(505):
            comm.all_reduce(torch.ones(1))

    with syncbn.trace(tmp_path):
        in_threads(2, many)
    content = read(tmp_path / "rank-0.json")
    assert len(content["exchanges"]) == 1000
    assert [one["calls"] for one in content["communicators"]] == [505, 505]
    assert kept(content, 1)[-1][0] == 505


def test_nothing_is_kept_before_and_after_a_block(tmp_path):
    def one(comm):
        comm.all_reduce(torch.ones(1))

    handlers = [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    in_threads(2, one)
    assert not tracing.active
    with syncbn.trace(tmp_path / "outer") as outer, syncbn.trace(tmp_path / "inner") as inner:
        in_threads(2, one)
        assert inner.write() == tmp_path / "inner/rank-0.json"
    in_threads(2, one)
    assert [len(read(each.write())["exchanges"]) for each in (outer, inner)] == [0, 2]
    assert not tracing.active
    assert handlers == [signal.getsignal(number) for number in (signal.SIGUSR1, signal.SIGTERM)]
    assert [path.name for path in tmp_path.glob("*/*")] == ["rank-0.json"] * 2
    assert syncbn.trace(None).write() is None


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write traces to '.*file/inside'"):
        syncbn.trace(tmp_path / "file/inside")


def test_a_folder_that_is_lost_is_no_reason_to_stop(tmp_path):
    def out_of_step(comm):
        for _ in range(2):
            with pytest.raises(syncbn.DesyncError):
                comm.all_reduce(torch.ones(1 + comm.rank))

    folder = tmp_path / "folder"
    with warnings.catch_warnings(record=True) as said, syncbn.trace(folder):
        warnings.simplefilter("always")
        folder.rmdir()
        folder.touch()
        in_threads(2, out_of_step)
    (only,) = said
    assert "syncbn.trace: cannot write" in str(only.message)


def test_it_is_written_at_exit(tmp_path, monkeypatch):
    """Of a process that multiprocessing has not started; below, of those."""
    at_exit = []
    monkeypatch.setattr("atexit.register", at_exit.append)
    with syncbn.trace(tmp_path):
        in_threads(2, lambda comm: comm.all_reduce(torch.ones(1)))
        assert list(tmp_path.iterdir()) == []
        at_exit[0]()
        content = read(tmp_path / "rank-0.json")
    assert content["why"] == "exit"
    assert len(content["exchanges"]) == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_leaves_its_parents_file_alone(tmp_path):
    with syncbn.trace(tmp_path) as trace:
        in_threads(2, lambda comm: comm.all_reduce(torch.ones(1)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
            child = os.fork()
        if child == 0:
            os._exit(trace.write() is not None)
        assert os.waitpid(child, 0)[1] == 0
    assert read(tmp_path / "rank-0.json")["pid"] == os.getpid()


def traced_ranks(ranks, size, folder, function):
    """``function(rank)`` while ranks are traced; the files' contents."""

    def traced(rank):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with syncbn.trace(folder):
                function(rank)
        return [str(each.message) for each in said]

    said = ranks(size, traced)
    return [read(folder / f"rank-{rank}.json") for rank in range(size)], said


def out_of_step_in(group):
    layers = model(group)
    step(layers, "first")
    with pytest.raises(syncbn.DesyncError):
        step(layers, "second" if syncbn.comm.resolve(group).rank else "first")


def check_processes(contents, capsys, folder, engine):
    for rank, content in enumerate(contents):
        (own,) = (one for one in content["communicators"] if one["engine"] == engine)
        assert (own["rank"], own["size"]) == (rank, len(contents))
        assert own["members"] == list(range(len(contents)))
        layer = "second" if rank else "first"
        (first, *_, done), (second, words, failed) = kept(content, rank, engine)
        assert (first, done, second) == (1, "done", 2)
        assert words.startswith(forward(layer))
        assert failed.startswith("failed: DesyncError: ")
    assert desync.show(folder, last=5, as_json=False) == desync.DIFFER
    assert "FIRST DIFFERENCE in call 2: ranks make different calls" in capsys.readouterr().out


def test_processes(ranks, tmp_path, capsys):
    contents, said = traced_ranks(
        ranks, 2, tmp_path, lambda rank: out_of_step_in(torch.distributed.new_group())
    )
    check_processes(contents, capsys, tmp_path, "ProcessGroup")
    # faulthandler has it, to show the stacks of a test that hangs.
    assert all("SIGUSR1 has a handler that is not Python's" in texts[0] for texts in said)


def test_shared_memory(ranks, tmp_path, capsys):
    contents, _ = traced_ranks(
        ranks, 2, tmp_path, lambda rank: out_of_step_in(syncbn.comm.SharedMemory())
    )
    check_processes(contents, capsys, tmp_path, "SharedMemory")


@needs_mpi
def test_mpi(mpi_ranks, tmp_path, capsys):
    contents, _ = traced_ranks(
        mpi_ranks, 3, tmp_path, lambda rank: out_of_step_in(syncbn.comm.MPI())
    )
    check_processes(contents, capsys, tmp_path, "MPI")


def test_a_rank_that_gives_a_call_up_says_so(ranks, tmp_path, capsys):
    def refused(rank):
        layers = model(torch.distributed.new_group())
        step(layers, "first")
        with pytest.raises((ValueError, RuntimeError)):
            layers["second"](torch.randn(3, WIDTH + rank))

    contents, _ = traced_ranks(ranks, 2, tmp_path, refused)
    waited, gave_up = (kept(content, rank)[-1] for rank, content in enumerate(contents))
    assert waited[:2] == (2, forward("second"))
    assert "rank 1 gave up in call 2: ValueError: sync_batch_norm: expected" in waited[2]
    assert gave_up[:2] == (2, "no call")
    assert gave_up[2].startswith("gave up: ValueError: sync_batch_norm: expected")
    assert desync.show(tmp_path, last=5, as_json=False) == desync.DIFFER
    assert "in call 2: rank 1 gave it up, rank 0 waited" in capsys.readouterr().out


def test_messages_without_frames_are_seen(ranks, tmp_path):
    """As NCCL's, which no header precedes."""

    def on_a_device(rank):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(syncbn.comm.ProcessGroup, "_takes_frames", lambda *_: False)
            layer = model(torch.distributed.new_group())["first"]
            layer(torch.randn(3, WIDTH, requires_grad=True)).sum().backward()

    contents, _ = traced_ranks(ranks, 2, tmp_path, on_a_device)
    for content in contents:
        (comm,) = content["communicators"]
        assert comm["engine"] == "ProcessGroup, on a device"
        (first, forwards, done), (second, backwards, _) = kept(content, comm["rank"])
        assert (first, second, done) == (1, 2, "done")
        assert "forward of layer 'first'" in forwards
        assert "backward of layer 'first'" in backwards


SIGNALLED = """
import json, os, pathlib, signal, sys, time
import torch, torch.distributed as dist
import syncbn
folder = pathlib.Path(os.environ["SYNCBN_TRACE"])
dist.init_process_group("gloo")
signal.signal(signal.SIGUSR1, lambda *_: print("the earlier handler"))
rank, layer = dist.get_rank(), syncbn.SyncBatchNorm(4)
def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
layer(torch.randn(3, 4))
store = dist.distributed_c10d._get_default_store()
file = folder / "rank-0.json"
if rank == 0:
    store.set("process", str(os.getpid()))
else:
    other = int(store.get("process"))
    assert not file.exists()
    def asked():
        os.kill(other, signal.SIGUSR1)
        return file.exists() and json.loads(file.read_text())["exchanges"][-1]["call"] == 2
    until(asked)
    (folder.parent / "asked.json").write_text(file.read_text())
layer(torch.randn(3, 4))
dist.destroy_process_group()
if rank == 0:
    os.kill(os.getpid(), signal.SIGTERM)
"""


def test_signals_and_the_end(tmp_path, capsys):
    """In programs of their own, by the environment."""
    first, second = execute(SIGNALLED, ranks=2, SYNCBN_TRACE=str(tmp_path / "traces"))
    assert second.code == 0, second.stderr
    assert first.code == -signal.SIGTERM, first.stderr
    assert "the earlier handler" in first.stdout
    asked = read(tmp_path / "asked.json")
    assert asked["why"] == "SIGUSR1"
    assert [outcome for *_, outcome in kept(asked)] == ["done", "in flight"]
    whys = [read(tmp_path / f"traces/rank-{rank}.json")["why"] for rank in range(2)]
    assert whys == ["SIGTERM", "exit"]
    assert desync.show(tmp_path / "traces", last=5, as_json=False) == desync.AGREE
    assert "ranks agree in calls 1 to 2" in capsys.readouterr().out


WRONG = """
import warnings
from concurrent.futures import ThreadPoolExecutor
import torch, syncbn
def train(comm):
    with comm:
        return syncbn.SyncBatchNorm(3, process_group=comm)(torch.randn(2, 3))
with warnings.catch_warnings(record=True) as said, ThreadPoolExecutor(2) as pool:
    warnings.simplefilter("always")
    for _ in range(2):
        list(pool.map(train, syncbn.comm.threads(2)))
(only,) = said
print(only.message)
"""


def test_a_variable_that_names_no_folder_is_a_warning(tmp_path):
    (tmp_path / "file").touch()
    (ended,) = execute(WRONG, SYNCBN_TRACE=str(tmp_path / "file"))
    assert ended.code == 0, ended.stderr
    assert ended.stdout.startswith("SYNCBN_TRACE: cannot write traces to ")
    assert ended.stdout.endswith("; nothing is traced\n")
