"""torch.nn's batch norms against ours: the error classes for bad input, and where they differ."""

import pytest
import torch
from torch import nn

import syncbn
from support.layers import Silent, classes, pair


def raised(layer, x):
    try:
        layer(x)
    except Exception as error:
        return error
    return None


SHAPES = [(6, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 2, 3, 4), (3,), (), (2, 3, 1, 1, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
@classes
def test_dimensions(torchs, ours, shape):
    mine, theirs = (raised(cls(3), torch.ones(shape)) for cls in (ours, torchs))
    assert type(mine) is type(theirs)
    if theirs is not None:  # "expected 4D input (got 3D input)"
        assert isinstance(theirs, ValueError)
        assert str(theirs) in str(mine)
        assert str(tuple(shape)) in str(mine)


@pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1), (1, 3, 1, 1), (1, 3, 1, 1, 1)])
def test_a_single_value_per_channel(shape):
    x = torch.ones(shape)
    theirs = raised(nn.SyncBatchNorm(3), x)
    batch_statistics = {"track_running_stats": False, "process_group": Silent()}
    layers = [*(pair(len(shape), generic)[0] for generic in (True, False))]
    layers.append(syncbn.SyncBatchNorm(3, **batch_statistics).eval())
    for call in (*layers, lambda x: syncbn.sync_batch_norm(x, None, None)):
        mine = raised(call, x)
        assert type(mine) is type(theirs) is ValueError
        assert str(mine).startswith(str(theirs))
    assert layers[0].num_batches_tracked == 0
    assert all(raised(layer.eval(), x) is None for layer in layers[:2])


def test_no_channels():
    layers = syncbn.SyncBatchNorm(0), nn.SyncBatchNorm(0)
    mine, theirs = (raised(layer, torch.ones(4, 0, 2)) for layer in layers)
    assert type(mine) is type(theirs) is ValueError
    assert "number of input channels should be non-zero" in str(theirs)
    assert "number of input channels should be non-zero" in str(mine)


# torch's class, ours. Where they differ ours says what was expected, and says so before it
# communicates; torch's arises somewhere below the layer.
DIFFERENT = {
    "too many channels": (torch.ones(4, 5, 2, 2), RuntimeError, ValueError),
    "too few channels": (torch.ones(4, 2, 2, 2), RuntimeError, ValueError),
    "integers": (torch.ones(4, 3, 2, 2).long(), (RuntimeError, NotImplementedError), TypeError),
    "complex": (torch.ones(4, 3, 2, 2).cfloat(), (RuntimeError, NotImplementedError), TypeError),
    "no tensor": ([[1.0]], AttributeError, TypeError),
}


@pytest.mark.parametrize("case", DIFFERENT)
@pytest.mark.parametrize("training", [True, False])
def test_classes_that_differ(case, training):
    x, theirs, mine = DIFFERENT[case]
    ours, torchs = (layer.train(training) for layer in pair(4))
    assert isinstance(raised(torchs, x), theirs)
    assert type(raised(ours, x)) is mine


@pytest.mark.parametrize("wrong", [{"momentum": -0.1}, {"momentum": 1.5}, {"eps": -1e-5}])
@classes
def test_options_that_torch_takes_at_construction_are_refused(torchs, ours, wrong):
    torchs(3, **wrong)
    with pytest.raises(ValueError, match=f"expected {next(iter(wrong))}"):
        ours(3, **wrong)


@classes
def test_unknown_and_missing_arguments(torchs, ours):
    for cls in (torchs, ours):
        with pytest.raises(TypeError):
            cls()
        with pytest.raises(TypeError):
            cls(3, unknown=1)
