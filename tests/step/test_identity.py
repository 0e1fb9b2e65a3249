"""Which layer a call is of: names where convert() met it, else class and number."""

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
import torch.nn as nn

import syncbn
from syncbn.step.identity import identity_of


def network():
    return nn.Sequential(nn.BatchNorm1d(2), nn.ModuleDict({"norm": nn.BatchNorm2d(3)}))


def numbers(*layers):
    kinds, counted = zip(*(identity_of(layer).split() for layer in layers), strict=True)
    assert kinds == tuple(type(layer).__name__ for layer in layers)
    return [int(number) for number in counted]


def test_convert_gives_names():
    model = syncbn.convert(network())
    assert identity_of(model[0]) == "0"
    assert identity_of(model[1]["norm"]) == "1.norm"


def test_a_later_convert_of_the_whole_gives_the_whole_name():
    part = syncbn.convert(network())
    model = syncbn.convert(nn.ModuleDict({"backbone": part}))
    assert identity_of(part[0]) == "backbone.0"
    assert identity_of(model.backbone[1]["norm"]) == "backbone.1.norm"


def test_a_later_convert_of_a_part_says_less():
    model = syncbn.convert(nn.ModuleDict({"backbone": network()}))
    syncbn.convert(model.backbone)
    assert identity_of(model.backbone[1]["norm"]) == "backbone.1.norm"


def test_layers_that_became_ours_by_hand():
    layer = nn.BatchNorm1d(2)
    layer.__class__ = syncbn.SyncBatchNorm1d
    assert numbers(layer) == numbers(layer)
    layer.process_group = Gone("all_gather")
    with pytest.raises(RuntimeError, match="in layer 'SyncBatchNorm1d "):
        layer(torch.randn(4, 2))


def test_layers_without_a_name_are_numbered_as_they_are_made():
    first, second = syncbn.SyncBatchNorm2d(3), syncbn.LazySyncBatchNorm1d()
    alone = syncbn.convert(nn.BatchNorm1d(2))  # the model itself: no name
    n, *others = numbers(first, second, alone)
    assert others == [n + 1, n + 2]


def test_copies_of_a_named_layer_keep_its_name():
    layer = syncbn.convert(network())[0]
    for other in copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert identity_of(other) == "0"


def test_copies_of_a_numbered_layer_are_layers_of_their_own():
    layer = syncbn.SyncBatchNorm1d(2)
    copies = copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
    n, *others = numbers(layer, *copies)
    assert others == [n + 1, n + 2, n + 3]


def test_replicas_are_the_layer():
    layer = syncbn.SyncBatchNorm1d(2)
    assert identity_of(layer._replicate_for_data_parallel()) == identity_of(layer)


def test_revert_leaves_nothing():
    model = syncbn.revert(syncbn.convert(network()))
    assert vars(model[0]).keys() == vars(network()[0]).keys()


class Gone(syncbn.comm.Communicator):
    """Two ranks, of which the other one ends."""

    rank, size = 0, 2

    def __init__(self, gone):
        self.gone = gone

    def all_gather(self, tensor):
        if self.gone == "all_gather":
            raise RuntimeError("rank 1 is gone")
        return tensor.expand(2, *tensor.shape).clone()

    def all_reduce(self, tensor):
        if self.gone == "all_reduce":
            raise RuntimeError("rank 1 is gone")
        return tensor * 2


@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("gone", ["all_gather", ""])
def test_errors_of_an_exchange_name_the_layer(gone, reproducible):
    layer = syncbn.convert(network(), Gone(gone), reproducible=reproducible)[0]

    def step():
        y = layer(torch.randn(4, 2))
        layer.process_group.gone = "all_gather" if reproducible else "all_reduce"
        y.sum().backward()

    with pytest.raises(RuntimeError, match=r"^rank 1 is gone; in layer '0'$"):
        step()


