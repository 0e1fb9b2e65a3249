"""Loaders of different lengths: nothing hangs, nothing is dropped, training equals one process."""

from __future__ import annotations

import collections
import io

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support.training import assert_same_state, network, train

STEPS = 6
Labelled = collections.namedtuple("Labelled", "image label")


def loaders(lengths: tuple[int, ...]) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
    """One loader per rank, with batches of different sizes."""
    generator = torch.Generator().manual_seed(0)
    return [
        [
            (
                torch.randn(2 + (rank + step) % 3, 2, 8, 8, generator=generator).double() + step,
                torch.randint(3, (2 + (rank + step) % 3,), generator=generator),
            )
            for step in range(length)
        ]
        for rank, length in enumerate(lengths)
    ]


def alone(data: list[list[tuple[torch.Tensor, torch.Tensor]]]) -> dict[str, torch.Tensor]:
    """One process, in each step on the union of all ranks' batches."""
    model, longest = network(), max(map(len, data))
    steps = [[loader[step] for loader in data if step < len(loader)] for step in range(longest)]
    train(model, [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in steps])
    return model.state_dict()


@pytest.mark.parametrize(
    "lengths", [(STEPS, STEPS), (STEPS, 2), (2, STEPS), (0, STEPS), (0, STEPS, 1), (3, 0, STEPS, 0)]
)
@pytest.mark.parametrize("watched", [True, False])
def test_training_equals_one_process_on_the_union(ranks, lengths, watched):
    def run(rank):
        model = DistributedDataParallel(syncbn.convert(network()))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        steps = syncbn.until_all_done(loaders(lengths)[rank], model=model if watched else None)
        sizes = []
        for x, target in steps:
            optimizer.zero_grad()
            loss = cross_entropy(model(x), target, reduction="sum") * steps.scale
            loss.backward()
            optimizer.step()
            sizes.append(len(x))
        assert "forward" not in vars(model)
        return sizes, model.module.state_dict()

    data = loaders(lengths)
    results = ranks(len(lengths), run)
    for rank, (sizes, _) in enumerate(results):
        own = [len(x) for x, _ in data[rank]]
        assert sizes == own + [0] * (max(lengths) - lengths[rank])
    assert_same_state([state for _, state in results], alone(data))


def test_epochs_one_after_another(ranks):
    def run(rank):
        steps = syncbn.until_all_done([torch.ones(2, 3)] * (1 + rank))
        return [[(len(x), steps.samples, steps.scale) for x in steps] for _ in range(3)]

    first, second = ranks(2, run)
    assert first == [[(2, 4, 0.5), (0, 2, 1.0)]] * 3
    assert second == [[(2, 4, 0.5), (2, 2, 1.0)]] * 3


@pytest.mark.parametrize("lengths", [(0, 1), (1, 0), (2, 1)])
def test_the_structure_of_an_empty_batch(ranks, lengths):
    def batch():
        image = torch.ones(4, 3, 5, dtype=torch.bfloat16)
        nested = {"mask": torch.ones(4, dtype=torch.bool), "more": [torch.ones(4, 2).double()]}
        return Labelled(image, (nested, ["a.png"] * 4, None, 0.5, torch.tensor(7)))

    def run(rank):
        return list(syncbn.until_all_done([batch()] * lengths[rank]))

    for rank, batches in enumerate(ranks(2, run)):
        for empty in batches[lengths[rank] :]:
            image, (nested, names, nothing, number, scalar) = empty
            assert type(empty).__name__ == "Labelled"
            assert (image.shape, image.dtype) == ((0, 3, 5), torch.bfloat16)
            assert (nested["mask"].shape, nested["mask"].dtype) == ((0,), torch.bool)
            assert (nested["more"][0].shape, nested["more"][0].dtype) == ((0, 2), torch.float64)
            assert (names, nothing, number, scalar.item()) == ([], None, 0.5, 7)


def test_batches_of_another_kind(ranks):
    """Detection: a list of images of different sizes and a list of targets."""

    def run(rank):
        batch = ([torch.ones(3, 4, 5), torch.ones(3, 6, 2)], ["cat", "dog"])
        steps = syncbn.until_all_done(
            [batch] * rank, empty=lambda batch: ([], []), count=lambda batch: len(batch[0])
        )
        return [(len(images), steps.samples) for images, _ in steps]

    assert ranks(3, run) == [[(0, 4), (0, 2)], [(2, 4), (0, 2)], [(2, 4), (2, 2)]]


def test_no_batch_anywhere_and_groups_of_their_own(ranks):
    def run(rank):
        nothing = list(syncbn.until_all_done([]))
        group = syncbn.comm.subgroups(2)
        return nothing, len(list(syncbn.until_all_done([torch.ones(1, 2)] * rank, group)))

    assert ranks(4, run) == [([], 1), ([], 1), ([], 3), ([], 3)]


