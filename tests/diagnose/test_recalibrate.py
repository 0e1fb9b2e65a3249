"""recalibrate(): statistics equal those of a float64 pass over the union of all ranks' data."""

from __future__ import annotations

import copy
import itertools
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch._dynamo import eval_frame
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn

import syncbn
from support import oracle
from support.cases import CLOSE, laid_out
from support.in_threads import in_threads
from support.layers import OnlyAConstructor, assert_same, snapshot
from syncbn.models.graphs import without_graphs


def network(convert: bool = True) -> nn.Module:
    """Two layers, the second of which sees what the first has normalised; and dropout."""
    torch.manual_seed(3)
    body = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout())
    head = nn.Sequential(nn.Flatten(), nn.Linear(36, 3), nn.BatchNorm1d(3, momentum=None))
    model = nn.Sequential(body, head).double().eval()
    return syncbn.convert(model) if convert else model


def batch(size: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 * seed + size)
    return torch.randn(size, 2, 5, 5, dtype=torch.float64, generator=generator) + seed


def batch_norms(model: nn.Module) -> dict[str, nn.Module]:
    return {
        n: m for n, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)
    }


def union(steps: list[torch.Tensor], model: nn.Module | None = None) -> dict[str, torch.Tensor]:
    """The statistics of all that plain layers are given, each step being one batch."""
    model = network(convert=False) if model is None else model
    layers = batch_norms(model)
    seen: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    for name, layer in layers.items():
        layer.train()
        layer.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(args[0]))
    with torch.no_grad():
        for x in steps:
            model(x)
    state = {}
    for name, inputs in seen.items():
        x = torch.cat(inputs).double()
        whole = oracle.batch_norm(x, torch.zeros_like(x))
        state[f"{name}.running_mean"], state[f"{name}.running_var"] = whole.mean, whole.unbiased_var
        state[f"{name}.num_batches_tracked"] = torch.tensor(len(steps))
    return state


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: b.clone() for n, b in model.named_buffers() if "skipped" not in n}


def assert_statistics(model_or_state, expected, **close) -> None:
    state = model_or_state
    state = statistics(state) if isinstance(state, nn.Module) else state
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name].to(value.dtype), value, msg=name, **(close or CLOSE))


# --- what it computes ------------------------------------------------------------------------


@pytest.mark.parametrize("convert", [True, False])
def test_one_process_is_a_pass_over_all_batches(convert):
    model = network(convert)
    batches = [batch(4), batch(2, seed=5), batch(7, seed=2)]
    syncbn.recalibrate(model, batches)
    assert_statistics(model, union(batches))


# How many samples each rank's batches have.
SHARES = {
    "even": [[3, 2], [3, 2]],
    "uneven": [[3, 1, 2], [2, 1]],
    "one without any": [[2, 4], []],
    "empty batches": [[0, 3], [2, 0]],
    "one sample each": [[1], [1]],
    "three ranks": [[2], [1, 2, 3], []],
}


def shares(sizes: list[list[int]]) -> list[list[torch.Tensor]]:
    return [
        [batch(size, seed=10 * rank + step) for step, size in enumerate(own)]
        for rank, own in enumerate(sizes)
    ]


@pytest.mark.parametrize("sizes", SHARES.values(), ids=SHARES)
@pytest.mark.parametrize("ddp", [False, True])
def test_synchronised_layers_are_one_process_with_the_union(ranks, sizes, ddp):
    data = shares(sizes)

    def run(rank):
        model = network()
        syncbn.recalibrate(DistributedDataParallel(model) if ddp else model, data[rank])
        return statistics(model)

    steps = [
        torch.cat([part for part in parts if part is not None])
        for parts in itertools.zip_longest(*data)
    ]
    states = ranks(len(sizes), run)
    for state in states:
        assert_statistics(state, union(steps))
        assert_statistics(state, states[0], rtol=0, atol=0)


