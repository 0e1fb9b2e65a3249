"""Transforms of torch.func, forward mode and batched gradients on one process: as torch's layer.

With every option and in every nesting, in float64; masked, as torch's layer of the packed values.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call

import syncbn
from support import oracle
from support.transforms import BATCH, SECOND, TRANSFORMS, loss_of, one_by_one

DOUBLE = torch.float64
SHAPE = (4, 2, 2, 1)
MASK = (4, 2, 1)
TOLERANCE = {"rtol": 1e-8, "atol": 1e-9}
# of our layer, torch's layer, and whether it trains
OPTIONS = {
    "plain": ({}, {}, True),
    "reproducible": ({"reproducible": True}, {}, True),
    "statistics_dtype": ({"statistics_dtype": torch.float32}, {}, True),
    "average": ({"momentum": None}, {"momentum": None}, True),
    "no affine": ({"affine": False}, {"affine": False}, True),
    "no bias": ({"bias": False, "reproducible": True}, {}, True),
    "untracked": ({"track_running_stats": False}, {"track_running_stats": False}, True),
    "float32 parameters": ({"dtype": torch.float32}, {}, True),
    "lazy": ({}, {}, True),
    "mask": ({}, {}, True),
    "mask, untracked": ({"track_running_stats": False}, {"track_running_stats": False}, True),
    "masking": ({"momentum": None, "reproducible": True}, {"momentum": None}, True),
    "eval": ({"reproducible": True}, {}, False),
    "eval, statistics_dtype": ({"statistics_dtype": torch.float32}, {}, False),
    "eval, mask": ({}, {}, False),
    "eval, untracked": ({"track_running_stats": False}, {"track_running_stats": False}, False),
}


def layers(option):
    """Our layer and torch's, of equal random parameters and statistics."""
    ours, theirs, training = OPTIONS[option]
    if option == "lazy":
        mine = syncbn.LazySyncBatchNorm2d(dtype=DOUBLE, **ours)
        mine(torch.randn(SHAPE, dtype=DOUBLE))
        mine.reset_parameters()
    else:
        mine = syncbn.SyncBatchNorm2d(2, **{"dtype": DOUBLE, **ours})
    its = nn.BatchNorm2d(2, dtype=DOUBLE, **theirs)
    if "bias" in ours:
        its.register_parameter("bias", None)
    state = {name: torch.randn_like(p).float() for name, p in mine.named_parameters()}
    state |= {n: torch.rand(2) + 0.5 for n, _ in mine.named_buffers() if n.startswith("running")}
    mine.load_state_dict(state, strict=False)
    its.load_state_dict(state, strict=False)
    return mine.train(training), its.train(training)


class WrittenOut(nn.BatchNorm2d):
    """The formula, in operations whose derivatives are beyond doubt."""

    def forward(self, x):
        mean, var = self.running_mean, self.running_var
        if self.training or mean is None:
            mean = x.mean((0, 2, 3))
            var = (x - mean.view(-1, 1, 1)).square().mean((0, 2, 3))
        y = (x - mean.view(-1, 1, 1)) * (var.view(-1, 1, 1) + self.eps).rsqrt()
        y = y if self.weight is None else y * self.weight.view(-1, 1, 1)
        return y if self.bias is None else y + self.bias.view(-1, 1, 1)


def fresh(layer, x):
    """Its buffers, in a transform of x as if they were computed from it: such may move."""
    return {n: b + (x.detach() * 0).sum().to(b.dtype) for n, b in layer.named_buffers()}


def functions(option):
    """(x, parameters…) → y of our layer, of torch's and of the formula, and arguments."""
    mine, its = layers(option)
    formula = copy.copy(its)
    formula.__class__ = WrittenOut
    mask = torch.rand(MASK) > 0.4 if "mask" in option else None
    dtypes = {name: parameter.dtype for name, parameter in mine.named_parameters()}

    def ours(x, *parameters):
        named = zip(dtypes, parameters, strict=True)
        state = {name: p.to(dtypes[name]) for name, p in named} | fresh(mine, x)
        if option == "masking":
            with syncbn.masking(mine, mask):
                return functional_call(mine, state, (x,))
        return functional_call(mine, state, (x,) if mask is None else (x, mask))

    def judge(layer):
        def apply(x, *parameters):
            return packed(layer, dict(zip(dtypes, parameters, strict=True)), x, mask)

        return apply

    x = torch.randn(SHAPE, dtype=DOUBLE) * 2 + 1
    return ours, judge(its), judge(formula), (x, *(p.detach().clone() for p in its.parameters()))


