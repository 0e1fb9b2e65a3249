"""The files of a step: how far the ranks are from one process, for every call of every module."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .differences import difference, joined_difference, largest, noise
from .options import Task
from .train import PERTURBED, RANKS, REFERENCE, RESEEDED

OUTPUT, LOSS, STATISTICS = "output", "loss", "statistics"
OUTPUT_GRADIENT, WEIGHT_GRADIENT, WEIGHT = "output_gradient", "weight_gradient", "weight"
QUANTITIES = (OUTPUT, OUTPUT_GRADIENT, WEIGHT_GRADIENT, WEIGHT, STATISTICS, LOSS)
EQUAL, ROUNDING, DIFFERENT, CALLS = "equal", "rounding", "different", "calls differ"
THE_LOSS = "(loss)"
_FLOOR = 1e-4  # of a quantity's largest magnitude in the model: below it values are rounding
_ROUNDINGS = 100.0  # how much larger than a perturbation's trace rounding may be
_NOISE = 1e3  # a value that is less than so many perturbations has no digit
Key = tuple[str, int]  # a call: the module's name, and which call of it in this step


@dataclass(frozen=True)
class Finding:
    """One comparison: relative differences to one process, and what they are.

    input: the same verdict of what the call was given. random: another seed changes the output, not
    the input. half: this call returns half precision.
    """

    step: int
    layer: str
    quantity: str
    relative: float
    verdict: str
    call: int = 0
    input: str = EQUAL
    random: bool = False
    half: bool = False
    parents: tuple[Key, ...] = ()
    rank: int | None = None


class Step:
    """One step of all runs."""

    def __init__(self, task: Task, folder: Path, step: int) -> None:
        self.task, self.step = task, step

        def load(name: str) -> dict[str, Any]:
            content: dict[str, Any] = torch.load(
                folder / f"{name}-step-{step}.pt", weights_only=True
            )
            return content

        self.reference, self.perturbed = load(REFERENCE), load(PERTURBED)
        self.reseeded = load(RESEEDED)
        self.ranks = [load(f"{RANKS}-{rank}") for rank in range(task.ranks)]
        self._by_key = [
            {_key(event): event for event in run["events"]}
            for run in (self.reference, self.perturbed, self.reseeded, *self.ranks)
        ]
        events = self.reference["events"]
        self._largest = {
            "inputs": largest(t for event in events for t in event["inputs"]),
            "outputs": largest(t for event in events for t in event["outputs"]),
            "gradients": largest(t for event in events for t in event["gradients"]),
            **{
                name: largest(self.reference[name].values())
                for name in ("weight_gradients", "weights", "statistics")
            },
        }

    def findings(self) -> Iterator[Finding]:
        """In the order in which one process would notice them."""
        yield from self._outputs()
        yield from self._of_parameters(STATISTICS, "statistics", backward=False)
        yield self._loss()
        yield from self._output_gradients()
        yield from self._of_parameters(WEIGHT_GRADIENT, "weight_gradients", backward=True)
        yield from self._of_parameters(WEIGHT, "weights", backward=True)

    def counts(self) -> list[Counter[str]]:
        """How often each module was called: in one process, then on each rank."""
        return [
            Counter(event["name"] for event in run["events"])
            for run in (self.reference, *self.ranks)
        ]

    def not_finite(self) -> list[str]:
        """Modules that return nan or infinity in one process, in forward order."""
        return [
            event["name"]
            for event in self.reference["events"]
            if not all(bool(tensor.isfinite().all()) for tensor in event["outputs"])
        ]

    def losses(self) -> tuple[float, list[float]]:
        """Of one process, and of each rank's samples by themselves."""
        return float(self.reference["loss"]), [float(run["loss"]) for run in self.ranks]

    def _outputs(self) -> Iterator[Finding]:
        alone, *ranks = self.counts()
        for event in self.reference["events"]:
            name, call = key = _key(event)
            parents = tuple((name, call) for name, call in event["parents"])
            about: dict[str, Any] = {"call": call, "parents": parents, "half": event["half"]}
            others = [rank for rank, count in enumerate(ranks) if count[name] != alone[name]]
            # Where their ways part: after the last call that all have made.
            fewest = min(alone[name], *(count[name] for count in ranks))
            if others and call == max(0, fewest - 1):
                yield self._finding(name, CALLS, 0.0, CALLS, rank=others[0], **about)
            parts = [by_key[key] for by_key in self._by_key[3:] if key in by_key]
            if len(parts) == len(ranks):
                yield self._output(event, key, parts, about)
        for name in {name for count in ranks for name in count} - alone.keys():
            rank = next(rank for rank, count in enumerate(ranks) if count[name])
            yield self._finding(name, CALLS, 0.0, CALLS, rank=rank)

    def _output(
        self, event: dict[str, Any], key: Key, parts: list[Any], about: dict[str, Any]
    ) -> Finding:
        found = {what: self._judged(event, key, parts, what) for what in ("inputs", "outputs")}
        relative, verdict = found["outputs"]
        again = self._by_key[2].get(key)
        random = again is not None and (
            self._far(event, again, "outputs") and not self._far(event, again, "inputs")
        )
        about |= {"input": found["inputs"][1], "random": random}
        return self._finding(key[0], OUTPUT, relative, verdict, **about)

    def _far(self, event: dict[str, Any], again: dict[str, Any], what: str) -> bool:
        return any(
            difference(a, b) > self.task.tolerance * max(largest([a]), 1e-300)
            for a, b in zip(event[what], again[what], strict=False)
        )

    def _judged(
        self, event: dict[str, Any], key: Key, parts: list[Any], what: str
    ) -> tuple[float, str]:
        scale = len(parts) if what == "gradients" else 1
        worst, verdicts = 0.0, {EQUAL}
        moved = self._by_key[1].get(key)
        for place, wanted in enumerate(event[what]):
            given = [part[what][place] for part in parts if place < len(part[what])]
            given = [each / scale for each in given if each is not None]
            if wanted is None or len(given) < len(parts):
                continue
            apart = joined_difference(wanted, given, self.task.batch, gradients=what == "gradients")
            moves = noise(wanted, moved, what, place)
            if apart is None:
                continue
            relative, verdict = self._verdict(apart, wanted, moves, self._largest[what])
            worst, verdicts = max(worst, relative), verdicts | {verdict}
        return worst, _worst(verdicts)

    def _verdict(
        self, apart: float, wanted: Tensor, moves: float, magnitude: float
    ) -> tuple[float, str]:
        """The relative difference, and what it is.

        moves: how far one rounding of the input and the weights moves the value. magnitude: the
        largest of this quantity in the model.
        """
        own = largest([wanted])
        scale = max(own, magnitude * (1 if own <= _NOISE * moves else _FLOOR)) or 1.0
        relative = apart / scale
        if relative <= self.task.tolerance:
            return relative, EQUAL
        return relative, ROUNDING if apart <= _ROUNDINGS * moves else DIFFERENT

    def _loss(self) -> Finding:
        shares = torch.tensor(self.task.shares, dtype=torch.float64) / self.task.batch
        losses = torch.stack([run["loss"].double() for run in self.ranks])
        wanted = self.reference["loss"].double()
        moves = difference(wanted, self.perturbed["loss"].double())
        apart = difference(wanted, (shares * losses).sum())
        # A projection may cancel, to less than what it adds up.
        outputs = [
            t for event in self.reference["events"] if not event["name"] for t in event["outputs"]
        ]
        relative, verdict = self._verdict(apart, wanted, moves, largest([*outputs, *losses]))
        return self._finding(THE_LOSS, LOSS, relative, verdict)

    def _output_gradients(self) -> Iterator[Finding]:
        events = [event for event in self.reference["events"] if event["gradient_order"] >= 0]
        for event in sorted(events, key=lambda event: event["gradient_order"]):
            key = _key(event)
            parts = [by_key[key] for by_key in self._by_key[3:] if key in by_key]
            if len(parts) < len(self.ranks):
                continue
            relative, verdict = self._judged(event, key, parts, "gradients")
            parents = tuple((name, call) for name, call in event["parents"])
            yield self._finding(
                key[0], OUTPUT_GRADIENT, relative, verdict, call=key[1], parents=parents
            )

    def _of_parameters(self, quantity: str, what: str, *, backward: bool) -> Iterator[Finding]:
        order = {event["name"]: n for n, event in enumerate(self.reference["events"])}
        names = sorted(self.reference[what], key=lambda name: order.get(_owner(name), -1))
        for name in reversed(names) if backward else names:
            wanted = self.reference[what][name]
            given = [run[what].get(name) for run in self.ranks]
            if wanted is None:
                continue
            apart = max(
                difference(wanted, torch.zeros_like(wanted) if each is None else each)
                for each in given
            )
            moved = self.perturbed[what].get(name)
            moves = 0.0 if moved is None else difference(wanted, moved)
            relative, verdict = self._verdict(apart, wanted, moves, self._largest[what])
            yield self._finding(_owner(name), quantity, relative, verdict)

    def _finding(
        self, layer: str, quantity: str, relative: float, verdict: str, **more: Any
    ) -> Finding:
        return Finding(self.step, layer, quantity, relative, verdict, **more)


def _key(event: dict[str, Any]) -> Key:
    return event["name"], event["call"]


def _owner(name: str) -> str:
    return name.rpartition(".")[0]


def _worst(verdicts: set[str]) -> str:
    return next(each for each in (DIFFERENT, ROUNDING, EQUAL) if each in verdicts)
