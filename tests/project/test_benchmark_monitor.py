"""benchmarks/monitor.py runs at toy size, and its network is what it says."""

from __future__ import annotations

import json

import torch

import monitor
from support.paths import ROOT
from support.scripts import execute


def test_what_it_prints():
    options = ("--quick", "--rounds", "2", "--every", "2", "--json")
    (ended,) = execute(ROOT / "benchmarks/monitor.py", *options, timeout=300)
    assert ended.code == 0, ended.stderr
    (row,) = json.loads(ended.stdout)["rows"]
    assert (row["images"], row["layers"], row["every"]) == ([2, 3, 32, 32], 17, 2)
    assert min(row["with_ms"][0], row["without_ms"][0]) > 0
    assert min(row["with_over_without"][0], row["same_in_CPU_time"][0]) > 0


def test_the_network():
    network = monitor.network(4)
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 10)
    norms = [each for each in network.modules() if isinstance(each, torch.nn.BatchNorm2d)]
    assert [norm.num_features for norm in norms] == [4] * 5 + [8] * 4 + [16] * 4 + [32] * 4
