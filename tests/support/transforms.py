"""What is done to a function of tensors: torch.func's transforms, forward mode, batched gradients.

Each is a function of (f, args, vmap). With torch.func.vmap it is itself; with :func:`one_by_one`
it gives the same without batches of tensors.
"""

from __future__ import annotations

import torch
from torch import func
from torch.autograd import forward_ad, functional

BATCH = 3  # elements of a vmap


def one_by_one(f, in_dims=0):
    """torch.func.vmap by a loop; of tensors and tuples of them."""

    def looped(*args):
        dims = (in_dims,) * len(args) if isinstance(in_dims, int) else in_dims
        pairs = list(zip(args, dims, strict=True))
        results = [f(*(t if d is None else t.select(d, i) for t, d in pairs)) for i in range(BATCH)]
        if isinstance(results[0], tuple):
            return tuple(torch.stack(parts) for parts in zip(*results, strict=True))
        return torch.stack(results)

    return looped


def loss_of(f):
    def loss(*args):
        y = f(*args)
        weights = torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)
        return (y.pow(3) * weights).sum()

    return loss


def gradients_of(f, args):
    return func.grad(loss_of(f), all_of(args))


def all_of(args):
    return tuple(range(len(args)))


def like(tensors, batch=()):
    """Random tensors of the same shapes and types, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(*batch, *t.shape, generator=generator, dtype=torch.float64).to(t.dtype)
        for t in tensors
    )


def varied(args):
    """A batch of arguments."""
    return tuple(torch.stack([t * (1 + i) + i for i in range(BATCH)]) for t in args)


def first(args):
    """in_dims that give every element its x, and all the same parameters."""
    return (0, *(None,) * (len(args) - 1))


def wanting(args):
    return tuple(t.detach().clone().requires_grad_() for t in args)


def grad(f, args, vmap):
    return gradients_of(f, args)(*args)


def vjp(f, args, vmap):
    y, pull = func.vjp(f, *args)
    return y, pull(*like([y]))


def jvp(f, args, vmap):
    return func.jvp(f, args, like(args))


def linearize(f, args, vmap):
    if vmap is not func.vmap:
        return jvp(f, args, vmap)
    y, push = func.linearize(f, *args)
    return y, push(*like(args))


def jacrev(f, args, vmap):
    return func.jacrev(f, all_of(args))(*args)


def jacfwd(f, args, vmap):
    return func.jacfwd(f, all_of(args))(*args)


def hessian(f, args, vmap):
    return func.hessian(loss_of(f), all_of(args))(*args)


def twice(outer, inner):
    def second(f, args, vmap):
        return outer(inner(loss_of(f), all_of(args)), all_of(args))(*args)

    return second


def third(f, args, vmap):
    x, *rest = args
    norm = func.grad(lambda x: func.grad(loss_of(f))(x, *rest).pow(2).sum())
    return func.jvp(norm, (x,), like([x]))


def mapped(f, args, vmap):
    return vmap(f)(*varied(args))


def mapped_over_x(f, args, vmap):
    return vmap(f, first(args))(varied(args)[0], *args[1:])


def mapped_over_parameters(f, args, vmap):
    if len(args) == 1:
        return mapped(f, args, vmap)
    return vmap(f, (None, *(0,) * (len(args) - 1)))(args[0], *varied(args)[1:])


def mapped_twice(f, args, vmap):
    x, *rest = varied(args)
    xs = torch.stack([x, x.flip(0), x.sin()], dim=-1)
    return vmap(lambda x, *rest: vmap(lambda x: f(x, *rest), x.dim() - 1)(x))(xs, *rest)


def mapped_gradients(f, args, vmap):
    return vmap(gradients_of(f, args))(*varied(args))


def gradients_of_each_sample(f, args, vmap):
    return vmap(gradients_of(f, args), first(args))(varied(args)[0], *args[1:])


def gradients_of_mapped(f, args, vmap):
    return gradients_of(lambda *some: vmap(f)(*some), args)(*varied(args))


def jvp_of_grad(f, args, vmap):
    return func.jvp(gradients_of(f, args), args, like(args))


def grad_of_jvp(f, args, vmap):
    return gradients_of(lambda *some: func.jvp(f, some, like(args))[1], args)(*args)


def mapped_jvp(f, args, vmap):
    return vmap(lambda *tangents: func.jvp(f, args, tangents)[1])(*like(args, (BATCH,)))


def dual_numbers(f, args, vmap):
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(f(*map(forward_ad.make_dual, args, like(args)))))


def backward_of_dual_numbers(f, args, vmap):
    args = wanting(args)
    with forward_ad.dual_level():
        duals = tuple(map(forward_ad.make_dual, args, like(args)))
        found = torch.autograd.grad(loss_of(f)(*duals), duals)
        return [tuple(forward_ad.unpack_dual(gradient)) for gradient in found]


def dual_gradients(f, args, vmap):
    """dy with a tangent, in the backward of what was recorded without."""
    args = wanting(args)
    y = f(*args)
    with forward_ad.dual_level():
        found = torch.autograd.grad(y, args, forward_ad.make_dual(*like([y, y])))
        return [tuple(forward_ad.unpack_dual(gradient)) for gradient in found]


def batched(f, args, vmap, **options):
    """is_grads_batched"""
    args = wanting(args)
    y = f(*args)
    (dys,) = like([y], (BATCH,))
    if vmap is func.vmap:
        return args, torch.autograd.grad(y, args, dys, is_grads_batched=True, **options)
    pull = lambda dy: torch.autograd.grad(y, args, dy, retain_graph=True, **options)  # noqa: E731
    return args, vmap(pull)(dys)


def batched_gradients(f, args, vmap):
    return batched(f, args, vmap)[1]


def batched_gradients_differentiated(f, args, vmap):
    args, found = batched(f, args, vmap, create_graph=True)
    total = sum((gradient.pow(3) * gradient.detach().sin()).sum() for gradient in found)
    return [g.detach() for g in found], torch.autograd.grad(total, args, materialize_grads=True)


def mapped_backward(f, args, vmap):
    """torch.func.vmap around the backward of what was recorded outside."""
    args = wanting(args)
    y = f(*args)
    pull = lambda dy: torch.autograd.grad(y, args, dy, retain_graph=True)  # noqa: E731
    return vmap(pull)(*like([y], (BATCH,)))


def functional_jacobian(f, args, vmap):
    return functional.jacobian(f, args, vectorize=vmap is func.vmap)


def functional_jacobian_forward(f, args, vmap):
    if vmap is not func.vmap:
        return functional.jacobian(f, args)
    return functional.jacobian(f, args, vectorize=True, strategy="forward-mode")


def functional_hessian(f, args, vmap):
    return functional.hessian(loss_of(f), args, vectorize=vmap is func.vmap)


def functional_hessian_forward(f, args, vmap):
    if vmap is not func.vmap:
        return functional.hessian(loss_of(f), args)
    return functional.hessian(
        loss_of(f), args, vectorize=True, outer_jacobian_strategy="forward-mode"
    )


def functional_jvp(f, args, vmap):
    return functional.jvp(f, args, like(args))


def functional_vjp(f, args, vmap):
    return functional.vjp(f, args, *like([args[0]]))


SECOND = {  # of batch norm, torch 2.13 finds wrong numbers in these
    "hessian": hessian,
    "jacrev of jacfwd": twice(func.jacrev, func.jacfwd),
    "jacrev of jacrev": twice(func.jacrev, func.jacrev),
    "jacfwd of jacfwd": twice(func.jacfwd, func.jacfwd),
    "third derivatives": third,
    "grad of jvp": grad_of_jvp,
}
TRANSFORMS = {
    "grad": grad,
    "vjp": vjp,
    "jvp": jvp,
    "linearize": linearize,
    "jacrev": jacrev,
    "jacfwd": jacfwd,
    **SECOND,
    "vmap": mapped,
    "vmap over x": mapped_over_x,
    "vmap over parameters": mapped_over_parameters,
    "vmap of vmap": mapped_twice,
    "vmap of grad": mapped_gradients,
    "vmap of grad, over x": gradients_of_each_sample,
    "grad of vmap": gradients_of_mapped,
    "jvp of grad": jvp_of_grad,
    "vmap of jvp": mapped_jvp,
    "dual numbers": dual_numbers,
    "backward of dual numbers": backward_of_dual_numbers,
    "dual gradients": dual_gradients,
    "is_grads_batched": batched_gradients,
    "is_grads_batched, create_graph": batched_gradients_differentiated,
    "vmap of a recorded backward": mapped_backward,
    "functional.jacobian": functional_jacobian,
    "functional.jacobian, forward mode": functional_jacobian_forward,
    "functional.hessian": functional_hessian,
    "functional.hessian, forward mode": functional_hessian_forward,
    "functional.jvp": functional_jvp,
    "functional.vjp": functional_vjp,
}
