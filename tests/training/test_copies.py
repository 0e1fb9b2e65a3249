"""What training loops copy, average and save: over ranks it is what one process would have."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import syncbn
from support.cases import CLOSE
from support.layers import saved_and_loaded

SAMPLES = 12  # of a batch of all ranks together: whole samples for 2 and for 3 ranks


def network():
    torch.manual_seed(3)
    body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten())
    return nn.Sequential(body, nn.Linear(36, 3), nn.BatchNorm1d(3, momentum=0.3)).double()


def batches(count, rank=0, world=1):
    generator = torch.Generator().manual_seed(1)
    share = slice(rank * SAMPLES // world, (rank + 1) * SAMPLES // world)
    like = {"generator": generator, "dtype": torch.float64}
    return [torch.randn(SAMPLES, 2, 5, 5, **like)[share] + step for step in range(count)]


def train(model, data, optimizer=None, after_step=lambda: None):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x in data:
        optimizer.zero_grad()
        (model(x) - 1).square().sum(1).mean().backward()
        optimizer.step()
        after_step()
    return optimizer


def wrapped():
    return DistributedDataParallel(syncbn.convert(network()))


def close(actual, expected):
    torch.testing.assert_close(actual, expected, **CLOSE)


def plain_state(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


# --- copies and averages ---------------------------------------------------------------------


def deep_copied(model):
    """The average that training loops write by hand; returns it and how to update it."""
    average = copy.deepcopy(model)

    @torch.no_grad()
    def update():
        state = model.state_dict()
        for name, mine in average.state_dict().items():
            mine.copy_(mine.lerp(state[name], 0.25) if mine.is_floating_point() else state[name])

    return average, update


def averaged(model):
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.75), use_buffers=True)
    return average, lambda: average.update_parameters(model)


@pytest.mark.parametrize("averaging", [deep_copied, averaged])
def test_a_moving_average_is_that_of_one_process(ranks, averaging):
    def run(rank):
        model = wrapped()
        average, update = averaging(model.module)
        train(model, batches(6, rank, 2), after_step=update)
        return plain_state(average), average.eval()(batches(1)[0]).detach()

    model = network()
    average, update = averaging(model)
    train(model, batches(6), after_step=update)
    expected = plain_state(average), average.eval()(batches(1)[0]).detach()
    for result in ranks(2, run):
        close(result, expected)


def test_update_bn_recomputes_the_whole_batches_statistics(ranks):
    def run(rank):
        model = wrapped()
        average = AveragedModel(model)
        train(model, batches(4, rank, 2), after_step=lambda: average.update_parameters(model))
        update_bn(batches(5, rank, 2), average)
        momenta = [m.momentum for m in average.modules() if isinstance(m, syncbn.SyncBatchNorm)]
        return plain_state(average.module.module), momenta

    model = network()
    average = AveragedModel(model)
    train(model, batches(4), after_step=lambda: average.update_parameters(model))
    update_bn(batches(5), average)
    expected = plain_state(average.module)
    assert expected["2.num_batches_tracked"] == 5
    for state, momenta in ranks(2, run):
        close(state, expected)
        assert momenta == [0.1, 0.3]


def test_a_deep_copy_of_a_wrapped_model_trains_on(ranks):
    def run(rank):
        model = wrapped()
        train(model, batches(3, rank, 2))
        other = copy.deepcopy(model)
        train(other, batches(3, rank, 2))
        return plain_state(model.module), plain_state(other.module)

    alone = network()
    train(alone, batches(3))
    first = plain_state(alone)
    train(alone, batches(3))
    for result in ranks(2, run):
        close(result, (first, plain_state(alone)))


# --- saved and loaded ------------------------------------------------------------------------


def test_a_whole_model_saves_without_its_group_and_takes_another(ranks):
    """Ranks 0, 1 have a group of their own, which a file cannot hold."""

    def run(rank):
        pairs = [dist.new_group([0, 1]), dist.new_group([2])]
        model = syncbn.convert(network(), pairs[rank // 2])
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loaded = saved_and_loaded(model, weights_only=False)
        layers = [m for m in loaded.modules() if isinstance(m, syncbn.SyncBatchNorm)]
        groups = [layer.process_group for layer in layers]
        for layer in layers:
            layer.process_group = pairs[rank // 2]
        x = batches(1)[0] * (rank + 1)
        close(loaded(x), model(x))
        close(plain_state(loaded), plain_state(model))
        kinds = [type(m) for m in syncbn.revert(loaded).modules()]
        return [str(w.message) for w in caught], groups, kinds

    for messages, groups, kinds in ranks(3, run):
        assert len(messages) == 2
        assert all("pickled without its process group" in text for text in messages)
        assert groups == [None, None]
        assert kinds == [type(m) for m in network().modules()]


def save(rank, folder):
    """Three ranks train and save, in shares, one distributed checkpoint."""
    model = wrapped()
    optimizer = train(model, batches(3, rank, 3))
    parts = get_state_dict(model, optimizer)
    dcp.save(dict(zip(("model", "optimizer"), parts, strict=True)), checkpoint_id=folder)
    return plain_state(model.module)


def resume(folder, model, data, **how):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    parts = get_state_dict(model, optimizer)
    state = dict(zip(("model", "optimizer"), parts, strict=True))
    dcp.load(state, checkpoint_id=folder, **how)
    model_state, optimizer_state = state.values()
    set_state_dict(model, optimizer, model_state_dict=model_state, optim_state_dict=optimizer_state)
    train(model, data, optimizer)
    return plain_state(getattr(model, "module", model))


def test_a_distributed_checkpoint_loads_on_any_number_of_ranks(ranks, tmp_path):
    """Saved on three ranks; training goes on with two, and with one process and plain layers."""
    ranks(3, save, tmp_path)
    alone = network()
    optimizer = train(alone, batches(3))
    train(alone, batches(2), optimizer)
    expected = plain_state(alone)
    for state in ranks(2, lambda rank: resume(tmp_path, wrapped(), batches(2, rank, 2))):
        close(state, expected)
    for model in (network(), syncbn.convert(network())):
        close(resume(tmp_path, model, batches(2), no_dist=True), expected)


# --- functional ------------------------------------------------------------------------------


def split(model):
    parameters = {name: p.detach().clone() for name, p in model.named_parameters()}
    return parameters, {name: b.clone() for name, b in model.named_buffers()}


def test_functional_call_moves_the_buffers_it_is_given(ranks):
    """Over ranks, with gradients by autograd."""

    def step(model, x):
        parameters, buffers = split(model)
        untouched = plain_state(model)
        for parameter in parameters.values():
            parameter.requires_grad_()
        loss = functional_call(model, (parameters, buffers), (x,)).pow(3).sum()
        gradients = torch.autograd.grad(loss, list(parameters.values()))
        close(plain_state(model), untouched)
        return gradients, buffers

    def run(rank):
        return step(syncbn.convert(network()), batches(1, rank, 2)[0])

    gradients, buffers = step(network(), batches(1)[0])
    results = ranks(2, run)
    close(tuple(map(sum, zip(*(r[0] for r in results), strict=True))), gradients)
    for result in results:
        close(result[1], buffers)


# torch's own layer moves its running statistics in place, which vmap refuses: eval mode there.
TRANSFORMS = [(t, mode) for t in ("grad", "jacrev", "hessian") for mode in (True, False)]


@pytest.mark.parametrize(("transform", "training"), [*TRANSFORMS, ("grad per sample", False)])
def test_functional_transforms_on_one_process_are_torchs(transform, training):
    x = batches(1)[0]

    def outcome(model):
        parameters, buffers = split(model.train(training))

        def loss(bias, x):
            moved = {name: buffer.clone() for name, buffer in buffers.items()}
            y = functional_call(model, (parameters | {"2.bias": bias}, moved), (x,))
            return y.pow(3).sum(), moved

        bias = parameters["2.bias"]
        if transform == "grad":
            return torch.func.grad(loss, argnums=(0, 1), has_aux=True)(bias, x)
        if transform == "jacrev":
            return torch.func.jacrev(loss, has_aux=True)(bias, x)
        if transform == "hessian":
            return torch.func.hessian(lambda bias: loss(bias, x)[0])(bias)
        per_sample = torch.func.grad(lambda bias, x: loss(bias, x)[0])
        return torch.vmap(per_sample, in_dims=(None, 0))(bias, x.unsqueeze(1))

    close(outcome(syncbn.convert(network())), outcome(network()))
