"""In one process the layers are torch's: mixed dtypes, more dimensions, tracing and export.

Options, values and errors against torch's, row by row: parity/test_torch_*.py.
"""

import copy
import warnings

import pytest
import torch

import syncbn
from support.layers import (
    Pair,
    Silent,
    assert_same_training,
    identical,
    pair,
)

SHAPES = [(6, 3), (4, 3, 5), (4, 3, 5, 2), (2, 3, 2, 3, 4)]
DTYPES = [(torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16,) * 2, (torch.float16,) * 2]
DTYPES += [(torch.bfloat16, torch.float32), (torch.float16, torch.float32)]  # input, parameters


@pytest.mark.parametrize(("dtype", "param_dtype"), DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_dtype_equals_torch(shape, dtype, param_dtype):
    assert_same_training(*pair(len(shape), dtype=param_dtype), shape, dtype)


@pytest.mark.parametrize("shape", [(4, 3, 2, 2, 2, 2), (2, 3, 1, 2, 1, 2, 3)])
def test_dimensions_beyond_five_equal_the_same_values_in_three(shape):
    ours, theirs = pair(3, generic=True)
    x = torch.randn(shape)
    identical(ours(x).flatten(2), theirs(x.flatten(2)))
    identical(dict(ours.named_buffers()), dict(theirs.named_buffers()))


@pytest.mark.parametrize("training", [True, False])
def test_the_meta_device_infers_shapes(training):
    layer = syncbn.SyncBatchNorm2d(3, device="meta", process_group=Silent()).train(training)
    y = layer(torch.empty(2, 3, 4, 5, device="meta", dtype=torch.bfloat16))
    assert (y.shape, y.dtype, y.is_meta) == ((2, 3, 4, 5), torch.bfloat16, True)


def test_a_group_is_asked_in_training_only():
    layer = syncbn.SyncBatchNorm2d(3, process_group=Pair())
    layer(torch.ones(1, 3, 1, 1))  # one value here, two over all ranks
    assert layer.num_batches_tracked == 1
    layer.process_group = "not even looked at"
    layer.eval()(torch.ones(1, 3, 1, 1))


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
