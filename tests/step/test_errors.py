"""Bad input: the error's class, and a text that says operation, expected, got and remedy.

What one process can show; ranks that disagree are in the tests with several ranks.
"""

import numpy
import pytest
import torch
from torch import nn

import syncbn
from support.layers import Silent
from syncbn.comm import Communicator

GROUPS = {"alone": None, "in a group": Silent()}
LAYERS = [syncbn.SyncBatchNorm, syncbn.SyncBatchNorm2d, syncbn.LazySyncBatchNorm2d]
LAYERS += [syncbn.LazySyncBatchNorm]
in_and_out = pytest.mark.parametrize("group", GROUPS.values(), ids=GROUPS)


def function(x, group, training, **tensors):
    return syncbn.sync_batch_norm(x, None, None, training=training, group=group, **tensors)


def layer_of(cls, **options):
    return cls(**options) if "Lazy" in cls.__name__ else cls(3, **options)


def x4d():
    return torch.randn(4, 3, 2, 2)


# input, error, and what the text names: expected, got, remedy
INPUTS = {
    "list": ([[1.0]], TypeError, "expected a torch.Tensor", "got list"),
    "none": (None, TypeError, "expected a torch.Tensor", "got NoneType"),
    "array": (numpy.ones((4, 3, 2, 2)), TypeError, "expected a torch.Tensor", "got ndarray"),
    "integer": (x4d().int(), TypeError, "floating-point", "got torch.int32", "input.float()"),
    "long": (x4d().long(), TypeError, "floating-point", "got torch.int64", "input.float()"),
    "bool": (x4d() > 0, TypeError, "floating-point", "got torch.bool", "input.float()"),
    "complex": (x4d().cfloat(), TypeError, "floating-point", "got torch.complex64"),
    "scalar": (torch.tensor(1.0), ValueError, "(got 0D input)", "(N, C", "shape ()"),
    "vector": (torch.ones(3), ValueError, "(got 1D input)", "(N, C", "shape (3,)"),
    "no channels": (x4d()[:, :0], ValueError, "non-zero", "(4, 0, 2, 2)", "dimension 1"),
}


@in_and_out
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("call", [function, *LAYERS], ids=lambda call: call.__name__)
@pytest.mark.parametrize("case", INPUTS)
def test_wrong_inputs(case, call, training, group):
    x, error, *texts = INPUTS[case]
    if call is not function:
        layer = layer_of(call, process_group=group).train(training)
    with pytest.raises(error) as caught:
        function(x, group, training) if call is function else layer(x)
    text = str(caught.value)
    assert text.startswith(("sync_batch_norm: ", "SyncBatchNorm", "LazySyncBatchNorm"))
    assert all(part in text for part in texts), text


@in_and_out
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("affine", "stats"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("channels", [1, 2, 4])
def test_an_input_of_other_channels_than_the_layer(channels, affine, stats, training, group):
    options = {"affine": affine, "track_running_stats": stats, "process_group": group}
    layer = syncbn.SyncBatchNorm2d(3, **options).train(training)
    with pytest.raises(ValueError, match=r"^sync_batch_norm: expected \w+ of shape") as caught:
        layer(torch.randn(4, channels, 2, 2))
    text = str(caught.value)
    for part in (f"({channels},)", f"(4, {channels}, 2, 2)", "got (3,)", "num_features"):
        assert part in text


@in_and_out
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("wrong", [(2,), (4,), (), (3, 1), (1, 3), (0,)])
def test_parameters_and_statistics_of_the_wrong_size(name, wrong, training, group):
    tensors = {key: torch.ones(3) for key in ("running_mean", "running_var", "weight", "bias")}
    tensors[name] = torch.ones(wrong)
    layer = syncbn.SyncBatchNorm2d(3, process_group=group).train(training)
    for key, value in tensors.items():
        setattr(layer, key, nn.Parameter(value) if key in ("weight", "bias") else value)
    for call in (
        lambda: syncbn.sync_batch_norm(x4d(), **tensors, training=training, group=group),
        lambda: layer(x4d()),
    ):
        with pytest.raises(ValueError, match=rf"^sync_batch_norm: expected {name} ") as caught:
            call()
        text = str(caught.value)
        assert "of shape (3,)" in text
        assert f"got {wrong}; " in text


@in_and_out
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_parameters_and_statistics_that_are_no_tensors(name, training, group):
    tensors = {key: torch.ones(3) for key in ("running_mean", "running_var", "weight", "bias")}
    tensors[name] = numpy.ones(3)
    with pytest.raises(TypeError, match=f"^sync_batch_norm: expected {name} .*got ndarray; use "):
        syncbn.sync_batch_norm(x4d(), **tensors, training=training, group=group)


@in_and_out
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["mean", "var"])
def test_one_running_statistic_without_the_other(name, training, group):
    layer = syncbn.SyncBatchNorm2d(3, process_group=group)
    setattr(layer, "running_var" if name == "mean" else "running_mean", None)
    statistics = {"running_mean": layer.running_mean, "running_var": layer.running_var}
    for call in (
        lambda: syncbn.sync_batch_norm(x4d(), **statistics, training=training, group=group),
        lambda: layer.train(training)(x4d()),
    ):
        with pytest.raises(ValueError, match=f"both or neither, got only running_{name}$"):
            call()


