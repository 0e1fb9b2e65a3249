"""Checkpointers that correct BatchNorm's second move themselves: statistics move once all the same.

fairscale's checkpoint_wrapper switches track_running_stats off in the first forward and on again in
the second; pytorch-pfn-extras' checkpoint lowers the momentum so that two moves make one. Both in
their own way of doing it, in few lines.
"""

from __future__ import annotations

import contextlib
import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import CheckpointFunction, checkpoint

import syncbn
from support.cases import CLOSE
from support.compiling import compiled

FORMS = [True, False]


class Block(nn.Module):
    def __init__(self, momentum=0.1, checkpointed=None):
        super().__init__()
        torch.manual_seed(3)
        self.linear, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3, momentum=momentum)
        self.checkpointed = checkpointed  # or a function that calls the rest
        self.double()

    def forward(self, x):
        return self.checkpointed(self.rest, x) if self.checkpointed else self.rest(x)

    def rest(self, x):
        return self.norm(self.linear(x)).tanh()


def patch_batchnorm(module):
    """As fairscale's: no tracking wherever gradients are disabled."""

    def off(layer, args):
        if not torch.is_grad_enabled():
            layer.backup, layer.track_running_stats = layer.track_running_stats, False

    def on(layer, args, y):
        if not torch.is_grad_enabled():
            layer.track_running_stats = layer.backup

    for layer in module.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            layer.register_forward_pre_hook(off), layer.register_forward_hook(on)
    return module


@contextlib.contextmanager
def untracked(module):
    for layer in module.modules():
        if hasattr(layer, "track_running_stats"):
            layer.track_running_stats = False
    yield
    for layer in module.modules():
        if hasattr(layer, "track_running_stats"):
            layer.track_running_stats = True


def correcting(module, reentrant):
    """``module`` in a checkpoint that lets it track in the second forward only."""
    if reentrant:
        patch_batchnorm(module)
        return functools.partial(checkpoint, module, use_reentrant=True)

    def contexts():
        return untracked(module), contextlib.nullcontext()

    return functools.partial(checkpoint, module, use_reentrant=False, context_fn=contexts)


def plain(module, reentrant):
    return functools.partial(checkpoint, module, use_reentrant=reentrant)


def inputs(count, rank=0, samples=4):
    xs = torch.randn(count, 8, 3, dtype=torch.float64)[:, rank * samples : (rank + 1) * samples]
    return [x.clone().requires_grad_() for x in xs]


def train(call, model, xs):
    for x in xs:
        call(x).pow(3).sum().backward()
    return model.state_dict(), [x.grad for x in xs]


def call_in_backward(model):
    x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    x.register_hook(lambda dx: model(x.detach()).detach())
    x.sum().backward()


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, **CLOSE)


