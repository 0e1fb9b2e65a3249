"""sync_buffers(): ranks' running statistics agree, weighted by what each has seen."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import syncbn
from support import oracle
from support.cases import CLOSE

TRACKED = ("running_mean", "running_var", "num_batches_tracked")


def layers(**options) -> nn.Module:
    plain, ours = nn.BatchNorm1d(3, **options), syncbn.SyncBatchNorm2d(2, skip_nonfinite=True)
    ours.process_group = syncbn.comm.base.Local()  # statistics of its own batches
    return nn.Sequential(plain, ours).double()


def fill(model: nn.Module, rank: int, batches: int) -> nn.Module:
    generator = torch.Generator().manual_seed(rank)
    for layer in model:
        layer.running_mean.normal_(generator=generator)
        layer.running_var.uniform_(0.5, 2, generator=generator)
        layer.num_batches_tracked.fill_(batches)
    return model


def pooled(models: list[nn.Module], weights: list[float]) -> list[dict[str, torch.Tensor]]:
    """By the formula, as it is written."""
    w = torch.tensor(weights, dtype=torch.float64).unsqueeze(1)
    found = []
    for parts in zip(*models, strict=True):
        m = torch.stack([layer.running_mean for layer in parts])
        v = torch.stack([layer.running_var for layer in parts])
        mean = (w * m).sum(0) / w.sum()
        var = (w * (v + (m - mean) ** 2)).sum(0) / w.sum()
        found.append({"running_mean": mean, "running_var": var})
    return found


@pytest.mark.parametrize("counts", [[3, 3], [1, 7], [5, 0], [0, 0], [4, 1, 2]])
def test_every_rank_has_the_pooled_statistics(ranks, counts):
    def run(rank):
        model = fill(layers(), rank, counts[rank])
        model[1].num_batches_skipped.fill_(rank)
        syncbn.sync_buffers(model)
        return [dict(layer.named_buffers()) for layer in model]

    weights = counts if any(counts) else [1] * len(counts)
    models = [fill(layers(), rank, 0) for rank in range(len(counts))]
    expected = pooled(models, weights)
    results = ranks(len(counts), run)
    for state in results:
        for layer, whole, first in zip(state, expected, results[0], strict=True):
            for name, value in whole.items():
                torch.testing.assert_close(layer[name], value, **CLOSE)
                assert torch.equal(layer[name], first[name])
            assert layer["num_batches_tracked"] == max(counts)
        assert state[1]["num_batches_skipped"] == len(counts) - 1


def test_cumulative_averages_of_equal_batches_pool_to_those_of_all(ranks):
    """The mean is that of all batches; the variance lacks what batches of a rank differ by."""
    data = torch.randn(2, 3, 8, 3, dtype=torch.float64)

    def run(rank):
        model = layers(momentum=None)
        for x in data[rank][: 3 - rank]:
            model[0](x + rank)
        syncbn.sync_buffers(model)
        return model[0].running_mean

    seen = torch.cat((*data[0], *(data[1][:2] + 1)))
    for mean in ranks(2, run):
        oracle.assert_close(mean, seen.mean(0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_what_is_equal_stays_to_the_bit(ranks, dtype):
    def run(rank):
        model = fill(layers(), 7, 5 + rank).to(dtype)
        model[0].running_mean[0] = torch.inf
        model[0].running_var[1] = torch.inf
        syncbn.freeze(model, lambda name, _: name == "1")
        before = [{n: b.clone() for n, b in layer.named_buffers()} for layer in model]
        syncbn.sync_buffers(model)
        for layer, old in zip(model, before, strict=True):
            for name, value in old.items():
                assert torch.equal(layer._buffers[name], value) or "tracked" in name, name
        return model[1].num_batches_tracked

    assert ranks(3, run) == [7, 7, 7]


def test_a_rank_that_has_seen_nothing_does_not_count_whatever_it_holds(ranks):
    def run(rank):
        model = fill(layers(), 0, 3 * (1 - rank))
        if rank == 1:
            model[0].running_mean.fill_(torch.nan)
        syncbn.sync_buffers(model)
        return model[0].running_mean

    expected = fill(layers(), 0, 0)[0].running_mean
    assert all(torch.equal(mean, expected) for mean in ranks(2, run))


def test_layers_without_counters_or_statistics(ranks):
    def run(rank):
        model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
        model[0].num_batches_tracked = None
        model[0].running_mean.fill_(float(rank))
        syncbn.sync_buffers(model)
        return model[0].running_mean.tolist(), model[0].running_var.tolist()

    assert ranks(2, run) == [([0.5, 0.5], [1.25, 1.25])] * 2


class Counting(syncbn.comm.Communicator):
    """Two ranks that hold the same; how many messages there are."""

    rank, size, messages = 0, 2, 0

    def all_gather(self, tensor):
        self.messages += 1
        return torch.stack((tensor, tensor))

    def all_reduce(self, tensor):
        raise AssertionError


@pytest.mark.parametrize(("channels", "messages"), [(64, 2), (200_000, 1 + 4)])
def test_all_layers_travel_in_one_message_or_few(channels, messages):
    """Beside the one that compares the models. A message brings a rank 8 MB at most."""
    comm, model = Counting(), nn.Sequential(*[nn.BatchNorm1d(channels) for _ in range(4)])
    before = [layer.running_mean.normal_().clone() for layer in model]
    syncbn.sync_buffers(model, process_group=comm)
    assert comm.messages == messages
    for layer, mean in zip(model, before, strict=True):
        assert torch.equal(layer.running_mean, mean)


def test_one_process_and_no_layers():
    model = fill(layers(), 0, 1)
    mean = model[0].running_mean.clone()
    syncbn.sync_buffers(model)
    assert torch.equal(model[0].running_mean, mean)
    syncbn.sync_buffers(nn.Linear(2, 2))


def test_models_that_differ_are_refused_on_every_rank(ranks):
    def run(rank):
        model = nn.ModuleDict({f"norm{rank}": nn.BatchNorm1d(2)})
        with pytest.raises(ValueError, match=r"sync_buffers: expected the same .* on all ranks"):
            syncbn.sync_buffers(model)
        syncbn.sync_buffers(layers())  # ranks may go on together
        with pytest.raises(ValueError, match="expected the same"):
            syncbn.sync_buffers(nn.Identity() if rank else nn.BatchNorm1d(2))

    ranks(2, run)


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"sync_buffers: expected a torch.nn.Module, got dict"):
        syncbn.sync_buffers({})
    with pytest.raises(ValueError, match="sync_buffers: expected initialised layers"):
        syncbn.sync_buffers(nn.LazyBatchNorm1d())
