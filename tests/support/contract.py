"""The contract of communicators (src/syncbn/comm/base.py), as checks that every rank runs.

A check takes this rank's communicator and raises AssertionError. It needs neither pytest nor
another channel between ranks, so that it runs wherever a rank does: in a thread, a worker of the
fixture ``ranks``, a process under mpiexec. Every rank must run the same checks in the same order.

    for check in CHECKS:
        check(comm)
"""

from __future__ import annotations

import copy
import pickle
import threading

import torch
from torch import Tensor

from syncbn.comm import Communicator

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((5,), (2, 3), (1,), (), (20_001,))
COLLECTIVES = ("all_gather", "all_reduce")


def check_numbering(comm: Communicator) -> None:
    """Ranks count from 0 to size − 1, each once."""
    assert type(comm.rank) is type(comm.size) is int, (comm.rank, comm.size)
    assert 0 <= comm.rank < comm.size, (comm.rank, comm.size)
    ranks = comm.all_gather(torch.tensor(float(comm.rank)))
    assert ranks.tolist() == list(range(comm.size)), ranks


def check_values_and_dtypes(comm: Communicator) -> None:
    for dtype in DTYPES:
        for shape in SHAPES:
            mine = torch.full(shape, comm.rank + 1.0, dtype=dtype)
            wanted = torch.arange(1.0, comm.size + 1, dtype=dtype)
            wanted = wanted.view(-1, *(1 for _ in shape)).expand(-1, *shape)
            _assert_same(comm.all_gather(mine), wanted)
            _assert_same(comm.all_reduce(mine), wanted.sum(0))


def check_special_values(comm: Communicator) -> None:
    """What is not finite travels as it is; a sum has it too."""
    last = comm.size - 1
    mine = torch.tensor([1.0, -torch.inf if comm.rank == last else 0.0])
    gathered, total = comm.all_gather(mine), comm.all_reduce(mine)
    assert gathered[:, 1].tolist() == [0.0] * last + [-torch.inf], gathered
    assert total.tolist() == [comm.size, -torch.inf], total
    assert comm.all_reduce(mine * torch.nan).isnan().all()


def check_empty_tensors(comm: Communicator) -> None:
    for shape in ((0,), (2, 0, 3)):
        mine = torch.empty(shape, dtype=torch.float64)
        _assert_same(comm.all_gather(mine), torch.empty(comm.size, *shape, dtype=torch.float64))
        _assert_same(comm.all_reduce(mine), mine)


def check_arguments_need_not_be_contiguous(comm: Communicator) -> None:
    def of(rank: int) -> Tensor:
        return (torch.arange(12.0).view(3, 4) * (rank + 1)).t()[::2]

    wanted = torch.stack([of(rank) for rank in range(comm.size)])
    _assert_same(comm.all_gather(of(comm.rank)), wanted)
    _assert_same(comm.all_reduce(of(comm.rank)), wanted.sum(0))
    spread = torch.tensor(2.0).expand(3)
    _assert_same(comm.all_reduce(spread), torch.full((3,), 2.0 * comm.size))


def check_the_argument_is_the_callers(comm: Communicator) -> None:
    """Not modified, and not kept: it may be overwritten at once, however late the peers are."""
    for name in COLLECTIVES:
        for i in range(50):
            mine = torch.full((257,), float(comm.rank + i))
            result = getattr(comm, name)(mine)
            assert (mine == comm.rank + i).all(), f"{name} modifies its argument"
            mine.fill_(-1.0)
            wanted = torch.arange(comm.size) + float(i)
            wanted = wanted.sum() if name == "all_reduce" else wanted.unsqueeze(1)
            assert (result == wanted).all(), f"{name} keeps its argument"


def check_the_result_is_the_callers(comm: Communicator) -> None:
    """A new tensor: overwriting it, on some ranks or later, is seen by nobody else."""
    for name in COLLECTIVES:
        mine = torch.ones(4)
        first = getattr(comm, name)(mine)
        first.fill_(10.0 + comm.rank)
        second = getattr(comm, name)(mine)
        assert (second == (comm.size if name == "all_reduce" else 1)).all(), second
        comm.all_reduce(mine)  # every rank has overwritten its own by now
        assert (first == 10 + comm.rank).all(), f"{name}: ranks share a result, {first}"
        assert (mine == 1).all(), f"{name}: the result is its argument"


