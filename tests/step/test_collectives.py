"""What ranks say to each other: two collectives per layer and step, whatever their input."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

import syncbn
from support import oracle
from support.in_threads import in_threads
from syncbn import kernels
from syncbn.comm import Communicator, resolve


class Recorder(Communicator):
    """Passes on to the default group and writes down what was asked of it."""

    def __init__(self) -> None:
        self.inner = resolve(None)
        self.calls: list[tuple[str, torch.dtype, int]] = []

    rank = property(lambda self: self.inner.rank)
    size = property(lambda self: self.inner.size)

    def all_gather(self, tensor):
        self.calls.append(("gather", tensor.dtype, tensor.numel()))
        return self.inner.all_gather(tensor)

    def all_reduce(self, tensor):
        self.calls.append(("reduce", tensor.dtype, tensor.numel()))
        return self.inner.all_reduce(tensor)


STEP = [("gather", torch.float64, 2 * 3 + 2), ("reduce", torch.float64, 2 * 3)]


@pytest.mark.parametrize(
    "inputs",
    [
        lambda: (torch.randn(2, 3, 4), torch.randn(5, 3, 4)),
        lambda: (torch.randn(2, 3, 4), torch.randn(0, 3, 4)),
        lambda: (torch.randn(2, 3, 4), torch.randn(2, 3, 4).bfloat16()),
        lambda: (torch.randn(2, 3, 4), torch.randn(2, 3, 4, 5).double()),
        lambda: (torch.randn(2, 3, 4), torch.randn(2, 3, 4).requires_grad_()),
        lambda: (torch.randn(0, 3), torch.randn(2, 3).half().requires_grad_()),
    ],
    ids=["uneven", "empty", "half", "dimensions", "gradient", "all"],
)
@pytest.mark.parametrize("affine", [True, False])
def test_no_local_fact_decides(ranks, inputs, affine):
    def run(rank):
        recorder = Recorder()
        layer = syncbn.SyncBatchNorm(3, affine=affine, process_group=recorder)
        y = layer(inputs()[rank])
        if y.requires_grad:
            y.sum().backward()
        return recorder.calls, y.requires_grad

    first, second = ranks(2, run)
    assert first == second
    wanted = affine or any(x.requires_grad for x in inputs())
    assert first == (STEP if wanted else STEP[:1], wanted)


def test_a_backward_that_is_differentiated_sends_no_more_than_it_needs(ranks):
    """The moments once more, without a header, and the sums."""

    def run(rank):
        recorder = Recorder()
        layer = syncbn.SyncBatchNorm(3, process_group=recorder)
        x = torch.randn(2, 3, 4, requires_grad=True)
        torch.autograd.grad(layer(x).sum(), x, create_graph=True)
        return recorder.calls

    again = [("gather", torch.float64, 2 * 3 + 1), ("reduce", torch.float64, 2 * 3)]
    assert ranks(2, run) == [STEP[:1] + again] * 2


def test_a_rank_without_gradient_still_serves_its_peer(ranks):
    """affine=False and an input that wants no gradient on rank 0: rank 1's is right, none hangs."""
    x = torch.randn(4, 3, 5, dtype=torch.float64)
    dy = torch.randn(4, 3, 5, dtype=torch.float64)

    def run(rank):
        mine = slice(2 * rank, 2 * rank + 2)
        share = x[mine].clone().requires_grad_(rank == 1)
        y = syncbn.sync_batch_norm(share, None, None)
        y.backward(dy[mine])
        return share.grad

    none, dx = ranks(2, run)
    assert none is None
    oracle.assert_close(dx, oracle.batch_norm(x, dy).dx[2:])


def test_nothing_is_kept_for_backward_when_no_rank_wants_a_gradient(ranks):
    def run(rank):
        frozen = syncbn.SyncBatchNorm(3).requires_grad_(False)
        with torch.no_grad():
            silent = syncbn.SyncBatchNorm(3)(torch.randn(2, 3, requires_grad=True))
        return frozen(torch.randn(2, 3)).requires_grad, silent.requires_grad

    assert ranks(2, run) == [(False, False)] * 2


def test_frozen_parameters_get_no_gradient_and_stop_nobody(ranks):
    def run(rank):
        recorder = Recorder()
        layer = syncbn.SyncBatchNorm(3, process_group=recorder)
        layer.weight.requires_grad_(False)
        x = torch.randn(2, 3, 4, requires_grad=True)
        layer(x).square().sum().backward()
        return recorder.calls, layer.weight.grad, layer.bias.grad.shape, x.grad.shape

    assert ranks(2, run) == [(STEP, None, (3,), (2, 3, 4))] * 2


