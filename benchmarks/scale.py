"""What an exchange costs each of many ranks, by a model: time and received bytes, way by way.

    python benchmarks/scale.py --picture scale.png
    python benchmarks/scale.py --channels 2048 --ranks-per-host 4 --latency-between 20

Forward and backward of one layer on GPUs, from 2 to 100,000 ranks. Nothing is run or measured:
docs/scale.md has formulas and sources. The bytes are those that the code receives, as a test shows
(tests/project/test_benchmark_scale.py). "gather": all ranks' rows to every rank. "hosts first":
within each host, then one row per host. "√W × √W": in groups of about √W ranks, then one row per
group. "sums": two in forward. "syncbn": a gather up to 64 ranks, beyond it sums. "groups": the same
in groups whose batches reach --samples.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click

from scale_picture import draw
from syncbn.comm import are_many
from syncbn.comm.samples import least_group
from syncbn.pictures import check_path
from syncbn.tensors.prefix import WORDS
from tabular import print_table

NUMBER = 8  # bytes of a float64
SHOWN = (8, 64, 512, 4096, 100_000)
RANKS = (*(2**k for k in range(1, 7)), 96, *(2**k for k in range(7, 17)), 100_000)


@dataclass(frozen=True)
class Link:
    """latency: α, seconds until a message arrives; per_byte: β, seconds for each of its bytes."""

    latency: float
    per_byte: float


@dataclass(frozen=True)
class Network:
    """Hosts of so many ranks; call: seconds that a collective takes before its first message."""

    ranks_per_host: int
    within: Link
    between: Link
    call: float

    def hosts(self, ranks: int) -> int:
        return math.ceil(ranks / self.ranks_per_host)


@dataclass(frozen=True)
class Collective:
    """A gather (or a sum) of so many numbers of each of p ranks, on H hosts."""

    ranks: int
    hosts: int
    numbers: float
    adds: bool = False

    @property
    def sent(self) -> float:
        """m, bytes."""
        return NUMBER * self.numbers

    @property
    def received(self) -> float:
        """Bytes that each rank is given: p·m by a gather, m by a sum."""
        return self.sent if self.adds else self.ranks * self.sent

    @property
    def of_a_host(self) -> int:
        """k = p / H, ranks."""
        return math.ceil(self.ranks / self.hosts)


def ring_gather(network: Network, of: Collective) -> float:
    """(p − H)·α + (H − 1)·α′ + (p − 1)·m·max(β, β′ if H > 1): rows pass from rank to rank."""
    near, far = of.ranks - of.hosts, of.hosts - 1
    slowest = max(network.within.per_byte, network.between.per_byte if far else 0)
    latency = near * network.within.latency + far * network.between.latency
    return latency + (of.ranks - 1) * of.sent * slowest


def ring_sum(network: Network, of: Collective) -> float:
    """Twice a ring's gather, of p-ths: 2·((p − H)·α + (H − 1)·α′ + (p − 1)/p·m·max(β, β′))."""
    part = replace(of, numbers=of.numbers / of.ranks, adds=False)
    return 2 * ring_gather(network, part)


def doubling_gather(network: Network, of: Collective) -> float:
    """⌈log₂ k⌉·α + ⌈log₂ H⌉·α′ + (k − 1)·m·β + (p − k)·m·β′: what ranks have doubles in a step."""
    near, far = math.ceil(math.log2(of.of_a_host)), math.ceil(math.log2(of.hosts))
    latency = near * network.within.latency + far * network.between.latency
    rows = (of.of_a_host - 1) * network.within.per_byte
    rows += (of.ranks - of.of_a_host) * network.between.per_byte
    return latency + rows * of.sent


def tree_sum(network: Network, of: Collective) -> float:
    """2·((k − 1)·(α + m·β) + ⌈log₂ H⌉·(α′ + m·β′)): a chain in each host, a tree, and back."""
    near = network.within.latency + of.sent * network.within.per_byte
    far = network.between.latency + of.sent * network.between.per_byte
    return 2 * ((of.of_a_host - 1) * near + math.ceil(math.log2(of.hosts)) * far)


# How gathers go, and sums.
ENGINES = {
    "NCCL": (ring_gather, tree_sum),
    "MPI": (doubling_gather, tree_sum),
    "gloo": (ring_gather, ring_sum),
}


def seconds(network: Network, collectives: Sequence[Collective], engine: str) -> float:
    """One after the other, each with what a call takes by itself."""
    return sum(network.call + ENGINES[engine][c.adds](network, c) for c in collectives)


Way = Callable[[Network, int, int], list[Collective]]


def gather(network: Network, ranks: int, channels: int) -> list[Collective]:
    """Rows of count, mean and M2; backward a sum, in which each rank has a place for its header."""
    hosts = network.hosts(ranks)
    row, sums = WORDS + 1 + 2 * channels, WORDS * ranks + 2 * channels
    return [Collective(ranks, hosts, row), Collective(ranks, hosts, sums, adds=True)]


def hosts_first(network: Network, ranks: int, channels: int) -> list[Collective]:
    return _in_two_levels(network, ranks, channels, network.ranks_per_host)


