"""Hugging Face's Trainer with converted models: two ranks equal one process, by one setting."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch

import syncbn
from support.transformers_models import BUILD, TF

pytest.importorskip("accelerate", reason="needs the extra [frameworks]")

STEPS = 3


def model_of(name: str):
    torch.manual_seed(0)
    if name == "segformer":
        return BUILD[name]().double()
    config = TF.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    return TF.ResNetForImageClassification(config).double()


def data_of(name: str):
    generator = torch.Generator().manual_seed(0)
    shape = (4 * STEPS, 8, 8) if name == "segformer" else (4 * STEPS,)
    labels = torch.randint(4, shape, generator=generator)
    pixels = torch.randn(4 * STEPS, 3, 32, 32, generator=generator, dtype=torch.float64)
    pixels *= torch.arange(1, 4 * STEPS + 1).view(-1, 1, 1, 1)
    return pixels, labels


def one_process(name: str, factor: float = 1.0):
    """Three plain steps on whole batches of four, of ``factor`` times the loss."""
    model = model_of(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for pixels, labels in zip(*(each.split(4) for each in data_of(name)), strict=True):
        optimizer.zero_grad()
        (factor * model(pixel_values=pixels, labels=labels).loss).backward()
        optimizer.step()
    return model.state_dict()


def trained(rank: int, name: str, folder: str, **options):
    variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    variables |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}  # the group is there
    with mock.patch.dict("os.environ", variables):
        arguments = TF.TrainingArguments(
            folder,
            use_cpu=True,
            ddp_backend="gloo",
            per_device_train_batch_size=2,
            num_train_epochs=1,
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            **options,
        )
        pairs = zip(*data_of(name), strict=True)
        data = [{"pixel_values": pixels, "labels": label} for pixels, label in pairs]
        model = syncbn.convert(model_of(name))
        TF.Trainer(model, arguments, train_dataset=data).train()
    return copy.deepcopy(model.state_dict())


def apart(state: dict, expected: dict) -> float:
    return max((state[k].double() - v.double()).abs().max().item() for k, v in expected.items())


@pytest.mark.parametrize("name", ["resnet", "segformer"])
def test_two_ranks_equal_one_process(ranks, name, tmp_path):
    def run(rank, folder):
        return trained(rank, name, folder, average_tokens_across_devices=False)

    expected = one_process(name)
    for state in ranks(2, run, str(tmp_path), timeout=120):
        assert apart(state, expected) < 1e-10


@pytest.mark.parametrize("name", ["resnet", "segformer"])
def test_by_default_the_loss_counts_once_per_rank(ranks, name, tmp_path):
    """average_tokens_across_devices: losses that no tokens divide are multiplied by the ranks."""

    def run(rank, folder):
        return trained(rank, name, folder)

    expected, doubled = one_process(name), one_process(name, factor=2)
    for state in ranks(2, run, str(tmp_path), timeout=120):
        print(f"{name}: {apart(state, expected):.2g} from one process")
        assert apart(state, expected) > 1e-3
        assert apart(state, doubled) < 1e-10
