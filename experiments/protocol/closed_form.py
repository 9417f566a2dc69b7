"""Methods that solve a linear head in closed form, on features that never change.

They see each sample once, store none, and do not depend on the order of the stream. Their state is
larger than an optimizer's: second moments of the features, features × features numbers.

* Ridge regression on one-hot targets is recursive least squares, written with sums (analytic
  continual learning; RanPAC, McDonnell et al., 2023, arXiv:2307.02251, has it on a random layer).
* Streaming linear discriminant analysis: Hayes and Kanan, 2020, arXiv:1909.01520, with the
  sums that Avalanche's ``StreamingLDA`` takes sample by sample.
* Class means: the nearest mean of the features.
"""

from __future__ import annotations

from typing import Any

import torch
from avalanche.core import SupervisedPlugin
from avalanche.models import MultiTaskModule
from avalanche.training.templates import SupervisedTemplate
from torch import Tensor, nn

__all__ = ["ClassMeans", "ClosedForm", "Ridge", "StreamingLDA", "random_features"]


class Ridge:
    """Sums for ridge regression on one-hot targets: (ΦᵀΦ + penalty · I)⁻¹ ΦᵀY.

    Args:
        features: number of features; a constant feature for the bias is added.
        labels: number of labels.
        penalty: λ, > 0, beside sums over samples.
    """

    def __init__(self, features: int, labels: int, penalty: float) -> None:
        self.penalty = penalty
        self.moments = torch.zeros(features + 1, features + 1, dtype=torch.float64)
        self.targets = torch.zeros(features + 1, labels, dtype=torch.float64)

    def observe(self, features: Tensor, y: Tensor) -> None:
        """Add a mini-batch: features of shape (batch, features), labels of shape (batch,)."""
        phi = nn.functional.pad(features, (0, 1), value=1.0)
        self.moments += phi.T @ phi  # summed in float64, multiplied in the features' dtype
        self.targets += phi.T @ nn.functional.one_hot(y, self.targets.shape[1]).to(phi)

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return weights of shape (labels, features) and biases of shape (labels,)."""
        regular = self.moments.clone()
        regular.diagonal().add_(self.penalty)
        solution = torch.cholesky_solve(self.targets, torch.linalg.cholesky(regular))
        return solution[:-1].T, solution[-1]


class _Means:
    """Counts and means of each label's features."""

    def __init__(self, features: int, labels: int) -> None:
        self.counts = torch.zeros(labels)
        self.means = torch.zeros(labels, features)

    def observe(self, features: Tensor, y: Tensor) -> None:
        """Add a mini-batch; see :meth:`Ridge.observe`."""
        for label in y.unique().tolist():
            some = features[y == label]
            self.counts[label] += len(some)
            share = len(some) / self.counts[label]
            self.means[label] += share * (some.mean(0) - self.means[label])

    def _unseen(self) -> Tensor:
        # A label without samples is never the answer.
        return torch.where(self.counts > 0, 0.0, -1e30)


