"""Other libraries' layers, known by their classes' names: the real classes, where they install.

make test-frameworks installs them; tests/models/test_known.py has stand-ins of these and others.
"""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import syncbn
from support import torchvision_stub
from support.layers import assert_same, saved_and_loaded, snapshot
from support.shares import Job, assert_ranks_equal_one_process, step, varied

IMAGES, POINTS, STEPS = (3, 4, 5, 5), (20, 4), (3, 2, 4, 5, 5)
TIMM = {"efficientnet_b0": 49, "regnetx_002": 44, "mobilenetv3_small_100": 34}


def timm():
    torchvision_stub.install()
    return pytest.importorskip("timm", reason="timm is not installed")


def spiking():
    return pytest.importorskip("spikingjelly.activation_based.layer", reason="no spikingjelly")


def abn():
    return pytest.importorskip("inplace_abn", reason="inplace_abn is not installed")


def split():
    timm()
    return __import__("timm.layers", fromlist=["SplitBatchNorm2d"]).SplitBatchNorm2d(4)


LAYERS = {
    "timm BatchNormAct2d": (lambda: timm().layers.BatchNormAct2d(4), IMAGES, 0),
    "timm SyncBatchNormAct": (
        lambda: timm().layers.convert_sync_batchnorm(timm().layers.BatchNormAct2d(4)),
        *(IMAGES, 0),
    ),
    "spikingjelly s": (lambda: spiking().BatchNorm2d(4), IMAGES, 0),
    "spikingjelly m": (lambda: spiking().BatchNorm2d(4, step_mode="m"), STEPS, 1),
    "spikingjelly 1d": (lambda: spiking().BatchNorm1d(4, step_mode="m"), (3, 5, 4), 1),
    "spikingjelly tdBN": (lambda: spiking().ThresholdDependentBatchNorm2d(1.0, 0.5, 4), STEPS, 1),
    "spikingjelly TEBN": (lambda: spiking().TemporalEffectiveBatchNorm2d(3, 4), STEPS, 1),
    "PyG": (
        lambda: pytest.importorskip("torch_geometric.nn.norm", reason="no PyG").BatchNorm(4),
        *(POINTS, 0),
    ),
    "mmengine": (
        lambda: pytest.importorskip("mmengine.model.utils", reason="no mmengine")._BatchNormXd(4),
        *(IMAGES, 0),
    ),
    "mmengine of SyncBN": (
        lambda: pytest.importorskip("mmengine.model", reason="no mmengine").revert_sync_batchnorm(
            nn.Sequential(nn.SyncBatchNorm(4))
        ),
        *(IMAGES, 0),
    ),
    "inplace_abn ABN": (lambda: abn().ABN(4, activation="relu"), IMAGES, 0),
    "inplace_abn InPlaceABN": (lambda: Functional(abn().InPlaceABN(4)), IMAGES, 0),
    "inplace_abn elu": (
        lambda: Functional(abn().InPlaceABN(4, activation="elu", activation_param=1.0)),
        *(IMAGES, 0),
    ),
    "timm InplaceAbn": (lambda: Functional(abn() and timm().layers.InplaceAbn(4)), IMAGES, 0),
}
any_layer = pytest.mark.parametrize("name", LAYERS)


