"""What syncbn bench says: a table, a sentence, or JSON."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

from ..check.options import spoken
from .figures import PASSES, Balance, Kinds, Row, Timing, ranking
from .measure import ALONE, EXCHANGE, LOCAL_PEER, NAIVE, SYNC_PEER, SYNCBN
from .options import Case, Options

LABELS = {
    SYNCBN: "syncbn",
    ALONE: "  its arithmetic",
    EXCHANGE: "  its messages",
    LOCAL_PEER: "torch.nn.BatchNorm",
    SYNC_PEER: "torch.nn.SyncBatchNorm",
    NAIVE: "naive layer",
}
_PARTS = (ALONE, EXCHANGE)  # of ours
_SHORT = {LOCAL_PEER: "BatchNorm", SYNC_PEER: "SyncBN", NAIVE: "naive"}
_DOMINATES = {  # by what dominates, and by which of its parts
    ("arithmetic", None): "Arithmetic dominates",
    ("exchange", "messages"): "The exchange dominates, by its messages",
    ("exchange", "waiting"): "The exchange dominates, by waiting",
    ("nothing", None): "Neither arithmetic nor exchange dominates",
}
_LONGEST = 18  # letters of a layer's name in the table
PEERS = {
    LOCAL_PEER: "torch.nn.BatchNorm (which synchronises nothing)",
    SYNC_PEER: "torch.nn.SyncBatchNorm",
    NAIVE: "the naive synchronised layer",
}


@dataclass(frozen=True)
class Report:
    """Rows in the order of the shapes or of the forward; total: of all calls of a step."""

    options: Options
    rows: tuple[Row, ...]
    total: Kinds
    balance: Balance | None
    notes: tuple[str, ...]
    environment: dict[str, Any]
    seconds: float

    @property
    def calls(self) -> int:
        """How many layers' steps the total is of."""
        return sum(row.case.calls for row in self.rows)

    @property
    def ranking(self) -> tuple[str, ...]:
        """The layers by their time in the total, the fastest first."""
        return ranking(self.total)


def milliseconds(value: float) -> str:
    """Three digits, down to a microsecond.

    Example:
        >>> milliseconds(0.01234), milliseconds(1.234), milliseconds(12.34), milliseconds(123.4)
        ('0.012', '1.23', '12.3', '123')
    """
    return f"{value:.{3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0}f}"


def sized(case: Case) -> str:
    """The shape, in one word."""
    return "×".join(map(str, case.shape))


def title(report: Report) -> str:
    """What was measured, for titles."""
    options = report.options
    ranks = f"{options.ranks} rank{'s' * (options.ranks > 1)}"
    what = "One layer" if options.model is None else f"Batch norms of {spoken(options.model)}"
    return f"{what} in training, {ranks} on {options.device}"


def described(report: Report) -> str:
    """Where the figures are from, in one line."""
    found = report.environment
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    threads = f"{found['threads']} thread{'s' * (found['threads'] > 1)} per rank"
    layout = ", channels last" * report.options.channels_last
    parts = [
        f"{report.options.dtype}{layout}",
        f"{found['machine']} {found['device']}, {found['cores']} cores, {threads}",
        f"kernels: {found['kernels']}",
        f"exchange: {found['communicator']}",
        versions,
        f"{report.options.rounds} rounds",
    ]
    return "; ".join(parts)


def tables(report: Report) -> list[Any]:
    """Of each input, where there are several, and of all together. Rich's, 80 columns wide."""
    return [*([_by_input(report)] if len(report.rows) > 1 else []), _together(report)]


def _by_input(report: Report) -> Any:
    out = _table(f"{title(report)}: each input")
    out.add_column("input per rank", no_wrap=True)
    kinds = _ranked(report)
    for kind in kinds:
        heading = f"{_SHORT[kind]}\n(×)" if kind in _SHORT else f"{LABELS[kind].strip()}\n(ms)"
        out.add_column(heading.removeprefix("its "), justify="right", no_wrap=True)
    for row in report.rows:
        figures = (_figure(kind, row.times[kind]["both"]) for kind in kinds)
        out.add_row(_named(row.case, report.options), *figures)
    return out


