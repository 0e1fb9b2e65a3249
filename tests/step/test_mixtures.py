"""One rule for mixtures of dtypes: input, parameters and statistics may each be of any of four."""

from __future__ import annotations

from itertools import combinations_with_replacement, product

import pytest
import torch

import syncbn
from support import oracle
from support.compiling import compiled
from support.in_threads import in_threads
from support.layers import Pair, Silent

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# (input, weight, bias, running_mean, running_var): of a kind, all but one of a kind, each another
MIXTURES = [
    *((x, p, p, r, r) for x, p, r in product(DTYPES, repeat=3)),
    *((x, w, b, w, b) for x, (w, b) in product(DTYPES, combinations_with_replacement(DTYPES, 2))),
    *((x, w, b, b, w) for x, (b, w) in product(DTYPES, combinations_with_replacement(DTYPES, 2))),
]
NAMES = ("weight", "bias", "running_mean", "running_var")


def layer_of(dtypes, **options):
    layer = syncbn.SyncBatchNorm(3, **options)
    generator = torch.Generator().manual_seed(1)  # threads share the default one
    for name, dtype in zip(NAMES, dtypes, strict=True):
        tensor = (torch.rand(3, dtype=torch.float64, generator=generator) + 0.5).to(dtype)
        parameter = name in ("weight", "bias")
        setattr(layer, name, torch.nn.Parameter(tensor) if parameter else tensor)
    return layer


