"""A small network with residual blocks, for whole training steps."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

CLASSES = 5
IMAGE = (3, 12, 12)


class Residual(nn.Module):
    """relu(bn(conv(x)) + shortcut(x)), as in ResNet; the shortcut halves the image."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride=2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.bn(self.conv(x)) + self.shortcut(x))


def make_network(channels: int) -> nn.Sequential:
    """Three batch norms, with 2-D and 1-D input, one of them a cumulative average."""
    torch.manual_seed(0)
    stem = nn.Conv2d(IMAGE[0], channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
    head = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(2 * channels, momentum=None)
    return nn.Sequential(
        *stem, nn.ReLU(), Residual(channels, 2 * channels), *head, nn.Linear(2 * channels, CLASSES)
    )


def make_data(samples: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(samples, *IMAGE).double() + 1, torch.randint(CLASSES, (samples,))


def training_step(
    model: nn.Module, images: Tensor, labels: Tensor, *, share: float
) -> Callable[[], None]:
    """A step of SGD on share · Σ of the samples' losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(model(images), labels, reduction="sum") * share
        loss.backward()
        optimizer.step()

    return run
