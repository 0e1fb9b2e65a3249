"""Ranks that meet faults: python -m hostile.faults [NAME …]

One of three ranks raises, refuses, crashes, is killed, is stopped, leaves, or is interrupted; a
link is cut or slow (in network namespaces of two ranks, as root); a disk is full. All other ranks
must end by themselves within the time that they were told to wait, in words that name who is gone;
no process and no memory stays.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from support.paths import ROOT
from support.scripts import Ended, execute

VICTIM_PROGRAM = Path(__file__).with_name("victim.py")
RANKS, VICTIM, PATIENCE = 3, 1, 8.0
LATE = 40.0  # seconds after which a rank hangs: imports, patience and a margin of a busy machine
ENGINES = {"memory": {}, "gloo": {"SYNCBN_EXCHANGE": "torch"}}
MOMENTS = ("first", "forward", "backward", "between")
FAULTS = ("raise", "refuse", "segfault", "kill", "stop", "leave", "ctrl-c")


class Wrong(AssertionError):
    """A rank that hung, ended well beside one that did not, or said nothing of it."""


def require(good: bool, words: str) -> None:
    if not good:
        raise Wrong(words)


def meet(fault: str, engine: str, moment: str) -> None:
    """The fault on one of the ranks; the others end by themselves and name it."""
    given = {"FAULT": fault, "VICTIM": str(VICTIM), "MOMENT": moment, "PATIENCE": str(PATIENCE)}
    began = time.monotonic()
    ended = execute(VICTIM_PROGRAM, ranks=RANKS, timeout=LATE, **given, **ENGINES[engine])
    took = time.monotonic() - began
    require(
        "meets" in ended[VICTIM].stdout, f"the fault was not met: {ended[VICTIM].stderr[-300:]}"
    )
    others = [each for rank, each in enumerate(ended) if rank != VICTIM]
    for rank, each in enumerate(ended):
        if rank != VICTIM:
            check_told(rank, each, took)
    first = any(re.search(rf"\branks? (\d, )*{VICTIM}\b", each.stderr) for each in others)
    require(first, f"nobody names rank {VICTIM}: {others[0].stderr[-600:]}")


def check_told(rank: int, each: Ended, took: float) -> None:
    said = each.stderr + each.stdout
    require(each.code is not None and each.code != -9, f"rank {rank} hung for {took:.0f} s")
    require("ended well" not in each.stdout, f"rank {rank} ended well beside one that did not")
    require(each.code == 1, f"rank {rank} ended by {each.code}, not by an error: {said[-300:]}")
    gone = re.search(rf"\branks? (\d, )*[0-{RANKS - 1}] (has|have|is|gave|failed)", said)
    require(gone is not None, f"rank {rank} does not say who is gone: {said[-600:]}")


@contextmanager
def two_hosts() -> Iterator[tuple[list[str], list[str]]]:
    """Two network namespaces with one link: how to run a command in each."""
    names = [f"syncbn-{os.getpid()}-{i}" for i in (0, 1)]
    links = [f"sb{os.getpid() % 10000}x{i}" for i in (0, 1)]
    run(f"ip link add {links[0]} type veth peer name {links[1]}")
    try:
        for i, (name, link) in enumerate(zip(names, links, strict=True)):
            run(f"ip netns add {name}")
            run(f"ip link set {link} netns {name}")
            within = f"ip netns exec {name}"
            run(f"{within} ip addr add 10.77.0.{i + 1}/24 dev {link}")
            run(f"{within} ip link set {link} up")
            run(f"{within} ip link set lo up")
        yield ([f"ip netns exec {names[0]}", links[0]], [f"ip netns exec {names[1]}", links[1]])
    finally:
        for name in names:
            subprocess.run(f"ip netns del {name}", shell=True, check=False, capture_output=True)


def run(command: str) -> None:
    subprocess.run(command, shell=True, check=True, capture_output=True)


def over_a_link(fault: str, prepare: Callable[[str, str], None] | None = None) -> list[Ended]:
    """Two ranks in namespaces of their own; rank 1 may meet a fault of its link."""
    with two_hosts() as hosts, tempfile.TemporaryDirectory() as folder:
        if prepare is not None:
            prepare(*hosts[1])
        running = []
        for rank, (within, link) in enumerate(hosts):
            variables = {
                **{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0"},
                **{"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29511", "GLOO_SOCKET_IFNAME": link},
                **{"FAULT": fault, "VICTIM": "1", "MOMENT": "between", "PATIENCE": str(PATIENCE)},
                **{"CUT": f"ip link set {link} down", "SYNCBN_EXCHANGE": "torch"},
            }
            said = Path(folder, f"out-{rank}"), Path(folder, f"err-{rank}")
            command = [*within.split(), sys.executable, str(VICTIM_PROGRAM)]
            with said[0].open("w") as out, said[1].open("w") as err:
                process = subprocess.Popen(
                    command, env=os.environ | variables, stdout=out, stderr=err
                )
            running.append((process, said))
        deadline, ended = time.monotonic() + 2 * LATE, []
        for process, said in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            ended.append(Ended(process.returncode, *(file.read_text() for file in said)))
    return ended


def cut_link() -> None:
    for rank, each in enumerate(over_a_link("cut")):
        said = each.stderr + each.stdout
        require(each.code not in (0, -9), f"rank {rank}: code {each.code}: {said[-3000:]}")
        require(f"rank {1 - rank}" in said, f"rank {rank} does not say who is gone: {said[-600:]}")


def slow_link() -> None:
    def delay(within: str, link: str) -> None:
        run(f"{within} tc qdisc add dev {link} root tbf rate 200kbit burst 1600 latency 5s")

    usual, slow = over_a_link(""), over_a_link("", delay)
    for rank, (one, other) in enumerate(zip(usual, slow, strict=True)):
        ends = [each.stdout.partition("ended well")[2].split()[1:] for each in (one, other)]
        require(bool(ends[0]) and ends[0] == ends[1], f"rank {rank}: {ends}, {other.stderr[-300:]}")


def full_disk() -> None:
    """A trace that cannot be written: training goes on, and says so."""
    with tempfile.TemporaryDirectory() as folder:
        run(f"mount -t tmpfs -o size=4k tmpfs {folder}")
        try:
            Path(folder, "filler").write_bytes(bytes(4096))
            given = {"FAULT": "", "VICTIM": "-1", "MOMENT": "", "SYNCBN_TRACE": folder}
            ended = execute(VICTIM_PROGRAM, ranks=2, timeout=LATE, **given)
            for rank, each in enumerate(ended):
                good = each.code == 0 and "ended well" in each.stdout
                require(good, f"rank {rank} ended by {each.code}: {each.stderr[-300:]}")
                require("No space left" in each.stderr, f"rank {rank} says nothing of the disk")
        finally:
            run(f"umount {folder}")


def full_disk_for_a_report() -> None:
    """Of syncbn check: one line, exit status 2."""
    with tempfile.TemporaryDirectory() as folder:
        run(f"mount -t tmpfs -o size=4k tmpfs {folder}")
        try:
            command = [sys.executable, "-m", "syncbn", "check", "support.planted:right"]
            arguments = ["--input", "3,8,8", "--steps", "1", "--html", f"{folder}/report.html"]
            ended = subprocess.run(
                [*command, *arguments],
                capture_output=True,
                text=True,
                check=False,
                timeout=4 * LATE,
            )
            said = ended.stderr.strip()
            require(ended.returncode == 2, f"ended by {ended.returncode}: {said[-300:]}")
            require("No space left" in said, f"says nothing of the disk: {said[-300:]}")
        finally:
            run(f"umount {folder}")


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for fault in FAULTS:
        for engine in ENGINES:
            for moment in MOMENTS:
                name = f"{fault}, {moment}, over {engine}"
                yield name, lambda f=fault, e=engine, m=moment: meet(f, e, m)  # type: ignore[misc]
    yield "cut link", cut_link
    yield "slow link", slow_link
    yield "full disk for a trace", full_disk
    yield "full disk for a report", full_disk_for_a_report


def left() -> set[str]:
    """What the project has in the machine's shared memory."""
    return {path.name for path in Path("/dev/shm").glob("*syncbn*")}


def main(wanted: list[str]) -> int:
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    )
    wrong = done = 0
    for name, case in cases():
        if wanted and not any(word in name for word in wanted):
            continue
        before, done = left(), done + 1
        try:
            case()
            require(left() <= before, f"left in shared memory: {left() - before}")
        except Exception as error:
            wrong += 1
            print(f"{name}: {type(error).__name__}: {error}", flush=True)
    print("counts", {"met": done - wrong, "wrong": wrong}, flush=True)
    return wrong


if __name__ == "__main__":
    sys.exit(min(1, main(sys.argv[1:])))
