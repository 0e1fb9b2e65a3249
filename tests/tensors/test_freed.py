"""Tensors whose storage was freed or shrunk are refused: nothing is read, sent or written."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

import syncbn
from support.compiling import BACKENDS, compiled
from support.kernels import needs_native
from support.layers import Silent
from syncbn import kernels
from syncbn.comm import Communicator
from syncbn.kernels import native

NAMES = ["input", "running_mean", "running_var", "weight", "bias", "num_batches_tracked"]


def free(tensor):
    tensor.untyped_storage().resize_(0)


def shrink(tensor):
    tensor.untyped_storage().resize_(tensor.untyped_storage().nbytes() - 1)


harms = pytest.mark.parametrize("harm", [free, shrink])


def refused(call, name):
    with pytest.raises(RuntimeError, match=rf"^sync_batch_norm: expected {name} with ") as caught:
        call()
    text = str(caught.value)
    for part in ("in memory, got a storage of ", "freed or shrunk", "gather it or bring it back"):
        assert part in text
    assert "csrc/torch" not in text
    assert "\n" not in text


def layer_and_tensors(**options):
    layer = syncbn.SyncBatchNorm2d(3, **options)
    x = torch.randn(4, 3, 2, 2)
    return layer, x, {"input": x} | dict(layer.named_parameters()) | dict(layer.named_buffers())


PATHS = {
    "alone": {},
    "alone, cumulative": {"momentum": None},
    "in a group": {"process_group": Silent()},
    "reproducible": {"process_group": Silent(), "reproducible": True},
    "float64 statistics": {"statistics_dtype": torch.float64},
}


@harms
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("implementation")
def test_in_training(harm, name, path, masked):
    layer, x, tensors = layer_and_tensors(**PATHS[path])
    mask = torch.ones(4, 2, 2) > 0 if masked else None
    harm(tensors[name])
    refused(lambda: layer(x, mask), name)
    for key, start in syncbn.SyncBatchNorm2d(3).named_buffers():
        assert key == name or torch.equal(getattr(layer, key), start.to(getattr(layer, key).dtype))


@harms
@pytest.mark.parametrize("name", NAMES[:-1])
@pytest.mark.parametrize("path", ["alone", "float64 statistics"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("implementation")
def test_in_eval_mode(harm, name, path, masked):
    layer, x, tensors = layer_and_tensors(**PATHS[path])
    harm(tensors[name])
    mask = torch.ones(4, 2, 2) > 0 if masked else None
    refused(lambda: layer.eval()(x, mask), name)


@pytest.mark.usefixtures("implementation")
def test_views_into_what_was_freed():
    """Flat parameters, gaps: a pointer that isn't null tells nothing, nor do the sizes alone."""
    flat, wide = torch.ones(6), torch.randn(4, 3, 2, 4)
    layer, x, _ = layer_and_tensors()
    layer.weight, layer.bias = nn.Parameter(flat[:3]), nn.Parameter(flat[3:])
    shrink(flat)
    refused(lambda: layer(x), "bias")
    layer, _, _ = layer_and_tensors()
    every_second = wide[..., ::2]
    wide.untyped_storage().resize_(200)  # more than its 48 values, less than where they lie
    refused(lambda: layer(every_second), "input")


@harms
@pytest.mark.parametrize("training", [True, False])
def test_masks_and_lengths(harm, training):
    layer, x, _ = layer_and_tensors()
    mask, lengths = torch.ones(4, 2, 2) > 0, torch.tensor([1, 2])
    harm(mask), harm(lengths)
    refused(lambda: layer.train(training)(x, mask), "mask")
    refused(lambda: syncbn.mask_from_lengths(lengths, 3), "lengths")


class Closing(Communicator):
    """Two ranks with the same batch, until no message may follow."""

    rank, size, closed = 0, 2, False

    def all_gather(self, tensor):
        assert not self.closed
        return torch.stack((tensor, tensor))

    def all_reduce(self, tensor):
        assert not self.closed
        return 2 * tensor


