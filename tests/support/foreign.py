"""Stand-ins for other libraries' layers: their qualified names, attributes and arithmetic.

Written after their sources, for libraries that make test does not install. The real classes, where
a library installs, are tests/frameworks/test_libraries.py's.
"""

from __future__ import annotations

import sys
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from inspect import isfunction
from types import ModuleType, SimpleNamespace

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

MODULES: dict[str, ModuleType] = {}


def of(path):
    """Let a class say that it is of the module ``path``."""

    def place(cls):
        cls.__module__ = path
        for method in filter(isfunction, vars(cls).values()):
            method.__module__ = path
        names = path.split(".")
        for end in range(1, len(names) + 1):
            name = ".".join(names[:end])
            if name not in MODULES:
                MODULES[name] = ModuleType(name)
                MODULES[name].__spec__ = ModuleSpec(name, None)
                MODULES[name].__path__ = []
        setattr(MODULES[path], cls.__name__, cls)
        return cls

    return place


@contextmanager
def imported():
    """Within, the libraries are there, as where a model uses them: pickles find the classes."""
    before = {name: sys.modules.get(name) for name in MODULES}
    sys.modules.update(MODULES)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


# timm


@of("timm.layers.norm_act")
class BatchNormAct2d(nn.BatchNorm2d):
    def __init__(self, num_features, **options):
        super().__init__(num_features, **options)
        self.drop, self.act = nn.Identity(), nn.ReLU(inplace=True)

    def forward(self, x):  # by torch's function, not by super()
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
        statistics = (self.running_mean, self.running_var)
        affine = (self.weight, self.bias)
        x = F.batch_norm(x, *statistics, *affine, self.training, self.momentum, self.eps)
        return self.act(self.drop(x))


@of("timm.layers.norm_act")
class SyncBatchNormAct(nn.SyncBatchNorm):
    def forward(self, x):
        x = super().forward(x)
        for name in ("drop", "act"):
            x = getattr(self, name)(x) if hasattr(self, name) else x
        return x


@of("timm.layers.norm_act")
class FrozenBatchNormAct2d(nn.Module):
    def __init__(self, num_features):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(num_features))


@of("timm.layers.split_batchnorm")
class SplitBatchNorm2d(nn.BatchNorm2d):
    def __init__(self, num_features, num_splits=2):
        super().__init__(num_features)
        self.num_splits = num_splits
        self.aux_bn = nn.ModuleList(nn.BatchNorm2d(num_features) for _ in range(num_splits - 1))

    def forward(self, input):
        if not self.training:
            return super().forward(input)
        first, *others = input.chunk(self.num_splits)
        rest = [norm(part) for norm, part in zip(self.aux_bn, others, strict=True)]
        return torch.cat([super().forward(first), *rest])


@of("timm.layers.inplace_abn")
class InplaceAbn(nn.Module):
    def __init__(self, num_features):
        super().__init__()
        self.num_features, self.affine, self.eps, self.momentum = num_features, True, 1e-5, 0.1
        self.act_name, self.act_param = "leaky_relu", 0.01
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.register_buffer("running_mean", torch.zeros(num_features))
        self.register_buffer("running_var", torch.ones(num_features))

    def forward(self, x):
        return _inplace(self, x, self.act_name, self.act_param)


def _inplace(layer, x, name, parameter):
    statistics = (layer.running_mean, layer.running_var)
    affine = (layer.weight.abs() + layer.eps, layer.bias)
    y = F.batch_norm(x, *statistics, *affine, layer.training, layer.momentum, layer.eps)
    return _activate(y, name, parameter)


def _activate(y, name, parameter):
    return {
        "relu": lambda: y.relu(),
        "leaky_relu": lambda: F.leaky_relu(y, parameter),
        "elu": lambda: F.elu(y, parameter),
        "identity": lambda: y,
    }[name]()


# detectron2, mmengine, mmcv, apex


