"""What the examples of frameworks share: a network, 32 images, and one process to compare with."""

from __future__ import annotations

import copy

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import TensorDataset

BATCH = 8  # of all ranks together, in the order of the data
LEARNING_RATE = 0.1


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, bias=False),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    ).double()


def images() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(32, 3, 8, 8, generator=generator, dtype=torch.float64)
    scale = torch.arange(1, 33, dtype=torch.float64).view(-1, 1, 1, 1)  # ranks' statistics differ
    return TensorDataset(pixels * scale / 8, torch.randint(4, (32,), generator=generator))


def one_process(model: nn.Module) -> dict[str, Tensor]:
    """The state after plain training of a copy on whole batches, as if there were one rank."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    pixels, labels = images().tensors
    for batch, wanted in zip(pixels.split(BATCH), labels.split(BATCH), strict=True):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(batch), wanted).backward()
        optimizer.step()
    return model.state_dict()


def verdict(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Say on rank 0 whether the ranks have got what one process gets."""
    differences = [
        (state[name].double() - value.double()).abs().max() for name, value in expected.items()
    ]
    worst = torch.stack(differences).max()
    ranks = dist.get_world_size() if dist.is_initialized() else 1
    if ranks > 1:
        dist.all_reduce(worst, dist.ReduceOp.MAX)
    if ranks == 1 or dist.get_rank() == 0:
        print(f"{ranks} ranks equal one process: {worst.item() < 1e-10} (up to {worst.item():.1g})")
