"""Small models for syncbn.check: right ones, and each with one fault of a kind planted in it."""

from __future__ import annotations

import os
import random
import time

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import syncbn


class Net(nn.Module):
    """Two blocks of convolution, batch norm and ReLU, and a linear head."""

    def __init__(self, norm: type[nn.Module] = nn.BatchNorm2d) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.between: nn.Module = nn.Identity()
        self.conv2, self.bn2 = nn.Conv2d(6, 8, 3), norm(8)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.between(self.bn1(self.conv1(x)).relu())
        x = self.bn2(self.conv2(x)).relu()
        return self.head(x.mean((2, 3)))


def right() -> nn.Module:
    return syncbn.convert(Net())


def plain() -> nn.Module:
    return Net()


def second_not_converted() -> nn.Module:
    return syncbn.convert(Net(), where=lambda name, layer: name != "bn2")


class Scaled(nn.BatchNorm2d):
    """A subclass with behaviour of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


def left_alone() -> nn.Module:
    return Net(Scaled)


def asleep() -> nn.Module:
    model = right()
    model.bn2.eval()
    return model


class KeepsAsleep(Net):
    """Frozen as it is done: through train(), too."""

    def train(self, mode: bool = True) -> KeepsAsleep:
        super().train(mode)
        self.bn2.eval()
        return self


def frozen() -> nn.Module:
    return syncbn.convert(KeepsAsleep().train())


def asleep_on_one() -> nn.Module:
    model = right()
    if dist.get_rank() == 1:
        model.bn2.eval()
    return model


def dropping() -> nn.Module:
    model = right()
    model.between = nn.Dropout(0.5)
    return model


class Drops(nn.Module):
    """Without a layer for it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)


def dropping_in_a_function() -> nn.Module:
    model = right()
    model.between = Drops()
    return model


def small_group() -> nn.Module:
    model = right()
    syncbn.convert(model.bn2, group_size=1)
    return model


class Repeats(nn.Module):
    """Calls its layer once for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(len(x)):
            x = self.layer(x)
        return x


def repeating() -> nn.Module:
    model = right()
    model.between = Repeats()
    return model


class Half(nn.Module):
    """Computes in bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (each.bfloat16() for each in (self.layer.weight, self.layer.bias))
        return F.conv2d(x.bfloat16(), weight, bias).to(x.dtype)


def halving() -> nn.Module:
    model = right()
    model.between = Half()
    return model


class Chaos(nn.Module):
    """The logistic map: each round doubles a difference."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.sigmoid()
        for _ in range(45):
            x = 3.99 * x * (1 - x)
        return x


def chaotic() -> nn.Module:
    model = right()
    model.between = Chaos()
    return model


class Centred(nn.Module):
    """Takes something from the whole batch, without any BatchNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


def centring() -> nn.Module:
    model = right()
    model.between = Centred()
    return model


class Functional(nn.Module):
    """Normalises without a layer."""

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, None, None, training=True)


def functional() -> nn.Module:
    model = right()
    model.between = Functional()
    return model


class _LocalGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dy):
        return dy - dy.mean(0)


class WrongBackward(nn.Module):
    """Right forward; its gradient is of one rank's samples."""

    def forward(self, x: Tensor) -> Tensor:
        return _LocalGradient.apply(x)


def wrong_backward() -> nn.Module:
    model = right()
    model.between = WrongBackward()
    return model


def lazy() -> nn.Module:
    return syncbn.convert(
        nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))
    )


def torchs_own() -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(Net())


