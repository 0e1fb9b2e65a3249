"""In one process the layers are torch's: the same numbers, shapes, errors and exports."""

import copy
import warnings

import pytest
import torch
from layers import (
    CHECKED,
    COMPILED,
    PLAIN,
    TORCH,
    Pair,
    assert_same_training,
    identical,
    observe,
    pair,
)
from torch import nn

import syncbn

SHAPES = [(6, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 2, 3, 4)]
DTYPES = [(torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2]
DTYPES += [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]  # input, parameters


@pytest.mark.parametrize("track_running_stats", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None, 0, 1.0])
@pytest.mark.parametrize("affine", ["affine", "no bias", "plain"])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_option_equals_torch(shape, affine, momentum, track_running_stats):
    options = {"momentum": momentum, "track_running_stats": track_running_stats, "eps": 1e-3}
    for generic in (True, False):
        layers = pair(len(shape), generic, affine == "affine", affine=affine != "plain", **options)
        assert_same_training(*layers, shape)


@pytest.mark.parametrize(("dtype", "param_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_dtype_equals_torch(shape, dtype, param_dtype):
    assert_same_training(*pair(len(shape), dtype=param_dtype), shape, dtype)


@pytest.mark.skipif(COMPILED, reason="the compiled operators take them")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_that_torch_refuses_are_refused_in_one_process(dtype):
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    for layer in pair(4, dtype=other):
        with pytest.raises(RuntimeError, match="mixed dtype"):
            layer(torch.randn(2, 3, 4, 4, dtype=dtype))


@pytest.mark.parametrize("shape", [(4, 3, 2, 2, 2, 2), (2, 3, 1, 2, 1, 2, 3)])
def test_dimensions_beyond_five_equal_the_same_values_in_three(shape):
    ours, theirs = pair(3, generic=True)
    x = torch.randn(shape)
    identical(ours(x).flatten(2), theirs(x.flatten(2)))
    identical(dict(ours.named_buffers()), dict(theirs.named_buffers()))


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("dropped", ["all", "statistics", "num_batches_tracked"])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_buffers_set_to_none_behave_as_torchs(dropped, momentum, track):
    layers = pair(4, momentum=momentum)
    for layer in layers:
        layer.track_running_stats = track
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            if dropped == "all" or (dropped == "statistics") == name.startswith("running"):
                setattr(layer, name, None)
    assert_same_training(*layers, (4, 3, 5, 2))


@pytest.mark.parametrize("frozen", [("weight",), ("bias",), ("weight", "bias")])
def test_frozen_parameters_get_no_gradient(frozen):
    ours, theirs = pair(4)
    for layer in (ours, theirs):
        for name in frozen:
            getattr(layer, name).requires_grad_(False)
    assert_same_training(ours, theirs, (4, 3, 5, 2))
    assert all(getattr(ours, name).grad is None for name in frozen)
    x = torch.randn(4, 3, 5, 2)
    assert ours(x).requires_grad == theirs(x).requires_grad == (len(frozen) == 1)


def test_an_eval_layer_in_a_training_model_keeps_its_statistics():
    ours, theirs = (nn.Sequential(nn.Conv2d(3, 3, 1), layer).train() for layer in pair(4))
    theirs[0].load_state_dict(ours[0].state_dict())
    ours[1].eval(), theirs[1].eval()
    x = torch.randn(4, 3, 5, 2)
    identical(observe(ours, x), observe(theirs, x))
    assert ours[1].num_batches_tracked == 0


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 4), (2, 3, 0, 4)])
@pytest.mark.parametrize("training", [True, False])
def test_empty_batches_behave_as_torchs(shape, training):
    ours, theirs = (layer.train(training) for layer in pair(len(shape)))
    identical(observe(ours, torch.empty(shape)), observe(theirs, torch.empty(shape)))


@pytest.mark.parametrize("format", [torch.channels_last, torch.channels_last_3d])
def test_memory_formats_are_kept(format):
    shape = (2, 3, 4, 5) if format is torch.channels_last else (2, 3, 4, 5, 2)
    x = torch.randn(shape).contiguous(memory_format=format)
    ours, theirs = (observe(layer, x) for layer in pair(len(shape)))
    identical(ours, theirs)
    assert ours["y"].is_contiguous(memory_format=format)


