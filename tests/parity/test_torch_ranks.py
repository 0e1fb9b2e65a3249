"""torch.nn's batch norms over the whole batch against ours over ranks, and in sub-groups."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncbn
from support.cases import laid_out, layouts
from support.layers import CHECKED, TORCH, observe

SHAPES = {"NC": (), "NCL": (5,), "2d": (3, 2), "3d": (2, 3, 2)}
SPLITS = {2: (3, 2), 3: (2, 0, 3)}
OPTIONS = [
    {"affine": affine, "bias": bias, "track_running_stats": track, "momentum": momentum}
    for (affine, bias), track, momentum in itertools.product(
        [(True, True), (True, False), (False, True)], [True, False], [0.1, None, 1.0, 0.0]
    )
]
MODES = (True, True, False, True)  # train, train, eval, train
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def batches(spatial, samples, dtype):
    """For each mode a batch and the gradient of its output, as every rank knows them."""
    generator = torch.Generator().manual_seed(1)
    shape = (2 * len(MODES), samples, 3, *spatial)
    values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    return list(zip(values[::2] * 2 + 1, values[1::2], strict=True))


def initialised(layer):
    for number, parameter in enumerate(layer.parameters()):
        parameter.data.copy_(torch.linspace(0.5, 1.5 + number, 3))
    return layer


def held(layer):
    """Copies of the parameters' gradients and of the buffers, by name."""
    gradients = {name: p.grad.clone() for name, p in layer.named_parameters()}
    return gradients, {name: b.clone() for name, b in layer.named_buffers()}


def trained(layer, pairs, layout, share):
    """What the layer shows in each mode on its share of each batch."""
    shown = []
    for training, (x, dy) in zip(MODES, pairs, strict=True):
        layer.train(training).zero_grad()
        x = laid_out(x[share], layout).detach().requires_grad_()
        y = layer(x)
        y.backward(dy[share])
        shown.append((y.detach(), x.grad, *held(layer)))
    return shown


def shares(split):
    ends = list(itertools.accumulate(split))
    return [slice(end - size, end) for size, end in zip(split, ends, strict=True)]


def torchs_layer(spatial, options):
    options = dict(options)
    bias = options.pop("bias")
    layer = TORCH[2 + len(spatial)](3, **options)
    if not bias:  # torch before 2.13 has no such keyword
        layer.register_parameter("bias", None)
    return initialised(layer)


def expected(spatial, split, dtype, options):
    """Torch on the whole batch. In eval mode every rank is alone, as torch's SyncBatchNorm."""
    layer = torchs_layer(spatial, options).to(dtype)
    shown = []
    for training, (x, dy) in zip(MODES, batches(spatial, sum(split), dtype), strict=True):
        layer.train(training).zero_grad()
        x.requires_grad_()
        parts = shares(split) if not (training or options["track_running_stats"]) else [slice(None)]
        y = torch.cat([layer(x[part]) for part in parts])
        y.backward(dy)
        shown.append((y.detach(), x.grad, *held(layer)))
    return shown


def check(results, whole, dtype):
    """The ranks' outputs and input gradients joined, parameter gradients summed, buffers equal."""
    tolerance = {"rtol": TOLERANCE[dtype] * 4, "atol": TOLERANCE[dtype] * 4}
    for step, (y, dx, gradients, buffers) in enumerate(whole):
        seen = [result[step] for result in results]
        torch.testing.assert_close(torch.cat([s[0] for s in seen]), y, **tolerance)
        torch.testing.assert_close(torch.cat([s[1] for s in seen]), dx, **tolerance)
        for name, gradient in gradients.items():
            total = sum(s[2][name] for s in seen)
            torch.testing.assert_close(total, gradient, **tolerance)
        for shown in seen:
            assert list(shown[2]) == list(gradients)
            torch.testing.assert_close(shown[3], buffers, **tolerance)


