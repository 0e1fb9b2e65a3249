"""Layers of other libraries, known by their classes' names; stand-ins of support/foreign.py."""

import copy
import logging
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F

import syncbn
from support import foreign, oracle
from support.layers import assert_same, saved_and_loaded, snapshot
from support.shares import Job, assert_ranks_equal_one_process, step, varied, weights
from syncbn.comm import Local
from syncbn.models.known import table
from syncbn.models.registry import is_candidate

IMAGES, POINTS, STEPS = (3, 4, 5, 5), (20, 4), (3, 2, 4, 5, 5)


def made(cls, **attributes):
    """As timm's conversion makes a SyncBatchNormAct: by attributes that it sets."""
    layer = cls(4)
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def sparse(x):
    return foreign.Sparse(features=x, indices=torch.arange(len(x)))


# name: what makes a layer, of what shape its input is on a rank, along which dimension ranks share
# the batch, and what the library puts around the values.
CASES = {
    "timm BatchNormAct2d": (lambda: foreign.BatchNormAct2d(4), IMAGES, 0, None),
    "timm SyncBatchNormAct": (
        lambda: made(foreign.SyncBatchNormAct, drop=nn.Identity(), act=nn.SiLU()),
        *(IMAGES, 0, None),
    ),
    "timm InplaceAbn": (lambda: foreign.InplaceAbn(4), IMAGES, 0, None),
    "detectron2 Naive": (lambda: foreign.NaiveSyncBatchNorm(4, stats_mode=""), IMAGES, 0, None),
    "detectron2 Naive N": (lambda: foreign.NaiveSyncBatchNorm(4, stats_mode="N"), IMAGES, 0, None),
    "mmengine 4D": (lambda: foreign._BatchNormXd(4), IMAGES, 0, None),
    "mmengine 2D": (lambda: foreign._BatchNormXd(4), POINTS, 0, None),
    "mmcv": (lambda: foreign.MmcvSyncBatchNorm(4), IMAGES, 0, None),
    "apex": (lambda: foreign.ApexSyncBatchNorm(4), IMAGES, 0, None),
    "apex channel_last": (
        lambda: foreign.ApexSyncBatchNorm(4, channel_last=True, fuse_relu=True),
        *((3, 5, 5, 4), 0, None),
    ),
    "apex in Python": (lambda: foreign.ApexSyncBatchNormInPython(4), IMAGES, 0, None),
    "inplace_abn ABN": (lambda: foreign.ABN(4), IMAGES, 0, None),
    "inplace_abn InPlaceABN": (lambda: foreign.InPlaceABN(4, "elu", 1.0), IMAGES, 0, None),
    "inplace_abn InPlaceABNSync": (lambda: foreign.InPlaceABNSync(4, "identity"), IMAGES, 0, None),
    "torchsparse": (lambda: foreign.BatchNorm(4), POINTS, 0, sparse),
    "spconv": (lambda: foreign.SparseBatchNorm(4), POINTS, 0, sparse),
    "spconv Sync": (lambda: foreign.SparseSyncBatchNorm(4), POINTS, 0, sparse),
    "spconv Sequential": (
        lambda: foreign.SparseSequential(nn.BatchNorm1d(4), nn.ReLU()),
        *(POINTS, 0, sparse),
    ),
    "MinkowskiEngine": (lambda: foreign.MinkowskiBatchNorm(4), POINTS, 0, sparse),
    "MinkowskiEngine Sync": (lambda: foreign.MinkowskiSyncBatchNorm(4), POINTS, 0, sparse),
    "PyG": (lambda: foreign.PyGBatchNorm(4), POINTS, 0, None),
    "spikingjelly s": (lambda: foreign.BatchNorm2d(4), IMAGES, 0, None),
    "spikingjelly m": (lambda: foreign.BatchNorm2d(4, "m"), STEPS, 1, None),
    "spikingjelly TEBN": (lambda: foreign.TemporalEffectiveBatchNorm2d(3, 4), STEPS, 1, None),
}
any_layer = pytest.mark.parametrize("name", CASES)


def job(name):
    make, shape, axis, around = CASES[name]
    layer, more = varied(make()), list(shape)
    more[axis] += 2
    shares = [torch.randn(size, dtype=torch.float64) * 3 + 5 for size in (shape, more)]
    return Job(layer, shares, axis, around)


@any_layer
def test_two_ranks_equal_the_librarys_layer_on_the_whole_batch(ranks, name):
    assert_ranks_equal_one_process(ranks, job, name)


