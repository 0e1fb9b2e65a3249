"""What convert() says: layers that it left alone, calls that change nothing, layers it refuses."""

import warnings

import pytest
import torch
from torch import nn

import syncbn
from support import foreign
from support.layers import CONVERSIONS, assert_same, snapshot


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
    assert (
        ": 49 × test_convert_words.Shifted (encoder.0.1, encoder.1.1, encoder.2.1, …). Use" in text
    )
    assert len(text) <= 600


def test_a_warning_stays_short_whatever_it_names():
    kinds = [
        type(f"Kind{number}", (nn.BatchNorm2d,), {"forward": lambda self, x: x})
        for number in range(30)
    ]
    model = nn.Sequential(*(many(3, kind) for kind in kinds), nn.BatchNorm2d(3))
    (text,) = texts(syncbn.convert, model)
    assert text.count("3 × test_convert_words.Kind") >= 2
    assert "more classes. Use" in text
    assert len(text) <= 600
    deep = nn.BatchNorm2d(3)
    for _ in range(100):
        deep = nn.ModuleDict({"inner": deep})
    (text,) = texts(syncbn.convert, deep, where=lambda name, layer: False)
    assert len(text) <= 600
    assert ".inner.inner)" in text


@pytest.mark.parametrize("plain", [0, 1])
def test_a_warning_stays_short_whatever_classes_are_called(plain):
    kinds = [
        type(f"{'Long' * 300}{number}", (nn.BatchNorm2d,), {"forward": lambda self, x: x})
        for number in range(3)
    ]
    model = nn.Sequential(*(many(2, kind) for kind in kinds), *[nn.BatchNorm2d(3)] * plain)
    (text,) = texts(syncbn.convert, model)
    assert "2 × …" in text
    assert "LongLong0 (0.encoder.0.1" in text
    assert len(text) <= 600


def test_a_warning_stays_short_whatever_its_reasons():
    bases = type("Base" * 300, (nn.Module,), {"forward": lambda self, x: x})
    named = {"__module__": "timm.layers.norm_act", "__qualname__": "BatchNormAct2d"}
    alone = foreign.BatchNorm2d_NHWC(4), foreign.HeteroBatchNorm(4, 2), foreign.ABN(4, "a" * 900)
    model = nn.Sequential(*alone, type("BatchNormAct2d", (bases,), named)(), many(2))
    (text,) = texts(syncbn.convert, model)
    assert len(text) <= 600
    model.append(nn.BatchNorm2d(4))
    reasons = texts(syncbn.convert, model)
    assert len(reasons) == 5
    assert max(map(len, reasons)) <= 600


@pytest.mark.parametrize("convert", CONVERSIONS)
def test_a_louder_warning_says_that_nothing_at_all_was_converted(convert):
    (text,) = texts(convert, many(2))
    assert text.startswith(
        "convert: nothing at all was converted, and each rank will normalise its own batch: left "
        "alone, because they override BatchNorm's behaviour: 2 × test_convert_words.Shifted ("
    )


def test_a_predicate_that_chooses_no_layer_is_told():
    model = nn.Sequential(nn.Linear(3, 3), *(nn.BatchNorm2d(3) for _ in range(3)))
    (text,) = texts(syncbn.convert, model, where=lambda name, layer: name == "layer1.bn1")
    assert text.startswith("convert: where chose none of the model's 3 batch norms: ")
    assert "3 × torch.nn.modules.batchnorm.BatchNorm2d (1, 2, 3)" in text
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
