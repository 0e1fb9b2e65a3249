"""Transforms over ranks: what one process with the whole batch computes, or words for why not."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support.in_threads import in_threads
from support.layers import Silent
from support.ranked_transforms import (
    DOUBLE,
    OPTIONS,
    SHAPE,
    STEPS,
    TOLERANCE,
    check,
    grad_of_grad,
    outcome,
    setting,
)
from support.replicas import CPUS


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("split", [(2, 1), (2, 0, 1)])
@pytest.mark.parametrize("name", STEPS)
def test_the_whole_batch_under_transforms(ranks, name, split, option):
    step = STEPS[name]
    run = lambda rank: outcome(step, option, None, rank, split)  # noqa: E731
    check(step, option, ranks(len(split), run))


@pytest.mark.parametrize("name", [name for name in STEPS if "forward" not in name])
def test_ranks_that_are_threads(name):
    step, split = STEPS[name], (2, 1)
    if "jvp" in name:
        pytest.skip("torch's level of forward mode is the process's, not a thread's")
    check(step, "masked", in_threads(2, lambda c: outcome(step, "masked", c, c.rank, split)))


def refusal(comm, attempt):
    """The words of an error, and that nothing but a comparison of sizes had been sent before."""
    layer = syncbn.SyncBatchNorm(2, dtype=DOUBLE, process_group=comm)
    x = torch.randn(2 + comm.rank, 2, 2, dtype=DOUBLE)
    with pytest.raises(RuntimeError) as caught:
        attempt(layer, x)
    assert all(torch.equal(b, c) for b, c in zip(layer.buffers(), fresh(), strict=True))
    return str(caught.value)


def fresh():
    return syncbn.SyncBatchNorm(2, dtype=DOUBLE).buffers()


REFUSED = {
    "unequally many rows": (
        lambda layer, x: torch.func.jacrev(lambda x: functional_call(layer, moved(layer, x), x))(x),
        "sync_batch_norm: expected vmap and batched gradients over as many elements on every rank, "
        "got 8 on rank 0, 12 on rank 1; element i of one rank",
    ),
    "recorded": (
        lambda layer, x: torch.func.linearize(
            lambda x: functional_call(layer, moved(layer, x), x), x
        ),
        "sync_batch_norm: expected operations over ranks to run in this transform, got one that "
        "records them to run later (torch.func.linearize, make_fx), in which messages",
    ),
    "captured statistics": (
        lambda layer, x: torch.func.vmap(layer)(torch.stack((x, x))),
        "sync_batch_norm: expected running statistics that a transform of torch.func can move in "
        "training, got running_mean of outside of it (",
    ),
}


def moved(layer, x):
    return {name: b + (x.detach() * 0).sum().to(b.dtype) for name, b in layer.named_buffers()}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_on_all_ranks_alike(ranks, name):
    attempt, text = REFUSED[name]
    for words in ranks(2, lambda rank: refusal(syncbn.comm.resolve(None), attempt)):
        assert words.startswith(text), words


def test_eval_mode_says_nothing_in_any_transform():
    layer = syncbn.SyncBatchNorm(2, dtype=DOUBLE, process_group=Silent()).eval()
    plain = torch.nn.BatchNorm1d(2, dtype=DOUBLE).eval()
    args, w, t, _ = setting("plain")
    for step in STEPS.values():
        found, expected = (
            step(lambda x, a, b: functional_call(m, {"weight": a, "bias": b}, x), args, w, t)  # noqa: B023
            for m in (layer, plain)
        )
        if step is not grad_of_grad:
            torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("name", STEPS)
def test_around_data_parallel(name):
    """Transforms run on the first device, as all of them together would; backward is batched."""
    step = STEPS[name]
    args, w, t, _ = setting("plain")
    layer = syncbn.SyncBatchNorm(2, dtype=DOUBLE, affine=False, track_running_stats=False)
    parallel = syncbn.DataParallel(layer, CPUS)

    def f(x, weight, bias):
        return parallel(x) * weight.view(-1, 1) + bias.view(-1, 1)

    check(step, "plain", [step(f, args, w, t)])


def test_in_a_replica_is_refused():
    class Inside(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = syncbn.SyncBatchNorm(2, track_running_stats=False)

        def forward(self, x):
            return torch.func.grad(lambda x: self.layer(x).sum())(x)

    with pytest.raises(RuntimeError, match=r"no transform of torch\.func and no forward-mode"):
        syncbn.DataParallel(Inside(), CPUS)(torch.randn(*SHAPE))


def test_join_is_refused_where_ranks_would_wait_for_ever(ranks):
    """While DistributedDataParallel is in it; its own forward knows no transform."""
    config = SimpleNamespace(enable=True, throw_on_early_termination=False)
    ddp = SimpleNamespace(_join_config=config)

    def run(rank):
        layer = syncbn.SyncBatchNorm(2, track_running_stats=False)
        with (
            mock.patch.object(DistributedDataParallel, "_active_ddp_module", ddp),
            pytest.raises(RuntimeError, match=r"join\(\) around a synchronised layer"),
        ):
            torch.func.grad(lambda x: layer(x).sum())(torch.randn(3, 2))

    ranks(2, run)


def test_forward_mode_among_threads_is_refused():
    """torch has one level for all threads: tangents would mix."""
    in_turns = threading.Lock()  # torch's own error comes where two enter at once

    def run(comm):
        x, refused = torch.randn(4, 3), "expected no forward-mode differentiation among"
        with in_turns, pytest.raises(RuntimeError, match=refused):
            torch.func.jvp(lambda x: syncbn.sync_batch_norm(x, None, None, group=comm), (x,), (x,))

    in_threads(2, run)
