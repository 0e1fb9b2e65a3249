"""Layers that are known by name, and left as they are: another layout, or nothing to become."""

import warnings

import pytest
from torch import nn

import syncbn
from support import foreign
from support.layers import assert_same, snapshot
from syncbn.comm import Local
from syncbn.models import registry


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
    "arithmetic": (
        lambda: another(foreign.NaiveSyncBatchNorm, forward=lambda self, x: 2 * x)(4),
        r"expected NaiveSyncBatchNorm's own forward, got test_known_left_alone\.<lambda>",
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


def test_a_layer_that_is_ours_already_is_named_where_a_rank_may_pass_it_by():
    model = nn.Sequential(syncbn.convert(foreign.PyGBatchNorm(4)), nn.BatchNorm1d(4))
    model[0].allow_single_element = True
    group = Local()
    text = r"^convert: may wait for ever, because allow_single_element=True .*1 × syncbn\..*0\.mod"
    with pytest.warns(UserWarning, match=text):
        syncbn.convert(model, group)
    assert model[0].module.process_group is group
    with pytest.warns(UserWarning, match=text):
        syncbn.convert(model[:1])


def test_a_patched_forward_that_the_conversion_would_lose_is_refused(monkeypatch):
    def forward(self, x):
        return x + 1

    monkeypatch.setattr(foreign.BatchNormAct2d, "forward", forward)
    model = nn.Sequential(foreign.BatchNormAct2d(4))
    text = r"another version's layout .* own forward, got test_known_left_alone\.test_a_patched"
    with pytest.warns(UserWarning, match=text):
        syncbn.convert(model)
    assert type(model[0]) is foreign.BatchNormAct2d


def incomplete():
    layer = foreign.SplitBatchNorm2d(4)
    del layer.num_splits
    return layer


class Behaving(foreign.SplitBatchNorm2d):
    def forward(self, x):
        return -super().forward(x)


def hetero():
    layer = foreign.HeteroBatchNorm(4, 2)
    layer.aux_bn = nn.ModuleList([nn.BatchNorm1d(4)])
    return layer


@pytest.mark.parametrize("make", [incomplete, lambda: Behaving(4), hetero], ids="lbh")
@pytest.mark.parametrize("where", [None, lambda name, layer: name != "0"], ids=["all", "where"])
def test_a_layer_left_alone_stays_whole(make, where):
    model = nn.Sequential(make(), nn.BatchNorm2d(4))
    model.shared = model[0].aux_bn  # seen after it, by another name
    before = snapshot(model[0])
    with pytest.warns(UserWarning, match=r"left alone, because .*1 × torch\..* \(0\.aux_bn\.0\)"):
        syncbn.convert(model, where=where)
    assert_same(before, snapshot(model[0]))
    assert isinstance(model[1], syncbn.SyncBatchNorm)


def test_what_a_layer_left_alone_holds_of_ours_stays_ours():
    layer, group = Behaving(4), Local()
    syncbn.convert(layer.aux_bn)
    with pytest.warns(UserWarning, match="nothing at all|left alone"):
        syncbn.convert(layer, group)
    assert layer.aux_bn[0].process_group is group


@pytest.mark.parametrize(
    ("cls", "arguments"), [(foreign.HeteroBatchNorm, (4, 2)), (foreign.FrozenBatchNorm2d, (4,))]
)
def test_a_registration_goes_before_what_stays(cls, arguments, monkeypatch):
    class Mine(cls, syncbn.SyncBatchNorm):
        pass

    monkeypatch.setattr(registry, "_TARGETS", dict(registry._TARGETS))
    syncbn.register_conversion(cls, Mine)
    layer = cls(*arguments)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert type(syncbn.convert(syncbn.convert(layer))) is Mine