@harms
@pytest.mark.parametrize("name", ["input", "weight", "the output's gradient"])
@pytest.mark.parametrize("path", ["alone", "in a group", "reproducible"])
@pytest.mark.parametrize("create_graph", [False, True])
@pytest.mark.parametrize("wants_x", [False, True])
@pytest.mark.usefixtures("implementation")
def test_in_backward(harm, name, path, create_graph, wants_x):
    comm = None if path == "alone" else Closing()
    layer, x, tensors = layer_and_tensors(process_group=comm, reproducible=path == "reproducible")
    y = layer(x.requires_grad_(wants_x))
    dy = torch.ones_like(y)
    if comm is not None:
        comm.closed = True
    elif "native" not in kernels._usable:
        pytest.skip("torch's own operator saves what it differentiates")
    harm((tensors | {"the output's gradient": dy})[name].detach())
    if path == "alone" and name == "weight" and not (wants_x or create_graph):
        torch.autograd.grad(y, layer.bias, dy)  # which takes no weight
        return
    refused(lambda: torch.autograd.grad(y, layer.bias, dy, create_graph=create_graph), name)


@needs_native
@harms
def test_every_operator_and_argument(harm):
    """Called by themselves, too: each tensor in turn."""
    x, weight, ops = torch.randn(4, 3, 5), torch.rand(3), torch.ops.syncbn
    running = [torch.zeros(3), torch.ones(3), torch.tensor(0)]
    sets = native.measure(x).unsqueeze(0)
    _, statistics = native.normalise(x, sets, eps=1e-5)
    mean, invstd, count = statistics
    sums = native.gradient_sums(x, x, statistics)
    received = native.measure_samples(x, None).unsqueeze(0)
    totals = native.gradient_sums_samples(x, x, statistics, None).unsqueeze(0)
    saved, lengths = torch.stack((mean, invstd)), torch.tensor([1, 3])
    for op, *arguments in (
        (ops.measure, x),
        (ops.normalise, x, sets, weight, weight, *running, 0.1, 1e-5),
        (ops.gradient_sums, x, x, mean, invstd),
        (ops.input_gradient, x, x, weight, mean, invstd, sums, count),
        (ops.measure_samples, x, lengths),
        (ops.merge_samples, received),
        (ops.gradient_sums_samples, x, x, mean, invstd, lengths),
        (ops.total_samples, totals),
        (ops.batch_norm, x, weight, weight, *running, 0.1, 1e-5),
        (ops.batch_norm_backward, x, x, weight, None, saved),
    ):
        for place, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                fresh = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
                op.default(*fresh)
                fresh = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
                harm(fresh[place])
                refused(lambda op=op, fresh=fresh: op.default(*fresh), r"[\w' ]+")
                for before, after in zip(arguments, fresh, strict=True):
                    same = after is fresh[place] or not isinstance(after, torch.Tensor)
                    assert same or torch.equal(before, after)


@harms
@pytest.mark.parametrize("name", ["input", "weight", "running_mean", "num_batches_tracked"])
@pytest.mark.usefixtures("implementation")
def test_replicas(harm, name):
    layer, x, tensors = layer_and_tensors()
    model = syncbn.DataParallel(layer, ["cpu"] * 2)
    harm(tensors[name])
    with pytest.raises(RuntimeError) as caught:
        model(x)
    assert "values in memory" in str(caught.value)
    assert "csrc/torch" not in str(caught.value)
    assert name == "num_batches_tracked" or layer.num_batches_tracked == 0


@pytest.mark.usefixtures("implementation")
def test_replicas_in_backward():
    layer, x, _ = layer_and_tensors()
    seen = []
    layer.register_forward_hook(lambda layer, args, y: seen.append(args[0].detach()))
    y = syncbn.DataParallel(layer, ["cpu"] * 2)(x)
    free(seen[1])
    refused(lambda: y.sum().backward(), "input")


