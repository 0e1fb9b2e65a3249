"""Accelerate: convert the model, then prepare it; after prepare it works, too.

accelerate launch --cpu --num_processes 2 examples/frameworks/with_accelerate.py
"""

import gc

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader
from toy import BATCH, LEARNING_RATE, images, network, one_process, verdict

import syncbn


def main() -> None:
    accelerator = Accelerator(cpu=True)
    model = network()
    expected = one_process(model)
    model = syncbn.convert(model)  # the switch
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    loader = DataLoader(images(), BATCH // accelerator.num_processes)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    for pixels, labels in loader:
        optimizer.zero_grad()
        accelerator.backward(nn.functional.cross_entropy(model(pixels), labels))
        optimizer.step()
    verdict(accelerator.unwrap_model(model).state_dict(), expected)
    accelerator.end_training()


if __name__ == "__main__":
    main()
    gc.collect()  # as in examples/train.py