@in_and_out
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("params", "device"), [("cpu", "meta"), ("meta", "cpu")])
def test_an_input_on_another_device_than_the_parameters(params, device, training, group):
    x = x4d().to(device)
    options = {"device": params, "process_group": group}
    layers = [syncbn.SyncBatchNorm2d(3, **options), syncbn.LazySyncBatchNorm2d(**options)]
    layers += [syncbn.SyncBatchNorm2d(3, track_running_stats=False, **options)]
    calls = [layer.train(training) for layer in layers]
    calls.append(lambda x: function(x, group, training, bias=torch.ones(3, device=params)))
    for call in calls:
        with pytest.raises(ValueError, match=f"input's device {device}, got {params}") as caught:
            call(x)
        assert str(caught.value).startswith("sync_batch_norm: expected ")
        assert ".to()" in str(caught.value)


@pytest.mark.parametrize("momentum", [-0.1, 1.1, 2, float("nan"), float("inf"), -float("inf")])
def test_a_momentum_outside_0_to_1(momentum):
    built, untracked = (syncbn.SyncBatchNorm2d(3, track_running_stats=t) for t in (True, False))
    built.momentum = untracked.momentum = momentum
    for call in (
        *(lambda cls=cls: layer_of(cls, momentum=momentum) for cls in LAYERS),
        lambda: syncbn.sync_batch_norm(x4d(), None, None, momentum=momentum, group=Silent()),
        lambda: built(x4d()),
        lambda: torch.func.vmap(untracked)(x4d()[None]),
    ):
        with pytest.raises(
            ValueError, match=r"^sync_batch_norm: expected momentum in \[0, 1\]"
        ) as e:
            call()
        assert f"got {momentum}; " in str(e.value)
        assert "0.1 is usual" in str(e.value)
    assert built.num_batches_tracked == 0


@pytest.mark.parametrize("eps", [float("inf"), 10**400])
def test_an_eps_that_is_not_finite(eps):
    with pytest.raises(ValueError, match=r"^sync_batch_norm: expected a finite eps, got "):
        syncbn.SyncBatchNorm(3, eps=eps)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("form", "make"),
    [
        ("sparse_coo", torch.Tensor.to_sparse),
        ("sparse_csr", lambda x: x[..., 0].to_sparse_csr()),
        ("nested", lambda x: torch.nested.as_nested_tensor(list(x))),
        ("mkldnn", torch.Tensor.to_mkldnn),
    ],
)
def test_tensors_that_are_not_dense(form, make, training):
    with pytest.raises(TypeError, match=f"expected a dense tensor as input, got a {form} one"):
        function(make(torch.randn(4, 3, 2)), None, training)
    if form == "sparse_coo":
        for name in ("weight", "running_mean"):
            tensors = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)}
            tensors |= {name: torch.ones(3).to_sparse()}
            with pytest.raises(TypeError, match=f"expected {name} as a dense tensor, got a sparse"):
                syncbn.sync_batch_norm(torch.randn(4, 3), training=training, **tensors)