@pytest.mark.parametrize("shape", [*SHAPES, (3,), (), (2, 3, 1, 1, 1, 1)])
@pytest.mark.parametrize("dims", [3, 4, 5])
def test_checked_layers_take_the_dimensions_of_torchs(dims, shape):
    ours, theirs = pair(dims)
    x = torch.ones(shape)
    if x.dim() in ((2, 3) if dims == 3 else (dims,)):
        ours(x), theirs(x)
        return
    with pytest.raises(ValueError, match="expected") as torchs:
        theirs(x)
    with pytest.raises(ValueError, match=f"^{type(ours).__name__}: expected") as error:
        ours(x)
    assert str(torchs.value) in str(error.value)  # "expected 4D input (got 3D input)"
    assert str(tuple(shape)) in str(error.value)


@pytest.mark.parametrize("make", PLAIN)
def test_factory_arguments_place_parameters_and_buffers(make):
    layer = make(3, device="meta", dtype=torch.float16)
    state = layer.state_dict()
    assert all(tensor.is_meta for tensor in state.values())
    dtypes = {tensor.dtype for name, tensor in state.items() if name != "num_batches_tracked"}
    assert dtypes == {torch.float16}
    assert layer.num_batches_tracked.dtype == torch.long
    layer.to_empty(device="cpu").reset_parameters()
    identical(layer.state_dict(), nn.BatchNorm2d(3, dtype=torch.float16).state_dict())


@pytest.mark.parametrize("training", [True, False])
def test_the_meta_device_infers_shapes(training):
    layer = syncbn.SyncBatchNorm2d(3, device="meta", process_group=Pair()).train(training)
    y = layer(torch.empty(2, 3, 4, 5, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.is_meta) == ((2, 3, 4, 5), torch.bfloat16, True)


@pytest.mark.parametrize("options", [{}, {"eps": 1e-3, "momentum": None}, {"affine": False}])
def test_repr_shows_torchs_text_and_the_world_size(options):
    ours, theirs = pair(4, track_running_stats=False, **options)
    assert ours.extra_repr() == f"{theirs.extra_repr()}, world_size=1"
    ours.process_group = Pair()
    assert ours.extra_repr() == f"{theirs.extra_repr()}, world_size=1, group_size=2"


def test_a_group_is_asked_in_training_only():
    layer = syncbn.SyncBatchNorm2d(3, process_group=Pair())
    layer(torch.ones(1, 3, 1, 1))  # one value here, two over all ranks
    assert layer.num_batches_tracked == 1
    layer.process_group = "not even looked at"
    layer.eval()(torch.ones(1, 3, 1, 1))


def test_classes_are_torchs_batch_norm_but_not_its_sync_batch_norm():
    for dims, ours in CHECKED.items():
        assert issubclass(ours, TORCH[dims])
    for ours in (syncbn.SyncBatchNorm, *CHECKED.values()):
        assert isinstance(ours(3), nn.modules.batchnorm._BatchNorm)
        assert not isinstance(ours(3), nn.SyncBatchNorm)  # DDP refuses that class on CPU


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_and_exporting_give_torchs_operator(training):
    x, other = torch.randn(2, 2, 3, 4, 4)
    layer, theirs = (layer.train(training) for layer in pair(4))
    layer.process_group = Pair()
    expected = theirs(other)
    with torch.no_grad():
        exported = torch.export.export(copy.deepcopy(layer), (x,)).module()
        traced = torch.jit.trace(copy.deepcopy(layer), x, check_trace=False)
    identical(exported(other), expected)
    identical(traced.train(training)(other), expected)


def test_tracing_warns_of_nothing_that_torchs_layer_does_not_warn_of():
    texts = []
    for layer in pair(4):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.jit.trace(layer.eval(), torch.randn(2, 3, 4, 4), check_trace=False)
        texts.append([str(w.message) for w in caught if w.category is torch.jit.TracerWarning])
    assert texts[0] == texts[1]