def packed(layer, parameters, x, mask):
    """The layer on the values that count, alone, by matrices, which every transform knows."""
    state = parameters | fresh(layer, x)
    if mask is None:
        return functional_call(layer, state, (x,))
    chosen = torch.eye(mask.numel(), dtype=x.dtype)[mask.flatten()]
    values = chosen @ x.movedim(1, -1).reshape(-1, x.shape[1])
    y = functional_call(layer, state, (values[..., None, None],))[..., 0, 0]
    return (chosen.T @ y).reshape(*mask.shape, -1).movedim(-1, 1)


def cases():
    """Every transform with every option: in the quick run with every third, all in turn."""
    for place, name in enumerate(TRANSFORMS):
        for turn, option in enumerate(OPTIONS):
            marks = pytest.mark.slow if (place + turn) % 3 else ()
            yield pytest.param(name, option, marks=marks, id=f"{name}-{option}")


@pytest.mark.parametrize(("name", "option"), cases())
def test_every_option_under_every_transform(name, option):
    ours, torchs, formula, args = functions(option)
    transform = TRANSFORMS[name]
    # float32 parameters round their gradients
    close = {"rtol": 1e-5, "atol": 1e-5} if option == "float32 parameters" else TOLERANCE
    found = transform(ours, args, torch.func.vmap)
    torch.testing.assert_close(found, transform(formula, args, one_by_one), **close)
    averages = OPTIONS[option][1].get("momentum", 0.1) is None  # torch needs its counter's value
    if name not in SECOND and not averages:
        torch.testing.assert_close(found, transform(torchs, args, one_by_one), **close)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("parameters", [torch.float32, None])
def test_half_inputs_keep_their_type(dtype, parameters):
    """torch's own layer returns float32 from vmap, and its tangents are float32."""
    layer = syncbn.SyncBatchNorm2d(2, dtype=parameters or dtype, track_running_stats=False)
    x, t = (torch.randn(SHAPE, dtype=DOUBLE).to(dtype) for _ in range(2))
    judge = WrittenOut(2, track_running_stats=False, dtype=DOUBLE)
    wide, tangent = x.double(), t.double()
    pairs = [
        *zip(
            torch.func.jvp(layer, (x,), (t,)),
            torch.func.jvp(judge, (wide,), (tangent,)),
            strict=True,
        ),
        (torch.func.vjp(layer, x)[1](t)[0], torch.func.vjp(judge, wide)[1](tangent)[0]),
        (torch.func.vmap(layer)(torch.stack((t, x)))[1], judge(wide)),
    ]
    for found, expected in pairs:
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)


def test_vmap_over_masks_and_whatever_padding_holds():
    layer = syncbn.SyncBatchNorm2d(2, dtype=DOUBLE, track_running_stats=False)
    xs = torch.randn(BATCH, *SHAPE, dtype=DOUBLE)
    masks = torch.rand(BATCH, *MASK) > 0.4
    masks[1] = False  # an element of which nothing counts
    padded = torch.where(masks.unsqueeze(2), xs, torch.nan)

    def gradient(x, mask):
        y, pull = torch.func.vjp(lambda x: layer(x, mask), x)
        return y, *pull(xs[0])

    for args, dims in (
        ((padded, masks), 0),
        ((xs, masks[0]), (0, None)),
        ((xs[0], masks), (None, 0)),
    ):
        found = torch.func.vmap(gradient, dims)(*args)
        torch.testing.assert_close(found, one_by_one(gradient, dims)(*args), **TOLERANCE)
        assert all(tensor.isfinite().all() for tensor in found)
    layer.eval()
    found = torch.func.vmap(layer, (None, 0))(xs[0], masks)
    torch.testing.assert_close(found, one_by_one(layer, (None, 0))(xs[0], masks), **TOLERANCE)


def test_gradcheck_with_everything_on():
    layer = syncbn.SyncBatchNorm2d(2, dtype=DOUBLE, track_running_stats=False, reproducible=True)
    x = torch.randn(2, 2, 2, 1, dtype=DOUBLE, requires_grad=True)
    mask = torch.tensor([[[True], [True]], [[False], [True]]])
    for given in (None, mask):
        assert torch.autograd.gradcheck(
            lambda x: layer(x, given),  # noqa: B023
            x,
            check_forward_ad=True,
            check_batched_grad=True,
            check_batched_forward_grad=True,
        )
        assert torch.autograd.gradgradcheck(
            lambda x: layer(x, given),  # noqa: B023
            x,
            check_batched_grad=True,
            check_fwd_over_rev=True,
            check_rev_over_rev=True,
        )


