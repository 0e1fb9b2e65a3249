"""Masked batches equal the packed values that count, over ranks, whatever the padding holds."""

from __future__ import annotations

import oracle
import pytest
import torch
from torch import nn

import syncbn
from syncbn import mask_from_lengths, masking

LENGTHS = torch.tensor([5, 2, 7, 1, 3])


def speech(size=7, channels=3, dtype=torch.float64, padding=0.0):
    """Sequences (N, C, size) of LENGTHS, padded, their mask, and an output gradient."""
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, 5, channels, 7, generator=generator, dtype=torch.float64) * 2 + 3
    mask = mask_from_lengths(LENGTHS, size)
    wide = torch.full((2, 5, channels, size), padding, dtype=torch.float64)
    wide[..., :7] = torch.stack((x, dy))
    return (*wide.masked_fill(~mask.unsqueeze(1), padding).to(dtype), mask)


def packed(tensor, mask):
    return tensor.movedim(1, -1)[mask]


def step(layer, x, dy, mask):
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    y = layer(x, mask)
    y.backward(dy)
    return y.detach(), x.grad


def check(results, x, dy, mask, factor=4.0):
    """Outputs and gradients of all shares equal the oracle's of the packed values, else zero."""
    y, dx = (torch.cat(parts) for parts in zip(*results, strict=True))
    expected = oracle.batch_norm(packed(x, mask), packed(dy, mask))
    oracle.assert_close(packed(y, mask), expected.y, factor=factor)
    oracle.assert_close(packed(dx, mask), expected.dx, factor=factor)
    assert (packed(y, ~mask) == 0).all()
    assert (packed(dx, ~mask) == 0).all()
    return expected


@pytest.mark.parametrize("split", [(5,), (3, 2), (1, 0, 4), (2, 3, 0)])
@pytest.mark.parametrize("reproducible", [True, False])
def test_a_step_equals_the_packed_values(ranks, split, reproducible):
    x, dy, mask = speech()

    def run(rank):
        mine = slice(sum(split[:rank]), sum(split[: rank + 1]))
        layer = syncbn.SyncBatchNorm(3, dtype=torch.float64, reproducible=reproducible)
        return step(layer, x[mine], dy[mine], mask[mine]), layer.state_dict()

    results = ranks(len(split), run) if len(split) > 1 else [run(0)]
    expected = check([result for result, _ in results], x, dy, mask)
    for _, state in results:
        oracle.assert_close(state["running_mean"], 0.1 * expected.mean)
        oracle.assert_close(state["running_var"], 0.9 + 0.1 * expected.unbiased_var)
        assert state["num_batches_tracked"] == 1


def test_a_rank_may_be_wholly_masked_or_have_no_mask(ranks):
    x, dy, mask = speech()
    mask[:2] = False
    mask[4] = True
    shares = [slice(0, 2), slice(2, 4), slice(4, 5)]

    def run(rank):
        mine = shares[rank]
        layer = syncbn.SyncBatchNorm(3, dtype=torch.float64)
        return step(layer, x[mine], dy[mine], mask[mine] if rank < 2 else None)

    check(ranks(3, run), x, dy, mask)