@pytest.mark.parametrize("eps", [0, 0.0, -1e-5, float("nan"), -float("inf")])
def test_an_eps_that_is_not_positive(eps):
    built = syncbn.SyncBatchNorm2d(3)
    built.eps = eps
    for call in (
        *(lambda cls=cls: layer_of(cls, eps=eps) for cls in LAYERS),
        lambda: syncbn.sync_batch_norm(x4d(), None, None, eps=eps, group=Silent()),
        lambda: built(x4d()),
    ):
        with pytest.raises(ValueError, match=r"^sync_batch_norm: expected eps > 0, got") as caught:
            call()
        assert f"got {eps}; " in str(caught.value)
        assert "1e-5 is usual" in str(caught.value)


@in_and_out
@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"momentum": None}, r"expected momentum in \[0, 1\], got None"),
        ({"momentum": "0.1"}, "expected momentum to be a number, got str; 0.1 is usual"),
        ({"eps": None}, "expected eps to be a number, got NoneType; 1e-5 is usual"),
    ],
)
def test_options_that_are_no_numbers_are_refused_before_communicating(wrong, text, group):
    with pytest.raises((TypeError, ValueError), match=f"^sync_batch_norm: {text}"):
        syncbn.sync_batch_norm(x4d(), None, None, group=group, **wrong)


NO_GROUPS = ["gloo", 2, 0, True, -1, [0, 1], object(), Communicator, torch.ones(2), numpy.ones(2)]


@pytest.mark.parametrize("group", NO_GROUPS, ids=lambda group: type(group).__name__)
def test_what_is_no_process_group(group):
    built = syncbn.SyncBatchNorm2d(3)
    built.process_group = group
    for call in (
        *(lambda cls=cls: layer_of(cls, process_group=group) for cls in LAYERS),
        lambda: syncbn.sync_batch_norm(x4d(), None, None, group=group),
        lambda: built(x4d()),
        lambda: syncbn.convert(nn.BatchNorm2d(3), group),
    ):
        with pytest.raises(TypeError, match=rf"^process_group: got {type(group).__name__}; ") as e:
            call()
        for remedy in ("None", "torch.distributed group", "DeviceMesh", "syncbn.comm.Communicator"):
            assert remedy in str(e.value)
    assert built.num_batches_tracked == 0


class EmptyPeer(Communicator):
    """A group of two ranks whose other one has no samples."""

    rank, size = 0, 2

    def all_gather(self, tensor):
        return torch.stack((tensor, torch.zeros_like(tensor)))

    def all_reduce(self, tensor):
        return tensor.clone()


def test_a_single_value_per_channel_over_all_ranks():
    layer = syncbn.SyncBatchNorm(3, process_group=EmptyPeer())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel") as caught:
        layer(torch.ones(1, 3, 1, 1))
    for part in ("[1, 3, 1, 1]", "rank 0", "all 2 ranks", "use a larger batch or call eval()"):
        assert part in str(caught.value)
    for name, value in syncbn.SyncBatchNorm(3).state_dict().items():
        assert torch.equal(layer.state_dict()[name], value)
    layer(torch.ones(2, 3, 1, 1))


def test_group_and_process_group_are_one_option():
    x = torch.randn(4, 3)
    expected = syncbn.sync_batch_norm(x, None, None, group=EmptyPeer())
    assert torch.equal(syncbn.sync_batch_norm(x, None, None, process_group=EmptyPeer()), expected)
    with pytest.raises(TypeError, match=r"^process_group: got int; "):
        syncbn.sync_batch_norm(x, None, None, process_group=3)
    with pytest.raises(ValueError, match=r"expected group or process_group, two names of one"):
        syncbn.sync_batch_norm(x, None, None, group=Silent(), process_group=Silent())
