"""syncbn.demo: its data, its three arms, and the processes they run in."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import pytest
import torch

from support.processes import forked_launches

if any(importlib.util.find_spec(name) is None for name in ("sklearn", "matplotlib", "rich")):
    pytest.skip("needs the extra [demo]", allow_module_level=True)

from rich.console import Console

from syncbn.demo import data, report, train
from syncbn.demo.network import network
from syncbn.demo.options import ARMS, PLAIN, SYNCBN, WHOLE, DemoOptions
from syncbn.demo.run import Report, run
from syncbn.launch import RankFailed, launch

TOY = DemoOptions(ranks=2, epochs=1, train_images=61, evaluations_per_epoch=3)


@pytest.fixture(scope="module")
def toy() -> Report:
    heard: list[str] = []
    with forked_launches():
        found = run(TOY, data.load(TOY), on_progress=lambda arm, progress: heard.append(arm.key))
    assert set(heard) == {arm.key for arm in ARMS}
    return found


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ranks": 0}, "expected ranks ≥ 1, got 0"),
        ({"batch_per_rank": 0}, "expected batch_per_rank ≥ 1"),
        ({"epochs": 0}, "expected epochs ≥ 1"),
        ({"seed": -1}, "expected 0 ≤ seed"),
        ({"train_images": 1438}, "expected 1 to 1437 train_images"),
        ({"ranks": 4, "batch_per_rank": 400}, "1600 images per step"),
    ],
)
def test_options_out_of_range_are_named(options: dict[str, int], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        DemoOptions(**options)


def test_digits_are_split_once() -> None:
    digits = data.load(DemoOptions())
    assert digits.train_images.shape == (1437, 1, 8, 8)
    assert digits.validation_images.shape == (360, 1, 8, 8)
    assert digits.train_images.max() == 1
    assert torch.equal(digits.train_labels.unique(), torch.arange(10))
    again = data.load(DemoOptions())
    assert torch.equal(digits.validation_images, again.validation_images)
    other = data.load(DemoOptions(seed=1))
    assert not torch.equal(digits.validation_images, other.validation_images)


def test_ranks_share_each_batch_and_drop_the_incomplete_one() -> None:
    assert TOY.steps_per_epoch == 30
    epoch = list(islice(data.batches(TOY), 30))
    seen = torch.cat(epoch)
    assert len(seen.unique()) == len(seen) == 60
    digits = data.load(TOY)
    for arm, ranks in ((SYNCBN, 2), (WHOLE, 1)):
        task = train.Task(arm, TOY, digits)
        parts = [epoch[0][train._share(rank, task)] for rank in range(ranks)]
        assert torch.equal(torch.cat(parts), epoch[0])


def test_every_batchnorm_sees_more_than_one_value_per_channel() -> None:
    model = network()
    sizes = []
    for layer in model:
        if isinstance(layer, torch.nn.BatchNorm2d):
            layer.register_forward_hook(lambda _, args, y: sizes.append(args[0][0, 0].numel()))
    model(torch.zeros(1, 1, 8, 8))
    assert sizes == [64, 16, 4]


def test_syncbn_trains_the_weights_of_one_process(toy: Report) -> None:
    assert report.of(toy, SYNCBN).weight_difference <= 1e-9
    # The comparison can tell: torch's layer on each rank fails it by far.
    assert report.of(toy, PLAIN).weight_difference > 1e-3
    assert report.of(toy, WHOLE).weight_difference is None


def test_arms_are_measured_alike(toy: Report) -> None:
    for arm in toy.arms:
        assert [(point.step, point.images) for point in arm.curve] == [(10, 20), (20, 40), (30, 60)]
        assert arm.curve[-1].epoch == 1
        assert arm.accuracy_percent == arm.curve[-1].accuracy_percent
        assert 0 <= arm.accuracy_percent <= 100
        assert arm.seconds_per_step > 0
    # float32: the same training to rounding, which 30 steps amplify a little.
    sync, whole = report.of(toy, SYNCBN), report.of(toy, WHOLE)
    assert sync.loss == pytest.approx(whole.loss, rel=1e-2)


def test_table_fits_80_columns(toy: Report) -> None:
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(report.table(toy))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for words in ("accuracy (%)", "step (s)", "reference", *(arm.label for arm in ARMS)):
        assert words in text
    assert "One image per rank on 2 ranks" in report.sentence(toy)


def test_json_has_no_number_that_json_lacks(toy: Report) -> None:
    assert report._finite({"a": [1.0, float("nan")], "b": (float("inf"),)}) == {
        "a": [1.0, None],
        "b": [None],
    }
    content = json.loads(report.as_json(toy, picture=None))
    assert content["options"]["train_images"] == 61


def test_picture_shows_three_curves(toy: Report, tmp_path: Path) -> None:
    from PIL import Image

    from syncbn.demo import picture

    path = tmp_path / "curves.png"
    picture.draw(toy, path)
    with Image.open(path) as image:
        assert image.size == (1200, 750)
        colours = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=2**20)}
    assert {(0xD5, 0x5E, 0x00), (0x0B, 0x3C, 0x5D)} <= colours


def test_launch_hands_on_messages_and_rank_0s_result() -> None:
    heard: list[object] = []
    assert launch(_well, "task", ranks=2, on_message=heard.append) == ("task", 0, 1)
    assert heard == ["from 0"]


@pytest.mark.parametrize(
    ("worker", "texts"),
    [
        ("_is_killed", ("rank 1 was ended by SIGKILL", "last words")),
        ("_leaves", ("rank 1 failed", "SystemExit: 3")),
        ("_leaves_well", ("failed", "SystemExit: 0")),
    ],
)
def test_a_rank_that_dies_ends_the_others_and_is_named(
    worker: str, texts: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with forked_launches():  # which has a folder of its own
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        with pytest.raises(RankFailed) as failure:
            launch(globals()[worker], None, ranks=2, on_message=lambda message: None)
    for text in texts:
        assert text in str(failure.value)
    assert list(tmp_path.iterdir()) == []


def _well(rank: int, task: object, folder: Path, send) -> object:
    print("not on the parent's standard output")
    send(f"from {rank}")
    return task, rank, torch.get_num_threads()


def _is_killed(rank: int, task: object, folder: Path, send) -> None:
    if rank == 1:
        print("last words", flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pause()


def _leaves(rank: int, task: object, folder: Path, send) -> None:
    if rank == 1:
        raise SystemExit(3)
    signal.pause()


def _leaves_well(rank: int, task: object, folder: Path, send) -> None:
    raise SystemExit(0)


@pytest.mark.slow
def test_the_defaults_show_what_the_readme_says():
    command = [sys.executable, "-c", "from syncbn.cli import main; main()"]
    result = subprocess.run(
        [*command, "demo", "--json", "--no-plot"],
        capture_output=True,
        text=True,
        timeout=500,
        check=True,
    )
    arms = json.loads(result.stdout)["arms"]
    accuracy = {name: arm["accuracy_percent"] for name, arm in arms.items()}
    assert accuracy["batchnorm"] < 80 < 95 < min(accuracy["syncbn"], accuracy["one-process"])
    assert arms["syncbn"]["weight_difference"] <= 1e-9