@pytest.mark.parametrize("sizes", [[[3, 2, 4], [2]], [[2, 3], []]])
def test_plain_layers_are_measured_over_all_ranks(ranks, sizes):
    data = shares(sizes)

    def run(rank):
        model = network(convert=False)
        syncbn.recalibrate(model, data[rank])
        return statistics(model)

    expected = union([x for own in data for x in own])
    for name in expected:
        if "tracked" in name:
            expected[name] = torch.tensor(max(map(len, sizes)))
    for state in ranks(2, run):
        assert_statistics(state, expected)


def test_layers_in_groups_of_their_own_are_measured_over_all_ranks(ranks):
    data = shares([[3], [2]])

    def run(rank):
        model = syncbn.convert(network(convert=False), group_size=1)
        syncbn.recalibrate(model, data[rank])
        return statistics(model)

    expected = union([x for own in data for x in own])
    for state in ranks(2, run):
        for name in (name for name in expected if "tracked" not in name):
            torch.testing.assert_close(state[name], expected[name], **CLOSE)


def test_threads_and_their_communicator():
    data, plain = shares([[3, 2], [2]]), network(convert=False)

    def run(comm):
        model = syncbn.convert(copy.deepcopy(plain), comm)
        syncbn.recalibrate(model, data[comm.rank], process_group=comm)
        return statistics(model)

    expected = union([torch.cat((data[0][0], data[1][0])), data[0][1]])
    for state in in_threads(2, run):
        assert_statistics(state, expected)


@pytest.mark.parametrize("dims", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_dimension_and_dtype(dims, dtype):
    layer = syncbn.SyncBatchNorm(3, affine=False)
    shape = (6, 3, 4, 3, 2)[:dims]
    batches = [(torch.randn(shape) * 3 + 100).to(dtype) for _ in range(3)]
    syncbn.recalibrate(layer, batches)
    x = torch.cat(batches).double()
    expected = oracle.batch_norm(x, torch.zeros_like(x))
    oracle.assert_close(layer.running_mean, expected.mean)
    oracle.assert_close(layer.running_var, expected.unbiased_var)


@pytest.mark.parametrize("layout", ["channels_last", "strided", "transposed"])
def test_every_layout(layout):
    x = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    layer = nn.BatchNorm2d(3).double()
    syncbn.recalibrate(layer, [laid_out(x, layout)])
    torch.testing.assert_close(layer.running_var, x.transpose(0, 1).flatten(1).var(1), **CLOSE)


def test_no_average_of_averages_and_no_cancellation():
    """torch's update_bn weighs every batch alike, and leaves the variance between them out."""
    model, theirs = nn.BatchNorm1d(1).double(), nn.BatchNorm1d(1).double()
    data = [torch.full((2, 1), 1e8).double(), 1e8 + torch.arange(6.0).double().unsqueeze(1)]
    syncbn.recalibrate(model, data)
    update_bn(data, theirs)
    whole = torch.cat(data)
    torch.testing.assert_close(model.running_mean, whole.mean(0))
    torch.testing.assert_close(model.running_var, whole.var(0), rtol=1e-8, atol=0)
    assert abs(theirs.running_var - whole.var(0)) > 0.5
    assert model.num_batches_tracked == theirs.num_batches_tracked == 2


def test_masks_say_what_counts():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.randn(2, 4, 3, dtype=torch.float64)
    expected = x.transpose(0, 1)[:, mask].var(1)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = syncbn.SyncBatchNorm1d(4, dtype=torch.float64)

        def forward(self, x, mask):
            return self.norm(x, mask)

    model = Masked()
    syncbn.recalibrate(model, [{"x": x, "mask": mask}])
    torch.testing.assert_close(model.norm.running_var, expected, **CLOSE)
    layer = syncbn.SyncBatchNorm1d(4, dtype=torch.float64)
    for batches in ([{"mask": mask, "input": x}], [x]):
        with syncbn.masking(layer, mask):
            syncbn.recalibrate(layer, batches)
        torch.testing.assert_close(layer.running_var, expected, **CLOSE)


def test_nan_in_the_statistics_is_repaired():
    layer = syncbn.SyncBatchNorm1d(2)
    layer.running_mean.fill_(torch.nan)
    layer.running_var.fill_(torch.inf)
    syncbn.recalibrate(layer, [torch.tensor([[1.0, 2.0], [3.0, 2.0]])])
    assert layer.running_mean.tolist() == [2, 2]
    assert layer.running_var.tolist() == [2, 0]


def test_skip_nonfinite_leaves_such_a_batch_out():
    layer = syncbn.SyncBatchNorm1d(2, skip_nonfinite=True)
    good = torch.randn(4, 2)
    syncbn.recalibrate(layer, [good, good * torch.inf])
    oracle.assert_close(layer.running_mean, good.double().mean(0))
    assert layer.num_batches_tracked == 1
    assert layer.num_batches_skipped == 0


def test_replicas_of_data_parallel():
    batches = [batch(4), batch(3, seed=2)]
    model = syncbn.DataParallel(network(), devices=["cpu", "cpu"])
    syncbn.recalibrate(model, batches)
    assert_statistics(model.module, union(batches))


# --- what it takes ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_the_first_of_a_list_or_tuple_is_the_input(kind):
    model, batches = network(), [batch(3), batch(2, seed=1)]
    syncbn.recalibrate(model, kind([(batches[0], "target"), [batches[1], 7, None]]))
    assert_statistics(model, union(batches))


def test_what_is_no_input_in_itself_goes_into_a_list_of_one():
    class Detector(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(2).double()

        def forward(self, images):
            return self.norm(torch.stack([each["image"] for each in images]))

    model, x = Detector(), batch(3)
    syncbn.recalibrate(model, ([each] for each in [[{"image": image} for image in x]]))
    torch.testing.assert_close(model.norm.running_mean, x.mean((0, 2, 3)), **CLOSE)


def test_packed_sequences_are_one_argument():
    class Speech(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, packed):
            return self.norm(packed.data)

    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(1, 2)])
    model = Speech()
    syncbn.recalibrate(model, [packed])
    torch.testing.assert_close(model.norm.running_mean, packed.data.mean(0))