@pytest.mark.parametrize("when", ["at once", "later", "not a batch"])
def test_an_error_in_one_loader_ends_all(ranks, when):
    def loader(rank):
        yield from [torch.ones(1, 2)] * (0 if when == "at once" else 2)
        if rank == 1:
            if when == "not a batch":
                yield torch.ones(2, 2), torch.ones(3, 2)
            raise OSError("no such file")
        yield from [torch.ones(1, 2)] * 5

    def run(rank):
        try:
            list(syncbn.until_all_done(loader(rank)))
        except Exception as error:
            return type(error).__name__, str(error)

    first, second, third = ranks(3, run)
    step = 0 if when == "at once" else 2
    for rank, (kind, text) in ((0, first), (2, third)):
        assert kind == "RuntimeError"
        assert f"the loader of rank 1 raised an error in step {step}, so that rank {rank}" in text
    if when == "not a batch":
        assert second[0] == "ValueError"
        assert "with the same N everywhere, got tensors of [2, 3] samples; pass empty=" in second[1]
    else:
        assert second == ("OSError", "no such file")


def test_an_empty_batch_that_cannot_travel_ends_all(ranks):
    def run(rank):
        options = {"empty": lambda batch: (b for b in batch), "count": len}
        with pytest.raises(TypeError) as caught:
            list(syncbn.until_all_done([[1, 2]] * rank, **options))
        return str(caught.value)

    first, second = ranks(2, run)
    assert first == second
    assert "expected a batch without samples of rank 1, which ranks without any batch" in first
    assert "cannot travel without running code: builtins.generator; let empty= return" in first


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"loader": 3}, TypeError, "expected an iterable of batches, got int"),
        ({"loader": [], "model": 3}, TypeError, "expected model to be a torch.nn.Module, got int"),
        ({"loader": [], "empty": len}, ValueError, "both or neither, got only empty"),
        ({"loader": [], "process_group": 3}, TypeError, "process_group: got int; pass None"),
    ],
)
def test_wrong_arguments(arguments, error, words):
    with pytest.raises(error, match=words):
        syncbn.until_all_done(**arguments)


@pytest.mark.parametrize("batch", [object(), torch.tensor(1.0), [], {"a": "b"}])
def test_batches_that_cannot_be_counted(batch):
    with pytest.raises((TypeError, ValueError), match=r"until_all_done: expected .* pass empty="):
        list(syncbn.until_all_done([batch]))


def test_checkpoints_recompute_on_all_ranks_or_none(ranks):
    """Looking for layers that can't go backward must not start a checkpoint's second forward."""
    from torch.utils.checkpoint import checkpoint

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.block = torch.nn.Sequential(
                torch.nn.Conv2d(2, 3, 1), torch.nn.BatchNorm2d(3), torch.nn.ReLU()
            )
            self.head = torch.nn.Conv2d(3, 1, 1)

        def forward(self, x):
            return self.head(checkpoint(self.block, x, use_reentrant=False))

    def run(rank):
        model = syncbn.convert(Network())
        for x in syncbn.until_all_done([torch.randn(2, 2, 4, 4)] * (3 - 2 * rank), model=model):
            model(x.requires_grad_()).sum().backward()
        return int(model.block[1].num_batches_tracked)

    assert ranks(2, run) == [3, 3]


def test_len_is_for_progress_bars_and_asks_nobody(ranks):
    def run(rank):
        steps = syncbn.until_all_done([torch.ones(2, 3)] * (1 + 2 * rank))
        before = len(steps) if rank == 0 else None  # on one rank alone
        seen = sum(1 for _ in steps)
        return before, seen, len(steps)

    assert ranks(2, run) == [(1, 3, 3), (None, 3, 3)]


def test_len_of_a_loader_without_one_and_of_an_empty_one():
    steps = syncbn.until_all_done(iter([torch.ones(2, 3)]))
    with pytest.raises(TypeError, match="has no len"):
        len(steps)
    assert len(list(steps)) == 1
    steps = syncbn.until_all_done([])
    assert len(steps) == 0
    assert steps  # a rank without batches takes part


def test_a_tqdm_bar_on_one_rank_alone(ranks):
    tqdm = pytest.importorskip("tqdm")

    def run(rank):
        steps = syncbn.until_all_done([torch.ones(2, 3)] * (1 + 2 * rank))
        seen = []
        for _ in range(2):
            bar = tqdm.tqdm(steps, file=io.StringIO()) if rank == 0 else steps
            seen.append((len(bar) if rank == 0 else None, sum(1 for _ in bar)))
        return seen

    assert ranks(2, run) == [[(1, 3), (3, 3)], [(None, 3)] * 2]


def test_a_length_that_cannot_be_told_is_unknown():
    class Endless(list):
        def __len__(self):
            raise NotImplementedError("who knows")

    steps = syncbn.until_all_done(Endless([torch.ones(2)]))
    assert len(list(steps)) == 1
    with pytest.raises(TypeError, match=r"len\(loader\) raised NotImplementedError\('who knows'\)"):
        len(steps)
