"""Hugging Face's Trainer: convert the model that it gets.

torchrun --standalone --nproc-per-node 2 examples/frameworks/with_transformers.py
"""

import gc
import tempfile

import torch
import torch.distributed as dist
from toy import BATCH, LEARNING_RATE, images, one_process, verdict
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

import syncbn


class Logits(torch.nn.Module):
    """The model as a function of pixels, for the comparison."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return self.model(pixels).logits


def main() -> None:
    torch.manual_seed(0)
    config = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=4
    )
    model = ResNetForImageClassification(config).double()
    expected = one_process(Logits(model))
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            use_cpu=True,
            ddp_backend="gloo",
            per_device_train_batch_size=BATCH // 2,
            num_train_epochs=1,
            optim="sgd",
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            max_grad_norm=0,
            average_tokens_across_devices=False,  # the default weighs by tokens, which images lack
            train_sampling_strategy="sequential",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        data = [{"pixel_values": pixels, "labels": label} for pixels, label in images()]
        Trainer(syncbn.convert(model), arguments, train_dataset=data).train()  # the switch
    verdict(Logits(model).state_dict(), expected)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    gc.collect()  # as in examples/train.py
