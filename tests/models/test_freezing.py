"""freeze(): running statistics are used and stay, through all that happens to a model."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support.layers import LAZY, assert_same, classes, saved_and_loaded, snapshot
from syncbn.models.freezing import is_frozen


def network(convert: bool = False) -> nn.Module:
    torch.manual_seed(3)
    body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    model = nn.Sequential(body, nn.Flatten(), nn.Linear(36, 3), nn.BatchNorm1d(3)).double()
    for layer in (body[1], model[3]):
        nn.init.normal_(layer.running_mean)
        nn.init.uniform_(layer.running_var, 0.5, 2.0)
        nn.init.normal_(layer.weight)
    return syncbn.convert(model) if convert else model


def batch() -> torch.Tensor:
    return torch.randn(6, 2, 5, 5, dtype=torch.float64, generator=torch.manual_seed(1))


def assert_frozen(model: nn.Module, expected: nn.Module) -> None:
    """In train mode it computes what ``expected`` does in eval mode, and its statistics stay."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    y = model.train()(batch())
    torch.testing.assert_close(y, expected.eval()(batch()))
    assert before.keys() == expected.state_dict().keys()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("convert", [False, True])
def test_running_statistics_are_used_and_stay_through_train(convert):
    model = network(convert)
    assert syncbn.freeze(model) is model
    assert model.training
    assert not model[3].training
    assert_frozen(model, network())
    assert model[0].training
    assert not model.train()[3].training


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": lambda model: nn.Sequential(*(copy.copy(part) for part in model)),
    "pickle": lambda model: saved_and_loaded(model, weights_only=False),
    "convert": syncbn.convert,
    "revert": lambda model: syncbn.revert(syncbn.convert(model)),
    "a state dict": lambda model: [model, model.load_state_dict(network().state_dict())][0],
    "train and eval": lambda model: model.eval().train(),
    "to": lambda model: model.float().double(),
}


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("how", COPIES)
def test_it_survives(how, convert):
    model = COPIES[how](syncbn.freeze(network(convert)))
    assert_frozen(model, network())
    syncbn.unfreeze(model).train()(batch())
    assert model[3].num_batches_tracked == 1


def test_a_copy_thaws_by_itself():
    model = syncbn.freeze(network(), affine=True)
    other = syncbn.unfreeze(copy.deepcopy(model))
    other.train()(batch())
    assert other[3].num_batches_tracked == 1
    assert other[3].weight.requires_grad
    assert_frozen(model, network())
    assert not model[3].weight.requires_grad


def test_a_pickle_names_syncbn_alone():
    frozen = vars(syncbn.freeze(nn.BatchNorm1d(3)))["train"]
    assert (type(frozen).__module__, type(frozen).__qualname__) == ("syncbn", "_Frozen")


@pytest.mark.parametrize("convert", [False, True])
def test_unfreeze_leaves_no_trace(convert):
    model = network(convert)
    model[0][1].weight.requires_grad_(False)
    model[3].eval()
    before = snapshot(model)
    syncbn.unfreeze(syncbn.freeze(model, affine=True))
    assert_same(before, snapshot(model))
    assert [p.requires_grad for p in model.parameters()] == [True, True, False, *[True] * 5]
    assert not model[3].training
    assert model[0][1].training


def test_an_unfrozen_layer_is_in_the_mode_that_it_was_told_last():
    layer = syncbn.freeze(nn.BatchNorm1d(3))
    assert not syncbn.unfreeze(layer.eval()).training
    assert syncbn.unfreeze(syncbn.freeze(layer).train()).training


def test_affine_stops_gradients_of_weight_and_bias():
    model = syncbn.freeze(network(True), affine=True)
    model(batch()).sum().backward()
    wanting = [name for name, p in model.named_parameters() if p.grad is not None]
    assert wanting == ["0.0.weight", "0.0.bias", "2.weight", "2.bias"]
    syncbn.freeze(model, affine=True)  # once more: what was before is what was before
    assert all(p.requires_grad for p in syncbn.unfreeze(model).parameters())


def test_without_affine_gradients_are_those_of_eval_mode():
    model, expected = syncbn.freeze(network(True)), network().eval()
    for each in (model, expected):
        each(batch()).pow(2).sum().backward()
    for mine, its in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, its.grad)


def test_where_chooses_by_name():
    asked = []
    model = syncbn.freeze(network(), lambda name, layer: asked.append(name) or name == "3")
    assert asked == ["0.1", "3"]
    assert [is_frozen(model[0][1]), is_frozen(model[3])] == [False, True]
    model.train()(batch())
    assert model[0][1].num_batches_tracked == 1
    syncbn.freeze(model)
    syncbn.unfreeze(model, lambda name, layer: name == "3")
    assert [is_frozen(model[0][1]), is_frozen(model[3])] == [True, False]


