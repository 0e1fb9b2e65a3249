"""What a layer holds survives resets, copies and pickle; parity/ has the state dicts."""

import copy
import pickle
import re
import warnings

import pytest
import torch
from torch import nn

import syncbn
from support.layers import Pair, assert_same_training, identical, pair, saved_and_loaded
from support.paths import ROOT


@pytest.mark.parametrize("bad", [torch.randn(1, 3, 1, 1), torch.randn(4, 5, 2, 2), torch.ones(4)])
def test_a_forward_that_raises_leaves_the_state_alone(bad):
    layer = syncbn.SyncBatchNorm(3)
    layer(torch.randn(4, 3, 2, 2))
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="input"):
        layer(bad)
    identical(layer.state_dict(), before)


@pytest.mark.parametrize("bias", [True, False])
def test_resets_restore_a_new_layers_state(bias):
    layer, _ = pair(4, bias=bias)
    new = syncbn.SyncBatchNorm2d(3, bias=bias)
    layer(torch.randn(4, 3, 2, 2))
    parameters = {name: p.detach().clone() for name, p in layer.named_parameters()}
    layer.reset_running_stats()
    identical(dict(layer.named_buffers()), dict(new.named_buffers()))
    identical({name: p.detach() for name, p in layer.named_parameters()}, parameters)
    layer.reset_parameters()
    identical(layer.state_dict(), new.state_dict())


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_copies_keep_the_group(copied):
    layer = syncbn.SyncBatchNorm2d(3, process_group=Pair())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert copied(layer).process_group is layer.process_group
        assert copied(nn.Sequential(layer))[0].process_group is layer.process_group


def test_deep_copies_own_their_parameters_and_shallow_ones_share_them():
    layer = syncbn.SyncBatchNorm2d(3)
    layer.mine = ["attribute"]
    deep, shallow = copy.deepcopy(layer), copy.copy(layer)
    assert shallow.weight is layer.weight
    assert shallow.mine is layer.mine
    assert deep.mine == layer.mine
    assert deep.mine is not layer.mine
    deep(torch.randn(4, 3, 2, 2))
    nn.init.zeros_(deep.weight)
    identical(layer.state_dict(), syncbn.SyncBatchNorm2d(3).state_dict())


def test_pickle_drops_the_group_with_a_warning():
    layer = syncbn.SyncBatchNorm2d(3, process_group=Pair())
    with pytest.warns(UserWarning, match="without its process group; set layer.process_group"):
        data = pickle.dumps(layer)
    assert pickle.loads(data).process_group is None
    assert layer.process_group is not None


@pytest.mark.parametrize("through", ["pickle", "torch.save"])
def test_pickle_without_a_group_is_silent_and_complete(through):
    layer = syncbn.SyncBatchNorm2d(3, momentum=None)
    layer(torch.randn(4, 3, 2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if through == "pickle":
            loaded = pickle.loads(pickle.dumps(layer))
        else:
            loaded = saved_and_loaded(layer, weights_only=False)
    assert type(loaded) is syncbn.SyncBatchNorm2d
    assert_same_training(loaded, layer, (4, 3, 2, 2))


def test_models_pickled_by_the_version_before_load_and_work():
    """Their pickles name the files in which classes lived."""
    path = ROOT / "tests" / "data" / "models-0.1.0.pt"
    models = torch.load(path, weights_only=False)
    assert type(models["plain"]) is syncbn.SyncBatchNorm
    assert models["plain"].running_mean.dtype == torch.float64
    assert models["plain"].skip_nonfinite
    assert type(models["lazy"]) is syncbn.LazySyncBatchNorm2d
    assert type(models["made"]) is type(models["replicas"]) is syncbn.DataParallel
    assert models["made"](torch.randn(2, 2, 1, 2, 2)).shape == (2, 2, 1, 2, 2)
    net = models["converted"]
    assert net[1].reproducible
    assert net[1].num_batches_tracked == 1
    before = net(torch.ones(2, 3, 2, 2)).detach()
    syncbn.revert(net)
    assert {type(layer) for layer in net.modules()} & {nn.BatchNorm1d, nn.BatchNorm2d}
    torch.testing.assert_close(net(torch.ones(2, 3, 2, 2)), before)
    assert type(syncbn.revert(models["replicas"])) is nn.DataParallel


def test_pickles_name_public_modules_only():
    model = syncbn.convert(nn.DataParallel(nn.BatchNorm2d(2), []))
    named = {
        m.decode()
        for m in re.findall(
            rb"syncbn[\w.]*", pickle.dumps([model, nn.ModuleList([syncbn.LazySyncBatchNorm()])])
        )
    }
    assert named == {"syncbn"}


def test_a_layer_without_a_counter():
    """As some foreign classes are, and checkpoints of long ago."""
    layer, theirs = syncbn.SyncBatchNorm1d(3), nn.BatchNorm1d(3)
    x = torch.randn(4, 3)
    for each in (layer, theirs):
        each(x)
        del each.num_batches_tracked
        each.eval()
    torch.testing.assert_close(layer(x), theirs(x))
    layer.train().track_running_stats = False
    torch.testing.assert_close(layer(x), nn.functional.batch_norm(x, None, None, training=True))
