"""torch.nn.SyncBatchNorm.convert_sync_batchnorm against ours: the same models, and more kept."""

import copy
import inspect
import warnings

import pytest
import torch
from torch import nn

import syncbn
from support.layers import CLASSES, LAZY, Pair, identical

GROUPS = {"no group": None, "group": Pair()}
groups = pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)
both = (nn.SyncBatchNorm.convert_sync_batchnorm, syncbn.SyncBatchNorm.convert_sync_batchnorm)
any_class = pytest.mark.parametrize("torchs", CLASSES)
ATTRIBUTES = ("num_features", "eps", "momentum", "affine", "track_running_stats", "training")


def test_arguments():
    theirs, ours = (inspect.signature(convert).parameters.values() for convert in both)
    assert [(p.name, p.kind, p.default) for p in ours] == [
        (p.name, p.kind, p.default) for p in theirs
    ]


def nested():
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1),
        nn.BatchNorm2d(3, eps=1e-3, momentum=None),
        nn.Sequential(
            nn.BatchNorm2d(3, affine=False), nn.ReLU(), nn.ModuleList([nn.BatchNorm1d(3)])
        ),
        nn.ModuleDict({"deep": nn.ModuleDict({"b": nn.BatchNorm3d(3), "a": nn.Identity()})}),
        nn.SyncBatchNorm(3, track_running_stats=False),
        nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
        nn.GroupNorm(1, 3),
        nn.BatchNorm2d(3, dtype=torch.float16),
    )
    model[2].eval()
    model[1].weight.requires_grad_(False)
    model[1].qconfig = object()
    for buffer in model.buffers():
        buffer.add_(1)
    return model


def converted(convert, model, group):
    """The model that convert returns and, by name, the parameters that went in."""
    parameters = dict(model.named_parameters())
    return convert(model, group), parameters


@groups
def test_nested_models(group):
    models = [nested() for _ in both]
    models[1].load_state_dict(models[0].state_dict())
    models[1][1].qconfig = models[0][1].qconfig
    results = [converted(*arguments, group) for arguments in zip(both, models, strict=True)]
    theirs, ours = (model for model, _ in results)
    assert (theirs, ours) == tuple(models), "in place"
    names = dict(theirs.named_modules())
    assert list(names) == list(dict(ours.named_modules()))
    for name, mine in ours.named_modules():
        its = names[name]
        assert isinstance(mine, syncbn.SyncBatchNorm) == isinstance(its, nn.SyncBatchNorm), name
        if isinstance(its, nn.SyncBatchNorm):
            assert [getattr(mine, a) for a in ATTRIBUTES] == [getattr(its, a) for a in ATTRIBUTES]
            assert mine.process_group is its.process_group is group
            assert getattr(mine, "qconfig", None) is getattr(its, "qconfig", None)
    identical(dict(ours.state_dict()), dict(theirs.state_dict()))
    for model, parameters in results:
        for name, parameter in model.named_parameters():
            assert parameter is parameters[name]
    flags = [[p.requires_grad for p in model.parameters()] for model in models]
    assert flags[0] == flags[1]


@groups
@any_class
def test_bare_layers(torchs, group):
    layers = [torchs(3, eps=1e-3).eval() for _ in both]
    theirs, ours = (convert(*given, group) for convert, *given in zip(both, layers, strict=True))
    assert isinstance(theirs, nn.SyncBatchNorm)
    assert isinstance(ours, CLASSES[torchs])
    assert [getattr(ours, a) for a in ATTRIBUTES] == [getattr(theirs, a) for a in ATTRIBUTES]
    assert ours.process_group is theirs.process_group is group
    identical(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert theirs is not layers[0]
    assert ours is layers[1], "torch's returns a new layer"


def test_models_without_batch_norm():
    for convert in both:
        model = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))
        before = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ours says so
            assert convert(model) is model
        assert repr(model) == repr(before)


# What torch's loses and ours keeps.


def test_a_shared_layer_stays_one_layer():
    for convert, one in zip(both, (False, True), strict=True):
        shared = nn.BatchNorm2d(3)
        model = convert(nn.Sequential(shared, nn.ReLU(), nn.Sequential(shared)))
        assert (model[0] is model[2][0]) == one


def test_hooks_and_attributes_stay():
    for convert, kept in zip(both, (False, True), strict=True):
        model = nn.Sequential(nn.BatchNorm2d(3))
        model[0].note = "mine"
        model[0].register_forward_hook(lambda *_: torch.zeros(1))
        model = convert(model)
        assert hasattr(model[0], "note") == kept
        assert (model(torch.ones(2, 3, 4, 4)).numel() == 1) == kept


@pytest.mark.parametrize("torchs", LAZY)
def test_lazy_layers_stay_lazy(torchs):
    layers = [convert(torchs()) for convert in both]
    assert layers[0].num_features == 0
    assert not isinstance(layers[0], nn.modules.lazy.LazyModuleMixin), "it never materialises"
    assert type(layers[1]) is LAZY[torchs]


def test_a_subclass_keeps_its_behaviour():
    class Positive(nn.BatchNorm2d):
        def forward(self, input):
            return super().forward(input).relu()

    x = torch.randn(2, 3, 4, 4)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(Positive(3))(x).min() < 0
    with pytest.warns(UserWarning, match="left alone"):
        layer = syncbn.SyncBatchNorm.convert_sync_batchnorm(Positive(3))
    assert layer(x).min() == 0


def test_a_layer_that_has_a_group_keeps_it():
    group = Pair()
    for convert, kept in zip(both, (None, group), strict=True):
        assert convert(nn.SyncBatchNorm(3, process_group=group)).process_group is kept


def test_something_that_is_no_module():
    with pytest.raises(AttributeError):
        nn.SyncBatchNorm.convert_sync_batchnorm([nn.BatchNorm2d(3)])
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module"):
        syncbn.SyncBatchNorm.convert_sync_batchnorm([nn.BatchNorm2d(3)])
