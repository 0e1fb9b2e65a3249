"""What a Monitor draws, and writes to TensorBoard."""

from __future__ import annotations

import os
import sys

import pytest
import torch
from torch import nn

import syncbn
from support.in_threads import in_threads
from support.paths import ROOT
from support.scripts import execute


class Writer:
    """Takes what SummaryWriter takes."""

    def __init__(self):
        self.scalars, self.figures = [], []

    def add_scalar(self, tag, value, step):
        self.scalars.append((tag, value, step))

    def add_figure(self, tag, figure, step):
        self.figures.append((tag, figure, step))


def watched(comm=None, steps=5, **options):
    model = nn.Sequential()
    model.add_module("backbone", nn.BatchNorm1d(3))
    model.add_module("head", nn.BatchNorm1d(3))
    monitor = syncbn.Monitor(model, every=2, process_group=comm, **options)
    for _ in range(steps):
        model(torch.randn(4, 3))
    return monitor


@pytest.fixture
def monitor():
    return watched()


@pytest.mark.parametrize("kind", ["png", "svg", "PDF"])
def test_a_picture_of_each_type(monitor, tmp_path, kind):
    pytest.importorskip("matplotlib")
    path = tmp_path / f"map.{kind}"
    monitor.plot(path)
    monitor.plot(str(path))  # again
    begin = {"png": b"\x89PNG", "svg": b"<?xml", "PDF": b"%PDF"}[kind]
    assert path.read_bytes().startswith(begin)


def test_the_heat_map_shows_layers_by_steps(monitor):
    pytest.importorskip("matplotlib")
    writer = Writer()
    monitor.plot(writer)
    ((tag, figure, step),) = writer.figures
    axes = figure.axes[0]
    assert (tag, step) == ("syncbn/mean_distance", 5)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["backbone", "head"]
    shown = axes.images[0].get_array()
    assert shown.shape == (2, 3)
    assert shown[0, 0] == pytest.approx(monitor.table()[0].noise)  # of one rank, the noise
    assert "one rank" in axes.get_title(loc="left")


def test_the_heat_map_of_ranks_shows_distances():
    pytest.importorskip("matplotlib")

    def run(comm):
        writer = Writer()
        monitor = watched(comm, steps=1)
        monitor.plot(writer)
        axes = writer.figures[0][1].axes[0]
        assert axes.images[0].get_array()[1, 0] == pytest.approx(monitor.table()[1].mean_distance)
        return axes.get_title(loc="left")

    title = "How far each rank's own mean is from that of all 2 ranks"
    assert in_threads(2, run) == [title] * 2


def test_scalars_are_the_tables_figures():
    writer = Writer()
    monitor = watched(writer=writer)
    assert {step for *_, step in writer.scalars} == {1, 3, 5}
    tags = {tag for tag, *_ in writer.scalars}
    assert {tag.partition("/")[2] for tag in tags} == {"backbone", "head"}
    names = (
        "mean_distance",
        "var_distance",
        "noise",
        "effective_size",
        "dead",
        "nonfinite",
        "skipped",
    )
    assert {tag.partition("/")[0] for tag in tags} == {f"syncbn_{name}" for name in names}
    noise = [value for tag, value, _ in writer.scalars if tag == "syncbn_noise/head"]
    assert (sum(n**2 for n in noise) / 3) ** 0.5 == pytest.approx(monitor.table()[1].noise)


def test_tensorboards_own_writer_takes_it(tmp_path):
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(str(tmp_path)) as writer:
        watched(writer=writer).plot(writer)
    (written,) = tmp_path.iterdir()
    content = written.read_bytes()
    assert b"syncbn_noise/head" in content
    assert b"syncbn/mean_distance" in content


@pytest.mark.parametrize(
    ("target", "error", "words"),
    [
        (3, TypeError, r"the path of a picture, or a TensorBoard writer .* got int"),
        ("map.doc", ValueError, r"ends in one of \..*\.png.*got 'map.doc'"),
        ("map", ValueError, r"ends in one of"),
        ("/nowhere/map.png", FileNotFoundError, r"a folder that exists, got '/nowhere/map.png'"),
    ],
)
def test_what_cannot_be_drawn_to(monitor, target, error, words):
    pytest.importorskip("matplotlib")
    with pytest.raises(error, match=f"Monitor.plot: expected .*{words}"):
        monitor.plot(target)


def test_a_path_that_cannot_be_written(monitor, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    (tmp_path / "map.png").mkdir()
    with pytest.raises(PermissionError, match=r"Monitor.plot: expected a path that can be written"):
        monitor.plot(tmp_path / "map.png")
    monkeypatch.setattr(os, "access", lambda *_: False)  # as for others than root
    with pytest.raises(PermissionError, match=r"can be written, got '.*other.png'; choose another"):
        monitor.plot(tmp_path / "other.png")


def test_without_matplotlib(monitor, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r"Monitor.plot: .* pip install 'syncbn\[plot\]'"):
        monitor.plot("map.png")


def test_the_example_runs(tmp_path):
    pytest.importorskip("sklearn")
    path = tmp_path / "map.png"
    (ended,) = execute(
        ROOT / "examples/monitor.py", "--out", str(path), "--ranks", "2", "--steps", "3"
    )
    assert ended.code == 0, ended.stderr
    assert "layer 7: synchronise over all 2 ranks" in ended.stdout
    assert path.read_bytes().startswith(b"\x89PNG")
