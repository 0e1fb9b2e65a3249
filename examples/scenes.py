"""Scenes of handwritten digits, of many sizes and lights, each pixel labelled; for segmentation.py.

The digits are scikit-learn's 1,797 scans of 8 × 8 pixels. A pixel's class is 0 where there is no
stroke, else one more than the digit.
"""

from __future__ import annotations

from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import Dataset

CLASSES = 11
_CELL = 10  # pixels, with a digit of 8 somewhere in it
_COLOURS = ["#FFFFFF", "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2"]
_COLOURS += ["#D55E00", "#CC79A7", "#000000", "#999999", "#661100"]


class Scenes(Dataset):
    """(image (1, H, W), label (H, W)), both sides from 24 to 56 pixels; the same for each index.

    Those for validation are made of digits that are in none for training.
    """

    def __init__(self, count: int, *, train: bool, seed: int = 0) -> None:
        images, targets = map(torch.from_numpy, load_digits(return_X_y=True))
        half = slice(0, 1400) if train else slice(1400, None)
        self.digits, self.targets = images[half].float().view(-1, 8, 8) / 16, targets[half]
        self.count, self.first = count, seed * 1_000_000 + (0 if train else 500_000)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(self.first + index)

        def number(low: int, high: int) -> int:
            return int(torch.randint(low, high, (), generator=random))

        height, width = 8 * number(3, 8), 8 * number(3, 8)
        ink, label = torch.zeros(height, width), torch.zeros(height, width, dtype=torch.long)
        for top in range(0, height - _CELL + 1, _CELL):
            for left in range(0, width - _CELL + 1, _CELL):
                if number(0, 3):  # two of three cells
                    chosen = number(0, len(self.digits))
                    y, x = top + number(0, 3), left + number(0, 3)
                    ink[y : y + 8, x : x + 8] = self.digits[chosen]
                    stroke = self.digits[chosen] > 0.25
                    label[y : y + 8, x : x + 8][stroke] = 1 + self.targets[chosen]
        light, contrast, *_ = torch.rand(2, generator=random).tolist()
        noise = 0.05 * torch.randn(height, width, generator=random)
        return (light + (0.5 + contrast) * ink + noise)[None], label


def draw(
    path: Path, rows: list[tuple[Tensor, Tensor, Tensor]], curves: dict[str, list[float]]
) -> None:
    """Write a picture: rows of (image, label, prediction), and mean IoU by epochs of some runs."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.4 + 1.5 * len(rows)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 1.1))
    panels = left.subplots(len(rows), 3, squeeze=False)
    for row, line in zip(rows, panels, strict=True):
        for tensor, axes in zip(row, line, strict=True):
            labels = {"cmap": ListedColormap(_COLOURS), "vmin": 0, "vmax": CLASSES - 1}
            look = (
                {"cmap": "gray", "vmin": 0, "vmax": 2.2} if tensor.is_floating_point() else labels
            )
            axes.imshow(tensor.squeeze(), interpolation="nearest", **look)
            axes.set(xticks=[], yticks=[])
    for axes, title in zip(panels[0], ("input", "truth", "prediction"), strict=True):
        axes.set_title(title, fontsize=10)
    axes = right.subplots()
    styles = [("#0B3C5D", "o"), ("#D55E00", "s"), ("#56B4E9", "^"), ("0.4", "v")]
    for (name, values), (colour, marker) in zip(curves.items(), styles, strict=False):
        epochs, percent = range(1, len(values) + 1), [100 * value for value in values]
        axes.plot(epochs, percent, color=colour, marker=marker, markersize=4, label=name)
    axes.set(xlabel="epoch", ylabel="mean IoU on validation scenes (%)", ylim=(0, 100))
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper left")
    figure.savefig(path)
