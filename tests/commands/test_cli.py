"""The command syncbn, as a shell sees it: output, exit status, and what it leaves behind."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.processes import forked_launches
from support.scripts import execute
from support.shells import TIMEOUT, Running, needs_proc, running_in

if any(importlib.util.find_spec(name) is None for name in ("sklearn", "matplotlib")):
    pytest.skip("needs the extra [demo]", allow_module_level=True)

import syncbn
from syncbn.cli import main
from syncbn.demo import train
from syncbn.kernels import native

NO_PLOT = ["--no-plot"]
COMMANDS = ("demo", "check", "bench", "info", "trace")


def test_demo_prints_a_table_and_writes_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--ranks", "1", "--batch-per-rank", "200", "--epochs", "1", "--out", "new/a.png"]
    with forked_launches():
        assert main(["demo", *options]) == 0
    out, err = capsys.readouterr()
    assert "200 images per rank on 1 rank, 1 epoch" in out
    assert "Picture: new/a.png" in out
    assert "\x1b" not in out + err
    assert max(map(len, out.splitlines())) <= 80
    assert (tmp_path / "new/a.png").stat().st_size > 10_000


def test_demo_json_is_one_object_and_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--ranks", "2", "--batch-per-rank", "100", "--epochs", "1", "--seed", "3"]
    with forked_launches():
        assert main(["demo", *options, "--no-plot", "--json"]) == 0
    content = json.loads(capfd.readouterr().out)
    assert content["options"] | {"ranks": 2, "batch_per_rank": 100, "seed": 3} == content["options"]
    assert set(content["versions"]) == {"syncbn", "torch", "python"}
    assert content["picture"] is None
    assert list(content["arms"]) == ["batchnorm", "syncbn", "one-process"]
    for arm in content["arms"].values():
        assert arm["accuracy_percent"] == arm["curve"][-1]["accuracy_percent"]
        assert {"label", "loss", "validation_loss", "seconds_per_step"} < set(arm)
    assert content["arms"]["syncbn"]["weight_difference"] <= 1e-9
    assert content["arms"]["one-process"]["weight_difference"] is None
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["demo", "--ranks", "0"], "--ranks"),
        (["demo", "--ranks", "two"], "--ranks"),
        (["demo", "--batch-per-rank", "0"], "--batch-per-rank"),
        (["demo", "--epochs", "-1"], "--epochs"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "--seed", str(2**32)], "--seed"),
        (["demo", "--epochs"], "--epochs"),
        (["demo", "--out", "a.txt"], "'a.txt' should end in"),
        (["demo", "--out", "picture"], "should end in"),
        (["demo", "--out", "/dev/null/a.png"], "cannot make /dev/null"),
        (["demo", "--ranks", "4", "--batch-per-rank", "400"], "only 1437"),
        (["demo", "--nonsense"], "--nonsense"),
        (["demo", "surplus"], "surplus"),
        (["--nonsense"], "--nonsense"),
        (["nonsense"], "nonsense"),
        (["info", "--nonsense"], "--nonsense"),
        (["trace"], "folder"),
        (["trace", "/nowhere"], "expected a folder, got '/nowhere'"),
        (["trace", ".", "--last", "0"], "--last"),
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    command = " ".join(["syncbn", *(name for name in arguments[:1] if name in COMMANDS)])
    assert err.startswith(f"{command}: ")
    assert text in err


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--help"], ["demo", "--help"], ["--version"]):
        assert main(arguments) == 0
        out, err = capsys.readouterr()
        assert "syncbn" in out
        assert err == ""


def test_info_names_what_serves_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts) == ["versions", "devices", "engines", "kernels", "memory"]
    assert "threads" in facts["devices"]["cpu"]
    assert {"gloo", "nccl", "ucc", "mpi", "shared memory", "CPU exchange"} == set(facts["engines"])
    assert set(facts["kernels"]) == {"cpu", "cuda"}
    if native.available():
        assert facts["kernels"]["cpu"] == f"native ({native.instruction_set()})"
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert facts["versions"]["torch"] in out
    assert facts["kernels"]["cpu"] in out
    assert facts["memory"]["huge pages"] in out


WITHOUT = """
import sys
module, *arguments = sys.argv[1:]
for name in [name for name in sys.modules if name.partition(".")[0] == module]:
    del sys.modules[name]
