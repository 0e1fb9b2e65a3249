"""MONAI: a 3-D UNet of BATCH, or of SYNCBATCH, whose torch layers want a GPU; here it takes CPUs.

torchrun --standalone --nproc-per-node 2 examples/frameworks/with_monai.py
"""

import gc

import torch
import torch.distributed as dist
from monai.networks.nets import UNet
from torch.nn.parallel import DistributedDataParallel
from toy import verdict

import syncbn


def network(norm: str) -> UNet:
    torch.manual_seed(0)
    return UNet(3, 1, 2, channels=(4, 8), strides=(2,), num_res_units=1, norm=norm).double()


def train(model, volumes, labels) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for image, label in zip(volumes, labels, strict=True):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(image), label).backward()
        optimizer.step()


def main() -> None:
    dist.init_process_group("gloo")
    volumes = torch.randn(3, 4, 1, 8, 8, 8, dtype=torch.float64) * torch.arange(1, 5).view(
        -1, *[1] * 4
    )
    labels = torch.randint(2, (3, 4, 8, 8, 8))
    dist.broadcast(volumes, 0)
    dist.broadcast(labels, 0)
    plain = network("BATCH")
    train(plain, volumes, labels)
    mine = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    for norm in "BATCH", "SYNCBATCH":
        model = syncbn.convert(network(norm))  # the switch
        train(DistributedDataParallel(model), volumes[:, mine], labels[:, mine])
        verdict(model.state_dict(), plain.state_dict())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    gc.collect()  # as in examples/train.py
