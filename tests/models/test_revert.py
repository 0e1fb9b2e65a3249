"""revert() gives back the torch class that a layer was or stands for, and loses no behaviour."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import syncbn
from support.layers import CLASSES, LAZY, SHAPE_OF, Absolute, classes, identical


@pytest.mark.parametrize(("torchs", "ours"), LAZY.items())
@pytest.mark.parametrize("when", ["lazy", "materialised"])
def test_lazy_layers_revert_to_what_they_would_be_by_then(torchs, ours, when):
    class Own(torchs):
        def __init__(self):
            super().__init__(eps=1e-3)

    x = torch.randn(SHAPE_OF.get(torchs.cls_to_become, (4, 3, 2, 2)))
    for cls in (torchs, Own):
        layer, never = cls(), cls()
        syncbn.convert(layer)
        assert type(layer) is ours
        if when == "materialised":
            layer(x)
            assert type(layer) is ours.cls_to_become
            never(x)
        syncbn.revert(layer)
        assert type(layer) is type(never)
        assert vars(layer).keys() == vars(never).keys()
        identical(layer.eval()(x), never.eval()(x))
        assert type(layer) is torchs.cls_to_become


def test_layers_built_as_syncbn_revert_to_the_class_they_stand_for():
    for torchs, ours in {**CLASSES, **LAZY}.items():
        layer = ours(**({} if torchs in LAZY else {"num_features": 3}))
        state = layer.state_dict(keep_vars=True)
        assert type(syncbn.revert(layer)) is torchs
        assert all(layer.state_dict(keep_vars=True)[name] is state[name] for name in state)


@classes
@pytest.mark.parametrize("through", ["pickle", "deepcopy"])
def test_copies_of_a_converted_model_revert(torchs, ours, through):
    layer = syncbn.convert(nn.Sequential(torchs(3)))
    travel = copy.deepcopy if through == "deepcopy" else lambda m: pickle.loads(pickle.dumps(m))
    other = travel(layer)
    assert type(other[0]) is ours
    syncbn.revert(other)
    assert type(other[0]) is torchs
    assert vars(other[0]).keys() == vars(torchs(3)).keys()
    assert type(layer[0]) is ours, "the original stays converted"


@pytest.mark.parametrize("kept", ["overrides", "parametrized"])
def test_revert_does_not_flatten_subclasses_that_override_behaviour(kept):
    class Sync(syncbn.SyncBatchNorm2d):
        def forward(self, input):
            return super().forward(input).relu()

    layer = Sync(3) if kept == "overrides" else syncbn.convert(nn.BatchNorm2d(3))
    if kept == "parametrized":
        parametrize.register_parametrization(layer, "weight", Absolute())
        nn.init.constant_(layer.parametrizations["weight"].original, -1)
    x = torch.randn(4, 3, 2, 2)
    expected = layer.eval()(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        syncbn.revert(layer)
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=0)


@classes
def test_a_reverted_layer_checks_dimensions_as_before(torchs, ours):
    layer = syncbn.revert(syncbn.convert(torchs(3)))

    def outcome(layer, shape):
        try:
            return layer(torch.ones(shape)).shape
        except ValueError as error:
            return str(error)

    for shape in ((3,), (4, 3), (4, 3, 2), (4, 3, 2, 2), (4, 3, 2, 2, 2)):
        assert outcome(layer, shape) == outcome(torchs(3), shape)
