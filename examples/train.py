"""Distributed training with synchronised statistics, as short as it gets.

torchrun --standalone --nproc-per-node 2 examples/train.py
"""

import gc

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn


def main() -> None:
    dist.init_process_group("gloo")  # "nccl" on GPUs
    torch.manual_seed(0)  # the same initial weights everywhere
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    )
    model = syncbn.convert(model)
    model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    torch.manual_seed(1 + dist.get_rank())  # other images everywhere, one per rank
    for _ in range(10):
        images, labels = torch.randn(1, 3, 32, 32), torch.randint(10, (1,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()

    layer = model.module[1]
    everywhere = [torch.empty_like(layer.running_var) for _ in range(dist.get_world_size())]
    dist.all_gather(everywhere, layer.running_var)
    if dist.get_rank() == 0:
        equal = all(torch.equal(layer.running_var, other) for other in everywhere)
        print(f"running_var equal on all {dist.get_world_size()} ranks: {equal}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    gc.collect()  # DDP's reference cycles keep gloo's threads; torch 2.13 can abort on them at exit
