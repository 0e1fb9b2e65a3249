"""Layers that are known by name, and left as they are: another layout, or nothing to become."""

import pytest
from torch import nn

import syncbn
from support import foreign
from support.layers import assert_same, snapshot


def another(cls, *bases, **changes):
    """The class of another version, by the same name."""
    body = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, **changes}
    return type(cls.__name__, bases or cls.__bases__, body)


def without(name):
    layer = foreign.BatchNormAct2d(4)
    del layer._modules[name]
    return layer


LAYOUTS = {
    "attribute": (lambda: without("act"), r"expected attributes .*, drop, act, got none named act"),
    "inputs": (
        lambda: another(foreign.NaiveSyncBatchNorm, forward=lambda self, x, mask: x)(4),
        r"expected a forward of 1 input, got forward\(x, mask\)",
    ),
    "base": (
        lambda: another(foreign.SparseBatchNorm, nn.BatchNorm2d, forward=lambda self, x: x)(4),
        r"expected a subclass of torch\.nn\.modules\.batchnorm\.BatchNorm1d, got one of torch\.nn",
    ),
    "activation": (
        lambda: foreign.ABN(4, "selu"),
        "expected an activation of relu, leaky_relu, elu, identity, got 'selu'",
    ),
}


@pytest.mark.parametrize("fault", LAYOUTS)
def test_a_version_of_another_layout_is_left_alone_and_named(fault):
    make, text = LAYOUTS[fault]
    model = nn.Sequential(nn.BatchNorm2d(4), make(), foreign.BatchNormAct2d(4))
    before = snapshot(model[1])
    reason = rf"^convert: left alone, because of another version's layout .* \({text}.*"
    with pytest.warns(UserWarning, match=rf"{reason}: 1 × .* \(1\)") as caught:
        syncbn.convert(model)
    assert len(str(caught[0].message)) <= 600
    assert_same(before, snapshot(model[1]))
    assert isinstance(model[0], syncbn.SyncBatchNorm)
    assert isinstance(model[2], syncbn.SyncBatchNorm)


def test_what_cannot_be_converted_says_why():
    model = nn.Sequential(foreign.BatchNorm2d_NHWC(4), foreign.HeteroBatchNorm(4, 2))
    with pytest.warns(UserWarning, match="nothing at all was converted") as caught:
        syncbn.convert(model)
    (text,) = (str(each.message) for each in caught)
    assert "in kernels of their own" in text
    assert "statistics for each type of node: 1 × torch_geometric" in text
    assert len(text) <= 600


def test_a_layer_that_a_rank_may_pass_by_is_left_alone():
    model = nn.Sequential(foreign.PyGBatchNorm(4, allow_single_element=True), nn.BatchNorm1d(4))
    with pytest.warns(UserWarning, match=r"left alone, because allow_single_element=True .*0\.mod"):
        syncbn.convert(model)
    assert type(model[0].module) is nn.BatchNorm1d
    assert type(model[1]) is syncbn.SyncBatchNorm1d
