"""Second derivatives through the exchange: gradient penalties over ranks equal one process."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support.cases import share_of


def whole_batch_functions(comm, split):
    """(share, collect) between a whole batch, the same on every rank, and this rank's share.

    Both are differentiable, and the derivative of the whole batch is whole on every rank. So
    autograd's numerical checks can run on all ranks at once, with the same perturbations.
    """
    mine = share_of(split, comm.rank)
    most = max(split)

    class Share(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x[mine].clone()

        @staticmethod
        def backward(ctx, gradient):
            return Collect.apply(gradient)

    class Collect(torch.autograd.Function):
        @staticmethod
        def forward(ctx, share):
            padded = share.new_zeros(most, *share.shape[1:])
            padded[: len(share)] = share
            gathered = comm.all_gather(padded)
            return torch.cat([rows[:n] for rows, n in zip(gathered, split, strict=True)])

        @staticmethod
        def backward(ctx, gradient):
            return Share.apply(gradient)

    return Share.apply, Collect.apply


@pytest.mark.parametrize("split", [(2, 1), (3, 0), (1, 2, 1)])
@pytest.mark.parametrize("affine", [True, False])
def test_gradgradcheck_on_every_rank(ranks, split, affine):
    def run(rank):
        share, collect = whole_batch_functions(syncbn.comm.resolve(None), split)
        x = torch.randn(sum(split), 2, 2, dtype=torch.float64, requires_grad=True)
        weight, bias = torch.randn(2, 2, dtype=torch.float64).unbind()

        def layer(x):
            parameters = (weight, bias) if affine else (None, None)
            return collect(syncbn.sync_batch_norm(share(x), None, None, *parameters))

        return torch.autograd.gradcheck(layer, x) and torch.autograd.gradgradcheck(layer, x)

    assert all(ranks(len(split), run))


def critic():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.Softplus(),
        nn.Conv2d(4, 3, 3),
        nn.BatchNorm2d(3),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(3 * 3 * 4, 1),
    ).double()


def penalty(model, x):
    """The critic's output, and per sample the squared distance of its gradient's norm from 1."""
    x = x.clone().requires_grad_()
    total = model(x).sum()
    (gradient,) = torch.autograd.grad(total, x, create_graph=True)
    return total + (gradient.flatten(1).norm(dim=1) - 1).square().sum(), gradient


def gradients(model):
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("split", [(2, 2), (3, 1), (4, 0), (2, 1, 2)])
@pytest.mark.parametrize("ddp", [True, False])
def test_a_gradient_penalty_equals_one_process(ranks, split, ddp):
    x = torch.randn(sum(split), 2, 5, 6, dtype=torch.float64)

    def run(rank):
        model = syncbn.convert(critic())
        wrapped = DistributedDataParallel(model) if ddp else model
        loss, gradient = penalty(wrapped, x[share_of(split, rank)])
        loss.backward()
        return gradient.detach(), gradients(model)

    alone = critic()
    loss, expected = penalty(alone, x)
    loss.backward()
    results = ranks(len(split), run)
    torch.testing.assert_close(torch.cat([g for g, _ in results]), expected)
    for name, value in gradients(alone).items():
        shares = torch.stack([named[name] for _, named in results])
        total = shares[0] * len(split) if ddp else shares.sum(0)  # DDP has averaged them
        torch.testing.assert_close(total, value, rtol=1e-7, atol=1e-12, msg=name)


def test_the_terms_that_cross_ranks_do_not_vanish(ranks):
    """The second derivative of rank 0's loss with respect to rank 1's input is not zero."""

    def run(rank):
        torch.manual_seed(rank)
        x = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
        y = syncbn.sync_batch_norm(x, None, None)
        (gradient,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
        loss = gradient.square().sum() * (1.0 if rank == 0 else 0.0)
        return torch.autograd.grad(loss, x)[0].abs().max()

    assert ranks(2, run)[1] > 0.01


def test_third_derivatives_too(ranks):
    def run(rank):
        share, collect = whole_batch_functions(syncbn.comm.resolve(None), (2, 1))
        x = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)

        def second(x):
            y = collect(syncbn.sync_batch_norm(share(x), None, None))
            (first,) = torch.autograd.grad(y.pow(3).sum(), x, create_graph=True)
            return torch.autograd.grad(first.square().sum(), x, create_graph=True)[0]

        return torch.autograd.gradcheck(second, x)

    assert all(ranks(2, run))


def test_an_input_that_wants_a_gradient_on_one_rank_only(ranks):
    """Every rank's graph holds the same exchanges; no rank waits for ever."""
    x = torch.randn(4, 2, 3, dtype=torch.float64)

    def run(rank):
        layer = syncbn.SyncBatchNorm(2, dtype=torch.float64)
        mine = x[2 * rank : 2 * rank + 2].clone().requires_grad_(rank == 0)
        wanted = [layer.weight, *([mine] if rank == 0 else [])]
        y = layer(mine).pow(3).sum()
        first = torch.autograd.grad(y, wanted, create_graph=True)
        sum(gradient.square().sum() for gradient in first).backward()
        return None if mine.grad is None else mine.grad.abs().max()

    assert ranks(2, run)[0] > 0