@harms
@pytest.mark.parametrize("name", ["input", "weight"])
@pytest.mark.parametrize("transform", ["grad", "vmap"])
def test_in_transforms(harm, name, transform):
    x, weight = torch.randn(2, 4, 3) if transform == "vmap" else torch.randn(4, 3), torch.randn(3)
    harm(x if name == "input" else weight)

    def loss(x):
        return syncbn.sync_batch_norm(x, None, None, weight).square().sum()

    refused(lambda: getattr(torch.func, transform)(loss)(x), name)


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.usefixtures("implementation")
def test_a_mask_is_its_owners_after_forward(reproducible):
    x, mask = torch.randn(4, 3, 5), torch.rand(4, 5) < 0.7
    gradients = []
    for freed in (False, True):
        layer = syncbn.SyncBatchNorm(3, reproducible=reproducible)
        mine, given = x.clone().requires_grad_(), mask.clone()
        y = layer(mine, given)
        if freed:
            free(given)
        y.pow(3).sum().backward()
        gradients.append(mine.grad)
    assert torch.equal(*gradients)


def test_a_shard_of_a_dtensor(ranks):
    def run(rank):
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import Shard, distribute_tensor

        layer = syncbn.SyncBatchNorm(3)
        x = distribute_tensor(torch.randn(4, 3), init_device_mesh("cpu", (2,)), [Shard(0)])
        free(x.to_local())
        refused(lambda: layer(x), "input")

    ranks(2, run)


def restored(tensor, value):
    tensor.untyped_storage().resize_(value.untyped_storage().nbytes())
    tensor.data.copy_(value)  # as it was: what autograd saved of it has not changed


GRAPHS = {
    "plain": {},
    "cumulative": {"momentum": None},
    "skipping": {"skip_nonfinite": True},
    "reproducible": {"reproducible": True},
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chosen", ["native", "composite"])
@pytest.mark.parametrize(
    "options", ["plain", *(pytest.param(name, marks=pytest.mark.slow) for name in list(GRAPHS)[1:])]
)
def test_in_a_graph_over_ranks(ranks, backend, chosen, options):
    """Before any message: the rank's next try meets the others' first."""
    if chosen == "native" and not native.available():
        pytest.skip(native.unavailable())

    def harmed(rank, tensor, name, call):
        value = tensor.detach().clone()
        if rank == 1:
            shrink(tensor)
            refused(call, name)
            restored(tensor, value)
        return call()

    def run(rank):
        kernels._usable = {chosen, "composite"}
        layer, plain = (syncbn.SyncBatchNorm2d(3, **GRAPHS[options]) for _ in range(2))
        call, counter = compiled(layer, backend)
        tensors = dict(layer.named_parameters()) | dict(layer.named_buffers())
        given = ["input", *tensors]
        try:
            for name in given:
                x, dy = (torch.randn(4, 3, 2, 2) for _ in range(2))
                x.requires_grad_()
                y = harmed(rank, tensors.get(name, x.detach()), name, partial(call, x))
                back = partial(torch.autograd.grad, y, x, dy, retain_graph=True)
                (dx,) = back()
                if name in ("input", "weight"):
                    harmed(rank, tensors.get(name, x.detach()), name, back)
                expected = plain(x)
                torch.testing.assert_close(y, expected)
                torch.testing.assert_close(dx, torch.autograd.grad(expected, x, dy)[0])
                torch.testing.assert_close(layer.state_dict(), plain.state_dict())
        finally:
            kernels._usable = None
        return counter.frame_count

    assert ranks(2, run, timeout=300) == [1, 1]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
def test_in_a_graph_on_one_process(backend, name):
    layer, x, tensors = layer_and_tensors()
    call, _ = compiled(layer, backend)
    call(x)  # torch reads the counter when it traces
    free(tensors[name])
    refused(lambda: call(x), name)
