"""Batches without samples: torch's layers that take them, and errors that name those that don't."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import syncbn

IMAGE, SIGNAL, VOLUME = (4, 8, 8), (4, 8), (4, 6, 6, 6)
TAKE_NOTHING = [
    (nn.Conv1d(4, 6, 3), SIGNAL),
    (nn.Conv2d(4, 6, 3), IMAGE),
    (nn.Conv2d(4, 4, 3, groups=4), IMAGE),
    (nn.Conv2d(4, 6, 3).to(memory_format=torch.channels_last), IMAGE),
    (nn.Conv3d(4, 6, 3), VOLUME),
    (nn.ConvTranspose2d(4, 6, 3), IMAGE),
    (nn.MaxPool1d(2), SIGNAL),
    (nn.MaxPool2d(2), IMAGE),
    (nn.MaxPool3d(2), VOLUME),
    (nn.AvgPool2d(2), IMAGE),
    (nn.AdaptiveAvgPool2d(1), IMAGE),
    (nn.AdaptiveAvgPool2d(3), IMAGE),
    (nn.AdaptiveMaxPool2d(3), IMAGE),
    (nn.Upsample(scale_factor=2), IMAGE),
    (nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    (nn.Upsample(scale_factor=2, mode="bicubic"), IMAGE),
    (nn.ReflectionPad2d(1), IMAGE),
    (nn.ReplicationPad2d(1), IMAGE),
    (nn.CircularPad2d(1), IMAGE),
    (nn.Linear(8, 3), SIGNAL),
    (nn.LayerNorm(8), SIGNAL),
    (nn.GroupNorm(2, 4), IMAGE),
    (nn.BatchNorm2d(4), IMAGE),
    (syncbn.SyncBatchNorm2d(4), IMAGE),
    (nn.PReLU(4), IMAGE),
    (nn.Dropout2d(0.5), IMAGE),
    (nn.Flatten(), IMAGE),
    (nn.LSTM(8, 3, batch_first=True), SIGNAL),
    (nn.GRU(8, 3, batch_first=True), SIGNAL),
    (nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), SIGNAL),
]


@pytest.mark.parametrize(("layer", "shape"), TAKE_NOTHING, ids=lambda value: str(value)[:30])
def test_layers_that_take_no_samples(layer, shape):
    """Forward and backward; every parameter gets a gradient, of zeros, as DDP needs."""
    model = nn.Sequential(layer)
    for x in syncbn.until_all_done([torch.randn(0, *shape)], model=model):
        x.requires_grad_()
        y = model(x)
        (y[0] if isinstance(y, tuple) else y).sum().backward()
        assert x.grad.shape == x.shape
    assert all(not parameter.grad.any() for parameter in model.parameters())


class Viewed(nn.Module):
    def forward(self, x):
        return x.view(len(x), -1)


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize(
    "layer",
    [nn.InstanceNorm2d(8, affine=True), nn.PixelShuffle(2), Viewed()],
    ids=["forward", "backward", "own"],
)
@pytest.mark.parametrize("watch", ["inner", "outer"])
def test_a_layer_that_cannot_take_an_empty_batch_is_named(layer, watch):
    inner = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Sequential(nn.ReLU(), layer))
    outer = Wrapper(inner)
    watched = inner if watch == "inner" else outer
    batches = [torch.randn(2, 2, 5, 5), torch.randn(0, 2, 5, 5)]
    steps = iter(syncbn.until_all_done(batches, model=watched))
    outer(next(steps)).sum().backward()
    x = next(steps)
    name = "1.1" if watch == "inner" else "module.1.1"
    words = rf"done: {name} \(\S+\.{type(layer).__name__}\) cannot take a batch without samples"
    with pytest.raises(RuntimeError, match=words) as caught:
        outer(x)
    assert "got input of shape (0, 8, 3, 3), and " in str(caught.value)
    assert "Let it return a result for no samples" in str(caught.value)
    assert "forward" in vars(watched)
    steps.close()
    assert "forward" not in vars(watched)


def test_other_errors_and_copies_of_a_watched_model():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    steps = iter(syncbn.until_all_done([torch.ones(0, 3)], model=model))
    x = next(steps)
    assert model(x).shape == (0, 2)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes"):
        model(torch.ones(2, 4))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin.eval()(torch.ones(1, 3)), model.eval()(torch.ones(1, 3)))
        twin[0].weight.data.zero_()
        assert not torch.equal(twin(torch.ones(1, 3)), model(torch.ones(1, 3)))
    steps.close()
    assert "forward" not in vars(model)


def test_replicas_of_a_watched_model_normalise_together():
    model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3)))
    parallel = syncbn.DataParallel(model, ["cpu"] * 2)
    steps = iter(syncbn.until_all_done([torch.ones(0, 3), torch.randn(6, 3)], model=model))
    next(steps)
    x = next(steps)
    torch.testing.assert_close(parallel(x), nn.functional.batch_norm(x, None, None, training=True))