def _ranked(report: Report) -> list[str]:
    """What the tables show: the fastest layer first, our parts behind our layer."""
    parts = [kind for kind in _PARTS if kind in report.total]
    shown = ((kind, *parts) if kind == SYNCBN else (kind,) for kind in report.ranking)
    return [kind for kinds in shown for kind in kinds]


def _figure(kind: str, timing: Timing) -> str:
    if kind == SYNCBN:
        return _spread(timing)
    return milliseconds(timing.median_ms) if kind in _PARTS else f"{timing.over_syncbn:.2f}"


def _named(case: Case, options: Options) -> str:
    """The shape, what else is not as it was asked for, and below that the layers."""
    others = [case.dtype] * (case.dtype != options.dtype)
    others += [case.layout] * ((case.layout != "contiguous") != options.channels_last)
    shape = " ".join([sized(case), *others])
    if not case.layers:
        return shape
    name, *more = case.layers
    if more:
        return f"{shape}\n  {len(case.layers)} layers"
    return f"{shape}\n  {name if len(name) <= _LONGEST else f'…{name[1 - _LONGEST :]}'}"


def _together(report: Report) -> Any:
    (first, *others) = report.rows
    what = f"all {report.calls} together" if report.calls > 1 else sized(first.case)
    out = _table(what.capitalize() if others else f"{title(report)}: {what}")
    out.caption = f"Median ± half the interquartile distance. {described(report)}."
    out.add_column("layer")
    for heading in (*(f"{name} (ms)" for name in PASSES), "× syncbn"):
        out.add_column(heading, justify="right", no_wrap=True)
    for kind in _ranked(report):
        times = report.total[kind]
        figures = (_spread(times[name]) for name in PASSES)
        out.add_row(LABELS[kind], *figures, f"{times['both'].over_syncbn:.2f}")
    return out


def _table(title: str) -> Any:
    from rich import box
    from rich.table import Table

    return Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False)


def _spread(timing: Timing) -> str:
    spread = timing.spread_ms
    return f"{milliseconds(timing.median_ms)} ±{spread:{'.2g' if spread < 99.5 else '.0f'}}"


def sentence(report: Report) -> str:
    """The finding, in one sentence of this run's figures."""
    ours = report.total[SYNCBN]["both"].median_ms
    what = "forward and backward of one layer"
    if report.options.model is not None:
        what = f"forward and backward of all {report.calls} batch norms"
    elif report.calls > 1:
        what = f"forward and backward of {report.calls} layers, one of each shape,"
    takes = f"{what} take {milliseconds(ours)} ms"
    peers = [
        f"{1 / report.total[kind]['both'].over_syncbn:.2f} times the time of {name}"
        for kind, name in PEERS.items()
        if kind in report.total
    ]
    return f"{_dominating(report, takes)}; that is {_listed(peers)}."


def _dominating(report: Report, takes: str) -> str:
    balance = report.balance
    if balance is None:
        return f"One rank exchanges nothing, all is arithmetic: {takes}"
    first = _DOMINATES[balance.dominates, balance.by]
    shares = [round(100 * share) for share in (balance.arithmetic, balance.messages)]
    return (
        f"{first}: {takes}, {shares[0]} % of it arithmetic, {shares[1]} % the messages and "
        f"{100 - sum(shares)} % waiting for other ranks"
    )


def _listed(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def as_json(report: Report, *, picture: str | None) -> str:
    """One JSON object with everything that was measured."""
    options = asdict(report.options)
    for name in ("model", "data"):
        options[name] = None if options[name] is None else spoken(options[name])
    rows = [
        {**asdict(row.case), "calls": row.case.calls, "times": _plain(row.times)}
        for row in report.rows
    ]
    content = {
        "options": options,
        "environment": report.environment,
        "rows": rows,
        "total": {"calls": report.calls, "times": _plain(report.total)},
        "ranking": report.ranking,
        "balance": _balance(report.balance),
        "sentence": sentence(report),
        "notes": report.notes,
        "picture": picture,
        "seconds": report.seconds,
    }
    return json.dumps(content, indent=2, allow_nan=False)


def _balance(found: Balance | None) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"dominates": found.dominates, "by": found.by, **asdict(found)}


def _plain(times: Kinds) -> dict[str, Any]:
    return {
        kind: {name: asdict(timing) for name, timing in passes.items()}
        for kind, passes in times.items()
    }
