"""accumulating(): micro-batches move running statistics once, as one batch; all else is as ever."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import syncbn
from support import oracle
from support.cases import CLOSE, laid_out
from support.layers import saved_and_loaded
from syncbn.step.accumulation import Accumulator

MOMENTA = [0.1, None, 1.0, 0.0]


def micro_batches(*sizes: int, seed: int = 0) -> list[torch.Tensor]:
    """Each with a mean of its own, so that means of variances are not the variance."""
    generator = torch.Generator().manual_seed(seed)
    like = {"generator": generator, "dtype": torch.float64}
    return [torch.randn(n, 3, 4, **like) + 10 * i + 100 * seed for i, n in enumerate(sizes)]


def whole(layer: nn.Module, *steps: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """The judge: torch's layer, given all micro-batches of each step at once."""
    judge = nn.BatchNorm1d(3, momentum=layer.momentum).double()
    for step in steps:
        judge(torch.cat(step))
    return judge.state_dict()


def run(layer: nn.Module, step: list[torch.Tensor]) -> list[torch.Tensor]:
    """Forward and backward of each, as training loops have it: outputs and gradients."""
    found = []
    for x in step:
        x = x.clone().requires_grad_()
        y = layer(x)
        y.pow(3).sum().backward()
        found += [y.detach(), x.grad]
    gradients = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    return [*found, *gradients]


def assert_state(layer: nn.Module, expected: dict[str, torch.Tensor], **close) -> None:
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        torch.testing.assert_close(
            getattr(layer, name).to(expected[name].dtype), expected[name], **(close or CLOSE)
        )


def layer_of(kind: str, **options) -> nn.Module:
    options = {"dtype": torch.float64, **options}
    return nn.BatchNorm1d(3, **options) if kind == "torch" else syncbn.SyncBatchNorm1d(3, **options)


# --- one process -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["syncbn", "torch"])
@pytest.mark.parametrize("momentum", MOMENTA)
def test_statistics_move_once_as_by_the_whole_batch(kind, momentum):
    layer = layer_of(kind, momentum=momentum)
    steps = [micro_batches(2, 5, 1), micro_batches(4, 3, seed=1)]
    for step in steps:
        before = {name: value.clone() for name, value in layer.state_dict().items()}
        with syncbn.accumulating(layer):
            run(layer, step)
            if kind == "syncbn":
                assert all(torch.equal(layer.state_dict()[n], v) for n, v in before.items())
    assert_state(layer, whole(layer, *steps))


