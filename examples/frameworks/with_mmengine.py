"""MMEngine: convert the model that the Runner gets; leave its sync_bn out, which is for torch's layers.

torchrun --standalone --nproc-per-node 2 examples/frameworks/with_mmengine.py
"""

import gc
import tempfile

import torch.distributed as dist
from mmengine.model import BaseModel, MMDistributedDataParallel
from mmengine.runner import Runner
from torch import nn
from toy import BATCH, LEARNING_RATE, images, network, one_process, verdict

import syncbn


class Classifier(BaseModel):
    def __init__(self):
        super().__init__()
        self.network = network()

    def forward(self, pixels, labels, mode="tensor"):
        return {"loss": nn.functional.cross_entropy(self.network(pixels), labels)}


def main() -> None:
    dist.init_process_group("gloo")  # the Runner's launcher="pytorch" does this on GPUs alone
    model = Classifier()
    expected = one_process(model.network)
    model = MMDistributedDataParallel(syncbn.convert(model))  # the switch
    with tempfile.TemporaryDirectory() as folder:
        runner = Runner(
            model,
            folder,
            train_dataloader={
                "dataset": images(),
                "batch_size": BATCH // 2,
                "sampler": {"type": "DefaultSampler", "shuffle": False},
                "collate_fn": {"type": "default_collate"},
                "num_workers": 0,
            },
            train_cfg={"by_epoch": True, "max_epochs": 1},
            optim_wrapper={"optimizer": {"type": "SGD", "lr": LEARNING_RATE}},
            default_hooks={"checkpoint": None},
            log_level="ERROR",
        )
        runner.train()
    verdict(model.module.network.state_dict(), expected)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
    gc.collect()  # as in examples/train.py
