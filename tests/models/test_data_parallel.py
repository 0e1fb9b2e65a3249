"""DataParallel equals one device: values, gradients of any order, statistics, modes, state."""

from __future__ import annotations

import contextlib
import copy
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import syncbn
from support import oracle
from support.cases import CLOSE, Case, laid_out, layouts, strides
from support.layers import saved_and_loaded
from support.replicas import (
    CPUS,
    assert_same_state_and_gradients,
    assert_same_step,
    images,
    nested,
    twins,
)


class UsedTwice(nn.Module):
    """One layer used twice in a forward, and known by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 2, 1)
        self.norm = self.again = nn.BatchNorm2d(2)
        self.inside = nn.Sequential(nn.Tanh(), self.norm)

    def forward(self, x):
        return self.inside(self.again(self.conv(self.norm(x))))


class Hidden(nn.Module):
    """A layer in a plain list, which no replica copies."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(2, track_running_stats=False)
        self.layers = [self.norm]

    def forward(self, x):
        return self.layers[0](x)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.norm = nn.GRU(10, 4, batch_first=True), nn.BatchNorm1d(6)

    def forward(self, x):
        return self.norm(self.rnn(x.flatten(2).transpose(1, 2).reshape(len(x), 6, 10))[0])


def spectral() -> nn.Module:
    return nn.Sequential(nn.utils.spectral_norm(nn.Conv2d(2, 4, 1)), nn.BatchNorm2d(4))


def parametrised() -> nn.Module:
    conv = nn.utils.parametrizations.weight_norm(nn.Conv2d(2, 4, 1))
    return nn.Sequential(conv, nn.BatchNorm2d(4))


NETWORKS = [nested, UsedTwice, Hidden, Recurrent, spectral, parametrised]


@pytest.mark.parametrize("samples", [2, 3, 4, 7])
@pytest.mark.parametrize("make", NETWORKS)
def test_steps_equal_one_device(make, samples):
    parallel, alone = twins(make)
    for step in range(3):
        assert_same_step(parallel, alone, images(samples, step))


@pytest.mark.parametrize("make", [UsedTwice, spectral])
def test_a_batch_of_one_runs_on_one_device(make):
    assert_same_step(*twins(make), images(1))


@pytest.mark.parametrize("devices", [None, ["cpu"], [torch.device("cpu", 0)] * 2, ("cpu",) * 8])
def test_any_list_of_devices(devices):
    if devices is None and torch.cuda.is_available():
        pytest.skip("the default is the CPU only where there is no CUDA")
    parallel, alone = twins(nested, devices)
    assert parallel.devices == [torch.device("cpu")] * len(devices or ["cpu"])
    assert_same_step(parallel, alone, images(5))


@pytest.mark.parametrize("shape", [(7, 3), (5, 3, 4), (5, 3, 4, 2), (4, 3, 2, 3, 2)], ids=str)
@pytest.mark.parametrize("dtype", list(oracle.TOLERANCE), ids=str)
def test_a_layer_equals_the_oracle_in_every_dtype_and_layout(shape, dtype):
    for layout in layouts(len(shape)):
        case = Case(split=shape[:1], spatial=shape[2:], dtype=dtype, offset=3.0)
        x, dy, weight, bias = case.batch()
        layer = syncbn.SyncBatchNorm(3)
        layer.weight.data, layer.bias.data = weight, bias
        x = laid_out(x, layout).detach().requires_grad_()
        y = syncbn.DataParallel(layer, CPUS)(x)
        assert strides(y) == strides(torch.empty_like(x)) or layout in ("strided", "transposed")
        y.backward(dy)
        expected = oracle.batch_norm(x, dy, weight, bias)
        wide = torch.float32 if dtype == torch.float64 else dtype
        oracle.assert_close(y, expected.y, dtype=wide, factor=2)
        oracle.assert_close(x.grad, expected.dx, dtype=wide, factor=10)
        oracle.assert_close(layer.weight.grad, expected.dweight, dtype=wide, factor=10)
        oracle.assert_close(layer.bias.grad, expected.dbias, dtype=wide, factor=10)
        for found, value in zip(
            (layer.running_mean, layer.running_var), expected.running(0, 1, 0.1), strict=True
        ):
            oracle.assert_close(found, value)
        assert layer.num_batches_tracked == 1


