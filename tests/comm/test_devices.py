"""Headers of messages on devices: compared at a later call, by ranks none of which waits for them.

The CPU stands for a device here: its messages take no frames, and go over gloo.
"""

from __future__ import annotations

import os
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncbn
from support.launches import Others
from support.many import as_many
from syncbn import kernels
from syncbn.comm import devices, groups, later, process_group
from syncbn.comm import given as given_room
from syncbn.kernels import triton
from syncbn.kernels.triton import steps
from syncbn.step import fused, identity

WIDTH = 4


class Event:
    """One of a device, that has taken place when a test says so."""

    def __init__(self, *_):
        self.over = False

    def query(self):
        return self.over

    def synchronize(self):
        self.over = True


def model():
    layers = {name: nn.BatchNorm1d(WIDTH) for name in ("first", "second")}
    return syncbn.convert(nn.ModuleDict(layers))


def x(width=WIDTH):
    return torch.randn(3, width, requires_grad=True)


def on_device(program, together=1):
    """The program in a rank whose tensors are as on a device. together: see later.TOGETHER."""
    as_there = {
        "_takes_frames": lambda self, tensor: False,
        "_channel": lambda self: None,
        "_direct": lambda self, tensor: False,
    }
    with (
        mock.patch.multiple(process_group.ProcessGroup, **as_there),
        mock.patch.object(process_group, "engine_of", return_value="nccl"),
        mock.patch.object(devices, "TOGETHER", together),
    ):
        syncbn.comm.resolve(None)._frames.later = None  # of another test
        return program()


