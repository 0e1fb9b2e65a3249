"""DataParallel refuses what it cannot do, and never waits for a replica that does not come."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncbn
from support.replicas import CPUS, images, nested
from syncbn.comm import LOCAL, Replica, ReplicaGroup


class Custom(Exception):
    pass


class Norms(nn.Module):
    """Each replica gets its number, in the values of its share."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = syncbn.SyncBatchNorm1d(2), syncbn.SyncBatchNorm1d(2)
        self.reached: list[int] = []

    def forward(self, x):
        x = self.run(int(x[0, 0]), x)
        self.reached.append(1)
        return x


def numbered():
    return torch.tensor([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])


def replicas():
    return [thread for thread in threading.enumerate() if thread.name.startswith("replica")]


def run(function, gradient=False):
    """Norms, with ``function(module, replica's number, x)`` as forward, over three replicas."""

    class Here(Norms):
        run = function

    module = Here()
    try:
        return syncbn.DataParallel(module, CPUS)(numbered().requires_grad_(gradient))
    finally:
        for thread in replicas():
            thread.join(10)
        assert not replicas(), "replicas are left waiting"


@pytest.mark.parametrize("failing", [0, 1, 2])
@pytest.mark.parametrize("error", [ValueError, KeyError, Custom, SystemExit])
@pytest.mark.parametrize("layers_before", [0, 1, 2])
def test_a_replicas_exception_is_raised_and_the_others_end(failing, error, layers_before):
    reached = []

    def forward(self, number, x):
        for layer in (self.one, self.two)[:layers_before]:
            x = layer(x)
        if number == failing:
            raise error("here it is")
        x = self.two(self.one(x))
        reached.append(number)
        return x

    with pytest.raises(error) as caught:
        run(forward)
    text = str(caught.value)
    assert f"{error.__name__} in replica {failing} on device cpu" in text
    assert "here it is" in text
    assert __file__ in text
    assert "in forward" in text
    assert not reached


def test_no_exception_of_a_model_keeps_the_others_waiting():
    def forward(self, number, x):
        if number == 1:
            raise ValueError("one")
        try:
            return self.one(x)
        except Exception:
            return x

    with pytest.raises(ValueError, match="one"):
        run(forward)


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_replica_that_skips_a_layer(missing):
    def forward(self, number, x):
        return self.one(x) if number == missing else self.two(self.one(x))

    with pytest.raises(RuntimeError) as caught:
        run(forward)
    text = str(caught.value)
    assert "expected all 3 replicas to meet at the same synchronised layer" in text
    for number in range(3):
        place = "done" if number == missing else "at layer 'two'"
        assert f"replica {number} on device cpu {place}" in text
    assert "run the same layers in the same order" in text
    assert "self.two(self.one(x))" in text


def test_replicas_in_different_orders():
    def forward(self, number, x):
        return self.two(self.one(x)) if number else self.one(self.two(x))

    with pytest.raises(
        RuntimeError, match=r"replica 0 .* at layer 'two', replica 1 .* at layer 'o"
    ):
        run(forward)


def test_replicas_of_different_widths():
    def forward(self, number, x):
        return syncbn.sync_batch_norm(torch.cat([x] * (1 + number), 1), None, None)

    with pytest.raises(RuntimeError, match="stack expects each tensor to be equal size"):
        run(forward)


def test_a_model_that_goes_on_without_the_layer():
    def forward(self, number, x):
        if number == 2:
            return x
        try:
            return self.one(x)
        except RuntimeError:
            return x

    assert torch.equal(run(forward), numbered())


def test_a_single_value_of_all_replicas():
    def forward(self, number, x):
        return self.one(x if number == 1 else x[:0])

    message = r"Expected more than 1 value per channel.*1 on all 3 replicas.*\[\(0, 2\), \(1, 2\)"
    with pytest.raises(ValueError, match=message):
        run(forward)

    def enough(self, number, x):
        return self.one(x if number else x[:0])

    assert run(enough).shape == (2, 2)
    assert run(lambda self, number, x: self.one(x[:0])).shape == (0, 2)


def test_bad_input_is_refused_at_the_layer():
    with pytest.raises(ValueError, match=r"replica 1(?s:.*)expected 2D or 3D input \(got 4D"):
        run(lambda self, number, x: self.one(x if number != 1 else x[..., None, None]))


def test_an_interrupt_leaves_no_replica_waiting():
    def forward(self, number, x):
        if number == 1:
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        return self.one(x)

    with pytest.raises(KeyboardInterrupt):
        run(forward)
    assert run(lambda self, number, x: self.one(x)).shape == (3, 2)


def test_what_replicas_do_as_they_end_is_done_before_the_caller_goes_on():
    """None of them keeps a process alive that ends meanwhile."""
    ended = []

    def waiting():
        try:
            Replica(group, 0).all_reduce(torch.ones(1))
        finally:
            time.sleep(0.2)
            ended.append(threading.current_thread().daemon)

    def failing():
        raise Custom

    group = ReplicaGroup(["a", "b"], in_turns=True)
    with pytest.raises(Custom):
        group.run([waiting, failing])
    assert ended == [True]