@pytest.mark.parametrize(
    "every_layout",
    [False, pytest.param(True, marks=pytest.mark.slow)],
    ids=["layouts in turn", "all"],
)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("world", SPLITS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_option_over_ranks(ranks, shape, world, dtype, every_layout):
    spatial, split = SHAPES[shape], SPLITS[world]
    names = layouts(2 + len(spatial))
    if every_layout:
        cases = list(itertools.product(OPTIONS, names))
    else:  # in another order beside each four options, whose momenta are the same
        turns = (names[(i + i // 4) % len(names)] for i in itertools.count())
        cases = list(zip(OPTIONS, turns, strict=False))

    def run(rank):
        share = shares(split)[rank]
        pairs = batches(spatial, sum(split), dtype)
        layers = (CHECKED[2 + len(spatial)](3, dtype=dtype, **options) for options, _ in cases)
        return [
            trained(initialised(layer), pairs, layout, share)
            for layer, (_, layout) in zip(layers, cases, strict=True)
        ]

    results = ranks(world, run, timeout=120)
    for number, (options, _) in enumerate(cases):
        check([r[number] for r in results], expected(spatial, split, dtype, options), dtype)


@pytest.mark.parametrize("through", ["constructor", "convert_sync_batchnorm", "lazy"])
def test_process_group_of_consecutive_ranks(ranks, through):
    """Ranks [0, 1] and [2, 3] normalise apart: two torch layers on two batches."""
    split, options, dtype = (2, 3, 1, 4), OPTIONS[0], torch.float64

    def run(rank):
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        group = groups[rank // 2]
        if through == "constructor":
            layer = syncbn.SyncBatchNorm2d(3, process_group=group, dtype=dtype)
        elif through == "lazy":
            layer = syncbn.LazySyncBatchNorm2d(process_group=group, dtype=dtype)
            layer.load_state_dict(nn.BatchNorm2d(3, dtype=dtype).state_dict())
        else:
            model = nn.Sequential(nn.BatchNorm2d(3, dtype=dtype))
            layer = syncbn.SyncBatchNorm.convert_sync_batchnorm(model, group)[0]
        assert layer.process_group is group
        first = 2 * (rank // 2)
        share = shares(split[first : first + 2])[rank - first]
        pairs = batches((3, 2), sum(split[first : first + 2]), dtype)
        shown = trained(initialised(layer), pairs, "contiguous", share)
        assert layer.extra_repr().endswith("world_size=4, group_size=2")
        return shown

    results = ranks(4, run, timeout=120)
    for first in (0, 2):
        whole = expected((3, 2), split[first : first + 2], dtype, options)
        check(results[first : first + 2], whole, dtype)


def test_torchs_sync_batch_norm_refuses_the_cpu(ranks):
    """Where torch's layer communicates, it takes accelerators only; ours takes its input where it
    is. In eval mode torch's works on the CPU, as ours."""

    def run(rank):
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(rank))
        theirs, ours = nn.SyncBatchNorm(3), syncbn.SyncBatchNorm(3)
        try:
            theirs(x)
        except ValueError as error:
            text = str(error)
        theirs.load_state_dict(ours.state_dict())  # torch's counted the batch that it refused
        ours.eval(), theirs.eval()
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        return text, ours.train()(x).mean().item()

    for text, mean in (results := ranks(2, run)):
        assert "expected input tensor to be on GPU" in text
        assert mean != 0, "normalised by more than its own batch"
    assert abs(sum(mean for _, mean in results)) < 1e-6


def test_a_group_of_one_rank_is_batch_norm(ranks):
    def run(rank):
        groups = [dist.new_group([0]), dist.new_group([1])]
        ours, theirs = syncbn.SyncBatchNorm(3, process_group=groups[rank]), nn.BatchNorm1d(3)
        x = torch.randn(4, 3)
        torch.testing.assert_close(observe(ours, x), observe(theirs, x), rtol=1e-5, atol=1e-5)

    ranks(2, run)


def test_one_sample_per_rank(ranks):
    """What torch's BatchNorm refuses, as one batch it takes."""

    def run(rank):
        x = torch.tensor([[1.0, 2.0, 3.0]]) * (1 - 2 * rank)
        return syncbn.SyncBatchNorm(3)(x), x

    results = ranks(2, run)
    ours, x = (torch.cat(tensors) for tensors in zip(*results, strict=True))
    torch.testing.assert_close(ours, nn.BatchNorm1d(3)(x))
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        nn.BatchNorm1d(3)(x[:1])