@pytest.mark.parametrize("implementation", ["composite", "native"], indirect=True)
@pytest.mark.parametrize("kind", ["syncbn", "torch"])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"reproducible": True}])
def test_outputs_and_gradients_are_the_same_bits_as_without(implementation, kind, options):
    if kind == "torch" and "reproducible" in options:
        pytest.skip("torch's has no such option")
    step = micro_batches(2, 5, 1)
    layer, other = layer_of(kind, **options), layer_of(kind, **options)
    with syncbn.accumulating(layer):
        found = run(layer, step)
    for mine, theirs in zip(found, run(other, step), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dims", [2, 3, 4, 5])
def test_every_dimension_and_dtype(dims, dtype):
    layer = syncbn.SyncBatchNorm(3, momentum=1.0)
    shape = (6, 3, 4, 3, 2)[:dims]
    data = [(torch.randn(shape) + 3 * i).to(dtype) for i in range(3)]
    with syncbn.accumulating(layer):
        for x in data:
            layer(x)
    x = torch.cat(data).double()
    expected = oracle.batch_norm(x, torch.zeros_like(x))
    oracle.assert_close(layer.running_mean, expected.mean)
    oracle.assert_close(layer.running_var, expected.unbiased_var)


@pytest.mark.parametrize("layout", ["channels_last", "strided", "transposed"])
def test_every_layout(layout):
    layer = syncbn.SyncBatchNorm2d(3, momentum=1.0, dtype=torch.float64)
    data = [torch.randn(2, 3, 4, 5, dtype=torch.float64) + i for i in range(2)]
    with syncbn.accumulating(layer):
        assert [layer(laid_out(x, layout)).shape for x in data]
    x = torch.cat(data).transpose(0, 1).flatten(1)
    torch.testing.assert_close(layer.running_var, x.var(1), **CLOSE)


def test_masks_say_what_counts():
    layer = syncbn.SyncBatchNorm1d(3, momentum=1.0, dtype=torch.float64)
    step, kept = micro_batches(2, 3), []
    with syncbn.accumulating(layer):
        for x in step:
            mask = torch.arange(4) < torch.arange(1, len(x) + 1).unsqueeze(1)
            layer(x, mask)
            kept.append(x.movedim(1, -1)[mask])
    torch.testing.assert_close(layer.running_var, torch.cat(kept).var(0), **CLOSE)


def test_empty_micro_batches_weigh_nothing():
    layer = layer_of("syncbn")
    with syncbn.accumulating(layer):
        run(layer, micro_batches(2, 0, 3))
    assert_state(layer, whole(layer, micro_batches(2, 0, 3)))
    layer = layer_of("syncbn")
    with syncbn.accumulating(layer):
        layer(torch.empty(0, 3, 4).double())
    assert_state(layer, whole(layer, [torch.empty(0, 3, 4).double()]))


def test_the_micro_batches_that_are_skipped_move_nothing():
    layer = layer_of("syncbn", skip_nonfinite=True)
    good = micro_batches(2, 3)
    with syncbn.accumulating(layer):
        run(layer, [good[0], good[0] * torch.inf, good[1]])
    assert_state(layer, whole(layer, good))
    assert layer.num_batches_skipped == 1
    with syncbn.accumulating(layer):
        layer(good[0] * torch.nan)
    assert_state(layer, whole(layer, good))
    assert layer.num_batches_skipped == 2


def test_what_is_not_skipped_makes_them_what_the_formula_does():
    layer = layer_of("syncbn")
    with syncbn.accumulating(layer):
        run(layer, [*micro_batches(2), micro_batches(2)[0] * torch.inf])
    assert layer.running_var.isnan().all()
    assert layer.num_batches_tracked == 1


def test_layers_that_do_not_train_stay():
    model = nn.ModuleList(layer_of(kind) for kind in ("syncbn", "torch") * 3)
    model.append(layer_of("syncbn", track_running_stats=False))
    model[2:4].eval()
    syncbn.freeze(model, lambda name, _: name in "45")
    with syncbn.accumulating(model):
        for layer in model[2:]:
            layer(micro_batches(3)[0])
    assert [int(layer.num_batches_tracked) for layer in model[:6]] == [0] * 6


def test_a_layer_that_is_called_twice_in_a_forward():
    layer, step = layer_of("syncbn"), micro_batches(2, 3)
    with syncbn.accumulating(layer):
        layer(layer(step[0]) + step[0])
    expected = [step[0], layer_of("syncbn")(step[0]).detach() + step[0]]
    assert_state(layer, whole(layer, expected))


@pytest.mark.parametrize("kind", ["syncbn", "torch"])
def test_after_an_error_statistics_are_what_they_were(kind):
    layer, step = layer_of(kind), micro_batches(2, 3)
    with contextlib.suppress(KeyboardInterrupt), syncbn.accumulating(layer):
        run(layer, step)
        raise KeyboardInterrupt
    assert_state(layer, whole(layer))
    layer(step[0])  # and go on as ever
    assert_state(layer, whole(layer, step[:1]))


def test_a_micro_batch_that_fails_is_not_counted():
    layer, step = layer_of("syncbn"), micro_batches(2, 3)
    with syncbn.accumulating(layer):
        for x in (step[0], step[0][:1, :, :1], torch.randn(2, 5, 4), step[1]):
            with contextlib.suppress(ValueError):
                layer(x)
    assert_state(layer, whole(layer, step))


@pytest.mark.parametrize("kind", ["syncbn", "torch"])
def test_a_context_inside_another_belongs_to_it(kind):
    model, step = nn.Sequential(layer_of(kind)), micro_batches(2, 3, 1)
    with syncbn.accumulating(model):
        run(model, step[:1])
        with syncbn.accumulating(model[0]):
            run(model, step[1:2])
        run(model, step[2:])
    assert_state(model[0], whole(model[0], step))


def test_copies_and_conversions_within():
    layer, step = layer_of("syncbn"), micro_batches(2, 3)
    with syncbn.accumulating(layer):
        layer(step[0])
        others = [copy.deepcopy(layer), copy.copy(layer), saved_and_loaded(layer, False)]
        for other in others[::2]:
            other(step[1])
            assert_state(other, whole(layer, step[1:]))
        assert "_accumulator" not in vars(others[1])
        layer(step[1])
        syncbn.revert(layer)
    assert_state(layer, whole(layer, step))
    assert "_accumulator" not in vars(layer)


@pytest.mark.parametrize("kind", ["syncbn", "torch"])
def test_a_copy_made_within_trains_and_pickles_by_itself(kind):
    layer, step = layer_of(kind), micro_batches(2, 3)
    with syncbn.accumulating(layer):
        layer(step[0])
        other = copy.deepcopy(layer)
        other.reset_running_stats()
        other(step[0])
        layer(step[1])
    assert_state(layer, whole(layer, step))
    other = saved_and_loaded(other, weights_only=False)
    other(step[1])
    assert_state(other, whole(layer, step[:1], step[1:]))


def test_what_a_failed_call_has_told_is_forgotten():
    accumulator = Accumulator(torch.zeros(1), torch.ones(1), None)
    wrong, right = torch.tensor([[[1.0, 7.0, 0.0]], [[2.0, 5.0, 1.0]]])
    accumulator.hear(wrong)
    accumulator.hear(right)
    for _ in range(2):  # as the replicas of one call
        accumulator.keep()
    assert accumulator.packed.tolist() == right[0].tolist()


def test_statistics_given_by_functional_call_move_as_ever():
    layer, x = layer_of("syncbn"), micro_batches(3)[0]
    given = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    with syncbn.accumulating(layer):
        torch.func.functional_call(layer, given, (x,))
    assert_state(layer, whole(layer))
    assert given["num_batches_tracked"] == 1


# --- ranks -----------------------------------------------------------------------------------

SPLITS = {"even": [[2, 2], [2, 2]], "uneven": [[3, 1], [0, 2]], "three": [[1], [4], [1]]}


@pytest.mark.parametrize("sizes", SPLITS.values(), ids=SPLITS)
@pytest.mark.parametrize("options", [{}, {"reproducible": True}, {"momentum": None}])
def test_ranks_move_by_all_micro_batches_of_all_ranks(ranks, sizes, options):
    data = [micro_batches(*own, seed=rank) for rank, own in enumerate(sizes)]

    def train(rank):
        layer, other = layer_of("syncbn", **options), layer_of("syncbn", **options)
        with syncbn.accumulating(layer):
            found = run(layer, data[rank])
        return dict(layer.named_buffers()), found, run(other, data[rank])

    results = ranks(len(sizes), train)
    expected = whole(layer_of("syncbn", **options), [x for own in data for x in own])
    for state, found, without in results:
        for name, value in expected.items():
            if name in state:
                torch.testing.assert_close(state[name], value, **CLOSE)
                assert torch.equal(state[name], results[0][0][name])
        for mine, theirs in zip(found, without, strict=True):
            assert torch.equal(mine, theirs)


def test_no_message_more(ranks):
    """Ranks of which one alone accumulates stay in step, too: the messages are the same."""

    def train(rank):
        layer = layer_of("syncbn")
        with syncbn.accumulating(layer) if rank else contextlib.nullcontext():
            run(layer, micro_batches(2, 3, seed=rank))
        return layer.num_batches_tracked

    assert ranks(2, train) == [2, 1]


def test_ddp_with_and_without_no_sync(ranks):
    """As accumulation is written; torch's layer in the model moves by its rank's share."""
    data = [micro_batches(2, 3, seed=rank) for rank in range(2)]

    def train(rank):
        model = nn.Sequential(layer_of("syncbn", momentum=None), nn.Tanh(), layer_of("torch"))
        ddp = DistributedDataParallel(model, broadcast_buffers=rank < 0)
        with syncbn.accumulating(ddp):
            with ddp.no_sync():
                ddp(data[rank][0]).pow(3).sum().backward()
            ddp(data[rank][1]).pow(3).sum().backward()
        return model.state_dict(), model[0].weight.grad

    (first, gradient), (second, other) = ranks(2, train)
    assert torch.equal(gradient, other)
    expected = whole(layer_of("syncbn", momentum=None), data[0] + data[1])
    for state in (first, second):
        for name, value in expected.items():
            if name.startswith(("running", "num")):
                torch.testing.assert_close(state[f"0.{name}"], value, **CLOSE)
        assert state["2.num_batches_tracked"] == 1


def test_replicas_of_data_parallel_count_as_one_call():
    layer, step = layer_of("syncbn"), micro_batches(4, 3)
    parallel = syncbn.DataParallel(layer, devices=["cpu", "cpu"])
    with syncbn.accumulating(parallel):
        run(parallel, step)
    assert_state(layer, whole(layer, step))


def test_replicas_skip_as_one_call():
    layer, (good,) = layer_of("syncbn", skip_nonfinite=True), micro_batches(4)
    bad = good.clone()
    bad[0] = torch.inf  # of the first replica's share alone
    with syncbn.accumulating(layer):
        run(syncbn.DataParallel(layer, devices=["cpu"] * 2), [bad, good, bad])
    assert_state(layer, whole(layer, [good]))
    assert layer.num_batches_skipped == 2


# --- checkpoints, graphs, transforms ---------------------------------------------------------


def save_all(ctx, op, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE


CHECKPOINTS = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "selective": {
        "use_reentrant": False,
        "context_fn": lambda: create_selective_checkpoint_contexts(save_all),
    },
}


@pytest.mark.parametrize("how", CHECKPOINTS)
@pytest.mark.parametrize("kind", ["syncbn", "torch"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_checkpoints_second_forward_counts_once(ranks, how, kind, world):
    if kind == "torch" and how == "selective":
        pytest.skip("torch's layer does not bear this without accumulating")
    data = [micro_batches(2, 3, seed=rank) for rank in range(world)]

    def train(rank):
        layer, other = layer_of(kind), layer_of(kind)
        with syncbn.accumulating(layer):
            found = run(lambda_of(layer, how), data[rank])
        return dict(layer.named_buffers()), found, run(other, data[rank])

    def lambda_of(layer, how):
        outer = nn.Sequential(layer)
        outer.forward = lambda x: checkpoint(layer, x, **CHECKPOINTS[how])
        return outer

    results = ranks(2, train) if world > 1 else [train(0)]
    for rank, (state, found, without) in enumerate(results):
        own = data[rank] if kind == "torch" else [x for each in data for x in each]
        for name, value in whole(layer_of(kind), own).items():
            if name in state:
                torch.testing.assert_close(state[name], value, **CLOSE)
        for mine, theirs in zip(found, without, strict=True):
            torch.testing.assert_close(mine, theirs, **CLOSE)


def test_graphs_and_transforms_are_refused():
    layer, x = layer_of("syncbn"), micro_batches(3)[0]
    torch._dynamo.reset()  # other tests' graphs count towards its limit
    graph = torch.compile(layer, backend="eager", fullgraph=True)
    graph(x)
    with syncbn.accumulating(layer):
        with pytest.raises(Exception, match="accumulating: expected the layer's step as it is"):
            graph(x)
        with pytest.raises(RuntimeError, match=r"got a transform of torch.func"):
            torch.func.grad(lambda x: layer(x).sum())(x)
        with pytest.raises(RuntimeError, match=r"got torch.jit.trace"):
            torch.jit.trace(layer, x)
    assert layer.num_batches_tracked == 1
    graph(x)
    assert layer.num_batches_tracked == 2


def test_a_graph_of_torchs_layer_is_refused_at_the_end():
    layer, x = layer_of("torch"), micro_batches(3)[0]
    torch._dynamo.reset()
    graph = torch.compile(layer, backend="eager")
    graph(x)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    with (
        pytest.raises(RuntimeError, match="expected layer '' to run as it is, got a compiled"),
        syncbn.accumulating(layer),
    ):
        graph(x)
    assert_state(layer, before)


# --- what it refuses -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["syncbn", "torch"])
def test_statistics_that_wait_are_left_alone(kind):
    layer, step = layer_of(kind), micro_batches(2, 3)
    with syncbn.accumulating(layer):
        run(layer, step)
        with pytest.raises(RuntimeError, match=r"recalibrate: .* call recalibrate after"):
            syncbn.recalibrate(layer, step)
        with pytest.raises(RuntimeError, match=r"sync_buffers: .* a block of syncbn.accumulating"):
            syncbn.sync_buffers(layer)
    assert_state(layer, whole(layer, step))


def test_wrong_arguments():
    def enter(model):
        with syncbn.accumulating(model):
            raise AssertionError("entered")

    with pytest.raises(TypeError, match=r"accumulating: expected a torch.nn.Module, got list"):
        enter([])
    with pytest.raises(ValueError, match="accumulating: expected initialised layers, got the lazy"):
        enter(syncbn.LazySyncBatchNorm1d())
    with pytest.raises(ValueError, match=r"got '0' of torch's, .* syncbn.convert\(model\) first"):
        enter(nn.Sequential(nn.SyncBatchNorm(3)))
    with syncbn.accumulating(nn.Linear(2, 2)):
        pass
