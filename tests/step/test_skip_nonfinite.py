"""skip_nonfinite: what overflows on one rank moves no running statistics on any."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from support import oracle
from support.compiling import compiled, one_graph_only
from support.layers import Silent, saved_and_loaded

BAD = [math.inf, -math.inf, math.nan]


def layer(channels=3, **options):
    return syncbn.SyncBatchNorm(channels, **{"skip_nonfinite": True, **options})


def batches(bad=math.inf, dtype=torch.float32, samples=4):
    """Five batches (samples, 3, 5); in the first and the fourth one value is ``bad``."""
    xs = (torch.randn(5, samples, 3, 5, dtype=torch.float64) * 2 + 1).to(dtype)
    xs[0, -1, 1, 2] = xs[3, -1, 2, 0] = bad
    return list(xs)


def state(layer):
    return {name: buffer.clone() for name, buffer in layer.named_buffers()}


def expected(xs, momentum=0.1):
    """(running_mean, running_var) after all of xs that are finite."""
    mean, var, seen = torch.zeros(3).double(), torch.ones(3).double(), 0
    for x in xs:
        if x.isfinite().all():
            seen += 1
            mean, var = oracle.batch_norm(x, x).running(
                mean, var, 1 / seen if momentum is None else momentum
            )
    return mean, var


def check(buffers, xs, momentum=0.1, dtype=None):
    for name, value in zip(("running_mean", "running_var"), expected(xs, momentum), strict=True):
        oracle.assert_close(buffers[name], value, dtype=dtype, factor=2)
    skipped = sum(not x.isfinite().all() for x in xs)
    assert buffers["num_batches_tracked"] == len(xs) - skipped
    assert buffers["num_batches_skipped"] == skipped


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("momentum", [0.0, 0.1, None, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.usefixtures("implementation")
def test_one_process(bad, momentum, dtype):
    """Outputs and gradients are those without the option, the infinite and nan ones too."""
    mine, usual = (
        layer(momentum=momentum, dtype=dtype, skip_nonfinite=skip) for skip in (True, False)
    )
    xs = batches(bad, dtype)
    for x in xs:
        seen = []
        for norm in (mine, usual):
            input = x.clone().requires_grad_()
            norm.zero_grad()
            y = norm(input)
            y.sin().sum().backward()
            seen.append((y.detach(), input.grad, norm.weight.grad))
        near = 5e-2 if dtype.itemsize == 2 else 1e-5
        torch.testing.assert_close(*seen, rtol=near, atol=near, equal_nan=True)
    check(state(mine), xs, momentum)
    assert momentum == 0 or not usual.running_mean.isfinite().all()


@pytest.mark.parametrize("options", [{"reproducible": True}, {"statistics_dtype": torch.float64}])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.usefixtures("implementation")
def test_other_options(options, masked):
    norm, xs = layer(**options), batches()
    for x in xs:
        mask = torch.ones(4, 5, dtype=torch.bool)
        norm(
            torch.cat((x, x.new_full((1, 3, 5), math.nan))), torch.cat((mask, mask[:1] < 1))
        ) if masked else norm(x)
    check(state(norm), xs, dtype=torch.float32)


@pytest.mark.usefixtures("implementation")
def test_small_variances_keep_their_digits():
    norm, x = layer(momentum=None), torch.randn(64, 3, dtype=torch.float32) * 1e-7
    norm(x)
    oracle.assert_close(norm.running_var, oracle.batch_norm(x, x).unbiased_var)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("bad", BAD)
def test_a_rank_that_overflows(ranks, bad, momentum):
    """Its peers, whose batches are finite, skip with it: all ranks have the same bits."""
    xs = [x.roll(2, 0) for x in batches(bad)]  # the bad ones are rank 0's

    def run(rank):
        norm = layer(momentum=momentum)
        for x in xs:
            norm(x[2 * rank : 2 * rank + 2]).sin().sum().backward()
        return state(norm)

    first, second = ranks(2, run)
    check(first, xs, momentum)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_a_batch_without_values_moves_nothing_and_counts(ranks):
    def run(rank):
        norm, usual = layer(), syncbn.SyncBatchNorm(3)
        x = torch.randn(2, 3)
        for one in (norm, usual):
            one(x)
            one(torch.empty(0, 3, 2))
        skipped = norm.num_batches_skipped.item()
        norm.skip_nonfinite = False
        return skipped, state(norm), state(usual)

    for skipped, mine, usual in [run(0), *ranks(2, run)]:
        assert skipped == 0
        torch.testing.assert_close(mine, usual)


@pytest.mark.parametrize("half", [torch.float16, None], ids=str)
def test_training_under_a_loss_scaler_goes_on(ranks, half):
    """Weights overflow what one rank's first batch becomes; scaler and statistics skip the step."""

    def run(rank):
        torch.manual_seed(1)
        norm = nn.BatchNorm2d(4)
        model = nn.Sequential(nn.Conv2d(2, 4, 1), norm, nn.Flatten(), nn.Linear(64, 2))
        model = DistributedDataParallel(syncbn.convert(model, skip_nonfinite=True))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        seen = []
        for number in range(4):
            x = torch.randn(3, 2, 4, 4)
            if number == 1 and rank == 1:
                x = x * (60_000 if half else 1e30) ** 2
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=half or torch.bfloat16, enabled=half is not None):
                loss = model(x).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer), scaler.update()
            seen.append((state(norm), scaler.get_scale()))
        model.eval()
        return seen, model(torch.randn(1, 2, 4, 4)).isfinite().all()

    (first, finite), (second, _) = ranks(2, run)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    buffers, scales = zip(*first, strict=True)
    assert scales == (2.0**10, 2.0**9, 2.0**9, 2.0**9)
    assert [int(b["num_batches_tracked"]) for b in buffers] == [1, 1, 2, 3]
    assert [int(b["num_batches_skipped"]) for b in buffers] == [0, 1, 1, 1]
    assert torch.equal(buffers[1]["running_var"], buffers[0]["running_var"])
    assert all(b["running_var"].isfinite().all() for b in buffers)
    assert finite


