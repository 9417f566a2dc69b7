"""classp_metrics: values against the formula by hand in float64, names, loggers, arguments."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import pickle
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics, confusion_matrix_metrics
from avalanche.logging import CSVLogger, InteractiveLogger, TensorboardLogger, TextLogger
from avalanche.training import Naive
from avalanche.training.plugins import EvaluationPlugin
from conftest import (
    CLASSES,
    SGD,
    On,
    build,
    fit,
    growing_head,
    linear_head,
    make_benchmark,
    many_heads,
    same,
    two_groups,
    weights,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from avalanche_classp import (
    CLASSP,
    CLASSPOptimizer,
    CLASSPPlugin,
    CSVValueLogger,
    classp_metrics,
)
from avalanche_classp.metrics import _places, effective_rate
from avalanche_classp.optim.rule import Rule

END = "/train_phase/train_stream"


class Hand:
    """What CLASSP knows, computed beside it in NumPy from the gradients that it is given."""

    def __init__(self, threshold: float, epsilon: float, power: float, lr: float) -> None:
        self.threshold, self.epsilon, self.power, self.lr = threshold, epsilon, power, lr
        self.A: dict[str, np.ndarray] = {}
        self.updated: dict[str, np.ndarray] = {}
        self.shares: list[float] = []
        self.plugin = On(before_update=self.step)

    def step(self, strategy: Any) -> None:
        count = size = 0
        for name, p in strategy.model.named_parameters():
            g = p.grad.double().numpy().copy()
            chosen = g**2 > self.threshold
            A = self.A.setdefault(name, np.zeros_like(g))
            A += np.where(chosen, np.abs(g) ** self.power, 0)
            self.updated[name] = self.updated.get(name, np.zeros(g.shape, bool)) | chosen
            count, size = count + chosen.sum(), size + chosen.size
        self.shares.append(count / size)

    def flat(self, of: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([of[name].ravel() for name in of])

    def rate(self) -> np.ndarray:
        return self.lr / (self.epsilon + self.flat(self.A)) ** (1 / self.power)


def classp(model: nn.Module, metrics: Any, *plugins: Any, loggers: Any = (), **kwargs: Any) -> Any:
    evaluator = EvaluationPlugin(metrics, loggers=list(loggers), strict_checks=False)
    return build(
        CLASSP, model, plugins=list(plugins), evaluator=evaluator, optimizer=None, **kwargs
    )


def curves(strategy: Any) -> dict[str, list[float]]:
    return {name: y for name, (_, y) in strategy.evaluator.get_all_metrics().items()}


VALUES = {"lr": 0.1, "threshold": 3e-3, "epsilon": 0.02, "power": 1.3}


@pytest.fixture
def strategy_and_hand() -> tuple[Any, Hand]:
    hand = Hand(**VALUES)
    metrics = classp_metrics(minibatch=True, epoch=True, experience=True, per_layer=True)
    strategy = classp(linear_head(), metrics, hand.plugin, train_epochs=2, **VALUES)
    return strategy, hand


# --- values ---------------------------------------------------------------------------------------


def test_the_share_updated_in_each_iteration_is_that_of_the_gradients(strategy_and_hand, tiny):
    strategy, hand = strategy_and_hand
    fit(strategy, tiny.train_stream)
    shares = curves(strategy)[f"CLASSP_Updated_MB{END}"]
    assert shares == pytest.approx(hand.shares, abs=1e-12)
    assert 0 < min(shares) < 1


def test_the_state_after_each_experience_is_that_of_the_formula(strategy_and_hand, tiny):
    strategy, hand = strategy_and_hand
    used = None
    for i, experience in enumerate(tiny.train_stream):
        hand.updated = {}
        before = weights(strategy.model)
        fit(strategy, [experience])
        last = {name: y[-1] for name, y in curves(strategy).items()}
        updated, A, rate = hand.flat(hand.updated), hand.flat(hand.A), hand.rate()
        assert last[f"CLASSP_Updated_Exp{END}"] == pytest.approx(updated.mean())
        start = VALUES["lr"] / VALUES["epsilon"] ** (1 / VALUES["power"])
        for at in ("Epoch", "Exp"):
            assert last[f"CLASSP_Accumulator_{at}{END}/mean"] == pytest.approx(A.mean(), 1e-5)
            assert last[f"CLASSP_EffectiveRate_{at}{END}/mean"] == pytest.approx(rate.mean(), 1e-5)
            for q in (0.1, 0.5, 0.9):
                for kind, values in (("Accumulator", A), ("EffectiveRate", rate)):
                    expected = np.quantile(values, q, method="lower")
                    name = f"CLASSP_{kind}_{at}{END}/quantile_{q}"
                    assert last[name] == pytest.approx(expected, 1e-5), name
            assert last[f"CLASSP_Free_{at}{END}"] == pytest.approx((rate >= 0.1 * start).mean())
        moved = hand.flat(
            {k: (w - before[k]).double().numpy() for k, w in weights(strategy.model).items()}
        )
        assert last[f"CLASSP_Movement_Exp{END}"] == pytest.approx(np.sqrt((moved**2).mean()))
        overlap = 0 if i == 0 else (updated & used).sum() / updated.sum()
        assert last[f"CLASSP_Overlap_Exp{END}"] == pytest.approx(overlap)
        used = updated if i == 0 else used | updated
    assert 0 < last[f"CLASSP_Free_Exp{END}"] < 1
    assert 0 < last[f"CLASSP_Overlap_Exp{END}"] < 1


def test_layers_have_their_own_values(strategy_and_hand, tiny):
    strategy, hand = strategy_and_hand
    fit(strategy, tiny.train_stream)
    last = {name: y[-1] for name, y in curves(strategy).items()}
    for name, A in hand.A.items():
        assert last[f"CLASSP_Accumulator_Exp{END}/mean/{name}"] == pytest.approx(A.mean(), 1e-5)
        assert last[f"CLASSP_Accumulator_Exp{END}/quantile_0.5/{name}"] == pytest.approx(
            np.quantile(A, 0.5, method="lower"), 1e-5
        )
    whole = last[f"CLASSP_Updated_Exp{END}"]
    shares = [(last[f"CLASSP_Updated_Exp{END}/{n}"], A.size) for n, A in hand.A.items()]
    assert whole == pytest.approx(sum(s * n for s, n in shares) / sum(n for _, n in shares))


def test_an_epoch_counts_what_was_updated_in_it(tiny):
    hand = Hand(**VALUES)
    shares = []

    def end_epoch(strategy: Any) -> None:
        shares.append(hand.flat(hand.updated).mean())
        hand.updated = {}

    plugins = hand.plugin, On(after_training_epoch=end_epoch)
    strategy = classp(linear_head(), classp_metrics(epoch=True), *plugins, train_epochs=3, **VALUES)
    fit(strategy, tiny.train_stream)
    assert curves(strategy)[f"CLASSP_Updated_Epoch{END}"] == pytest.approx(shares)
    assert len(shares) == 9


def test_quantiles_of_many_weights_are_those_of_a_large_sample():
    model = nn.Linear(1000, 300)
    strategy = classp(model, [], lr=0.1)
    values = torch.rand(300, 1000).exp()
    strategy.optimizer.state[model.weight]["accumulator"] = values
    metric = classp_metrics(experience=True, quantiles=(0, 0.25, 0.999))[1]
    from avalanche_classp.metrics import layers

    found = [layer for layer in layers(strategy) if layer.name == "weight"]
    result = metric.combine(map(metric.part, found))
    assert result["/mean"] == pytest.approx(values.double().mean().item(), 1e-9)
    for q in (0.25, 0.999):
        # Three standard deviations of a rank among 8192.
        ranks = np.clip(q + np.array([-3, 3]) * math.sqrt(q * (1 - q) / 8192), 0, 1)
        low, high = np.quantile(values.numpy(), ranks)
        assert low <= result[f"/quantile_{q}"] <= high


def test_the_effective_rate_is_what_the_optimizer_multiplies_with():
    for decay in (True, False):
        p = nn.Parameter(torch.zeros(4, dtype=torch.float64))
        optimizer = CLASSPOptimizer(
            [p], lr=0.3, epsilon=0.1, power=1.7, threshold=0, apply_decay=decay
        )
        for _ in range(3):
            p.grad = torch.tensor([1.0, 0.1, -2.0, 0.5], dtype=torch.float64)
            before = p.detach().clone()
            optimizer.step()
        rule = Rule(
            lr=0.3,
            threshold=0,
            epsilon=0.1,
            power=1.7,
            apply_decay=decay,
            maximize=False,
            skip_nonfinite=False,
        )
        rate = effective_rate(optimizer.state[p]["accumulator"], rule)
        torch.testing.assert_close((before - p.detach()) / p.grad, rate)


def test_without_decay_all_weights_stay_free(tiny):
    strategy = classp(linear_head(), classp_metrics(experience=True), lr=0.1, apply_decay=False)
    fit(strategy, tiny.train_stream)
    assert curves(strategy)[f"CLASSP_Free_Exp{END}"] == [1, 1, 1]
    assert curves(strategy)[f"CLASSP_EffectiveRate_Exp{END}/mean"] == pytest.approx([0.1] * 3)


def test_with_epsilon_0_a_weight_is_free_until_its_first_update(tiny):
    strategy = classp(linear_head(), classp_metrics(experience=True), epsilon=0.0, threshold=1e-3)
    fit(strategy, tiny.train_stream[:1])
    A = [strategy.optimizer.state[p]["accumulator"] for p in strategy.model.parameters()]
    untouched = sum((a == 0).sum().item() for a in A) / sum(a.numel() for a in A)
    assert curves(strategy)[f"CLASSP_Free_Exp{END}"] == [pytest.approx(untouched)]
    assert untouched > 0


def test_groups_have_their_own_rules(tiny):
    model = linear_head()
    optimizer = CLASSPOptimizer(two_groups(model, threshold=1e9), threshold=0.0)
    evaluator = EvaluationPlugin(classp_metrics(epoch=True, per_layer=True), loggers=[])
    strategy = build(
        Naive, model, optimizer=optimizer, plugins=[CLASSPPlugin()], evaluator=evaluator
    )
    fit(strategy, tiny.train_stream[:1])
    last = {name: y[-1] for name, y in curves(strategy).items()}
    assert last[f"CLASSP_Updated_Epoch{END}/0.weight"] == 1
    assert last[f"CLASSP_Updated_Epoch{END}/2.weight"] == 0


@pytest.mark.parametrize("growing", [True, False])
def test_heads_that_grow_and_come_are_counted(growing):
    benchmark = make_benchmark() if growing else make_benchmark(CLASSES, tasks=range(3))
    model = growing_head() if growing else many_heads()
    metrics = classp_metrics(minibatch=True, epoch=True, experience=True, per_layer=True)
    strategy = classp(model, metrics, lr=0.1, threshold=0.0, eval_every=1)
    sizes = []
    for i, experience in enumerate(benchmark.train_stream):
        # Evaluating the next experience, too, makes the head grow while this one is learnt.
        strategy.train(experience, eval_streams=[benchmark.test_stream[: i + 2]], shuffle=False)
        sizes.append(sum(p.numel() for p in strategy.model.parameters()))
    assert sizes[0] < sizes[-1]
    last = {name: y[-1] for name, y in curves(strategy).items()}
    A = {
        name: strategy.optimizer.state[p]["accumulator"].double().numpy()
        for name, p in strategy.model.named_parameters()
        if p in strategy.optimizer.state
    }
    flat = np.concatenate([a.ravel() for a in A.values()])
    missing = sizes[-1] - flat.size  # a head that no training has reached
    assert last[f"CLASSP_Accumulator_Exp{END}/mean"] == pytest.approx(
        flat.sum() / (flat.size + missing), 1e-5
    )
    assert all(0 <= last[f"CLASSP_{kind}_Exp{END}"] <= 1 for kind in ("Free", "Overlap", "Updated"))


def test_frozen_layers_are_not_counted_as_updated(tiny):
    model = linear_head()
    model[0].requires_grad_(False)
    strategy = classp(model, classp_metrics(minibatch=True, epoch=True, per_layer=True), lr=0.1)
    fit(strategy, tiny.train_stream[:1])
    last = {name: y[-1] for name, y in curves(strategy).items()}
    for at in ("MB", "Epoch"):
        assert last[f"CLASSP_Updated_{at}{END}/0.weight"] == 0
        assert last[f"CLASSP_Updated_{at}{END}/2.weight"] > 0


class Accumulating(CLASSP):
    """Steps in each fourth iteration."""

    def optimizer_step(self) -> None:
        if (self.clock.train_iterations + 1) % 4 == 0:
            super().optimizer_step()


class TwoSteps(CLASSP):
    def optimizer_step(self) -> None:
        super().optimizer_step()
        super().optimizer_step()


class ZeroesAtOnce(CLASSP):
    def optimizer_step(self) -> None:
        super().optimizer_step()
        self.optimizer.zero_grad()


class Scaled(CLASSP):
    """Has a GradScaler that skips the second step."""

    def backward(self) -> None:
        self.scaler = torch.amp.GradScaler("cpu")
        self.scaler.scale(self.loss).backward()
        if self.clock.train_iterations == 1:
            self.model[0].weight.grad[0, 0] = math.inf

    def optimizer_step(self) -> None:
        self.scaler.step(self.optimizer)


class Clipped(CLASSP):
    """Makes all gradients too small for the threshold."""

    def optimizer_step(self) -> None:
        for p in self.model.parameters():
            p.grad *= 1e-9
        super().optimizer_step()


@pytest.mark.parametrize(
    ("strategy_class", "kwargs"),
    [
        (Accumulating, {}),
        (Scaled, {}),
        (TwoSteps, {}),
        (ZeroesAtOnce, {}),
        (Clipped, {}),
        (CLASSP, {}),
        (CLASSP, {"lr": 0.0}),
        (CLASSP, {"history": "gradients", "rank": 2}),
        (CLASSP, {"apply_decay": False}),
        (CLASSP, {"eval_every": 1, "peval_mode": "iteration"}),
    ],
)
@pytest.mark.filterwarnings("ignore:Accumulating has trained 3 iterations without one step")
def test_the_share_of_an_iteration_is_what_it_moved(tiny, strategy_class, kwargs):
    before: list[torch.Tensor] = []
    moved: list[float] = []

    def flat(strategy: Any) -> torch.Tensor:
        return nn.utils.parameters_to_vector(strategy.model.parameters()).detach()

    watch = On(
        before_forward=lambda s: before.append(flat(s)),
        after_training_iteration=lambda s: moved.append(
            (flat(s) != before[-1]).double().mean().item()
        ),
    )
    metrics = EvaluationPlugin(classp_metrics(minibatch=True), loggers=[], strict_checks=False)
    strategy = build(
        strategy_class,
        linear_head(),
        optimizer=None,
        evaluator=metrics,
        plugins=[watch],
        **({"lr": 0.1, "threshold": 3e-3} | kwargs),
    )
    fit(strategy, tiny.train_stream)
    shares = curves(strategy)[f"CLASSP_Updated_MB{END}"]
    assert len(shares) == 9
    assert shares == pytest.approx(moved, abs=1e-12)
    zero = [share == 0 for share in shares]
    if strategy_class is Accumulating:
        assert zero == [True, True, True, False] * 2 + [True]
    elif strategy_class is Scaled:
        assert zero == [False, True] + [False] * 7
    else:
        assert all(zero) == (strategy_class is Clipped or kwargs.get("lr") == 0)


@pytest.mark.parametrize("at", ["minibatch", "epoch", "experience"])
@pytest.mark.parametrize("trained", [1, 2])
def test_metrics_start_afresh_with_another_strategy(tiny, at, trained):
    metrics = classp_metrics(**{at: True})
    evaluator = EvaluationPlugin(metrics, loggers=[])
    found = []
    for _ in range(3):
        model = linear_head()
        strategy = build(CLASSP, model, optimizer=None, evaluator=evaluator, lr=0.1)
        fit(strategy, tiny.train_stream[:trained])
        found.append([metric.result() for metric in metrics])
    assert found[0] == found[1] == found[2]


def test_metrics_of_strategies_in_turn_do_not_mix(tiny):
    metrics = classp_metrics(experience=True)
    evaluator = EvaluationPlugin(metrics, loggers=[])
    first, second = (
        build(CLASSP, linear_head(), optimizer=None, evaluator=evaluator, lr=0.1) for _ in range(2)
    )
    fit(first, tiny.train_stream[:2])
    fit(second, tiny.train_stream[:1])
    assert metrics[-1].result() == {"": 0}  # Overlap
    fit(first, tiny.train_stream[2:])
    assert metrics[-1].result() == {"": 0}  # what the first had updated before is forgotten


def test_an_interrupted_experience_is_of_the_same_strategy(tiny):
    metrics = classp_metrics(experience=True)

    def interrupt(strategy: Any) -> None:
        strategy.plugins.pop(0)
        raise KeyboardInterrupt

    for hook in ("before_training_iteration", "after_update", "after_training_iteration"):
        strategy = classp(linear_head(), metrics, lr=0.1)
        fit(strategy, tiny.train_stream[:2])
        strategy.plugins.insert(0, On(**{hook: interrupt}))
        with pytest.raises(KeyboardInterrupt):
            fit(strategy, tiny.train_stream[2:])
        fit(strategy, tiny.train_stream[2:])
        assert metrics[-1].result()[""] > 0  # Overlap


def test_metrics_work_on_another_default_device():
    from avalanche_classp.metrics import layers

    strategy = classp(nn.Linear(1000, 30), [], lr=0.1)
    metric = classp_metrics(epoch=True)[1]
    before = [metric.combine(map(metric.part, layers(strategy)))]
    _places.cache_clear()
    with torch.device("meta"):
        before.append(metric.combine(map(metric.part, layers(strategy))))
    assert before[0] == before[1]


def test_skipped_gradients_are_not_counted(tiny):
    model = linear_head()

    def spoil(strategy: Any) -> None:
        model[0].weight.grad.fill_(math.nan)

    metrics = classp_metrics(minibatch=True, per_layer=True)
    strategy = classp(model, metrics, On(before_update=spoil), nonfinite="skip", threshold=0.0)
    fit(strategy, tiny.train_stream[:1])
    assert set(curves(strategy)[f"CLASSP_Updated_MB{END}/0.weight"]) == {0}


# --- training is the same with and without --------------------------------------------------------


def test_training_is_the_same_bit_for_bit_with_metrics(tiny):
    def trained(metrics: Any) -> Any:
        torch.manual_seed(0)
        strategy = classp(linear_head(), metrics, lr=0.1, train_epochs=2)
        for experience in tiny.train_stream:
            strategy.train(experience)
        return weights(strategy.model)

    every = classp_metrics(minibatch=True, epoch=True, experience=True, per_layer=True)
    assert same(trained(every), trained([]))


def test_nothing_is_kept_between_experiences_but_a_bool_for_each_weight(tiny):
    metrics = classp_metrics(minibatch=True, epoch=True, experience=True, per_layer=True)
    strategy = classp(linear_head(), metrics, lr=0.1)
    fit(strategy, tiny.train_stream)
    kept = {
        (type(metric).__name__, name): sum(t.numel() * t.element_size() for t in value.values())
        for metric in metrics
        for name, value in vars(metric).items()
        if isinstance(value, dict) and any(isinstance(t, torch.Tensor) for t in value.values())
    }
    size = sum(p.numel() for p in strategy.model.parameters())
    assert kept == {("OverlapMetric", "_used"): size}


def test_a_strategy_with_metrics_can_be_pickled_and_goes_on(tiny):
    strategy = classp(linear_head(), classp_metrics(experience=True), lr=0.1)
    fit(strategy, tiny.train_stream[:2])
    copied = pickle.loads(pickle.dumps(strategy))
    for each in (strategy, copied):
        fit(each, tiny.train_stream[2:])
    assert curves(copied) == curves(strategy)


# --- loggers --------------------------------------------------------------------------------------


def test_every_logger_of_avalanche_takes_them(tiny, tmp_path):
    text = io.StringIO()
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        board = TensorboardLogger(tmp_path / "tb")
        loggers = [InteractiveLogger(), TextLogger(text), CSVLogger(tmp_path / "csv"), board]
        metrics = [
            *accuracy_metrics(epoch=True, experience=True),
            *classp_metrics(minibatch=True, epoch=True, experience=True),
        ]
        strategy = classp(linear_head(), metrics, loggers=loggers, lr=0.1)
        fit(strategy, tiny.train_stream)
        strategy.eval(tiny.test_stream)
        loggers[2].close()
        board.writer.close()
    for output in (text.getvalue(), shown.getvalue()):
        assert f"CLASSP_Free_Epoch{END} = " in output
        assert f"CLASSP_Overlap_Exp{END} = " in output
    events = EventAccumulator(str(tmp_path / "tb"), size_guidance={"scalars": 0})
    events.Reload()
    recorded = strategy.evaluator.get_all_metrics()
    names = [name for name in recorded if name.startswith("CLASSP_")]
    assert len(names) == 1 + 2 * 10 + 2
    for name in names:
        steps, values = recorded[name]
        found = events.Scalars(name)
        assert [e.step for e in found] == steps
        assert [e.value for e in found] == pytest.approx(values)
    assert recorded[f"CLASSP_Free_Exp{END}"][0] == [3, 6, 9]  # iterations


def test_every_value_is_in_the_csv_file(tiny, tmp_path):
    logger = CSVValueLogger(tmp_path / "new" / "values.csv")
    metrics = [
        *accuracy_metrics(epoch=True, experience=True),
        *confusion_matrix_metrics(num_classes=6, stream=True),
        *classp_metrics(minibatch=True, epoch=True, experience=True, per_layer=True),
    ]
    strategy = classp(linear_head(), metrics, loggers=[logger], lr=0.1)
    fit(strategy, tiny.train_stream)
    strategy.eval(tiny.test_stream)
    lines = list(csv.reader(logger.path.open(newline="")))
    assert lines[0] == ["step", "name", "value"]
    written: dict[str, Any] = {}
    for step, name, value in lines[1:]:
        steps, values = written.setdefault(name, ([], []))
        steps.append(int(step))
        values.append(float(value))
    recorded = dict(strategy.evaluator.get_all_metrics())
    (matrix,) = [name for name in recorded if name.startswith("ConfusionMatrix")]
    del recorded[matrix]
    assert written == recorded


def test_a_resumed_run_adds_to_its_csv_file(tiny, tmp_path):
    path = tmp_path / "values.csv"
    strategy = classp(
        linear_head(), classp_metrics(epoch=True), loggers=[CSVValueLogger(path)], lr=0.1
    )
    fit(strategy, tiny.train_stream[:1])
    before = path.read_text()
    path.write_text(f"{before}3,CLASSP_Fr")  # killed while it wrote
    CSVValueLogger(path)
    fit(pickle.loads(pickle.dumps(strategy)), tiny.train_stream[1:2])
    header, *lines = path.read_text().splitlines()
    assert lines.index("3,CLASSP_Fr") == len(before.splitlines()) - 1
    assert {line.split(",")[0] for line in lines} == {"3", "6"}
    assert all(line.count(",") == 2 for line in lines if line != "3,CLASSP_Fr")
    assert lines.count(header) == 0


def test_a_file_with_other_columns_is_refused(tmp_path):
    path = tmp_path / "training_results.csv"
    path.write_text("training_exp,epoch\n0,1\n")
    with pytest.raises(ValueError, match=r"results.csv has not the columns step,name,value"):
        CSVValueLogger(path)
    assert path.read_text() == "training_exp,epoch\n0,1\n"


def test_results_can_be_read_from_the_metric(tiny):
    metrics = classp_metrics(experience=True)
    strategy = classp(linear_head(), metrics, lr=0.1)
    fit(strategy, tiny.train_stream)
    free = next(metric for metric in metrics if str(metric) == "CLASSP_Free_Exp")
    assert free.result() == {"": curves(strategy)[f"CLASSP_Free_Exp{END}"][-1]}
    free.reset()
    assert free.result() == {}


# --- arguments ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({}, ValueError, ["epoch=True"]),
        ({"epoch": 1}, TypeError, ["epoch", "1"]),
        ({"epoch": True, "per_layer": "yes"}, TypeError, ["per_layer", "'yes'"]),
        ({"epoch": True, "quantiles": 0.5}, TypeError, ["quantiles", "0.5"]),
        ({"epoch": True, "quantiles": "0.5"}, TypeError, ["quantiles", "'0.5'"]),
        ({"epoch": True, "quantiles": ["a"]}, TypeError, ["quantiles", "'a'"]),
        ({"epoch": True, "quantiles": [True]}, TypeError, ["quantiles", "True"]),
        ({"epoch": True, "quantiles": [0.5, 1.5]}, ValueError, ["quantiles", "1.5"]),
        ({"epoch": True, "quantiles": [math.nan]}, ValueError, ["quantiles", "nan"]),
        ({"epoch": True, "free_share": 0}, ValueError, ["free_share", "0"]),
        ({"epoch": True, "free_share": 2.0}, ValueError, ["free_share", "2.0"]),
        ({"epoch": True, "free_share": math.nan}, ValueError, ["free_share", "nan"]),
        ({"epoch": True, "free_share": "0.1"}, TypeError, ["free_share", "'0.1'"]),
    ],
)
def test_wrong_arguments_are_refused(arguments, error, words):
    with pytest.raises(error) as caught:
        classp_metrics(**arguments)
    assert all(word in str(caught.value) for word in words)


def test_a_strategy_that_classp_does_not_train_is_refused(tiny):
    model = linear_head()
    evaluator = EvaluationPlugin(classp_metrics(epoch=True), loggers=[])
    strategy = build(Naive, model, optimizer=SGD(model.parameters(), lr=0.1), evaluator=evaluator)
    before = weights(model)
    with pytest.raises(ValueError, match=r"SGD.*CLASSPPlugin\(\)"):
        strategy.train(tiny.train_stream[0])
    assert same(before, weights(model))


def test_no_quantiles_are_fine(tiny):
    strategy = classp(linear_head(), classp_metrics(epoch=True, quantiles=()), lr=0.1)
    fit(strategy, tiny.train_stream[:1])
    assert not [name for name in curves(strategy) if "quantile" in name]


@pytest.mark.slow
def test_importing_the_package_imports_neither_the_metrics_nor_avalanche():
    code = (
        "import sys, avalanche_classp; assert 'avalanche' not in sys.modules; "
        "assert 'avalanche_classp.metrics' not in sys.modules; "
        "assert 'classp_metrics' in dir(avalanche_classp)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
