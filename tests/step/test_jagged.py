"""Jagged nested tensors equal their values, of all samples of all ranks together."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nested import nested_tensor_from_jagged as jagged

import syncbn
from support import oracle
from support.layers import Silent

LENGTHS = (3, 0, 2, 6, 1)  # of all ranks' samples
STARTS = (0, 3, 3, 5, 11, 12)


def points():
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(sum(LENGTHS), 3, generator=generator).double() + 5 for _ in range(2))
    return x, dy


def transposed(values, offsets):
    """What torch builds most easily: (N, ragged, C) transposed."""
    return jagged(values, offsets).transpose(1, 2)


def as_lying(values, offsets):
    """Channels outermost in memory."""
    return jagged(values.t().contiguous(), offsets, jagged_dim=2)


def offsets_of(lengths):
    return torch.tensor([0, *torch.tensor(lengths, dtype=torch.int64).cumsum(0)])


def step(layer, make, x, dy, lengths):
    x = x.clone().requires_grad_()
    nested = make(x, offsets_of(lengths))
    y = layer(nested)
    assert y.offsets() is nested.offsets()
    assert y.values().stride() == nested.values().stride()
    assert (y + nested).shape == nested.shape  # torch sees the same ragged dimension
    y.values().t().backward(dy)
    return y.values().t().detach(), x.grad


forms = pytest.mark.parametrize("make", [transposed, as_lying])


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize(
    ("samples", "make"), [((5,), transposed), ((5,), as_lying), ((1, 0, 4), as_lying)]
)
def test_a_step_equals_the_values(ranks, samples, reproducible, make):
    x, dy = points()

    def run(rank):
        first = sum(samples[:rank])
        mine = slice(first, first + samples[rank])
        own = slice(STARTS[mine.start], STARTS[mine.stop])
        layer = syncbn.SyncBatchNorm1d(3, dtype=torch.float64, reproducible=reproducible)
        return step(layer, make, x[own], dy[own], LENGTHS[mine]), layer.state_dict()

    results = ranks(len(samples), run) if len(samples) > 1 else [run(0)]
    y, dx = (torch.cat(each) for each in zip(*(result for result, _ in results), strict=True))
    expected = oracle.batch_norm(x, dy)
    oracle.assert_close(y, expected.y)
    oracle.assert_close(dx, expected.dx, factor=4)
    for _, state in results:
        oracle.assert_close(state["running_mean"], 0.1 * expected.mean)
        oracle.assert_close(state["running_var"], 0.9 + 0.1 * expected.unbiased_var)
        assert state["num_batches_tracked"] == 1


def test_reproducible_samples_are_the_nested_tensors(ranks):
    x, dy = points()
    x, dy = x.float(), dy.float()

    def run(rank, samples):
        first = sum(samples[:rank])
        own = slice(STARTS[first], STARTS[first + samples[rank]])
        layer = syncbn.SyncBatchNorm(3, reproducible=True)
        lengths = LENGTHS[first : first + samples[rank]]
        return step(layer, transposed, x[own], dy[own], lengths), layer.running_var

    (y, dx), var = run(0, (5,))
    for samples in (2, 3), (0, 5):
        parts, variances = zip(*ranks(2, run, samples), strict=True)
        assert torch.equal(torch.cat([part[0] for part in parts]), y)
        assert torch.equal(torch.cat([part[1] for part in parts]), dx)
        assert all(torch.equal(each, var) for each in variances)


@forms
def test_the_ragged_dimension_may_be_followed_by_others(make):
    x, dy = torch.randn(12, 3, 4, dtype=torch.float64), torch.randn(12, 3, 4, dtype=torch.float64)
    values = x.movedim(1, 0) if make is transposed else x.movedim(1, 0).contiguous()
    layer = syncbn.SyncBatchNorm2d(3, dtype=torch.float64)
    y = layer(jagged(values, offsets_of(LENGTHS), jagged_dim=2))
    assert y.shape[:2] == (5, 3)
    oracle.assert_close(y.values().movedim(0, 1).detach(), oracle.batch_norm(x, dy).y)
    last = jagged(x.movedim(0, -1), offsets_of(LENGTHS), jagged_dim=3)  # (N, C, 4, ragged)
    y = layer(last)
    oracle.assert_close(y.values().movedim(-1, 0).detach(), oracle.batch_norm(x, dy).y)


@pytest.mark.parametrize("options", [{}, {"affine": False, "track_running_stats": False}])
@pytest.mark.parametrize("training", [True, False])
def test_every_kind_of_layer(options, training):
    x = torch.randn(12, 3)
    nested = transposed(x, offsets_of(LENGTHS))
    expected = torch.nn.BatchNorm1d(3, **options).train(training)(x)
    for layer in syncbn.SyncBatchNorm1d(3, **options), syncbn.LazySyncBatchNorm1d(**options):
        with torch.no_grad():
            y = layer.train(training)(nested)
        torch.testing.assert_close(y.values().t(), expected.detach())
    mean, var = torch.zeros(3), torch.ones(3)
    y = syncbn.sync_batch_norm(nested, mean, var, training=False)
    torch.testing.assert_close(y.values().t(), x, atol=1e-4, rtol=1e-4)


def test_autocast_and_what_the_nested_tensor_knows_of_its_lengths():
    nested = jagged(
        torch.randn(12, 3, dtype=torch.bfloat16),
        offsets_of(LENGTHS),
        min_seqlen=0,
        max_seqlen=6,
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = syncbn.SyncBatchNorm(3)(nested.transpose(1, 2))
    assert y.dtype == torch.bfloat16
    assert (y._maybe_min_seqlen, y._maybe_max_seqlen) == (0, 6)


@pytest.mark.filterwarnings("ignore:NestedTensor does not implement")
@pytest.mark.parametrize("training", [True, False])
def test_in_one_graph(training):
    x = torch.randn(12, 3, requires_grad=True)
    layer = syncbn.SyncBatchNorm1d(3).train(training)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    dy = torch.randn(12, 3)
    nested = transposed(x, offsets_of(LENGTHS))
    y = compiled(nested)
    assert (y + nested).shape == nested.shape
    y.values().t().backward(dy)
    other = x.detach().clone().requires_grad_()
    expected = torch.nn.BatchNorm1d(3).train(training)(other)
    expected.backward(dy)
    torch.testing.assert_close(y.values().t(), expected)
    torch.testing.assert_close(x.grad, other.grad)


def test_no_samples():
    nested = transposed(torch.empty(0, 3), torch.tensor([0]))
    assert syncbn.SyncBatchNorm1d(3)(nested).values().shape == (3, 0)


REFUSED = {
    "ragged channels": (
        lambda x: jagged(x, offsets_of(LENGTHS)),
        ValueError,
        r"of shape \(5, ragged, 3\); channels are dimension 1: input\.transpose\(1, 2\)",
    ),
    "holes": (
        lambda x: jagged(x, offsets_of(LENGTHS), torch.tensor([1, 0, 1, 1, 1])).transpose(1, 2),
        ValueError,
        r"without holes as input, got one that has lengths .*; input\.contiguous\(\)",
    ),
    "values of nobody": (
        lambda x: jagged(x, offsets_of(LENGTHS[:4])).transpose(1, 2),
        ValueError,
        r"offsets from 0 to 11 for 12 values; cut the others off",
    ),
    "strided": (
        lambda x: torch.nested.nested_tensor([x.t(), x[:4].t()]),
        TypeError,
        r"got a nested one; lay it out .*layout=torch\.jagged.* or pad it",
    ),
    "sparse": (
        lambda x: x[None].to_sparse(2),
        TypeError,
        r"got a sparse_coo one; give its values \(V, C\), input\.coalesce\(\)\.values\(\)",
    ),
    "dimensions": (
        lambda x: jagged(x[:, :, None], offsets_of(LENGTHS)).transpose(1, 2),
        ValueError,
        r"SyncBatchNorm1d: expected 2D or 3D input \(got 4D",
    ),
    "dtype": (lambda x: transposed(x.int(), offsets_of(LENGTHS)), TypeError, "got torch.int32"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested")
@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_before_any_message(case):
    make, error, text = REFUSED[case]
    layer = syncbn.SyncBatchNorm1d(3, process_group=Silent())
    with pytest.raises(error, match=text):
        layer(make(torch.randn(12, 3)))
    assert layer.num_batches_tracked == 0


def test_a_mask_is_refused():
    nested = transposed(torch.randn(12, 3), offsets_of(LENGTHS))
    with pytest.raises(ValueError, match=r"mask=None beside a nested .*\(5, 6\); for a mask pad"):
        syncbn.SyncBatchNorm(3)(nested, torch.ones(5, 6, dtype=torch.bool))


def test_other_ranks_are_told(ranks):
    def run(rank):
        layer = syncbn.SyncBatchNorm(3, process_group=dist.new_group())  # which ends
        x = torch.randn(12, 3)
        nested = jagged(x, offsets_of(LENGTHS))
        with pytest.raises((ValueError, RuntimeError)) as caught:
            layer(nested if rank == 0 else nested.transpose(1, 2))
        return str(caught.value)

    refused, told = ranks(2, run)
    assert "channels are dimension 1" in refused
    assert "channels are dimension 1" in told


def test_coalesced_values_of_a_sparse_tensor():
    sparse = torch.eye(3)[:, :, None].expand(3, 3, 4).to_sparse(2)
    assert syncbn.SyncBatchNorm1d(4)(sparse.coalesce().values()).shape == (3, 4)


class Ragged(nn.Module):
    """Of a batch of values (V, C) it makes a nested tensor."""

    def __init__(self):
        super().__init__()
        self.norm = syncbn.SyncBatchNorm1d(3)

    def forward(self, x):
        half = len(x) // 2
        return self.norm(transposed(x, torch.tensor([0, half, len(x)]))).values()


def test_recalibrate_and_monitor_take_the_values():
    model, batches = Ragged(), [torch.randn(9, 3), torch.randn(4, 3)]
    monitor = syncbn.Monitor(model)
    for x in batches:
        model(x)
    figures = syncbn.Monitor(packed := nn.Sequential(syncbn.SyncBatchNorm1d(3)))
    for x in batches:
        packed(x)
    assert str(monitor.table()).replace("norm", "0   ") == str(figures.table())
    syncbn.recalibrate(model, batches)
    whole = torch.cat(batches)
    torch.testing.assert_close(model.norm.running_mean, whole.mean(0))
    torch.testing.assert_close(model.norm.running_var, whole.var(0))
