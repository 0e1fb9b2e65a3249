"""The benchmark of exchanges runs, at toy size; what it prints is complete."""

from __future__ import annotations

import json

import pytest

from support.paths import ROOT
from support.scripts import execute


@pytest.mark.slow
def test_collectives_prints_json():
    options = ["--json", "--ranks", "2", "--numel", "5", "--rounds", "2"]
    (result,) = execute(ROOT / "benchmarks/collectives.py", *options)
    assert result.code == 0, result.stderr
    names = {f"{who} all_{what}" for who in ("torch", "syncbn") for what in ("gather", "reduce")}
    names |= {f"threads all_{what}" for what in ("gather", "reduce")}
    assert json.loads(result.stdout)["2"].keys() >= names