@any_layer
def test_revert_gives_back_all_that_was(name):
    with foreign.imported():
        layer, (x, _), _, around = job(name)
        model = nn.ModuleDict({"norm": layer, "plain": nn.BatchNorm2d(4)})
        before, keys = snapshot(model), list(model.state_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            syncbn.convert(syncbn.convert(model))
        assert list(model.state_dict()) == keys
        assert any(isinstance(part, syncbn.SyncBatchNorm) for part in layer.modules())
        model.load_state_dict(saved_and_loaded(model.state_dict()))
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
        copies.append(saved_and_loaded(model, weights_only=False))
        expected = step(layer, x, around)
        for other in copies:
            assert type(other["norm"]) is type(layer)
            for mine, its in zip(expected, step(other["norm"], x, around), strict=True):
                assert torch.equal(mine, its)
            assert type(syncbn.revert(other)["norm"]) is before["norm"][1]
        repr(model)
        model.load_state_dict(model.state_dict())
        model.zero_grad()
        syncbn.revert(model)
        assert_same(before, snapshot(model))


def test_timm_equals_the_oracle(ranks):
    def train(rank):
        layer, shares, _, _ = job("timm BatchNormAct2d")
        return *step(syncbn.convert(layer), shares[rank], None), layer.weight.grad

    layer, shares, _, _ = job("timm BatchNormAct2d")
    y, dx, dweight = zip(*ranks(2, train), strict=True)
    x, dy = torch.cat(shares), torch.cat([weights(share) for share in shares])
    normal = oracle.batch_norm(x, dy, layer.weight, layer.bias).y
    expected = oracle.batch_norm(x, dy * (normal > 0), layer.weight, layer.bias)
    oracle.assert_close(torch.cat(y), F.relu(normal))
    oracle.assert_close(torch.cat(dx), expected.dx, factor=4)
    oracle.assert_close(sum(dweight), expected.dweight, factor=4)


def test_a_split_batch_norm_normalises_each_split_over_all_ranks(ranks):
    def train(rank):
        torch.manual_seed(rank)
        layer = syncbn.convert(foreign.SplitBatchNorm2d(3)).double()
        x = torch.randn(4, 3, 2, 2, dtype=torch.float64)
        return x, layer(x), [type(part).__name__ for part in layer.modules()]

    (x0, y0, kinds), (x1, y1, _) = ranks(2, train)
    assert kinds == ["SyncSplitBatchNorm2d", "ModuleList", "SyncBatchNorm2d"]
    for part in (slice(0, 2), slice(2, 4)):
        whole = torch.cat([x0[part], x1[part]])
        expected = oracle.batch_norm(whole, whole).y
        oracle.assert_close(torch.cat([y0[part], y1[part]]), expected)


@any_layer
def test_what_is_known_is_found_and_isinstance_still_holds(name):
    layer = CASES[name][0]()
    inner = next(part for part in layer.modules() if is_candidate(part))
    cls, rule = type(inner), table.rule_of(type(inner))
    syncbn.convert(layer)
    assert isinstance(inner, syncbn.SyncBatchNorm)
    assert not isinstance(inner, nn.SyncBatchNorm), "DistributedDataParallel refuses it on a CPU"
    assert isinstance(inner, cls) or rule is None or not rule.keeps


def test_a_group_that_the_library_keeps_by_another_name_is_used():
    group = Local()
    layer = foreign.InPlaceABNSync(4, group=group)
    syncbn.convert(layer)
    assert layer.process_group is group
    other = object()
    layer.set_group(other)
    assert layer.process_group is layer.group is other
    syncbn.revert(layer)
    assert "process_group" not in vars(layer)
    assert layer.group is other
    apex = foreign.ApexSyncBatchNorm(4, process_group=group)
    state = snapshot(apex)
    assert_same(state, snapshot(syncbn.revert(syncbn.convert(apex))))


def test_apex_adds_what_it_is_given():
    layer, x, z = foreign.ApexSyncBatchNorm(4, fuse_relu=True), *torch.randn(2, 3, 4, 5, 5)
    expected = copy.deepcopy(layer)(x, z)
    torch.testing.assert_close(syncbn.convert(layer)(x, z), expected)


def test_frozen_layers_stay_frozen_and_are_named(caplog):
    model = nn.Sequential(foreign.FrozenBatchNorm2d(4), nn.BatchNorm2d(4))
    before = snapshot(model[0])
    with caplog.at_level(logging.INFO, "syncbn"), warnings.catch_warnings():
        warnings.simplefilter("error")
        syncbn.convert(model)
    assert_same(before, snapshot(model[0]))
    assert caplog.messages == [
        "convert: frozen, and so left as they are: "
        "1 × detectron2.layers.batch_norm.FrozenBatchNorm2d (0)"
    ]
    frozen = nn.Sequential(foreign.FrozenBatchNormAct2d(4), foreign.TorchvisionFrozen(4))
    text = r"found none in Sequential but frozen ones: 1 × timm\..*, 1 × torchvision\.ops\.misc\."
    with pytest.warns(UserWarning, match=text):
        syncbn.convert(frozen)
    assert not is_candidate(frozen[0])


def test_subclasses_and_registrations_of_the_users_come_first(monkeypatch):
    class Plain(foreign.BatchNormAct2d):
        def __init__(self):
            super().__init__(4)

    class Behaving(foreign.BatchNormAct2d):
        def forward(self, x):
            return -super().forward(x)

    class Mine(syncbn.SyncBatchNorm2d):
        pass

    model = nn.Sequential(Plain(), Behaving(4))
    with pytest.warns(UserWarning, match=r"left alone.*Behaving \(1\)"):
        syncbn.convert(model)
    assert type(model[0]).__name__ == "SyncBatchNormAct2d"
    assert type(syncbn.revert(model)[0]) is Plain
    targets = dict(syncbn.models.registry._TARGETS)
    monkeypatch.setattr(syncbn.models.registry, "_TARGETS", targets)
    syncbn.register_conversion(foreign.BatchNormAct2d, Mine)
    assert type(syncbn.convert(foreign.BatchNormAct2d(4))) is Mine


def test_freeze_and_recalibrate_know_them():
    for name in ("inplace_abn ABN", "torchsparse", "spikingjelly m", "apex channel_last"):
        layer, (x, _), _, around = job(name)
        batch = around(x) if around else x
        syncbn.recalibrate(layer, [(batch,)])
        place = {"spikingjelly m": 2, "apex channel_last": -1}.get(name, 1)
        mean = x.movedim(place, 0).flatten(1).mean(1)
        oracle.assert_close(layer.running_mean, mean)
        syncbn.recalibrate(syncbn.convert(layer), [(batch,)])
        oracle.assert_close(layer.running_mean, mean)
        assert not syncbn.freeze(layer).train().training
    assert syncbn.freeze(foreign.ABN(4)).train().training is False


def test_names_that_pickles_know():
    """A name that is in files cannot change."""
    with foreign.imported():
        target = syncbn._timm_BatchNormAct2d
        assert type(syncbn.convert(foreign.BatchNormAct2d(4))) is target
        assert syncbn._apex_SyncBatchNorm is type(syncbn.convert(foreign.ApexSyncBatchNorm(4)))
    assert (target.__module__, target.__name__) == ("syncbn", "SyncBatchNormAct2d")
    for missing in ("_timm_Nothing", "nothing", "_mmengine_BatchNormXd"):
        with pytest.raises(AttributeError, match=f"module 'syncbn' has no attribute '{missing}'"):
            getattr(syncbn, missing)
    made = [
        rule.attribute(source)
        for rule in table._ALL
        if rule.keeps or rule.front
        for source in rule.sources
    ]
    assert len(set(made)) == len(made), "two that pickles cannot tell apart"


def test_sharded_layers_convert_and_revert(ranks):
    """fully_shard puts its class in front of the layer's, before or after convert."""

    def train(rank):
        torch.manual_seed(rank)
        x = torch.randn(3, 4, 5, 5)
        outputs, names = [], []
        for first in (syncbn.convert, lambda layer: layer):
            model = nn.Sequential(foreign.BatchNormAct2d(4))
            first(model)
            fully_shard(model[0])
            fully_shard(model)
            sharded = type(model[0])
            syncbn.convert(model)
            names.append(type(model[0]).__name__)
            outputs.append(model(x))
            if first is not syncbn.convert:
                assert type(syncbn.revert(model)[0]) is sharded
        return x, outputs, names

    (x0, first, names), (x1, second, _) = ranks(2, train)
    assert names == ["FSDPSyncBatchNormAct2d"] * 2
    expected = foreign.BatchNormAct2d(4)(torch.cat([x0, x1]))
    for outputs in zip(first, second, strict=True):
        torch.testing.assert_close(torch.cat(outputs), expected)
