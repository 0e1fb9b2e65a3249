"""torch's conversion of a converted model replaces our layers: a hook says so."""

import pickle
import subprocess
import sys
import warnings

import pytest
from torch import nn
from torch.nn.modules import module

import syncbn
from syncbn.layers import replaced

WORDS = (
    "torch.nn.SyncBatchNorm: is replacing syncbn's layers, as "
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
    assert [each.__module__ for each in hooks].count("syncbn.layers.replaced") == 1


def forget():
    """As in a process that has made no layer so far."""
    for hook in replaced._hooks:
        hook.remove()
    replaced._hooks.clear()


def built():
    return nn.Sequential(syncbn.SyncBatchNorm2d(3), nn.Sequential(syncbn.SyncBatchNorm1d(3)))


def test_a_model_built_of_our_layers_is_told():
    forget()
    first = built()
    assert warned(lambda: nn.SyncBatchNorm.convert_sync_batchnorm(first)) == [WORDS]


def test_a_model_built_lazily_is_told():
    forget()
    first = nn.Sequential(syncbn.LazySyncBatchNorm2d())
    assert warned(lambda: nn.SyncBatchNorm.convert_sync_batchnorm(first)) == [WORDS]


@pytest.mark.parametrize(
    "make", [built, lambda: syncbn.convert(model())], ids=["built", "converted"]
)
def test_a_loaded_model_is_told(make):
    saved = pickle.dumps(make())
    forget()
    loaded = pickle.loads(saved)
    assert warned(lambda: nn.SyncBatchNorm.convert_sync_batchnorm(loaded)) == [WORDS]


NOTHING = {"affine": False, "track_running_stats": False}


def test_layers_without_any_state_are_told():
    parent = nn.Sequential(syncbn.SyncBatchNorm2d(3, **NOTHING))
    assert warned(lambda: nn.SyncBatchNorm.convert_sync_batchnorm(parent)) == [WORDS]


def test_a_layer_without_any_state_and_of_other_options_is_meant():
    parent = nn.Sequential(syncbn.SyncBatchNorm2d(3, **NOTHING))

    def replace():
        parent[0] = nn.SyncBatchNorm(3, eps=0.1, **NOTHING)

    assert warned(replace) == []


class Foreign(nn.modules.batchnorm._BatchNorm):
    """As apex's: of no class that torch exports, with the buffers of the layer that it replaces."""

    def _check_input_dim(self, input):
        pass


@pytest.mark.parametrize("kind", [Foreign, nn.BatchNorm2d])
def test_another_librarys_class_is_told_and_a_plain_one_is_a_revert(kind):
    parent = built()

    def replace():
        new = kind(3)
        new.running_mean = parent[0].running_mean
        parent[0] = new

    expected = (
        f"{Foreign.__module__}.Foreign: is replacing syncbn's layers, as conversions do; leave "
        "that call or flag out to keep syncbn's, or syncbn.revert the model first for the others"
    )
    assert warned(replace) == ([expected] if kind is Foreign else [])


def test_importing_watches_nothing():
    script = (
        "import syncbn; from torch.nn.modules.module import _global_module_registration_hooks as h;"
        "assert not h; syncbn.SyncBatchNorm(3); syncbn.SyncBatchNorm(3); assert len(h) == 1"
    )
    subprocess.run([sys.executable, "-c", script], timeout=120, check=True)
