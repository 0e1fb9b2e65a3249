"""Monitor's figures are those of float64 over the whole batch; bad input is refused in words."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import syncbn
from support.in_threads import attempts, in_threads

CHANNELS = 5


def shares(sizes, *, step=0, shape=(4, 3)):
    """Each rank's batch; ranks and channels differ in mean and deviation."""
    generator = torch.Generator().manual_seed(step)
    scale = torch.linspace(0.1, 7, CHANNELS).view(-1, 1, 1)
    return [
        (torch.randn(size, CHANNELS, *shape, generator=generator) + 0.3 * rank) * scale + 50 * scale
        for rank, size in enumerate(sizes)
    ]


def expected(parts):
    """The figures of one step by their formulas, in NumPy and float64, from all values at once."""
    values = [np.asarray(x.double()).swapaxes(0, 1).reshape(CHANNELS, -1) for x in parts]
    halves = [
        np.asarray(half.double()).swapaxes(0, 1).reshape(CHANNELS, -1)
        for x in parts
        for half in (x[: len(x) // 2], x[len(x) // 2 :])
        if half.numel()
    ]
    whole = np.concatenate(values, 1)
    mean, var = whole.mean(1), whole.var(1)
    mean_distances = [
        np.sqrt(np.mean((v.mean(1) - mean) ** 2 / var)) if v.size else math.nan for v in values
    ]
    var_distances = [
        np.sqrt(np.mean((v.var(1) / var - 1) ** 2)) if v.size else math.nan for v in values
    ]
    between = sum(h.shape[1] * (h.mean(1) - mean) ** 2 for h in halves) / (len(halves) - 1)
    effect = np.mean(between / var)
    busy = [x for x in parts if len(x)]
    count, samples = whole.shape[1] / len(busy), sum(map(len, busy)) / len(busy)
    return mean_distances, var_distances, min(max(count / effect, samples), count)


@pytest.mark.parametrize("sizes", [(4, 4), (1, 1, 1), (3, 5, 1), (4, 0, 2), (2, 2, 2, 2)])
def test_figures_equal_float64_over_the_whole_batch(ranks, sizes):
    def run(rank):
        model = nn.Sequential(nn.BatchNorm2d(CHANNELS))
        if 0 in sizes:  # which torch's layer refuses
            syncbn.convert(model, syncbn.comm.LOCAL)
        monitor = syncbn.Monitor(model)
        model(shares(sizes)[rank])
        return monitor.table()

    mean_distances, var_distances, effective_size = expected(shares(sizes))
    mean, var = (np.sqrt(np.nanmean(np.square(each))) for each in (mean_distances, var_distances))
    tables = ranks(len(sizes), run)
    assert all(str(table) == str(tables[0]) for table in tables)
    (row,) = tables[0]
    same = {"rel": 2e-5, "nan_ok": True}  # float32 of mean / deviation 50
    assert row.mean_distances == pytest.approx(mean_distances, **same)
    assert row.var_distances == pytest.approx(var_distances, **same)
    assert row.mean_distance == pytest.approx(mean, **same)
    assert row.var_distance == pytest.approx(var, **same)
    assert row.effective_size == pytest.approx(effective_size, **same)
    assert row.noise == pytest.approx(effective_size**-0.5, **same)
    assert (row.dead, row.nonfinite, row.skipped) == (0, 0, int(0 in sizes))


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x: x * 1e6 + 3e4, id="up"),
        pytest.param(lambda x: x * 1e-2, id="down"),
        pytest.param(lambda x: x.contiguous(memory_format=torch.channels_last), id="layout"),
    ],
)
def test_figures_are_free_of_scale_and_layout(change):
    def run(comm):
        x, rows = shares((4, 6))[comm.rank].double(), []
        for batch in (x, change(x)):
            layer = nn.Sequential(nn.BatchNorm2d(CHANNELS, dtype=torch.float64))
            monitor = syncbn.Monitor(layer, process_group=comm)
            layer(batch)
            rows += monitor.table()
        return rows

    for row, changed in in_threads(2, run):
        assert changed[2:6] == pytest.approx(row[2:6], rel=1e-6)


@pytest.mark.parametrize(
    ("images", "effective_size"),
    [
        pytest.param(lambda n: torch.randn(n, 64, 6, 6), (200, 288), id="independent pixels"),
        pytest.param(lambda n: torch.randn(n, 64, 1, 1).expand(-1, -1, 6, 6), (8, 9), id="flat"),
        pytest.param(
            lambda n: torch.randn(n, 64, 1, 1) + torch.randn(n, 64, 6, 6), (13, 21), id="between"
        ),
    ],
)
def test_what_a_batch_is_worth(images, effective_size):
    """Of 8 images of 36 values: 288, 8, and by Kish's formula 8·2 / (1 + 1/36) = 15.6."""
    layer = nn.Sequential(nn.BatchNorm2d(64))
    monitor = syncbn.Monitor(layer, every=1)
    for _ in range(20):
        layer(images(8))
    low, high = effective_size
    assert low * 0.999 <= monitor.table()[0].effective_size <= high * 1.001


def test_dead_channels_and_values_that_are_not_finite(ranks):
    def run(rank):
        model = nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4))
        monitor = syncbn.Monitor(model, every=1)
        for step in range(3):
            x = torch.randn(3, 4, 2, 2)
            x[:, 1] = 7.0  # dead
            if rank == 1 and step == 1:
                x[0, 2, 0, 0] = math.inf
                x[0, 3, 0, 0] = math.nan
            model(x)
        return monitor.table()

    first, second = ranks(2, run)[0]
    assert (first.dead, first.nonfinite, first.nonfinite_steps) == (1, 2, 1)
    assert (second.dead, second.nonfinite, second.nonfinite_steps) == (1, 2, 1)
    assert math.isfinite(first.mean_distance)
    assert 3 <= first.effective_size <= 12  # of what is left


