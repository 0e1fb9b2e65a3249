"""Monitor's advice: what it says of a layer, what convert makes of it, what exchanges cost."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.diagnose.monitor.advice import Situation, advise
from syncbn.diagnose.monitor.exchanging import ExchangeTime


@pytest.mark.parametrize(
    ("ranks", "effective_size", "action", "group", "words"),
    [
        (
            4,
            32.0,
            "leave local",
            1,
            r"^leave local: .* worth 32 independent values, and 32 are en",
        ),
        (4, 31.0, "synchronise", 2, r"^synchronise over groups of 2 ranks, which is enough: .* 62"),
        (4, 8.0, "synchronise", 4, r"^synchronise over all 4 ranks: .* 4 ranks' together 32"),
        (
            4,
            1.0,
            "synchronise",
            4,
            r"^synchronise over all 4 ranks: .* \(its mean is about 1.00",
        ),
        (6, 12.0, "synchronise", 3, r"groups of 3 ranks.* 3 ranks' together 36"),
        (3, 17.0, "synchronise", 3, r"^synchronise over all 3 ranks"),
        (
            2,
            1.5,
            "freeze",
            1,
            r"^freeze: even all 2 ranks' batches .* 3.0 independent",
        ),
        (1, 100.0, "leave local", 1, r"^leave local: one rank's batch is worth 100 indep"),
        (1, 5.0, "synchronise", 1, r"more ranks than this one: .* 7 ranks with such batches would"),
        (4, math.nan, "leave local", 1, r"^leave local: it got no values in training"),
    ],
)
def test_what_is_advised(ranks, effective_size, action, group, words):
    advice = advise(Situation(ranks=ranks, effective_size=effective_size, cost=2.1e-4, step=4.3e-3))
    assert (advice.action, advice.group_size) == (action, group)
    assert bool(advice) is (action == "synchronise")
    assert re.search(words, str(advice)), str(advice)
    priced = ranks > 1 and action != "freeze" and effective_size > 0
    assert ("about 210 µs per step of 4.3 ms" in str(advice)) is priced
    assert advice.noise == pytest.approx(effective_size**-0.5, nan_ok=True)


def test_the_cost_of_a_layer():
    assert ExchangeTime(1e-4, 1e-8).of_layer(1000) == pytest.approx(2 * (1e-4 + 2e-5))
    text = str(advise(Situation(ranks=2, effective_size=3.0, cost=1.5, step=math.nan)))
    assert text.endswith("; costs about 1.5 s per step")


class Network(nn.Module):
    """One layer has values in plenty on each rank, one has few."""

    def __init__(self):
        super().__init__()
        self.early, self.late = nn.BatchNorm2d(8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.late(self.early(x).mean((2, 3)))


def test_local_layers_are_watched_and_those_that_need_it_converted(ranks):
    def run(rank):
        model = DistributedDataParallel(Network())
        monitor = syncbn.Monitor(model, every=2)
        torch.manual_seed(rank)
        for _ in range(6):
            model(torch.randn(4, 8, 16, 16)).square().sum().backward()
        advice = monitor.advice()
        assert list(advice) == ["module.early", "module.late"]
        assert advice["module.late"].cost > 0
        assert re.search(r"costs about .* per step of .*s$", str(advice["module.late"]))
        monitor.close()
        again = syncbn.convert(Network(), where=monitor.where)
        syncbn.convert(model, where=monitor.where)
        kinds = [type(layer).__name__ for layer in (model.module.early, model.module.late)]
        assert kinds == [type(layer).__name__ for layer in (again.early, again.late)]
        model(torch.randn(4, 8, 16, 16)).sum().backward()
        return [(each.action, each.group_size) for each in advice.values()], kinds

    advice = [("leave local", 1), ("synchronise", 2)]
    assert ranks(2, run) == [(advice, ["BatchNorm2d", "SyncBatchNorm1d"])] * 2


def test_synchronised_layers_are_watched(ranks):
    def run(rank):
        model = syncbn.convert(Network())
        torch.manual_seed(rank)
        with syncbn.Monitor(model) as monitor:
            model(torch.randn(4, 8, 16, 16))
        assert monitor.where("late", model.late)
        return str(monitor.table())

    first, second = ranks(2, run)
    assert first == second
    assert first.startswith("2 ranks, 1 step observed, every 10\nlayer  channels  ")


def test_one_process_says_so():
    model = Network()
    monitor = syncbn.Monitor(model)
    model(torch.randn(4, 8, 16, 16))
    assert str(monitor.table()).startswith(
        "1 rank, 1 step observed, every 10; one rank is not distant from itself\n"
    )
    early, late = monitor.advice().values()
    assert not early
    assert late
    assert "8 ranks with such batches would do, or a batch 8 times as large" in str(late)


def test_advice_follows_what_is_observed():
    model = nn.Sequential(nn.BatchNorm1d(64))
    monitor = syncbn.Monitor(model, every=1)
    model(torch.randn(8, 64))
    before = monitor.advice()["0"]
    model(torch.randn(64, 64))
    assert monitor.advice()["0"].noise < before.noise
    monitor.advice().clear()
    assert monitor.advice()


def test_a_layer_of_another_model_is_refused():
    model = Network()
    monitor = syncbn.Monitor(model)
    model(torch.randn(4, 8, 2, 2))
    with pytest.raises(ValueError, match=r"Monitor.where: expected a layer of the model .* 'last'"):
        monitor.where("last", nn.BatchNorm1d(8))
    assert monitor.where("module._orig_mod.late", nn.BatchNorm1d(8))
