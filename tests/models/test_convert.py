"""convert() and revert(): the classes change, everything else stays what and where it was."""

import copy
import warnings

import pytest
import torch
from torch import nn

import syncbn
from support.layers import (
    CLASSES,
    CONVERSIONS,
    LAZY,
    SHAPE_OF,
    OnlyAConstructor,
    Silent,
    assert_same,
    classes,
    conversions,
    identical,
    snapshot,
)
from syncbn.comm import Local

any_class = pytest.mark.parametrize(("torchs", "ours"), [*CLASSES.items(), *LAZY.items()])


def network():
    """Bare, nested, shared, tied, frozen, evaluated, half, lazy and untouched layers."""
    shared = nn.BatchNorm2d(3)
    model = nn.Sequential(
        nn.Conv2d(3, 3, 1),
        nn.BatchNorm2d(3, momentum=None),
        nn.Sequential(shared, nn.ReLU(), nn.ModuleList([nn.BatchNorm1d(3), shared])),
        nn.ModuleDict({"deep": nn.ModuleDict({"b": nn.BatchNorm3d(3), "a": OnlyAConstructor(3)})}),
        nn.SyncBatchNorm(3, affine=False),
        nn.LazyBatchNorm2d(),
        nn.BatchNorm2d(3, track_running_stats=False, dtype=torch.float16, device="meta"),
        nn.InstanceNorm2d(3, affine=True),
        nn.LazyInstanceNorm2d(),
        nn.GroupNorm(1, 3),
        shared,
    )
    model[1].weight = shared.weight
    model[1].weight.requires_grad_(False)
    model[3]["deep"]["b"].eval()
    model[4].running_mean = None
    model[1].register_buffer("mine", torch.ones(2), persistent=False)
    model[1].qconfig = object()
    model[1].note = {"any": ["thing"]}
    model[1].register_forward_hook(print)
    return model


@conversions
def test_convert_keeps_every_object_and_revert_gives_the_classes_back(convert):
    model = network()
    before = snapshot(model)
    assert convert(model) is model
    converted = snapshot(model)
    assert_same(before, converted, ignore_class=True)
    expected = {**CLASSES, **LAZY, OnlyAConstructor: syncbn.SyncBatchNorm2d}
    for name, (_, cls, *_) in before.items():
        assert converted[name][1] is expected.get(cls, cls), name
    assert syncbn.revert(model) is model
    assert_same(before, snapshot(model))


@conversions
@any_class
def test_bare_layers_convert_and_revert_in_place(convert, torchs, ours):
    layer = torchs(**({} if torchs in LAZY else {"num_features": 3}))
    before = snapshot(layer)
    assert convert(layer) is layer
    assert type(layer) is ours
    assert syncbn.revert(layer) is layer
    assert_same(before, snapshot(layer))


def test_convert_and_revert_are_idempotent():
    model = network()
    before = snapshot(model)
    once = snapshot(syncbn.convert(model))
    assert_same(once, snapshot(syncbn.convert(model)))
    syncbn.revert(syncbn.revert(model))
    assert_same(before, snapshot(model))


def attach_hooks(layer, calls):
    def note(name):
        return lambda *args, **kwargs: calls.append(name)

    layer.register_forward_pre_hook(note("forward_pre"))
    layer.register_forward_pre_hook(note("forward_pre kwargs"), with_kwargs=True)
    layer.register_forward_hook(note("forward"))
    layer.register_forward_hook(note("forward kwargs"), with_kwargs=True, always_call=True)
    layer.register_full_backward_pre_hook(note("backward_pre"))
    layer.register_full_backward_hook(note("backward"))
    layer.weight.register_hook(note("weight"))
    layer.register_state_dict_pre_hook(note("state_dict_pre"))
    layer.register_state_dict_post_hook(note("state_dict_post"))
    layer.register_load_state_dict_pre_hook(note("load_pre"))
    layer.register_load_state_dict_post_hook(note("load_post"))


@classes
def test_hooks_of_every_kind_run_after_convert_and_after_revert(torchs, ours):
    calls = []
    layer = torchs(3)
    attach_hooks(layer, calls)

    def use():
        calls.clear()
        x = torch.randn(SHAPE_OF.get(torchs, (4, 3, 2, 2)), requires_grad=True)
        layer(x).sum().backward()
        layer.load_state_dict(layer.state_dict())
        return list(calls)

    before = use()
    assert len(set(before)) == 11
    syncbn.convert(layer)
    assert use() == before
    syncbn.revert(layer)
    assert use() == before


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
def test_an_optimizer_built_before_keeps_training_the_model(optimizer):
    # No bias before BatchNorm: its gradient is rounding, which Adam would blow up.
    model = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.BatchNorm2d(3), nn.ReLU())
    other = copy.deepcopy(model)
    pairs = [(net, optimizer(net.parameters(), lr=0.1)) for net in (model, other)]
    for change in (lambda net: net, syncbn.convert, syncbn.revert):
        change(model)
        x = torch.randn(4, 3, 5, 5)
        for net, optim in pairs:
            optim.zero_grad()
            net(x).square().mean().backward()
            optim.step()
        identical(dict(model.state_dict()), dict(other.state_dict()))
    assert not torch.equal(model[1].weight, torch.ones(3))