def test_layers_without_values_are_counted(ranks):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.always, self.never = nn.BatchNorm1d(3), nn.BatchNorm1d(2)
            self.odd, self.frozen = nn.BatchNorm1d(3), nn.BatchNorm1d(3).eval()

        def forward(self, x, odd):
            return self.frozen(self.odd(self.always(x)) if odd else self.always(x))

    def run(rank):
        model = Branches()
        monitor = syncbn.Monitor(model, every=2)
        for step in range(8):
            model(torch.randn(4, 3), odd=rank == 0 or step > 3)
        advice = monitor.advice()
        assert not advice["never"]
        assert str(advice["never"]).startswith("leave local: it got no values in training")
        assert re.search(r"\nnever +2 +– +– +– +– +0 +0 +4\n", str(monitor.table()))
        return {row.layer: row.skipped for row in monitor.table()}

    assert ranks(2, run) == [{"always": 0, "never": 4, "odd": 2, "frozen": 4}] * 2


def test_batches_that_a_layer_skips_are_counted():
    model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(2)), skip_nonfinite=True)
    monitor = syncbn.Monitor(model)
    for value in (1.0, math.inf, math.nan):
        model(torch.tensor([[0.0, 1.0], [2.0, value]]))
    (row,) = monitor.table()
    assert (row.skipped, row.skipped_batches) == (0, 2)


def test_masked_values_do_not_count():
    model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(2)))
    monitor = syncbn.Monitor(model, every=1)
    x, mask = torch.randn(4, 2, 6), syncbn.mask_from_lengths(torch.tensor([6, 3, 4, 5]))
    padded = x.masked_fill(~mask.unsqueeze(1), 1e9)
    with syncbn.masking(model, mask):
        model(padded)
    plain = nn.Sequential(nn.BatchNorm1d(2))
    other = syncbn.Monitor(plain)
    halves = [x[half].movedim(1, -1)[mask[half]] for half in (slice(0, 2), slice(2, 4))]
    plain(torch.cat(halves))
    effective_size = monitor.table()[0].effective_size
    assert 4 <= effective_size <= 18
    between = sum(
        len(half) * (half.mean(0) - torch.cat(halves).mean(0)) ** 2 for half in halves
    ) / torch.cat(halves).var(0, correction=0)
    assert effective_size == pytest.approx(min(max(18 / between.mean().item(), 4), 18), rel=1e-5)
    assert other.table()[0].channels == 2


def test_shared_layers_and_several_calls():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.BatchNorm1d(3)
            self.b = self.a

        def forward(self, x):
            return self.b(self.a(x) * 2)

    model = Twice()
    monitor = syncbn.Monitor(model)
    model(torch.randn(40, 3))
    (row,) = monitor.table()
    assert row.layer == "a"
    assert row.effective_size == pytest.approx(40)  # of one call
    assert monitor.where("b", model.b) is False
    assert list(monitor.advice()) == ["a"]


def test_ranks_that_observe_different_steps_learn_it():
    def run(comm):
        model = nn.Sequential(nn.BatchNorm1d(3))
        syncbn.Monitor(model, every=2 + comm.rank, process_group=comm)
        for _ in range(4):
            model(torch.randn(4, 3))

    for rank, error in enumerate(attempts(2, run)):
        assert isinstance(error, syncbn.DesyncError), error
        assert error.ranks[rank] == f"step 1, every {2 + rank}"
        assert "ranks observe different steps: rank 0: step 1, every 2; rank 1: " in str(error)


def test_a_monitor_on_some_ranks_only_is_out_of_step(ranks):
    def run(rank):
        model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3)))
        if rank == 0:
            syncbn.Monitor(model)
        else:
            model(torch.randn(4, 3))
        with pytest.raises(syncbn.DesyncError) as caught:
            model(torch.randn(4, 3))
        return caught.value.ranks[0]

    said = ranks(2, run)
    assert said[0] == said[1]
    assert "observation of layer 'syncbn.Monitor'" in said[0]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ((3,), TypeError, "Monitor: expected a torch.nn.Module, got int"),
        ((nn.BatchNorm1d(3), 0), ValueError, "expected every ≥ 1, got 0; 1 observes each step"),
        ((nn.BatchNorm1d(3), True), TypeError, "every as an integer number of steps, got bool"),
        ((nn.BatchNorm1d(3), 2.5), TypeError, "every as an integer number of steps, got float"),
        ((nn.Linear(3, 3),), ValueError, "a model with batch norms .* got none in Linear"),
        ((nn.InstanceNorm1d(3),), ValueError, "a model with batch norms .* got none"),
        ((nn.LazyBatchNorm1d(),), ValueError, "know their channels, got LazyBatchNorm1d '', which"),
    ],
)
def test_wrong_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        syncbn.Monitor(*arguments)


def test_wrong_keywords():
    with pytest.raises(TypeError, match=r"a writer with add_scalar\(tag, value, step\).* got int"):
        syncbn.Monitor(nn.BatchNorm1d(3), writer=3)
    with pytest.raises(TypeError, match="process_group: got int"):
        syncbn.Monitor(nn.BatchNorm1d(3), process_group=3)


def test_before_the_first_observed_step():
    model = nn.Sequential(nn.BatchNorm1d(3))
    monitor = syncbn.Monitor(model)
    model.eval()(torch.randn(4, 3))  # which is no training
    for ask in (
        monitor.table,
        monitor.advice,
        lambda: monitor.plot("map.png"),
        lambda: monitor.where("0", model[0]),
    ):
        with pytest.raises(RuntimeError, match=r"Monitor\.\w+: expected an observed step, got 0 f"):
            ask()
