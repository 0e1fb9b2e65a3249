"""syncbn check, as a shell sees it: output, exit status, pages, and what it leaves behind."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from support.processes import forked_launches
from support.shells import Running, needs_proc, running_in

if importlib.util.find_spec("rich") is None:
    pytest.skip("needs the extra [cli]", allow_module_level=True)

from syncbn.cli import main

PLANTED = "support.planted:"
ONE_STEP = ["--input", "3,8,8", "--steps", "1", "--batch", "2"]


def status(*arguments: str) -> int:
    with forked_launches():
        return main(["check", *arguments])


def test_equal_is_a_table_and_status_0(capfd: pytest.CaptureFixture[str]) -> None:
    assert status(f"{PLANTED}plain", *ONE_STEP, "--convert") == 0
    out, err = capfd.readouterr()
    assert out.startswith("EQUAL: ")
    assert re.search(r"^  bn1 +SyncBatchNorm2d +yes +1 .* equal$", out, re.MULTILINE)
    assert "\x1b" not in out + err
    assert "4/4 steps" in err.replace("  ", " ")


def test_different_is_status_1_and_one_json_object(capfd: pytest.CaptureFixture[str]) -> None:
    assert status(f"{PLANTED}plain", *ONE_STEP, "--json", "--dtype", "float32") == 1
    content = json.loads(capfd.readouterr().out)
    assert (content["ok"], content["verdict"], content["first"]) == (False, "different", "bn1")
    assert [cause["kind"] for cause in content["causes"]] == ["not converted"]
    assert content["options"]["factory"] == f"{PLANTED}plain"
    assert content["options"]["input"] == [3, 8, 8]
    assert content["shares"] == [1, 1]
    assert set(content) == {
        *("ok", "verdict", "first", "causes", "notes", "rows", "options", "tolerance", "shares"),
        *("seconds", "versions"),
    }
    (row,) = (row for row in content["rows"] if row["layer"] == "bn1")
    assert row["first"]
    assert row["synchronised"] is False
    assert row["calls_on_ranks"] == [1, 1]
    assert set(row["differences"]) == {
        *("output", "output_gradient", "weight_gradient", "weight", "statistics", "loss")
    }
    assert row["differences"]["output"] > 1e-3


def test_the_page_holds_all_in_itself(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "report.html"
    assert status(f"{PLANTED}left_alone", *ONE_STEP, "--html", str(page)) == 1
    assert f"Page: {page}" in capfd.readouterr().out
    text = page.read_text()
    assert "bn1 is the first to depart" in text
    assert text.count("<tr") == 9
    assert not re.findall(r"""(?:src|href|url|@import|https?:)""", text)
    assert '<meta name="viewport"' in text


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "factory"),
        (["a:b"], "expected input, the shape of one sample, or data"),
        (["a", *ONE_STEP], "expected factory as 'package.module:name', got 'a'"),
        ([f"{PLANTED}nothing", *ONE_STEP], "support.planted has no 'nothing'"),
        (["nowhere:f", *ONE_STEP], "no module named 'nowhere'"),
        ([f"{PLANTED}right", "--input", "3,8"], "one process raised"),
        ([f"{PLANTED}right", "--input", "3,none"], "expected sizes such as 3,64,64, got '3,none'"),
        (["a:b", *ONE_STEP, "--ranks", "0"], "--ranks"),
        (["a:b", *ONE_STEP, "--ranks", "3"], "a batch of 2 for 3 ranks"),
        (["a:b", *ONE_STEP, "--dtype", "int8"], "--dtype"),
        (["a:b", *ONE_STEP, "--lr", "-1"], "expected lr > 0"),
        (["a:b", *ONE_STEP, "--html", "/nowhere/a.html"], "--html: expected a file in a folder"),
        (["a:b", *ONE_STEP, "--html", "/"], "'/' is not writable"),
        ([f"{PLANTED}broken", *ONE_STEP], "raised KeyError"),
        ([f"{PLANTED}broken_on_one", *ONE_STEP], "raised RuntimeError: rank 1 alone"),
    ],
)
def test_what_cannot_be_checked_is_one_line_and_status_2(
    arguments: list[str], text: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert status(*arguments) == 2
    out, err = capfd.readouterr()
    assert out == ""
    last = err.splitlines()[-1]
    assert last.startswith("syncbn check: ")
    assert text in last
    assert "Traceback" not in err


def test_a_traceback_is_there_for_who_asks(capfd: pytest.CaptureFixture[str]) -> None:
    assert status(f"{PLANTED}broken", *ONE_STEP, "--traceback") == 2
    err = capfd.readouterr().err
    assert "in broken\n" in err
    assert "KeyError: 'no such\\nconfiguration'" in err.splitlines()[-1]


HANGING = ["check", f"{PLANTED}hanging", *ONE_STEP]


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[Callable[..., Running]]:
    """Starts a check whose factory never returns."""
    with running_in(tmp_path) as start:
        yield lambda **options: start(HANGING, **options)


@needs_proc
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_leave_nothing(hanging: Callable[..., Running], number: signal.Signals) -> None:
    running = hanging(forked=True)
    running.wait_until_the_ranks_meet()
    os.kill(running.process.pid, number)
    code, out, err = running.end()
    assert code == (130 if number == signal.SIGINT else 143)
    assert out == ""
    assert "Traceback" not in err
    running.assert_nothing_left()


@needs_proc
def test_a_killed_parent_leaves_nothing(hanging: Callable[..., Running]) -> None:
    running = hanging(forked=True)
    running.wait_until_the_ranks_meet()
    running.process.kill()
    running.end()
    running.assert_nothing_left()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_page_that_cannot_be_written_is_status_1(tmp_path, capfd):
    (tmp_path / "page.html").symlink_to("/dev/full")
    given = (f"{PLANTED}plain", *ONE_STEP, "--convert", "--html", str(tmp_path / "page.html"))
    assert status(*given) == 1
    assert capfd.readouterr().err.splitlines()[-1].startswith("syncbn check: cannot write the page")
