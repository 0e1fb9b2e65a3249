"""torch's profilers show which layer is at work, forward and backward; without one nothing runs."""

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import syncbn
from support.layers import Pair
from syncbn.step import dispatch


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Linear(2, 3)
        self.norm = syncbn.SyncBatchNorm(3)

    def forward(self, x, mask=None):
        return self.norm(self.stem(x), mask)


def recorded(step):
    with profile(activities=[ProfilerActivity.CPU]) as found:
        step()
    return found.events()


def ranges(events):
    return [event.name for event in events if event.name.startswith("syncbn ")]


def within(events, name):
    """What ran in ranges of that name."""
    inside, waiting = set(), [event for event in events if event.name == name]
    while waiting:
        children = waiting.pop().cpu_children
        inside |= {child.name for child in children}
        waiting += children
    return inside


def test_layers_that_convert_named_and_those_of_the_model_that_runs():
    block = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.BatchNorm1d(3)))
    for model, name in (syncbn.convert(block), "1.0"), (Network(), "norm"):
        events = recorded(lambda model=model: model(torch.randn(4, 2)).sum().backward())
        assert ranges(events) == [f"syncbn forward: {name}", f"syncbn backward: {name}"]
        assert any("atch" in inner for inner in within(events, f"syncbn forward: {name}"))
        inner = within(events, f"syncbn backward: {name}")
        assert any("BatchNormBackward" in each for each in inner)
        assert not any("Addmm" in each for each in inner)  # the layer before it


def test_eval_mode_masks_and_the_function():
    model, mask = Network(), torch.tensor([True, True, False, True])
    events = recorded(lambda: model(torch.randn(4, 2), mask).sum().backward())
    assert set(ranges(events)) == {"syncbn forward: norm", "syncbn backward: norm"}
    assert "aten::addmm" not in within(events, "syncbn backward: norm")
    events = recorded(lambda: model.eval()(torch.randn(4, 2)).sum().backward())
    assert ranges(events) == ["syncbn forward: norm", "syncbn backward: norm"]
    with torch.no_grad():
        events = recorded(lambda: syncbn.sync_batch_norm(torch.randn(4, 2), None, None))
    assert ranges(events) == ["syncbn forward: sync_batch_norm"]


@pytest.mark.parametrize("reproducible", [True, False])
def test_over_ranks(reproducible):
    model = syncbn.convert(Network(), Pair(), reproducible=reproducible)
    events = recorded(lambda: model(torch.randn(4, 2)).sum().backward())
    assert ranges(events) == ["syncbn forward: norm", "syncbn backward: norm"]


def test_the_replicas_of_a_data_parallel_show_the_layer():
    model = syncbn.DataParallel(syncbn.convert(Network()), devices=["cpu", "cpu"])
    events = recorded(lambda: model(torch.randn(4, 2)).sum().backward())
    # torch records the threads of a DataParallel's forward neither for its own layers
    assert set(ranges(events)) == {"syncbn backward: norm"}
    assert "aten::addmm" not in within(events, "syncbn backward: norm")


def test_a_backward_after_the_profiler_ended_and_one_that_is_repeated():
    model = Network()
    outputs = []
    recorded(lambda: outputs.append(model(torch.randn(4, 2)).sum()))
    outputs[0].backward(retain_graph=True)
    for _ in range(2):
        events = recorded(lambda: outputs[0].backward(retain_graph=True))
        assert ranges(events) == ["syncbn backward: norm"]


def test_nothing_runs_without_a_profiler(monkeypatch):
    monkeypatch.setattr(dispatch, "profiled", lambda *_: pytest.fail("a range"))
    Network()(torch.randn(4, 2)).sum().backward()


def test_a_graph_has_no_ranges():
    with profile(activities=[ProfilerActivity.CPU]) as found:
        model = Network()
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        compiled(torch.randn(4, 2)).sum().backward()
    assert not ranges(found.events())


def test_a_graph_is_not_compiled_anew_when_a_profiler_starts():
    compiled = torch.compile(Network(), backend="eager", fullgraph=True)
    for _ in range(2):
        compiled(torch.randn(4, 2))
    stance = torch.compiler.set_stance("fail_on_recompile")
    with stance, profile(activities=[ProfilerActivity.CPU]):
        compiled(torch.randn(4, 2))


def test_an_error_ends_the_range():
    model = Network()
    with profile(activities=[ProfilerActivity.CPU]) as found:
        with pytest.raises(TypeError, match=r"; in layer 'norm'$"):
            model(torch.randn(4, 2), torch.ones(4))
        model(torch.randn(4, 2))
    assert ranges(found.events()) == ["syncbn forward: norm"] * 2