ENSEMBLES = [
    {},
    {"momentum": None},
    {"statistics_dtype": torch.float64},
    {"skip_nonfinite": True},
]


@pytest.mark.parametrize("options", ENSEMBLES)
@pytest.mark.parametrize("masked", [False, True])
def test_an_ensemble_moves_the_statistics_of_each(options, masked):
    """momentum=None included, for which torch's layer asks for its counter's value."""
    layers = [syncbn.SyncBatchNorm2d(2, **options) for _ in range(BATCH)]
    alone = copy.deepcopy(layers)
    mask = (torch.rand(MASK) > 0.4,) if masked else ()
    parameters, buffers = torch.func.stack_module_state(layers)

    def run(parameters, buffers, x):
        return functional_call(layers[0], (parameters, buffers), (x, *mask))

    for x in torch.randn(2, BATCH, *SHAPE):
        ys = torch.func.vmap(run)(parameters, buffers, x)
        expected = torch.stack([layer(one, *mask) for layer, one in zip(alone, x, strict=True)])
        torch.testing.assert_close(ys, expected, rtol=1e-5, atol=1e-5)
    for name, buffer in torch.func.stack_module_state(alone)[1].items():
        torch.testing.assert_close(buffers[name], buffer, rtol=1e-5, atol=1e-6)
    assert all(layer.num_batches_tracked == 0 for layer in layers)


CAPTURING = {
    "grad": lambda layer, x: torch.func.grad(lambda x: layer(x).sum())(x),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,)),
    "vmap": lambda layer, x: torch.func.vmap(layer)(torch.stack((x, x))),
}


@pytest.mark.parametrize("name", CAPTURING)
@pytest.mark.parametrize("options", [{}, {"reproducible": True}, {"skip_nonfinite": True}])
def test_statistics_of_outside_are_refused_and_stay(name, options):
    """torch's layer raises there, too, but has counted a batch then under vmap."""
    layer = syncbn.SyncBatchNorm2d(2, **options)
    before = copy.deepcopy(layer.state_dict())
    x = torch.randn(SHAPE)
    with pytest.raises(RuntimeError) as caught:
        CAPTURING[name](layer, x)
    text = str(caught.value)
    assert text.startswith(
        "sync_batch_norm: expected running statistics that a transform of torch.func can move in "
        "training, got running_mean of outside of it ("
    )
    assert "torch.func.functional_call" in text
    for tensor, old in zip(layer.state_dict().values(), before.values(), strict=True):
        torch.testing.assert_close(tensor, old, rtol=0, atol=0)
    CAPTURING[name](layer.eval(), x)


def test_forward_mode_moves_statistics_once_and_gives_them_no_tangent():
    mine, its = syncbn.SyncBatchNorm2d(2, reproducible=True), nn.BatchNorm2d(2)
    x, t = torch.randn(2, *SHAPE)
    for layer in (mine, its):
        with forward_ad.dual_level():
            layer(forward_ad.make_dual(x, t))
            assert forward_ad.unpack_dual(layer.running_var).tangent is None
    for found, expected in zip(mine.buffers(), its.buffers(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", CAPTURING)
def test_a_single_value_is_refused_in_any_element(name, masked):
    layer = syncbn.SyncBatchNorm2d(2, track_running_stats=False)
    x = torch.randn(4 if masked else 1, 2, 1, 1)
    mask = torch.tensor([True, False, False, False]).view(4, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        CAPTURING[name](lambda x: layer(x, mask if masked else None), x)
    if masked:
        masks = torch.stack((torch.ones_like(mask), mask))
        with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
            torch.func.vmap(layer, (None, 0))(x, masks)


def test_constant_channels_have_second_derivatives():
    """Their sum of squares is zero, at the edge of what is cut off."""
    formula = WrittenOut(5, dtype=DOUBLE, track_running_stats=False)
    x = torch.tensor([0.1, 1 / 3, 0.7, 1e3 / 7, 0.0], dtype=DOUBLE).repeat(3, 1)[..., None, None]
    expected = torch.autograd.functional.hessian(loss_of(formula), x)
    layer = syncbn.SyncBatchNorm2d(5, dtype=DOUBLE, track_running_stats=False)
    found = torch.func.hessian(loss_of(layer))(x)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_an_unmasked_layer_in_float32_is_as_right_as_elsewhere():
    x = torch.randn(8, 2, 16, 16) + 1e4
    layer = syncbn.SyncBatchNorm2d(2, track_running_stats=False)
    (y,) = torch.func.vmap(layer)(x[None])
    oracle.assert_close(y, oracle.batch_norm(x, x).y)
