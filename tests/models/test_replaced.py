"""torch's conversion of a converted model replaces our layers: convert's hook says so."""

import warnings

import pytest
from torch import nn
from torch.nn.modules import module

import syncbn

WORDS = (
    "torch.nn.SyncBatchNorm: is replacing syncbn's layers in a converted model, as "
    "convert_sync_batchnorm and Trainer(sync_batchnorm=True) do; leave that call or flag out to "
    "keep syncbn's, or syncbn.revert the model first for torch's"
)


def model():
    inner = nn.Sequential(nn.BatchNorm2d(3, affine=False), nn.BatchNorm2d(3))
    return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), inner)


def warned(call):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        call()
    return [str(each.message) for each in caught]


def test_torchs_conversion_of_a_converted_model_is_told_once():
    converted = syncbn.convert(model())
    assert warned(lambda: nn.SyncBatchNorm.convert_sync_batchnorm(converted)) == [WORDS]
    assert type(converted[1]) is nn.SyncBatchNorm, "torch's words hold: it was asked"


def test_torchs_conversion_after_revert_says_nothing():
    reverted = syncbn.revert(syncbn.convert(model()))
    assert warned(lambda: nn.SyncBatchNorm.convert_sync_batchnorm(reverted)) == []


def test_other_replacements_say_nothing():
    converted = syncbn.convert(model())

    def replace():
        converted[1] = nn.SyncBatchNorm(3)  # of a state of its own
        converted[2] = nn.Identity()
        converted.new = nn.SyncBatchNorm(3)
        converted.none = None

    assert warned(replace) == []


@pytest.mark.parametrize("kind", [nn.BatchNorm1d, nn.BatchNorm3d, nn.SyncBatchNorm])
def test_each_kind_of_layer(kind):
    parent = nn.Sequential(syncbn.convert(kind(2)))
    assert warned(lambda: nn.SyncBatchNorm.convert_sync_batchnorm(parent)) == [WORDS]


def test_converting_again_adds_no_hook():
    for _ in range(3):
        syncbn.convert(model())
    hooks = module._global_module_registration_hooks.values()
    assert [each.__module__ for each in hooks].count("syncbn.models.replaced") == 1
