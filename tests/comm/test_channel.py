"""Which way CPU tensors of a group take: memory where all ranks share it, or its backend."""

from __future__ import annotations

import logging
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import syncbn
from support.groups import group_over
from syncbn import info
from syncbn.comm import channel, process_group, resolve


def way(group):
    """The way that a group takes, which has exchanged something."""
    return "torch" if process_group._CHANNELS[group] is None else "shared_memory"


@pytest.mark.parametrize("told", ["", "torch", "shared_memory"])
def test_chosen_by_itself_or_told(ranks, told):
    def choose(rank):
        with mock.patch.object(process_group._log, "info") as said:
            group = group_over(told)
        (template, *words) = said.call_args.args
        return way(group), template % tuple(words)

    for found, said in ranks(3, choose):
        assert found == (told or "shared_memory")
        assert "of 3 ranks exchanges through" in said
        assert ("SYNCBN_EXCHANGE is torch" in said) == (told == "torch")


def test_one_that_cannot_is_enough(ranks):
    """Then all take the backend, and go on; or all raise, where they are told to share memory."""

    def choose(rank):
        why = "this rank has none" if rank == 1 else None
        with mock.patch.object(channel, "unavailable", return_value=why):
            group = group_over("")
            with pytest.raises(RuntimeError) as caught:
                group_over("shared_memory")
        layer = syncbn.SyncBatchNorm1d(2, process_group=group)
        layer(torch.randn(3, 2)).sum().backward()
        return way(group), str(caught.value)

    for found, said in ranks(2, choose):
        assert found == "torch"
        assert "expected ranks that share memory, but on rank 1 of 2 this rank has none" in said


def test_gloo_for_the_cpu_by_another_name(ranks):
    """As groups have it whose other devices have another backend."""

    def choose(rank):
        return way(group_over("", backend="cpu:gloo"))

    assert ranks(2, choose) == ["shared_memory"] * 2


def test_what_is_no_way_is_refused(ranks):
    def choose(rank):
        with pytest.raises(ValueError, match="expected torch or shared_memory, got 'sockets'"):
            group_over("sockets")

    ranks(2, choose)


def test_ranks_that_part_in_one_group_share_memory_in_another(ranks):
    def choose(rank):
        halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        group = halves[rank // 2]
        resolve(group).all_reduce(torch.ones(2))
        return way(group)

    assert ranks(4, choose) == ["shared_memory"] * 4


@pytest.mark.parametrize(
    ("told", "said"),
    [
        ("", "shared_memory among processes of one host"),
        ("torch", "torch, for SYNCBN_EXCHANGE says so"),
        ("sockets", "is none of torch, shared_memory"),
    ],
)
def test_info(told, said):
    with mock.patch.dict(os.environ, {"SYNCBN_EXCHANGE": told}):
        assert said in info.facts()["engines"]["CPU exchange"]
    with mock.patch.object(info, "unavailable", return_value="there is none"):
        assert info._exchange() == "torch, for there is none"


def test_the_logger_is_the_packages():
    assert process_group._log is logging.getLogger("syncbn")
