"""A Monitor changes no result, and sees each layer once in each observed step."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import syncbn
from support.training import batches, network


def trained(rank, monitored, *, synchronised, parallel=True):
    """What three steps leave: outputs, state, gradients, and the next random number."""
    model = network()
    if synchronised:
        model = syncbn.convert(model)
    model = DistributedDataParallel(model) if parallel else model
    monitor = syncbn.Monitor(model, every=2) if monitored else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(rank)
    outputs = []
    for x, target in batches(4)[:3]:
        optimizer.zero_grad()
        y = model(x + torch.rand_like(x) + rank)
        nn.functional.cross_entropy(y, target).backward()
        optimizer.step()
        outputs.append(y.detach())
    if monitor:
        assert [row.skipped for row in monitor.table()] == [0, 0, 0]
        assert monitor.table()[0].noise > 0
    gradients = [parameter.grad for parameter in model.parameters()]
    return [*outputs, *model.state_dict().values(), *gradients, torch.rand(3)]


@pytest.mark.parametrize("synchronised", [True, False])
def test_results_are_the_same_bits(ranks, synchronised):
    def run(rank):
        plain, watched = (trained(rank, each, synchronised=synchronised) for each in (False, True))
        return [torch.equal(a, b) for a, b in zip(plain, watched, strict=True)]

    assert all(map(all, ranks(2, run)))


def test_results_are_the_same_bits_in_one_process(implementation):
    for synchronised in (True, False):
        plain, watched = (
            trained(0, each, synchronised=synchronised, parallel=False) for each in (False, True)
        )
        for a, b in zip(plain, watched, strict=True):
            assert torch.equal(a, b)


class Counting(syncbn.comm.Communicator):
    """Two ranks that have the same; notes when they exchange how much."""

    rank, size = 0, 2

    def __init__(self):
        self.noted = []

    def all_gather(self, tensor):
        self.noted.append(tuple(tensor.shape))
        return torch.stack((tensor, tensor))

    def all_reduce(self, tensor):
        raise AssertionError("a Monitor gathers only")


def test_one_message_at_the_end_of_each_observed_step():
    """Beside the number of the step, and in the first step what times exchanges."""
    comm, model = Counting(), nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    for layer in model:
        layer.register_forward_hook(lambda layer, *_: comm.noted.append("layer"))
    syncbn.Monitor(model, every=3, process_group=comm)
    for _ in range(7):
        model(torch.randn(4, 3))
    layers, message = ["layer"] * 2, [(2,), (2 * 2 + 2 * (2 + 2 * 6),)]
    timing = [(64,)] * 5 + [(8192,)] * 5
    later = layers * 3 + message
    assert comm.noted == [*layers, *timing, *message, *later, *later]


def test_other_steps_run_without_hooks_on_layers():
    model = nn.Sequential(nn.BatchNorm1d(3))
    monitor = syncbn.Monitor(model, every=2)
    found = []
    model[0].register_forward_hook(lambda layer, *_: found.append(len(layer._forward_pre_hooks)))
    for _ in range(4):
        model(torch.randn(4, 3))
    assert found == [1, 0, 1, 0]
    monitor.close()
    model(torch.randn(4, 3))
    assert found[-1] == 0
    assert not model._forward_pre_hooks
    assert not model._forward_hooks
    assert monitor.table()[0].skipped == 0  # what was observed stays


def test_evaluation_is_not_observed():
    model = nn.Sequential(nn.BatchNorm1d(3))
    monitor = syncbn.Monitor(model, every=1)
    model(torch.randn(4, 3))
    model.eval()(torch.randn(4, 3))
    torch.func.vmap(model.train(False))(torch.randn(2, 4, 3))
    assert "1 step observed" in str(monitor.table())


class Summed(nn.Module):
    def forward(self, x):
        return x * x.square().sum(0)


class Checkpointed(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.block = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Summed())
        self.options = options

    def forward(self, x):
        return checkpoint(self.block, x, **self.options)


def _contexts():
    """Keeps what multiplies matrices and sums, as the plain kernels of a Monitor do."""
    kept = (torch.ops.aten.addmm.default, torch.ops.aten.sum.dim_IntList)

    def policy(_, operation, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if operation in kept else CheckpointPolicy.MUST_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"use_reentrant": True},
        {"use_reentrant": False},
        {"use_reentrant": False, "context_fn": _contexts},
    ],
    ids=["reentrant", "not", "selective"],
)
def test_second_forwards_of_checkpointing_are_not_observed(options, whole, monkeypatch):
    monkeypatch.setattr(syncbn.kernels, "_usable", {"composite"})  # which sums, too
    model, x = Checkpointed(**options), torch.randn(8, 3)
    plain = copy.deepcopy(model)
    monitor = syncbn.Monitor(model.block if whole else model, every=1)
    gradients = []
    for each in (model, plain):
        inputs = x.clone().requires_grad_()
        each(inputs).pow(3).sum().backward()
        gradients.append(inputs.grad)
    assert torch.equal(*gradients)
    (row,) = monitor.table()
    assert "1 step observed" in str(monitor.table())
    assert row.effective_size == pytest.approx(8)  # of one call, not two
    monitor.close()
    with syncbn.Monitor(model.block if whole else model, every=2) as monitor:
        for _ in range(2):
            model(x.clone().requires_grad_()).sum().backward()
    assert "1 step observed" in str(monitor.table())  # the first of two


def test_a_second_forward_within_the_first_is_not_observed():
    class Penalised(Checkpointed):
        def forward(self, x):
            y = super().forward(x)
            (gradient,) = torch.autograd.grad(y.pow(2).sum(), x)
            return y + gradient.sum()

    model, calls = Penalised(use_reentrant=False), []
    model.register_forward_hook(lambda *_: calls.extend(monitor._observer._calls[0]))
    monitor = syncbn.Monitor(model)
    model(torch.randn(8, 3).requires_grad_())
    assert len(calls) == 1  # of two forwards


def test_a_forward_that_fails_is_forgotten():
    class Failing(nn.Module):
        fails = True

        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(3)

        def forward(self, x):
            y = self.bn(x)
            if self.fails:
                raise KeyError("no such sample")
            return y

    model = Failing()
    monitor = syncbn.Monitor(model, every=2)
    with pytest.raises(KeyError):
        model(torch.randn(4, 3))
    model.fails = False
    model(torch.randn(4, 3))
    assert not model.bn._forward_pre_hooks
    model(torch.randn(6, 3))
    assert monitor.table()[0].effective_size == pytest.approx(6)


def test_bad_input_has_the_layers_own_error():
    model = nn.Sequential(nn.BatchNorm1d(3))
    syncbn.Monitor(model, every=1)
    with pytest.raises(ValueError, match="expected 2D or 3D input"):
        model(torch.randn(4, 3, 2, 2))
    with pytest.raises(RuntimeError, match="running_mean should contain 4 elements"):
        model(torch.randn(4, 4))
    freed = torch.randn(4, 3)
    freed.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError):
        syncbn.convert(model)(freed)


def test_a_single_layer_is_a_model():
    layer = nn.BatchNorm1d(3)
    monitor = syncbn.Monitor(layer)
    layer(torch.randn(4, 3))
    assert monitor.table()[0].layer == "(the model itself)"
    assert monitor.where("", layer)


def test_replicas_in_one_process_are_observed():
    model = syncbn.DataParallel(syncbn.convert(nn.Sequential(nn.BatchNorm1d(64))), ["cpu"] * 2)
    monitor = syncbn.Monitor(model)
    model(torch.randn(8, 64))
    assert monitor.table()[0].effective_size == pytest.approx(4)  # of each replica


@pytest.mark.parametrize("when", ["before", "within"])
def test_copies_and_pickles_have_no_monitor(when):
    def copied(model):
        copies.append(copy.deepcopy(model))
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        copies.append(torch.load(stream, weights_only=False))
        assert b"diagnose" not in pickle.dumps(model)

    copies, model = [], nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    monitor = syncbn.Monitor(model, every=1)
    if when == "within":
        handle = model[0].register_forward_hook(lambda *_: (handle.remove(), copied(model))[0])
    else:
        copied(model)
    x = torch.randn(4, 3)
    y = model(x)
    assert len(copies) == 2
    for each in copies:
        each.eval().train()
        torch.testing.assert_close(each(x), y)
    assert "1 step observed" in str(monitor.table())


def test_a_monitor_lives_as_long_as_its_model():
    class Writer:
        def __init__(self):
            self.steps = []

        def add_scalar(self, tag, value, step):
            self.steps.append(step)

    writer, model = Writer(), nn.Sequential(nn.BatchNorm1d(3))
    syncbn.Monitor(model, every=1, writer=writer)
    model(torch.randn(4, 3))
    assert writer.steps
    kept = syncbn.Monitor(model)
    model(torch.randn(4, 3))
    del model
    assert kept.table()[0].skipped_batches == 0


def test_compiled_models_say_that_they_are_not_observed():
    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.BatchNorm1d(3), nn.BatchNorm1d(3)

        def forward(self, x):
            return self.b(self.a(x))

    inner = Network()
    monitor = syncbn.Monitor(inner, every=1)
    model = torch.compile(inner, backend="eager", fullgraph=True)
    x = torch.randn(4, 3)
    torch.testing.assert_close(model(x), copy.deepcopy(inner)(x))
    with pytest.raises(RuntimeError, match="hooks do not run inside what torch"):
        monitor.table()
    with pytest.raises(ValueError, match="that run in eager mode, got 2 inside"):
        syncbn.Monitor(model)
    inner(x)  # uncompiled
    assert len(monitor.table()) == 2
    half = Network()
    half.a.compile(backend="eager")
    with syncbn.Monitor(half) as of_half:
        half(x)
    assert [row.layer for row in of_half.table()] == ["b"]


def test_join_is_refused(ranks):
    def run(rank):
        model = DistributedDataParallel(nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))
        syncbn.Monitor(model)
        with pytest.raises(RuntimeError, match="Monitor: expected no Distrib"), model.join():
            model(torch.randn(4, 3))
        dist.barrier()

    ranks(2, run)
