"""Monitor: whether each rank's own statistics would do, and what to do about each layer."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

import torch
import torch.nn as nn

from ...comm import refuse_join, resolve
from . import picture
from .advice import Advice, Situation, advise
from .exchanging import ExchangeTime, check_step, gather, measure_exchange, middle_of
from .figures import Layout, figures_of
from .layers import find_layer, find_layers
from .measuring import message_of
from .observing import Observation, Observer
from .record import Record, effective_size_of
from .tables import Table, table_of

if TYPE_CHECKING:
    from typing_extensions import Self


class Monitor:
    """Watches the batch norms of a model in training: would each rank's own statistics do?

    In the first forward in training, and then in one of ``every``, it measures what each batch
    norm gets on this rank (count, mean and sum of squared deviations per channel, of both halves of
    the batch), and at the end of that forward all ranks exchange this in one message. Outputs,
    gradients, running statistics and random numbers are the same bits as without. Layers may be
    torch's, not yet converted, or syncbn's. All ranks must make a Monitor of the same model at the
    same step, with the same ``every``.

    Figures, free of the input's scale, as root mean squares over channels (m, v: mean and variance
    of all ranks' values; mᵣ, vᵣ: of rank r's; nᵣ: how many it has):

    - ``mean_distance``: |mᵣ − m| / √v, ``var_distance``: |vᵣ/v − 1|, of each rank;
    - ``noise``: standard error of the mean of one rank's batch, in parts of √v. It is
      ``effective_size ** (-1 / 2)``, where nᵣ/deff is how many independent values the batch is
      worth, and deff is the mean square between halves of batches over v, Kish's design effect
      (1965).

    Args:
        model: the outermost module that is called in training: a DistributedDataParallel, or what
            is inside it. Its forwards are the steps. A Monitor lives as long as the model;
            copies and pickles of the model have none.
        every: observe one of so many steps, at least 1.
        process_group: as for :class:`syncbn.SyncBatchNorm`; the ranks to compare. Each receives
            the moments of all of them: 32 bytes times channels times ranks.
        writer: gets the figures of each observed step as scalars: a TensorBoard SummaryWriter, or
            anything with ``add_scalar(tag, value, step)``. Give it on one rank.

    Raises:
        TypeError: ``model`` is no Module, ``every`` no integer, ``writer`` without add_scalar, or a
            wrong ``process_group``.
        ValueError: ``every`` below 1; a model without batch norms, with a lazy one that has seen no
            input, or with all of them inside compiled graphs.
        DesyncError, in a forward: ranks observe different steps.

    Source: Kish, "Survey Sampling", 1965, chapter 5; what is enough: Wu & He 2018,
    https://arxiv.org/abs/1803.08494, table 2.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.BatchNorm2d(4))
        >>> monitor = syncbn.Monitor(model, every=10)
        >>> for _ in range(20):
        ...     y = model(torch.randn(2, 1, 8, 8))
        >>> [(row.layer, row.channels, row.dead, row.skipped) for row in monitor.table()]
        [('1', 4, 0, 0)]
        >>> model = syncbn.convert(model, where=monitor.where)
    """

    def __init__(
        self,
        model: nn.Module,
        every: int = 10,
        *,
        process_group: Any = None,
        writer: Any = None,
    ) -> None:
        _check_arguments(model, every, writer)
        self._process_group, self._every, self._writer = process_group, every, writer
        self._ranks = resolve(process_group).size  # until a step is observed
        self._layers = find_layers(model)
        channels = [layer.channels for layer in self._layers]
        self._layout = Layout(channels, [layer.eps for layer in self._layers])
        self._record = Record()
        self._exchange: ExchangeTime | None = None
        self._advised: tuple[int, dict[str, Advice]] = (0, {})
        self._observer = Observer(model, self._layers, every, self._observe)

    def close(self) -> None:
        """Take the hooks off the model. What was observed stays."""
        self._observer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def table(self) -> Table:
        """A row for each layer, over the last 1000 steps that were observed; ``str()`` shows them.

        Raises RuntimeError before the first observed step.
        """
        self._check_observed("table")
        return table_of(self._record, self._layers, self._ranks, self._every)

    def advice(self) -> dict[str, Advice]:
        """What to do with each layer, by its name in the model (of a shared layer the first).

        Each is true where the layer should be synchronised; ``str()`` says why, over how many
        ranks, and what it would cost per step. One batch should be worth 32 independent values:
        else layers are to be synchronised, over the smallest group of ranks whose batches together
        are. Where all ranks' batches together are not worth 4, freezing is better. Costs are of
        exchanges that this rank timed once, in the first observed step. ``action``, ``group_size``,
        ``noise`` and ``cost`` (seconds) are attributes.

        Raises RuntimeError before the first observed step.
        """
        self._check_observed("advice")
        latest = self._record.steps[-1]
        if self._advised[0] != latest:
            noise, times = self._record.series()["noise"], self._observer.seconds
            exchange = self._exchange or ExchangeTime()
            step = middle_of(times) if times else math.nan
            self._advised = (
                latest,
                {
                    layer.names[0]: advise(
                        Situation(
                            ranks=self._ranks,
                            effective_size=effective_size_of(noise[:, number]),
                            cost=exchange.of_layer(layer.channels),
                            step=step,
                        )
                    )
                    for number, layer in enumerate(self._layers)
                },
            )
        return dict(self._advised[1])

    def where(self, name: str, layer: nn.Module) -> bool:
        """Whether to synchronise a layer: for ``syncbn.convert(model, where=monitor.where)``.

        The layer is one of the model's, or has the name of one, with or without what
        DistributedDataParallel or torch.compile put before it: of a model that was built anew.

        Raises ValueError where it is neither, RuntimeError before the first observed step.
        """
        known = find_layer(self._layers, name, layer)
        return bool(self.advice()[known.names[0]])

    where.may_choose_none = True  # type: ignore[attr-defined]  # so convert does not warn of it

    def plot(self, to: Any) -> None:
        """Draw layers × steps, coloured by how far ranks' means are from that of all.

        Of one rank, which is not distant from itself, by the noise of its mean. Needs matplotlib,
        which comes with the extra ``[plot]``.

        Args:
            to: the path of a picture, of a type that matplotlib knows; or a TensorBoard writer, or
                anything with ``add_figure(tag, figure, step)``.

        Raises:
            TypeError: neither. ValueError: another type of picture. OSError: a path that cannot be
            written. ImportError: without matplotlib. RuntimeError: before the first observed step.
        """
        picture.check_target(to)
        self._check_observed("plot")
        alone, advice = self._ranks == 1, self.advice()
        title = f"How far each rank's own mean is from that of all {self._ranks} ranks"
        figure = picture.draw(
            picture.Map(
                names=[layer.name for layer in self._layers],
                ends=[self._short(advice[layer.names[0]]) for layer in self._layers],
                steps=self._record.steps,
                values=self._record.series()["noise" if alone else "mean_distance"].t().tolist(),
                title="How far a batch's mean is off (one rank)" if alone else title,
                label="standard deviations",
            )
        )
        if isinstance(to, (str, os.PathLike)):
            figure.savefig(to)
        else:
            to.add_figure("syncbn/mean_distance", figure, self._record.steps[-1])

    def _short(self, advice: Advice) -> str:
        """For a picture's edge."""
        size = advice.group_size
        return f"{advice.action}, groups of {size}" if 1 < size < self._ranks else advice.action

    def _check_observed(self, operation: str) -> None:
        if not self._record.steps:
            raise RuntimeError(
                f"Monitor.{operation}: expected an observed step, got {self._observer.steps} "
                "forwards in training; call the model that the Monitor was given, in training mode "
                "and in eager mode: hooks do not run inside what torch.compile compiled"
            )

    @torch.no_grad()
    def _observe(self, observation: Observation) -> None:
        comm, (model, step, calls, device) = resolve(self._process_group), observation
        self._ranks = comm.size
        if comm.size > 1:
            for ddp in (None, model):
                refuse_join("Monitor", "a model that is watched", ddp)
        if self._exchange is None:
            self._exchange = measure_exchange(comm, device)
        check_step(comm, device, step, self._every)
        message = message_of(calls, self._layout.channels, device)
        figures = figures_of(gather(comm, message), self._layout)
        self._record.add(step, figures)
        if self._writer is not None:
            self._write(step)

    def _write(self, step: int) -> None:
        for name, values in self._record.latest().items():
            for layer, value in zip(self._layers, values, strict=True):
                if not math.isnan(value):
                    self._writer.add_scalar(f"syncbn_{name}/{layer.name}", value, step)


def _check_arguments(model: Any, every: Any, writer: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"Monitor: expected a torch.nn.Module, got {type(model).__name__}")
    if isinstance(every, bool) or not isinstance(every, int):
        raise TypeError(
            f"Monitor: expected every as an integer number of steps, got {type(every).__name__}"
        )
    if every < 1:
        raise ValueError(f"Monitor: expected every ≥ 1, got {every}; 1 observes each step")
    if writer is not None and not callable(getattr(writer, "add_scalar", None)):
        raise TypeError(
            "Monitor: expected a writer with add_scalar(tag, value, step), such as TensorBoard's "
            f"SummaryWriter, got {type(writer).__name__}"
        )