class Pooled(nn.Module):
    """A batch norm on one value per channel and sample: one sample is too few for it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 6, 3), nn.BatchNorm1d(6)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x).mean((2, 3)))


def pooled() -> nn.Module:
    return Pooled()


def broken() -> nn.Module:
    raise KeyError("no such\nconfiguration")


def broken_on_one() -> nn.Module:
    if dist.get_rank() == 1:
        raise RuntimeError("rank 1 alone")
    return right()


def no_module() -> int:
    return 3


def hanging() -> nn.Module:
    time.sleep(1000)
    return right()


def dying() -> nn.Module:
    os._exit(7)


not_callable = 3


def dying_well() -> nn.Module:
    os._exit(0)


def exiting() -> nn.Module:
    raise SystemExit(0)


def not_finite() -> nn.Module:
    model = right()
    model.bn1.register_forward_hook(lambda module, args, output: output * float("inf"))
    return model


def data(samples: int) -> Tensor:
    return torch.randn(samples, 3, 8, 8)


def labelled(samples: int) -> tuple[Tensor, Tensor]:
    return torch.randn(samples, 3, 8, 8), torch.randint(0, 5, (samples,))


def other_data(samples: int) -> Tensor:
    generator = torch.Generator()
    generator.seed()
    return torch.randn(samples, 3, 8, 8, generator=generator)


def too_few(samples: int) -> Tensor:
    return torch.randn(samples - 1, 3, 8, 8)


def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target)


def summed(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="sum")


def averaged_over_ranks(output: Tensor, target: Tensor) -> Tensor:
    """As if each had equally many samples."""
    loss = F.cross_entropy(output, target)
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return loss + (mean / dist.get_world_size() - loss.detach())


def pairwise(output: Tensor, target: Tensor) -> Tensor:
    """Compares samples with each other."""
    return (output[:, None] - output[None]).pow(2).mean()


def weighed_itself(output: Tensor, target: Tensor) -> Tensor:
    """Divides by the samples that a rank has on average."""
    count = torch.tensor(float(len(output)))
    dist.all_reduce(count)
    return F.cross_entropy(output, target, reduction="sum") * dist.get_world_size() / count


def no_number(output: Tensor, target: Tensor) -> Tensor:
    return output


class PythonNoise(nn.Module):
    """Draws where torch does not see it."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + random.random() * len(x))


def drawing_with_python() -> nn.Module:
    model = right()
    model.between = PythonNoise()
    return model


class SkipsOnOne(Net):
    """A branch that one rank takes."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv2(self.bn1(self.conv1(x)).relu())
        if dist.get_rank() == 0:
            x = self.bn2(x)
        return self.head(x.mean((2, 3)))


def skipping_on_one() -> nn.Module:
    return syncbn.convert(SkipsOnOne())


class WrongMomentum(syncbn.SyncBatchNorm2d):
    """Moves its running statistics otherwise over ranks."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        self.momentum = 0.1 * dist.get_world_size()
        return super().forward(x, mask)


def wrong_momentum() -> nn.Module:
    return syncbn.convert(Net(WrongMomentum))


class TwoViews(Net):
    """Puts two views of each sample into one batch, one after the other."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(torch.cat([x, x.flip(3)]))


def two_views() -> nn.Module:
    return syncbn.convert(TwoViews())


class Positions(nn.Module):
    """Something that all samples share, whose gradient is theirs together."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(torch.linspace(-1, 1, 6))[:, None, None]


def with_positions() -> nn.Module:
    model = right()
    model.between = Positions()
    return model


class Checkpointed(Net):
    """Runs a part of its forward again in backward."""

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


def checkpointed() -> nn.Module:
    return syncbn.convert(Checkpointed())


def unused() -> nn.Module:
    model = right()
    model.spare = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    return model


def without_weights() -> nn.Module:
    return nn.Sequential(syncbn.SyncBatchNorm2d(3, affine=False), nn.Flatten())


class NeverOnOne(Net):
    """The only batch norm is left out on rank 1 of several."""

    def __init__(self) -> None:
        super().__init__()
        self.bn1 = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        if dist.is_initialized() and dist.get_world_size() > 1 and dist.get_rank() == 1:
            self.bn2.forward = lambda x: x * self.bn2.weight.view(-1, 1, 1)
        return super().forward(x)


def leaving_out_on_one() -> nn.Module:
    model: nn.Module = syncbn.convert(NeverOnOne())
    return model
