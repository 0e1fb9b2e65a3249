"""benchmarks/gpu_calls.py runs, with kernels that start nothing."""

from __future__ import annotations

from gpu.calls import PASSES
from gpu_calls import rows_of
from syncbn.kernels.triton import launch


def test_rows():
    kernel = launch.kernel
    rows = rows_of(2, 1)
    assert [row["call"] for row in rows] == [*PASSES, "batch_norm", "batch_norm_backward"]
    assert all(row["median µs a launch"] >= row["least µs a launch"] > 0 for row in rows)
    assert launch.kernel is kernel
