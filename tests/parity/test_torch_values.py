"""torch.nn's batch norms against ours on one process: outputs, gradients and buffers."""

import pytest
import torch
from torch import nn

import syncbn
from support.cases import laid_out, layouts
from support.layers import SHAPE_OF, assert_same_training, classes, identical, observe, pair

SHAPES = [(6, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 2, 3, 4)]
CASES = [(shape, layout) for shape in SHAPES for layout in layouts(len(shape))]
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
momenta = pytest.mark.parametrize("momentum", [0.1, None, 1.0, 0.0])


def same(mine, theirs, dtype, check_stride=True):
    tolerance = {"rtol": TOLERANCE[dtype], "atol": TOLERANCE[dtype]}
    torch.testing.assert_close(mine, theirs, **tolerance, check_stride=check_stride)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("track", [True, False], ids=["tracking", "not tracking"])
@momenta
@pytest.mark.parametrize("affine", ["affine", "no bias", "plain"])
@pytest.mark.parametrize(("shape", "layout"), CASES)
def test_every_option(shape, layout, affine, momentum, track, dtype):
    """In train, train, eval, train, eval mode, of the checked layers and the general one."""
    options = {"momentum": momentum, "track_running_stats": track, "eps": 1e-3, "dtype": dtype}
    for generic in (True, False):
        ours, theirs = pair(
            len(shape), generic, affine == "affine", affine=affine != "plain", **options
        )
        for training in (True, True, False, True, False):
            x = laid_out(torch.randn(shape, dtype=dtype) * 2 + 1, layout)
            ours.train(training), theirs.train(training)
            # torch makes other dense layouts contiguous, our compiled operators keep them.
            same(observe(ours, x), observe(theirs, x), dtype, layout != "transposed")


@pytest.mark.parametrize("shape", SHAPES)
def test_torchs_sync_batch_norm_on_one_process(shape):
    """Without a group it is BatchNorm for any shape, on the CPU too."""
    assert_same_training(syncbn.SyncBatchNorm(3), nn.SyncBatchNorm(3), shape)


@classes
def test_train_and_eval_switch_as_any_module(torchs, ours):
    for layer in (torchs(3), ours(3)):
        model = nn.Sequential(layer)
        assert layer.training
        assert not model.eval()[0].training
        assert model.train()[0].training
        assert not any(p.requires_grad for p in layer.requires_grad_(False).parameters())


def test_momentum_none_averages_all_batches():
    mine, theirs = pair(4, momentum=None, dtype=torch.float64)
    batches = torch.randn(5, 4, 3, 2, 2, dtype=torch.float64)
    for batch in batches:
        mine(batch), theirs(batch)
    same(dict(mine.named_buffers()), dict(theirs.named_buffers()), torch.float64)
    same(mine.running_mean, batches.mean((0, 1, 3, 4)), torch.float64)


@pytest.mark.parametrize("training", [True, False])
def test_no_tracking_means_no_buffers_and_batch_statistics_in_eval_too(training):
    mine, theirs = pair(4, track_running_stats=False)
    x = torch.randn(4, 3, 5, 2)
    mine.train(training), theirs.train(training)
    identical(observe(mine, x), observe(theirs, x))
    assert not list(mine.buffers())
    normal = (mine(x) - mine.bias.view(-1, 1, 1)) / mine.weight.view(-1, 1, 1)
    torch.testing.assert_close(normal.mean((0, 2, 3)), torch.zeros(3), rtol=0, atol=1e-5)


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("dropped", ["all", "statistics", "num_batches_tracked"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_buffers_set_to_none(dropped, momentum, track):
    layers = pair(4, momentum=momentum)
    for layer in layers:
        layer.track_running_stats = track
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            if dropped == "all" or (dropped == "statistics") == name.startswith("running"):
                setattr(layer, name, None)
    assert_same_training(*layers, (4, 3, 5, 2))


def test_num_batches_tracked_none_is_taken_as_batch_norm_does():
    """torch.nn.SyncBatchNorm raises AssertionError there."""
    x, theirs = torch.randn(4, 3), nn.SyncBatchNorm(3)
    theirs.num_batches_tracked = None
    with pytest.raises(AssertionError, match="num_batches_tracked"):
        theirs(x)
    layers = syncbn.SyncBatchNorm(3), nn.BatchNorm1d(3)
    for layer in layers:
        layer.num_batches_tracked = None
    assert_same_training(*layers, (4, 3))


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_empty_batches(shape, training):
    ours, theirs = (layer.train(training) for layer in pair(len(shape)))
    identical(observe(ours, torch.empty(shape)), observe(theirs, torch.empty(shape)))


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_frozen_parameters(frozen):
    ours, theirs = pair(4)
    for layer in (ours, theirs):
        for name in frozen:
            getattr(layer, name).requires_grad_(False)
    assert_same_training(ours, theirs, (4, 3, 5, 2))
    assert all(getattr(ours, name).grad is None for name in frozen)
    x = torch.randn(4, 3, 5, 2)
    assert ours(x).requires_grad == theirs(x).requires_grad == (len(frozen) == 1)


def test_an_eval_layer_in_a_training_model():
    ours, theirs = (nn.Sequential(nn.Conv2d(3, 3, 1), layer).train() for layer in pair(4))
    theirs[0].load_state_dict(ours[0].state_dict())
    ours[1].eval(), theirs[1].eval()
    x = torch.randn(4, 3, 5, 2)
    identical(observe(ours, x), observe(theirs, x))
    assert ours[1].num_batches_tracked == 0


@pytest.mark.parametrize("training", [True, False])
@classes
def test_keyword_input_and_a_functional_call(torchs, ours, training):
    mine, theirs = ours(3).train(training), torchs(3).train(training)
    x = torch.randn(SHAPE_OF.get(torchs, (4, 3, 2, 2)))
    identical(mine(input=x), theirs(input=x))
    state = {name: torch.full_like(t, 2) for name, t in theirs.state_dict().items()}
    identical(*(torch.func.functional_call(layer, dict(state), (x,)) for layer in (mine, theirs)))


TRANSFORMS = {
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x.square(),)),
    "jacrev": lambda layer, x: torch.func.jacrev(layer)(x),
    "vmap": lambda layer, x: torch.func.vmap(layer)(torch.stack((x, 2 * x, x + 1))),
    "autocast": lambda layer, x: torch.autocast("cpu", torch.bfloat16)(layer)(x),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("training", [True, False])
def test_function_transforms(transform, training):
    # Statistics that move in a transform are refused, by torch.
    mine, theirs = pair(4, track_running_stats=not training)
    x = torch.randn(4, 3, 2, 2)
    outcomes = [TRANSFORMS[transform](layer.train(training), x) for layer in (mine, theirs)]
    torch.testing.assert_close(*outcomes, rtol=1e-5, atol=1e-5)
