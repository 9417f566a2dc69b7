"""Hugging Face Accelerate: the optimizer goes through `prepare` like any other.

    pip install accelerate
    python examples/with_accelerate.py

Here with bfloat16, and with a step for the gradients of two mini-batches. Last lines:

    after task 1: 20.1 %
    after task 2: 32.2 %
    after task 3: 46.7 %
    after task 4: 72.5 %
    after task 5: 82.1 %
"""

import torch
from accelerate import Accelerator
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from avalanche_classp import CLASSPOptimizer

images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float() / 8 - 1

accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Linear(64, 256), nn.ReLU()),
    *(nn.Linear(256, 256), nn.ReLU()),
    nn.Linear(256, 10),
)
optimizer = CLASSPOptimizer(model.parameters(), history="gradients", lr=0.04)
model, optimizer = accelerator.prepare(model, optimizer)
for task in range(5):
    chosen = torch.nonzero(labels[:1200] // 2 == task).squeeze(1)
    loader = accelerator.prepare(
        DataLoader(TensorDataset(images[chosen], labels[chosen]), 16, shuffle=True)
    )
    for _epoch in range(3):
        for batch, targets in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(batch), targets))
                optimizer.step()
                optimizer.zero_grad()
    correct = model(images[1200:]).argmax(1) == labels[1200:]
    accelerator.print(f"after task {task + 1}: {100 * correct.float().mean():.1f} %")
