"""ferrotorch's SyncBatchNorm2d over its SimulatedBackend: what it does, and its two faults mended.

https://github.com/dollspace-gay/ferrotorch, ferrotorch-distributed/src/sync_batch_norm.rs. There
``SyncBatchNorm2d::new(c, eps, momentum, affine).with_backend(backend)`` takes one of the backends
of ``SimulatedBackend::create_group(n)``, a thread each; here ``process_group=`` takes one of the
communicators of ``syncbn.comm.threads(n)``.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import syncbn
from support import oracle
from support.cases import share_of
from support.in_threads import attempts, in_threads, outcomes

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def step(layer, x, dy):
    """Everything that one forward and backward shows."""
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    gradients = {"d" + name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **gradients, **dict(layer.named_buffers())}


def in_ranks(x, dy, split=(2, 2), **options):
    """Every rank's step on its share of the batch."""

    def run(comm):
        layer = syncbn.SyncBatchNorm2d(x.shape[1], process_group=comm, **options)
        mine = share_of(split, comm.rank)
        return step(layer, x[mine], dy[mine])

    return in_threads(len(split), run)


def assert_one_batch(results, x, dy, factor=1.0):
    expected = oracle.batch_norm(x, dy)
    for name in ("y", "dx"):
        whole = torch.cat([result[name] for result in results])
        oracle.assert_close(whole, getattr(expected, name), factor=factor)
    mean, var = expected.running(0.0, 1.0, 0.1)
    for result in results:
        oracle.assert_close(result["running_mean"], mean)
        oracle.assert_close(result["running_var"], var)


def batch(samples=4):
    x = torch.linspace(-2.4, 2.3, samples * 12).view(samples, 3, 2, 2)
    return x, torch.randn_like(x)


@pytest.mark.parametrize("affine", [True, False])
def test_new_without_a_backend_is_batch_norm_2d(affine):
    """``SyncBatchNorm2d::new(3, eps, momentum, affine)``: forward, backward, statistics, eval."""
    options = {"eps": 1e-4, "momentum": 0.2, "affine": affine}
    ours, torchs = syncbn.SyncBatchNorm2d(3, **options), nn.BatchNorm2d(3, **options)
    for _ in range(2):
        x, dy = batch(2)
        torch.testing.assert_close(step(ours, x, dy), step(torchs, x, dy), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours.eval()(x), torchs.eval()(x))


def test_world_size_1_is_batch_norm_2d():
    """A group of one rank changes nothing."""
    (comm,) = syncbn.comm.threads(1)
    x, dy = batch(2)
    ours = step(syncbn.SyncBatchNorm2d(3, process_group=comm), x, dy)
    torch.testing.assert_close(ours, step(nn.BatchNorm2d(3), x, dy), rtol=1e-5, atol=1e-5)


def test_with_backend_two_ranks_match_the_full_batch():
    """Two threads with [2, 3, 2, 2] each are one layer with [4, 3, 2, 2]: forward and backward."""
    x, dy = batch()
    results = in_ranks(x, dy)
    assert_one_batch(results, x, dy)
    whole = step(nn.BatchNorm2d(3), x, dy)
    for name in ("y", "dx"):
        split = torch.cat([result[name] for result in results])
        torch.testing.assert_close(split, whole[name], rtol=1e-5, atol=1e-5)
    for name in ("dweight", "dbias"):  # local sums, which data parallelism adds up
        total = results[0][name] + results[1][name]
        torch.testing.assert_close(total, whole[name], rtol=1e-5, atol=1e-5)
    for name in STATISTICS:
        torch.testing.assert_close(results[0][name], whole[name])


def test_running_statistics_are_identical_on_both_ranks():
    """To the last bit, of any batch."""
    first, second = in_ranks(torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2))
    assert all(torch.equal(first[name], second[name]) for name in STATISTICS)


def test_simulated_backend_create_group():
    """``create_group(n)``: a backend per rank, numbered, of one group."""
    comms = syncbn.comm.threads(3)
    assert [(comm.rank, comm.size) for comm in comms] == [(0, 3), (1, 3), (2, 3)]
    sums = outcomes(lambda comm: comm.all_reduce(torch.ones(2) * comm.rank), [(c,) for c in comms])
    assert all(torch.equal(total, torch.tensor([3.0, 3.0])) for total in sums)
    with pytest.raises(ValueError, match="world_size of at least 1, got 0"):
        syncbn.comm.threads(0)


