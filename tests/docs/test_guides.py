"""What guides say beyond their own blocks: a GAN's step on two ranks equals one process's."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus
from torch.nn.parallel import DistributedDataParallel

import syncbn

IMAGES, NOISE = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64), torch.randn(4, 8, 1, 1).double()


def networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    generator = nn.Sequential(
        *(nn.ConvTranspose2d(8, 8, 4), nn.BatchNorm2d(8), nn.LeakyReLU(0.2)),
        *(nn.ConvTranspose2d(8, 3, 2, 2), nn.Tanh()),
    )
    discriminator = nn.Sequential(
        *(nn.Conv2d(3, 8, 4, 2, 1), nn.BatchNorm2d(8), nn.LeakyReLU(0.2)),
        *(nn.Flatten(), nn.Linear(128, 1)),
    )
    return generator.double(), discriminator.double()


def step(generator: nn.Module, discriminator: nn.Module, images: Tensor, noise: Tensor) -> list:
    """Both gradients of one step as docs/guides/gans.md has it, and the running statistics."""
    plain = getattr(discriminator, "module", discriminator)
    fakes = generator(noise)
    with syncbn.accumulating(plain):
        real, generated = discriminator(images), discriminator(fakes.detach())
        (softplus(-real) + softplus(generated)).mean().backward()
        plain.requires_grad_(False)
        softplus(-plain(fakes)).mean().backward()
        plain.requires_grad_(True)
    models = (generator, discriminator)
    gradients = [p.grad.clone() for model in models for p in model.parameters()]
    return gradients + [b.clone() for model in models for b in model.buffers()]


def test_a_gans_step_equals_one_process(ranks):
    def run(rank):
        models = [DistributedDataParallel(syncbn.convert(model)) for model in networks()]
        mine = slice(2 * rank, 2 * rank + 2)
        return [step(*models, images[mine], NOISE[mine]) for images in IMAGES]

    alone = networks()
    expected = [step(*alone, images, NOISE) for images in IMAGES]
    for found in ranks(2, run):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
