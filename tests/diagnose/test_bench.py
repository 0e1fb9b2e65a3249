"""syncbn bench: its layers compute the same; its figures, its sentence, the layers it finds."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import syncbn
from support import oracle
from syncbn.diagnose.bench import finding, measure, report
from syncbn.diagnose.bench.figures import balance_of, row_of, total_of
from syncbn.diagnose.bench.measure import ALONE, EXCHANGE, LOCAL_PEER, NAIVE, SYNCBN
from syncbn.diagnose.bench.naive import NaiveSyncBatchNorm
from syncbn.diagnose.bench.options import Case, Options
from syncbn.diagnose.bench.report import Report
from syncbn.diagnose.bench.timing import in_turns, summary
from syncbn.diagnose.check.options import Unusable

CPU = torch.device("cpu")
SHAPES = ((6, 4), (6, 4, 5), (6, 4, 5, 2), (6, 4, 2, 3, 2))


@pytest.mark.parametrize("size", [1, 2])
def test_the_naive_layer_is_right(ranks: Any, size: int) -> None:
    def run(rank: int, shape: tuple[int, ...]) -> tuple[Tensor, ...]:
        x, dy = data(shape)
        layer = NaiveSyncBatchNorm(shape[1]).double()
        mine = x.chunk(size)[rank].requires_grad_()
        y = layer(mine)
        y.backward(dy.chunk(size)[rank])
        return y.detach(), mine.grad, layer.running_mean

    for shape in SHAPES:
        x, dy = data(shape)
        expected = oracle.batch_norm(x, dy)
        found = ranks(size, run, shape)
        ys, dxs, means = zip(*found, strict=True)
        oracle.assert_close(torch.cat(ys), expected.y, factor=10)
        oracle.assert_close(torch.cat(dxs), expected.dx, factor=10)
        oracle.assert_close(means[-1], 0.1 * expected.mean, factor=10)


def data(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    numbers = torch.randn(2, *shape, generator=generator, dtype=torch.float64)
    return numbers[0] + 3, numbers[1]


@pytest.mark.parametrize(
    ("shape", "dtype", "layout"),
    [
        ((6, 4), "float32", "contiguous"),
        ((2, 4, 5), "float64", "contiguous"),
        ((2, 4, 5, 3), "bfloat16", "channels_last"),
        ((2, 4, 5, 3), "float16", "contiguous"),
        ((2, 4, 3, 2, 3), "float32", "channels_last_3d"),
    ],
)
def test_the_layers_compared_compute_the_same(
    shape: tuple[int, ...], dtype: str, layout: str
) -> None:
    case = Case(shape, dtype, layout)
    layers = measure.layers_of(case, CPU, ranks=2)
    assert list(layers) == [SYNCBN, ALONE, LOCAL_PEER, NAIVE]
    x = torch.randn(shape, dtype=getattr(torch, dtype))
    outputs = [layer(x) for layer in layers.values()]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=2e-2, atol=1e-2)


def test_every_rank_times_every_layer(ranks: Any) -> None:
    def run(rank: int) -> dict[str, list[tuple[float, ...]]]:
        return in_turns(measure.steps_of(Case((2, 3, 4)), CPU, ranks=2), rounds=2)

    for times in ranks(2, run):
        assert set(times) == {SYNCBN, ALONE, LOCAL_PEER, NAIVE, EXCHANGE}
        assert all(len(rounds) == 2 for rounds in times.values())
        assert all(len(parts) == 2 for rounds in times.values() for parts in rounds)


def test_turns_alternate_and_the_first_do_not_count() -> None:
    said: list[str] = []
    steps = {name: (lambda name=name: said.append(name),) for name in "ab"}
    times = in_turns(steps, 2, on_round=lambda: said.append("|"))
    assert "".join(said) == "ab|ba|ab|ba|"
    assert [len(rounds) for rounds in times.values()] == [2, 2]


def test_a_gpu_is_timed_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("record")

        def synchronize(self) -> None:
            said.append("wait")

        def elapsed_time(self, end: Event) -> float:
            return 1500.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: said.append("wait for all"))
    times = in_turns({"a": (lambda: said.append("run"),)}, 2, torch.device("cuda"))
    assert times == {"a": [(1.5,), (1.5,)]}
    assert said == ["wait for all", "record", "run", "record", "wait"] * 4


TIMES = {  # of (forward, backward), in seconds, in two rounds
    SYNCBN: [(0.001, 0.003), (0.001, 0.003)],
    ALONE: [(0.0005, 0.0005), (0.0005, 0.0005)],
    EXCHANGE: [(0.001, 0.001), (0.001, 0.001)],
    LOCAL_PEER: [(0.001, 0.001), (0.001, 0.001)],
    NAIVE: [(0.004, 0.006), (0.004, 0.006)],
}


def reported(times: dict[str, Any] = TIMES, calls: int = 1, **options: Any) -> Report:
    cases = [Case((2, 3, 4, 5), layers=tuple(f"bn{n}" for n in range(calls)))]
    total = total_of(cases, [times])
    model = {"model": "shop:net", "input": (3,)} if calls > 1 else {}
    return Report(
        options=Options(**model, **options),
        rows=tuple(map(row_of, cases, [times])),
        total=total,
        balance=balance_of(total),
        notes=(),
        environment={
            **{"versions": {"syncbn": "1"}, "machine": "m", "device": "d", "cores": 2},
            **{"threads": 1, "kernels": "k", "communicator": "shared memory"},
        },
        seconds=1.0,
    )


def test_the_sentence_has_this_runs_figures() -> None:
    assert report.sentence(reported()) == (
        "The exchange dominates, by its messages: forward and backward of one layer take "
        "4.00 ms, 25 % of it arithmetic, 50 % the messages and 25 % waiting for other ranks; that "
        "is 2.00 times the time of torch.nn.BatchNorm (which synchronises nothing) and 0.40 times "
        "the time of the naive synchronised layer."
    )


def test_times_of_a_model_are_of_all_its_calls() -> None:
    found = reported(calls=3)
    assert "all 3 batch norms take 12.0 ms" in report.sentence(found)
    assert found.total[SYNCBN]["forward"].median_ms == pytest.approx(3)
    assert found.rows[0].times[SYNCBN]["forward"].median_ms == pytest.approx(1)


@pytest.mark.parametrize(
    ("alone", "exchange", "shares", "words"),
    [
        (1.8, 0.1, (0.9, 0.05, 0.05), "Arithmetic dominates: "),
        (2.5, 0.1, (1, 0, 0), "Arithmetic dominates: "),  # slower than with its group, by chance
        (0.2, 1.6, (0.1, 0.8, 0.1), "The exchange dominates, by its messages: "),
        (0.2, 0.4, (0.1, 0.2, 0.7), "The exchange dominates, by waiting: "),
        (0.62, 0.9, (0.31, 0.45, 0.24), "The exchange dominates, by its messages: "),
        (0.92, 0.2, (0.46, 0.1, 0.44), "The exchange dominates, by waiting: "),
        (1.02, 0.98, (0.51, 0.49, 0), "Arithmetic dominates: "),
        (1.0, 5.0, (0.5, 0.5, 0), "Neither arithmetic nor exchange dominates: "),
        (1.0, 0.2, (0.5, 0.1, 0.4), "Neither arithmetic nor exchange dominates: "),
    ],
)
def test_what_dominates(
    alone: float, exchange: float, shares: tuple[float, ...], words: str
) -> None:
    """Of 2 ms."""
    halves = {SYNCBN: 1e-3, ALONE: alone / 2e3, EXCHANGE: exchange / 2e3}
    found = reported(TIMES | {kind: [(half, half)] * 2 for kind, half in halves.items()})
    assert found.balance is not None
    assert dataclasses.astuple(found.balance) == pytest.approx(shares)
    assert report.sentence(found).startswith(words)
    by = "messages" if "messages" in words else "waiting" if "waiting" in words else None
    name = "nothing" if words.startswith("Neither") else "arithmetic"
    said = json.loads(report.as_json(found, picture=None))["balance"]
    assert (said["dominates"], said["by"]) == ("exchange" if by else name, by)


def test_the_fastest_layer_comes_first() -> None:
    pytest.importorskip("rich", reason="needs rich")
    one = reported()  # torch's 2 ms, ours 4, the naive 10
    assert one.ranking == (LOCAL_PEER, SYNCBN, NAIVE)
    assert json.loads(report.as_json(one, picture=None))["ranking"] == list(one.ranking)
    by_input, together = report.tables(dataclasses.replace(one, rows=one.rows * 2))
    layers = ["torch.nn.BatchNorm", "syncbn", "  its arithmetic", "  its messages", "naive layer"]
    assert list(together.columns[0].cells) == layers
    assert [column.header.split("\n") for column in by_input.columns[1:]] == [
        *(["BatchNorm", "(×)"], ["syncbn", "(ms)"], ["arithmetic", "(ms)"]),
        *(["messages", "(ms)"], ["naive", "(×)"]),
    ]
    cells = [next(iter(column.cells)) for column in by_input.columns[1:]]
    assert cells == ["0.50", "4.00 ±0", "1.00", "2.00", "2.50"]


def test_one_rank_exchanges_nothing() -> None:
    times = {kind: TIMES[kind] for kind in (SYNCBN, LOCAL_PEER, NAIVE)}
    found = reported(times, ranks=1)
    assert found.balance is None
    assert report.sentence(found).startswith("One rank exchanges nothing, all is arithmetic: ")
    assert json.loads(report.as_json(found, picture=None))["balance"] is None


def test_ratios_are_of_one_round_each() -> None:
    ours, theirs = [0.001, 0.002, 0.004], [0.002, 0.004, 0.008]
    assert summary(theirs, ours)[2] == 2
    times = {SYNCBN: [(each, each) for each in ours], NAIVE: [(each, each) for each in theirs]}
    assert row_of(Case((2, 3)), times).times[NAIVE]["both"].over_syncbn == 2


def test_pictures_of_many_inputs_show_the_slowest(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib", reason="needs matplotlib")
    from syncbn.diagnose.bench import picture

    one = reported()
    (row,) = one.rows
    many = [dataclasses.replace(row, case=Case((2, n, 4, 5), layers=("a",) * n)) for n in range(20)]
    found = dataclasses.replace(one, rows=tuple(many))
    assert [each.case.shape[1] for each in picture._chosen(found)] == list(range(8, 20))
    picture.draw(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000


def network() -> nn.Module:
    block = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.BatchNorm2d(3), nn.Flatten())
    frozen = nn.BatchNorm2d(3)
    syncbn.freeze(frozen)
    return nn.Sequential(block, nn.Sequential(frozen, block[0]), pooled)


def network_without() -> nn.Module:
    return nn.Linear(3, 3)


def network_frozen() -> nn.Module:
    model = nn.Sequential(nn.BatchNorm2d(3))
    syncbn.freeze(model)
    return model


def options(factory: Any, **others: Any) -> Options:
    return Options(model=factory, input=(3, 8, 8), **others)


def test_the_layers_of_a_model_are_found() -> None:
    found = finding.found(options(network, batch_per_rank=2, dtype="float64"))
    pooled = Case((2, 3, 1, 1), "float64", layers=("2.1",))
    assert found.cases == (Case((2, 3, 8, 8), "float64", layers=("0.0", "0.0")), pooled)
    assert found.notes == ()
    torch.set_default_dtype(torch.float32)


def test_what_one_sample_cannot_time_is_left_out() -> None:
    found = finding.found(options(network, batch_per_rank=1, channels_last=True))
    assert [(case.shape, case.layout) for case in found.cases] == [((1, 3, 8, 8), "channels_last")]
    assert found.notes == (
        "left out: 2.1, with one value per channel on each rank, which torch.nn.BatchNorm refuses",
    )


@pytest.mark.parametrize(
    ("factory", "text"),
    [
        (network_without, "expected a model with batch norms, got none in .*:network_without"),
        (network_frozen, "that a forward in training mode calls, got none of the 1 in"),
    ],
)
def test_models_without_work_are_refused(factory: Any, text: str) -> None:
    with pytest.raises(Unusable, match=text):
        finding.found(options(factory))


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(Unusable) as error:
        Options(device="cuda", ranks=3)
    assert str(error.value) == (
        "bench: expected at most 2 ranks on cuda, a GPU for each, got 3; take --ranks 2, or "
        "--device cpu"
    )