def balanced(network: Network, ranks: int, channels: int) -> list[Collective]:
    """The first level is whole hosts."""
    hosts = round(math.sqrt(ranks) / network.ranks_per_host)
    return _in_two_levels(network, ranks, channels, network.ranks_per_host * max(hosts, 1))


def _in_two_levels(network: Network, ranks: int, channels: int, first: int) -> list[Collective]:
    """Of merged rows, each rank of a group with its fellows of the others; backward a sum."""
    row, first = WORDS + 1 + 2 * channels, min(first, ranks)
    levels = [Collective(first, network.hosts(first), row)]
    if groups := math.ceil(ranks / first) - 1:
        levels.append(Collective(groups + 1, groups + 1, row))
    return [*levels, _sum(network, ranks, 2 * channels)]


def sums(network: Network, ranks: int, channels: int) -> list[Collective]:
    """Σn and Σn·mean; Σn·δ and Σ(M2 + n·δ²); backward Σdy and Σdy·x̂."""
    return [_sum(network, ranks, size) for size in (1 + channels, 2 * channels, 2 * channels)]


def _sum(network: Network, ranks: int, numbers: int) -> Collective:
    return Collective(ranks, network.hosts(ranks), WORDS + numbers, adds=True)


def as_syncbn(network: Network, ranks: int, channels: int) -> list[Collective]:
    return (sums if are_many(ranks) else gather)(network, ranks, channels)


def ways_of(samples: int, batch_per_rank: int) -> dict[str, Way]:
    def groups(network: Network, ranks: int, channels: int) -> list[Collective]:
        """All ranks, where they do not reach so many samples."""
        size = least_group(samples, batch_per_rank, ranks, network.ranks_per_host)
        return as_syncbn(network, size or ranks, channels)

    ways = {"gather": gather, "hosts first": hosts_first, "√W × √W": balanced, "sums": sums}
    return {**ways, "syncbn": as_syncbn, f"groups of {samples} samples": groups}


def rows_of(
    network: Network, channels: int, ways: dict[str, Way], ranks: Sequence[int]
) -> Iterator[dict[str, Any]]:
    for count in ranks:
        for name, way in ways.items():
            collectives = way(network, count, channels)
            yield {
                "ranks": count,
                "way": name,
                "collectives": len(collectives),
                "received_bytes": sum(each.received for each in collectives),
                **{f"{each}_us": 1e6 * seconds(network, collectives, each) for each in ENGINES},
            }


POSITIVE = click.FloatRange(0, min_open=True)
COUNT = click.IntRange(1)


@click.command(help=__doc__)
@click.option("--channels", type=COUNT, default=256, show_default=True)
@click.option("--ranks-per-host", type=COUNT, default=8, show_default=True)
@click.option("--latency-within", type=POSITIVE, default=1, show_default=True, help="µs")
@click.option("--latency-between", type=POSITIVE, default=5, show_default=True, help="µs")
@click.option("--bandwidth-within", type=POSITIVE, default=200, show_default=True, help="GB/s")
@click.option("--bandwidth-between", type=POSITIVE, default=25, show_default=True, help="GB/s")
@click.option("--call", type=POSITIVE, default=7, show_default=True, help="µs, of any collective")
@click.option("--samples", type=COUNT, default=64, show_default=True, help="of the groups")
@click.option("--batch-per-rank", type=COUNT, default=2, show_default=True)
@click.option("--picture", type=click.Path(path_type=Path), help="draw time and bytes there")
@click.option("--quick", is_flag=True, help="up to 128 ranks")
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of the table")
def main(
    channels: int, samples: int, batch_per_rank: int, picture: Path | None, **given: Any
) -> None:
    if picture is not None:
        try:
            check_path("--picture", picture)
        except ValueError as error:
            raise click.UsageError(str(error)) from None
    within, between = (
        Link(given[f"latency_{where}"] * 1e-6, 1e-9 / given[f"bandwidth_{where}"])
        for where in ("within", "between")
    )
    network = Network(given["ranks_per_host"], within, between, given["call"] * 1e-6)
    ways = ways_of(samples, batch_per_rank)
    quick = given["quick"]
    rows = list(
        rows_of(network, channels, ways, [n for n in RANKS if n <= 128] if quick else RANKS)
    )
    what = (
        f"a model, not measured: {channels} channels, float64; {network.ranks_per_host} ranks per "
        f"host; {given['latency_within']:g} µs and {given['bandwidth_within']:g} GB/s within, "
        f"{given['latency_between']:g} µs and {given['bandwidth_between']:g} GB/s between; "
        f"{given['call']:g} µs per collective"
    )
    if picture is not None:
        draw(rows, what, picture)
    if given["as_json"]:
        json.dump({"model": what, "rows": rows}, sys.stdout, indent=1)
        return
    shown = [row for row in rows if row["ranks"] in SHOWN]
    print_table(
        "One layer, forward and backward, on each rank",
        f"{what}; NCCL: gathers by a ring, sums by trees; MPI: gathers by doubling; gloo: rings",
        shown,
        lambda row: row["way"] == list(ways)[-1],
    )


if __name__ == "__main__":
    main()
