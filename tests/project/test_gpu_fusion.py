"""What inductor makes for a GPU of a layer over ranks: no more bytes than of torch's own layer."""

from __future__ import annotations

import pytest
import torch

from gpu.calls import Case
from gpu.fusion import count, layers
from gpu.speed import Block

CASE = Case((4, 64, 56, 56), torch.bfloat16, "channels_last")
KERNELS = {"forward": 8, "backward": 11}  # small ones for messages and counters among them


def test_bytes_and_kernels():
    pytest.importorskip("triton", reason="needs the extra [triton]")
    ours, theirs = (count(Block(layer), CASE) for layer in layers(64).values())
    for direction, most in KERNELS.items():
        found, peer = ours[direction], theirs[direction]
        assert found.kernels <= most
        assert found.moved <= peer.moved + 0.02, (found, peer)
        # measure, and normalise with all around it; ReLU's backward, sums, and the input's gradient
        assert len(found.tensors) <= {"forward": 2, "backward": 3}[direction]
        assert not found.wide  # what is float64 is computed per channel, once
