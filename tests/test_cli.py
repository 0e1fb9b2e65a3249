"""The command syncbn, as a shell sees it: output, exit status, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")

from syncbn.cli import main
from syncbn.demo import train
from syncbn.kernels import native

COMMAND = [sys.executable, "-m", "syncbn"]
NO_PLOT = ["--no-plot"]
TIMEOUT = 120  # seconds, for a loaded machine; each run takes a tenth
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's /proc")


def syncbn(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, timeout=TIMEOUT, cwd=cwd
    )


def test_demo_prints_a_table_and_writes_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--ranks", "1", "--batch-per-rank", "200", "--epochs", "1", "--out", "new/a.png"]
    assert main(["demo", *options]) == 0
    out, err = capsys.readouterr()
    assert "200 images per rank on 1 rank, 1 epoch" in out
    assert "Picture: new/a.png" in out
    assert "\x1b" not in out + err
    assert max(map(len, out.splitlines())) <= 80
    assert (tmp_path / "new/a.png").stat().st_size > 10_000


def test_demo_json_is_one_object_and_nothing_else(tmp_path: Path) -> None:
    options = ["--ranks", "2", "--batch-per-rank", "100", "--epochs", "1", "--seed", "3"]
    done = syncbn("demo", *options, "--no-plot", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
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
    ],
)
def test_bad_usage_is_one_line_and_status_2(
    arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert len(err.splitlines()) == 1
    command = " ".join(["syncbn", *(name for name in arguments[:1] if name in ("demo", "info"))])
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
    assert list(facts) == ["versions", "devices", "engines", "kernels"]
    assert "threads" in facts["devices"]["cpu"]
    assert {"gloo", "nccl", "ucc", "mpi"} == set(facts["engines"])
    assert set(facts["kernels"]) == {"cpu", "cuda"}
    if native.available():
        assert facts["kernels"]["cpu"] == f"native ({native.instruction_set()})"
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert facts["versions"]["torch"] in out
    assert facts["kernels"]["cpu"] in out


def test_info_takes_torch_alone() -> None:
    code = (
        "import sys, torch, torch.distributed\n"
        "before = set(sys.modules)\n"
        "from syncbn.cli import main\n"
        "status = main(['info'])\n"
        "roots = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "assert status == 0\n"
        "assert roots - sys.stdlib_module_names == {'syncbn'}, roots"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("module", "command"),
    [
        ("rich", "demo"),
        ("sklearn", "demo"),
        ("matplotlib", "demo"),
    ],
)
def test_a_missing_extra_is_one_line(module: str, command: str, tmp_path: Path) -> None:
    code = (
        f"import sys; sys.modules[{module!r}] = None\n"
        "import syncbn; from syncbn.cli import main\n"
        f"sys.exit(main([{command!r}]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT, cwd=tmp_path
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == f"syncbn: needs {module}: pip install 'syncbn[cli]'\n"


def test_a_rank_that_raises_shows_its_traceback(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train, "run_rank", _broken_rank)
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


class Running:
    """A long demo in a session and a temporary directory of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [*COMMAND, "demo", "--ranks", "2", "--epochs", "1000", "--no-plot"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "TMPDIR": str(folder)},
            cwd=folder.parent,
        )

    def session(self) -> dict[int, str]:
        """pid → command of every process of the session that has not ended."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                command = (entry / "cmdline").read_text()
            except OSError:  # it ended meanwhile
                continue
            if int(session) == self.process.pid and state != "Z":
                found[int(entry.name)] = command
        return found

    def ranks(self) -> list[int]:
        return [pid for pid, command in self.session().items() if "spawn_main" in command]

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < end, f"waited for {what} in vain"
            time.sleep(0.02)

    def wait_until_training(self) -> None:
        self.wait_for(lambda: any(self.folder.glob("*/rendezvous")), "the ranks to meet")
        time.sleep(0.5)

    def assert_nothing_left(self) -> None:
        self.wait_for(lambda: not self.session(), "every process to end")
        assert list(self.folder.iterdir()) == []


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    (tmp_path / "tmp").mkdir()
    demo = Running(tmp_path / "tmp")
    yield demo
    for pid in demo.session():
        os.kill(pid, signal.SIGKILL)
    demo.process.communicate(timeout=TIMEOUT)


@needs_proc
@pytest.mark.parametrize("whole_group", [True, False], ids=["group-starting", "parent-training"])
def test_ctrl_c_leaves_nothing(running: Running, whole_group: bool) -> None:
    if whole_group:  # while the ranks import, when they would still print a traceback each
        running.wait_for(lambda: len(running.ranks()) == 2, "the ranks")
    else:
        running.wait_until_training()
    (os.killpg if whole_group else os.kill)(running.process.pid, signal.SIGINT)
    out, err = running.process.communicate(timeout=TIMEOUT)
    assert running.process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    assert err.endswith("syncbn demo: interrupted\n")
    running.assert_nothing_left()


@needs_proc
def test_sigterm_leaves_nothing(running: Running) -> None:
    running.wait_until_training()
    running.process.terminate()
    _, err = running.process.communicate(timeout=TIMEOUT)
    assert running.process.returncode == 143
    assert "Traceback" not in err
    running.assert_nothing_left()


@pytest.mark.slow
@needs_proc
def test_a_killed_rank_ends_the_run(running: Running) -> None:
    running.wait_until_training()
    os.kill(running.ranks()[1], signal.SIGKILL)
    _, err = running.process.communicate(timeout=TIMEOUT)
    assert running.process.returncode == 1
    assert "was ended by SIGKILL" in err
    running.assert_nothing_left()


@needs_proc
def test_a_killed_parent_leaves_nothing(running: Running) -> None:
    running.wait_until_training()
    running.process.kill()
    running.process.wait(timeout=TIMEOUT)
    running.assert_nothing_left()