@of("detectron2.layers.batch_norm")
class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """On one rank torch's layer; on several, whose means it would weigh alike, never run here."""

    def __init__(self, *args, stats_mode="", **options):
        super().__init__(*args, **options)
        self._stats_mode = stats_mode

    def forward(self, input):
        assert not torch.distributed.is_initialized() or not self.training
        return super().forward(input)


@of("detectron2.layers.batch_norm")
class FrozenBatchNorm2d(nn.Module):
    def __init__(self, num_features, eps=1e-5):
        super().__init__()
        self.num_features, self.eps = num_features, eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(num_features))

    def forward(self, x):
        statistics = (self.running_mean, self.running_var)
        return F.batch_norm(x, *statistics, self.weight, self.bias, eps=self.eps)


@of("torchvision.ops.misc")
class TorchvisionFrozen(nn.Module):
    def __init__(self, num_features):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(num_features))


@of("mmengine.model.utils")
class _BatchNormXd(_BatchNorm):
    def _check_input_dim(self, input):
        return


@of("mmcv.ops.sync_bn")
class SyncBatchNorm(nn.Module):
    """In its stead, torch's function: mmcv has operators of its own, for GPUs."""

    def __init__(self, num_features, group=None):
        super().__init__()
        vars(self).update(vars(nn.BatchNorm2d(num_features)))
        self.group, self.group_size = group, 1

    def forward(self, input):
        return nn.BatchNorm2d.forward(self, input)

    _check_input_dim = staticmethod(lambda input: None)


MmcvSyncBatchNorm = SyncBatchNorm


@of("apex.parallel.optimized_sync_batchnorm")
class SyncBatchNorm(_BatchNorm):
    def __init__(self, num_features, process_group=None, channel_last=False, fuse_relu=False):
        super().__init__(num_features)
        self.process_group = process_group
        self.channel_last, self.fuse_relu = channel_last, fuse_relu

    def forward(self, input, z=None):
        last = self.channel_last and input.dim() > 2
        y = super().forward(input.movedim(-1, 1) if last else input)
        y = y.movedim(1, -1) if last else y
        y = y if z is None else y + z
        return y.relu() if self.fuse_relu else y

    def _check_input_dim(self, input):
        return


ApexSyncBatchNorm = SyncBatchNorm


@of("apex.parallel.sync_batchnorm")
class SyncBatchNorm(_BatchNorm):
    def __init__(self, num_features, process_group=None):
        super().__init__(num_features)
        self.process_group = process_group

    def _check_input_dim(self, input):
        return

    def forward(self, input):
        return super().forward(input)


ApexSyncBatchNormInPython = SyncBatchNorm


@of("apex.contrib.groupbn.batch_norm")
class BatchNorm2d_NHWC(_BatchNorm):
    bn_group = 2


# inplace_abn


@of("inplace_abn.abn")
class ABN(nn.Module):
    def __init__(self, num_features, activation="leaky_relu", activation_param=0.01):
        super().__init__()
        vars(self).update(vars(nn.BatchNorm2d(num_features)))
        self.activation, self.activation_param = activation, activation_param

    def forward(self, x):
        y = nn.BatchNorm2d.forward(self, x)
        return _activate(y, self.activation, self.activation_param)

    _check_input_dim = staticmethod(lambda input: None)


@of("inplace_abn.abn")
class InPlaceABN(ABN):
    def forward(self, x):
        if self.training:
            self.num_batches_tracked = self.num_batches_tracked + 1
        return _inplace(self, x, self.activation, self.activation_param)


@of("inplace_abn.abn")
class InPlaceABNSync(ABN):
    def __init__(self, num_features, activation="leaky_relu", activation_param=0.01, group=None):
        super().__init__(num_features, activation, activation_param)
        self.group = group

    def set_group(self, group):
        self.group = group

    def forward(self, x):
        return InPlaceABN.forward(self, x)


# Sparse tensors: features (V, C), and where they lie


class Sparse(SimpleNamespace):
    """What MinkowskiEngine, torchsparse and spconv have in common, under each one's name."""

    @property
    def feats(self):
        return self.features

    F = feats

    def replace_feature(self, features):
        return Sparse(features=features, indices=self.indices)


