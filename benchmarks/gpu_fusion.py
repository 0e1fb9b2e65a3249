"""Count the kernels that torch.compile makes of relu(bn(x) + residual) for a GPU that is not here.

\b
    python benchmarks/gpu_fusion.py
    python benchmarks/gpu_fusion.py --shape 32,256,56,56 --dtype bfloat16 --layout contiguous

"Moved" is what they read and write of memory, in sizes of the input; "tensors" the same for each
kernel over whole tensors. syncbn goes all the way of two ranks, beside a mirror (gpu/peer.py),
whose messages are one or two of the small kernels. It needs Triton, and a minute.
"""

from __future__ import annotations

import click
import torch

from gpu.calls import FORMATS, Case
from gpu.fusion import count, layers
from gpu.speed import Block
from tabular import print_table


@click.command(help=__doc__)
@click.option("--shape", default="2,64,112,112", show_default=True)
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="bfloat16")
@click.option(
    "--layout", type=click.Choice(["contiguous", "channels_last"]), default="channels_last"
)
def main(shape: str, dtype: str, layout: str) -> None:
    sizes = tuple(map(int, shape.split(",")))
    if len(sizes) - 2 not in FORMATS:
        raise click.UsageError("--shape: give four sizes N,C,H,W or five")
    case, rows = Case(sizes, getattr(torch, dtype), layout), []
    for name, layer in layers(sizes[1]).items():
        for direction, found in count(Block(layer), case).items():
            each = " + ".join(f"{share:.2f}" for share in found.tensors)
            row = {"layer": name, "pass": direction, "kernels": found.kernels}
            rows.append(row | {"moved": f"{found.moved:.2f}", "tensors": each})
    print_table(f"relu(bn(x) + residual), {case}", f"torch {torch.__version__}", rows)


if __name__ == "__main__":
    main()