def test_training_equals_one_device():
    models = twins(nested)
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(20):
            optimizer.zero_grad()
            model(images(2 + step % 5, step)).square().sin().sum().backward()
            optimizer.step()
    assert_same_state_and_gradients(*models)


def test_a_hundred_batches_of_any_size():
    parallel, _ = twins(nested, ["cpu"] * 4)
    for step in range(100):
        parallel(images(2 + step % 7, step)).sum().backward()
    assert parallel.module[1].num_batches_tracked == 100


class Functional(nn.Module):
    """Not a layer, but the function, of parameters that are no one's."""

    def __init__(self, weight, bias):
        super().__init__()
        self.tensors = (weight, bias)

    def forward(self, x):
        return syncbn.sync_batch_norm(x, None, None, *self.tensors, eps=1e-2)


def test_derivatives_of_first_and_second_order():
    def function(x, weight, bias):
        return syncbn.DataParallel(Functional(weight, bias), CPUS)(x)

    inputs = [torch.randn(4, 2, 2), torch.rand(2) + 0.5, torch.randn(2)]
    inputs = [tensor.double().requires_grad_() for tensor in inputs]
    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
    x, *parameters = (tensor.detach() for tensor in inputs)
    torch.testing.assert_close(
        function(x, *parameters),
        nn.functional.batch_norm(x, None, None, *parameters, True, 0, 1e-2),
    )


def test_gradient_penalty():
    models = twins(nested)
    for model in models:
        x = images(5).requires_grad_()
        (gradient,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        (gradient.flatten(1).norm(dim=1) - 1).square().mean().backward()
    assert_same_state_and_gradients(*models)


def test_backward_twice_and_two_forwards_before_it():
    models = twins(nested)
    for model in models:
        first, second = model(images(4, 1)).sin().sum(), model(images(5, 2)).sin().sum()
        first.backward(retain_graph=True)
        first.backward()
        second.backward()
    assert_same_state_and_gradients(*models)


def test_an_output_that_nobody_uses_and_a_frozen_layer():
    models = twins(nested)
    for model in models:
        (model.module if model is models[0] else model)[1].requires_grad_(False)
        model(images(5))[:1].sin().sum().backward()  # the other replicas get no gradient
    assert_same_state_and_gradients(*models)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpoint_around_the_whole(reentrant):
    models = twins(nested)
    for model, run in zip(models, (checkpoint, lambda f, x, **_: f(x)), strict=True):
        x = images(4).requires_grad_()
        run(model, x, use_reentrant=reentrant).sin().sum().backward()
        model.x = x.grad
    torch.testing.assert_close(models[0].x, models[1].x, **CLOSE)
    assert_same_state_and_gradients(*models)


def test_two_models_interleaved():
    (one, one_alone), (two, two_alone) = twins(nested), twins(UsedTwice, ["cpu"] * 2)
    for a, b in ((one, two), (one_alone, two_alone)):
        x = images(6)
        loss = a(b(x)).sin().sum() + a(x).cos().sum() + b(x).sin().sum()
        loss.backward()
    assert_same_state_and_gradients(one, one_alone)
    assert_same_state_and_gradients(two, two_alone)


def test_called_by_several_threads():
    models = [twins(nested) for _ in range(4)]
    errors = []

    def train(pair):
        try:
            for step in range(5):
                assert_same_step(*pair, images(4, step))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=train, args=(pair,), daemon=True) for pair in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    assert not errors
    assert not any(thread.is_alive() for thread in threads)


class Modes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.seen = nn.BatchNorm2d(2), []

    def forward(self, x):
        self.seen.append(
            (
                torch.is_grad_enabled(),
                torch.is_inference_mode_enabled(),
                torch.is_autocast_enabled("cpu"),
                torch.get_autocast_dtype("cpu"),
                torch.is_autocast_cache_enabled(),
                self.training,
            )
        )
        return self.norm(x)