@of("torchsparse.nn.modules.norm")
class BatchNorm(nn.BatchNorm1d):
    def forward(self, input):
        return input.replace_feature(super().forward(input.feats))


@of("spconv.pytorch.modules")
class SparseBatchNorm(nn.BatchNorm1d):
    def forward(self, input):
        if isinstance(input, Sparse):
            return input.replace_feature(super().forward(input.features))
        return super().forward(input)


@of("spconv.pytorch.modules")
class SparseSyncBatchNorm(nn.SyncBatchNorm):
    def forward(self, input):
        if isinstance(input, Sparse):
            return input.replace_feature(super().forward(input.features))
        return super().forward(input)


@of("spconv.pytorch.modules")
class SparseSequential(nn.Module):
    """Passes features through torch's layers, unless there are none."""

    def __init__(self, *layers):
        super().__init__()
        for number, layer in enumerate(layers):
            self.add_module(str(number), layer)

    def forward(self, input):
        for layer in self.children():
            if len(input.features):
                input = input.replace_feature(layer(input.features))
        return input


@of("MinkowskiEngine.MinkowskiNormalization")
class MinkowskiBatchNorm(nn.Module):
    def __init__(self, num_features, norm=nn.BatchNorm1d):
        super().__init__()
        self.bn = norm(num_features)

    def forward(self, input):
        return input.replace_feature(self.bn(input.F))


@of("MinkowskiEngine.MinkowskiNormalization")
class MinkowskiSyncBatchNorm(MinkowskiBatchNorm):
    def __init__(self, num_features):
        super().__init__(num_features, nn.SyncBatchNorm)


# PyG


@of("torch_geometric.nn.norm.batch_norm")
class PyGBatchNorm(nn.Module):
    def __init__(self, in_channels, allow_single_element=False):
        super().__init__()
        self.module = nn.BatchNorm1d(in_channels)
        self.in_channels, self.allow_single_element = in_channels, allow_single_element

    def forward(self, x):
        if self.allow_single_element and x.size(0) <= 1:
            return self.module.eval()(x)
        return self.module(x)


@of("torch_geometric.nn.norm.batch_norm")
class HeteroBatchNorm(nn.Module):
    def __init__(self, in_channels, num_types):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(num_types, in_channels))


# spikingjelly


class StepModule:
    """A mode, "s" for (N, C, *) or "m" for (T, N, C, *), behind a property."""

    @property
    def step_mode(self):
        return self._step_mode

    @step_mode.setter
    def step_mode(self, mode):
        self._step_mode = mode


def _over_steps(x, normalise):
    return normalise(x.flatten(0, 1)).view(x.shape)


@of("spikingjelly.activation_based.layer.bn")
class BatchNorm2d(nn.BatchNorm2d, StepModule):
    def __init__(self, num_features, step_mode="s"):
        super().__init__(num_features)
        self.step_mode = step_mode

    def super_forward(self, x):
        return super().forward(x)

    def forward(self, x):
        return (
            self.super_forward(x) if self.step_mode == "s" else _over_steps(x, self.super_forward)
        )


@of("spikingjelly.activation_based.layer.bn")
class TemporalEffectiveBatchNorm2d(_BatchNorm, StepModule):
    def __init__(self, T, num_features):
        super().__init__(num_features)
        self.step_mode = "m"
        self.scale = nn.Parameter(torch.linspace(0.5, 2, T))

    def _check_input_dim(self, input):
        assert input.dim() == 4

    def super_forward(self, x):
        return super().forward(x)

    def forward(self, x):
        return _over_steps(x, self.super_forward) * self.scale.view(-1, 1, 1, 1, 1)


# Two that are called as others here are.
PyGBatchNorm.__name__ = PyGBatchNorm.__qualname__ = "BatchNorm"
MODULES["torch_geometric.nn.norm.batch_norm"].BatchNorm = PyGBatchNorm
TorchvisionFrozen.__name__ = TorchvisionFrozen.__qualname__ = "FrozenBatchNorm2d"
MODULES["torchvision.ops.misc"].FrozenBatchNorm2d = TorchvisionFrozen
