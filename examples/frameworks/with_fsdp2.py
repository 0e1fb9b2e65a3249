"""FSDP2: convert before fully_shard or after it; parameters are sharded, statistics are everybody's.

torchrun --standalone --nproc-per-node 2 examples/frameworks/with_fsdp2.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader, DistributedSampler
from toy import BATCH, LEARNING_RATE, images, network, one_process, verdict

import syncbn


def main() -> None:
    dist.init_process_group("gloo")  # "nccl" on GPUs
    for order in (syncbn.convert, fully_shard), (fully_shard, syncbn.convert):
        model = network()
        expected = one_process(model)
        for step in order:
            model = step(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
        sampler = DistributedSampler(images(), shuffle=False)
        for pixels, labels in DataLoader(images(), BATCH // dist.get_world_size(), sampler=sampler):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(pixels), labels).backward()
            optimizer.step()
        state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        dist.broadcast_object_list(states := [state])  # the whole state is on rank 0
        verdict(states[0], expected)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
