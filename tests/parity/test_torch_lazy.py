"""torch.nn.LazyBatchNorm1d/2d/3d against ours: what they hold, and what they become."""

import pytest
import torch

from support.layers import LAZY, identical, observe

SHAPES = {"1d": [(4, 3), (4, 3, 5)], "2d": [(4, 3, 2, 2)], "3d": [(2, 3, 2, 2, 2)]}
lazy_forms = pytest.mark.parametrize(("torchs", "ours"), LAZY.items())
OPTIONS = [
    {},
    {"eps": 1e-3, "momentum": None},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
    {"dtype": torch.float64},
]
options = pytest.mark.parametrize("options", OPTIONS, ids=str)


@lazy_forms
@options
def test_materialisation(torchs, ours, options):
    for shape in SHAPES[torchs.__name__[-2:]]:
        mine, theirs = ours(**options), torchs(**options)
        assert mine.has_uninitialized_params() == theirs.has_uninitialized_params()
        assert mine.num_features == theirs.num_features == 0
        x = torch.randn(shape, dtype=options.get("dtype"))
        identical(observe(mine, x), observe(theirs, x))
        assert mine.num_features == 3
        # torch's keeps 0 where there is no tensor to materialise.
        assert theirs.num_features == (3 if list(theirs.state_dict()) else 0)
        identical(dict(mine.state_dict()), dict(theirs.state_dict()))


@lazy_forms
@options
def test_what_a_lazy_layer_becomes(torchs, ours, options):
    """The class that a layer built with its size has, with the same attributes."""
    shape = SHAPES[torchs.__name__[-2:]][0]
    for lazy in (torchs, ours):
        layer, built = lazy(**options), lazy.cls_to_become(3, **options)
        layer(torch.randn(shape, dtype=options.get("dtype")))
        assert type(layer) is lazy.cls_to_become
        if list(built.state_dict()) or lazy is ours:
            assert repr(layer) == repr(built)
    assert issubclass(ours.cls_to_become, torchs.cls_to_become)


@lazy_forms
def test_initialisation_in_eval_mode(torchs, ours):
    mine, theirs = ours().eval(), torchs().eval()
    x = torch.randn(SHAPES[torchs.__name__[-2:]][0])
    identical(observe(mine, x), observe(theirs, x))
    assert mine.num_batches_tracked == 0


@lazy_forms
def test_lazy_parameters_refuse_use_before_materialisation(torchs, ours):
    for layer in (torchs(), ours()):
        with pytest.raises(ValueError, match="uninitialized parameter"):
            layer.weight + 1
        with pytest.raises(RuntimeError, match="uninitialized parameter"):
            _ = layer.weight.shape


@lazy_forms
def test_a_state_dict_of_torchs_materialises_ours(torchs, ours):
    source = torchs.cls_to_become(5)
    mine, theirs = ours(), torchs()
    for layer in (mine, theirs):
        layer.load_state_dict(source.state_dict())
    identical(dict(mine.state_dict()), dict(theirs.state_dict()))
    assert not mine.has_uninitialized_params()
