"""Layers, classes and comparisons that several test files share."""

import io

import pytest
import torch
from torch import nn

import syncbn
from support import oracle
from syncbn import kernels
from syncbn.comm import Communicator

CLASSES = {
    nn.BatchNorm1d: syncbn.SyncBatchNorm1d,
    nn.BatchNorm2d: syncbn.SyncBatchNorm2d,
    nn.BatchNorm3d: syncbn.SyncBatchNorm3d,
    nn.SyncBatchNorm: syncbn.SyncBatchNorm,
}
LAZY = {
    nn.LazyBatchNorm1d: syncbn.LazySyncBatchNorm1d,
    nn.LazyBatchNorm2d: syncbn.LazySyncBatchNorm2d,
    nn.LazyBatchNorm3d: syncbn.LazySyncBatchNorm3d,
}
TORCH = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
CHECKED = {dims: CLASSES[torchs] for dims, torchs in TORCH.items()}
PLAIN = [syncbn.SyncBatchNorm, *dict.fromkeys(CHECKED.values())]
SHAPE_OF = {nn.BatchNorm1d: (4, 3), nn.BatchNorm3d: (4, 3, 2, 2, 2)}
CONVERSIONS = [syncbn.convert, syncbn.SyncBatchNorm.convert_sync_batchnorm]
classes = pytest.mark.parametrize(("torchs", "ours"), CLASSES.items())
conversions = pytest.mark.parametrize("convert", CONVERSIONS, ids=["convert", "classmethod"])


class Pair(Communicator):
    """Stands for two ranks that hold the same batch."""

    rank, size = 0, 2

    def all_gather(self, tensor):
        return torch.stack((tensor, tensor))

    def all_reduce(self, tensor):
        return 2 * tensor


class Silent(Communicator):
    """A group of two ranks that must not be asked anything."""

    rank, size = 0, 2

    def all_gather(self, tensor):
        raise AssertionError("communicated")

    all_reduce = all_gather


class OnlyAConstructor(nn.BatchNorm2d):
    """A default and an attribute of its own."""

    extra: int

    def __init__(self, channels, extra=7):
        super().__init__(channels, eps=1e-3)
        self.extra = extra


class Absolute(nn.Module):
    def forward(self, weight):
        return weight.abs()


def pair(dims, generic=False, bias=True, **options):
    """Our layer and torch's, of the same options and the same random parameters."""
    ours = (syncbn.SyncBatchNorm if generic else CHECKED[dims])(3, bias=bias, **options)
    theirs = TORCH[dims](3, **options)
    if not bias:  # torch before 2.13 has no such keyword
        theirs.register_parameter("bias", None)
    for mine, its in zip(ours.parameters(), theirs.parameters(), strict=True):
        nn.init.normal_(its, 1.0)
        mine.data.copy_(its.data)
    return ours, theirs


# The composite path hands one process's work to torch: the same bits. The compiled operators are
# more accurate than torch's: the same to rounding.
COMPILED = kernels.select_kernels(torch.empty(2, 2)).steps.NAME != "composite"


def identical(actual, expected):
    """Tensors, alone or in dicts and tuples, each of them to the rounding of its own type."""
    if isinstance(actual, torch.Tensor):
        room = 0.0
        if COMPILED:
            room = 3e-2 if actual.dtype in (torch.float16, torch.bfloat16) else 1e-5
        torch.testing.assert_close(
            actual, expected, rtol=room, atol=room, equal_nan=True, check_stride=True
        )
    elif isinstance(actual, dict):
        assert actual.keys() == expected.keys()
        for name, value in actual.items():
            identical(value, expected[name])
    elif isinstance(actual, (tuple, list)):
        for values in zip(actual, expected, strict=True):
            identical(*values)
    else:
        assert actual == expected


def observe(layer, x):
    """Everything that one forward and backward shows."""
    x = x.clone(memory_format=torch.preserve_format).requires_grad_()
    layer.zero_grad()
    y = layer(x)
    y.backward(torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype))
    gradients = {name: p.grad for name, p in layer.named_parameters()}
    buffers = {name: b.clone() for name, b in layer.named_buffers()}
    return {"y": y, "dx": x.grad, "gradients": gradients, "buffers": buffers}


def assert_same_training(ours, theirs, shape, dtype=torch.float32):
    for training in (True, True, False, True, False):
        ours.train(training), theirs.train(training)
        x = (torch.randn(shape, dtype=torch.float64) * 2 + 1).to(dtype)
        identical(observe(ours, x), observe(theirs, x))


def saved_and_loaded(state, weights_only=True):
    stream = io.BytesIO()
    torch.save(state, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=weights_only)


def snapshot(model):
    """Every module by name, its class, and all it holds: names in order, and the very objects."""
    modules = dict(model.named_modules(remove_duplicate=False))
    states = {}
    for name, module in modules.items():
        state = dict(vars(module))
        insides = {key: list(value.items()) for key, value in state.items() if type(value) is dict}
        states[name] = (module, type(module), list(state.items()), insides)
    return states


def assert_same(before, after, ignore_class=False):
    assert list(before) == list(after)
    for name, (module, cls, state, insides) in before.items():
        module_, cls_, state_, insides_ = after[name]
        assert module is module_
        assert cls is cls_ or ignore_class
        keys = [key for key, _ in state]
        state_ = [item for item in state_ if item[0] in keys or not ignore_class]
        assert keys == [key for key, _ in state_]
        assert all(a is b for (_, a), (_, b) in zip(state, state_, strict=True))
        for key, inside in insides.items():
            assert [k for k, _ in inside] == [k for k, _ in insides_[key]]
            assert all(a is b for (_, a), (_, b) in zip(inside, insides_[key], strict=True))


def watch(layer):
    """What passes through ``layer``: x, y and their gradients, filled in as it happens."""
    seen = {}

    def note(layer, args, y):
        (x,) = args
        seen.update(x=x.detach().clone(), y=y.detach().clone())
        x.register_hook(lambda dx: seen.update(dx=dx.clone()))
        y.register_hook(lambda dy: seen.update(dy=dy.clone()))

    layer.register_forward_hook(note)
    return seen


def assert_normalised_together(everything, weight=None, bias=None, dtype=None):
    """What all ranks have seen is the oracle's whole batch, to the rounding of each rank's type."""
    x, dy = (torch.cat([seen[name].double() for seen in everything]) for name in ("x", "dy"))
    expected = oracle.batch_norm(x, dy, weight, bias)
    sizes = [len(seen["x"]) for seen in everything]
    for name in ("y", "dx"):
        shares = getattr(expected, name).split(sizes)
        for seen, share in zip(everything, shares, strict=True):
            assert seen[name].dtype == (dtype or seen["x"].dtype)
            # Moments are summed in float32 by ranks that hold float32 or less.
            alike = all(other["x"].dtype == torch.float64 for other in everything)
            narrow = torch.float32 if seen[name].dtype == torch.float64 and not alike else None
            oracle.assert_close(seen[name], share, dtype=narrow, factor=4)
    return expected