def check_many_in_a_row(comm: Communicator) -> None:
    """200 collectives, now and then with a rank that is late, stay in order."""
    for i in range(100):
        if i % 25 == comm.rank:
            torch.randn(200, 200).square().sum()
        mine = torch.tensor([float(i * comm.size + comm.rank)])
        wanted = [float(i * comm.size + rank) for rank in range(comm.size)]
        gathered, total = comm.all_gather(mine).flatten().tolist(), comm.all_reduce(mine).item()
        assert gathered == wanted, (i, gathered, wanted)
        assert total == sum(wanted), (i, total, wanted)


def check_every_rank_receives_the_same_bits(comm: Communicator) -> None:
    generator = torch.Generator().manual_seed(comm.rank)
    for dtype in DTYPES:
        mine = torch.randn(1000, generator=generator, dtype=torch.float64).to(dtype)
        gathered = comm.all_gather(mine)
        assert torch.equal(gathered[comm.rank], mine), "a gathered row has other bits than sent"
        total = comm.all_reduce(mine)
        for received in (gathered, total):
            everyones = comm.all_gather(received)
            assert all(torch.equal(other, received) for other in everyones), dtype
        error = (total.double() - gathered.double().sum(0)).abs().max().item()
        assert error <= 4 * comm.size * torch.finfo(dtype).eps, (dtype, error)


def check_interleaved(comm_a: Communicator, comm_b: Communicator) -> None:
    """Two communicators that this rank belongs to, in turn, don't mix."""
    for i in range(20):
        for offset, comm, name in (
            (0, comm_a, "all_reduce"),
            (1000, comm_b, "all_reduce"),
            (2000, comm_a, "all_gather"),
            (3000, comm_b, "all_gather"),
        ):
            everyones = torch.arange(comm.size) + float(i + offset)
            received = getattr(comm, name)(everyones[comm.rank].clone())
            wanted = everyones.sum() if name == "all_reduce" else everyones
            _assert_same(received, wanted)


def check_copies(comm: Communicator) -> None:
    """It belongs to its process: a copy is the communicator itself, pickle refuses it."""
    assert copy.deepcopy({"of": comm})["of"] is comm
    said = "nothing"
    try:
        pickle.dumps(comm)
    except TypeError as error:
        said = str(error)
    assert "cannot be pickled; construct one" in said, said


def check_calls_from_other_threads(comm: Communicator) -> None:
    """One at a time, but each from a new thread, as where autograd runs backward."""
    found: list[Tensor | BaseException] = []

    def call(name: str, mine: Tensor) -> None:
        try:
            found.append(getattr(comm, name)(mine))
        except BaseException as error:
            found.append(error)

    everyones = torch.arange(float(comm.size))
    for i in range(60):
        for name, wanted in (("all_gather", everyones + i), ("all_reduce", (everyones + i).sum())):
            thread = threading.Thread(target=call, args=(name, everyones[comm.rank] + i))
            thread.start()
            thread.join()
            received = found.pop()
            if isinstance(received, BaseException):
                raise received
            _assert_same(received, wanted)


CHECKS = (
    check_numbering,
    check_values_and_dtypes,
    check_special_values,
    check_empty_tensors,
    check_arguments_need_not_be_contiguous,
    check_the_argument_is_the_callers,
    check_the_result_is_the_callers,
    check_many_in_a_row,
    check_every_rank_receives_the_same_bits,
    check_calls_from_other_threads,
    check_copies,
)


def _assert_same(received: Tensor, wanted: Tensor) -> None:
    assert received.dtype == wanted.dtype, (received.dtype, wanted.dtype)
    assert received.shape == wanted.shape, (received.shape, wanted.shape)
    assert torch.equal(received, wanted), (received, wanted)
