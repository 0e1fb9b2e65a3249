"""Lightning: SyncBN is a plugin of the Trainer.

python examples/frameworks/with_lightning.py
"""

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler
from toy import BATCH, LEARNING_RATE, images, network, one_process, verdict

from syncbn.integrations.lightning import SyncBN

RANKS = 2


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = network()
        self.expected = one_process(self.network)

    def training_step(self, batch, index):
        pixels, labels = batch
        return nn.functional.cross_entropy(self.network(pixels), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)

    def train_dataloader(self):
        sampler = DistributedSampler(images(), shuffle=False)  # Lightning's own would shuffle
        return DataLoader(images(), BATCH // RANKS, sampler=sampler)

    def on_fit_end(self):
        verdict(self.network.state_dict(), self.expected)


if __name__ == "__main__":
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy="ddp",
        plugins=[SyncBN()],  # the switch
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Classifier())
