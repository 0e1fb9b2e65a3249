"""DeepSpeed: convert before deepspeed.initialize, whatever ZeRO shards.

torchrun --standalone --nproc-per-node 2 examples/frameworks/with_deepspeed.py
"""

import deepspeed
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from toy import BATCH, LEARNING_RATE, images, network, one_process, verdict

import syncbn


def main() -> None:
    deepspeed.init_distributed("gloo")  # "nccl" on GPUs
    for stage in 0, 1, 2:
        model = network()
        expected = one_process(model)
        model = syncbn.convert(model)  # the switch
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=torch.optim.SGD(model.parameters(), lr=LEARNING_RATE),
            config={
                "train_batch_size": BATCH,
                "zero_optimization": {"stage": stage},
                "zero_allow_untested_optimizer": True,
            },
        )
        sampler = DistributedSampler(images(), shuffle=False)
        for pixels, labels in DataLoader(images(), BATCH // dist.get_world_size(), sampler=sampler):
            engine.backward(nn.functional.cross_entropy(engine(pixels), labels))
            engine.step()
        verdict(engine.module.state_dict(), expected)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
