"""Segment scenes of handwritten digits, one scene per rank, no two of one size.

torchrun --standalone --nproc-per-node 4 examples/segmentation.py --picture segmentation.png

A training script with what such scripts have: a sampler that shares the scenes out, a loss that is
the mean over the pixels of all ranks, an evaluation by all ranks with exact totals, checkpoints and
--resume, which ends with the bits of a run that was never stopped. --norm local leaves each rank
its own statistics; one process with the whole batch: --nproc-per-node 1, --batch 4. Needs the
extra [demo].
"""

from __future__ import annotations

import argparse
import gc
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from scenes import CLASSES, Scenes, draw
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Subset
from torch.utils.data.distributed import DistributedSampler

import syncbn

Batch = list[tuple[Tensor, Tensor]]


class Block(nn.Module):
    """Convolution, batch norm and ReLU of scenes (1, C, H, W) of any sizes.

    The norm takes the pixels of all scenes of this rank side by side, as (1, C, pixels): that is
    the batch norm of one batch, without padding.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm1d(outputs)

    def forward(self, scenes: list[Tensor]) -> list[Tensor]:
        scenes = [self.conv(scene) for scene in scenes]
        pixels = self.norm(torch.cat([scene.flatten(2) for scene in scenes], 2)).relu()
        parts = pixels.split([scene[0, 0].numel() for scene in scenes], 2)
        return [part.view_as(scene) for part, scene in zip(parts, scenes, strict=True)]


class UNet(nn.Module):
    """Ronneberger et al., 2015, arXiv:1505.04597, small: two scales below the scene's own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        widths = [width, 2 * width, 4 * width]
        self.down = nn.ModuleList(map(Block, [1, *widths[:2]], widths))
        self.up = nn.ModuleList(map(Block, [6 * width, 3 * width], widths[1::-1]))
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, scenes: list[Tensor]) -> list[Tensor]:
        kept = []
        for number, block in enumerate(self.down):
            scenes = block([F.max_pool2d(each, 2) for each in scenes] if number else scenes)
            kept.append(scenes)
        for block, finer in zip(self.up, kept[-2::-1], strict=True):
            larger = [F.interpolate(each, scale_factor=2.0) for each in scenes]
            scenes = block([torch.cat(pair, 1) for pair in zip(larger, finer, strict=True)])
        return [self.head(each) for each in scenes]


class Training:
    """All that a checkpoint holds, and the steps."""

    def __init__(self, options: argparse.Namespace, device: torch.device) -> None:
        torch.manual_seed(options.seed)  # the same initial weights everywhere
        model: nn.Module = UNet(options.width).to(device)
        if options.norm == "sync":
            model = syncbn.convert(model)
        self.model, self.parallel = model, DistributedDataParallel(model)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
        self.decay = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.history: list[float] = []  # mean IoU after each epoch

    def step(self, batch: Batch, device: torch.device) -> None:
        scores = self.parallel([image[None].to(device) for image, _ in batch])
        labels = [label[None].to(device) for _, label in batch]
        losses = [
            F.cross_entropy(score, label, reduction="sum")
            for score, label in zip(scores, labels, strict=True)
        ]
        pixels = total(torch.tensor(float(sum(label.numel() for label in labels)), device=device))
        # DistributedDataParallel takes the mean over ranks; scenes are of many sizes, and every
        # pixel is to weigh the same.
        loss = torch.stack(losses).sum() * dist.get_world_size() / pixels
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def state(self) -> dict[str, Any]:
        parts = {"model": self.model, "optimizer": self.optimizer, "decay": self.decay}
        return {name: part.state_dict() for name, part in parts.items()} | {"history": self.history}

    def save(self, path: Path) -> None:
        partial = path.with_suffix(".part")
        torch.save(self.state(), partial)
        partial.replace(path)  # whole, or not there

    def load(self, path: Path, device: torch.device) -> None:
        state = torch.load(path, map_location=device, weights_only=True)
        for name in ("model", "optimizer", "decay"):
            getattr(self, name).load_state_dict(state[name])
        self.history = state["history"]