sys.modules[module] = None
import syncbn
from syncbn.cli import main
sys.exit(main(arguments))
"""


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("rich", "demo", "demo"),
        ("sklearn", "demo", "demo"),
        ("matplotlib", "demo", "demo"),
        ("rich", "check a:b", "cli"),  # before what else is missing
        ("rich", "bench", "cli"),
        ("matplotlib", "bench --shape 2,3 --out x.png", "plot"),
    ],
)
def test_a_missing_extra_is_one_line(module: str, command: str, extra: str) -> None:
    (done,) = execute(WITHOUT, module, *command.split())
    assert done.code == 1
    assert done.stdout == ""
    assert done.stderr == f"syncbn: needs {module}: pip install 'syncbn[{extra}]'\n"


def test_a_rank_that_raises_shows_its_traceback(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "run_rank", _broken_rank)
    with forked_launches():
        assert main(["demo", "--ranks", "2", *NO_PLOT]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert "rank 1 failed:" in err
    assert "in _broken_rank" in err
    assert "ValueError: broken on purpose" in err


def _broken_rank(rank: int, task: object, folder: Path, send: Callable[[object], None]) -> None:
    if rank == 1:
        raise ValueError("broken on purpose")
    signal.pause()


DEMO = ["demo", "--ranks", "2", "--epochs", "1000", "--no-plot"]


@pytest.fixture
def demo(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts one that leaves nothing behind, whatever the test finds."""
    with running_in(tmp_path) as start:
        yield lambda *, forked=False: start(DEMO, forked=forked)


@needs_proc
@pytest.mark.parametrize("whole_group", [True, False], ids=["group-starting", "parent-training"])
def test_ctrl_c_leaves_nothing(demo: Callable[..., Running], whole_group: bool) -> None:
    running = demo(forked=not whole_group)
    if whole_group:  # while the ranks import, when they would still print a traceback each
        running.wait_for(lambda: len(running.ranks()) == 2, "the ranks")
    else:
        running.wait_until_training()
    (os.killpg if whole_group else os.kill)(running.process.pid, signal.SIGINT)
    code, out, err = running.end()
    assert code == 130
    assert out == ""
    assert "Traceback" not in err
    assert err.endswith("syncbn demo: interrupted\n")
    running.assert_nothing_left()


TORCH = """
import os, signal, time
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""
SCRIPT = "import sys; from syncbn.cli import main; sys.exit(main())"


@pytest.mark.parametrize("name", ["-m", "syncbn", "program"])
def test_ctrl_c_while_torch_is_imported(tmp_path: Path, name: str) -> None:
    """One line of the command, started either way; elsewhere what it always was."""
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / name).write_text(SCRIPT)
    source = Path(syncbn.__file__).parents[1]
    ended = subprocess.run(
        [sys.executable, *(["-m", "syncbn"] if name == "-m" else [str(tmp_path / name)]), "demo"],
        env=os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{source}"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=False,
    )
    assert ended.stdout == ""
    if name == "program":
        assert ended.returncode == -signal.SIGINT
        assert ended.stderr.endswith("KeyboardInterrupt\n")
    else:
        assert ended.returncode == 130
        assert ended.stderr == "syncbn demo: interrupted\n"


@needs_proc
def test_sigterm_leaves_nothing(demo: Callable[..., Running]) -> None:
    running = demo(forked=True)
    running.wait_until_training()
    running.process.terminate()
    code, _, err = running.end()
    assert code == 143
    assert "Traceback" not in err
    running.assert_nothing_left()


@pytest.mark.slow
@needs_proc
def test_a_killed_rank_ends_the_run(demo: Callable[..., Running]) -> None:
    running = demo()
    running.wait_until_the_ranks_meet()
    os.kill(running.ranks()[1], signal.SIGKILL)
    code, _, err = running.end()
    assert code == 1
    assert "was ended by SIGKILL" in err
    running.assert_nothing_left()


@needs_proc
def test_a_killed_parent_leaves_nothing(demo: Callable[..., Running]) -> None:
    running = demo()
    running.wait_until_the_ranks_meet()
    running.process.kill()
    running.end()
    running.assert_nothing_left()
