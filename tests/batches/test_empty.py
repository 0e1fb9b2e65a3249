"""Batches without samples: torch's layers that take them, and errors that name those that don't."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings

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


def watching(model):
    """An epoch over ``model`` that has begun; close() ends it."""
    steps = iter(syncbn.until_all_done([torch.ones(0, 3)], model=model))
    next(steps)
    return steps


def network():
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3), Viewed()))


def named(model):
    """The layer that the error blames, once."""
    with pytest.raises(RuntimeError) as caught:
        model(torch.ones(0, 3))
    said = str(caught.value)
    assert said.count("cannot take a batch") == (type(caught.value) is not RuntimeError)
    return said.split()[1] if said.startswith("until_all_done") else None


def left(model):
    """What a context has left on a model."""
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if "forward" in vars(layer) or layer._forward_hooks or layer._forward_pre_hooks
    ]


@pytest.mark.parametrize("first", [0, 1])
def test_two_contexts_end_in_any_order(first):
    model = network()
    contexts = [watching(model), watching(model)]
    assert named(model) == "1.1"
    contexts.pop(first).close()
    assert named(model) == "1.1"
    contexts.pop().close()
    assert named(model) is None
    assert not left(model)


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("outermost", [0, 1])
def test_contexts_on_a_model_and_on_a_part_of_it(first, outermost):
    model = network()
    watched = [model, model[1]] if outermost else [model[1], model]
    contexts = {part: watching(part) for part in watched}
    assert (named(model), named(model[1])) == ("1.1", "1")
    contexts.pop(watched.pop(first)).close()
    assert named(model) == ("1.1" if model in watched else "1")
    contexts.popitem()[1].close()
    assert not left(model)


def test_a_forward_of_the_models_own():
    """Of before, which comes back; of meanwhile, around the watch, which stays."""
    model = network()
    own = model.forward = lambda x: nn.Sequential.forward(model, x)
    contexts = watching(model), watching(model)
    assert named(model) == "1.1"
    x = torch.randn(4, 3)
    for twin in (copy.deepcopy(model), copy.copy(model)):
        assert torch.equal(twin(x), model(x))
    for context in contexts:
        context.close()
    assert vars(model)["forward"] is own
    context, watched = watching(model), vars(model)["forward"]
    around = model.forward = lambda x: watched(x)
    context.close()
    assert vars(model)["forward"] is around
    assert named(model) is None
    context = watching(model)
    assert named(model) == "1.1"
    context.close()
    assert vars(model)["forward"] is around


def test_convert_and_revert_of_the_watched_layer_itself():
    layer = nn.BatchNorm1d(3)
    context = watching(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syncbn.convert(layer)
        x = torch.randn(4, 3)
        assert not layer(x, mask=torch.zeros(4) > 0).any()  # which only syncbn's layers take
        twins = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.copy(layer)
        for module in (layer, *twins):
            assert type(syncbn.revert(module)) is nn.BatchNorm1d
            with pytest.raises(TypeError, match="mask"):
                module(x, mask=torch.zeros(4) > 0)
            assert type(syncbn.convert(module)) is syncbn.SyncBatchNorm1d
            assert not module(x, mask=torch.zeros(4) > 0).any()
    with pytest.raises(RuntimeError, match=r"done: the model .*SyncBatchNorm1d. cannot take"):
        layer(torch.ones(0, 4))
    context.close()
    assert not left(layer)
    assert all("forward" not in vars(twin) for twin in twins)


def test_threads_that_share_a_model():
    """One fails while another has an empty batch in the same layer."""
    inside, beside, failed = (threading.Event() for _ in range(3))

    class Later(nn.Module):
        def forward(self, x):
            assert len(x) or inside.wait(60)
            return x

    class Meeting(nn.Module):
        def forward(self, x):
            if len(x):
                inside.set()
                assert beside.wait(60)
                raise OSError("its own")
            beside.set()
            assert failed.wait(60)
            return x

    model = nn.Sequential(Later(), Meeting())
    context, seen = watching(model), []
    thread = threading.Thread(target=lambda: seen.append(model(torch.ones(0, 3))))
    thread.start()
    try:
        with pytest.raises(OSError, match="its own"):
            model(torch.ones(2, 3))
    finally:
        failed.set()
        thread.join()
        context.close()
    assert seen[0].shape == (0, 3)
    assert not left(model)


def test_replicas_that_are_watched_name_their_layers():
    model = syncbn.DataParallel(syncbn.convert(network()), ["cpu"] * 2)
    context = watching(model)
    assert model(torch.randn(4, 3)).shape == (4, 3)
    assert named(model) == "module.1.1"
    context.close()
    assert not left(model)


def test_a_scripted_model():
    model = torch.jit.script(nn.Sequential(nn.Linear(3, 3)))
    x = torch.randn(2, 3)
    expected = model(x)
    context = watching(model)
    assert torch.equal(model(x), expected)
    context.close()
    assert torch.equal(model(x), expected)


def test_replicas_of_a_watched_model_normalise_together():
    model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3)))
    parallel = syncbn.DataParallel(model, ["cpu"] * 2)
    steps = iter(syncbn.until_all_done([torch.ones(0, 3), torch.randn(6, 3)], model=model))
    next(steps)
    x = next(steps)
    torch.testing.assert_close(parallel(x), nn.functional.batch_norm(x, None, None, training=True))
