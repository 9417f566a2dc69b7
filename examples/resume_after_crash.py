"""Checkpoints: a run that dies is started again and ends as if it had never been stopped.

    python examples/resume_after_crash.py

The first start dies in the third experience; the second goes on from the newest checkpoint.
Last lines:

    trained 0 1 and crashed
    trained 2 3 4
    same weights as without a crash: True
"""

import tempfile

import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import SimpleMLP
from avalanche.training.plugins import EvaluationPlugin
from sklearn.datasets import load_digits
from torch.utils.data import TensorDataset

from avalanche_classp import CLASSP, checkpointed

images, labels = map(torch.tensor, load_digits(return_X_y=True))
images = images.float() / 8 - 1


def start(folder, crash_at=None):
    """Do what a script of yours does; return the experiences trained here, and the weights."""
    torch.manual_seed(0)
    benchmark = nc_benchmark(
        TensorDataset(images[:1200], labels[:1200]),
        TensorDataset(images[1200:], labels[1200:]),
        n_experiences=5,
        task_labels=False,
        seed=0,
    )
    model = SimpleMLP(input_size=64, hidden_size=64, drop_rate=0.5)
    strategy = CLASSP(
        model=model,
        train_mb_size=32,
        train_epochs=2,
        evaluator=EvaluationPlugin(accuracy_metrics(stream=True), loggers=[]),
    )
    trained = []
    for experience in checkpointed(benchmark.train_stream, strategy, folder):
        if experience.current_experience == crash_at:
            return trained, None
        strategy.train(experience)
        strategy.eval(benchmark.test_stream)
        trained.append(experience.current_experience)
    return trained, torch.nn.utils.parameters_to_vector(strategy.model.parameters())


with tempfile.TemporaryDirectory() as folder:
    _, never_stopped = start(f"{folder}/never-stopped")
    trained, _ = start(f"{folder}/crashed", crash_at=2)
    print("trained", *trained, "and crashed")
    trained, resumed = start(f"{folder}/crashed")
    print("trained", *trained)
    print("same weights as without a crash:", torch.equal(never_stopped, resumed))
