"""The losses against sums by hand, and which methods take which."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from avalanche.training.losses import MaskedCrossEntropy
from sklearn.metrics import log_loss, mean_squared_error
from small_data import small_config
from test_methods import build, follow, images, network

from experiments.errors import UserError
from experiments.protocol.avalanche_fixes import FixedMaskedCrossEntropy
from experiments.protocol.config import RunConfig
from experiments.protocol.losses import LOSSES, make_loss
from experiments.protocol.methods import METHODS, why_not
from experiments.protocol.tuned_settings import make_config

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own

OUTPUT = torch.tensor([[2.0, -1.0, 0.5, 0.0], [0.3, 0.2, -4.0, 1.0], [1.0, 3.0, 2.0, -2.0]])
Y = torch.tensor([1, 0, 1])


def test_squared_error_is_the_mean_over_samples_and_labels() -> None:
    expected = mean_squared_error(np.eye(4)[Y], OUTPUT.numpy())
    assert make_loss("squared-error")(OUTPUT, Y).item() == pytest.approx(expected)


def test_masked_cross_entropy_sees_the_experiences_classes_alone() -> None:
    loss = make_loss("masked-cross-entropy")
    loss._adaptation({2, 3})
    loss._adaptation({0, 1})
    expected = log_loss(Y, OUTPUT[:, :2].softmax(1).double().numpy(), labels=[0, 1])
    assert loss(OUTPUT, Y).item() == pytest.approx(expected)
    of_old = make_loss("masked-cross-entropy", keep_old_classes=True)
    of_old._adaptation({0, 1})
    of_old._adaptation({2})
    expected = log_loss(Y, OUTPUT[:, :3].softmax(1).double().numpy(), labels=[0, 1, 2])
    assert of_old(OUTPUT, Y).item() == pytest.approx(expected)


def test_avalanches_masked_cross_entropy_is_nan_for_outputs_far_apart() -> None:
    far, y = torch.tensor([[0.0, 200.0]]), torch.tensor([1])
    theirs, ours = MaskedCrossEntropy({0, 1}, mask="new"), make_loss("masked-cross-entropy")
    ours._adaptation({0, 1})
    assert torch.isnan(theirs(far, y)), FixedMaskedCrossEntropy
    assert ours(far, y) == 0
    with pytest.raises(IndexError):
        MaskedCrossEntropy(mask="new")(far, y)
    assert make_loss("masked-cross-entropy")(far, y) == 0


@pytest.mark.parametrize("method", ["naive", "lwf", "replay", "classp"])
def test_a_masked_loss_leaves_other_classes_heads_alone(method: str) -> None:
    criterion = make_loss("masked-cross-entropy", METHODS[method].has_old_samples)
    net = network("mlp", "class")
    start = net.classifier.bias.detach().clone()
    moved: list[torch.Tensor] = []
    strategy = build(method, net, criterion=criterion)
    follow(strategy, images("class"), after=lambda s: moved.append(net.classifier.bias != start))
    first, *_, last = moved
    assert first.tolist() == [True, True, False, False, False, False]
    assert last.all()


def test_records_of_the_usual_loss_do_not_name_it() -> None:
    """Records from before there was a choice are the same runs."""
    usual = small_config()
    assert "loss" not in usual.as_dict()
    other = RunConfig.from_dict({**usual.as_dict(), "loss": "squared-error"})
    assert other.as_dict()["loss"] == "squared-error"
    assert RunConfig.from_dict(other.as_dict()) == other
    assert other.key() != usual.key()


@pytest.mark.parametrize(
    ("method", "scenario", "loss", "message"),
    [
        ("ridge", "class", "squared-error", "ridge trains no network, so it has no loss"),
        ("ewc", "task", "masked-cross-entropy", "is for class-incremental streams"),
        ("joint", "class", "masked-cross-entropy", "is for class-incremental streams, and not"),
        ("ewc", "class", "masked", "unknown loss 'masked'; did you mean|choose from"),
    ],
)
def test_what_does_not_go_together_is_refused(method, scenario, loss, message) -> None:
    with pytest.raises(UserError, match=message):
        make_config("split-digits", scenario, method, loss=loss)


def test_searched_settings_are_not_for_another_loss() -> None:
    usual = make_config("split-mnist", "class", "ewc")
    other = make_config("split-mnist", "class", "ewc", loss="masked-cross-entropy")
    assert other.hyper == METHODS["ewc"].defaults != usual.hyper


def test_every_method_takes_the_usual_loss_in_its_scenarios() -> None:
    for method, spec in METHODS.items():
        for scenario in ("class", "domain", "task"):
            assert (why_not(method, scenario) is None) == (scenario in spec.scenarios)
    assert set(LOSSES) == {"cross-entropy", "masked-cross-entropy", "squared-error"}
