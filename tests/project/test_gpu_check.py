"""benchmarks/gpu_check.py rehearses on the CPU, and one section's failure leaves the others."""

from __future__ import annotations

import json
import re
import time
from types import SimpleNamespace

import pytest
import torch

import gpu_check
import timing
from gpu import correct
from gpu.machine import Machine, find_machine
from gpu.sections import Report, Result, Section, Skipped, run_sections
from support.paths import ROOT
from support.scripts import Ended, execute_anew

SCRIPT = ROOT / "benchmarks/gpu_check.py"
LINE = re.compile(r"^\[(ok|skip|FAIL)\] (\w+): (.+) \([\d.]+ s\)$", re.MULTILINE)
NAMES = [section.name for section in gpu_check.make_sections()]


def run(*options: str, **environment: str) -> Ended:
    return execute_anew(SCRIPT, *options, timeout=600, **environment)


def test_a_rehearsal_of_some_sections(tmp_path):
    details = tmp_path / "details.json"
    ended = run("--rehearse", "--only", "environment", "steps", "graphs", "--json", str(details))
    assert ended.code == 0, ended.stdout + ended.stderr
    found = [match[:2] for match in LINE.findall(ended.stdout)]
    assert found == [("ok", "environment"), ("ok", "steps"), ("skip", "graphs")]
    sections = json.loads(details.read_text())["sections"]
    assert [section["name"] for section in sections] == [name for _, name in found]
    assert sections[1]["data"]["float32"]["y"] <= 1


@pytest.mark.slow
def test_a_whole_rehearsal(tmp_path):
    ended = run("--rehearse", OUT=str(tmp_path))
    assert ended.code == 0, ended.stdout + ended.stderr
    states = {name: state for state, name, _ in LINE.findall(ended.stdout)}
    assert list(states) == NAMES
    assert len(ended.stdout.splitlines()) == len(NAMES)
    ran = {name for name, state in states.items() if state == "ok"}
    assert ran == {"environment", "steps", "gloo", "speed", "host", "compiled", "tests"}
    details = json.loads((tmp_path / "gpu-check.json").read_text())
    assert [section["name"] for section in details["sections"]] == NAMES


def test_without_a_gpu_it_says_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    ended = run()
    assert ended.code == 2
    assert ended.stderr == "gpu_check: no GPU that torch sees; --rehearse runs on the CPU\n"


def test_an_unknown_section_is_refused():
    ended = run("--rehearse", "--only", "nonsense")
    assert ended.code == 2
    assert "expected sections of environment, compile, steps" in ended.stderr


def fails(machine: Machine) -> Result:
    raise ValueError("of\ntwo lines")


def skips(machine: Machine) -> Result:
    raise Skipped("no reason")


def lasts(machine: Machine) -> Result:
    try:
        time.sleep(60)
    except Exception:  # what a section catches does not hide that its time is over
        return Result("caught")
    return Result("slept")


def works(machine: Machine) -> Result:
    return Result("figures", {"of": "rows"})


def sections_of(*runs) -> list[Section]:
    return [Section(run.__name__, 0.1 if run is lasts else 20, run) for run in runs]


def test_the_others_run_after_a_failure(tmp_path, capsys):
    report = Report("command", tmp_path / "details.json")
    run_sections(sections_of(fails, skips, lasts, works), find_machine(toy=True), report)
    said = LINE.findall(capsys.readouterr().out)
    assert said == [
        ("FAIL", "fails", "ValueError: of two lines"),
        ("skip", "skips", "no reason"),
        ("FAIL", "lasts", "not done within 0.5 s"),
        ("ok", "works", "figures"),
    ]
    details = json.loads((tmp_path / "details.json").read_text())
    assert details["command"] == "command"
    assert 'raise ValueError("of' in details["sections"][0]["data"]
    assert details["sections"][-1]["data"] == {"of": "rows"}
    assert report.failed


def test_no_section_runs_when_the_time_is_over(capsys):
    report = Report("command", None)
    run_sections(sections_of(fails, works), find_machine(toy=True), report, whole=0)
    assert [state for state, *_ in LINE.findall(capsys.readouterr().out)] == []
    assert [outcome.state for outcome in report.outcomes] == ["skip", "skip"]
    assert not report.failed


def test_a_failing_section_ends_with_status_1(monkeypatch, capsys):
    monkeypatch.setattr(gpu_check, "make_sections", lambda: sections_of(fails, works))
    monkeypatch.setattr(gpu_check, "rehearse_on_the_cpu", lambda: None)
    assert gpu_check.main(["--rehearse"]) == 1
    assert [line[:6] for line in capsys.readouterr().out.splitlines()] == ["[FAIL]", "[ok] w"]


@pytest.mark.parametrize("wrong", ["y", "dx", "dweight", "dbias", "mean", "invstd", "running_var"])
def test_wrong_results_are_noticed(monkeypatch, wrong):
    """A hundred times as wrong as rounding; other bits in every run."""
    right, runs = correct.run_steps, []

    def run_steps(batch):
        runs.append(right(batch))
        runs[-1][wrong] = runs[-1][wrong] * (1 + 3e-2 * len(runs))
        return runs[-1]

    monkeypatch.setattr(correct, "run_steps", run_steps)
    monkeypatch.setattr(correct, "TOYS", correct.TOYS[:1])
    with pytest.raises(AssertionError, match=rf"2 wrong.*{wrong} of .*{wrong} of .* other bits"):
        correct.check_steps(Machine(torch.device("cpu"), toy=True))


class Clock:
    """A GPU that takes a second for each call, and spins too short the first time."""

    now, spins = 0.0, 0

    def spin(self, cycles: int) -> None:
        self.spins += 1

    def event(self, enable_timing: bool = False) -> SimpleNamespace:
        made = SimpleNamespace(at=0.0)
        made.record = lambda: setattr(made, "at", self.now)
        made.elapsed_time = lambda end: (end.at - made.at) * 1e3
        made.query = lambda: self.spins == 1
        return made


def test_times_on_the_device_are_those_between_events(monkeypatch):
    clock, order = Clock(), []
    monkeypatch.setattr(torch.cuda, "Event", clock.event)
    monkeypatch.setattr(torch.cuda, "_sleep", clock.spin)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)

    def call(name: str, seconds: float) -> None:
        order.append(name)
        clock.now += seconds

    steps = {"a": lambda: call("a", 1.0), "b": lambda: call("b", 2.0)}
    times = timing.device_times(steps, 3, torch.device("cuda"))
    assert times == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert clock.spins == 3 + timing.WARM_UP + 1
    assert "".join(order) == "ab" + "ab" + "abba" * 2 + "ab"
