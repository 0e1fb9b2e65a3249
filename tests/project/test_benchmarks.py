"""The benchmarks run, at toy size; what they print is complete, their layers compute the same."""

from __future__ import annotations

import json

import pytest
import torch

import layer
from support.paths import ROOT
from support.scripts import Ended, execute

TOY = ["--shape", "2,3,4,5", "--rounds", "2", "--ranks", "1", "--ranks", "2"]


def run(*options: str, script: str = "layer.py") -> Ended:
    (ended,) = execute(ROOT / "benchmarks" / script, *options)
    return ended


@pytest.mark.slow
def test_layer_prints_json():
    result = run(*TOY, "--json")
    assert result.code == 0, result.stderr
    rows = json.loads(result.stdout)["rows"]
    cells = {(row["ranks"], row["pass_"], row["layer"]) for row in rows}
    assert cells == {(r, p, name) for r in (1, 2) for p in layer.PASSES for name in layer.LAYERS}
    assert all(row["median_ms"] > 0 for row in rows)
    assert all(row["over_torch"] == 1 for row in rows if row["layer"] == "torch")


@pytest.mark.slow
def test_layer_prints_a_table():
    result = run(*TOY[:4], "--ranks", "1")
    assert result.code == 0, result.stderr
    assert "× torch" in result.stdout
    assert "2×3×4×5" in result.stdout


@pytest.mark.slow
def test_collectives_prints_json():
    options = ["--json", "--ranks", "2", "--numel", "5", "--rounds", "2"]
    result = run(*options, script="collectives.py")
    assert result.code == 0, result.stderr
    names = {f"{who} all_{what}" for who in ("torch", "syncbn") for what in ("gather", "reduce")}
    names |= {f"threads all_{what}" for what in ("gather", "reduce")}
    assert json.loads(result.stdout)["2"].keys() >= names


def test_layer_refuses_a_bad_shape():
    result = run("--shape", "2,3")
    assert result.code == 2
    assert "give four sizes N,C,H,W" in result.stderr


def test_the_layers_compared_compute_the_same():
    x = torch.randn(4, 3, 5, 6)
    outputs = [cls(3)(x) for cls in layer.LAYERS.values()]
    for output in outputs[1:]:
        torch.testing.assert_close(output, outputs[0], rtol=1e-4, atol=1e-5)
