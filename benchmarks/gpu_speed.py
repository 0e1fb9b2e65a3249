"""Time syncbn on a GPU against torch's layers: each step on the device, and calls on the host.

\b
    python benchmarks/gpu_speed.py device --picture speed.png   # each step, share of copy bandwidth
    python benchmarks/gpu_speed.py host                         # host time per call
    python benchmarks/gpu_speed.py compiled                     # relu(bn(x) + residual), both ways

"sync" are the functions of torch.nn.SyncBatchNorm, without what it does between them; "batchnorm"
is torch.nn.BatchNorm, with cuDNN where torch takes it. What is compared runs in turn in one
process, round after round; figures are the median over rounds ± half the distance between the
quartiles, and ratios, times of torch / times of syncbn, the median of the rounds' own: above 1,
syncbn is faster.
"Share" is the bytes that a step has to read and write, per second, over those of a copy measured
first; tensors that stay in the device's cache can have more than 1. Before each round the device
spins while calls are queued, so that its times hold no host time. --quick runs anywhere.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from gpu.calls import PASSES, WHOLE
from gpu.machine import GIGABYTE, copy_bandwidth, environment, find_machine
from gpu.speed import PEERS, compiled_rows, device_rows, host_rows, speed_cases
from tabular import print_table

TITLES = {
    "device": "Steps of one layer on the device",
    "host": "Host time per call",
    "compiled": "relu(bn(x) + residual), forward and backward",
}


@click.command(help=__doc__)
@click.argument("mode", type=click.Choice(list(TITLES)), default="device")
@click.option("--rounds", type=click.IntRange(2), default=50, show_default=True)
@click.option("--calls", type=click.IntRange(1), default=100, help="per round, for host")
@click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path), help="for device: PNG …"
)
@click.option("--quick", is_flag=True, help="toy sizes, also without a GPU: to see that it runs")
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of the table")
def main(
    mode: str, rounds: int, calls: int, picture: Path | None, quick: bool, as_json: bool
) -> None:
    if picture and mode != "device":
        raise click.UsageError("--picture is for device")
    machine = find_machine(toy=quick)
    if not (machine.is_gpu or quick):
        raise click.ClickException("torch sees no GPU; --quick runs toy sizes on the CPU")
    facts = environment(machine) | {"rounds": rounds}
    if mode == "device":
        facts["copy_bytes_per_second"] = copy = copy_bandwidth(machine)
        rows = device_rows(machine, speed_cases(machine), rounds, copy)
    elif mode == "host":
        rows = host_rows(machine, rounds, calls)
    else:
        rows = compiled_rows(machine, rounds)
    if picture:
        draw(rows, facts, picture)
    if as_json:
        json.dump({"environment": facts, "rows": rows}, sys.stdout, indent=1)
        return
    title, last = TITLES[mode] + ", toy sizes" * quick, [*PASSES, *WHOLE][-1]
    printed = [{key: row[key] for key in row if key != "cached"} for row in rows]
    print_table(title, described(facts), printed, ends=lambda row: row["call"] == last)


def described(facts: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {facts[name]}" for name in ("torch", "syncbn", "python"))
    copied = facts.get("copy_bytes_per_second")
    copies = f"copies {copied / GIGABYTE:.0f} GB/s" if copied else ""
    how = f"{facts['kernels']} kernels", f"{facts['rounds']} rounds", copies
    return ", ".join(filter(None, (facts["device"], versions, *how)))


def draw(rows: list[dict[str, Any]], facts: dict[str, Any], path: Path) -> None:
    """A panel for each of torch's layers."""
    from cpu_picture import draw_panels

    panels: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        for peer, name in PEERS.items():
            if row["call"] in WHOLE and f"{peer}/syncbn" in row:
                compared = {"pass": row["call"], "ratio": row[f"{peer}/syncbn"]}
                panels.setdefault(f"against {name}", []).append(row | compared)
    ratios = [row["ratio"] for own in panels.values() for row in own]
    finding = f"syncbn on {facts['device']}: not slower than torch in {sum(r >= 1 for r in ratios)}"
    finding += f" of {len(ratios)} cases ({min(ratios):.1f} to {max(ratios):.1f}×)"
    draw_panels(panels, finding, described(facts), path, peer="torch")


if __name__ == "__main__":
    main()
