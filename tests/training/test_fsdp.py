"""fully_shard and meshes: sharded training equals one process on the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

import syncbn
from support.layers import assert_normalised_together, watch
from support.training import assert_same_state, batches, network, share, train

STEPS = 6


def nested(dtype: torch.dtype = torch.float64) -> nn.Module:
    """Two blocks to shard each on its own."""
    layers = list(network().to(dtype))
    return nn.Sequential(nn.Sequential(*layers[:3]), nn.Sequential(*layers[3:6]), *layers[6:])


def sharded(model: nn.Module, mesh, **options: object) -> nn.Module:
    for block in model[:2]:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict, gathered."""
    state = model.state_dict()
    return {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in state.items()}


def alone(data) -> dict[str, torch.Tensor]:
    model = nested()
    train(model, data)
    return model.state_dict()


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("reshard", [True, False])
def test_training_equals_one_process(ranks, world, when, reshard):
    def run(rank):
        model, mesh = nested(), init_device_mesh("cpu", (world,))
        if when == "before":
            syncbn.convert(model)
        sharded(model, mesh, reshard_after_forward=reshard)
        if when == "after":
            syncbn.convert(model)
        assert type(model[0][1]) is syncbn.SyncBatchNorm2d
        train(model, share(rank, 12 // world, batches(12)[:STEPS]))
        return whole(model)

    assert_same_state(ranks(world, run), alone(batches(12)[:STEPS]))


@pytest.mark.parametrize("when", ["before", "after"])
def test_layers_sharded_on_their_own(ranks, when):
    """fully_shard(layer) puts FSDPModule in front of the layer's class."""

    def run(rank):
        model, mesh = nested(), init_device_mesh("cpu", (2,))
        if when == "before":
            syncbn.convert(model)
        for layer in (model[0][1], model[1][1]):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if when == "after":
            syncbn.convert(model)
            assert type(model[0][1]) is type(model[1][1]), "one class, as fully_shard has it"
        assert isinstance(model[0][1], syncbn.SyncBatchNorm2d)
        train(model, share(rank, 3, batches(6)[:STEPS]))
        state = whole(model)
        if when == "after":
            syncbn.revert(model)
            assert not isinstance(model[0][1], syncbn.SyncBatchNorm)
            assert type(model[0][1]).__name__ == "FSDPBatchNorm2d"
        return state

    assert_same_state(ranks(2, run), alone(batches(6)[:STEPS]))


@pytest.mark.parametrize("group", ["default", "flattened"])
def test_hybrid_sharding_with_statistics_of_all_ranks(ranks, group):
    def run(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        over = None if group == "default" else mesh._flatten("all")
        model = sharded(syncbn.convert(nested(), over), mesh)
        train(model, share(rank, 3, batches(12)[:STEPS]))
        return whole(model)

    assert_same_state(ranks(4, run), alone(batches(12)[:STEPS]))


@pytest.mark.parametrize("group", ["mesh", "group_size"])
def test_hybrid_sharding_with_statistics_of_each_shard_group(ranks, group):
    """Ranks 0, 1 and 2, 3 normalise apart; parameters are everybody's, running statistics not."""

    def run(rank):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        over = {"process_group": mesh["shard"]} if group == "mesh" else {"group_size": 2}
        model = sharded(syncbn.convert(nested(), **over), mesh)
        train(model, share(rank, 3, batches(12)[:STEPS]))
        return whole(model)

    halves = [nested(), nested()]
    optimizers = [torch.optim.SGD(half.parameters(), lr=0.1, momentum=0.9) for half in halves]
    for x, target in batches(12)[:STEPS]:
        for number, half in enumerate(halves):
            half.zero_grad()
            mine = slice(6 * number, 6 * number + 6)
            nn.functional.cross_entropy(half(x[mine]), target[mine]).backward()
        for pair in zip(*(half.parameters() for half in halves), strict=True):
            mean = (pair[0].grad + pair[1].grad) / 2
            for parameter in pair:
                parameter.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
    states = ranks(4, run)
    for number, half in enumerate(halves):
        assert_same_state(states[2 * number : 2 * number + 2], half.state_dict())


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
def test_mixed_precision(ranks, half):
    """Parameters and inputs in half; statistics of the whole batch, running ones in float32."""

    def run(rank):
        policy = MixedPrecisionPolicy(param_dtype=half, reduce_dtype=torch.float32)
        mesh = init_device_mesh("cpu", (2,))
        model = sharded(syncbn.convert(nested(torch.float32)), mesh, mp_policy=policy)
        seen = watch(model[0][1])
        data = [(x.float(), target) for x, target in share(rank, 3, batches(6)[:STEPS])]
        train(model, data[:1])
        first = copy.deepcopy(seen)
        train(model, data[1:])
        return first, whole(model)

    results = ranks(2, run)
    assert_normalised_together([seen for seen, _ in results], dtype=half)
    model = nested()
    train(model, batches(6)[:1])
    train(model, batches(6)[1:STEPS])
    for _, state in results:
        for name, value in model.state_dict().items():
            assert state[name].dtype == (torch.int64 if "num" in name else torch.float32)
            torch.testing.assert_close(
                state[name].to(value.dtype), value, rtol=0.1, atol=0.1, msg=name
            )


def test_offloaded_parameters(ranks):
    """On a CPU mesh parameters already live on the CPU: what is left is that it changes nothing."""

    def run(rank):
        model = sharded(
            syncbn.convert(nested()),
            init_device_mesh("cpu", (2,)),
            offload_policy=CPUOffloadPolicy(pin_memory=False),
        )
        train(model, share(rank, 3, batches(6)[:STEPS]))
        return whole(model)

    assert_same_state(ranks(2, run), alone(batches(6)[:STEPS]))


def test_group_size(ranks):
    """Groups of consecutive ranks, made once; 1 is local, the world's size the default group."""

    def run(rank):
        sizes = {k: syncbn.convert(nn.BatchNorm1d(2), group_size=k) for k in (1, 2, 4)}
        again = syncbn.convert(nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)), group_size=2)
        assert again[0].process_group is again[1].process_group is sizes[2].process_group
        assert dist.get_process_group_ranks(again[0].process_group) == [
            rank // 2 * 2,
            rank // 2 * 2 + 1,
        ]
        moved = syncbn.convert(again, group_size=4)
        assert moved[0].process_group is None
        x = torch.full((1, 2), float(rank)).double() + torch.tensor([[0.0], [4.0]])
        for layer in sizes.values():
            layer.double()(x)
        assert "group_size=1" in repr(sizes[1])
        return {k: layer.running_mean[0].item() * 10 for k, layer in sizes.items()}

    for rank, means in enumerate(ranks(4, run)):
        expected = {1: rank + 2, 2: rank // 2 * 2 + 2.5, 4: 3.5}
        assert means == pytest.approx(expected)


def test_group_sizes_that_do_not_fit(ranks):
    def run(rank):
        def message(**options):
            with pytest.raises((ValueError, TypeError)) as caught:
                syncbn.convert(nn.BatchNorm1d(2), **options)
            return f"{caught.type.__name__}: {caught.value}"

        return (
            message(group_size=3),
            message(group_size=0),
            message(group_size=2.0),
            message(group_size=2, process_group=dist.group.WORLD),
        )

    for rank, (three, zero, number, both) in enumerate(ranks(4, run)):
        assert three.startswith(
            f"ValueError: group_size: expected a divisor of the world size 4, got 3 on rank {rank};"
            " pass one of 1, 2, 4, or process_group="
        )
        assert "got 0" in zero
        assert number == "TypeError: group_size: expected a number of ranks, got float"
        assert "expected one of process_group, group_size and samples, got process_group=" in both


def test_group_size_without_ranks():
    with pytest.raises(ValueError, match=r"group_size: got 2, but .*init_process_group first"):
        syncbn.convert(nn.BatchNorm1d(2), group_size=2)
