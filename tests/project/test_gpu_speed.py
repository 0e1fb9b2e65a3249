"""benchmarks/gpu_speed.py runs at toy size; what it prints and draws is complete."""

from __future__ import annotations

import json

import pytest
import torch

from gpu import speed
from gpu.calls import PASSES, WHOLE
from support.paths import ROOT
from support.scripts import Ended, execute, execute_anew

SCRIPT = ROOT / "benchmarks/gpu_speed.py"
STEPS = [*PASSES, *WHOLE]


def run(*options: str) -> Ended:
    (ended,) = execute(SCRIPT, *options, "--rounds", "2", timeout=300)
    return ended


def rows_of(*options: str) -> list[dict]:
    ended = run(*options, "--quick", "--json")
    assert ended.code == 0, ended.stderr
    printed = json.loads(ended.stdout)
    assert printed["environment"]["rounds"] == 2
    return printed["rows"]


def check_device_rows(rows: list[dict]) -> None:
    assert [row["call"] for row in rows] == STEPS * 2
    assert {row["dtype"] for row in rows} == {"float32", "bfloat16"}
    assert all(min(row["syncbn_us"][0], row["share"]) > 0 for row in rows)
    assert all(row["batchnorm/syncbn"] > 0 for row in rows if row["call"] in WHOLE)


def test_device(tmp_path):
    picture = tmp_path / "speed.png"
    check_device_rows(rows_of("device", "--picture", str(picture)))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_device_under_the_interpreter():
    pytest.importorskip("triton", reason="needs the extra [triton]")
    told = {"TRITON_INTERPRET": "1", "SYNCBN_KERNELS": "triton"}
    options = ["device", "--rounds", "2", "--quick", "--json"]
    ended = execute_anew(SCRIPT, *options, timeout=300, **told)
    assert ended.code == 0, ended.stderr
    check_device_rows(json.loads(ended.stdout)["rows"])


def test_host():
    rows = rows_of("host", "--calls", "2")
    layers = ["layer forward", "layer", "layer over ranks"]
    assert [row["call"] for row in rows] == [*PASSES, *layers]
    assert all(row["syncbn_us"][0] > 0 for row in rows)


@pytest.mark.slow
def test_compiled():
    rows = rows_of("compiled")
    assert [row["call"] for row in rows] == ["eager", "compiled"]
    assert all(row["batchnorm/syncbn"] > 0 for row in rows)


def test_a_table():
    ended = run("--quick")
    assert ended.code == 0, ended.stderr
    for text in ("syncbn µs", "batchnorm/syncbn", "2×3×4×5", "gradient sums", "2 rounds, copies"):
        assert text in ended.stdout.replace("gradient_sums", "gradient sums")


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ended = run()
    assert ended.code == 1
    assert ended.stderr == "Error: torch sees no GPU; --quick runs toy sizes on the CPU\n"


def test_one_line_says_where_torch_is_faster():
    rows = [
        {"call": "forward", "sync/syncbn": 0.5, "share": 0.9, "cached": False},
        {"call": "backward", "sync/syncbn": 3.0, "batchnorm/syncbn": 2.0, "share": 1.4}
        | {"cached": True},
    ]
    said = speed.said_of_device(rows)
    assert "1.75 (0.50 to 3.00) times as long, less in 1 of 2" in said
    assert "torch.nn.BatchNorm take 2.00 (2.00 to 2.00) times as long, less in 0 of 1" in said
    assert said.endswith("share of copy bandwidth 0.90 to 0.90 where large")
