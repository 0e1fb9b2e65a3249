"""measure() in a graph, which reads its input once."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo

from syncbn.kernels import composite
from syncbn.numerics.moments import unpack


@pytest.fixture(scope="module")
def measure():
    torch._dynamo.reset()
    return torch.compile(composite.measure, backend="eager", fullgraph=True, dynamic=False)


@pytest.mark.parametrize("first", [None, 0.0, 3e4], ids=["usual", "zero", "far"])
@pytest.mark.parametrize("ratio", [0.0, 1e4])
def test_statistics_are_those_of_float64(measure, ratio, first):
    """Also where the first value, which is the shift, is far from all others."""
    x = torch.randn(8, 3, 500) + ratio
    if first is not None:
        x[0, :, 0] = first
    wide = x.double().transpose(0, 1).flatten(1)
    found = unpack(measure(x))
    mean, var = wide.mean(1), wide.var(1, correction=0)
    assert found.count == 4000
    bound = 1e-6 if first is None else 1e-5  # half a unit of the last place, times the root of 4000
    assert ((found.mean - mean).abs() <= bound * var.sqrt()).all()
    torch.testing.assert_close(found.m2 / 4000, var, rtol=bound, atol=0)


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_a_first_value_that_is_not_finite(measure, value):
    x = torch.randn(4, 2, 3)
    x[0, 0, 0] = value
    found, expected = (unpack(call(x)) for call in (measure, composite.measure))
    torch.testing.assert_close(found.mean.isfinite(), expected.mean.isfinite())
    torch.testing.assert_close(found.m2.isfinite(), expected.m2.isfinite())
    torch.testing.assert_close(found.m2[1], expected.m2[1])


def test_an_empty_batch(measure):
    torch.testing.assert_close(measure(torch.empty(0, 2, 3)), torch.zeros(5, dtype=torch.float64))


def test_steps_are_differentiable_in_graphs_of_others():
    """Which autograd differentiates before a backend sees them."""
    x, weight, bias = torch.randn(4, 3, 5), torch.randn(3), torch.randn(3)
    given = [tensor.requires_grad_() for tensor in (x, weight, bias)]

    def steps(x, *affine):
        sets = composite.measure(x).unsqueeze(0)
        return composite.normalise(x, sets, affine=composite.Affine(*affine), eps=1e-5)[0]

    compiled, dy = torch.compile(steps, backend="aot_eager", fullgraph=True), torch.randn_like(x)
    found, expected = (torch.autograd.grad(call(*given), given, dy) for call in (compiled, steps))
    torch.testing.assert_close(found, expected)
