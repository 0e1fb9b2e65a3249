"""Groups by the number of samples that statistics are to come from; ranks that know no others."""

import os
from unittest import mock

import pytest
import torch
from torch import nn

import syncbn
from support.scripts import execute
from syncbn.comm import samples
from syncbn.comm.samples import least_group


@pytest.mark.parametrize(
    ("samples", "batch", "ranks", "per_host", "size"),
    [
        (64, 2, 1024, 8, 32),  # four hosts
        (64, 16, 1024, 8, 4),  # half a host
        (64, 64, 1024, 8, 1),
        (65, 64, 1024, 8, 2),
        (2048, 2, 1024, 8, 1024),
        (2049, 2, 1024, 8, None),
        (64, 1, 96, 8, 96),  # not 64 or 80, which do not divide, nor 72
        (9, 1, 24, 8, 24),  # 12 would be a host and a half
        (9, 1, 24, 0, 12),  # hosts unknown
        (9, 1, 24, 5, 12),  # or of different sizes
        (3, 1, 7, 0, 7),
        (1, 1, 1, 1, 1),
    ],
)
def test_the_least_group_that_reaches_them(samples, batch, ranks, per_host, size):
    assert least_group(samples, batch, ranks, per_host) == size


@pytest.mark.parametrize(("samples", "size"), [(1, 1), (3, 2), (4, 2), (5, 4), (8, 4)])
def test_groups_reach_the_samples(samples, size, ranks):
    def run(rank):
        model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3)), samples=samples, batch_per_rank=2)
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).double()
        return repr(model[0]), model.double()(x[2 * rank : 2 * rank + 2]).detach()

    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1)).double()
    for rank, (shown, y) in enumerate(ranks(4, run)):
        assert (f"group_size={size}" in shown) == (size < 4), shown
        first = rank // size * size
        group = x[2 * first : 2 * (first + size)].numpy()
        mean, var = group.mean(0), group.var(0)
        expected = (x[2 * rank : 2 * rank + 2].numpy() - mean) / (var + 1e-5) ** 0.5
        torch.testing.assert_close(y, torch.tensor(expected))


def message(**options):
    with pytest.raises((TypeError, ValueError)) as caught:
        syncbn.convert(nn.BatchNorm1d(3), **options)
    return str(caught.value)


@pytest.mark.parametrize(("hosts", "size"), [((2, 2, 2), 6), ((3, 3), 3), ((4, 2), 3)], ids=str)
def test_a_host_comes_first_where_all_are_alike(hosts, size, monkeypatch):
    """Three ranks are enough: of two hosts' six they are one and a half."""
    here = [float(ranks) for ranks in hosts for _ in range(ranks)]
    said = [[3.0, 1.0, ranks] for ranks in here]
    monkeypatch.setattr(samples, "default_group", lambda: mock.Mock(size=6))
    monkeypatch.setattr(samples, "numbers_of_all", lambda comm, mine: said)
    assert samples.group_size_for(3, 1) == size


def test_torchrun_says_how_many_ranks_a_host_has(ranks):
    def run(rank):
        with mock.patch.dict(os.environ, {"LOCAL_WORLD_SIZE": "2"}):
            return samples._ranks_of_this_host(), samples.group_size_for(3, 1)

    assert ranks(4, run) == [(2, 4)] * 4  # and 4 are two hosts


def test_what_is_refused_on_all_ranks_alike(ranks):
    def run(rank):
        return (
            message(samples=9, batch_per_rank=2),
            message(samples=4, batch_per_rank=1 + rank),
            syncbn.convert(nn.BatchNorm1d(3), samples=8, batch_per_rank=2).process_group,
        )

    said = ranks(4, run)
    assert said == [said[0]] * 4
    too_many, other, whole = said[0]
    assert too_many == (
        "convert: expected samples that the ranks' batches reach, got 9 on 4 ranks of 2, which "
        "have 8 together; leave samples out to normalise over all of them"
    )
    ranks_said = (
        "samples=4 and batch_per_rank=1 on rank 0 and samples=4 and batch_per_rank=2 on rank 1"
    )
    assert f"got {ranks_said}; where batches" in other
    assert whole is None


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"samples": 64}, r"samples and batch_per_rank together, got samples=64 and .*=None; pass"),
        ({"batch_per_rank": 2}, r"together, got samples=None and batch_per_rank=2; pass both"),
        ({"samples": 64, "batch_per_rank": 2.0}, "batch_per_rank as a number, got float"),
        ({"samples": True, "batch_per_rank": 2}, "samples as a number, got bool"),
        ({"samples": 64, "batch_per_rank": 0}, "batch_per_rank ≥ 1, got 0"),
        ({"samples": 64, "batch_per_rank": 2}, r"torch\.distributed is not initialised; call"),
        (
            {"samples": 64, "batch_per_rank": 2, "group_size": 2},
            "one of process_group, group_size and samples, got group_size=2 and samples=64; leave",
        ),
    ],
)
def test_what_is_refused(options, text):
    layer = nn.BatchNorm1d(3)
    with pytest.raises((TypeError, ValueError), match=text):
        syncbn.convert(layer, **options)
    assert type(layer) is nn.BatchNorm1d


TRAINS = """
import warnings
import torch
import syncbn
from torch import nn

model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm1d(3)))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    model.eval()(torch.randn(4, 3))
    syncbn.SyncBatchNorm1d(3, process_group=syncbn.comm.Local())(torch.randn(4, 3))
    assert not caught
    model.train()(torch.randn(4, 3))
    model(torch.randn(4, 3))
print([str(each.message) for each in caught if "WORLD_SIZE" in str(each.message)])
"""


@pytest.mark.parametrize(("rank", "size", "count"), [("0", "2", 1), ("1", "2", 0), ("0", "1", 0)])
def test_a_job_whose_ranks_do_not_know_each_other_warns_once(rank, size, count, tmp_path):
    script = tmp_path / "trains.py"
    launched = f"import os\nos.environ.update(RANK={rank!r}, WORLD_SIZE={size!r})\n"
    script.write_text(launched + TRAINS)
    (done,) = execute(script)
    assert done.code == 0, done.stderr
    assert (
        done.stdout.count("one of 2 ranks (WORLD_SIZE), but normalises by its own batch") == count
    )