def arithmetic(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounding(of, arithmetic):
    return max(of, arithmetic, key=oracle.TOLERANCE.__getitem__)


def check(layer, x, dy, before):
    """What one step of layer gave, where x and dy are the whole batch."""
    expected = oracle.batch_norm(x, dy, before.weight, before.bias)
    wide = arithmetic(x.dtype)
    oracle.assert_close(x.grad, expected.dx, factor=2)
    for name in ("weight", "bias"):
        parameter, gradient = getattr(layer, name), getattr(expected, "d" + name)
        assert parameter.grad.dtype == parameter.dtype
        rounded = rounding(parameter.dtype, wide)
        oracle.assert_close(parameter.grad, gradient, dtype=rounded, factor=4)
    for name, new in (("running_mean", expected.mean), ("running_var", expected.unbiased_var)):
        statistic, old = getattr(layer, name), getattr(before, name)
        assert statistic.dtype == old.dtype
        moved = 0.9 * old.double() + 0.1 * new
        oracle.assert_close(statistic, moved, dtype=rounding(old.dtype, wide))
    return expected


def batch(dtype):
    x, dy = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    return (x * 2 + 1).to(dtype).requires_grad_(), dy.to(dtype)


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.usefixtures("implementation")
def test_every_mixture_trains(reproducible):
    for x_dtype, *dtypes in MIXTURES:
        layer, before = layer_of(dtypes, reproducible=reproducible), layer_of(dtypes)
        x, dy = batch(x_dtype)
        y = layer(x)
        y.backward(dy)
        assert y.dtype == x.grad.dtype == x_dtype
        expected = check(layer, x, dy, before)
        oracle.assert_close(y.detach(), expected.y, factor=2)


@pytest.mark.parametrize("replicas", [False, True])
@pytest.mark.usefixtures("implementation")
def test_over_ranks_and_replicas(replicas):
    """Ranks of different parameters, too: each has gradients of its own types."""
    for x_dtype, *dtypes in MIXTURES[::5]:
        x, dy = batch(x_dtype)
        before = layer_of(dtypes)
        if replicas:
            layer = layer_of(dtypes)
            y = syncbn.DataParallel(layer, ["cpu"] * 2)(x)
            y.backward(dy)
            check(layer, x, dy, before)
            assert y.dtype == x_dtype
            continue

        def run(comm, x=x, dy=dy, dtypes=dtypes):
            layer = layer_of(dtypes, process_group=comm)
            share = slice(0, 1) if comm.rank == 0 else slice(1, 4)
            mine = x.detach()[share].requires_grad_()
            layer(mine).backward(dy[share])
            return layer, mine.grad

        (layer, first), (other, second) = in_threads(2, run)
        x.grad = torch.cat((first, second))
        for mine, its in zip(layer.parameters(), other.parameters(), strict=True):
            mine.grad = (mine.grad.double() + its.grad.double()).to(mine.dtype)
        check(layer, x, dy, before)


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_compiled(affine, statistics):
    for x_dtype, *dtypes in MIXTURES[1:100:25]:
        layers = [layer_of(dtypes) for _ in range(2)]
        for layer in layers:
            if not affine:
                layer.weight = layer.bias = None
            if not statistics:
                layer.running_mean = layer.running_var = None
        traced, _ = compiled(layers[1])
        x, dy = batch(x_dtype)
        results = []
        for call, layer in ((layers[0], layers[0]), (traced, layers[1])):
            leaf = x.detach().clone().requires_grad_()
            y = call(leaf)
            y.backward(dy)
            tensors = [leaf.grad, *(p.grad for p in layer.parameters()), *layer.buffers()]
            results.append([y.detach(), *tensors])
        for eager, graph in zip(*results, strict=True):
            assert eager.dtype == graph.dtype
            if eager.dtype.is_floating_point:
                wide = rounding(x_dtype, eager.dtype)
                oracle.assert_close(graph, eager.double(), dtype=wide, factor=4)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("implementation")
def test_every_mixture_in_eval_mode(masked):
    for x_dtype, *dtypes in MIXTURES:
        layer = layer_of(dtypes).eval()
        x = (torch.randn(4, 3, 5, dtype=torch.float64) * 2 + 1).to(x_dtype).requires_grad_()
        mask = torch.rand(4, 5) > 0.3 if masked else None
        y = layer(x, mask)
        mean, var, weight, bias = (
            getattr(layer, name).detach().double().view(3, 1)
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        normal = (x.detach().double() - mean) * (var + 1e-5).rsqrt()
        expected = normal * weight + bias
        if masked:
            expected = expected * mask.unsqueeze(1)
            normal = normal * mask.unsqueeze(1)
        assert y.dtype == x_dtype
        oracle.assert_close(y.detach(), expected, factor=2)
        y.sum().backward()
        assert x.grad.dtype == x_dtype
        for parameter in layer.parameters():
            assert parameter.grad.dtype == parameter.dtype
        wide = rounding(layer.weight.dtype, rounding(x_dtype, torch.float32))
        oracle.assert_close(layer.weight.grad, normal.sum((0, 2)), dtype=wide, factor=4)


@pytest.mark.parametrize("name", ["input", *NAMES])
@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.int32], ids=str
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("group", [None, Silent()], ids=["alone", "in a group"])
@pytest.mark.usefixtures("implementation")
def test_other_dtypes_are_refused_before_communicating(name, dtype, training, group):
    tensors = dict.fromkeys(NAMES, torch.ones(3)) | {"input": torch.ones(4, 3, 5)}
    tensors[name] = tensors[name].to(dtype)
    with pytest.raises(TypeError, match=rf"^sync_batch_norm: expected .*got {dtype}; ") as caught:
        syncbn.sync_batch_norm(**tensors, training=training, group=group)
    assert "floating-point" in str(caught.value)
    assert "of float16, bfloat16, float32 or float64" in str(caught.value)


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("reproducible", [True, False])
def test_up_to_64_dimensions(training, reproducible):
    for dims in (17, 64):
        layer, flat = (syncbn.SyncBatchNorm(3, reproducible=reproducible) for _ in range(2))
        layer.train(training), flat.train(training)
        shape = (4, 3, *(2 if d % 12 == 5 else 1 for d in range(2, dims)))
        x = torch.randn(shape)
        x = x.transpose(5, -1).contiguous().transpose(5, -1).requires_grad_()
        y, z = layer(x), flat(x.flatten(2))
        torch.testing.assert_close(y.flatten(2), z, rtol=1e-5, atol=1e-5)
        y.square().sum().backward()
        mask = torch.ones(4, *shape[2:]) > 0
        torch.testing.assert_close(layer(x, mask), layer(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"expected at most 64 dimensions.*got 65; join some"):
        layer(torch.ones(4, 3, *(1,) * 63))


def storages(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


@pytest.mark.parametrize("wants_x", [True, False])
@pytest.mark.parametrize("create_graph", [True, False])
@pytest.mark.parametrize("path", ["alone", "of two", "reproducible", "replicas"])
@pytest.mark.usefixtures("implementation")
def test_each_gradient_has_memory_of_its_own(wants_x, create_graph, path):
    options = {"of two": {"process_group": Pair()}, "reproducible": {"reproducible": True}}
    layer = syncbn.SyncBatchNorm(3, dtype=torch.float64, **options.get(path, {}))
    model = syncbn.DataParallel(layer, ["cpu"] * 2) if path == "replicas" else layer
    x = torch.randn(4, 3, 5, dtype=torch.float64, requires_grad=wants_x)
    wanted = [*layer.parameters(), *([x] if wants_x else [])]
    gradients = torch.autograd.grad(model(x).square().sum(), wanted, create_graph=create_graph)
    assert len(storages(gradients)) == len(gradients)
    assert all(len(g.untyped_storage()) == 8 * g.numel() for g in gradients)
