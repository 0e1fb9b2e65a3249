"""benchmarks/cpu*.py and huge_pages.py run at toy size; what they print and draw is complete."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch

from support import oracle
from support.kernels import needs_native
from support.paths import ROOT
from support.scripts import Ended, execute
from syncbn.diagnose.bench.options import LAYOUTS

FOLDER = ROOT / "benchmarks"


def run(*options: str, script: str = "cpu.py") -> Ended:
    (ended,) = execute(FOLDER / script, *options, timeout=300)
    return ended


def rows_of(*options: str, script: str = "cpu.py") -> list[dict]:
    result = run(*options, "--quick", "--json", script=script)
    assert result.code == 0, result.stderr
    printed = json.loads(result.stdout)
    assert "kernels" in printed["environment"]
    return printed["rows"]


def test_layers(tmp_path):
    picture = tmp_path / "speed.png"
    rows = rows_of("layers", "--rounds", "2", "--picture", str(picture))
    cells = {(r["dtype"], r["layout"], r["threads"], r["pass"]) for r in rows}
    kinds = (("float32", "contiguous"), ("bfloat16", "channels_last"))
    assert cells == {
        (*kind, n, pass_) for kind in kinds for n in (1, 2) for pass_ in ("forward", "backward")
    }
    assert all(min(*row["syncbn_us"][:1], row["ratio"], row["torch_copies"]) > 0 for row in rows)
    floors = [row for row in rows if "over_floor" in row]
    compiled = bool(shutil.which("c++"))
    assert [(row["dtype"], row["threads"]) for row in floors] == [("float32", 1)] * 2 * compiled
    assert all(row["over_floor"] > 0 for row in floors)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_layers_prints_a_table():
    result = run("layers", "--quick", "--rounds", "2", "--threads", "1")
    assert result.code == 0, result.stderr
    for text in ("syncbn µs", "torch copies", "ratio", "2×3×4×5", "1 thread(s), 2 rounds"):
        assert text in result.stdout


def test_ranks():
    rows = rows_of("ranks", "--rounds", "2")
    assert [row["shape"] for row in rows] == [[2, 3, 4, 5], [4, 3]]
    for row in rows:
        assert row["over_parts"] > 0
        assert row["naive_over_syncbn"] > 0
        assert min(row["shared_over_local"], row["shared_over_torch"]) > 0


def test_accuracy():
    rows = rows_of("accuracy")
    assert [row["mean/std"] for row in rows] == [0, 10, 100, 1000]
    for row in rows:
        assert row["syncbn_mean"] == pytest.approx(0, abs=1e-3)
        assert row["syncbn_std"] == pytest.approx(1, abs=1e-3)


@pytest.mark.slow
def test_model():
    pytest.importorskip("transformers")
    (row,) = rows_of("model", "--rounds", "2")
    assert row["images"] == [2, 3, 32, 32]
    assert min(row["syncbn_over_torch"], row["shared_over_torch"]) > 0


def test_model_without_transformers_says_so():
    program = "import sys; sys.modules['transformers'] = None; sys.path.insert(0, sys.argv.pop()); "
    (result,) = execute(program + "import cpu; cpu.main()", "model", str(FOLDER))
    assert result.code == 1
    assert result.stderr == "Error: transformers is missing: pip install transformers\n"


@needs_native
def test_compilers():
    """Compares the installed library with itself."""
    rows = rows_of("--turns", "1", "--repetitions", "2", script="cpu_compilers.py")
    cells = {(r["dtype"], r["layout"], r["pass"]) for r in rows}
    kinds = (("float32", "contiguous"), ("bfloat16", "channels_last"))
    assert cells == {(*kind, pass_) for kind in kinds for pass_ in ("forward", "backward")}
    assert all(min(row["old_us"], row["new_us"], row["new/old"][0]) > 0 for row in rows)


def test_compilers_tells_what_is_outside(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import cpu_compilers

    repetitions = [{"forward": [2.0, 2.0 * n], "backward": [2.0, 1.8 * n]} for n in (1.1, 1.2, 1.3)]
    rows = cpu_compilers.rows_of({cpu_compilers.TOYS[0]: repetitions})
    assert [row["new/old"] for row in rows] == [
        pytest.approx((1.2, 0.1)),
        pytest.approx((1.08, 0.09)),
    ]
    assert [row["verdict"] for row in rows] == ["outside 15 %", "within 15 %"]


def test_compilers_refuses_what_is_not_there():
    result = run("no-such-g++", "g++", script="cpu_compilers.py")
    assert result.code == 2
    assert "no-such-g++ is not here" in result.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
@pytest.mark.parametrize(
    ("shape", "layout"),
    [((2, 3, 4, 5), "contiguous"), ((2, 3, 4, 5), "channels_last"), ((9, 3), "contiguous")],
)
def test_the_floor_is_a_batch_norm(monkeypatch, shape, layout):
    """Of values around zero, of which plain sums are good enough."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import cpu_floor

    x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
    dy = torch.randn_like(x)
    forward, backward = cpu_floor.passes(cpu_floor.load(), x, dy)
    expected = oracle.batch_norm(x, dy)
    oracle.assert_close(forward(), expected.y, factor=10)
    oracle.assert_close(backward(), expected.dx, factor=10)


def test_layers_without_a_compiler_says_so(tmp_path):
    options = ("layers", "--quick", "--json", "--rounds", "2", "--threads", "1")
    (result,) = execute(FOLDER / "cpu.py", *options, PATH=str(tmp_path), CXX="")
    assert result.code == 0
    assert result.stderr == (
        "no column of floors, which needs a C++ compiler: expected c++ or $CXX\n"
    )
    assert all("over_floor" not in row for row in json.loads(result.stdout)["rows"])


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_huge_pages():
    rows = rows_of("--rounds", "2", script="huge_pages.py")
    assert [row["pass"] for row in rows] == ["forward", "backward"]
    assert all(row["small_over_huge"] > 0 for row in rows)