def test_a_shared_layer_is_chosen_by_any_of_its_names():
    layer = nn.BatchNorm1d(3)
    model = nn.ModuleDict({"a": layer, "b": layer})
    syncbn.freeze(model, lambda name, layer: name == "b")
    assert is_frozen(layer)


class WithActivation(nn.BatchNorm2d):
    """As timm's: the dropout within follows the mode."""

    def __init__(self, channels):
        super().__init__(channels)
        self.drop = nn.Dropout()

    def forward(self, x):
        return self.drop(super().forward(x))


def test_what_a_layer_holds_follows_the_mode():
    layer = syncbn.freeze(WithActivation(3))
    assert layer.train() is layer
    assert layer.drop.training
    assert not layer.training
    assert not layer.eval().drop.training


@classes
def test_every_class(torchs, ours):
    for cls in (torchs, ours):
        layer = syncbn.freeze(cls(3)).train()
        assert not layer.training
        assert is_frozen(layer)


@pytest.mark.parametrize("cls", [nn.LazyBatchNorm2d, *LAZY.values()])
def test_a_lazy_layer_stays_frozen_when_it_sees_its_input(cls):
    layer = syncbn.freeze(cls())
    shape = {"1d": (4, 3), "3d": (4, 3, 2, 2, 2)}.get(cls.__name__[-2:], (4, 3, 2, 2))
    layer.train()(torch.randn(shape) + 5)
    assert is_frozen(layer)
    assert not layer.running_mean.any()
    assert "Lazy" not in type(layer).__name__


@pytest.mark.parametrize("cls", [nn.LazyBatchNorm1d, syncbn.LazySyncBatchNorm1d])
def test_weight_and_bias_of_a_lazy_layer_stop_before_they_have_a_size(cls):
    layer = syncbn.freeze(cls(), affine=True)
    layer.train()(torch.randn(4, 3))
    assert layer.weight.shape == (3,)
    assert not layer.weight.requires_grad
    assert not layer.bias.requires_grad
    assert syncbn.unfreeze(layer).weight.requires_grad
    layer = syncbn.unfreeze(syncbn.freeze(cls(), affine=True))
    assert layer.bias.requires_grad


@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}, {"bias": False}])
def test_every_option(options):
    layer = syncbn.freeze(syncbn.SyncBatchNorm1d(3, **options), affine=True)
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer.train()(x), x, rtol=1e-4, atol=1e-5)
    syncbn.unfreeze(layer)(x)
    assert layer.num_batches_tracked == 1


def test_under_ddp_no_layer_says_anything(ranks):
    def run(rank):
        model = syncbn.freeze(network(True), affine=True)
        ddp = DistributedDataParallel(model)
        ddp.train()
        if rank == 0:  # the others would wait for ever
            model(batch())
        ddp(batch()).sum().backward()
        return model.state_dict()

    expected = network().state_dict()
    for state in ranks(2, run):
        assert all(torch.equal(state[name], value) for name, value in expected.items())


def test_a_frozen_model_scripts_and_exports():
    model = syncbn.freeze(network())
    torch._dynamo.reset()  # other tests' graphs count towards its limit
    for program in (
        torch.jit.script(model),
        torch.export.export(model, (batch(),)).module(),
        torch.compile(model, backend="eager", fullgraph=True),
    ):
        torch.testing.assert_close(program(batch()), network().eval()(batch()))


def test_a_model_without_batch_norm_is_left_as_it_is():
    model = nn.Linear(2, 2)
    assert syncbn.unfreeze(syncbn.freeze(model, affine=True)) is model
    assert model.weight.requires_grad
    assert model.training


def test_layers_without_statistics_are_refused_by_name():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    with pytest.raises(ValueError, match=r"freeze: .* \(track_running_stats=False\): 1; leave"):
        syncbn.freeze(model)
    assert not is_frozen(model[0])
    syncbn.freeze(model, lambda name, layer: name == "0")


@pytest.mark.parametrize("function", [syncbn.freeze, syncbn.unfreeze])
def test_wrong_arguments(function):
    with pytest.raises(TypeError, match=r"expected a torch.nn.Module, got list"):
        function([])
    with pytest.raises(TypeError, match="freeze: expected where to be a function"):
        function(nn.BatchNorm1d(2), "backbone")
