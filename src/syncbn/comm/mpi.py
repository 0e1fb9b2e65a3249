"""Ranks that are processes of an MPI job, by mpi4py. torch.distributed has no part in it."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import check_timeout
from .framed import Framed
from .graphs import take_name
from .waiting import SLICE, Notes, limit_of

if TYPE_CHECKING:
    from mpi4py import MPI as Engine


_NOTE = 10_000  # bytes of a note, at most


class MPI(Framed):
    """The ranks of an MPI communicator, for jobs that ``mpiexec`` starts.

    All ranks of ``comm`` construct it together. It works on a clone of ``comm`` (``Dup``), so that
    its messages never meet the caller's.

    - **Devices.** Messages travel through CPU memory; tensors elsewhere are copied there and back.
    - **Waiting** sleeps after 50 µs, where MPI itself would spin: more ranks than cores will do.
      It ends after ``timeout``, with an error and the communicator's end: a rank that finishes
      early, with fewer batches than the others, waits for them in MPI_Finalize.
    - **Threads.** One thread at a time may call. Backward runs in the thread that calls it on the
      CPU, and in a thread of autograd's own on a GPU, which takes a thread level of at least
      SERIALIZED. mpi4py asks for MULTIPLE unless ``mpi4py.rc.thread_level`` says otherwise.
    - **Lifetime.** MPI frees the clone when the process ends. To free it earlier, call
      ``comm.Free()`` of this object's ``comm`` on all ranks; no layer can use it afterwards.
    - **Failure.** MPI's launcher ends the job when a process dies. An exception is not death: its
      process waits for the others in MPI_Finalize, and they for it. Start Python with
      ``-m mpi4py``, and it ends the job too. Errors of MPI itself raise ``mpi4py.MPI.Exception``.

    Args:
        comm: an intracommunicator of mpi4py, for example one from ``Split``; None is COMM_WORLD.
        timeout: seconds > 0 that a collective waits for the other ranks.

    Raises:
        ImportError: mpi4py is not installed, or finds no MPI library.
        TypeError: ``comm`` is no intracommunicator; ``timeout`` no number.
        ValueError: ``comm`` is null: ``Split`` left this rank out, or it was freed; another
            ``timeout``.
        RuntimeError: MPI is not initialised or already finalised; in collectives, a call from a
            thread that MPI's thread level excludes, other ranks that are late by ``timeout``, and
            calls that differ, named on every rank alike.

    Source: https://mpi4py.readthedocs.io, https://www.mpi-forum.org/docs/

    Example, for ``mpiexec -n 2 python -m mpi4py train.py``::

        layer = syncbn.SyncBatchNorm(3, process_group=syncbn.comm.MPI())
    """

    # Up to so many ranks all_reduce gathers: one round instead of a tree up and down.
    direct_exchange_max_size = 8

    def __init__(self, comm: Engine.Intracomm | None = None, *, timeout: float = 300.0) -> None:
        check_timeout("MPI", timeout)
        engine = _engine()
        self.comm = _checked(engine, comm).Dup()
        self.timeout = timeout
        self._engine = engine
        self._types = {torch.float32: engine.FLOAT, torch.float64: engine.DOUBLE}
        self._main_thread_only = engine.Query_thread() < engine.THREAD_SERIALIZED
        self._rank, self._size = self.comm.rank, self.comm.size
        take_name(self)
        self._in_flight: tuple[Any, ...] = ()

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def _send(self, tensor: Tensor, operation: str) -> Tensor:
        byte = self._engine.BYTE  # which has no opinion on bfloat16
        gathered = tensor.new_empty(self.size, *tensor.shape)
        self._in_flight = (tensor, gathered)
        self._wait(
            operation,
            self.comm.Iallgather([self._memory(tensor), byte], [self._memory(gathered), byte]),
        )
        return gathered

    def _reduce(self, tensor: Tensor, operation: str) -> Tensor:
        """Not by Allreduce, whose sums may differ in their last bits among ranks."""
        total = tensor.detach().cpu().contiguous().clone()
        if total.dtype not in self._types:
            return self._send(total, operation).sum(0).to(tensor.device)
        here = [self._memory(total), self._types[total.dtype]]
        self._in_flight = (total,)
        if self.rank == 0:
            self._wait(operation, self.comm.Ireduce(self._engine.IN_PLACE, here))
        else:
            self._wait(operation, self.comm.Ireduce(here, None))
        self._in_flight = (total,)
        self._wait(operation, self.comm.Ibcast(here))
        return total.to(tensor.device)

    def _memory(self, tensor: Tensor) -> Any:
        return self._engine.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)

    def _wait(self, operation: str, request: Engine.Request) -> None:
        """Until the request is done. Interrupted, its memory stays with us: MPI may yet write."""
        began, frames = time.perf_counter(), self._frames
        look = min(SLICE, limit_of(self.timeout))
        while not request.Test():
            waited = time.perf_counter() - began
            if waited >= look:
                frames.look(operation, waited, self.timeout)
                look = min(waited + SLICE, limit_of(self.timeout))
            if waited > 50e-6:
                time.sleep(20e-6)
        self._in_flight = ()

    def _notes(self) -> Notes:
        return _Messages(self.comm)

    def _members(self) -> tuple[str, list[int]]:
        world = self._engine.COMM_WORLD.group
        return "", list(self.comm.group.Translate_ranks(None, world))

    def give_up(self, error: BaseException) -> None:
        if self._may_call():
            super().give_up(error)

    def _may_call(self) -> bool:
        return not self._main_thread_only or bool(self._engine.Is_thread_main())

    def _check(self, operation: str, tensor: Tensor) -> None:
        if not self._may_call():
            raise RuntimeError(
                f"MPI: rank {self.rank} expected a call from the thread that initialised MPI, as "
                "its thread level is below SERIALIZED, got one from another thread; set "
                "mpi4py.rc.thread_level = 'multiple' before the first import of mpi4py.MPI"
            )


class _Messages:
    """Notes that each rank sends to all others, beside the collectives."""

    def __init__(self, comm: Engine.Intracomm) -> None:
        self._comm, self._received = comm, dict[int, str]()
        self._sent: list[Any] = []  # their memory is MPI's until they have arrived

    def leave(self, rank: int, note: str) -> None:
        content = note.encode()
        others = [other for other in range(self._comm.size) if other != rank]
        self.read(others)  # nothing is left for MPI to keep
        self._sent = [(sent, request) for sent, request in self._sent if not request.Test()]
        self._sent += [(content, self._comm.Isend(content, other)) for other in others]

    def read(self, ranks: Iterable[int]) -> dict[int, str]:
        for rank in ranks:
            while self._comm.Iprobe(rank):
                content = bytearray(_NOTE)
                self._comm.Recv(content, rank)
                self._received[rank] = content.rstrip(b"\0").decode(errors="replace")
        return self._received


def _engine() -> Any:
    try:
        from mpi4py import MPI as engine
    except ModuleNotFoundError as error:
        raise ImportError("MPI: needs mpi4py; run pip install 'syncbn[mpi]'") from error
    except (ImportError, RuntimeError) as error:
        raise ImportError(
            f"MPI: mpi4py found no MPI library ({error}); install one, for example with pip "
            "install mpich, or load your cluster's module"
        ) from error
    return engine


def _checked(engine: Any, comm: Any) -> Engine.Intracomm:
    if not engine.Is_initialized() or engine.Is_finalized():
        state = "was finalised" if engine.Is_initialized() else "is not initialised"
        raise RuntimeError(
            f"MPI: expected a running MPI, but it {state}; call mpi4py.MPI.Init() before and "
            "mpi4py.MPI.Finalize() after all use"
        )
    if comm is None:
        comm = engine.COMM_WORLD
    if not isinstance(comm, engine.Comm) or isinstance(comm, engine.Intercomm):
        raise TypeError(
            f"MPI: expected an intracommunicator of mpi4py or None, got {type(comm).__name__}; "
            "pass mpi4py.MPI.COMM_WORLD, what its Split() returns, or an intercommunicator's "
            "Merge()"
        )
    if comm == engine.COMM_NULL:
        raise ValueError(
            f"MPI: rank {engine.COMM_WORLD.rank} of COMM_WORLD got COMM_NULL, as from a Split() "
            "that leaves it out, or a communicator that was freed; construct MPI(comm) only on "
            "the ranks that take part"
        )
    return comm  # type: ignore[no-any-return]
