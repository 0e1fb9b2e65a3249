"""Loaders of different lengths: every rank takes part in every step until the last one is done."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any, Generic, TypeVar

import torch
import torch.nn as nn

from ..comm import Communicator, device_of, numbers_of_all, resolve
from .empty import name_failing_layer, samples_in, without_samples
from .transfer import packed, unpacked

BatchT = TypeVar("BatchT")

# What a rank says before each step.
_DONE, _READY, _FAILED = 0, 1, 2


def until_all_done(
    loader: Iterable[BatchT],
    process_group: Any = None,
    *,
    model: nn.Module | None = None,
    empty: Callable[[BatchT], BatchT] | None = None,
    count: Callable[[BatchT], int] | None = None,
) -> Steps[BatchT]:
    """The batches of ``loader``, then batches without samples until every rank's loader is done.

    Ranks whose data runs out early stay in step: a batch with N = 0 passes through the model,
    takes part in every collective of DistributedDataParallel and of the synchronised layers, and
    weighs nothing in statistics and gradients. No sample is dropped or repeated. A rank without a
    single batch learns from another rank what one looks like, if it is tensors, numbers, strings
    and None in lists, tuples, named tuples and dicts, ordered and default ones among them: what
    travels is data, and nothing that another rank sends is executed.

    Before each step the ranks exchange three numbers: one small all_gather in ``process_group``.

    DistributedDataParallel and FSDP average gradients over ranks. For the mean over all samples
    of a step, sum over this rank's samples (a mean over none is nan) and multiply by
    ``steps.scale``, the number of ranks divided by the samples of all of them.

    Args:
        loader: iterable of batches: tensors (N, *) alone or in tuples, lists, mappings and
            dataclasses.
        process_group: as for :class:`SyncBatchNorm`; the ranks that train together.
        model: if given, a layer of it that cannot take an empty batch is named in the error.
        empty: makes a batch without samples of a batch, for other kinds of batches. With ``count``.
        count: how many samples a batch has. With ``empty``.

    Returns:
        An iterable of batches, anew in each epoch. In the loop its attributes ``samples`` (all
        ranks' samples in this step) and ``scale`` are this step's. Its ``len()`` is for progress
        bars: this rank's ``len(loader)``, or the steps of the last whole epoch where those were
        more. It asks no other rank, so that one rank alone may show a bar, and until the end of
        the first epoch ranks may have different ones: for schedules of the learning rate, which
        ranks must share, take the largest of all ranks'.

    Raises:
        Exception: whatever ``loader`` raises, in its rank; then, in the same step, RuntimeError on
            the other ranks, which names that rank.
        TypeError, ValueError: batches of another kind without ``empty`` and ``count``; wrong
            arguments; on every rank, an empty batch that a rank without any needs and that cannot
            travel.
        EmptyBatchError: a RuntimeError, see ``model``.

    ``len()`` of a loader that has none is its TypeError.

    Every rank must leave the loop at the same step: a rank that breaks out of it, or raises in its
    body, leaves the others waiting until it ends or the process group's timeout.

    Example:
        >>> steps = syncbn.until_all_done([torch.ones(2, 3), torch.ones(1, 3)])
        >>> [(len(batch), steps.samples, steps.scale) for batch in steps]
        [(2, 2, 0.5), (1, 1, 1.0)]
    """
    if not isinstance(loader, Iterable):
        raise TypeError(
            f"until_all_done: expected an iterable of batches, got {type(loader).__name__}"
        )
    if model is not None and not isinstance(model, nn.Module):
        raise TypeError(
            f"until_all_done: expected model to be a torch.nn.Module, got {type(model).__name__}"
        )
    if (empty is None) != (count is None):
        raise ValueError(
            "until_all_done: expected empty and count both or neither, got only "
            f"{'count' if empty is None else 'empty'}; empty makes a batch without samples of a "
            "batch, count says how many a batch has"
        )
    resolve(process_group)
    return Steps(loader, process_group, model, empty or without_samples, count or samples_in)


class Steps(Generic[BatchT]):
    """What :func:`until_all_done` returns.

    ``samples``: the samples of all ranks in this step. ``scale``: ranks / samples, 0 without any.
    """

    samples = 0
    scale = 0.0

    def __init__(
        self,
        loader: Iterable[BatchT],
        process_group: Any,
        model: nn.Module | None,
        empty: Callable[[BatchT], BatchT],
        count: Callable[[BatchT], int],
    ) -> None:
        self._loader, self._process_group, self._model = loader, process_group, model
        self._empty, self._count = empty, count
        self._template: list[BatchT] = []  # one batch without samples, once there is one
        self._steps = 0  # of the last whole epoch, the same on all ranks

    def __len__(self) -> int:
        try:
            length = len(self._loader)  # type: ignore[arg-type]
        except TypeError:
            raise
        except Exception as error:  # list() and progress bars take a TypeError for "unknown"
            raise TypeError(f"until_all_done: len(loader) raised {error!r}") from error
        return max(length, self._steps)

    def __bool__(self) -> bool:
        return True  # a rank without batches of its own takes part

    def __iter__(self) -> Iterator[BatchT]:
        comm = resolve(self._process_group)
        own, watched = self._own(), False
        with ExitStack() as stack:
            for step in itertools.count():
                state, content, samples = next(own)
                said = numbers_of_all(comm, (state, samples, bool(self._template)))
                if state == _FAILED:
                    raise content
                _check_failures(comm, said, step)
                if not any(row[0] == _READY for row in said):
                    self._steps = step
                    return
                self.samples = int(sum(row[1] for row in said))
                self.scale = comm.size / self.samples if self.samples else 0.0
                if not all(row[2] for row in said):
                    self._agree_on_template(comm, [row[2] for row in said])
                if not samples and self._model is not None and not watched:
                    stack.enter_context(name_failing_layer(self._model))
                    watched = True
                yield content if state == _READY else self._template[0]

    def _own(self) -> Iterator[tuple[int, Any, int]]:
        """This rank's (state, batch or error, samples), one a step, for ever."""
        try:
            for batch in self._loader:
                samples = self._count(batch)
                if not self._template:
                    self._template.append(self._empty(batch))
                yield _READY, batch, samples
        except Exception as error:
            yield _FAILED, error, 0
        while True:
            yield _DONE, None, 0

    def _agree_on_template(self, comm: Communicator, have: list[float]) -> None:
        """Send the template of the first rank that has one to all ranks."""
        source, content, problem = have.index(1), b"", ""
        if comm.rank == source:
            try:
                content = packed(self._template[0])
            except Exception as error:  # the others wait: they are told
                problem = str(error)
        received = _broadcast(comm, content or problem.encode(), source, bool(problem))
        if isinstance(received, str):
            raise TypeError(_CANNOT_TRAVEL.format(source=source, problem=received))
        if not self._template:
            try:
                self._template.append(unpacked(received))
            except ValueError as error:
                problem = str(error)
        refused = [
            rank for rank, (bad,) in enumerate(numbers_of_all(comm, (bool(problem),))) if bad
        ]
        if refused:
            raise TypeError(
                _CANNOT_TRAVEL.format(
                    source=source, problem=problem or f"rank {refused[0]} cannot read it"
                )
            )


_CANNOT_TRAVEL = (
    "until_all_done: expected a batch without samples of rank {source}, which ranks without any "
    "batch need, as tensors, numbers, strings and None in lists, tuples, named tuples and dicts, "
    "got one that cannot travel without running code: {problem}; let empty= return such a batch, "
    "or give every rank at least one batch of its own"
)


def _broadcast(comm: Communicator, content: bytes, source: int, is_text: bool) -> bytes | str:
    """``content`` of rank ``source``, and whether it is text."""
    length, text = numbers_of_all(comm, (len(content), is_text))[source]
    padded = torch.zeros(int(length), dtype=torch.float64)
    padded[: len(content)] = torch.tensor(list(content), dtype=torch.float64)
    received = bytes(comm.all_reduce(padded.to(device_of(comm))).byte().tolist())
    return received.decode(errors="replace") if text else received


def _check_failures(comm: Communicator, said: list[list[float]], step: int) -> None:
    failed = [rank for rank, row in enumerate(said) if row[0] == _FAILED]
    if failed:
        raise RuntimeError(
            f"until_all_done: the loader of rank {failed[0]} raised an error in step {step}, so "
            f"that rank {comm.rank} ends too; the cause is in rank {failed[0]}'s traceback"
        )
