"""What one can do with Bagua's synchronised batch normalisation, and what it refuses.

Bagua's layer runs on Bagua's own engine instead of torch.distributed, under a model wrapped by
``with_bagua``. Here any engine is a Communicator, and the wrapper is DistributedDataParallel.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support import oracle
from support.cases import Case, check, step
from support.in_threads import in_threads
from support.layers import Silent
from support.training import assert_same_state, batches, network, share, train

SAMPLES = 3  # of each of two ranks


@pytest.fixture(scope="module")
def alone():
    """The state of twenty steps on one process with the whole batch."""
    model = network()
    train(model, batches(2 * SAMPLES))
    return model.state_dict()


def trained(ranks, wrapped):
    """Every rank's state after twenty steps of what ``wrapped`` makes of a network."""

    def run(rank):
        model = wrapped(network())
        train(model, share(rank, SAMPLES, batches(2 * SAMPLES)))
        layers = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        assert all(isinstance(layer, syncbn.SyncBatchNorm) for layer in layers)
        return model.module.state_dict()

    return ranks(2, run)


def test_an_engine_that_is_not_torch_distributed():
    """Threads; MPI is one too."""
    case = Case(split=(5, 2))
    check(case, in_threads(2, lambda comm: step(comm.rank, case, comm)), factor=4)
    assert not dist.is_initialized()


def test_convert_then_wrap(ranks, alone):
    states = trained(ranks, lambda model: DistributedDataParallel(syncbn.convert(model)))
    assert_same_state(states, alone)


def test_wrap_then_convert(ranks, alone):
    states = trained(ranks, lambda model: syncbn.convert(DistributedDataParallel(model)))
    assert_same_state(states, alone)


def test_convert_sync_batchnorm_before_the_engine_wraps(ranks, alone):
    """The classmethod, whose result is what one goes on with: here too the same model."""

    def wrapped(model):
        converted = syncbn.SyncBatchNorm.convert_sync_batchnorm(model)
        assert converted is model
        return DistributedDataParallel(converted)

    assert_same_state(trained(ranks, wrapped), alone)


def test_cpu_tensors(ranks):
    """Bagua: SyncBatchNorm expected input tensor to be on GPU."""
    case = Case(split=(2, 3))
    results = ranks(2, step, case)
    assert {tensor.device.type for result in results for tensor in result.values()} == {"cpu"}
    check(case, results, factor=4)


@pytest.mark.parametrize("steps", [1, 3])
def test_momentum_none(ranks, steps):
    """The cumulative average of all batches. Bagua hands None to its kernel."""
    whole = torch.randn(steps, 5, 3, 4, dtype=torch.float64) + 2  # steps, N, C, L

    def run(rank):
        layer = syncbn.SyncBatchNorm(3, momentum=None, dtype=torch.float64)
        for batch in whole:
            layer(batch[:2] if rank == 0 else batch[2:])
        return layer.state_dict()

    judged = [oracle.batch_norm(batch, torch.ones_like(batch)) for batch in whole]
    for state in ranks(2, run):
        assert state["num_batches_tracked"] == steps
        for name, of in (("running_mean", "mean"), ("running_var", "unbiased_var")):
            average = torch.stack([getattr(result, of) for result in judged]).mean(0)
            oracle.assert_close(state[name], average)


def test_eval_without_running_statistics_stays_local():
    """Bagua communicates there."""
    layer = syncbn.SyncBatchNorm(3, track_running_stats=False, process_group=Silent()).eval()
    x = torch.randn(5, 3, dtype=torch.float64)
    oracle.assert_close(layer.double()(x), oracle.batch_norm(x, x).y)