def test_replicas_at_once_as_on_several_devices():
    """Not in turns: as many threads run as there are replicas."""
    barrier = threading.Barrier(3, timeout=20)

    def at_once(rank, steps):
        def function():
            total = torch.ones(2)
            for _ in range(steps):
                barrier.wait()
                total = total + replica(rank).all_reduce(torch.full((2,), rank + 1.0))
            return total

        return function

    def replica(rank):
        return Replica(group, rank)

    group = ReplicaGroup(["a", "b", "c"], in_turns=False)
    for result in group.run([at_once(rank, 50) for rank in range(3)]):
        assert result.tolist() == [301.0, 301.0]

    def failing(rank):
        def function():
            barrier.wait()
            if rank == 1:
                raise Custom("stop")
            return replica(rank).all_gather(torch.ones(1))

        return function

    group = ReplicaGroup(["a", "b", "c"], in_turns=False)
    with pytest.raises(Custom, match="in b"):
        group.run([failing(rank) for rank in range(3)])


def test_a_thread_of_a_replica_cannot_call_its_layers():
    def forward(self, number, x):
        errors = []

        def call():
            try:
                self.one(x)
            except RuntimeError as error:
                errors.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        thread.join(20)
        raise errors[0]

    with pytest.raises(RuntimeError, match=r"layer 'one' of replica 0 .* called by threads of its"):
        run(forward)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("norm", ["layer", "hidden layer", "function"])
def test_a_checkpoint_inside_says_where_it_belongs(norm, reentrant):
    hidden = syncbn.SyncBatchNorm1d(2)

    def normalise(self, x):
        if norm == "function":
            return syncbn.sync_batch_norm(x, None, None)
        return (self.one if norm == "layer" else hidden)(x)

    def forward(self, number, x):
        return checkpoint(lambda x: normalise(self, x.sin()).sin(), x, use_reentrant=reentrant)

    message = "put the checkpoint around the whole DataParallel, with use_reentrant=True"
    with pytest.raises(RuntimeError, match=message):
        run(forward, gradient=True).sum().backward()
    with torch.no_grad():  # there is no backward that would compute it again
        assert run(forward).shape == (3, 2)


def test_a_module_elsewhere():
    parallel = syncbn.DataParallel(nn.Linear(2, 2), CPUS)
    parallel.module.to("meta")
    with pytest.raises(
        RuntimeError,
        match=r"module must have its parameters and buffers on device cpu \(devices\[0\]\) but "
        r"found one of them on device: meta; move it with module.to\('cpu'\)",
    ):
        parallel(torch.ones(3, 2))


def test_a_module_that_cannot_be_copied():
    lazy = syncbn.DataParallel(nn.Sequential(nn.LazyLinear(2), syncbn.LazySyncBatchNorm1d()), CPUS)
    with pytest.raises(RuntimeError, match="run a batch through"):
        lazy(torch.ones(3, 2))
    lazy.module(torch.ones(3, 2))
    assert lazy(torch.ones(3, 2)).shape == (3, 2)
    compiled = nn.Sequential(torch.compile(nn.Linear(2, 2)))
    with pytest.raises(RuntimeError, match=r"got 0 wrapped by torch.compile\(\)"):
        syncbn.DataParallel(compiled, CPUS)(torch.ones(3, 2))


def test_a_layer_that_is_told_to_be_alone():
    """Within a DataParallel its replicas are one device nevertheless."""
    model = nn.Sequential(syncbn.SyncBatchNorm1d(2, process_group=LOCAL))
    y = syncbn.DataParallel(model, CPUS)(numbered())
    torch.testing.assert_close(y, nn.BatchNorm1d(2)(numbered()))


def test_one_inside_another():
    inner = syncbn.DataParallel(syncbn.convert(nested()).double(), ["cpu"] * 2)
    with pytest.raises(RuntimeError, match="no DataParallel inside another, got one with the laye"):
        syncbn.DataParallel(nn.Sequential(inner), ["cpu"] * 2)(images(4))


def test_a_trace_or_an_export():
    parallel = syncbn.DataParallel(nn.Linear(2, 2), CPUS)
    for record in (
        lambda: torch.jit.trace(parallel, numbered()),
        lambda: torch.export.export(parallel, (numbered(),), strict=False),
    ):
        with pytest.raises(RuntimeError, match=r"cannot follow replicas; use \.module"):
            record()
    torch.jit.trace(parallel.module, numbered())


def test_a_mask_for_the_whole_batch():
    parallel = syncbn.DataParallel(nn.Sequential(syncbn.SyncBatchNorm1d(2)), CPUS)
    mask = torch.ones(3, dtype=torch.bool)
    with (
        syncbn.masking(parallel, mask),
        pytest.raises(ValueError, match="make the mask an input of its module"),
    ):
        parallel(numbered())


def test_torchs_replicas_are_refused_in_training_only():
    layer = syncbn.SyncBatchNorm1d(2)
    replica = layer._replicate_for_data_parallel()
    replica.weight, replica.bias = layer.weight, layer.bias  # torch's copies
    with pytest.raises(RuntimeError, match=r"use syncbn.DataParallel\(module\), or syncbn.convert"):
        replica(numbered())
    replica.eval()(numbered())
    layer(numbered())


@pytest.mark.parametrize("devices", [[], "cpu", 0, torch.device("cpu")])
def test_what_is_no_list_of_devices(devices):
    with pytest.raises(ValueError, match="expected a list of one device or more"):
        syncbn.DataParallel(nn.Linear(2, 2), devices)


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got builtin"):
        syncbn.DataParallel(torch.relu)
