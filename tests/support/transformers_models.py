"""Networks of transformers, small and with random weights, and faults to plant in them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import syncbn

TF = transformers
BUILD: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: TF.ResNetModel(
        TF.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 1], layer_type="basic")
    ),
    "regnet": lambda: TF.RegNetModel(
        TF.RegNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], groups_width=4)
    ),
    "mobilenet": lambda: TF.MobileNetV2Model(
        TF.MobileNetV2Config(depth_multiplier=0.1, min_depth=4, depth_divisible_by=4)
    ),
    "segformer": lambda: TF.SegformerForSemanticSegmentation(
        TF.SegformerConfig(
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[2, 1],
            hidden_sizes=[8, 16],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=12,
            num_labels=4,
            drop_path_rate=0.0,
            classifier_dropout_prob=0.0,
        )
    ),
    "conformer": lambda: TF.Wav2Vec2ConformerModel(
        TF.Wav2Vec2ConformerConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            conv_dim=(8, 8),
            conv_stride=(5, 4),
            conv_kernel=(10, 8),
            num_feat_extract_layers=2,
            num_conv_pos_embeddings=8,
            num_conv_pos_embedding_groups=2,
            conv_depthwise_kernel_size=7,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            activation_dropout=0.0,
            feat_proj_dropout=0.0,
            conformer_conv_dropout=0.0,
            layerdrop=0.0,
            mask_time_prob=0.0,
            apply_spec_augment=False,
        )
    ),
}
INPUT = dict.fromkeys(BUILD, (3, 32, 32)) | {"conformer": (1600,)}
FAULTS = (
    *("not converted", "left alone", "eval", "random", "group", "calls", "half", "rounding"),
    "function",
)


class Scaled(nn.BatchNorm2d):
    """A subclass with behaviour of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


class Scaled1d(nn.BatchNorm1d):
    """The same for (N, C, L)."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 1.5


class After(nn.Module):
    """A layer, and something planted behind it."""

    def __init__(self, layer: nn.Module, fault: str) -> None:
        super().__init__()
        self.layer, self.fault = layer, fault
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, *args: Any) -> Tensor:
        x = self.layer(x, *args)
        if self.fault == "random":
            return F.dropout(x, 0.3, self.training)
        if self.fault == "function":
            return F.batch_norm(x, None, None, training=True)
        if self.fault == "half":
            return (x.bfloat16() * self.scale.bfloat16()).to(x.dtype)
        if self.fault == "rounding":
            x = x.sigmoid()
            for _ in range(45):
                x = 3.99 * x * (1 - x)
        return x


def norms(model: nn.Module) -> list[str]:
    return [
        name
        for name, layer in model.named_modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
    ]


def target(model: nn.Module) -> str:
    """Where a fault is planted: the batch norm in the middle."""
    found = norms(model)
    return found[len(found) // 2]


def make(name: str, fault: str | None = None) -> nn.Module:
    """The network as it should be over ranks, but for the fault."""
    model = BUILD[name]()
    where = target(model)
    layer = model.get_submodule(where)
    if fault == "not converted":
        return syncbn.convert(model, where=lambda name, _: name != where)
    if fault == "left alone":
        layer.__class__ = Scaled1d if isinstance(layer, nn.BatchNorm1d) else Scaled
        return syncbn.convert(model, where=lambda name, _: name != where)
    model = syncbn.convert(model)
    if fault == "eval":
        layer.eval()
    elif fault == "group":
        syncbn.convert(layer, group_size=1)
    elif fault == "calls":
        model.set_submodule(where, Repeated(layer))
    elif fault is not None:
        model.set_submodule(where, After(layer, fault))
    return model


class Repeated(nn.Module):
    """Calls its activation once for each sample."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer, self.act = layer, nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer(x)
        for _ in range(len(x)):
            x = self.act(x)
        return x.clone()  # what follows may work in place, which tanh's backward does not bear


def factory(name: str, fault: str | None = None) -> Callable[[], nn.Module]:
    return functools.partial(make, name, fault)


def expected(name: str, fault: str) -> str:
    """The layer that a check should name."""
    where = target(BUILD[name]())
    return f"{where}.act" if fault == "calls" else where


def labelled(shape: tuple[int, ...], samples: int) -> tuple[Tensor, Tensor]:
    """A batch and a target for each sample."""
    return torch.randn(samples, *shape), torch.randn(samples)


def uneven_loss(output: Any, target: Tensor) -> Tensor:
    """Averaged over ranks as if each had equally many samples."""
    loss = (output[0].flatten(1).mean(1) - target).square().mean()
    mean = loss.detach().clone()
    dist.all_reduce(mean)
    return loss + (mean / dist.get_world_size() - loss.detach())
