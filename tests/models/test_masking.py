"""masking(): layers deep inside a model get a mask that the model knows nothing of."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointError, checkpoint

import syncbn
from support import oracle
from support.sequences import LENGTHS, packed, speech
from syncbn import mask_from_lengths, masking


class Deep(nn.Module):
    """A model whose forward knows no mask, and halves the length on its way."""

    def __init__(self):
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.pool = nn.AvgPool1d(2)
        self.rest = nn.ModuleDict({"second": nn.BatchNorm1d(3)})

    def forward(self, x):
        return self.rest["second"](self.pool(self.first(x)))


def test_masking_reaches_layers_deep_inside():
    x, _, mask = speech(size=8)
    model = syncbn.convert(Deep().double())
    halves = mask[:, ::2]

    def choose(name, input):
        return {"first": mask, "rest.second": halves}[name]

    with masking(model, choose):
        y = model(x)
    alone = syncbn.convert(Deep().double())
    expected = alone.rest["second"](alone.pool(alone.first(x, mask)), halves)
    assert torch.equal(y, expected)
    assert torch.equal(model.first.running_mean, alone.first.running_mean)
    assert vars(model.first).keys() == vars(alone.first).keys(), "gone with the context"


def test_masking_inside_a_conformer():
    """Its batch norms lie two layers deep and have no mask in the model's forward."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=2,
        conv_depthwise_kernel_size=3, position_embeddings_type=None,
    )  # fmt: skip
    module = transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer
    encoder = syncbn.convert(module.Wav2Vec2ConformerEncoder(config)).train()
    layers = [layer for layer in encoder.modules() if isinstance(layer, syncbn.SyncBatchNorm)]
    seen = {}
    for layer in layers:
        layer.register_forward_hook(lambda layer, args, y: seen.update({layer: (args[0], y)}))
    mask = mask_from_lengths(LENGTHS, 7)
    with masking(encoder, mask):
        encoder(torch.randn(5, 7, 16), attention_mask=mask)
    assert len(layers) == len(seen) == 2
    for layer, (x, y) in seen.items():
        expected = oracle.batch_norm(packed(x, mask), packed(x, mask))
        oracle.assert_close(packed(y, mask), expected.y, factor=4)
        oracle.assert_close(layer.running_mean, 0.1 * expected.mean, factor=4)
        oracle.assert_close(layer.running_var, 0.9 + 0.1 * expected.unbiased_var, factor=4)
        assert not packed(y, ~mask).any()


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_runs_again_within_the_context(reentrant):
    x, _, mask = speech(size=8)

    def forward(model):
        share = x.clone().requires_grad_()
        return share, checkpoint(model, share, use_reentrant=reentrant).square().sum()

    plain, model = (syncbn.convert(nn.Sequential(nn.BatchNorm1d(3).double())) for _ in range(2))
    expected = x.clone().requires_grad_()
    plain[0](expected, mask).square().sum().backward()
    with masking(model, mask):
        share, loss = forward(model)
        loss.backward()
    torch.testing.assert_close(share.grad, expected.grad)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    if not reentrant:
        with masking(model, mask):
            _, loss = forward(model)
        with pytest.raises(CheckpointError, match=r"different (metadata|number)"):
            loss.backward()


def test_hooks_before_it_may_change_the_input():
    x, _, mask = speech(size=8)
    layer = syncbn.SyncBatchNorm1d(3, dtype=torch.float64)
    layer.register_forward_pre_hook(lambda layer, args: (args[0][..., :4],))
    with masking(layer, lambda name, input: mask[:, : input.shape[-1]]):
        assert torch.equal(layer(x).ne(0).any(1), mask[:, :4])


def test_contexts_may_end_in_any_order():
    x, _, mask = speech(size=8)
    layer = syncbn.SyncBatchNorm1d(3, dtype=torch.float64)
    inner = mask.clone()
    inner[0] = False
    first, second = masking(layer, mask), masking(layer, inner)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(layer(x).ne(0).any(1), inner)
    second.__exit__(None, None, None)
    assert layer(x).all()


def test_layers_may_be_reverted_and_converted_inside():
    x, _, mask = speech(size=8)
    model = syncbn.convert(nn.Sequential(nn.BatchNorm1d(3).double()))
    with masking(model, mask):
        syncbn.revert(model)
        assert vars(model[0]).keys() == vars(nn.BatchNorm1d(3)).keys()
        assert pickle.loads(pickle.dumps(model))[0](x).all()
        syncbn.convert(model)
        assert model[0](x).all(), "no mask: the context began with another layer"
    assert vars(model[0]).keys() == vars(syncbn.convert(nn.BatchNorm1d(3))).keys()
    with pytest.raises(KeyError), masking(model, mask):
        raise KeyError
    assert model[0](x).all()


def test_a_shared_layer_is_asked_for_under_each_of_its_names():
    x, _, mask = speech(size=8)
    shared = syncbn.SyncBatchNorm1d(3, dtype=torch.float64)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    for name in ("a", "b.0"):
        with masking(model, lambda found, _, name=name: mask if found == name else None):
            assert torch.equal(shared(x).ne(0).any(1), mask)


def test_copies_are_outside():
    x, _, mask = speech(size=8)
    layer = syncbn.SyncBatchNorm1d(3, dtype=torch.float64)
    with masking(layer, mask):
        copies = copy.copy(layer), copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        assert not layer(x)[~mask.unsqueeze(1).expand_as(x)].any()
    for other in copies:
        assert vars(other).keys() == vars(layer).keys()
        assert other(x)[~mask.unsqueeze(1).expand_as(x)].all()


def test_the_innermost_context_gives_the_mask_and_the_model_itself_first():
    x, _, mask = speech(size=8)
    layer = syncbn.SyncBatchNorm1d(3, dtype=torch.float64)
    model, inner, own = nn.ModuleDict({"bn": layer}), mask.clone(), mask.clone()
    inner[0], own[1] = False, False
    with masking(model, mask):
        for with_inner, arguments, expected in (
            (False, (), mask),
            (False, (None,), mask),
            (True, (), inner),
            (True, (own,), own),
        ):
            with masking(model, inner) if with_inner else contextlib.nullcontext():
                y = layer(x, *arguments)
            assert torch.equal(y.ne(0).any(1), expected)
        with masking(model, lambda name, input: None):
            assert torch.equal(layer(x).ne(0).any(1), mask)


def test_masking_says_what_is_wrong():
    x, _, mask = speech(size=8)
    model = syncbn.convert(Deep().double())
    with masking(model, mask), pytest.raises(ValueError, match=r"layer 'rest.second': .*\(5, 4\)"):
        model(x)
    with masking(model, lambda name, input: None):
        model(x)
    with (
        pytest.raises(ValueError, match="none in Linear; convert it first"),
        masking(nn.Linear(2, 2), mask),
    ):
        pass
    with pytest.raises(TypeError, match="function of a layer's name"), masking(model, 3):
        pass
    with pytest.raises(TypeError, match=r"expected a torch\.nn\.Module, got int"), masking(3, mask):
        pass
