"""Frames as memory: a header, then numbers. Each of torch's operations would take longer."""

from __future__ import annotations

import struct
from ctypes import memmove, memset, string_at

import torch
from torch import Tensor

# Version and flags; what is called; the call's number; whose layer calls.
HEADER = 4  # words of 8 bytes
HEAD = struct.Struct(f"={HEADER}q")


def plain(tensor: Tensor) -> Tensor:
    """The tensor, or a copy, as its numbers lie in memory, without gaps, on the CPU; no gradient
    flows back from it.
    """
    lies_so = type(tensor) is Tensor and tensor.is_cpu and tensor.is_contiguous()
    if lies_so and not (tensor.is_neg() or tensor.is_conj() or tensor.requires_grad):
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())


def words_of(content: Tensor) -> int:
    """Those of a frame that it fills: an even number, as elements may have 16 bytes."""
    return -(-content.nbytes // 16) * 2


def frame_of(head: bytes, content: Tensor, words: int) -> Tensor:
    """A header and so many words, of which the content fills the first."""
    frame = torch.empty(HEADER + words, dtype=torch.float64, device="cpu")
    begin, length = frame.data_ptr(), content.nbytes
    memmove(begin, head, HEAD.size)
    memmove(begin + HEAD.size, content.data_ptr(), length)
    memset(begin + HEAD.size + length, 0, words * 8 - length)
    return frame


def heads_of(received: Tensor) -> list[tuple[int, ...]]:
    """The headers of all ranks' frames (W, n)."""
    begin, stride = received.data_ptr(), received.stride(0) * 8
    rows = range(begin, begin + received.shape[0] * stride, stride)
    return [HEAD.unpack(string_at(row, HEAD.size)) for row in rows]


def rows_of(received: Tensor, content: Tensor) -> Tensor:
    """The contents (W, *) of all ranks' frames, which are like this rank's."""
    if content.dtype != torch.float64:
        received = received[:, : HEADER + words_of(content)].view(content.dtype)
    shape, strides = (len(received), *content.shape), (received.stride(0), *content.stride())
    return received.as_strided(shape, strides, HEAD.size // content.itemsize)
