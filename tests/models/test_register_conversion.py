"""Subclasses convert when that loses nothing or they are registered; others are named."""

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

import syncbn
from support.layers import Absolute, OnlyAConstructor, assert_same, conversions, snapshot


class Overrides(nn.BatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


class Mixin:
    def describe(self):
        return "needed elsewhere"


class OverridesByMixin(Mixin, nn.BatchNorm2d):
    pass


class AddsByMixinBehind(nn.BatchNorm2d, Mixin):
    pass


class OverridesAttribute(nn.BatchNorm2d):
    some_flag = True


OVERRIDING = [Overrides, OverridesByMixin, OverridesAttribute]


def test_where_may_leave_out_overriding_subclasses_without_a_warning():
    model = nn.Sequential(Overrides(3), nn.BatchNorm2d(3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syncbn.convert(model, where=lambda name, layer: not isinstance(layer, Overrides))
    assert [type(layer) for layer in model] == [Overrides, syncbn.SyncBatchNorm2d]


@conversions
def test_overriding_subclasses_are_left_alone_and_named_in_one_warning(convert):
    model = nn.ModuleDict({cls.__name__: cls(3) for cls in OVERRIDING})
    model["parametrized"] = nn.BatchNorm2d(3)
    parametrize.register_parametrization(model["parametrized"], "weight", Absolute())
    model["plain"] = nn.BatchNorm2d(3)
    before = snapshot(model)
    with pytest.warns(UserWarning, match="^convert: left alone, because") as caught:
        convert(model)
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "plain" not in text
    assert "register_conversion" in text
    assert "ParametrizedBatchNorm2d (parametrized)" in text
    for cls in OVERRIDING:
        assert f"1 × {__name__}.{cls.__name__} ({cls.__name__})" in text
    assert type(model["plain"]) is syncbn.SyncBatchNorm2d
    model["plain"] = syncbn.revert(model["plain"])
    assert_same(before, snapshot(model))


@conversions
def test_the_warning_names_a_bare_layer_and_points_to_the_caller(convert):
    with pytest.warns(UserWarning, match=r"Overrides \(the module itself\)") as caught:
        convert(Overrides(3))
    assert caught[0].filename == __file__


def test_a_subclass_keeps_what_a_mixin_behind_batch_norm_adds():
    layer = AddsByMixinBehind(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        syncbn.convert(layer)
    assert layer.describe() == "needed elsewhere"


def test_a_subclass_with_only_a_constructor_comes_back_as_itself():
    layer = OnlyAConstructor(3, extra=9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syncbn.convert(layer)
    assert (type(layer), layer.eps, layer.extra) == (syncbn.SyncBatchNorm2d, 1e-3, 9)
    assert type(syncbn.revert(layer)) is OnlyAConstructor


@pytest.fixture
def registry():
    """Registrations made in a test end with it."""
    targets = syncbn.models.registry._TARGETS
    before = dict(targets)
    yield
    targets.clear()
    targets.update(before)


class SyncOverrides(syncbn.SyncBatchNorm2d):
    def forward(self, input):
        return super().forward(input).relu()


@pytest.mark.usefixtures("registry")
def test_a_registered_class_converts_and_reverts_with_its_plain_subclasses():
    class Sub(Overrides):
        """Nothing of its own."""

    class SubOverrides(Overrides):
        def forward(self, input):
            return -super().forward(input)

    syncbn.register_conversion(Overrides, SyncOverrides)
    model = nn.Sequential(Overrides(3), Sub(3), SubOverrides(3), nn.BatchNorm2d(3))
    before, x = snapshot(model), torch.randn(4, 3, 2, 2)
    with pytest.warns(UserWarning, match=r"left alone.*: 1 × .*SubOverrides \(2\)") as caught:
        syncbn.convert(model)
    assert len(caught) == 1
    expected = [SyncOverrides, SyncOverrides, SubOverrides, syncbn.SyncBatchNorm2d]
    assert [type(layer) for layer in model] == expected
    assert model[0](x).min() == 0
    syncbn.revert(model)
    assert_same(before, snapshot(model))


@pytest.mark.usefixtures("registry")
def test_a_registered_target_built_by_hand_reverts_to_its_source():
    syncbn.register_conversion(Overrides, SyncOverrides)
    assert type(syncbn.revert(SyncOverrides(3))) is Overrides


@pytest.mark.usefixtures("registry")
def test_a_foreign_class_converts_and_the_last_registration_counts():
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            vars(self).update(vars(nn.BatchNorm2d(3)))

    syncbn.register_conversion(Foreign, syncbn.SyncBatchNorm3d)
    syncbn.register_conversion(Foreign, syncbn.SyncBatchNorm2d)
    layer = Foreign()
    before = snapshot(layer)
    syncbn.convert(layer)(torch.randn(4, 3, 2, 2))
    assert_same(before, snapshot(syncbn.revert(layer)))


@pytest.mark.parametrize(
    ("source", "target", "text"),
    [
        (3, syncbn.SyncBatchNorm2d, "expected a subclass of Module as source, got 3"),
        (dict, syncbn.SyncBatchNorm2d, "expected a subclass of Module as source"),
        (nn.BatchNorm2d(3), syncbn.SyncBatchNorm2d, "as source, got BatchNorm2d"),
        (Overrides, nn.BatchNorm2d, "expected a subclass of SyncBatchNorm as target"),
        (Overrides, lambda layer: layer, "as target, got <function"),
    ],
)
def test_wrong_registrations_are_refused(source, target, text):
    with pytest.raises(TypeError, match=f"^register_conversion: .*{text}"):
        syncbn.register_conversion(source, target)


@pytest.mark.parametrize(
    ("operation", "cls"),
    [(syncbn.convert, nn.BatchNorm2d), (syncbn.revert, syncbn.SyncBatchNorm2d)],
)
def test_a_layer_with_a_forward_of_its_own_is_named(operation, cls):
    """As hooks that wrap forward do: the class would change and the old forward would still run."""
    layer = {syncbn.convert: torch.nn.BatchNorm2d, syncbn.revert: syncbn.SyncBatchNorm2d}[
        operation
    ](3)
    inner = layer.forward
    layer.forward = lambda x: inner(x)
    model = torch.nn.Sequential(layer)
    with pytest.warns(UserWarning, match=rf"{operation.__name__}: .*left alone.*\(0\)"):
        operation(model)
    assert type(layer) is cls