class Functional(nn.Module):
    """For a layer that overwrites its input, which must be no leaf."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x * 1)


def layer_job(name):
    make, shape, axis = LAYERS[name]
    layer, more = varied(make()), list(shape)
    more[axis] += 2
    shares = [torch.randn(size, dtype=torch.float64) * 3 + 5 for size in (shape, more)]
    return Job(layer, shares, axis)


def model_job(name):
    torch.manual_seed(0)
    model = timm().create_model(name, num_classes=5).double()
    return Job(model, [torch.randn(size, 3, 64, 64, dtype=torch.float64) for size in (2, 3)])


def converted(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return syncbn.convert(model)


@any_layer
def test_two_ranks_equal_the_librarys_layer_on_the_whole_batch(ranks, name):
    # Theirs that work in place compute their input back from the activated output.
    inverted = type(LAYERS[name][0]()).__name__ == "Functional"
    assert_ranks_equal_one_process(ranks, layer_job, name, factor=1e4 if inverted else 10)


@any_layer
def test_revert_gives_back_all_that_was(name):
    layer, (x, _), *_ = layer_job(name)
    before, keys = snapshot(layer), list(layer.state_dict())
    converted(layer)
    assert list(layer.state_dict()) == keys
    layer.load_state_dict(saved_and_loaded(layer.state_dict()))
    copies = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    copies.append(saved_and_loaded(layer, weights_only=False))
    expected = step(layer, x, None)
    for other in copies:
        assert type(other) is type(layer)
        for mine, its in zip(expected, step(other, x, None), strict=True):
            assert torch.equal(mine, its)
    repr(layer)
    layer.zero_grad()
    assert_same(before, snapshot(syncbn.revert(layer)))


@pytest.mark.parametrize("name", TIMM)
def test_timms_models_convert_whole(ranks, name):
    model = model_job(name).model
    norms = [layer for layer in model.modules() if isinstance(layer, _BatchNorm)]
    before, keys = snapshot(model), list(model.state_dict())
    converted(model)
    ours = [layer for layer in model.modules() if isinstance(layer, syncbn.SyncBatchNorm)]
    assert ours == norms
    assert len(ours) == TIMM[name]
    assert list(model.state_dict()) == keys
    assert_same(before, snapshot(syncbn.revert(model)))
    assert_ranks_equal_one_process(ranks, model_job, name, factor=1e4)


def test_timms_split_batch_norm(ranks):
    def train(rank):
        torch.manual_seed(rank)
        layer = converted(split().double())
        x = torch.randn(4, 4, 2, 2, dtype=torch.float64)
        return x, layer(x).detach()

    split()
    (x0, y0), (x1, y1) = ranks(2, train)
    for part in (slice(0, 2), slice(2, 4)):
        whole = torch.cat([x0[part], x1[part]])
        expected = nn.BatchNorm2d(4).double()(whole)
        torch.testing.assert_close(torch.cat([y0[part], y1[part]]), expected)


def test_timms_conversion_after_ours_and_ours_after_timms():
    layers = timm().layers
    model = nn.Sequential(layers.BatchNormAct2d(4), nn.BatchNorm2d(4))
    theirs = layers.convert_sync_batchnorm(copy.deepcopy(model))
    converted(theirs)
    assert [type(layer).__name__ for layer in theirs] == ["SyncBatchNormAct", "SyncBatchNorm"]
    x = torch.randn(3, 4, 5, 5)
    torch.testing.assert_close(theirs(x), model(x))


def test_timms_frozen_layers_stay():
    layers = timm().layers
    model = nn.Sequential(layers.BatchNormAct2d(4), nn.BatchNorm2d(4))
    frozen = layers.freeze_batch_norm_2d(nn.Sequential(copy.deepcopy(model[0])))
    both = nn.Sequential(frozen, model)
    before = snapshot(frozen)
    converted(both)
    assert_same(before, snapshot(frozen))


def test_spikingjellys_layers_of_each_step_hold_layers_that_convert():
    model = converted(spiking().BatchNormThroughTime2d(3, 4))
    assert {type(layer) for layer in model.bn_list} == {syncbn.SyncBatchNorm2d}
    assert model(torch.randn(IMAGES)).shape == IMAGES


def test_spikingjelly_sets_the_mode_of_converted_layers():
    functional = pytest.importorskip("spikingjelly.activation_based.functional", reason="no it")
    model = converted(nn.Sequential(spiking().BatchNorm2d(4)))
    functional.set_step_mode(model, "m")
    assert model[0].step_mode == "m"
    assert model(torch.randn(STEPS)).shape == STEPS
    with pytest.raises(ValueError, match=r"expected x with shape \[T, N, C, H, W\]"):
        model(torch.randn(IMAGES))
