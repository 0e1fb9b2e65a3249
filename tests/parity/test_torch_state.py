"""torch.nn's batch norms against ours: state dicts of every version both ways, and resets."""

import copy

import pytest
import torch

from support.layers import CLASSES, LAZY, PLAIN, classes, identical, pair, saved_and_loaded


@pytest.mark.parametrize("track", [True, False])
@pytest.mark.parametrize("other", CLASSES)
@pytest.mark.parametrize("ours", PLAIN)
def test_state_dicts_interchange(ours, other, track):
    for source, target in ((ours, other), (other, ours)):
        saved = source(3, track_running_stats=track)
        for tensor in saved.state_dict().values():
            tensor.add_(torch.randint(1, 9, tensor.shape))
        loaded = target(3, track_running_stats=track)
        loaded.load_state_dict(saved_and_loaded(saved.state_dict()))
        identical(dict(loaded.state_dict()), dict(saved.state_dict()))
        assert list(loaded.state_dict()) == list(saved.state_dict())
        assert loaded.state_dict()._metadata == saved.state_dict()._metadata


def outcome(layer, state):
    """What loading does: the report, or the error's class and text, and the state afterwards."""
    try:
        report = tuple(layer.load_state_dict(copy.deepcopy(state), strict=True))
    except RuntimeError as error:
        report = str(error).replace(type(layer).__name__, "layer")
    return report, dict(layer.state_dict())


@pytest.mark.parametrize("change", ["nothing", "num_batches_tracked", "bias", "weight", "shape"])
@pytest.mark.parametrize("version", [None, 1, 2])
@pytest.mark.parametrize("track", [True, False])
@classes
def test_state_dicts_of_every_version(torchs, ours, track, version, change):
    """Before version 2 num_batches_tracked did not exist, and its absence is no error."""
    state = torchs(3).state_dict()
    for number, tensor in enumerate(state.values()):
        tensor.add_(number + 1)
    if version is None:
        del state._metadata
    else:
        state._metadata[""]["version"] = version
    if change == "shape":
        state["weight"] = torch.ones(4)
    elif change != "nothing":
        del state[change]
    report, after = outcome(ours(3, track_running_stats=track), state)
    torchs_report, torchs_after = outcome(torchs(3, track_running_stats=track), state)
    assert report == torchs_report
    identical(after, torchs_after)


@pytest.mark.parametrize(("torchs", "ours"), LAZY.items())
def test_state_dicts_of_version_1_and_lazy_layers(torchs, ours):
    state = {name: torch.full((3,), 2.0) for name in ("weight", "bias")}
    state |= {name: torch.full((3,), 3.0) for name in ("running_mean", "running_var")}
    mine, theirs = ours(), torchs()
    for layer in (mine, theirs):
        layer.load_state_dict(dict(state))
    identical(dict(mine.state_dict()), dict(theirs.state_dict()))
    assert mine.num_batches_tracked == 0
    x = torch.randn({"1d": (4, 3), "2d": (4, 3, 2, 2), "3d": (4, 3, 2, 2, 2)}[torchs.__name__[-2:]])
    mine(x)
    assert mine.num_batches_tracked == 1


@pytest.mark.parametrize("track", [True, False])
def test_resets(track):
    mine, theirs = pair(4, track_running_stats=track)
    for layer in (mine, theirs):
        torch.manual_seed(1)
        layer(torch.randn(4, 3, 2, 2))
        layer.reset_running_stats()
    identical(dict(mine.state_dict()), dict(theirs.state_dict()))
    for layer in (mine, theirs):
        layer(torch.randn(4, 3, 2, 2))
        layer.reset_parameters()
    identical(dict(mine.state_dict()), dict(theirs.state_dict()))