def total(tensor: Tensor) -> Tensor:
    """The sum over ranks."""
    dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def mean_iou(model: nn.Module, scenes: Scenes, device: torch.device) -> float:
    """Of the classes that occur: each rank predicts its part of the scenes, each scene once."""
    model.eval()
    counts = torch.zeros(CLASSES, CLASSES, dtype=torch.long, device=device)
    # Not DistributedSampler, which repeats scenes until all ranks have equally many.
    for image, label in Subset(scenes, range(dist.get_rank(), len(scenes), dist.get_world_size())):
        (scores,) = model([image[None].to(device)])
        pairs = CLASSES * label.to(device).flatten() + scores.argmax(1).flatten()
        counts += pairs.bincount(minlength=CLASSES**2).view_as(counts)
    model.train()
    total(counts)  # whole numbers: exact, on any number of ranks
    union = counts.sum(0) + counts.sum(1) - counts.diag()
    return (counts.diag()[union > 0] / union[union > 0]).mean().item()


def train(options: argparse.Namespace, device: torch.device) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    scenes, held_out = Scenes(options.scenes, train=True), Scenes(options.scenes // 4, train=False)
    sampler: Any = DistributedSampler(scenes, ranks, rank, seed=options.seed)
    loader = DataLoader(scenes, options.batch, sampler=sampler, collate_fn=list)
    training = Training(options, device)
    if options.resume:
        training.load(options.checkpoint, device)
    console = Console(stderr=True)
    for epoch in range(len(training.history), options.epochs):
        sampler.set_epoch(epoch)  # another order in each, the same after --resume
        quiet = rank > 0 or not console.is_terminal
        for batch in track(loader, f"epoch {epoch + 1}", console=console, disable=quiet):
            training.step(batch, device)
        training.decay.step()
        training.history.append(mean_iou(training.model, held_out, device))
        if rank == 0:
            print(f"epoch {epoch + 1}: mean IoU {100 * training.history[-1]:.1f} %", flush=True)
            training.save(options.checkpoint)
    if rank == 0 and options.picture:
        picture(training, held_out, options, device)


@torch.no_grad()
def picture(
    training: Training, scenes: Scenes, options: argparse.Namespace, device: torch.device
) -> None:
    training.model.eval()
    rows = []
    for image, label in (scenes[number] for number in range(3)):
        (scores,) = training.model([image[None].to(device)])
        rows.append((image, label, scores.argmax(1).cpu()))
    curves = {options.label: training.history}
    for other in options.beside:
        curves[other.stem] = torch.load(other, weights_only=True)["history"]
    draw(options.picture, rows, curves)
    print(f"Picture: {options.picture}")


def parsed(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--norm", choices=("sync", "local"), default="sync")
    parser.add_argument("--batch", type=int, default=1, help="scenes per rank")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--scenes", type=int, default=240, help="for training; a quarter validates")
    parser.add_argument("--width", type=int, default=16, help="of the network")
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--checkpoint", type=Path, default=Path("segmentation.pt"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--picture", type=Path)
    parser.add_argument("--label", default="syncbn", help="of this run in the picture")
    parser.add_argument("--beside", type=Path, nargs="*", default=[], help="others' checkpoints")
    parser.add_argument("--toy", action="store_true", help="tiny, to see that it runs")
    options = parser.parse_args(arguments)
    if options.toy:
        options.scenes, options.width = 8, 2
    return options


def main() -> None:
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ["LOCAL_RANK"])), "nccl"
        torch.cuda.set_device(device)
    dist.init_process_group(backend)
    train(parsed(), device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    gc.collect()  # DDP's reference cycles keep gloo's threads; torch 2.13 can abort on them at exit