def test_replicas_make_tensors_where_the_caller_does():
    class Makes(nn.Module):
        def forward(self, x):
            assert torch.ones(1).device.type == torch.get_default_device().type == "meta"
            return x

    x = images(4)
    with torch.device("meta"):
        syncbn.DataParallel(Makes(), CPUS)(x)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "mode",
    [
        contextlib.nullcontext,
        torch.no_grad,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16, enabled=False),
        lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False),
    ],
)
def test_replicas_run_in_the_callers_modes(mode, training):
    parallel, alone = twins(Modes)
    for model in (parallel, alone):
        model.train(training)
        with mode():
            model.y = model(images(4))
    assert parallel.module.seen == alone.seen * 3
    assert parallel.y.requires_grad == alone.y.requires_grad
    torch.testing.assert_close(parallel.y, alone.y, **CLOSE)
    assert_same_state_and_gradients(parallel, alone)


def test_autocast_reaches_the_layers():
    parallel, alone = twins(nested)
    parallel.float(), alone.float()
    with torch.autocast("cpu", torch.bfloat16):
        mine, theirs = (model(images(6).float()) for model in (parallel, alone))
    assert mine.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(mine, theirs, rtol=0.1, atol=0.1)


def test_a_replica_without_gradients_among_others():
    class Part(Functional):
        def forward(self, x):
            with torch.set_grad_enabled(bool(x[0, 0, 0] > 0)):
                return super().forward(x)

    weight = torch.rand(2).double().requires_grad_()
    x = torch.randn(4, 2, 3).double()
    x[:2, 0, 0], x[2:, 0, 0] = -1, 1
    y = syncbn.DataParallel(Part(weight, None), CPUS[:2])(x.requires_grad_())
    mine = torch.autograd.grad(y.sin().sum(), (x, weight))
    values = torch.cat((x[:2].detach(), x[2:]))
    scales = torch.stack((weight.detach(), weight.detach(), weight, weight)).unsqueeze(-1)
    y = (nn.functional.batch_norm(values, None, None, training=True, eps=1e-2) * scales)[2:]
    for found, expected in zip(mine, torch.autograd.grad(y.sin().sum(), (x, weight)), strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


def test_random_numbers_are_reproducible():
    parallel, _ = twins(lambda: nn.Sequential(nn.Dropout(), nn.BatchNorm2d(2), nn.Dropout()))
    draws = []
    for _ in range(5):
        torch.manual_seed(1)
        draws.append(parallel(images(6)))
    assert all(torch.equal(draw, draws[0]) for draw in draws)
    assert not torch.equal(draws[0][:2] == 0, draws[0][2:4] == 0)


def test_an_unconverted_layer_takes_the_first_replicas_statistics():
    layer = nn.BatchNorm2d(2, momentum=1.0).double()
    x = images(6)
    syncbn.DataParallel(layer, CPUS)(x)
    torch.testing.assert_close(layer.running_mean, x[:2].mean((0, 2, 3)))
    assert layer.num_batches_tracked == 1


def test_replicas_of_compiled_modules_are_replicas():
    """What a module's compile() leaves behind would call the original."""
    layer = nn.BatchNorm2d(2).double()
    layer.compile(backend="eager")
    syncbn.DataParallel(layer, CPUS)(images(6))
    assert layer.num_batches_tracked == 1


def test_state_and_class_are_torchs():
    parallel, alone = twins(nested)
    theirs = nn.DataParallel(alone)
    assert isinstance(parallel, nn.DataParallel)
    assert list(parallel.state_dict()) == list(theirs.state_dict())
    parallel(images(4))
    theirs.load_state_dict(saved_and_loaded(parallel.state_dict()))
    parallel.load_state_dict(theirs.state_dict())
    assert not any(module.training for module in parallel.eval().modules())
    other = copy.deepcopy(parallel).train()
    assert other.devices == parallel.devices
    other(images(4)).sum().backward()
    assert all(parameter.grad is None for parameter in parallel.parameters())
    assert "devices=['cpu', 'cpu', 'cpu']" in repr(parallel)


def test_hooks_run_and_parameters_show_on_every_replica():
    parallel, _ = twins(nested)
    calls = []
    parallel.module[1].register_forward_hook(
        lambda layer, inputs, output: calls.append((len(inputs[0]), len(list(layer.parameters()))))
    )
    parallel(images(4))
    assert calls == [(2, 2), (1, 2), (1, 2)]
    assert parallel.module[1].process_group is None
