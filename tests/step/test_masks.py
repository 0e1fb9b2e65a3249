"""Masked batches equal the packed values that count, over ranks, whatever the padding holds."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from support import oracle
from support.cases import share_of
from support.launches import Others
from support.sequences import packed, speech
from syncbn import mask_from_lengths
from syncbn.step import dispatch


def on_device(where):
    """Where the values that count are not picked out, as how many they are is not known."""
    return mock.patch.object(dispatch, "_is_packing_slow", return_value=where == "device")


anywhere = pytest.mark.parametrize("where", ["cpu", "device"])


def step(layer, x, dy, mask):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x, mask)
    y.backward(dy)
    return y.detach(), x.grad


def check(results, x, dy, mask, factor=4.0):
    """Outputs and gradients of all shares equal the oracle's of the packed values, else zero."""
    y, dx = (torch.cat(parts) for parts in zip(*results, strict=True))
    expected = oracle.batch_norm(packed(x, mask), packed(dy, mask))
    oracle.assert_close(packed(y, mask), expected.y, factor=factor)
    oracle.assert_close(packed(dx, mask), expected.dx, factor=factor)
    assert (packed(y, ~mask) == 0).all()
    assert (packed(dx, ~mask) == 0).all()
    return expected


@anywhere
@pytest.mark.parametrize("split", [(5,), (3, 2), (1, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("reproducible", [True, False])
def test_a_step_equals_the_packed_values(ranks, split, reproducible, where):
    x, dy, mask = speech()

    def run(rank):
        mine = share_of(split, rank)
        layer = syncbn.SyncBatchNorm(3, dtype=torch.float64, reproducible=reproducible)
        with on_device(where):
            return step(layer, x[mine], dy[mine], mask[mine]), layer.state_dict()

    results = ranks(len(split), run) if len(split) > 1 else [run(0)]
    expected = check([result for result, _ in results], x, dy, mask)
    for _, state in results:
        oracle.assert_close(state["running_mean"], 0.1 * expected.mean)
        oracle.assert_close(state["running_var"], 0.9 + 0.1 * expected.unbiased_var)
        assert state["num_batches_tracked"] == 1


@anywhere
def test_a_rank_may_be_wholly_masked_or_have_no_mask(ranks, where):
    x, dy, mask = speech()
    mask[:2] = False
    mask[4] = True
    shares = [slice(0, 2), slice(2, 4), slice(4, 5)]

    def run(rank):
        mine = shares[rank]
        layer = syncbn.SyncBatchNorm(3, dtype=torch.float64)
        with on_device(where):
            return step(layer, x[mine], dy[mine], mask[mine] if rank < 2 else None)

    check(ranks(3, run), x, dy, mask)


def test_ranks_may_pad_to_sizes_of_their_own(ranks):
    x, dy, mask = speech()

    def run(rank):
        mine, size = (slice(0, 2), 11) if rank == 0 else (slice(2, 5), 7)
        wide = [speech(size=size, padding=5.0)[k][mine] for k in range(3)]
        y, dx = step(syncbn.SyncBatchNorm(3, dtype=torch.float64), *wide)
        return y[..., :7], dx[..., :7]

    check(ranks(2, run), x, dy, mask)


@pytest.mark.parametrize("padding", [0.0, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("size", [7, 9, 40])
def test_results_do_not_depend_on_the_padding(padding, size):
    x, dy, mask = speech(size=size, padding=padding)
    layer = syncbn.SyncBatchNorm1d(3, dtype=torch.float64)
    y, dx = step(layer, x, dy, mask)
    expected = step(plain := syncbn.SyncBatchNorm1d(3, dtype=torch.float64), *speech(size=7))
    torch.testing.assert_close((y[..., :7], dx[..., :7]), expected, rtol=0, atol=0)
    assert not y[..., 7:].any()
    for one, other in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert torch.equal(layer.running_var, plain.running_var)


@pytest.mark.parametrize("padding", [0.0, float("nan")])
def test_eval_mode_masks_too(padding):
    x, dy, mask = speech(padding=padding)
    layer = syncbn.SyncBatchNorm1d(3, dtype=torch.float64).eval()
    y, dx = step(layer, x, dy, mask)
    scale = (1 + layer.eps) ** -0.5
    torch.testing.assert_close(packed(y, mask), packed(x, mask) * scale)
    torch.testing.assert_close(packed(dx, mask), packed(dy, mask) * scale)
    assert not packed(y, ~mask).any()
    assert not packed(dx, ~mask).any()
    assert layer.weight.grad.isfinite().all()


@anywhere
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_images_keep_dtype_and_layout(dtype, layout, training, where):
    x = torch.randn(3, 4, 5, 6).to(dtype).contiguous(memory_format=layout)
    mask = torch.rand(3, 5, 6) > 0.3
    layer = syncbn.SyncBatchNorm2d(4).train(training)
    with on_device(where):
        y, dx = step(layer, x, torch.ones_like(x), mask)
    assert y.dtype == dx.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    if training:
        oracle.assert_close(packed(y, mask), oracle.batch_norm(*[packed(x, mask)] * 2).y, factor=4)
        assert layer.num_batches_tracked == 1


def test_rows_of_features_have_a_mask_of_rows():
    x = torch.randn(6, 3, dtype=torch.float64)
    mask = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    y = syncbn.sync_batch_norm(x, None, None, mask=mask)
    oracle.assert_close(y[mask], oracle.batch_norm(x[mask], x[mask]).y)
    assert not y[~mask].any()


@anywhere
def test_second_derivatives_through_a_mask(where):
    x, _, mask = speech(channels=2)

    def masked(x):
        with on_device(where):
            return syncbn.sync_batch_norm(x, None, None, mask=mask[:2])

    assert torch.autograd.gradgradcheck(masked, x[:2].requires_grad_())


@anywhere
@pytest.mark.parametrize("split", [(3, 2), (2, 0, 3)])
@pytest.mark.parametrize("reproducible", [True, False])
def test_second_derivatives_over_ranks(ranks, split, reproducible, where):
    """Of a loss over the gradient's norm; a rank's padding has no part in it."""
    (x, *_), (_, dy, mask) = speech(padding=1e9), speech(padding=3.0)

    def run(rank, split):
        mine = share_of(split, rank)
        layer = syncbn.SyncBatchNorm(3, dtype=torch.float64, reproducible=reproducible)
        share = x[mine].clone().requires_grad_()
        with on_device(where):
            y = layer(share, mask[mine]).tanh()
        (dx,) = torch.autograd.grad((y * dy[mine]).sum(), share, create_graph=True)
        dx.square().sum().backward()
        return dx.detach(), share.grad, layer.weight.grad

    dx, dxx, dweight = run(0, (5,))
    assert not packed(dxx, ~mask).any()
    values = packed(x, mask).requires_grad_()
    y = nn.functional.batch_norm(values, None, None, training=True).tanh()
    (first,) = torch.autograd.grad((y * packed(dy, mask)).sum(), values, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), values)
    torch.testing.assert_close(packed(dx, mask), first.detach())
    torch.testing.assert_close(packed(dxx, mask), second)
    results = [
        torch.cat(part) for part in list(zip(*ranks(len(split), run, split), strict=True))[:2]
    ]
    torch.testing.assert_close(results, [dx, dxx])
    total = sum(weight for *_, weight in ranks(len(split), run, split))
    torch.testing.assert_close(total, dweight)


class Masked(nn.Module):
    """A block whose forward passes the mask on; ``reentrant`` checkpoints it."""

    def __init__(self, reentrant=None):
        super().__init__()
        torch.manual_seed(5)
        self.conv, self.norm = nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4)
        self.reentrant = reentrant
        self.double()

    def block(self, x, mask):
        return self.norm(self.conv(x), mask).tanh()

    def forward(self, x, mask):
        if self.reentrant is None:
            return self.block(x, mask)
        return checkpoint(self.block, x, mask, use_reentrant=self.reentrant)


@anywhere
@pytest.mark.parametrize("reentrant", [None, True, False])
def test_training_under_ddp_equals_one_process(ranks, reentrant, where):
    """Checkpointed or not; one rank's share is two sequences, the other's three."""
    (x, *_), (_, dy, mask) = speech(padding=1e9), speech(padding=3.0)
    dy = dy[:, :1]

    def train(model, mine, ranks):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            y = model(x[mine].clone().requires_grad_(), mask[mine])
            (ranks * (y * dy[mine]).sum()).backward()
            optimizer.step()
        return model.state_dict()

    def run(rank):
        model = syncbn.convert(Masked(reentrant))
        ddp = DistributedDataParallel(model, static_graph=reentrant is True)
        with on_device(where):
            train(ddp, slice(0, 2) if rank == 0 else slice(2, 5), 2)
        return model.state_dict()

    alone = train(syncbn.convert(Masked()), slice(None), 1)
    for state in ranks(2, run):
        torch.testing.assert_close(state, alone, rtol=1e-9, atol=1e-12)
        assert state["norm.num_batches_tracked"] == 3


@pytest.mark.parametrize("padding", [0.0, 1e30, float("nan")])
def test_nothing_that_waits_for_a_device(padding):
    """Neither the values that count nor their number come to the host."""
    x, dy, mask = speech(padding=padding, size=9)
    layer = syncbn.SyncBatchNorm1d(3, dtype=torch.float64)
    with on_device("device"), Others() as others:
        y, dx = step(layer, x, dy, mask)
    assert not {"index", "nonzero", "item", "_local_scalar_dense", "masked_select"} & {
        *others.found
    }
    check([(y, dx)], x, dy, mask)


def test_a_single_value_that_counts_is_refused_on_devices_too():
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[0, 0] = True
    with on_device("device"), pytest.raises(RuntimeError, match="got 1 on all ranks together"):
        syncbn.SyncBatchNorm(3)(speech(dtype=torch.float32)[0], mask)


def test_convert_leaves_models_without_masks_alone():
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.BatchNorm1d(4), nn.ReLU(), nn.BatchNorm1d(4))
    plain, x = copy.deepcopy(model), torch.randn(5, 3, 7)
    syncbn.convert(model)
    for training in (True, False):
        torch.testing.assert_close(model.train(training)(x), plain.train(training)(x))
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


def test_lazy_layers_take_a_mask():
    x, _, mask = speech()
    layer = syncbn.LazySyncBatchNorm1d(dtype=torch.float64)
    torch.testing.assert_close(layer(x, mask), syncbn.SyncBatchNorm(3).double()(x, mask))
    assert type(layer) is syncbn.SyncBatchNorm1d


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        (torch.ones(5, 7), TypeError, "torch.bool tensor.*got torch.float32; compare"),
        ([[True]], TypeError, "got list"),
        (torch.ones(5, 1, 7).bool(), ValueError, r"shape \(5, 7\).*got \(5, 1, 7\)"),
        (torch.ones(5, 8).bool(), ValueError, r"shape \(5, 7\).*got \(5, 8\)"),
        (torch.ones(5, 7, device="meta").bool(), ValueError, "device cpu, got meta"),
    ],
)
def test_masks_that_do_not_fit(mask, error, text):
    with pytest.raises(error, match=text):
        syncbn.SyncBatchNorm(3)(speech(dtype=torch.float32)[0], mask)


def test_masks_from_lengths():
    assert mask_from_lengths(torch.tensor([0, 2])).tolist() == [[False, False], [True, True]]
    assert mask_from_lengths(torch.tensor([1]), 3).tolist() == [[True, False, False]]
    assert mask_from_lengths(torch.tensor([], dtype=torch.int64)).shape == (0, 0)
    with pytest.raises(ValueError, match="from 0 to size = 2, got 1 to 3"):
        mask_from_lengths(torch.tensor([1, 3]), 2)
    with pytest.raises(ValueError, match="got -1 to 3"):
        mask_from_lengths(torch.tensor([-1, 3]))
    with pytest.raises(ValueError, match=r"shape \(N,\), got \(1, 1\)"):
        mask_from_lengths(torch.tensor([[1]]))
    for lengths in (torch.tensor([1.0]), torch.tensor([True]), torch.tensor([1j])):
        with pytest.raises(TypeError, match=rf"integer tensor, got {lengths.dtype}"):
            mask_from_lengths(lengths)