@pytest.mark.parametrize("gone", ["all_gather", "all_reduce"])
def test_errors_of_an_exchange_that_is_differentiated_name_the_layer(gone):
    layer = syncbn.convert(network(), Gone(""))[0]
    x = torch.randn(4, 2, requires_grad=True)
    y = layer(x)
    layer.process_group.gone = gone
    with pytest.raises(RuntimeError, match="in layer '0'"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_errors_within_a_transform_name_the_layer():
    layer = syncbn.convert(network(), Gone("all_gather"))[0]
    layer.track_running_stats = False
    with pytest.raises(RuntimeError, match="in layer '0'"):
        torch.func.grad(lambda x: layer(x).sum())(torch.randn(4, 2))


def test_errors_that_hold_no_words_stay_as_they_are():
    class OfNumbers(Gone):
        def all_gather(self, tensor):
            raise RuntimeError(7)

    layer = syncbn.SyncBatchNorm1d(2, process_group=OfNumbers(""))
    with pytest.raises(RuntimeError) as caught:
        layer(torch.randn(4, 2))
    assert caught.value.args == (7,)


def test_the_function_is_known_as_itself():
    with pytest.raises(RuntimeError, match="in layer 'sync_batch_norm'"):
        syncbn.sync_batch_norm(torch.randn(4, 2), None, None, group=Gone("all_gather"))


@pytest.mark.parametrize("operation", ["all_gather", "all_reduce"])
def test_a_communicator_that_lies_about_its_size(operation):
    class Liar(Gone):
        def all_gather(self, tensor):
            return tensor.expand(3 if operation == "all_gather" else 2, *tensor.shape).clone()

        def all_reduce(self, tensor):
            return tensor.sum()

    def step():
        layer = syncbn.SyncBatchNorm1d(2, process_group=Liar(""))
        layer(torch.randn(4, 2, requires_grad=True)).sum().backward()

    said = (
        rf"^Liar: expected {operation} among its 2 ranks to return shape .* on rank 0; .*in layer"
    )
    with pytest.raises(RuntimeError, match=said):
        step()


WRONG = {
    "dimensions": torch.ones(2, 3, 4, 5, 6),
    "channels": torch.ones(2, 4),
    "dtype": torch.ones(2, 3, dtype=torch.int32),
    "one value": torch.ones(1, 3),
    "no tensor": [1.0],
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", WRONG)
def test_refusals_name_the_layer_in_the_model_that_runs_it(case, training):
    if case == "one value" and not training:
        pytest.skip("one value is enough in eval mode")
    layers = syncbn.SyncBatchNorm1d(3), syncbn.LazySyncBatchNorm1d(), nn.BatchNorm1d(3)
    for layer in layers:
        model = nn.Sequential(nn.Identity(), nn.ModuleDict({"norm": layer}).norm).train(training)
        if type(layer) is nn.BatchNorm1d:
            syncbn.convert(model)
            model = model[1]  # known by convert's name, whatever runs it
        elif "Lazy" in type(layer).__name__ and case == "channels":
            continue  # which it takes them from
        with pytest.raises((TypeError, ValueError), match=r"; in layer '1'$"):
            model(WRONG[case])
    with pytest.raises((TypeError, ValueError)) as caught:
        syncbn.SyncBatchNorm1d(3).train(training)(WRONG[case])  # in no model
    assert "in layer" not in str(caught.value)


def test_refusals_of_masks_name_the_layer_once():
    model = syncbn.convert(network())
    with pytest.raises(ValueError, match=r"one mask serves all channels; in layer '0'$"):
        model[0](torch.ones(2, 2), torch.ones(3, dtype=torch.bool))
    with (
        syncbn.masking(model, torch.ones(3, dtype=torch.bool)),
        pytest.raises(ValueError, match=r"^masking: layer '0': ") as caught,
    ):
        model[0](torch.ones(2, 2))
    assert str(caught.value).count("layer '0'") == 1


def test_other_ranks_hear_which_layer_refused(ranks):
    def run(rank):
        model = syncbn.convert(network(), dist.new_group())  # which ends
        with pytest.raises((ValueError, RuntimeError)) as caught:
            model[0](torch.ones(4, 2 + rank))
        return str(caught.value)

    told, refused = ranks(2, run)
    assert "rank 1 gave up" in told
    for text in told, refused:
        assert "must equal the layer's num_features; in layer '0'" in text


def test_what_this_process_is_shown_is_not_what_ranks_compare():
    layer = syncbn.SyncBatchNorm1d(3)
    before = identity_of(layer)
    with pytest.raises(ValueError, match="in layer '1'"):
        nn.Sequential(nn.Identity(), layer)(torch.ones(2, 4))
    assert identity_of(layer) == before


class Down(syncbn.comm.Communicator):
    rank, size = 0, 2

    def all_gather(self, tensor):
        raise RuntimeError("link down")

    all_reduce = all_gather


def test_a_failed_message_names_its_layer_once():
    """Which spoke by itself before a model had it: of its two names the one that ranks compare."""
    layer = syncbn.SyncBatchNorm1d(3, process_group=Down())
    for model in (layer, nn.Sequential(layer)):
        with pytest.raises(RuntimeError, match="link down") as caught:
            model(torch.randn(4, 3))
        assert str(caught.value).count("in layer") == 1