def test_a_group_reaches_every_converted_layer_and_leaves_with_revert():
    model, group, kept = network(), Local(), Local()
    model[4].process_group = kept
    before = snapshot(model)
    syncbn.convert(model)
    assert model[4].process_group is kept, "None leaves a layer's group"
    assert model[1].process_group is None
    syncbn.convert(model, group)
    layers = [m for m in model.modules() if isinstance(m, syncbn.SyncBatchNorm)]
    assert len(layers) == 8
    assert all(layer.process_group is group for layer in layers)
    assert not hasattr(model[7], "process_group")
    syncbn.revert(model)
    assert_same(before, snapshot(model))


def test_where_sees_qualified_names_of_batch_norms_and_decides():
    model, seen = network(), {}
    root = nn.ModuleDict({"body": model})

    def where(name, layer):
        seen[name] = layer
        return name == "body.2.0"

    group = Local()
    syncbn.convert(root, group, where=where)
    names = ["body.1", "body.2.0", "body.2.2.0", "body.3.deep.b", "body.3.deep.a"]
    assert list(seen) == [*names, "body.4", "body.5", "body.6"]
    assert all(root.get_submodule(name) is layer for name, layer in seen.items())
    converted = [m for m in root.modules() if isinstance(m, syncbn.SyncBatchNorm)]
    assert converted == [model[2][0]]
    assert model[-1] is model[2][0], "shared, so converted wherever it stands"
    assert model[4].process_group is None


@pytest.mark.parametrize("accepted", ["0", "1.0", "2"])
def test_where_is_asked_under_each_name_of_a_shared_layer(accepted):
    shared, seen = nn.BatchNorm2d(3), []
    model = nn.Sequential(shared, nn.Sequential(shared), shared)

    def where(name, layer):
        seen.append((name, layer))
        return name == accepted

    syncbn.convert(model, where=where)
    names = ["0", "1.0", "2"]
    assert seen == [(name, shared) for name in names[: names.index(accepted) + 1]]
    assert type(shared) is syncbn.SyncBatchNorm2d


def test_a_converted_model_exports_as_the_reverted_one():
    model, x = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)).eval(), torch.randn(2, 3, 4, 4)
    plain = torch.export.export(model, (x,)).graph_module.code
    assert torch.export.export(syncbn.convert(model), (x,)).graph_module.code == plain
    assert torch.export.export(syncbn.revert(model), (x,)).graph_module.code == plain


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_wrong_arguments_are_refused_before_anything_changes(convert):
    model = nn.Sequential(nn.BatchNorm2d(3))
    for wrong in ([nn.BatchNorm2d(3)], None, nn.BatchNorm2d):
        with pytest.raises(TypeError, match=r"^convert: expected a torch.nn.Module, got \w+"):
            convert(wrong)
    for group in ("gloo", 2, [0, 1], Silent):
        with pytest.raises(TypeError, match=r"^process_group: got \w+; pass None"):
            convert(model, group)
    assert type(model[0]) is nn.BatchNorm2d
    convert(model, Silent())
    assert model[0].process_group.size == 2


def test_wrong_predicates_and_reverts_are_refused():
    model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(TypeError, match=r"^convert: expected where to be a function .*got str"):
        syncbn.convert(model, where="backbone")
    for wrong in ([model], None, "model"):
        with pytest.raises(TypeError, match=r"^revert: expected a torch\.nn\.Module, got"):
            syncbn.revert(wrong)
    assert type(model[0]) is nn.BatchNorm2d


def many(count, cls=None):
    """A model of ``count`` layers of a subclass with behaviour of its own, deep inside."""
    cls = cls or type("Shifted", (nn.BatchNorm2d,), {"forward": lambda self, x: x + 1})
    layers = [nn.Sequential(nn.Identity(), cls(3)) for _ in range(count)]
    return nn.ModuleDict({"encoder": nn.Sequential(*layers)})


def texts(convert, *args, **options):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        convert(*args, **options)
    assert all(each.filename == __file__ for each in caught)
    return [str(each.message) for each in caught]


