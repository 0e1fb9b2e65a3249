"""convert() names the batch norms that it finds compiled, where no class can change."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import batch_norm

import syncbn

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of torch.jit
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
X = torch.randn(4, 2, 5, 5)
WORDS = "left alone, because they are compiled, and will normalise each rank's batch by itself"


class Own(nn.Module):
    def forward(self, x):
        return batch_norm(x, None, None, training=True)


def network():
    return nn.Sequential(nn.Conv2d(2, 3, 1), nn.Sequential(nn.BatchNorm2d(3), Own()), nn.ReLU())


def exported(model):
    return torch.export.export(model, (X,))


COMPILED = {
    "script": torch.jit.script,
    "trace": lambda model: torch.jit.trace(model, X, check_trace=False),
    "export": lambda model: exported(model).module(),
    "decomposed": lambda model: exported(model).run_decompositions().module(),
    "unflattened": lambda model: torch.export.unflatten(exported(model)),
}


def told(model, **options):
    """What convert warns of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert syncbn.convert(model, **options) is model
    return [str(warning.message) for warning in caught if warning.category is UserWarning]


@pytest.mark.parametrize("kind", COMPILED)
def test_compiled_batch_norms_are_named(kind):
    model = nn.ModuleDict({"plain": nn.BatchNorm2d(3), "body": COMPILED[kind](network())})
    (text,) = told(model)
    assert WORDS in text
    assert "Convert the model they were made of, which torch.compile takes" in text
    assert "body.1.0 (" in text
    assert "body.1.1 (" in text
    assert text.count(" in ") == 2
    assert type(model["plain"]) is syncbn.SyncBatchNorm2d
    assert told(model, where=lambda name, layer: not name.startswith("body")) == []


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("script", "body.1.0 (BatchNorm2d in RecursiveScriptModule), body.1.1 (Own in"),
        ("trace", "body.1.0 (BatchNorm2d in TracedModule), body.1.1 (Own in"),
        ("export", "body.1.0 (aten.batch_norm.default in GraphModule), body.1.1 (aten."),
    ],
)
def test_they_are_described(kind, what):
    (text,) = told(nn.ModuleDict({"body": COMPILED[kind](network())}))
    assert what in text


def test_a_compiled_model_itself_and_torch_fx():
    assert "1.0 (BatchNorm2d in" in told(torch.jit.script(network()))[0]
    (alone,) = told(torch.jit.script(nn.BatchNorm2d(3)))
    assert "the module itself (BatchNorm2d in RecursiveScriptModule)" in alone
    graph = torch.fx.symbolic_trace(network())
    (text,) = told(graph)
    assert "1.1 (torch.nn.functional.batch_norm in GraphModule)" in text
    assert type(graph.get_submodule("1.0")) is syncbn.SyncBatchNorm2d, "a layer as any other"


def test_what_never_takes_a_batchs_statistics_is_not_named():
    class Fixed(nn.Module):
        def forward(self, x):
            return batch_norm(x, torch.zeros(3), torch.ones(3))

    model = nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)).eval()
    for kind in ("trace", "export", "decomposed", "unflattened"):
        assert told(COMPILED[kind](model)) == []
    assert told(torch.jit.freeze(torch.jit.script(model))) == []
    assert told(torch.fx.symbolic_trace(Fixed())) == []
    assert told(torch.jit.script(nn.Sequential(nn.Linear(2, 2), nn.GroupNorm(1, 2)))) == []
