"""A padded batch of sequences, its mask and what the mask leaves."""

from __future__ import annotations

import torch

from syncbn import mask_from_lengths

LENGTHS = torch.tensor([5, 2, 7, 1, 3])


def speech(size=7, channels=3, dtype=torch.float64, padding=0.0):
    """Sequences (N, C, size) of LENGTHS, padded, their mask, and an output gradient."""
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, 5, channels, 7, generator=generator, dtype=torch.float64) * 2 + 3
    mask = mask_from_lengths(LENGTHS, size)
    wide = torch.full((2, 5, channels, size), padding, dtype=torch.float64)
    wide[..., :7] = torch.stack((x, dy))
    return (*wide.masked_fill(~mask.unsqueeze(1), padding).to(dtype), mask)


def packed(tensor, mask):
    return tensor.movedim(1, -1)[mask]