def test_layers_left_alone_are_grouped_by_class():
    model = many(49)
    model["plain"] = nn.BatchNorm2d(3)
    (text,) = texts(syncbn.convert, model)
    assert text.startswith("convert: left alone, because they override BatchNorm's behaviour: ")
    assert ": 49 × test_convert.Shifted (encoder.0.1, encoder.1.1, encoder.2.1, …). Use" in text
    assert len(text) <= 600


def test_a_warning_stays_short_whatever_it_names():
    kinds = [
        type(f"Kind{number}", (nn.BatchNorm2d,), {"forward": lambda self, x: x})
        for number in range(30)
    ]
    model = nn.Sequential(*(many(3, kind) for kind in kinds), nn.BatchNorm2d(3))
    (text,) = texts(syncbn.convert, model)
    assert text.count("3 × test_convert.Kind") >= 2
    assert "more classes. Use" in text
    assert len(text) <= 600
    deep = nn.BatchNorm2d(3)
    for _ in range(100):
        deep = nn.ModuleDict({"inner": deep})
    (text,) = texts(syncbn.convert, deep, where=lambda name, layer: False)
    assert len(text) <= 600
    assert ".inner.inner)" in text


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_a_louder_warning_says_that_nothing_at_all_was_converted(convert):
    (text,) = texts(convert, many(2))
    assert text.startswith(
        "convert: nothing at all was converted, and each rank will normalise its own batch: left "
        "alone, because they override BatchNorm's behaviour: 2 × test_convert.Shifted ("
    )


def test_a_predicate_that_chooses_no_layer_is_told():
    model = network()
    (text,) = texts(syncbn.convert, model, where=lambda name, layer: name == "layer1.bn1")
    assert text.startswith("convert: where chose none of the model's 8 batch norms: ")
    assert "3 × torch.nn.modules.batchnorm.BatchNorm2d (1, 2.0, 6)" in text
    assert not any(isinstance(layer, syncbn.SyncBatchNorm) for layer in model.modules())
    assert texts(syncbn.convert, model, where=lambda name, layer: name == "1") == []
    (text,) = texts(syncbn.convert, nn.BatchNorm2d(3), where=lambda name, layer: False)
    assert text.startswith("convert: where chose none of the model's 1 batch norm: 1 × torch.nn.")


def test_a_monitor_may_choose_no_layer():
    model = nn.Sequential(nn.BatchNorm2d(3))
    with syncbn.Monitor(model) as monitor:
        model(torch.randn(4000, 3, 2, 2))
    assert texts(syncbn.convert, model, where=monitor.where) == []
    assert type(model[0]) is nn.BatchNorm2d, "a batch that is large enough"


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_a_model_without_batch_norms_is_told(convert):
    model = nn.Sequential(nn.Linear(3, 3), nn.GroupNorm(1, 3))
    (text,) = texts(convert, model)
    assert text == (
        "convert: expected a model with batch norms (torch.nn.BatchNorm*, SyncBatchNorm, or a "
        "registered class), found none in Sequential; layers such as GroupNorm have no statistics "
        "of a batch"
    )


def test_converting_again_says_nothing():
    model = nn.Sequential(nn.BatchNorm2d(3), many(1))
    texts(syncbn.convert, model)
    (text,) = texts(syncbn.convert, model)
    assert text.startswith("convert: left alone"), "of the other, as before"
    assert texts(syncbn.convert, syncbn.convert(nn.BatchNorm2d(3))) == []


@pytest.mark.parametrize("convert", CONVERSIONS)
@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"momentum": 1.5}, ValueError, r"expected momentum in \[0, 1\], got 1\.5"),
        ({"eps": 0.0}, ValueError, r"expected eps > 0, got 0\.0; it keeps a constant"),
        ({"eps": float("inf")}, ValueError, "expected a finite eps, got inf"),
        ({"momentum": "fast"}, TypeError, "expected momentum to be a number, got str"),
    ],
)
def test_layers_that_their_forward_would_refuse_are_refused_by_name(convert, options, error, text):
    model = nn.ModuleDict({"first": nn.BatchNorm2d(3), "head": nn.BatchNorm1d(3, **options)})
    before = snapshot(model)
    layer = r"^convert: layer head \(torch\.nn\.modules\.batchnorm\.BatchNorm1d\): "
    with pytest.raises(error, match=layer + text):
        convert(model)
    assert_same(before, snapshot(model))
    if convert is syncbn.convert:
        convert(model, where=lambda name, layer: name == "first")
        assert type(model["first"]) is syncbn.SyncBatchNorm2d


def test_cumulative_averages_and_frozen_options_convert():
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=None), nn.BatchNorm2d(3, momentum=0))
    syncbn.convert(model)
    assert all(isinstance(layer, syncbn.SyncBatchNorm) for layer in model)
