"""Lightning: `configure_optimizers` returns a CLASSPOptimizer, and one trainer fits each task.

    pip install lightning
    python examples/with_lightning.py

Lightning makes the optimizer anew in every `fit`. The module keeps it, so that the history of
earlier tasks counts. Last lines:

    after task 1: 20.1 %
    after task 2: 31.3 %
    after task 3: 47.4 %
    after task 4: 72.5 %
    after task 5: 81.7 %
"""

import logging

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from avalanche_classp import CLASSPOptimizer

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(64, 256), nn.ReLU()),
            *(nn.Linear(256, 256), nn.ReLU()),
            nn.Linear(256, 10),
        )
        self.optimizer = CLASSPOptimizer(self.parameters(), history="gradients", lr=0.04)

    def training_step(self, batch, _batch_index):
        images, labels = batch
        return nn.functional.cross_entropy(self.layers(images), labels)

    def configure_optimizers(self):
        return self.optimizer


images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float() / 8 - 1
torch.manual_seed(0)
module = Digits()
for task in range(5):
    chosen = torch.nonzero(labels[:1200] // 2 == task).squeeze(1)
    loader = DataLoader(TensorDataset(images[chosen], labels[chosen]), 32, shuffle=True)
    trainer = lightning.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)
    correct = module.layers(images[1200:]).argmax(1) == labels[1200:]
    print(f"after task {task + 1}: {100 * correct.float().mean():.1f} %")