@pytest.mark.parametrize("reentrant", FORMS)
@pytest.mark.parametrize("momentum", [0.1, None, 1.0])
@pytest.mark.parametrize("world", [1, 2])
def test_statistics_move_once(ranks, world, momentum, reentrant):
    def run(rank):
        model = syncbn.convert(Block(momentum))
        return train(correcting(model, reentrant), model, inputs(3, rank, 8 // world))

    results = ranks(2, run) if world > 1 else [run(0)]
    torch.manual_seed(0)
    state, _ = train(alone := Block(momentum), alone, inputs(3, 0, 8))
    for found, _ in results:
        assert_same(found, state)
        assert found["norm.num_batches_tracked"] == 3


@pytest.mark.parametrize("reentrant", FORMS)
def test_under_ddp_and_convert_after_wrapping(ranks, reentrant):
    def run(rank):
        model = Block()
        call = correcting(model, reentrant)
        model.checkpointed = None
        syncbn.convert(model)
        ddp = DistributedDataParallel(nn.ModuleList([model]), static_graph=reentrant)
        ddp.module.forward = lambda x: call(x)
        return train(ddp, model, inputs(3, rank))[0]

    torch.manual_seed(0)
    state, _ = train(alone := Block(), alone, inputs(3, 0, 8))
    for found in ranks(2, run):
        for name in ("norm.running_mean", "norm.running_var", "norm.num_batches_tracked"):
            assert_same(found[name], state[name])


@pytest.mark.parametrize("reentrant", FORMS)
@pytest.mark.parametrize("skip", [True, False])
def test_skipping(reentrant, skip):
    """A checkpointed batch that is not finite is skipped once, the others move once."""
    model = syncbn.convert(Block(), skip_nonfinite=skip)
    call = correcting(model, reentrant)
    train(call, model, inputs(2))
    if skip:
        train(call, model, [x.detach().fill_(torch.inf).requires_grad_() for x in inputs(1)])
        assert model.norm.num_batches_skipped == 1
    assert model.norm.num_batches_tracked == 2
    assert model.norm.running_var.isfinite().all()


USES = ["plain", "corrected", "checkpointed"]


@pytest.mark.parametrize("reentrant", FORMS)
@pytest.mark.parametrize("first", USES)
@pytest.mark.parametrize("second", USES)
def test_a_layer_used_twice_in_a_step(first, second, reentrant):
    """Never more often than used; once for each use, but where its checkpoints disagree.

    Then one that tracks in the first forward hides one that waits for the second.
    """
    model = syncbn.convert(Block())
    other = syncbn.convert(Block())
    other.norm = model.norm
    calls = []
    for use, block in ((first, model), (second, other)):
        if use == "corrected":  # its hooks would hold for the other use, too
            calls.append(correcting(block, False))
        else:
            calls.append(plain(block, reentrant) if use == "checkpointed" else block)
    for step in range(1, 4):
        one, two = inputs(2)
        loss = calls[0](one).pow(3).sum() + calls[1](two).pow(3).sum()
        loss.backward()
        lost = (first, second) == ("corrected", "checkpointed")
        assert model.norm.num_batches_tracked == (step if lost else 2 * step)


@pytest.mark.parametrize("reentrant", FORMS)
def test_a_forward_that_does_not_track_is_no_first_one(reentrant):
    """An untracked forward beside a checkpoint: its second forward must not pay for it."""
    model = syncbn.convert(Block())
    call = plain(model, reentrant)
    for step in range(1, 4):
        one, two = inputs(2)
        tracked = call(one)
        with untracked(model):
            free = model(two)
        (tracked.pow(3).sum() + free.pow(3).sum()).backward()
        assert model.norm.num_batches_tracked == step


@pytest.mark.parametrize("reentrant", FORMS)
def test_evaluations_that_do_not_track_leave_no_debt(reentrant):
    """Forwards in training without gradients, as of a teacher, before a plain checkpoint."""
    model = syncbn.convert(Block())
    for step in range(1, 3):
        with torch.no_grad(), untracked(model):
            model(inputs(1)[0])
        train(plain(model, reentrant), model, inputs(1))
        assert model.norm.num_batches_tracked == step


def test_a_forward_in_a_hook_of_backward_moves_nothing():
    model = syncbn.convert(Block())
    call = correcting(model, True)
    for step in range(1, 3):
        train(call, model, xs := inputs(1))
        call_in_backward(model)
        assert model.norm.num_batches_tracked == step
    train(model, model, xs)
    call_in_backward(model)
    assert model.norm.num_batches_tracked == 3


@pytest.mark.parametrize("outer", FORMS)
@pytest.mark.parametrize("inner", FORMS)
@pytest.mark.parametrize("corrected", ["outer", "inner", "neither"])
def test_nested(outer, inner, corrected):
    block = syncbn.convert(Block())
    wrap = correcting if corrected == "inner" else plain
    model = nn.Sequential(block)
    inside = wrap(block, inner)
    block_call = nn.Module()
    block_call.block = block
    block_call.forward = lambda x: inside(x.sin())
    outside = (correcting if corrected == "outer" else plain)(block_call, outer)
    for step in range(1, 3):
        actual = train(lambda x: outside(x), model, xs := inputs(1))
        assert block.norm.num_batches_tracked == step
    alone = Block()
    expected = train(
        lambda x: alone(x.sin()), alone, [x.detach().clone().requires_grad_() for x in xs]
    )
    assert_same(actual[1], expected[1])


@pytest.mark.parametrize("fullgraph", [True, False])
@pytest.mark.parametrize("within", [True, False])
def test_compiled(within, fullgraph):
    """The block inside a checkpoint that corrects, or what calls it."""
    torch.manual_seed(0)
    alone, xs = Block(), inputs(3)
    expected = train(alone, alone, [x.detach().clone().requires_grad_() for x in xs])
    model = syncbn.convert(Block())
    patch_batchnorm(model)
    if within:
        inner, _ = compiled(model, fullgraph=fullgraph)
        call = functools.partial(checkpoint, inner, use_reentrant=True)
    else:
        call, _ = compiled(
            functools.partial(checkpoint, model, use_reentrant=True), fullgraph=False
        )
    actual = train(call, model, xs)
    assert_same(actual[1], expected[1])
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert_same(actual[0]["norm." + name], expected[0]["norm." + name])


def test_replicas():
    """Around a DataParallel, whose first replica holds the statistics."""
    torch.manual_seed(0)
    alone, xs = Block(), inputs(3)
    expected, _ = train(alone, alone, [x.detach().clone().requires_grad_() for x in xs])
    model = syncbn.DataParallel(syncbn.convert(Block()), ["cpu"] * 2)
    call = correcting(model, True)
    assert_same(train(call, model.module, xs)[0], expected)


def test_copies_owe_nothing():
    model = syncbn.convert(Block())
    y = correcting(model, False)(inputs(1)[0])
    other = copy.deepcopy(model)
    call_in_backward(other)
    y.sum().backward()
    assert other.norm.num_batches_tracked == 0
    assert model.norm.num_batches_tracked == 1


class LowersMomentum(CheckpointFunction):
    """As pytorch-pfn-extras': for good, at a module's first call."""

    @staticmethod
    def forward(ctx, module, *args):
        for layer in module.modules():
            patched = hasattr(layer, "_bn_momentum_patched")
            if isinstance(layer, nn.modules.batchnorm._BatchNorm) and not patched:
                layer.momentum = layer.momentum and 1 - (1 - layer.momentum) ** 0.5
            layer._bn_momentum_patched = True
        return CheckpointFunction.forward(ctx, module, *args)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_checkpoints_that_lower_the_momentum(momentum):
    """They leave layers alone that say they are patched, which these do: one move is one move."""
    torch.manual_seed(0)
    alone, xs = Block(momentum), inputs(3)
    expected, _ = train(alone, alone, [x.detach().clone().requires_grad_() for x in xs])
    model = syncbn.convert(Block(momentum))
    actual, _ = train(lambda x: LowersMomentum.apply(model, True, x), model, xs)
    assert_same(actual, expected)
    assert model.norm.momentum == momentum
