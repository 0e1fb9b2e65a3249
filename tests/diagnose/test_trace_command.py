"""`syncbn trace`: what it says of the files that ranks left, and of those that are none."""

from __future__ import annotations

import json

import pytest

from syncbn.cli import main

NOW = 1_800_000_000.0  # when the ranks' processes began


def calls(*words, seconds=0.0, outcome="done", begin=1):
    """Calls that end one second after each other; the last takes ``seconds`` and ends so."""
    made = [
        {
            "communicator": 0,
            "call": number,
            "words": text,
            "began": NOW + number,
            "ended": NOW + number + 0.5,
            "outcome": "done",
        }
        for number, text in enumerate(words, begin)
    ]
    ended = None if outcome == "in flight" else made[-1]["began"] + seconds
    made[-1].update(ended=ended, outcome=outcome)
    return made


@pytest.fixture
def leave(tmp_path):
    """Writes what a rank has left."""

    def write(rank, exchanges, *, size=2, written=60.0, why="exit", started=0.0, **communicator):
        last = max((each["call"] for each in exchanges), default=0)
        comm = {
            "engine": "ProcessGroup",
            "group": "0",
            "members": list(range(size)),
            "number": 1,
            "rank": rank,
            "size": size,
            "calls": last,
        }
        content = {
            "version": 1,
            "process": (communicator.get("members") or comm["members"])[rank],
            "started": NOW + started,
            "written": NOW + written,
            "why": why,
            "communicators": [comm | communicator],
            "exchanges": exchanges,
        }
        path = tmp_path / f"rank-{content['process']}.json"
        path.write_text(json.dumps(content))
        return path

    return write


@pytest.fixture
def shown(tmp_path, capsys):
    """The exit status, and what was said."""

    def show(*options):
        status = main(["trace", str(tmp_path), *options])
        out, err = capsys.readouterr()
        return status, out + err

    return show


def test_ranks_that_agree(leave, shown):
    for rank in range(2):
        leave(rank, calls("a", "b", "c"))
    status, text = shown("--last", "2")
    assert status == 0
    assert "ProcessGroup '0', 2 ranks\nranks agree in calls 1 to 3\n" in text
    assert [line.split() for line in text.splitlines()[-2:]] == [
        ["2", "all", "b"],
        ["3", "all", "c"],
    ]


def test_calls_that_differ(leave, shown):
    for rank in range(4):
        words = ("a", "y" if rank == 1 else "x")
        leave(rank, calls(*words, outcome=f"failed: E: on {rank // 2}"), size=4)
    status, text = shown()
    assert status == 1
    assert "FIRST DIFFERENCE in call 2: ranks make different calls" in text
    rows = [line.split() for line in text.splitlines()]
    assert [">", "2", "0,", "2,", "3", "x:", "failed"] in rows
    assert [">", "1", "y:", "failed"] in rows
    assert text.endswith("ranks 0, 1: E: on 0\nranks 2, 3: E: on 1\n")


def test_a_rank_that_gave_up(leave, shown):
    leave(0, calls("a", "b", seconds=3, outcome="failed: E: rank 1 gave up"))
    leave(1, calls("a", "no call", outcome="gave up: ValueError: bad"))
    status, text = shown()
    assert status == 1
    assert "FIRST DIFFERENCE in call 2: rank 1 gave it up, rank 0 waited for 3.0 s" in text
    assert "rank 1: ValueError: bad" in text


def test_all_ranks_gave_up(leave, shown):
    for rank in range(2):
        leave(rank, calls("a", "no call", outcome="gave up: ValueError: bad"))
    status, text = shown()
    assert status == 1
    assert "FIRST FAILURE in call 2, which all ranks gave up" in text


def test_a_rank_that_ended_early(leave, shown):
    leave(0, calls("a", "b", outcome="in flight"), written=40, why="SIGUSR1")
    leave(1, calls("a"), written=1.6)
    status, text = shown()
    assert status == 1
    assert "call 2: rank 1 did not make it, rank 0 waited for 38.0 s" in text
    assert "rank 1 had made 1 call when it ended (exit)" in text


def test_a_rank_that_is_elsewhere(leave, shown):
    leave(0, calls("a", "b", outcome="in flight"), written=40, why="SIGUSR1")
    leave(1, calls("a"), written=41, why="SIGUSR1")
    status, text = shown()
    assert status == 1
    assert "rank 1 had made 1 call and was elsewhere when it wrote its file" in text


def test_a_rank_without_a_file(leave, shown):
    leave(0, calls("a", "b", outcome="in flight"), size=3, written=40, why="SIGUSR1")
    leave(2, calls("a", "b", outcome="in flight"), size=3, written=40, why="SIGUSR1")
    status, text = shown()
    assert status == 1
    assert "in call 1: rank 1 did not make it" not in text
    assert "in call 2: rank 1 did not make it, ranks 0, 2 waited" in text
    assert "rank 1 has no file: it was killed" in text


def test_a_file_that_is_missing_is_no_difference(leave, shown):
    leave(0, calls("a", "b"), size=3)
    status, text = shown()
    assert status == 0
    assert "ranks agree in calls 1 to 2; no file of ranks 1, 2" in text