def test_ranks_with_batches_of_another_kind_give_until_all_done(ranks):
    data = shares([[3, 2], [2]])

    class OfLists(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = network()

        def forward(self, images):
            return self.inner(torch.stack(images) if images else torch.empty(0, 2, 5, 5).double())

    def run(rank):
        model = OfLists()
        lists = [([*x],) for x in data[rank]]
        steps = syncbn.until_all_done(lists, empty=lambda _: ([],), count=lambda each: len(each[0]))
        syncbn.recalibrate(model, steps)
        return statistics(model.inner)

    expected = union([torch.cat((data[0][0], data[1][0])), data[0][1]])
    for state in ranks(2, run):
        assert_statistics(state, expected)


@pytest.mark.parametrize("how", ["module", "method"])
def test_compiled_models_are_measured_without_their_graphs(how):
    model = network()
    if how == "module":
        compiled = torch.compile(model, backend="eager")
    else:
        compiled = model
        model.compile(backend="eager")
    compiled(batch(2))
    syncbn.recalibrate(compiled, [batch(4)])
    assert_statistics(model, union([batch(4)]))


def test_graphs_are_used_again_after_ranks_that_are_threads():
    """Of which the first to begin is the first to end."""
    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        for thread in (first, second):
            thread.submit(without_graphs.__enter__).result()
        for thread in (first, second):
            assert eval_frame._stance.stance == "force_eager"
            thread.submit(without_graphs.__exit__).result()
    assert eval_frame._stance.stance == "default"


def test_frozen_layers_are_left_alone():
    model, plain = network(), network(convert=False)
    syncbn.freeze(model[0])
    model[0][1].running_mean += 1
    plain[0][1].running_mean += 1
    syncbn.recalibrate(model, [batch(4)])
    syncbn.freeze(plain[0])
    expected = union([batch(4)], plain)
    torch.testing.assert_close(model[1][2].running_var, expected["1.2.running_var"], **CLOSE)
    assert (model[0][1].running_mean == 1).all()
    assert model[0][1].num_batches_tracked == 0


def test_layers_without_statistics_have_nothing_to_recalibrate():
    model = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), syncbn.SyncBatchNorm1d(2))
    x = torch.randn(5, 2) * 7
    syncbn.recalibrate(model, [x])
    torch.testing.assert_close(model[1].running_var, torch.full((2,), 1.25), rtol=1e-4, atol=0)
    assert model[0].running_mean is None


