"""Closed-form methods against scikit-learn, and against Avalanche's loop over samples."""

from __future__ import annotations

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.training import StreamingLDA as AvalanchesLDA
from sklearn.linear_model import Ridge as SklearnRidge
from sklearn.neighbors import NearestCentroid
from torch import nn
from torch.utils.data import TensorDataset

from experiments.protocol.closed_form import ClassMeans, ClosedForm, Ridge, StreamingLDA

INPUTS, LABELS, BATCH = 6, 4, 7


def data(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    y = torch.arange(60) % LABELS
    return torch.randn(60, INPUTS, generator=generator) + y[:, None], y


def stream(task_labels: bool = False):
    x, y = data()
    both = TensorDataset(x, y)
    return nc_benchmark(
        both,
        both,
        2,
        task_labels=task_labels,
        class_ids_from_zero_in_each_exp=task_labels,
        fixed_class_order=list(range(LABELS)),
    )


def trained(make, width: int = 0, by_task: bool = False, epochs: int = 1) -> ClosedForm:
    strategy = ClosedForm(
        make=make,
        width=width,
        inputs=INPUTS,
        labels=2 if by_task else LABELS,
        by_task=by_task,
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=BATCH,
        eval_mb_size=64,
        train_epochs=epochs,
    )
    for experience in stream(by_task).train_stream:
        strategy.train(experience)
    return strategy


@pytest.mark.parametrize("epochs", [1, 3])
def test_ridge_is_ridge_regression_on_all_data(epochs: int) -> None:
    strategy = trained(lambda features, labels: Ridge(features, labels, 2.5), epochs=epochs)
    x, y = data()
    theirs = SklearnRidge(alpha=2.5, fit_intercept=False).fit(
        nn.functional.pad(x, (0, 1), value=1.0).double().numpy(),
        nn.functional.one_hot(y, LABELS).double().numpy(),
    )
    weights = torch.tensor(theirs.coef_)
    head = strategy.model.head(0)
    torch.testing.assert_close(head.weight.double(), weights[:, :-1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(head.bias.double(), weights[:, -1], atol=1e-5, rtol=1e-4)


def test_class_means_are_the_nearest_centroids() -> None:
    x, y = data()
    theirs = NearestCentroid().fit(x.numpy(), y.numpy()).predict(x.numpy())
    assert trained(ClassMeans).model(x).argmax(1).tolist() == theirs.tolist()


def test_lda_is_avalanches() -> None:
    theirs = AvalanchesLDA(
        slda_model=nn.Flatten(),
        criterion=nn.CrossEntropyLoss(),
        input_size=INPUTS,
        num_classes=LABELS,
        shrinkage_param=1e-4,
        train_mb_size=1,
        eval_mb_size=64,
    )
    ours = ClosedForm(
        make=lambda features, labels: StreamingLDA(features, labels, 1e-4),
        width=0,
        inputs=INPUTS,
        labels=LABELS,
        by_task=False,
        criterion=nn.CrossEntropyLoss(),
        train_mb_size=BATCH,
        eval_mb_size=64,
    )
    for experience in stream().train_stream:
        for strategy in (theirs, ours):
            torch.manual_seed(1)  # both loaders draw the same order
            strategy.train(experience)
    x, _ = data(1)
    assert torch.isfinite(theirs.predict(x)).all()
    torch.testing.assert_close(ours.model(x), theirs.predict(x), atol=1e-2, rtol=1e-3)


def test_tasks_have_heads_of_their_own() -> None:
    strategy = trained(lambda features, labels: Ridge(features, labels, 1.0), by_task=True)
    x, y = data()
    for task in (0, 1):
        some = (y // 2) == task
        labels = torch.full((int(some.sum()),), task)
        right = strategy.model(x[some], labels).argmax(1) == y[some] % 2
        assert right.float().mean() > 0.8
    assert set(strategy.moments.sums) == {0, 1}


def test_a_label_without_samples_is_never_the_answer() -> None:
    means = ClassMeans(INPUTS, LABELS + 1)
    means.observe(*data())
    weights, bias = means.solve()
    assert LABELS not in (data()[0] @ weights.T + bias).argmax(1)


def test_random_features_stay_as_they_are() -> None:
    torch.manual_seed(0)
    strategy = trained(lambda features, labels: Ridge(features, labels, 1.0), width=9)
    layer = strategy.model.features[1]
    assert layer.weight.shape == (9, INPUTS)
    assert not layer.weight.requires_grad
    torch.manual_seed(0)
    again = trained(lambda features, labels: Ridge(features, labels, 1.0), width=9)
    assert torch.equal(layer.weight, again.model.features[1].weight)
