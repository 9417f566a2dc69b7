"""The CLASSP strategy: used like avalanche.training.EWC, and without its habits."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.training import EWC, Naive
from avalanche.training.plugins import EvaluationPlugin, EWCPlugin, ReplayPlugin
from conftest import (
    BAD_PHASES,
    BAD_VALUES,
    SGD,
    On,
    accumulators,
    build,
    fit,
    growing_head,
    hand_written_loop,
    held_ids,
    linear_head,
    naive,
    same,
    two_groups,
    values,
    weights,
)
from torch import nn

from avalanche_classp import CLASSP, PAPER_PHASES, CLASSPOptimizer, CLASSPPlugin


def classp(model: nn.Module, **kwargs: Any) -> CLASSP:
    return build(CLASSP, model, **({"optimizer": None} | kwargs))


def evaluator() -> EvaluationPlugin:
    return EvaluationPlugin(accuracy_metrics(experience=True, stream=True), loggers=[])


# --- it trains ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {"lr": 0.1},
        {"lr": 0.1, "threshold": 1e-4, "epsilon": 0.5, "power": 2.0},
        {"lr": 0.05, "threshold": 1e-4, "apply_decay": False, "nonfinite": "skip"},
        {"lr": 0.05, "threshold": 1e-4, "phases": PAPER_PHASES},
    ],
)
@pytest.mark.parametrize("make_model", [linear_head, growing_head])
def test_it_trains_like_naive_with_the_plugin(tiny, hyperparameters, make_model):
    strategy = fit(classp(make_model(), **hyperparameters), tiny.train_stream)
    plugin = fit(naive(make_model(), CLASSPPlugin(**hyperparameters)), tiny.train_stream)
    assert not same(weights(strategy.model), weights(make_model()))
    assert same(weights(strategy.model), weights(plugin.model))
    assert same(accumulators(strategy), accumulators(plugin))


def test_it_trains_like_a_hand_written_loop_with_the_given_criterion(tiny):
    plain, criterion = linear_head(), nn.MultiMarginLoss()
    hand_written_loop(plain, epochs=2, criterion=criterion, lr=0.1, threshold=1e-4)
    strategy = classp(linear_head(), criterion=criterion, lr=0.1, threshold=1e-4, train_epochs=2)
    fit(strategy, tiny.train_stream)
    assert same(weights(strategy.model), weights(plain))


@pytest.mark.parametrize("strategy_class", [CLASSP, Naive])
def test_no_epochs_train_nothing(tiny, strategy_class):
    strategy = build(strategy_class, linear_head(), train_epochs=0)
    fit(strategy, tiny.train_stream)
    assert same(weights(strategy.model), weights(linear_head()))
    assert strategy.clock.train_exp_counter == 3


def test_other_plugins_act_beside_it(tiny):
    replay = ReplayPlugin(mem_size=10)
    strategy = fit(classp(linear_head(), lr=0.1, plugins=[replay]), tiny.train_stream)
    alone = fit(classp(linear_head(), lr=0.1), tiny.train_stream)
    assert len(replay.storage_policy.buffer) == 10
    assert not same(weights(strategy.model), weights(alone.model))


# --- it works wherever EWC(...) does --------------------------------------------------------------


def common_call(strategy_class: type, model: nn.Module, **kwargs: Any) -> Any:
    """Call with the arguments that CLASSP and EWC have in common, all of them."""
    own = {EWC: {"ewc_lambda": 1.0}, CLASSP: {}}[strategy_class]
    common = {
        "optimizer": SGD(model.parameters(), lr=0.1),
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": 4,
        "train_epochs": 2,
        "eval_mb_size": 6,
        "device": "cpu",
        "plugins": None,
        "evaluator": None,
        "eval_every": -1,
    }
    return strategy_class(model=model, **(common | own | kwargs))


@pytest.mark.parametrize("strategy_class", [CLASSP, EWC])
@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"device": torch.device("cpu")},
        {"evaluator": evaluator},
        {"eval_mb_size": None},
        {"plugins": []},
        {"peval_mode": "iteration", "eval_every": 3},
    ],
    ids=lambda kwargs: str([*kwargs]),
)
def test_the_call_for_ewc_trains_and_evaluates(tiny, strategy_class, kwargs):
    strategy = common_call(strategy_class, linear_head(), **kwargs)
    strategy.train(tiny.train_stream)
    strategy.eval(tiny.test_stream)
    assert not same(weights(strategy.model), weights(linear_head()))
    assert strategy.clock.train_iterations == 3 * 2 * 24 / 4
    assert strategy.train_mb_size == 4
    assert strategy.eval_mb_size == (kwargs.get("eval_mb_size", 6) or 4)
    assert strategy.device == torch.device("cpu")


def test_ewcs_arguments_are_classps_too():
    ewcs_own = {"ewc_lambda", "mode", "decay_factor", "keep_importance_data"}
    common = set(inspect.signature(EWC.__init__).parameters) - ewcs_own
    ours = inspect.signature(CLASSP.__init__).parameters
    assert {"model", "optimizer", "base_kwargs"} < common
    assert common <= set(ours)


def test_ewcs_defaults_are_classps_too():
    ewc, ours = (inspect.signature(c.__init__).parameters for c in (EWC, CLASSP))
    shared = [n for n in ewc if n in ours and ewc[n].default is not inspect.Parameter.empty]
    assert {"train_mb_size", "eval_mb_size", "device", "plugins"} < set(shared)
    assert [ours[name].default for name in shared] == [ewc[name].default for name in shared]


@pytest.mark.parametrize("make_plugins", [lambda p: [p], lambda p: (p,)], ids=["list", "tuple"])
def test_plugins_may_be_a_list_or_a_tuple(tiny, make_plugins):
    calls: list[Any] = []
    strategy = classp(linear_head(), plugins=make_plugins(On(before_training=calls.append)))
    fit(strategy, tiny.train_stream[:1])
    assert calls == [strategy]


@pytest.mark.parametrize("given", [None, evaluator, evaluator()], ids=["None", "callable", "own"])
def test_the_evaluator_may_be_none_a_function_or_an_instance(tiny, given):
    strategy = classp(linear_head(), evaluator=given)
    strategy.train(tiny.train_stream[0])
    metrics = strategy.eval(tiny.test_stream)
    assert isinstance(strategy.evaluator, EvaluationPlugin)
    assert bool(metrics) == (given is not None)
    if isinstance(given, EvaluationPlugin):
        assert strategy.evaluator is given


@pytest.mark.parametrize(
    ("kwargs", "evaluations"),
    [
        ({}, 0),
        ({"eval_every": -1}, 0),
        ({"eval_every": 0}, 1 + 1),  # before training and after the experience
        ({"eval_every": 1}, 1 + 3),  # before training and after each epoch
        ({"eval_every": 1, "peval_mode": "iteration"}, 1 + 9 + 1),
    ],
)
def test_eval_every_evaluates_the_given_streams(tiny, kwargs, evaluations):
    calls: list[Any] = []
    watch = On(after_eval=calls.append)
    strategy = classp(linear_head(), evaluator=evaluator, plugins=[watch], train_epochs=3, **kwargs)
    metrics = strategy.train(tiny.train_stream[0], eval_streams=[tiny.test_stream])
    assert len(calls) == evaluations
    assert isinstance(metrics, dict)
    assert metrics == strategy.evaluator.get_last_metrics()
    evaluated = {name for name in metrics if name.startswith("Top1_Acc_Exp/eval_phase/test_stream")}
    assert len(evaluated) == (3 if evaluations else 0)


# --- what belongs to the caller -------------------------------------------------------------------


def test_the_callers_plugin_list_is_left_alone(tiny):
    plugins = [On(), ReplayPlugin(mem_size=10)]
    before = list(plugins)
    one, two = (classp(linear_head(), plugins=plugins) for _ in range(2))
    fit(one, tiny.train_stream[:1])
    fit(two, tiny.train_stream[:1])
    assert plugins == before
    for strategy in (one, two):
        assert [p for p in strategy.plugins if p in before] == before
        assert sum(isinstance(p, CLASSPPlugin) for p in strategy.plugins) == 1


def test_ewc_changes_the_callers_plugin_list():
    """The contrast, so that the test above is known to be able to fail."""
    plugins: list[Any] = []
    common_call(EWC, linear_head(), plugins=plugins)
    common_call(EWC, linear_head(), plugins=plugins)
    assert [type(p) for p in plugins] == [EWCPlugin, EWCPlugin]


def test_the_default_criterion_is_not_shared():
    one, two = (CLASSP(model=linear_head(), evaluator=None)._criterion for _ in range(2))
    assert isinstance(one, nn.CrossEntropyLoss)
    assert isinstance(two, nn.CrossEntropyLoss)
    assert one is not two


def test_the_given_criterion_is_used(tiny):
    calls = []

    def criterion(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        calls.append(len(targets))
        return nn.functional.cross_entropy(output, targets)

    strategy = classp(linear_head(), criterion=criterion)
    assert strategy._criterion is criterion
    strategy.train(tiny.train_stream[0])
    assert calls == [8, 8, 8]


# --- its optimizer --------------------------------------------------------------------------------


def test_without_an_optimizer_it_makes_one_with_the_given_values_over_all_parameters():
    model = linear_head()
    given = {
        "lr": 0.3,
        "threshold": 0.25,
        "epsilon": 0.5,
        "power": 3.0,
        "apply_decay": False,
        "nonfinite": "skip",
        "foreach": False,
        "fused": False,
    }
    strategy = classp(model, **given)
    assert held_ids(strategy.optimizer) == [[id(p) for p in model.parameters()]]
    assert {key: values(strategy.optimizer, key) for key in given} == {
        k: [v] for k, v in given.items()
    }


def test_without_numbers_it_uses_the_optimizers_defaults():
    strategy = CLASSP(model=linear_head(), evaluator=None)
    parameters = inspect.signature(CLASSPOptimizer).parameters
    defaults = {n: p.default for n, p in parameters.items() if n != "params"}
    assert len(defaults) == 12
    assert {name: values(strategy.optimizer, name) for name in defaults} == {
        name: [default] for name, default in defaults.items()
    }


def test_it_takes_over_the_groups_of_sgd_at_construction():
    model = linear_head()
    sgd = SGD(two_groups(model, threshold=0.125), lr=0.3)
    strategy = classp(model, optimizer=sgd, threshold=0.5, power=2.0)
    assert type(strategy.optimizer) is CLASSPOptimizer
    assert held_ids(strategy.optimizer) == held_ids(sgd)
    assert values(strategy.optimizer, "lr") == [0.1, 0.2]
    assert values(strategy.optimizer, "threshold") == [0.5, 0.125]
    assert values(strategy.optimizer, "power") == [2.0, 2.0]


def test_its_lr_replaces_the_groups():
    model = linear_head()
    strategy = classp(model, optimizer=SGD(two_groups(model, threshold=0.125), lr=0.3), lr=0.7)
    assert values(strategy.optimizer, "lr") == [0.7, 0.7]


def test_it_uses_a_classp_optimizer_with_its_groups_as_it_is(tiny):
    model = linear_head()
    optimizer = CLASSPOptimizer(two_groups(model, threshold=0.125))
    strategy = classp(model, optimizer=optimizer)
    before = held_ids(optimizer)
    fit(strategy, tiny.train_stream)
    assert strategy.optimizer is optimizer
    assert held_ids(optimizer) == before
    assert values(strategy.optimizer, "lr") == [0.1, 0.2]
    assert values(strategy.optimizer, "threshold") == [0.0, 0.125]


def test_groups_and_their_lr_train(tiny):
    """A group with lr 0 stays, the other one learns."""
    model = linear_head()
    groups = two_groups(model, threshold=0.125)
    groups[0]["lr"] = 0.0
    fit(classp(model, optimizer=SGD(groups, lr=0.3)), tiny.train_stream)
    assert same(weights(model[0]), weights(linear_head()[0]))
    assert not same(weights(model[2]), weights(linear_head()[2]))


# --- errors come at construction ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", 0.1),
        ("threshold", 0.25),
        ("epsilon", 0.5),
        ("power", 2.0),
        ("apply_decay", False),
        ("nonfinite", "skip"),
        ("foreach", True),
        ("fused", True),
    ],
)
def test_a_classp_optimizer_and_a_hyperparameter_are_refused(name, value):
    model = linear_head()
    optimizer = CLASSPOptimizer(model.parameters())
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        classp(model, optimizer=optimizer, **{name: value})


def test_a_second_plugin_is_refused():
    with pytest.raises(ValueError, match="more than one CLASSPPlugin"):
        classp(linear_head(), plugins=[CLASSPPlugin()])


def test_a_plugin_that_holds_the_replaced_optimizer_is_refused():
    model = linear_head()
    holder = On()
    holder.mine = SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"On\.mine holds the SGD"):
        classp(model, optimizer=holder.mine, plugins=[holder])


def test_momentum_is_warned_about():
    model = linear_head()
    with pytest.warns(UserWarning, match=r"momentum=0\.9"):
        classp(model, optimizer=SGD(model.parameters(), lr=0.1, momentum=0.9))


@pytest.mark.parametrize("with_sgd", [False, True])
@pytest.mark.parametrize(("name", "value", "error"), BAD_VALUES)
def test_a_wrong_value_is_refused(name, value, error, with_sgd):
    model = linear_head()
    optimizer = SGD(model.parameters(), lr=0.1) if with_sgd else None
    with pytest.raises(error) as caught:
        classp(model, optimizer=optimizer, **{name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(("phases", "error", "named"), BAD_PHASES)
def test_wrong_phases_are_refused(phases, error, named):
    with pytest.raises(error) as caught:
        classp(linear_head(), phases=phases)
    assert all(part in str(caught.value) for part in named)


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="treshold"):
        classp(linear_head(), treshold=0.5)


def test_construction_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", message="No loggers specified")
        classp(linear_head(), lr=0.1, plugins=[ReplayPlugin(mem_size=10)])
