"""torch.nn's batch norms against ours: what a layer is built of, holds and shows."""

import inspect

import pytest
import torch
from torch import nn

import syncbn
from support.layers import CLASSES, LAZY, PLAIN, TORCH, Pair, classes, identical

every_class = pytest.mark.parametrize(("torchs", "ours"), {**CLASSES, **LAZY}.items())
FACTORY = {"device", "dtype", "process_group"}
OURS = {"reproducible", "skip_nonfinite", "statistics_dtype"}  # keyword-only


def arguments(cls):
    """(name, kind, default) of a constructor's arguments, without those of the factory."""
    parameters = list(inspect.signature(cls).parameters.values())
    return [(p.name, p.kind, p.default) for p in parameters if p.name not in FACTORY]


@every_class
def test_constructor_arguments_and_defaults(torchs, ours):
    mine, theirs = arguments(ours), arguments(torchs)
    added = [argument for argument in mine if argument[0] in OURS]
    mine = [argument for argument in mine if argument not in added]
    assert all(kind is inspect.Parameter.KEYWORD_ONLY for _, kind, _ in added)
    if "bias" not in inspect.signature(torchs).parameters:  # torch before 2.13
        mine = [argument for argument in mine if argument[0] != "bias"]
    assert mine == theirs


@pytest.mark.parametrize("ours", PLAIN)
def test_constructor_positions(ours):
    values = (3, 1e-3, None, False, True, Pair(), "cpu", torch.float64)
    names = list(inspect.signature(nn.SyncBatchNorm).parameters)[: len(values)]
    assert list(inspect.signature(ours).parameters)[: len(values)] == names
    layer = ours(*values)
    assert (layer.num_features, layer.eps, layer.momentum, layer.affine) == values[:4]
    assert (layer.track_running_stats, layer.process_group) == values[4:6]
    assert layer.running_var.dtype == torch.float64
    with pytest.raises(TypeError, match="positional"):
        ours(*values, True)  # bias is by keyword, as torch's


@pytest.mark.parametrize("ours", PLAIN[1:])
def test_a_device_in_the_position_of_batch_norms_is_refused(ours):
    """torch.nn.BatchNorm has device there, torch.nn.SyncBatchNorm the group, as we have."""
    with pytest.raises(TypeError, match="process_group: got str; pass None"):
        ours(3, 1e-5, 0.1, True, True, "cpu")


@every_class
@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_attributes(torchs, ours, affine, track):
    options = {"affine": affine, "track_running_stats": track, "momentum": None, "eps": 1e-3}
    size = () if torchs in LAZY else (3,)
    mine, theirs = ours(*size, **options), torchs(*size, **options)
    own = {"process_group", "reproducible", "_identity", "_token"}
    assert vars(mine).keys() - own == vars(theirs).keys() - own
    tensors = ("_parameters", "_buffers")
    for name, value in vars(theirs).items():
        if name in tensors:
            assert list(getattr(mine, name)) == list(value)
            assert [v is None for v in getattr(mine, name).values()] == [
                v is None for v in value.values()
            ]
        elif isinstance(value, (int, float, bool, type(None))):
            assert getattr(mine, name) == value, name
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert type(getattr(mine, name)) is type(getattr(theirs, name)), name


@every_class
def test_constants_and_version(torchs, ours):
    assert ours.__constants__ == torchs.__constants__
    assert ours._version == torchs._version == 2


@classes
@pytest.mark.parametrize("options", [{}, {"eps": 1e-3, "momentum": None}, {"affine": False}])
def test_extra_repr(torchs, ours, options):
    mine, theirs = ours(3, **options), torchs(3, **options)
    assert mine.extra_repr() == f"{theirs.extra_repr()}, world_size=1"
    mine.process_group = Pair()
    assert mine.extra_repr() == f"{theirs.extra_repr()}, world_size=1, group_size=2"


@classes
def test_bias_keyword(torchs, ours):
    mine = ours(3, bias=False)
    assert mine.bias is None
    assert list(mine.state_dict()) == [name for name in torchs(3).state_dict() if name != "bias"]
    if "bias" in inspect.signature(torchs).parameters:
        theirs = torchs(3, bias=False)
        assert mine.extra_repr() == f"{theirs.extra_repr()}, world_size=1"
        theirs.load_state_dict(mine.state_dict())
        assert ours(3, affine=False, bias=True).bias is torchs(3, affine=False, bias=True).bias


@pytest.mark.parametrize("make", PLAIN)
def test_device_and_dtype_factory_arguments(make):
    layer = make(3, device="meta", dtype=torch.float16)
    state = layer.state_dict()
    assert all(tensor.is_meta for tensor in state.values())
    dtypes = {tensor.dtype for name, tensor in state.items() if name != "num_batches_tracked"}
    assert dtypes == {torch.float16}
    assert layer.num_batches_tracked.dtype == torch.long


@classes
def test_meta_device_and_to_empty(torchs, ours):
    layers = [cls(3, device="meta", dtype=torch.float16) for cls in (ours, torchs)]
    with torch.device("meta"):
        layers.append(ours(3, dtype=torch.float16))
    states = []
    for layer in layers:
        assert all(tensor.is_meta for tensor in layer.state_dict().values())
        layer.to_empty(device="cpu").reset_parameters()
        states.append(layer.state_dict())
    identical(states[0], states[1])
    identical(states[2], states[1])


@classes
def test_default_dtype_and_conversion_of_dtype(torchs, ours):
    torch.set_default_dtype(torch.float64)
    try:
        identical(ours(3).state_dict(), torchs(3).state_dict())
    finally:
        torch.set_default_dtype(torch.float32)
    for change in (nn.Module.half, nn.Module.double, nn.Module.bfloat16):
        identical(change(ours(3)).state_dict(), change(torchs(3)).state_dict())


def test_inheritance():
    """A batch norm to every tool that looks for one, but no torch.nn.SyncBatchNorm: on the CPU
    DistributedDataParallel refuses that class."""
    for dims, torchs in TORCH.items():
        assert issubclass(CLASSES[torchs], torchs), dims
    for ours in PLAIN:
        assert issubclass(ours, nn.modules.batchnorm._BatchNorm)
        assert not issubclass(ours, nn.SyncBatchNorm)


def test_the_layers_cover_torchs():
    names = set(torch.nn.modules.batchnorm.__all__)
    assert {cls.__name__ for cls in (*CLASSES, *LAZY)} == names
    assert {cls.__name__ for cls in (*CLASSES.values(), *LAZY.values())} < set(syncbn.__all__)
