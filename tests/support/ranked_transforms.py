"""What transforms compute over ranks, each with its share: like one process of the whole batch."""

from __future__ import annotations

import torch
from torch.func import functional_call

import syncbn
from support.cases import share_of
from support.transforms import all_of, wanting

DOUBLE = torch.float64
SHAPE = (3, 2, 2)
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}


def formula(x, weight, bias, mask):
    counts = mask.unsqueeze(1).to(x.dtype)
    n = counts.sum((0, 2)).view(1, -1, 1)
    mean = (x * counts).sum((0, 2), keepdim=True) / n
    centred = (x - mean) * counts
    var = centred.square().sum((0, 2), keepdim=True) / n
    y = centred * (var + 1e-5).rsqrt() * weight.view(-1, 1) + bias.view(-1, 1)
    return y * counts


# What each does to f(x, weight, bias) with w like y and tangents t like the arguments: results of
# samples with the dimension that counts them, and results of parameters, which ranks sum.


def grad(f, args, w, t):
    gx, *rest = torch.func.grad(lambda *a: (f(*a).pow(3) * w).sum(), all_of(args))(*args)
    return [(gx, 0)], rest


def vjp(f, args, w, t):
    y, pull = torch.func.vjp(f, *args)
    gx, *rest = pull(w)
    return [(y, 0), (gx, 0)], rest


def jvp(f, args, w, t):
    return [(part, 0) for part in torch.func.jvp(f, args, t)], []


def vmap(f, args, w, t):
    x, *rest = args
    return [(torch.func.vmap(lambda k: f(x * k + k, *rest))(factors()), 1)], []


def vmap_of_grad(f, args, w, t):
    def one(k):
        [(gx, _)], rest = grad(lambda x, *p: f(x * k + k, *p), args, w, t)
        return gx, *rest

    gx, *rest = torch.func.vmap(one)(factors())
    return [(gx, 1)], rest


def vmap_of_vmap(f, args, w, t):
    x, *rest = args
    inner = lambda k: torch.func.vmap(lambda j: f(x.sin() * k + j, *rest))(factors())  # noqa: E731
    return [(torch.func.vmap(inner)(factors()), 2)], []


def grad_of_vmap(f, args, w, t):
    mapped = lambda x, *p: torch.func.vmap(lambda k: f(x * k + k, *p))(factors())  # noqa: E731
    return grad(lambda *a: mapped(*a).sum(0), args, w, t)


def grad_of_grad(f, args, w, t):
    def penalty(*args):
        (gx, _), *_ = vjp(f, args, w.sin(), t)[0][1:]
        return (gx.pow(3) * t[0]).sum()

    gx, *rest = torch.func.grad(penalty, all_of(args))(*args)
    return [(gx, 0)], rest


def jvp_of_grad(f, args, w, t):
    def gradients(*args):
        [(gx, _)], rest = grad(f, args, w, t)
        return gx, *rest

    gx, *rest = torch.func.jvp(gradients, args, t)[1]
    return [(gx, 0)], rest


def forward_mode(f, args, w, t):
    with torch.autograd.forward_ad.dual_level():
        y = f(*map(torch.autograd.forward_ad.make_dual, args, t))
        return [(part, 0) for part in torch.autograd.forward_ad.unpack_dual(y)], []


def batched(f, args, w, t, **options):
    args = wanting(args)
    y = f(*args)
    ws = torch.stack([w, w.sin(), w.square()])
    found = torch.autograd.grad(y, args, ws, is_grads_batched=True, **options)
    return args, found


def is_grads_batched(f, args, w, t):
    _, (gx, *rest) = batched(f, args, w, t)
    return [(gx, 1)], rest


def is_grads_batched_create_graph(f, args, w, t):
    args, (gx, *rest) = batched(f, args, w, t, create_graph=True)
    total = (gx.pow(3) * t[0]).sum()
    hx, *others = torch.autograd.grad(total, args, materialize_grads=True)
    return [(gx, 1), (hx, 0)], [*rest, *others]


def vmap_of_a_recorded_backward(f, args, w, t):
    args = wanting(args)
    y = f(*args)
    pull = lambda w: torch.autograd.grad(y, args, w, retain_graph=True)  # noqa: E731
    gx, *rest = torch.func.vmap(pull)(torch.stack([w, w.sin(), w.square()]))
    return [(gx, 1)], rest


def factors():
    return torch.arange(1, 4, dtype=DOUBLE)


STEPS = {
    step.__name__: step
    for step in (
        *(grad, vjp, jvp, vmap, vmap_of_grad, vmap_of_vmap, grad_of_vmap, grad_of_grad),
        *(jvp_of_grad, forward_mode, is_grads_batched, is_grads_batched_create_graph),
        vmap_of_a_recorded_backward,
    )
}
OPTIONS = {"plain": {}, "reproducible": {"reproducible": True}, "masked": {}}


def setting(option):
    generator = torch.Generator().manual_seed(3)
    randn = lambda *shape: torch.randn(shape, generator=generator, dtype=DOUBLE)  # noqa: E731
    args = (randn(*SHAPE) + 1, randn(2), randn(2))
    mask = torch.ones(SHAPE[0], SHAPE[2], dtype=torch.bool)
    if option == "masked":
        mask[0, 1] = mask[2, 0] = False
    return args, randn(*SHAPE), tuple(randn(*a.shape) for a in args), mask


def outcome(step, option, comm, rank, split):
    """What a rank finds with its share."""
    (x, *parameters), w, t, mask = setting(option)
    share = share_of(split, rank)
    given = (mask[share],) if option == "masked" else ()
    layer = syncbn.SyncBatchNorm(
        2, dtype=DOUBLE, process_group=comm, track_running_stats=False, **OPTIONS[option]
    )

    def f(x, weight, bias):
        return functional_call(layer, {"weight": weight, "bias": bias}, (x, *given))

    return step(f, (x[share], *parameters), w[share], (t[0][share], *t[1:]))


def check(step, option, results):
    args, w, t, mask = setting(option)
    samples, parameters = step(lambda *a: formula(*a, mask), args, w, t)
    for i, (expected, dim) in enumerate(samples):
        found = torch.cat([rank[0][i][0] for rank in results], dim)
        torch.testing.assert_close(found, expected, **TOLERANCE)
    for i, expected in enumerate(parameters):
        torch.testing.assert_close(sum(rank[1][i] for rank in results), expected, **TOLERANCE)