def test_sharded_parameters(ranks):
    def run(rank):
        model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
        fully_shard(syncbn.convert(model, skip_nonfinite=True))
        for bad in (False, True, False):
            x = torch.randn(4, 3)
            x[0, 0] += torch.inf if bad and rank == 1 else 0.0
            model(x).sum().backward()
        return state(model[1])

    first, second = ranks(2, run)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
    assert first["running_var"].isfinite().all()
    assert (first["num_batches_tracked"], first["num_batches_skipped"]) == (2, 1)


@pytest.mark.parametrize("devices", [1, 2, 3])
def test_replicas(devices):
    model = syncbn.DataParallel(nn.Sequential(layer()), ["cpu"] * devices)
    xs = batches()
    for x in xs:
        model(x).sin().sum().backward()
    check(state(model.module[0]), xs)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("world", [1, 2])
def test_checkpointing(ranks, reentrant, world):
    """Once per step, skipped ones too."""
    xs = batches(samples=2 * world)

    def run(rank):
        norm = layer()
        for x in xs:
            x = x[2 * rank : 2 * rank + 2].clone().requires_grad_()
            checkpoint(norm, x, use_reentrant=reentrant).sin().sum().backward()
        return state(norm)

    for buffers in ranks(2, run) if world > 1 else [run(0)]:
        check(buffers, xs)


def test_replicas_in_a_checkpoint():
    model = syncbn.DataParallel(nn.Sequential(layer()), ["cpu"] * 2)
    xs = batches()
    for x in xs:
        checkpoint(model, x.requires_grad_(), use_reentrant=True).sin().sum().backward()
    check(state(model.module[0]), xs)


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("world", [1, 2])
def test_one_graph(ranks, world, momentum):
    xs = batches(samples=2 * world)

    def run(rank):
        norm = layer(momentum=momentum)
        call, graphs = compiled(norm)
        call(torch.randn(2, 3, 5))
        norm.reset_running_stats()
        with one_graph_only():
            for x in xs:
                call(x[2 * rank : 2 * rank + 2]).sin().sum().backward()
        return state(norm), graphs.frame_count

    for buffers, graphs in ranks(2, run) if world > 1 else [run(0)]:
        check(buffers, xs, momentum)
        assert graphs == 1


def test_a_device_is_not_waited_for():
    """Meta tensors have no value that could be asked for."""
    with torch.device("meta"):
        norm = layer()
        norm(torch.randn(4, 3))
    assert norm.num_batches_skipped.device.type == "meta"


def test_nothing_is_tracked_or_nothing_moves_it():
    untracked, frozen = layer(track_running_stats=False), layer().eval()
    for norm in (untracked, frozen):
        norm(torch.full((4, 3), math.inf))
        assert norm.num_batches_skipped == 0
        assert norm.num_batches_skipped.dtype == torch.int64
    sleeping = layer()
    sleeping.track_running_stats = False
    sleeping(torch.full((4, 3), math.inf))
    assert sleeping.num_batches_skipped == 0
    assert sleeping.running_var.isfinite().all()


def test_an_average_over_no_count_moves_nothing():
    """As in torch's layer."""
    norm = layer(momentum=None)
    norm.num_batches_tracked = None
    norm(torch.randn(4, 3))
    assert norm.running_mean.tolist() == [0.0] * 3
    assert norm.running_var.tolist() == [1.0] * 3


