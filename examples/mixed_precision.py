"""Mixed precision, in a plain loop and in Avalanche.

    python examples/mixed_precision.py

On a GPU: float16 with a GradScaler. On a CPU: bfloat16, which needs no scaler. The gradients are
divided by the scale before CLASSP looks at them, so the threshold compares true gradients.
Last lines:

    plain loop  89.3 %
    Avalanche   88.8 %
"""

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import SimpleMLP
from avalanche.training.plugins import EvaluationPlugin
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from avalanche_classp import CLASSP, CLASSPOptimizer

device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float16 if device == "cuda" else torch.bfloat16
images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float() / 8 - 1
train, test = (TensorDataset(images[s], labels[s]) for s in (slice(1200), slice(1200, None)))


def make_model():
    torch.manual_seed(0)
    return SimpleMLP(input_size=64, hidden_size=256, drop_rate=0).to(device)


model = make_model()
optimizer = CLASSPOptimizer(model.parameters(), lr=0.003)
scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
for _epoch in range(5):
    for batch in torch.randperm(len(train)).split(32):
        x, y = (tensor.to(device) for tensor in train[batch])
        optimizer.zero_grad()
        with torch.autocast(device, dtype):
            loss = torch.nn.functional.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
x, y = (tensor.to(device) for tensor in test[:])
print(f"plain loop  {100 * (model(x).argmax(1) == y).float().mean():.1f} %")


class MixedPrecisionCLASSP(CLASSP):
    def forward(self):
        with torch.autocast(device, dtype):
            return super().forward()

    def criterion(self):
        with torch.autocast(device, dtype):
            return super().criterion()


strategy = MixedPrecisionCLASSP(
    model=make_model(),
    lr=0.003,
    train_mb_size=32,
    train_epochs=5,
    device=device,
    evaluator=EvaluationPlugin(accuracy_metrics(stream=True), loggers=[]),
)
benchmark = nc_benchmark(train, test, n_experiences=1, task_labels=False)
strategy.train(benchmark.train_stream[0])
(accuracy,) = strategy.eval(benchmark.test_stream).values()
print(f"Avalanche   {100 * accuracy:.1f} %")
