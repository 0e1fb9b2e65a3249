"""Ranks that are processes of an MPI job, by mpi4py. torch.distributed has no part in it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Communicator, check_timeout, described, refused_calls

if TYPE_CHECKING:
    from mpi4py import MPI as Engine

_CALL = 64  # bytes that describe a call


class MPI(Communicator):
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
        self._in_flight: tuple[Any, ...] = ()
        self._ended: str | None = None

    @property
    def rank(self) -> int:
        return self.comm.rank

    @property
    def size(self) -> int:
        return self.comm.size

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._gathered("all_gather", _on_cpu(tensor)).to(tensor.device)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        local = _on_cpu(tensor)
        if self.size <= self.direct_exchange_max_size or tensor.dtype not in self._types:
            total = self._gathered("all_reduce", local).sum(0)
        else:
            total = self._reduced(local.clone())
        return total.to(tensor.device)

    def _gathered(self, operation: str, local: Tensor) -> Tensor:
        self._agree(operation, local)
        byte = self._engine.BYTE  # which has no opinion on bfloat16
        gathered = local.new_empty(self.size, *local.shape)
        self._in_flight = (local, gathered)
        self._wait(
            operation,
            self.comm.Iallgather([self._memory(local), byte], [self._memory(gathered), byte]),
        )
        return gathered

    def _reduced(self, total: Tensor) -> Tensor:
        """Sum in place. Not by Allreduce, whose sums may differ in their last bits among ranks."""
        self._agree("all_reduce", total)
        here = [self._memory(total), self._types[total.dtype]]
        self._in_flight = (total,)
        if self.rank == 0:
            self._wait("all_reduce", self.comm.Ireduce(self._engine.IN_PLACE, here))
        else:
            self._wait("all_reduce", self.comm.Ireduce(here, None))
        self._in_flight = (total,)
        self._wait("all_reduce", self.comm.Ibcast(here))
        return total

    def _agree(self, operation: str, tensor: Tensor) -> None:
        """Refuse calls that differ, on every rank alike: MPI would mix up their bytes.

        A round of its own, as MPI's collectives take messages of one length.
        """
        self._check()
        mine = described(operation, tensor).encode()[:_CALL].ljust(_CALL)
        calls = bytearray(_CALL * self.size)
        self._in_flight = (mine, calls)
        self._wait(operation, self.comm.Iallgather(mine, calls))
        if calls != mine * self.size:
            texts = [calls[i : i + _CALL].decode().rstrip() for i in range(0, len(calls), _CALL)]
            raise RuntimeError(f"MPI: {refused_calls(texts)}")

    def _memory(self, tensor: Tensor) -> Any:
        return self._engine.buffer.fromaddress(tensor.data_ptr(), tensor.nbytes)

    def _wait(self, operation: str, request: Engine.Request) -> None:
        """Until the request is done. Interrupted, its memory stays with us: MPI may yet write."""
        began = time.perf_counter()
        while not request.Test():
            waited = time.perf_counter() - began
            if waited > self.timeout:
                self._ended = (
                    f"MPI: {operation}: rank {self.rank} of {self.size} waited {self.timeout:g} s "
                    "for other ranks; every rank must make the same calls, forward and backward: "
                    "where loaders differ in length, iterate over "
                    "syncbn.until_all_done(loader, comm), and where ranks take longer, pass a "
                    "longer timeout. This communicator has ended"
                )
                raise RuntimeError(self._ended)
            if waited > 50e-6:
                time.sleep(20e-6)
        self._in_flight = ()

    def _check(self) -> None:
        if self._ended is not None:
            raise RuntimeError(self._ended)
        if self._main_thread_only and not self._engine.Is_thread_main():
            raise RuntimeError(
                f"MPI: rank {self.rank} expected a call from the thread that initialised MPI, as "
                "its thread level is below SERIALIZED, got one from another thread; set "
                "mpi4py.rc.thread_level = 'multiple' before the first import of mpi4py.MPI"
            )


def _on_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


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