@pytest.mark.parametrize("padding", [0.0, 1e30, float("inf"), float("nan")])
@pytest.mark.parametrize("size", [7, 9, 40])
def test_results_do_not_depend_on_the_padding(padding, size):
    x, dy, mask = speech(size=size, padding=padding)
    layer = syncbn.SyncBatchNorm1d(3, dtype=torch.float64)
    y, dx = step(layer, x, dy, mask)
    expected = step(plain := syncbn.SyncBatchNorm1d(3, dtype=torch.float64), *speech(size=7))
    torch.testing.assert_close((y[..., :7], dx[..., :7]), expected, rtol=0, atol=0)
    assert not y[..., 7:].any()
    for one, other in zip(layer.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    assert torch.equal(layer.running_var, plain.running_var)


@pytest.mark.parametrize("padding", [0.0, float("nan")])
def test_eval_mode_masks_too(padding):
    x, dy, mask = speech(padding=padding)
    layer = syncbn.SyncBatchNorm1d(3, dtype=torch.float64).eval()
    y, dx = step(layer, x, dy, mask)
    scale = (1 + layer.eps) ** -0.5
    torch.testing.assert_close(packed(y, mask), packed(x, mask) * scale)
    torch.testing.assert_close(packed(dx, mask), packed(dy, mask) * scale)
    assert not packed(y, ~mask).any()
    assert not packed(dx, ~mask).any()
    assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("training", [True, False])
def test_images_keep_dtype_and_layout(dtype, layout, training):
    x = torch.randn(3, 4, 5, 6).to(dtype).contiguous(memory_format=layout)
    mask = torch.rand(3, 5, 6) > 0.3
    y, dx = step(layer := syncbn.SyncBatchNorm2d(4).train(training), x, torch.ones_like(x), mask)
    assert y.dtype == dx.dtype == dtype
    assert y.is_contiguous(memory_format=layout)
    if training:
        oracle.assert_close(packed(y, mask), oracle.batch_norm(*[packed(x, mask)] * 2).y, factor=4)
        assert layer.num_batches_tracked == 1


def test_rows_of_features_have_a_mask_of_rows():
    x = torch.randn(6, 3, dtype=torch.float64)
    mask = torch.tensor([1, 1, 0, 1, 0, 1]).bool()
    y = syncbn.sync_batch_norm(x, None, None, mask=mask)
    oracle.assert_close(y[mask], oracle.batch_norm(x[mask], x[mask]).y)
    assert not y[~mask].any()


def test_second_derivatives_through_a_mask():
    x, _, mask = speech(channels=2)

    def masked(x):
        return syncbn.sync_batch_norm(x, None, None, mask=mask[:2])

    assert torch.autograd.gradgradcheck(masked, x[:2].requires_grad_())


def test_lazy_layers_take_a_mask():
    x, _, mask = speech()
    layer = syncbn.LazySyncBatchNorm1d(dtype=torch.float64)
    torch.testing.assert_close(layer(x, mask), syncbn.SyncBatchNorm(3).double()(x, mask))
    assert type(layer) is syncbn.SyncBatchNorm1d


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
    assert not model.first._forward_pre_hooks, "gone with the context"


def test_masking_inside_a_conformer():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    config = transformers.Wav2Vec2ConformerConfig(
        hidden_size=16, num_attention_heads=2, intermediate_size=16, num_hidden_layers=2,
        conv_depthwise_kernel_size=3, position_embeddings_type=None,
    )  # fmt: skip
    module = transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer
    block = syncbn.convert(module.Wav2Vec2ConformerConvolutionModule(config))
    x = torch.randn(5, 7, 16)
    with masking(block, mask_from_lengths(LENGTHS, 7)):
        block(x)
    once = block.batch_norm.running_mean.clone()
    block.batch_norm.reset_running_stats()
    longer = torch.cat((x, torch.full((5, 4, 16), 0.0)), 1)
    with masking(block, mask_from_lengths(LENGTHS, 11)):
        block(longer)
    torch.testing.assert_close(block.batch_norm.running_mean[:4], once[:4])


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


@pytest.mark.parametrize(
    ("mask", "error", "text"),
    [
        (torch.ones(5, 7), TypeError, "torch.bool tensor.*got torch.float32; compare"),
        ([[True]], TypeError, "got list"),
        (torch.ones(5, 1, 7).bool(), ValueError, r"shape \(5, 7\).*got \(5, 1, 7\)"),
        (torch.ones(5, 8).bool(), ValueError, r"shape \(5, 7\).*got \(5, 8\)"),
        (torch.ones(5, 7, device="meta").bool(), ValueError, "device cpu, got meta"),
    ],
)
def test_masks_that_do_not_fit(mask, error, text):
    with pytest.raises(error, match=text):
        syncbn.SyncBatchNorm(3)(speech(dtype=torch.float32)[0], mask)


def test_masks_from_lengths():
    assert mask_from_lengths(torch.tensor([0, 2])).tolist() == [[False, False], [True, True]]
    assert mask_from_lengths(torch.tensor([1]), 3).tolist() == [[True, False, False]]
    assert mask_from_lengths(torch.tensor([], dtype=torch.int64)).shape == (0, 0)
    with pytest.raises(ValueError, match="from 0 to size = 2, got 1 to 3"):
        mask_from_lengths(torch.tensor([1, 3]), 2)
    with pytest.raises(ValueError, match="got -1 to 3"):
        mask_from_lengths(torch.tensor([-1, 3]))
    with pytest.raises(ValueError, match=r"shape \(N,\), got \(1, 1\)"):
        mask_from_lengths(torch.tensor([[1]]))
    with pytest.raises(TypeError, match=r"integer tensor, got torch\.float32"):
        mask_from_lengths(torch.tensor([1.0]))
