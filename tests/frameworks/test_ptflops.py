"""Counters of operations count of a converted model what they count of torch's."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import syncbn


def network():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(2), nn.BatchNorm1d(8), nn.Flatten()
    )


def ptflops_of(model, **options):
    ptflops = pytest.importorskip("ptflops")
    operations, _ = ptflops.get_model_complexity_info(
        copy.deepcopy(model), (3, 8, 8), as_strings=False, print_per_layer_stat=False, **options
    )
    return operations


def test_ptflops_default_backend_with_what_the_page_tells_it():
    operations = pytest.importorskip("ptflops.pytorch_ops")
    torchs, ours = ptflops_of(network()), syncbn.convert(network())
    known = {
        syncbn.SyncBatchNorm2d: operations.MODULES_MAPPING[nn.BatchNorm2d],
        syncbn.SyncBatchNorm1d: operations.MODULES_MAPPING[nn.BatchNorm1d],
    }
    assert ptflops_of(ours, custom_modules_hooks=known) == torchs
    # else it takes them for free: a later version that does not makes the page simpler
    assert ptflops_of(ours) == torchs - 2 * (2 * 8 * 36)


def test_ptflops_aten_backend():
    assert ptflops_of(syncbn.convert(network()), backend="aten") == ptflops_of(
        network(), backend="aten"
    )


@pytest.mark.parametrize("training", [True, False])
def test_torchs_own_counter(training):
    counts = []
    for model in network(), syncbn.convert(network()):
        with FlopCounterMode(display=False) as counter:
            model.train(training)(torch.randn(2, 3, 8, 8)).sum().backward()
        counts.append(counter.get_flop_counts()["Global"])
    assert counts[0] == counts[1]


def test_fvcore():
    fvcore = pytest.importorskip("fvcore.nn")
    counts = []
    for model in network(), syncbn.convert(network()):
        analysis = fvcore.FlopCountAnalysis(model.eval(), torch.randn(1, 3, 8, 8))
        counts.append(analysis.by_operator())
    assert counts[0] == counts[1]
    assert counts[0]["batch_norm"] > 0