@pytest.mark.parametrize("many", [False, True])
def test_steps_equal_those_of_frames(ranks, many):
    def step(rank):
        def run():
            torch.manual_seed(rank)
            layers, given = model(), x()
            y = layers["second"](layers["first"](given))
            y.square().mul(y).sum().backward()
            return y.detach(), given.grad, layers["first"].weight.grad

        usual = run()
        with as_many() if many else nullcontext():
            return usual, on_device(run)

    for usual, found in ranks(2, step):
        for a, b in zip(usual, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_many_tell_that_they_differ(ranks):
    """Not who, in a sum; and that they cannot follow each other into backward. The second sum of
    a layer's forward finds out what the first said.
    """

    def step(rank):
        def run(name):
            layers = model()
            with pytest.raises(syncbn.DesyncError) as caught:
                layers[name](x())
            layers["first"](x()).sum().backward()  # all go on together
            return str(caught.value), caught.value.ranks

        def wanting():
            with torch.set_grad_enabled(rank == 0), pytest.raises(syncbn.DesyncError):
                model()["first"](x())

        with as_many():
            told = on_device(lambda: run("second" if rank else "first"))
            on_device(wanting)
        return told

    for text, said in ranks(2, step):
        assert "called different collectives on a device: 2 ranks, too many to name, found" in text
        assert not said


@pytest.mark.parametrize("differ", ["layers made before", "models around it"])
@pytest.mark.parametrize("many", [False, True])
def test_layers_of_other_models_are_one(ranks, many, differ):
    """Numbers, and names that were found, may differ where the layer is the same."""

    def step(rank):
        def run():
            if rank and differ == "layers made before":
                syncbn.SyncBatchNorm1d(7)
            layer = syncbn.SyncBatchNorm1d(WIDTH)
            if differ == "models around it":
                layer = nn.Sequential(layer)
                layer = nn.Sequential(layer) if rank else layer
            for _ in range(3):
                layer(x()).sum().backward()

        counter = mock.patch.object(identity, "_process", identity.Counter())
        with counter, as_many() if many else nullcontext():
            on_device(run)

    ranks(2, step)


def test_many_know_a_single_value(ranks):
    def step(rank):
        def run():
            with pytest.raises(ValueError, match="got 1 on all 2 ranks together"):
                model()["first"](torch.randn(1 - rank, WIDTH))

        with as_many():
            on_device(run)

    ranks(2, step)


@pytest.mark.parametrize("when", ["at_once", ""])
def test_the_next_call_tells(ranks, when):
    """By then the first one's headers have come; or the call itself waits for them."""

    def step(rank):
        names = ("first", "second") if rank else ("second", "first")

        def run():
            layers = model()
            for name in ("first", "second"):
                layers[name](x())
            if not when:
                layers[names[0]](x())
            with pytest.raises(syncbn.DesyncError) as caught:
                layers[names[1 if not when else 0]](x())
            layers["first"](x()).sum().backward()  # all go on together
            return caught.value.ranks, caught.value.layer, str(caught.value)

        with mock.patch.dict(os.environ, {later.VARIABLE: when}):
            return on_device(run)

    for rank, (said, layer, text) in enumerate(ranks(2, step)):
        assert "forward of layer 'second'" in said[0]
        assert "forward of layer 'first'" in said[1]
        assert layer == ("first" if rank else "second")
        assert "SYNCBN_COMPARE=at_once" in text


def test_headers_go_to_the_host_together(ranks):
    """Half as many copies as messages; the first one that differs is named."""

    def step(rank):
        def run():
            layers = model()
            layers["first"](x())
            layers["second" if rank else "first"](x())
            layers["first"](x())
            layers["first"](x())  # the fourth
            with pytest.raises(syncbn.DesyncError, match="after this rank's all_gather") as caught:
                layers["first"](x())
            return caught.value.layer, syncbn.comm.resolve(None)._frames.later._waiting

        return on_device(run, together=4)

    assert ranks(2, step) == [("first", []), ("second", [])]


def test_two_launches_and_one_message_each_way(ranks):
    """By kernels that write headers themselves. What is sent to the host goes before."""

    def step(rank):
        layer, given = model()["first"], torch.randn(3, WIDTH, 5, requires_grad=True)
        events = []

        def launched(name, *_, **__):
            events.append(name)

        def run():
            y = layer(given)
            return torch.autograd.grad(y, (given, layer.weight, layer.bias), y.detach())

        def runs():
            run()
            events.clear()
            with Others(events):
                gradients = run()
            return gradients, list(events)

        (triton_kernels,) = (each for each in kernels.IMPLEMENTATIONS if each.steps is triton)
        with (
            mock.patch.object(fused, "select_kernels", return_value=triton_kernels),
            mock.patch.object(triton, "supports_others", return_value=True),
            mock.patch.object(steps, "launch", launched),
            mock.patch.object(steps, "dtypes"),
            mock.patch.object(later.Later, "compare"),  # nothing was written
        ):
            gradients, events = on_device(runs)
        return [gradient.shape for gradient in gradients], events

    first, *rest = step_events = ranks(2, step)
    assert rest == [first]
    shapes, events = step_events[0]
    assert shapes == [(3, WIDTH, 5), (WIDTH,), (WIDTH,)]
    copied = ["cat", "copy_"]
    forward = ["measure", "_allgather_base_", "normalise"]
    backward = ["gradient_sums", "allreduce_", "input_gradient"]
    assert events == [*copied, *forward, *copied, *backward]


def test_backward_tells(ranks):
    def step(rank):
        def run():
            layers = model()
            sum(layers[name](x()).sum() for name in ("first", "second")).backward()
            outputs = [layers[name](x()) for name in ("first", "second")]
            outputs[rank].sum().backward()
            with pytest.raises(syncbn.DesyncError) as caught:
                layers["first"](x())
            return caught.value.ranks

        return on_device(run)

    for said in ranks(2, step):
        assert "backward of layer 'first'" in said[0]
        assert "backward of layer 'second'" in said[1]


def test_nobody_waits_for_a_device(ranks):
    """Headers that have not come are left for a later call, in the order of calls."""

    def step(rank):
        def run():
            layers, waiting = model(), []
            layers["first"](x())
            said = syncbn.comm.resolve(None)._frames.later
            said.fetch(torch.device("cpu"))
            said._sent[0] = said._sent[0]._replace(arrived=(event := Event()))
            layers["second" if rank else "first"](x())
            layers["first"](x())
            waiting.append((len(said._sent), len(said._waiting)))
            event.over = True
            with pytest.raises(syncbn.DesyncError):
                layers["first"](x())
            return waiting

        return on_device(run)

    assert ranks(2, step) == [[(2, 1)], [(2, 1)]]


def test_who_says_nothing_agrees_with_all(ranks):
    """A compiled or captured step, on some ranks."""

    def step(rank):
        def run():
            layers = model()
            silent, devices._is_silent = devices._is_silent, lambda tensor: rank == 1
            try:
                for _ in range(2):
                    layers["first"](x()).sum().backward()
            finally:
                devices._is_silent = silent
            layers["first"](x())

        return on_device(run)

    ranks(2, step)


def test_dtypes_that_hold_no_header(ranks):
    def step(rank):
        def run():
            comm = syncbn.comm.resolve(dist.group.WORLD)
            rows = comm.all_gather(torch.full((3,), rank, dtype=torch.float32))
            return rows, comm.all_reduce(torch.full((3,), rank + 1.0, dtype=torch.bfloat16))

        return on_device(run)

    for rows, total in ranks(2, step):
        assert rows.tolist() == [[0] * 3, [1] * 3]
        assert total.tolist() == [3] * 3
        assert total.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("backend", "many"), [("aot_eager", False), ("aot_eager", True), ("inductor", False)]
)
def test_graphs_exchange_with_ranks_that_have_none(ranks, backend, many):
    """By torch's own operators, of as many numbers."""

    def step(rank):
        def run():
            torch.manual_seed(0)
            layers, given = model(), torch.randn(6, WIDTH)[3 * rank :][:3].requires_grad_()
            call = layers["first"]
            if rank:
                call = torch.compile(call, backend=backend, fullgraph=True)
            y = call(given)
            y.square().mul(y).sum().backward()
            return y.detach(), given.grad

        def never(tensor):
            return False

        with (
            mock.patch.object(given_room, "_is_opaque", never),
            as_many() if many else nullcontext(),
        ):
            return on_device(run)

    torch.manual_seed(0)
    layer, whole = nn.BatchNorm1d(WIDTH), torch.randn(6, WIDTH).requires_grad_()
    y = layer(whole)
    y.square().mul(y).sum().backward()
    for expected, found in zip((y, whole.grad), zip(*ranks(2, step), strict=True), strict=True):
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("when", ["at_once", ""])
def test_a_single_value_on_all_ranks_together(ranks, when):
    """Found without a look at the values, which would wait for the device."""

    def step(rank):
        def run():
            layer = model()["first"]
            few = torch.randn(1 - rank, WIDTH, requires_grad=True)
            if not when:
                layer(few)
            with pytest.raises(ValueError, match="got 1 on all 2 ranks together"):
                layer(few)
            layer(torch.randn(1, WIDTH, requires_grad=True)).sum().backward()

        with mock.patch.dict(os.environ, {later.VARIABLE: when}):
            return on_device(run)

    ranks(2, step)