def test_silence(ranks):
    """In eval mode, while tracing or exporting, on meta, nothing is sent."""

    def run(rank):
        recorder = Recorder()
        x = torch.randn(2, 3, 4, 4)
        layer = syncbn.SyncBatchNorm2d(3, process_group=recorder)
        model = torch.nn.Sequential(layer)
        torch.jit.trace(model, x, check_trace=False)
        torch.export.export(model, (x,), strict=False)
        torch.export.export(model, (x,), strict=True)
        layer.to("meta")(x.to("meta"))
        syncbn.SyncBatchNorm(3, process_group=recorder).eval()(x)
        stateless = syncbn.SyncBatchNorm(3, track_running_stats=False, process_group=recorder)
        expected = torch.nn.BatchNorm2d(3, track_running_stats=False).eval()(x)
        torch.testing.assert_close(stateless.eval()(x), expected)
        return recorder.calls

    assert ranks(2, run) == [[], []]


def test_eval_layers_inside_a_training_model(ranks):
    def run(rank):
        recorder = Recorder()
        model = syncbn.convert(
            torch.nn.Sequential(torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)), recorder
        )
        model[0].eval()
        model(torch.randn(2, 3, requires_grad=True)).sum().backward()
        return recorder.calls, model[0].num_batches_tracked.item()

    assert ranks(2, run) == [(STEP, 0)] * 2


def test_two_forwards_before_one_backward(ranks):
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    dy = torch.randn(2, 4, 3, 5, dtype=torch.float64)

    def run(rank):
        mine = slice(2 * rank, 2 * rank + 2)
        layer = syncbn.SyncBatchNorm(3, dtype=torch.float64)
        shares = [batch[mine].clone().requires_grad_() for batch in x]
        outputs = [layer(share) for share in shares]
        layer.reset_running_stats()  # and DDP's buffer broadcast overwrites them as well
        torch.autograd.backward(outputs, [gradient[mine] for gradient in dy])
        return [share.grad for share in shares], layer.weight.grad

    results = ranks(2, run)
    expected = [oracle.batch_norm(x[i], dy[i]) for i in range(2)]
    for i in range(2):
        whole = torch.cat([grads[i] for grads, _ in results])
        oracle.assert_close(whole, expected[i].dx)
    total = sum(dweight for _, dweight in results)
    oracle.assert_close(total, expected[0].dweight + expected[1].dweight, factor=10)


def test_a_globally_single_value_is_refused_on_every_rank_alike(ranks):
    def run(rank):
        layer = syncbn.SyncBatchNorm(3)
        with pytest.raises(ValueError, match="Expected more than 1 value per channel") as error:
            layer(torch.randn(int(rank == 1), 3, 1))
        after = layer(torch.randn(1, 3, 1))  # the ranks are still in step
        return str(error.value), layer.num_batches_tracked.item(), after.isfinite().all().item()

    for rank, (text, batches, finite) in enumerate(ranks(3, run)):
        size = (int(rank == 1), 3, 1)
        assert f"got input size torch.Size({list(size)}) on rank {rank}" in text
        assert "1 value per channel on all 3 ranks together" in text
        assert "use a larger batch or call eval()" in text
        assert (batches, finite) == (1, True), "a refused batch is not counted"


def test_no_value_on_any_rank_is_an_empty_batch(ranks):
    def run(rank):
        layer = syncbn.SyncBatchNorm(3)
        x = torch.empty(0, 3, 2, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        return y.shape, x.grad.shape, layer.running_var.tolist(), layer.weight.grad.tolist()

    assert ranks(2, run) == [((0, 3, 2), (0, 3, 2), [1.0] * 3, [0.0] * 3)] * 2


@pytest.mark.parametrize("broadcast", [True, False])
def test_under_ddp_on_the_cpu(ranks, broadcast):
    def run(rank):
        recorder = Recorder()
        model = syncbn.convert(torch.nn.Sequential(torch.nn.BatchNorm1d(3)), recorder)
        model = DistributedDataParallel(model, broadcast_buffers=broadcast)
        for _ in range(2):
            model(torch.randn(2, 3)).sum().backward()
        return recorder.calls, dist.get_world_size()

    assert ranks(2, run) == [(STEP * 2, 2)] * 2


class Waits(TorchDispatchMode):
    """Counts the reads of a number from a tensor, for which an accelerator's queue must drain."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("chosen", ["native", "composite"])
@pytest.mark.parametrize("reproducible", [False, True], ids=["", "reproducible"])
def test_no_step_waits_for_a_number(chosen, reproducible, monkeypatch):
    """With more than one value per channel; a rank with one looks whether there are others."""
    if chosen == "native" and not kernels.native.available():
        pytest.skip("needs the compiled operators")
    monkeypatch.setattr(kernels, "_usable", {chosen, "composite"})

    def step(comm):
        layer = syncbn.SyncBatchNorm(3, process_group=comm, reproducible=reproducible)
        x = torch.randn(1 if comm.rank == 0 else 4, 3, 1, requires_grad=True)
        with Waits() as waits:
            layer(x).sum().backward()
        return waits.count

    assert in_threads(3, step) == [1, 0, 0]