def test_a_thread_that_raises_ends_the_others():
    """At once, with its error in theirs."""

    def run(comm):
        if comm.rank == 0:
            raise LookupError("no such file")
        syncbn.SyncBatchNorm2d(3, process_group=comm)(torch.randn(2, 3, 2, 2))

    own, theirs = attempts(2, run, timeout=60)
    assert type(own) is LookupError
    assert "rank 0 raised LookupError: no such file" in str(theirs)


def test_a_thread_that_never_arrives_ends_the_others():
    """After the timeout, by name."""
    comm, _ = syncbn.comm.threads(2, timeout=0.2)
    layer = syncbn.SyncBatchNorm2d(3, process_group=comm)
    with pytest.raises(RuntimeError, match=r"all_gather: rank 1 has not arrived within 0\.2 s"):
        layer(torch.randn(2, 3, 2, 2))


def test_float64_running_statistics():
    """Its statistics are Vec<f64> in a float32 layer; here on request."""
    x, dy = batch()
    first, second = in_ranks(x, dy, statistics_dtype=torch.float64)
    assert first["y"].dtype == first["dweight"].dtype == torch.float32
    assert first["running_mean"].dtype == first["running_var"].dtype == torch.float64
    assert all(torch.equal(first[name], second[name]) for name in STATISTICS)
    layer = syncbn.SyncBatchNorm2d(1, momentum=1e-9, statistics_dtype=torch.float64)
    layer.running_mean.fill_(10_000.0)
    layer(torch.tensor([10_000.5, 10_001.5]).view(2, 1, 1, 1))
    assert 0 < layer.running_mean.item() - 10_000.0 < 1e-8  # float32 would not move
    layer.eval()(torch.randn(2, 1, 2, 2))


def test_eval_uses_running_statistics_regardless_of_the_backend():
    """One rank alone may evaluate: nothing is communicated."""
    _, comm = syncbn.comm.threads(2, timeout=0.2)
    layer, torchs = syncbn.SyncBatchNorm2d(3, process_group=comm).eval(), nn.BatchNorm2d(3).eval()
    for norm in (layer, torchs):
        norm.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    x = torch.full((1, 3, 2, 2), 100.0)
    torch.testing.assert_close(layer(x), torchs(x))


def test_debug_shows_the_configuration():
    """channels, eps, momentum, affine, world size (the communicator's, too), training."""
    _, comm = syncbn.comm.threads(2)
    layer = syncbn.SyncBatchNorm2d(3, eps=1e-4, momentum=0.2, process_group=comm)
    assert repr(layer).startswith("SyncBatchNorm2d(3, eps=0.0001, momentum=0.2, affine=True, ")
    assert repr(layer).endswith("world_size=1, group_size=2)")
    assert repr(layer.eval()).endswith("world_size=1, training=False, group_size=2)")
    assert repr(comm) == "Threads(rank=1, size=2)"


def test_wrong_input_is_refused():
    """Its own checks: no channels, three dimensions too few, another number of channels."""
    layer = syncbn.SyncBatchNorm2d(3)
    with pytest.raises(ValueError, match="expected 4D input"):
        layer(torch.tensor([1.0, 2.0, 3.0]))
    with pytest.raises(ValueError, match=r"shape \(4,\) for input of shape \(1, 4, 2, 2\)"):
        layer(torch.zeros(1, 4, 2, 2))
    with pytest.raises(ValueError, match="number of input channels should be non-zero"):
        syncbn.SyncBatchNorm2d(0)(torch.zeros(1, 0, 2, 2))


@pytest.mark.parametrize("mean", [1e3, 1e5])
def test_mended_cancellation(mean):
    """Its variance is E[x²] − E[x]² in float32, which a large mean cancels to nothing or less."""
    x = torch.randn(4, 3, 2, 2) + mean
    naive = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
    expected = oracle.batch_norm(x, torch.ones_like(x)).var
    assert ((naive - expected).abs() > 0.01 * expected).any(), "the formula that is not used here"
    dy = torch.randn_like(x)
    assert_one_batch(in_ranks(x, dy), x, dy)


@pytest.mark.parametrize("split", [(3, 1), (4, 0), (0, 4), (1, 2, 1)], ids=str)
def test_mended_unequal_counts(split):
    """It takes the local count times the world size for the global one; ranks may be uneven."""
    x, dy = torch.randn(4, 3, 2, 2) * torch.arange(1, 5).view(4, 1, 1, 1), torch.randn(4, 3, 2, 2)
    assert_one_batch(in_ranks(x, dy, split), x, dy)