@pytest.mark.parametrize(
    "layer",
    [
        syncbn.SyncBatchNorm1d(2, affine=False),
        syncbn.SyncBatchNorm1d(2, momentum=None, statistics_dtype=torch.float64),
        syncbn.SyncBatchNorm1d(2, reproducible=True),
        nn.SyncBatchNorm(2),
        nn.BatchNorm1d(2, momentum=0.0),
        nn.BatchNorm1d(2).half(),
    ],
    ids=lambda layer: repr(layer)[:60],
)
def test_every_option(layer):
    x = torch.randn(8, 2)
    syncbn.recalibrate(layer, [x.to(layer.running_mean.dtype if layer.affine else x.dtype)])
    narrow = 1e-3 if layer.running_var.dtype == torch.float16 else 1e-6
    torch.testing.assert_close(layer.running_var.float(), x.var(0), rtol=narrow, atol=0)
    assert layer.num_batches_tracked == 1


def test_a_model_without_batch_norm_is_not_run():
    syncbn.recalibrate(nn.Linear(2, 2), iter(["no input"]))


# --- what it leaves --------------------------------------------------------------------------


def everything(model: nn.Module):
    """Modes, hooks, attributes and the very tensors; and their values."""
    return snapshot(model), {n: v.clone() for n, v in model.state_dict().items()}


def assert_untouched(model: nn.Module, before) -> None:
    assert_same(before[0], snapshot(model))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[1][name]), name


def test_only_statistics_and_their_counters_change():
    model = network()
    model.train()
    model[1][2].eval()
    before = everything(model)
    syncbn.recalibrate(model, [batch(4)])
    model.load_state_dict(before[1])
    assert_untouched(model, before)
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize("where", ["loader", "model", "layer"])
@pytest.mark.parametrize("convert", [True, False])
def test_after_an_error_all_is_as_it_was(where, convert):
    model = network(convert)
    model[0].train()
    before = everything(model)

    def batches():
        yield batch(4)
        if where == "loader":
            raise OSError("disk")
        yield torch.zeros(2, 3) if where == "model" else batch(1)[:, :, :3, :3] * 1j

    with pytest.raises((OSError, RuntimeError, TypeError)):
        syncbn.recalibrate(model, batches())
    assert_untouched(model, before)


@pytest.mark.parametrize("where", ["loader", "model"])
def test_an_error_of_one_rank_ends_all_and_all_is_as_it_was(where):
    plain = network(convert=False)

    def run(comm):
        model = syncbn.convert(copy.deepcopy(plain), comm)
        before = everything(model)

        def batches():
            yield batch(4)
            if where == "loader" and comm.rank == 1:
                raise OSError("disk")
            yield torch.zeros(2, 3).double() if comm.rank == 1 else batch(4)

        with pytest.raises((OSError, RuntimeError)) as caught:
            syncbn.recalibrate(model, batches(), process_group=comm)
        assert_untouched(model, before)
        return str(caught.value)

    first, second = in_threads(2, run)
    assert "rank 1" in first
    assert second == "disk" if where == "loader" else "rank" not in second


