"""syncbn bench, as a shell sees it: output, exit status, and what it leaves behind."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.processes import forked_launches
from support.shells import Running, needs_proc, running_in

if any(importlib.util.find_spec(name) is None for name in ("rich", "matplotlib")):
    pytest.skip("needs rich and matplotlib", allow_module_level=True)

from syncbn.cli import main
from syncbn.diagnose.bench import measure, picture
from syncbn.diagnose.bench.report import Report

TOY = ["--device", "cpu", "--rounds", "2", "--shape", "2,3,4,5", "--shape", "4,3"]
NET = ["--model", "support.planted:plain", "--input", "3,8,8", "--batch-per-rank", "2"]


def status(*arguments: str) -> int:
    with forked_launches():
        return main(["bench", *arguments])


def test_shapes_are_tables_a_sentence_and_a_picture(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    picture = tmp_path / "new" / "a.png"
    assert status(*TOY, "--out", str(picture)) == 0
    out, err = capfd.readouterr()
    assert max(map(len, out.splitlines())) <= max(80, len(f"Picture: {picture}"))
    for text in ("2×3×4×5", "4×3", "torch.nn.BatchNorm", "naive layer", "All 2 together"):
        assert text in out
    flat = " ".join(out.split())
    assert "forward and backward of 2 layers, one of each shape, take" in flat
    assert f"Picture: {picture}" in flat
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert err == ""  # no bar where nobody looks


def test_a_model_is_one_json_object(capfd: pytest.CaptureFixture[str]) -> None:
    assert status("--device", "cpu", "--rounds", "2", *NET, "--json", "--ranks", "2") == 0
    content = json.loads(capfd.readouterr().out)
    assert set(content) == {
        *("options", "environment", "rows", "total", "ranking", "balance", "sentence", "notes"),
        *("picture", "seconds"),
    }
    assert content["options"]["model"] == "support.planted:plain"
    assert set(content["ranking"]) == {"syncbn", "batchnorm", "naive"}
    assert set(content["environment"]) == {
        *("versions", "machine", "device", "cores", "ranks", "threads", "kernels", "communicator"),
    }
    assert set(content["environment"]["versions"]) == {"syncbn", "torch", "python"}
    first, second = content["rows"]
    assert (first["layers"], first["shape"], first["calls"]) == (["bn1"], [2, 6, 6, 6], 1)
    assert (second["layers"], second["dtype"]) == (["bn2"], "float32")
    assert content["total"]["calls"] == 2
    for times in (first["times"], content["total"]["times"]):
        assert set(times) == {"syncbn", "alone", "exchange", "batchnorm", "naive"}
        for passes in times.values():
            assert set(passes) == {"forward", "backward", "both"}
            for timing in passes.values():
                assert set(timing) == {"median_ms", "spread_ms", "over_syncbn"}
        assert times["syncbn"]["both"]["over_syncbn"] == 1
    assert set(content["balance"]) == {"dominates", "by", "arithmetic", "messages", "waiting"}
    assert content["picture"] is None


def test_one_rank_of_a_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    program = "import torch\ndef net():\n    return torch.nn.LazyBatchNorm1d()\n"
    (tmp_path / "my-net.py").write_text(program)
    options = ["--model", f"{tmp_path}/my-net.py:net", "--input", "3,4", "--ranks", "1"]
    assert status("--device", "cpu", "--rounds", "2", *options) == 0
    out = " ".join(capfd.readouterr().out.split())
    assert "4×3×4" in out
    assert "One rank exchanges nothing, all is arithmetic" in out


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--shape", "4"], "expected a shape of 2 to 5 sizes N,C,… of at least 1, got 4"),
        (["--shape", "4,x"], "expected sizes such as 4,64,56,56, got '4,x'"),
        (["--shape", "1,3"], "expected more than one value per channel on each rank"),
        (["--shape", "4,3", "--channels-last"], "shapes of 4 or 5 sizes for channels_last"),
        (["--input", "3,8"], "expected input, data and batch-per-rank with a model, got none; add"),
        (["--batch-per-rank", "4"], "and batch-per-rank with a model, got none; add --model"),
        (["--batch-per-rank", "0"], "--batch-per-rank"),
        (["--model", "a:b"], "expected input, the shape of one sample, or data"),
        (["--model", "a:b", "--input", "3", "--shape", "4,3"], "shapes or a model, got both"),
        (["--model", "a", "--input", "3"], "expected factory as 'package.module:name', got 'a'"),
        (["--ranks", "0"], "--ranks"),
        (["--rounds", "1"], "--rounds"),
        (["--dtype", "int8"], "--dtype"),
        (["--out", "a.txt"], "--out: 'a.txt' should end in one of"),
        (["--out", "/dev/null/a.png"], "--out: cannot make /dev/null"),
        (["--model", "nowhere:f", "--input", "3"], "factory nowhere:f: no module named 'nowhere'"),
        (["--model", "nowhere.py:f", "--input", "3"], "no file 'nowhere.py'"),
        (["--model", "support.planted:broken", "--input", "3,8,8"], "raised KeyError"),
        (["--model", "torch.nn:Flatten", "--input", "3,8"], "expected a model with batch norms"),
    ],
)
def test_what_cannot_be_measured_is_one_line_and_status_2(
    arguments: list[str], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert status("--device", "cpu", *arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    assert err.startswith("syncbn bench: ")
    assert text in err


@pytest.mark.parametrize("more", [[], ["--traceback"]], ids=["one-line", "traceback"])
def test_a_rank_that_raises_is_one_line_and_status_1(
    more: list[str], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "run_rank", _broken_rank)
    assert status(*TOY, *more) == 1
    out, err = capfd.readouterr()
    assert out == ""
    *trace, last = err.splitlines()
    if more:
        assert trace.pop(0) == "syncbn bench: Traceback (most recent call last):"
        assert "in _broken_rank" in err
        assert last == "rank 1 failed: RuntimeError: broken on purpose"
    else:
        assert trace == []
        assert last == "syncbn bench: rank 1 failed: RuntimeError: broken on purpose"


def _broken_rank(rank: int, task: object, folder: Path, send: Callable[[object], None]) -> None:
    if rank == 1:
        raise RuntimeError("broken\non purpose")
    signal.pause()


def test_a_model_that_ends_its_process_is_one_line_and_status_1(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert status("--device", "cpu", "--model", "support.planted:dying", "--input", "3,8,8") == 1
    assert capfd.readouterr().err == "syncbn bench: rank 0 left with exit status 7\n"


def test_a_picture_that_cannot_be_written_is_one_line_and_status_1(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(report: Report, path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(picture, "draw", full)
    path = str(tmp_path / "a.png")
    assert status(*TOY, "--ranks", "1", "--out", path) == 1
    err = capfd.readouterr().err
    reason = f"cannot write the picture: [Errno 28] No space left on device: '{path}'"
    assert err == f"syncbn bench: {reason}\n"


def test_a_gpu_that_is_not_there_is_refused(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert status("--device", "cuda") == 2
    assert "expected device cpu, got cuda: this torch sees no GPU" in capfd.readouterr().err


@pytest.fixture
def endless(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts a measurement of more rounds than anybody waits for."""
    with running_in(tmp_path) as start:
        options = ["--device", "cpu", "--rounds", "1000000", "--shape", "4,3"]
        yield lambda **others: start(["bench", *options], **others)


@needs_proc
def test_ctrl_c_leaves_nothing(endless: Callable[..., Running]) -> None:
    running = endless(forked=True)
    running.wait_until_training()
    os.kill(running.process.pid, signal.SIGINT)
    code, out, err = running.end()
    assert code == 130
    assert out == ""
    assert err == "syncbn bench: interrupted\n"
    running.assert_nothing_left()
