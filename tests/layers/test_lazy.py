"""Lazy layers become what their first input or state dict asks for, and stay lazy until then."""

import copy
import pickle

import pytest
import torch
from torch import nn

import syncbn
from support.layers import LAZY, PLAIN, Pair, identical, observe, saved_and_loaded

lazy_forms = pytest.mark.parametrize(
    ("lazy", "plain", "dims"),
    list(zip([syncbn.LazySyncBatchNorm, *LAZY.values()], PLAIN, (6, 3, 4, 5), strict=True)),
)


@lazy_forms
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": False, "eps": 1e-3, "momentum": None},
        {"affine": False},
        {"track_running_stats": False},
        {"affine": False, "track_running_stats": False},
        {"dtype": torch.float64, "process_group": Pair()},
    ],
)
def test_lazy_layers_become_what_the_first_input_asks_for(lazy, plain, dims, options):
    layer, expected = lazy(**options), plain(3, **options)
    x = torch.randn(4, 3, *(2,) * (dims - 2), dtype=options.get("dtype"))
    identical(observe(layer, x), observe(expected, x))
    assert type(layer) is plain
    assert layer.extra_repr() == expected.extra_repr()
    assert vars(layer).keys() == vars(expected).keys()
    assert layer.process_group is expected.process_group


@lazy_forms
@pytest.mark.parametrize("bad", ["dimensions", "no channels", "integers", "no tensor", "keyword"])
def test_a_bad_first_input_leaves_a_layer_lazy(lazy, plain, dims, bad):
    good = torch.randn(4, 3, *(2,) * (dims - 2))
    inputs = {
        "dimensions": torch.randn(2)
        if lazy is syncbn.LazySyncBatchNorm
        else torch.randn(2, 3, 1, 1, 1, 1),
        "no channels": good[:, :0],
        "integers": good.int(),
        "no tensor": good.tolist(),
    }
    layer = lazy()
    with pytest.raises((TypeError, ValueError)):
        layer(wrong=good) if bad == "keyword" else layer(inputs[bad])
    assert type(layer) is lazy
    assert layer.num_features == 0
    assert layer.has_uninitialized_params()
    layer(input=good)
    assert type(layer) is plain


@lazy_forms
def test_a_lazy_layer_takes_its_size_from_a_state_dict(lazy, plain, dims):
    trained, layer = plain(3), lazy()
    x = torch.randn(4, 3, *(2,) * (dims - 2))
    trained(x)
    layer.load_state_dict(saved_and_loaded(trained.state_dict()))
    identical(dict(layer.state_dict()), dict(trained.state_dict()))
    identical(observe(layer, x), observe(trained, x))
    assert (type(layer), layer.num_features) == (plain, 3)


def test_a_loaded_lazy_layer_keeps_its_size_when_the_first_input_has_another():
    layer = syncbn.LazySyncBatchNorm2d()
    layer.load_state_dict(syncbn.SyncBatchNorm2d(3).state_dict())
    with pytest.raises(ValueError, match=r"expected .* of shape \(5,\)"):
        layer(torch.randn(4, 5, 2, 2))
    layer(torch.randn(4, 3, 2, 2))
    assert layer.num_features == 3


@pytest.mark.parametrize("through", ["state dict", "pickle", "deepcopy"])
@lazy_forms
def test_a_lazy_layer_travels_while_lazy(lazy, plain, dims, through):
    layer, other = lazy(momentum=None, bias=False), lazy(momentum=None, bias=False)
    if through == "state dict":
        other.load_state_dict(layer.state_dict())
    elif through == "pickle":
        other = pickle.loads(pickle.dumps(layer))
    else:
        other = copy.deepcopy(layer)
    assert type(other) is lazy
    other(torch.randn(4, 3, *(2,) * (dims - 2)))
    assert (type(other), other.num_features, other.bias) == (plain, 3, None)
    assert (type(layer), layer.num_features) == (lazy, 0)
    assert layer.has_uninitialized_params()


def test_a_lazily_built_model_converts_trains_saves_and_loads():
    def build(norm):
        return nn.Sequential(nn.LazyConv2d(4, 3), norm, nn.ReLU(), nn.Flatten(), nn.LazyLinear(2))

    model, theirs = syncbn.convert(build(nn.LazyBatchNorm2d())), build(nn.LazyBatchNorm2d())
    x = torch.randn(8, 1, 6, 6)
    model(x), theirs(x)
    assert type(model[1]) is syncbn.SyncBatchNorm2d
    theirs.load_state_dict(model.state_dict())
    for net in (model, theirs):
        optimizer = torch.optim.SGD(net.parameters(), 0.1)
        for _ in range(3):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    identical(model.state_dict(), theirs.state_dict())
    loaded = build(syncbn.LazySyncBatchNorm2d())
    loaded.load_state_dict(saved_and_loaded(model.state_dict()))
    identical(loaded.eval()(x), theirs.eval()(x))