def test_no_batch_at_all_is_an_error_on_every_rank(ranks):
    def run(rank):
        model = network()
        before = everything(model)
        with pytest.raises(ValueError, match="at least one batch on one of 2 ranks, got none"):
            syncbn.recalibrate(model, [])
        assert_untouched(model, before)

    ranks(2, run)
    with pytest.raises(ValueError, match="an iterator that was used before is empty"):
        syncbn.recalibrate(network(), iter([]))


def test_a_layer_that_no_value_reaches_is_named_and_left():
    model = network()
    model.unused = nn.BatchNorm1d(3)
    model.unused.running_mean += 1

    model.forward = lambda x: model[1](model[0](x))
    with pytest.warns(UserWarning, match=r"left as they were, .*: 'unused'; freeze them"):
        syncbn.recalibrate(model, [batch(4)])
    assert (model.unused.running_mean == 1).all()
    assert model[0][1].num_batches_tracked == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        syncbn.recalibrate(syncbn.freeze(model, lambda name, _: name == "unused"), [batch(4)])
    with pytest.warns(UserWarning, match="left as they were, .*: 'the module itself'; freeze"):
        syncbn.recalibrate(syncbn.SyncBatchNorm(2), [torch.randn(0, 2)])


# --- what it refuses -------------------------------------------------------------------------


def test_models_that_differ_are_refused_on_every_rank(ranks):
    def run(rank):
        wide = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(3 + rank))
        with pytest.raises(ValueError, match="got 2 on rank 0 and 2 on rank 1") as caught:
            syncbn.recalibrate(wide, [])
        more = nn.Sequential(nn.BatchNorm1d(2), *[nn.BatchNorm1d(2)] * (1 - rank))
        with pytest.raises(ValueError, match="got 2 on rank 0 and 1 on rank 1") as again:
            syncbn.recalibrate(more, [])
        return str(caught.value), str(again.value)

    texts = ranks(2, run)
    for rank, (first, second) in enumerate(texts):
        assert f"layer 2, which is 1: {3 + rank} channels on rank {rank}" in first
        assert ("1: 2 channels", "no further one")[rank] in second


def test_wrong_arguments():
    with pytest.raises(TypeError, match=r"recalibrate: expected a torch.nn.Module, got list"):
        syncbn.recalibrate([], [])
    with pytest.raises(TypeError, match=r"expected an iterable of batches, got int; .* \[batch\]"):
        syncbn.recalibrate(nn.BatchNorm1d(2), 3)
    with pytest.raises(TypeError, match=r"expected an iterable of batches, got dict; .* \[batch\]"):
        syncbn.recalibrate(nn.BatchNorm1d(2), {"input": torch.randn(4, 2)})
    with pytest.raises(TypeError, match="process_group: got str"):
        syncbn.recalibrate(nn.BatchNorm1d(2), [], process_group="nccl")
    with pytest.raises(ValueError, match="first element of a batch, got an empty tuple"):
        syncbn.recalibrate(nn.BatchNorm1d(2), [()])
    with pytest.raises(ValueError, match="the lazy '0', which has not seen its first input"):
        syncbn.recalibrate(nn.Sequential(nn.LazyBatchNorm1d()), [torch.randn(2, 2)])


def test_progress(capsys, monkeypatch):
    layer = copy.deepcopy(OnlyAConstructor(2))
    for batches in ([torch.randn(2, 2, 2, 2)] * 3, iter([torch.randn(2, 2, 2, 2)])):
        syncbn.recalibrate(layer, batches, progress=True)
        shown = capsys.readouterr()
        assert "recalibrate" in shown.err
        assert not shown.out
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(ImportError, match=r"expected rich, .* pip install 'syncbn\[cli\]'"):
        syncbn.recalibrate(layer, [], progress=True)