@pytest.mark.parametrize("written", [2.1, 40])
def test_files_of_different_moments_are_no_difference(leave, shown, written):
    """One rank is in a call that another, whose file is older or which is on its way, lacks."""
    leave(0, calls("a", "b", "c", outcome="in flight"), written=written, why="SIGUSR1")
    leave(1, calls("a", "b"), written=1, why="SIGUSR1")
    assert shown()[0] == 0


def test_all_ranks_in_one_call(leave, shown):
    for rank in range(2):
        leave(rank, calls("a", outcome="in flight"), written=31, why="SIGTERM")
    status, text = shown()
    assert status == 0
    assert "all are in call 1, the same, for 30.0 s: look at the network" in text


def test_a_call_that_failed_on_all(leave, shown):
    for rank in range(2):
        leave(rank, calls("a", outcome="failed: E: broken"))
    status, text = shown()
    assert status == 1
    assert "FIRST FAILURE in call 1, on ranks 0, 1" in text


def test_only_calls_that_all_have_kept_are_compared(leave, shown):
    leave(0, calls("old", "a", "b"))
    leave(1, calls("a", "b", begin=2))
    status, text = shown()
    assert status == 0
    assert "ranks agree in calls 2 to 3" in text


def test_sub_groups_are_apart(leave, shown):
    for members in ([0, 2], [1, 3]):
        for rank in range(2):
            leave(rank, calls("a", str(members)), group=f"of {members}", members=members)
    status, text = shown()
    assert status == 0
    assert "ProcessGroup 'of [1, 3]', 2 ranks, which are processes 1, 3" in text


def test_files_of_an_earlier_run_are_left_out(leave, shown):
    leave(0, calls("a"), size=3, started=100, written=160)
    leave(1, calls("a"), size=3, started=101, written=160)
    leave(2, calls("z"), size=3)
    status, text = shown()
    assert status == 0
    assert "rank-2.json: left out, of an earlier run" in text
    assert "no file of rank 2" in text


DAMAGED = {
    "cut short": '{"version": 1, "sta',
    "not text": "\x00\xff",
    "a list": "[]",
    "a word": '"trace"',
    "another version": '{"version": 2}',
    "too deep": "[" * 100_000,
    "": "",
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_file_that_cannot_be_read_is_named(leave, shown, tmp_path, content):
    leave(0, calls("a"))
    (tmp_path / "rank-1.json").write_bytes(content.encode("latin-1"))
    (tmp_path / "other.json").write_text("not ours")
    status, text = shown()
    assert status == 0
    assert "rank-1.json: left out, not a trace that can be read" in text
    assert "no file of rank 1" in text
    assert "other" not in text


@pytest.mark.parametrize(
    "change",
    [
        {"communicators": None},
        {"communicators": [{}]},
        {"exchanges": [{"communicator": 7}]},
        {"exchanges": [calls("a")[0] | {"communicator": 7}]},
        {"exchanges": [calls("a")[0] | {"began": "soon"}]},
        {"exchanges": [calls("a")[0] | {"call": 1e999}]},
        {"started": None},
        {"process": "first"},
    ],
)
def test_a_file_with_other_content_is_named(leave, shown, change):
    leave(0, calls("a"))
    path = leave(1, calls("a"))
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    status, text = shown()
    assert status == 0
    assert "rank-1.json: left out, not a trace" in text


@pytest.mark.parametrize("change", [{"rank": 5}, {"members": [0]}, {"members": 3}])
def test_a_rank_that_cannot_be_is_named(leave, shown, change):
    leave(0, calls("a"))
    path = leave(1, calls("a"))
    content = json.loads(path.read_text())
    content["communicators"][0] |= change
    path.write_text(json.dumps(content))
    assert "rank-1.json: left out, not a trace" in shown()[1]


def test_large_numbers_take_no_time(leave, shown):
    for rank in range(2):
        leave(rank, calls("a", begin=10**15), calls=10**15)
    assert shown()[0] == 0


def test_json_is_one_object(leave, shown):
    leave(0, calls("a", "x"))
    leave(1, calls("a", "y"))
    status, text = shown("--json")
    found = json.loads(text)
    assert status == 1
    assert (found["agree"], found["processes"], found["left_out"]) == (False, [0, 1], {})
    (comm,) = found["communicators"]
    assert (comm["engine"], comm["size"], comm["missing"]) == ("ProcessGroup", 2, [])
    assert comm["first_difference"] == 2
    assert comm["ranks"]["1"]["calls"] == 2
    assert [row["call"] for row in comm["rows"]] == [1, 2]
    assert comm["rows"][1]["ranks"]["1"]["words"] == "y"


def test_without_traces_it_is_wrong_usage(shown, tmp_path, capsys):
    status, text = shown()
    assert status == 2
    assert text.startswith("syncbn trace: no trace (rank-<number>.json) in ")
    assert len(text.splitlines()) == 1
    assert main(["trace", str(tmp_path / "nowhere")]) == 2
    assert "expected a folder, got" in capsys.readouterr().err
    (tmp_path / "rank-0.json").write_text("{")
    assert "rank-0.json: not a trace" in shown()[1]