def freed(buffer):
    buffer.untyped_storage().resize_(0)
    return buffer


@pytest.mark.parametrize(
    ("name", "spoil", "text"),
    [
        ("running_mean", freed, "expected running_mean with its values in memory"),
        ("num_batches_tracked", freed, "expected num_batches_tracked with its values in memory"),
        ("running_var", lambda buffer: buffer[:2], r"expected running_var of shape \(3,\)"),
        ("running_mean", lambda buffer: buffer.int(), "expected running_mean to be a floating"),
        ("num_batches_tracked", lambda buffer: buffer.bool(), "expected num_batches_tracked as"),
    ],
)
def test_what_cannot_be_moved_is_refused_before_any_message(name, spoil, text):
    norm = layer(process_group=Silent())
    setattr(norm, name, spoil(getattr(norm, name)))
    with pytest.raises((RuntimeError, ValueError, TypeError), match=text):
        norm(torch.randn(4, 3))
    assert norm.num_batches_skipped == 0


@pytest.mark.parametrize("spoilt", [freed(torch.tensor(0)), torch.zeros(3), torch.tensor(False)])
def test_a_counter_that_cannot_count_is_refused_before_any_message(spoilt):
    norm = layer(process_group=Silent())
    norm._buffers["num_batches_skipped"] = spoilt
    with pytest.raises((RuntimeError, ValueError, TypeError), match="expected num_batches_skipped"):
        norm(torch.randn(4, 3))
    assert norm.num_batches_tracked == 0


def test_it_is_an_option_of_every_layer():
    lazy = syncbn.LazySyncBatchNorm2d(skip_nonfinite=True)
    assert lazy.skip_nonfinite
    lazy(torch.full((2, 3, 2, 2), math.inf))
    assert lazy.running_mean.eq(0).all()
    assert lazy.num_batches_skipped == 1
    assert not syncbn.SyncBatchNorm(3).skip_nonfinite
    assert dict(layer().state_dict()).keys() == dict(nn.BatchNorm1d(3).state_dict()).keys()
    norm = layer()
    norm.skip_nonfinite = True  # again
    norm(torch.full((4, 3), math.nan))
    norm.reset_running_stats()
    assert norm.num_batches_skipped == 0
    assert layer(device="meta").num_batches_skipped.is_meta


def test_convert_and_revert():
    torchs = nn.BatchNorm1d(3)
    model = syncbn.convert(nn.Sequential(torchs, layer()), skip_nonfinite=True)
    model(torch.full((2, 3), math.inf))
    assert [int(norm.num_batches_skipped) for norm in model] == [1, 1]
    assert torchs.running_mean.eq(0).all()
    assert syncbn.convert(model)[0].skip_nonfinite, "None leaves layers as they are"
    assert not syncbn.convert(model, skip_nonfinite=False)[0].skip_nonfinite
    model = syncbn.revert(syncbn.convert(model, skip_nonfinite=True))
    assert vars(model[0]).keys() == vars(nn.BatchNorm1d(3)).keys()
    assert dict(model[0].named_buffers()).keys() == dict(nn.BatchNorm1d(3).named_buffers()).keys()


@pytest.mark.parametrize(
    "through", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_keep_it(through):
    norm = layer()
    norm(torch.full((4, 3), math.inf))
    other = through(norm)
    assert other.skip_nonfinite
    assert other.num_batches_skipped == 1
    loaded = layer()
    loaded.load_state_dict(saved_and_loaded(norm.state_dict()))
    assert loaded.num_batches_skipped == 0


def test_a_traced_layer_tracks_as_without_the_option():
    norm, plain = layer(), syncbn.SyncBatchNorm(3)
    x = torch.randn(4, 3, 5)
    for traced in [torch.jit.trace(each, x, check_trace=False) for each in (norm, plain)]:
        for _ in range(3):
            traced(x)
    assert norm.num_batches_tracked == plain.num_batches_tracked > 3
    assert torch.equal(norm.running_var, plain.running_var)


def test_what_half_statistics_cannot_hold_is_not_finite():
    norm = layer(2, momentum=1.0).half()
    norm(torch.tensor([[400.0, 1.0], [-400.0, 2.0]], dtype=torch.half))
    assert (norm.num_batches_skipped, norm.num_batches_tracked) == (1, 0)
    assert norm.running_var.tolist() == [1.0, 1.0]


def test_each_statistic_in_its_own_dtype():
    norm = layer(momentum=1.0)
    norm.running_var = norm.running_var.double()
    x = torch.randn(50, 3, dtype=torch.float64) * 1e25
    norm(x)
    assert norm.num_batches_skipped == 0
    oracle.assert_close(norm.running_var / 1e50, oracle.batch_norm(x / 1e25, x).unbiased_var)
