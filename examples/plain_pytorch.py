"""CLASSP in a plain PyTorch loop, without Avalanche: five tasks of two digits each.

    python examples/plain_pytorch.py

All ten classes share one head, and no data of earlier tasks is kept. Last lines:

    SGD     17.3 %
    CLASSP  92.0 %
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from avalanche_classp import CLASSPOptimizer

images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float() / 8 - 1
train, test = slice(0, 1200), slice(1200, None)


def accuracy_after_five_tasks(make_optimizer):
    torch.manual_seed(0)
    model = nn.Sequential(
        *(nn.Linear(64, 256), nn.ReLU()),
        *(nn.Linear(256, 256), nn.ReLU()),
        nn.Linear(256, 10),
    )
    optimizer = make_optimizer(model)
    for task in range(5):
        of_this_task = torch.nonzero(labels[train] // 2 == task).squeeze(1)
        for _epoch in range(3):
            for batch in of_this_task[torch.randperm(len(of_this_task))].split(32):
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(images[batch]), labels[batch])
                loss.backward()
                optimizer.step()
    correct = model(images[test]).argmax(1) == labels[test]
    return 100 * correct.float().mean().item()


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


def classp(model):
    optimizer = CLASSPOptimizer(model.parameters(), history="inputs")
    optimizer.watch(model)  # this history sees the inputs of the model's layers
    return optimizer


print(f"SGD     {accuracy_after_five_tasks(sgd):.1f} %")
print(f"CLASSP  {accuracy_after_five_tasks(classp):.1f} %")
