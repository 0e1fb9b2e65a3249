"""Thousands of steps: statistics stay right, ranks stay equal, memory stays flat."""

import gc
import os
from pathlib import Path

import pytest
import torch

import syncbn

SHAPE = (6, 3, 4, 4)  # of both ranks' batch
MEANS = (100.0, -3.0, 1.0)  # of channels with deviation 1
MOMENTA = (0.1, None)
steps = pytest.mark.parametrize(
    "steps", [300, pytest.param(10_000, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)


def batches(steps):
    generator = torch.Generator().manual_seed(7)
    for _ in range(steps):
        yield torch.randn(SHAPE, generator=generator) + torch.tensor(MEANS).view(1, 3, 1, 1)


def train(rank, layer, steps, after_step=lambda step: None):
    """Forward and backward of this rank's share, four samples or two."""
    share = slice(0, 4) if rank == 0 else slice(4, 6)
    for step, x in enumerate(batches(steps)):
        x = x[share].to(layer.weight.dtype).requires_grad_()
        layer.zero_grad()
        layer(x).square().sum().backward()
        after_step(step)


def oracle(steps, momentum):
    """(running_mean, running_var) in float64, of the whole batches."""
    mean, var = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    for step, x in enumerate(batches(steps)):
        values = x.double().transpose(0, 1).flatten(1)
        rate = 1 / (step + 1) if momentum is None else momentum
        mean += rate * (values.mean(1) - mean)
        var += rate * (values.var(1) - var)
    return mean, var


def tolerance(dtype, momentum, steps):
    """Of running statistics, relative.

    A step is computed in float64 and rounded once, to the buffer, by 2⁻²⁴ at most in float32. A
    momentum of 0.1 forgets: all roundings together stay below 10 · 2⁻²⁴. The cumulative average
    keeps them, the k-th with weight k / steps: at random √(steps/3) of them, so √steps is ample.
    """
    if dtype is torch.float64:
        return 1e-13
    return 1e-6 if momentum else max(1e-6, 2**-24 * steps**0.5)


@steps
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_running_statistics_stay_right_and_equal_on_all_ranks(ranks, dtype, momentum, steps):
    def run(rank):
        layer = syncbn.SyncBatchNorm2d(3, momentum=momentum, dtype=dtype)
        train(rank, layer, steps)
        return dict(layer.named_buffers())

    first, second = ranks(2, run, timeout=60 + steps / 10)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert first["num_batches_tracked"] == steps
    rtol = tolerance(dtype, momentum, steps)
    running = first["running_mean"].double(), first["running_var"].double()
    torch.testing.assert_close(running, oracle(steps, momentum), rtol=rtol, atol=0)


def resident():
    """Bytes of this process in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@steps
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc of Linux")
def test_memory_does_not_grow(ranks, steps):
    """After a warm-up, neither what Python can see nor what the process holds."""
    warm = steps // 5

    def run(rank):
        gc.freeze()  # what earlier tests left in this process may go at any time: not counted
        layer = syncbn.SyncBatchNorm2d(3)
        seen = []

        def look(step):
            if step in (warm, steps - 1):
                gc.collect()
                objects = gc.get_objects()
                tensors = sum(issubclass(type(o), torch.Tensor) for o in objects)
                seen.append((tensors, len(objects), resident()))

        train(rank, layer, steps, look)
        gc.unfreeze()
        return seen

    for before, after in ranks(2, run, timeout=60 + steps / 10):
        assert after[0] - before[0] < 10, "tensors"  # a leak makes one or more per step
        assert after[1] - before[1] < 50, "objects"
        assert after[2] - before[2] < 2 * 2**20, "bytes"