def unnamed(rank):
    with mock.patch.object(identity, "_process", identity.Counter()):  # of other tests' layers
        layers = [syncbn.SyncBatchNorm1d(WIDTH) for _ in range(2)]
        layers[rank](x())


def without_grad(rank):
    with torch.set_grad_enabled(rank == 0):
        model()["first"](x())


@pytest.mark.parametrize(
    ("case", "said"),
    [(unnamed, "layer 'SyncBatchNorm1d "), (without_grad, "gradients off")],
    ids=["unnamed", "without_grad"],
)
def test_what_else_is_compared(ranks, case, said):
    def step(rank):
        with (
            mock.patch.dict(os.environ, {later.VARIABLE: "at_once"}),
            pytest.raises(syncbn.DesyncError) as caught,
        ):
            on_device(lambda: case(rank))
        return caught.value.ranks[1] if case is without_grad else caught.value.ranks[rank]

    assert all(said in text for text in ranks(2, step))


def test_a_rank_that_is_one_call_ahead_gets_its_answer(ranks):
    """The headers of the call that differs have come on one rank only."""

    def step(rank):
        def run():
            layers = model()
            layers["first"](x())
            layers["second" if rank else "first"](x())
            if rank:
                event, sent = Event(), later._Sent
                with mock.patch.object(later, "_Sent", lambda *found: sent(*found[:2], event)):
                    layers["first"](x())
                event.over = True
            with pytest.raises(syncbn.DesyncError):
                layers["first"](x())

        return on_device(run)

    ranks(2, step)


def test_a_group_that_takes_no_such_tensors(ranks):
    """Refused before any message, on all ranks alike: with another device they go on."""

    def step(rank):
        def run():
            with (
                mock.patch.object(groups, "engine_of", return_value=""),
                pytest.raises(RuntimeError, match="communicates, got one on cpu; move"),
            ):
                model()["first"](x())
            model()["first"](x())

        return on_device(run)

    ranks(2, step)


def test_an_empty_message(ranks):
    def step(rank):
        return on_device(lambda: syncbn.comm.resolve(None).all_gather(torch.empty(0, 3)).shape)

    assert ranks(2, step) == [(2, 0, 3)] * 2


def test_headers_that_are_none_differ():
    """As where messages of different sizes have mixed on a device."""
    comm, said = mock.Mock(size=2), later.Said("a call", "a layer", (2.0, 2.0, 4.0))
    headers = torch.tensor([[1.0, torch.nan, torch.inf, 4.0], [1.0, 2.0, 2.0, 4.0]])
    found = later.Later()
    found._waiting.append((said, headers.double()))
    found.fetch(torch.device("cpu"))
    with pytest.raises(syncbn.DesyncError, match="ranks called different collectives"):
        found.compare(comm)


def test_another_word_for_the_comparison_is_refused(ranks):
    def step(rank):
        with (
            mock.patch.dict(os.environ, {later.VARIABLE: "now"}),
            pytest.raises(ValueError, match="SYNCBN_COMPARE: expected at_once, got 'now'; leave"),
        ):
            on_device(lambda: model()["first"](x()))

    ranks(2, step)