class ClassMeans(_Means):
    """The nearest class mean of the features, as a linear head.

    Args:
        features: number of features.
        labels: number of labels.
    """

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return weights and biases; see :meth:`Ridge.solve`."""
        return self.means, self._unseen() - self.means.square().sum(1) / 2


class StreamingLDA(_Means):
    """Class means and one shared covariance, as a linear head.

    Args:
        features: number of features.
        labels: number of labels.
        shrinkage: in [0, 1]: the covariance Σ counts as (1 - shrinkage) Σ + shrinkage I.
    """

    def __init__(self, features: int, labels: int, shrinkage: float) -> None:
        super().__init__(features, labels)
        self.shrinkage = shrinkage
        self.scatter = torch.zeros(features, features, dtype=torch.float64)
        self.seen = 0

    def observe(self, features: Tensor, y: Tensor) -> None:
        """Add a mini-batch; see :meth:`Ridge.observe`.

        A sample counts by its distance from the mean of its label's samples before it, as in
        Avalanche's loop.
        """
        distances = torch.empty_like(features)
        for label in y.unique().tolist():
            some = features[y == label]
            before = self.counts[label] + torch.arange(len(some))
            sums = self.counts[label] * self.means[label] + some.cumsum(0) - some
            distances[y == label] = some - sums / before.clamp_min(1)[:, None]
        number = self.seen + torch.arange(len(y), dtype=torch.float64)
        weighted = distances * (number / (number + 1)).sqrt()[:, None].to(distances)
        self.scatter += weighted.T @ weighted
        self.seen += len(y)
        super().observe(features, y)

    def solve(self) -> tuple[Tensor, Tensor]:
        """Return weights and biases; see :meth:`Ridge.solve`."""
        covariance = (1 - self.shrinkage) * self.scatter / max(self.seen, 1)
        covariance.diagonal().add_(self.shrinkage)
        means = self.means.double()
        weights = torch.linalg.lstsq(covariance, means.T, driver="gelsd").solution.T
        return weights, self._unseen() - (weights * means).sum(1) / 2


def random_features(inputs: int, width: int) -> nn.Module:
    """Return features of flattened samples: a fixed random ReLU layer, or with width 0 themselves.

    Args:
        inputs: numbers in a sample.
        width: number of features. The weights are normal with variance 1 / inputs, the biases
            standard normal, drawn from torch's current seed.
    """
    if width == 0:
        return nn.Flatten()
    layer = nn.Linear(inputs, width).requires_grad_(False)
    nn.init.normal_(layer.weight, std=inputs**-0.5)
    nn.init.normal_(layer.bias)
    return nn.Sequential(nn.Flatten(), layer, nn.ReLU())


class _Heads(nn.Module):
    """Features that never change, and linear heads by task label."""

    def __init__(self, features: nn.Module, size: int, labels: int) -> None:
        super().__init__()
        self.features, self.size, self.labels = features, size, labels
        self.heads = nn.ModuleDict()
        self.head(0)

    def head(self, task_label: int) -> nn.Linear:
        """Return the head of a task label; a new one answers with zeros."""
        name = str(task_label)
        if name not in self.heads:
            head = nn.Linear(self.size, self.labels).requires_grad_(False)
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
            first = next(self.heads.parameters(), head.weight)
            self.heads[name] = head.to(first.device)
        known = self.heads[name]
        assert isinstance(known, nn.Linear)
        return known

    def forward(self, x: Tensor) -> Tensor:
        """Return scores of shape (batch, labels)."""
        return self.head(0)(self.features(x))


class _HeadsByTask(MultiTaskModule):
    """The same, told apart by Avalanche's task labels."""

    def __init__(self, heads: _Heads) -> None:
        super().__init__()
        self.features, self.head, self.by_task = heads.features, heads.head, heads

    def forward_single_task(self, x: Tensor, task_label: int) -> Tensor:
        """Return scores of shape (batch, labels)."""
        return self.head(task_label)(self.features(x))


class _Moments(SupervisedPlugin):
    """What a closed-form method keeps between experiences, so that its bytes are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.sums: dict[int, dict[str, Any]] = {}


class ClosedForm(SupervisedTemplate):
    """Observes each mini-batch's features and solves the head when an experience has ended.

    Args:
        make: makes the sums for (features, labels), such as :class:`Ridge`.
        width: see :func:`random_features`.
        inputs: numbers in a sample.
        labels: labels of each head.
        by_task: whether each task label has a head of its own.
        **common: further arguments of Avalanche's ``SupervisedTemplate``.
    """

    def __init__(
        self, *, make: Any, width: int, inputs: int, labels: int, by_task: bool, **common: Any
    ) -> None:
        size = width or inputs
        heads = _Heads(random_features(inputs, width), size, labels)
        model = _HeadsByTask(heads) if by_task else heads
        self.make = lambda: make(size, labels)
        self.moments = _Moments()
        self.solvers: dict[int, Any] = {}
        # Nothing is trained by gradients; Avalanche's loop wants an optimizer.
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        super().__init__(model=model, optimizer=optimizer, plugins=[self.moments], **common)

    def training_epoch(self, **kwargs: Any) -> None:
        """Observe every mini-batch once, whatever ``train_epochs`` is."""
        if self.clock.train_exp_epochs > 0:
            return
        with torch.no_grad():
            for mini_batch in self.dataloader:
                self.mbatch = mini_batch
                self._unpack_minibatch()
                self._before_training_iteration(**kwargs)
                self._before_forward(**kwargs)
                self.mb_output = self.forward()
                self._after_forward(**kwargs)
                self.loss = self._make_empty_loss()
                self._observe()
                self._after_training_iteration(**kwargs)
            self._solve()

    def _observe(self) -> None:
        features = self.model.features(self.mb_x).cpu()
        for task_label in self.mb_task_id.unique().tolist():
            solver = self.solvers.get(task_label) or self.make()
            self.solvers[task_label] = solver
            some = self.mb_task_id == task_label
            solver.observe(features[some.cpu()], self.mb_y[some].cpu())
            self.moments.sums[task_label] = vars(solver)

    def _solve(self) -> None:
        for task_label, solver in self.solvers.items():
            head = self.model.head(task_label)
            for p, value in zip((head.weight, head.bias), solver.solve(), strict=True):
                p.copy_(value)
