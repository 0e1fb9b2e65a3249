"""examples/segmentation.py at toy size: what it leaves, what resuming and ranks change."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from support.paths import ROOT
from support.scripts import execute

if any(importlib.util.find_spec(name) is None for name in ("rich", "sklearn", "matplotlib")):
    pytest.skip("needs the extra [demo]", allow_module_level=True)

EXAMPLE = ROOT / "examples/segmentation.py"
CPU = torch.device("cpu")


def imported(name: str) -> Any:
    """A file of examples/, as a module."""
    if str(EXAMPLE.parent) not in sys.path:
        sys.path.append(str(EXAMPLE.parent))
    return importlib.import_module(name)


def run(ranks: Any, checkpoint: Path, *options: str, size: int = 2) -> dict[str, Any]:
    """Train on ranks that live on, for their imports; the checkpoint."""

    def train(rank: int) -> None:
        example = imported("segmentation")
        example.train(example.parsed(["--toy", "--checkpoint", str(checkpoint), *options]), CPU)

    ranks(size, train)
    return torch.load(checkpoint, weights_only=True)


def test_the_script_runs_on_two_ranks(tmp_path: Path) -> None:
    picture, checkpoint = tmp_path / "a.png", tmp_path / "a.pt"
    options = ["--epochs", "1", "--picture", str(picture), "--checkpoint", str(checkpoint)]
    first, second = execute(EXAMPLE, "--toy", *options, ranks=2)
    assert (first.code, second.code) == (0, 0), first.stderr + second.stderr
    assert first.stdout.startswith("epoch 1: mean IoU ")
    assert f"Picture: {picture}" in first.stdout
    assert second.stdout == ""
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert len(torch.load(checkpoint, weights_only=True)["history"]) == 1


def test_a_resumed_run_ends_with_the_bits_of_one_that_was_never_stopped(
    ranks: Any, tmp_path: Path
) -> None:
    whole = run(ranks, tmp_path / "whole.pt", "--epochs", "2")
    half = run(ranks, tmp_path / "parts.pt", "--epochs", "1")
    resumed = run(ranks, tmp_path / "parts.pt", "--epochs", "2", "--resume")
    assert len(half["history"]) == 1
    assert resumed["history"] == whole["history"]
    for name, tensor in whole["model"].items():
        assert torch.equal(tensor, resumed["model"][name]), name
    assert not torch.equal(half["model"]["head.weight"], whole["model"]["head.weight"])
    assert not list(tmp_path.glob("*.part"))


def test_ranks_train_as_one_process_does(ranks: Any, tmp_path: Path) -> None:
    """To the rounding of float32; with statistics of their own, ranks do not."""
    one = run(ranks, tmp_path / "one.pt", "--epochs", "1", "--batch", "2", size=1)
    sync = run(ranks, tmp_path / "sync.pt", "--epochs", "1")
    local = run(ranks, tmp_path / "local.pt", "--epochs", "1", "--norm", "local")
    name = "down.0.norm.running_mean"
    torch.testing.assert_close(sync["model"][name], one["model"][name], rtol=1e-3, atol=1e-4)
    assert (local["model"][name] - one["model"][name]).abs().max() > 1e-3


def test_scenes_are_the_same_each_time_and_of_many_sizes() -> None:
    scenes = imported("scenes")
    train, held_out = scenes.Scenes(8, train=True), scenes.Scenes(8, train=False)
    assert torch.equal(train[3][0], train[3][0])
    assert not torch.equal(train[0][1], held_out[0][1])
    assert len({train[n][0].shape for n in range(8)}) > 4
    for image, label in (train[n] for n in range(8)):
        assert image.shape[1:] == label.shape
        assert 0 < label.max() < scenes.CLASSES
