"""CLASSPPlugin: CLASSP beside any strategy and plugin, phases, and accumulators that survive.

Where the plugin repairs what Avalanche does to optimizers, a second test trains without the plugin
and shows that the history is lost there: it will tell when Avalanche mends it.
"""

from __future__ import annotations

import copy
import inspect
import io
import math
import pickle
import warnings
from collections import defaultdict
from collections.abc import Callable
from itertools import chain, islice, pairwise, product, repeat
from typing import Any

import dill
import numpy as np
import pytest
import torch
from avalanche.benchmarks import split_online_stream
from avalanche.core import SupervisedPlugin
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import IncrementalClassifier
from avalanche.models.packnet import PackNetModel, PackNetPlugin
from avalanche.training import EWC, Cumulative, GDumb, JointTraining, LwF, Naive, Replay
from avalanche.training.plugins import (
    EarlyStoppingPlugin,
    EvaluationPlugin,
    EWCPlugin,
    FromScratchTrainingPlugin,
    LRSchedulerPlugin,
    LwFPlugin,
    ReplayPlugin,
)
from conftest import (
    BAD_PHASES,
    BAD_VALUES,
    BATCH,
    CLASSES,
    GROWING,
    HIDDEN,
    SGD,
    On,
    accumulators,
    build,
    fit,
    growing_head,
    hand_written_loop,
    held_ids,
    linear_head,
    make_benchmark,
    make_data,
    many_heads,
    naive,
    same,
    total,
    two_groups,
    values,
    weights,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import ReduceLROnPlateau, StepLR

from avalanche_classp import CLASSP, PAPER_PHASES, CLASSPOptimizer, CLASSPPlugin
from avalanche_classp.optim.accumulators import KINDS, kind_of
from avalanche_classp.optim.hyperparameters import SPECS


def classp_over(model: nn.Module, **hyperparameters: Any) -> CLASSPOptimizer:
    return CLASSPOptimizer(model.parameters(), **({"lr": 0.1} | hyperparameters))


# --- it is CLASSP training ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hyperparameters",
    [
        {},
        {"threshold": 1e-3},
        {"threshold": 1e-4, "epsilon": 0.5, "power": 2.0},
        {"epsilon": 1e-2, "power": 1.5, "apply_decay": False},
    ],
)
def test_naive_with_the_plugin_trains_like_a_hand_written_loop(tiny, hyperparameters):
    plain = linear_head()
    optimizer = hand_written_loop(plain, epochs=2, lr=0.1, **hyperparameters)

    model = linear_head()
    strategy = naive(model, CLASSPPlugin(**hyperparameters), train_epochs=2)
    fit(strategy, tiny.train_stream)

    assert not same(weights(model), weights(linear_head()))
    assert same(weights(model), weights(plain))
    history = [optimizer.state[p]["accumulator"] for p in plain.parameters()]
    assert all(map(torch.equal, accumulators(strategy).values(), history))


def test_the_papers_phases_train_like_a_hand_written_loop(tiny):
    hyper = {"lr": 0.05, "threshold": 1e-4, "epsilon": 1e-5, "power": 1.0}
    plain = linear_head()
    hand_written_loop(plain, epochs=1, phases=PAPER_PHASES, **hyper)
    without = linear_head()
    hand_written_loop(without, epochs=1, **hyper)

    model = linear_head()
    fit(naive(model, CLASSPPlugin(**hyper, phases=PAPER_PHASES)), tiny.train_stream)

    assert same(weights(model), weights(plain))
    assert not same(weights(model), weights(without))


@pytest.mark.parametrize(
    ("make_model", "task_labels"), [(linear_head, [0, 0, 0]), (many_heads, [0, 1, 2])]
)
def test_wrapping_equals_giving_naive_a_classp_optimizer(make_model, task_labels):
    experiences = make_benchmark(tasks=task_labels).train_stream
    wrapped, direct = make_model(), make_model()
    fit(naive(wrapped, CLASSPPlugin(threshold=1e-5)), experiences)
    fit(naive(direct, optimizer=classp_over(direct, threshold=1e-5)), experiences)
    assert same(weights(wrapped), weights(direct))


@pytest.mark.parametrize("begin", ["train", "eval", "take_over"])
def test_it_takes_over_when_training_or_evaluation_begins_or_on_request(tiny, begin):
    plugin = CLASSPPlugin()
    strategy = naive(linear_head(), plugin)
    assert type(strategy.optimizer) is SGD
    if begin == "take_over":
        plugin.take_over(strategy)
    else:
        getattr(strategy, begin)(getattr(tiny, f"{begin.replace('eval', 'test')}_stream"))
    assert isinstance(strategy.optimizer, CLASSPOptimizer)


# --- beside other plugins and strategies ----------------------------------------------------------


def fit_and_check(strategy: Any, *trainings: Any, **kwargs: Any) -> Any:
    """Train, and check after each training that it was CLASSP's and that the history grew."""
    initial, before = weights(strategy.model), 0.0
    for experiences in trainings:
        fit(strategy, [experiences], **kwargs)
        assert isinstance(strategy.optimizer, CLASSPOptimizer)
        assert total(accumulators(strategy)) > before
        before = total(accumulators(strategy))
    final = weights(strategy.model)
    assert all(w.isfinite().all() for w in final.values())
    assert not any(torch.equal(initial[name], w) for name, w in final.items())
    return strategy


OTHER_PLUGINS = [
    lambda: ReplayPlugin(mem_size=10),
    lambda: LwFPlugin(alpha=2.0, temperature=2),
    lambda: EWCPlugin(ewc_lambda=10.0),
]


@pytest.mark.parametrize("make_other", OTHER_PLUGINS, ids=["replay", "lwf", "ewc"])
@pytest.mark.parametrize("first", ["classp", "other"])
def test_another_plugin_acts_beside_it(tiny, make_other, first):
    plugins = [CLASSPPlugin(), make_other()]
    if first == "other":
        plugins.reverse()
    strategy = fit_and_check(naive(linear_head(), *plugins), *tiny.train_stream)
    alone = fit(naive(linear_head(), CLASSPPlugin()), tiny.train_stream)
    assert not same(weights(strategy.model), weights(alone.model))


@pytest.mark.parametrize("make_other", OTHER_PLUGINS, ids=["replay", "lwf", "ewc"])
def test_the_order_of_the_plugins_does_not_matter(tiny, make_other):
    one = fit(naive(linear_head(), CLASSPPlugin(), make_other()), tiny.train_stream)
    two = fit(naive(linear_head(), make_other(), CLASSPPlugin()), tiny.train_stream)
    assert same(weights(one.model), weights(two.model))


def test_replay_fills_its_buffer_and_replays_old_classes(tiny):
    replay = ReplayPlugin(mem_size=10)
    seen: set[int] = set()
    watch = On(before_forward=lambda strategy: seen.update(strategy.mb_y.tolist()))
    strategy = naive(linear_head(), CLASSPPlugin(), replay, watch)
    fit_and_check(strategy, tiny.train_stream[0])
    assert len(replay.storage_policy.buffer) == 10
    seen.clear()
    fit_and_check(strategy, tiny.train_stream[1])
    assert seen == {0, 1, 2, 3}


@pytest.mark.filterwarnings("ignore:Metric Top1_Acc_Stream:UserWarning")
def test_early_stopping_stops_training_and_takes_the_weights_back_but_not_the_history(tiny):
    evaluator = EvaluationPlugin(accuracy_metrics(stream=True), loggers=[])
    stop = EarlyStoppingPlugin(patience=3, val_stream_name="valid_stream")
    growth: list[float] = []
    watch = On(after_training_epoch=lambda s: growth.append(total(accumulators(s))))
    plugins = (CLASSPPlugin(), stop, watch)
    strategy = naive(linear_head(), *plugins, evaluator=evaluator, eval_every=1, train_epochs=30)
    for experience, valid in zip(tiny.train_stream[:2], tiny.valid_stream, strict=False):
        fit_and_check(strategy, experience, eval_streams=[[valid]])
        assert stop.patience < strategy.clock.train_exp_epochs < strategy.train_epochs
        assert same(weights(strategy.model), stop.best_state)
    assert growth == sorted(growth)
    assert total(accumulators(strategy)) == growth[-1]


STRATEGIES = [
    (Replay, {"mem_size": 10}),
    (LwF, {"alpha": 2.0, "temperature": 2.0}),
    (EWC, {"ewc_lambda": 10.0}),
    (Cumulative, {}),
]


@pytest.mark.parametrize(("strategy_class", "kwargs"), STRATEGIES)
def test_it_trains_other_strategies(tiny, strategy_class, kwargs):
    strategy = build(strategy_class, linear_head(), plugins=[CLASSPPlugin()], **kwargs)
    fit_and_check(strategy, *tiny.train_stream)
    alone = fit(naive(linear_head(), CLASSPPlugin()), tiny.train_stream)
    assert not same(weights(strategy.model), weights(alone.model))


def test_it_trains_joint_training_on_the_whole_stream_at_once(tiny):
    strategy = build(JointTraining, linear_head(), plugins=[CLASSPPlugin()])
    fit_and_check(strategy, tiny.train_stream)
    samples = sum(len(e.dataset) for e in tiny.train_stream)
    assert strategy.clock.train_iterations == math.ceil(samples / BATCH)


# --- the optimizer that it makes ------------------------------------------------------------------


def ready(
    optimizer: torch.optim.Optimizer, model: nn.Module, **hyperparameters: Any
) -> Callable[[], Any]:
    """Return a function in which the plugin takes over the optimizer, and that returns its own."""
    plugin = CLASSPPlugin(**hyperparameters)
    strategy = naive(model, plugin, optimizer=optimizer)

    def take_over() -> Any:
        plugin.take_over(strategy)
        return strategy.optimizer

    return take_over


def taken_over(optimizer: torch.optim.Optimizer, model: nn.Module, **hyperparameters: Any) -> Any:
    return ready(optimizer, model, **hyperparameters)()


def test_the_groups_keep_their_parameters_and_their_lr():
    model = linear_head()
    sgd = SGD(two_groups(model), lr=0.3)
    optimizer = taken_over(sgd, model)
    assert type(optimizer) is CLASSPOptimizer
    assert held_ids(optimizer) == held_ids(sgd)
    assert values(optimizer, "lr") == [0.1, 0.2]


def test_the_groups_are_kept_through_training(tiny):
    model = linear_head()
    sgd = SGD(two_groups(model), lr=0.3)
    before = held_ids(sgd)
    strategy = fit(naive(model, CLASSPPlugin(), optimizer=sgd), tiny.train_stream)
    assert held_ids(strategy.optimizer) == before
    assert values(strategy.optimizer, "lr") == [0.1, 0.2]


def test_the_plugins_lr_replaces_every_groups():
    model = linear_head()
    optimizer = taken_over(SGD(two_groups(model), lr=0.3), model, lr=0.7)
    assert values(optimizer, "lr") == [0.7, 0.7]


@pytest.mark.parametrize(
    ("key", "groups_own", "plugins"),
    [
        ("threshold", 0.5, 0.25),
        ("epsilon", 0.5, 0.25),
        ("power", 3.0, 2.0),
        ("apply_decay", True, False),
        ("nonfinite", "raise", "skip"),
    ],
)
def test_a_groups_own_hyperparameter_wins(key, groups_own, plugins):
    model = linear_head()
    sgd = SGD(two_groups(model, **{key: groups_own}), lr=0.3)
    assert values(taken_over(sgd, model, **{key: plugins}), key) == [plugins, groups_own]


def test_maximize_is_kept(tiny):
    up, down = linear_head(), linear_head()
    for model, maximize in ((up, True), (down, False)):
        optimizer = SGD(model.parameters(), lr=0.1, maximize=maximize)
        strategy = naive(model, CLASSPPlugin(), optimizer=optimizer)
        fit(strategy, tiny.train_stream[:1])
        assert values(strategy.optimizer, "maximize") == [maximize]
    x, y = make_data(CLASSES[0])
    initial, maximized, minimized = (
        nn.functional.cross_entropy(m(x), y).item() for m in (linear_head(), up, down)
    )
    assert minimized < initial < maximized


def test_named_parameters_are_kept():
    model = linear_head()
    optimizer = taken_over(SGD(model.named_parameters(), lr=0.1), model)
    names = [name for name, _ in model.named_parameters()]
    assert values(optimizer, "param_names") == [names]


def test_a_bad_gradient_in_a_new_head_of_named_parameters_is_reported():
    benchmark = make_benchmark(CLASSES[:2], tasks=[0, 1])
    model = many_heads()

    def poison(strategy: Any) -> None:
        if strategy.experience.task_label == 1:
            model.classifier.classifiers["1"].classifier.weight.grad.fill_(math.nan)

    strategy = naive(
        model,
        CLASSPPlugin(),
        On(before_update=poison),
        optimizer=SGD(model.named_parameters(), lr=0.1),
    )
    with pytest.raises(RuntimeError, match="non-finite gradient"):
        fit(strategy, benchmark.train_stream)


def test_a_classp_optimizer_is_used_as_it_is(tiny):
    model = linear_head()
    optimizer = classp_over(model, threshold=1e-6, power=2.0)
    before = copy.deepcopy(optimizer.param_groups[0])
    strategy = fit(naive(model, CLASSPPlugin(), optimizer=optimizer), tiny.train_stream)
    assert strategy.optimizer is optimizer
    after = optimizer.param_groups[0]
    assert [after[k] for k in before if k != "params"] == [
        before[k] for k in before if k != "params"
    ]


def test_hyperparameters_for_both_plugin_and_optimizer_are_refused(tiny):
    model = linear_head()
    plugin = CLASSPPlugin(threshold=0.25, power=2.0)
    strategy = naive(model, plugin, optimizer=classp_over(model))
    with pytest.raises(ValueError, match=r"threshold=0\.25.*power=2\.0"):
        strategy.train(tiny.train_stream[0])


@pytest.mark.parametrize("begin", ["train", "eval"])
def test_two_plugins_are_refused(tiny, begin):
    strategy = naive(linear_head(), CLASSPPlugin(), CLASSPPlugin())
    with pytest.raises(ValueError, match="more than one CLASSPPlugin"):
        getattr(strategy, begin)(tiny.train_stream[0])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"momentum": 0.9}, [r"momentum=0\.9"]),
        ({"weight_decay": 0.01}, [r"weight_decay=0\.01"]),
        ({"momentum": 0.9, "weight_decay": 0.01}, [r"momentum=0\.9", r"weight_decay=0\.01"]),
    ],
)
def test_settings_without_a_counterpart_are_warned_about(settings, named):
    model = linear_head()
    take_over = ready(SGD(model.parameters(), lr=0.1, **settings), model)
    with pytest.warns(UserWarning, match=".*".join(named)) as caught:
        take_over()
    assert len(caught) == 1
    assert "dampening" not in str(caught[0].message)


def test_a_setting_of_one_group_only_is_warned_about():
    model = linear_head()
    with pytest.warns(UserWarning, match=r"momentum=0\.9"):
        taken_over(SGD(two_groups(model, momentum=0.9), lr=0.3), model)


@pytest.mark.parametrize(
    ("optimizer_class", "settings"),
    [
        (SGD, {}),
        (SGD, {"maximize": True}),
        (SGD, {"foreach": True}),
        (torch.optim.Adam, {}),
        (torch.optim.Adagrad, {}),
    ],
)
def test_an_optimizer_with_nothing_to_lose_is_replaced_in_silence(optimizer_class, settings):
    model = linear_head()
    take_over = ready(optimizer_class(model.parameters(), lr=0.1, **settings), model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert values(take_over(), "lr") == [0.1]


@pytest.mark.parametrize(("name", "value", "error"), BAD_VALUES)
def test_a_wrong_value_is_refused_at_construction(name, value, error):
    with pytest.raises(error) as caught:
        CLASSPPlugin(**{name: value})
    assert name in str(caught.value)
    assert repr(value) in str(caught.value)


# --- schedulers, and optimizers that others replace -----------------------------------------------


def step_lr(optimizer: torch.optim.Optimizer) -> LRSchedulerPlugin:
    return LRSchedulerPlugin(StepLR(optimizer, step_size=1, gamma=0.5))


def on_plateau(optimizer: torch.optim.Optimizer) -> LRSchedulerPlugin:
    # No later loss is that much better than the first: the lr falls from the second epoch on.
    never = {"patience": 0, "threshold": 1e9, "threshold_mode": "abs"}
    scheduler = ReduceLROnPlateau(optimizer, factor=0.5, **never)
    return LRSchedulerPlugin(scheduler, metric="train_loss")


@pytest.mark.parametrize("make_scheduler", [step_lr, on_plateau])
@pytest.mark.parametrize("first", ["classp", "scheduler"])
def test_a_scheduler_of_the_replaced_optimizer_is_refused(tiny, make_scheduler, first):
    model = linear_head()
    sgd = SGD(model.parameters(), lr=0.1)
    plugins = [CLASSPPlugin(), make_scheduler(sgd)]
    if first == "scheduler":
        plugins.reverse()
    strategy = naive(model, *plugins, optimizer=sgd)
    with pytest.raises(ValueError, match=r"LRSchedulerPlugin\.scheduler holds the SGD"):
        strategy.train(tiny.train_stream[0])
    assert same(weights(model), weights(linear_head()))


def test_a_plugin_that_holds_the_replaced_optimizer_is_refused(tiny):
    model = linear_head()
    holder = On()
    holder.mine = SGD(model.parameters(), lr=0.1)
    strategy = naive(model, CLASSPPlugin(), holder, optimizer=holder.mine)
    with pytest.raises(ValueError, match=r"On\.mine"):
        strategy.train(tiny.train_stream[0])


@pytest.mark.parametrize(
    ("make_scheduler", "expected"),
    [(step_lr, [0.1, 0.05, 0.025, 0.0125]), (on_plateau, [0.1, 0.1, 0.05, 0.025])],
)
def test_a_scheduler_of_a_classp_optimizer_changes_its_lr(tiny, make_scheduler, expected):
    model = linear_head()
    optimizer = classp_over(model, lr=0.1)
    used: list[float] = []
    watch = On(before_training_epoch=lambda s: used.extend(values(s.optimizer, "lr")))
    plugins = (CLASSPPlugin(), make_scheduler(optimizer), watch)
    strategy = naive(model, *plugins, optimizer=optimizer, train_epochs=4)
    fit(strategy, tiny.train_stream[:2])
    assert used == pytest.approx(expected * 2)  # LRSchedulerPlugin starts again by default


class Warmup:
    """A scheduler that is none of torch's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        pass


def in_sequence(optimizer: torch.optim.Optimizer) -> Any:
    parts = [StepLR(optimizer, 1), StepLR(optimizer, 2)]
    return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [1])


SCHEDULERS = {
    "StepLR": lambda sgd: StepLR(sgd, 1),
    "ReduceLROnPlateau": ReduceLROnPlateau,
    "LambdaLR": lambda sgd: torch.optim.lr_scheduler.LambdaLR(sgd, lambda epoch: 0.5**epoch),
    "OneCycleLR": lambda sgd: torch.optim.lr_scheduler.OneCycleLR(
        sgd, 0.1, 10, cycle_momentum=False
    ),
    "SequentialLR": in_sequence,
    "SWALR": lambda sgd: torch.optim.swa_utils.SWALR(sgd, 0.1),
    "Warmup": Warmup,
}

HOLDERS: dict[str, Callable[[Any, Any], Any]] = {
    "the user": lambda strategy, scheduler: scheduler,
    "the strategy": lambda strategy, scheduler: vars(strategy).update(scheduler=scheduler),
    "a plugin's attribute's attribute": lambda strategy, scheduler: strategy.plugins.append(
        with_attributes(inner=with_attributes(scheduler=scheduler))
    ),
    "a plugin's method": lambda strategy, scheduler: strategy.plugins.append(
        with_attributes(step=scheduler.step)
    ),
    "a list of lists": lambda strategy, scheduler: strategy.plugins.append(
        with_attributes(parts=[[scheduler]])
    ),
    "a function": lambda strategy, scheduler: strategy.plugins.append(
        with_attributes(call=lambda: scheduler.step())
    ),
}


def with_attributes(**attributes: Any) -> SupervisedPlugin:
    plugin = SupervisedPlugin()
    vars(plugin).update(attributes)
    return plugin


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_scheduler_is_refused_whoever_holds_it(tiny, holder):
    strategy = naive(linear_head(), CLASSPPlugin())
    kept = HOLDERS[holder](strategy, StepLR(strategy.optimizer, 1))
    with pytest.raises(
        ValueError, match=r"StepLR.* SGD that CLASSPPlugin replaces.*build a CLASSP"
    ):
        strategy.train(tiny.train_stream[0])
    del kept


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("when", ["before", "after"])
def test_schedulers_of_every_kind_are_refused_also_after_the_take_over(tiny, name, when):
    model = linear_head()
    sgd = SGD(model.parameters(), lr=0.1)
    if when == "before":
        strategy = naive(model, CLASSPPlugin(), optimizer=sgd)
        scheduler = SCHEDULERS[name](sgd)
    else:
        strategy = CLASSP(model=model, optimizer=sgd, evaluator=None)
        scheduler = SCHEDULERS[name](sgd)
    with pytest.raises(ValueError, match="a scheduler of the SGD that CLASSPPlugin replaces"):
        strategy.train(tiny.train_stream[0])
    del scheduler


def test_a_scheduler_that_is_gone_or_of_another_optimizer_is_not_refused(tiny):
    model = linear_head()
    strategy = naive(model, CLASSPPlugin())
    StepLR(strategy.optimizer, 1)
    other = StepLR(SGD(model.parameters(), lr=0.1), 1)
    fit(strategy, tiny.train_stream[:1])
    assert isinstance(strategy.optimizer, CLASSPOptimizer)
    assert "initial_lr" not in strategy.optimizer.param_groups[0]
    del other


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(1.0),
        torch.zeros(2, 2),
        np.array(1.0),
        np.zeros(3),
        nn.Linear(2, 2),
        range(3),
        {"a": torch.tensor(1.0)},
        [np.array(1)],
        (i for i in range(3)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_a_plugins_attributes_are_no_matter(tiny, value):
    strategy = naive(linear_head(), with_attributes(kept=value), CLASSPPlugin())
    fit_and_check(strategy, tiny.train_stream[0])


class KeepsTheStrategy(SupervisedPlugin):
    def before_training(self, strategy: Any, **kwargs: Any) -> None:
        self.strategy, self.all = strategy, [strategy]


@pytest.mark.parametrize("first", ["classp", "other"])
def test_a_plugin_may_keep_the_strategy(tiny, first):
    plugins = [CLASSPPlugin(), KeepsTheStrategy()]
    if first == "other":
        plugins.reverse()
    fit_and_check(naive(linear_head(), *plugins), *tiny.train_stream)


def test_the_hooks_of_the_replaced_optimizer_are_called(tiny):
    strategy = naive(linear_head(), CLASSPPlugin(lr=0.1))
    sgd, calls = strategy.optimizer, []
    early = sgd.register_step_pre_hook(lambda *args: calls.append("before"))
    sgd.register_step_post_hook(lambda *args: calls.append("after"))
    sgd.register_state_dict_post_hook(lambda optimizer, state: calls.append("state"))
    fit(strategy, tiny.train_stream[:1])
    assert calls == ["before", "after"] * 3
    strategy.optimizer.state_dict()
    assert calls.pop() == "state"
    early.remove()
    sgd.register_step_pre_hook(lambda *args: calls.append("late"))
    calls.clear()
    fit(strategy, tiny.train_stream[1:2])
    assert calls == ["late", "after"] * 3


def test_keys_of_the_users_own_stay_in_the_groups(tiny):
    model = linear_head()
    groups = two_groups(model)
    groups[0] |= {"name": "body", "tags": ["a"]}
    strategy = naive(model, CLASSPPlugin(), optimizer=torch.optim.AdamW(groups, weight_decay=0))
    fit(strategy, tiny.train_stream[:1])
    body, head = strategy.optimizer.param_groups
    assert (body["name"], body["tags"]) == ("body", ["a"])
    assert "name" not in head
    assert not {"betas", "weight_decay", "amsgrad"} & body.keys()


def test_a_step_that_was_set_on_the_replaced_optimizer_is_warned_about():
    model = linear_head()
    sgd = SGD(model.parameters(), lr=0.1)
    sgd.step = lambda closure=None: None
    with pytest.warns(UserWarning, match=r"no counterpart for step=<function"):
        taken_over(sgd, model)


def test_an_optimizer_replaced_by_another_plugin_is_refused(tiny):
    model = linear_head()

    def replace(strategy: Any) -> None:
        strategy.optimizer = SGD(model.parameters(), lr=0.1)

    strategy = naive(model, CLASSPPlugin(), On(before_training_exp=replace))
    with pytest.raises(ValueError, match="optimizer was replaced by SGD"):
        strategy.train(tiny.train_stream[0])
    assert same(weights(model), weights(linear_head()))


# --- phases ---------------------------------------------------------------------------------------


def record(*keys: str) -> tuple[On, list[Any]]:
    """Return a plugin, and the list where it notes the groups' values at each epoch's start."""
    log: list[Any] = []

    def note(strategy: Any) -> None:
        rows = [tuple(group[k] for k in keys) for group in strategy.optimizer.param_groups]
        log.append(rows if len(rows) > 1 else rows[0] if len(keys) > 1 else rows[0][0])

    return On(before_training_epoch=note), log


@pytest.mark.parametrize(
    ("lrs", "expected"),
    [
        ([0.1], [0.1, 0.1, 0.1]),
        ([0.1, 0.2], [0.1, 0.2, 0.2]),
        ([0.1, 0.2, 0.3], [0.1, 0.2, 0.3]),
        ([0.1, 0.2, 0.3, 0.4], [0.1, 0.2, 0.3]),
    ],
)
def test_experience_i_uses_phase_i_and_then_the_last(tiny, lrs, expected):
    watch, log = record("lr")
    plugin = CLASSPPlugin(phases=[{"lr": lr} for lr in lrs])
    fit(naive(linear_head(), plugin, watch), tiny.train_stream)
    assert log == expected
    assert plugin.experiences_seen == 3


def test_one_call_of_train_with_the_whole_stream_changes_phases_too(tiny):
    watch, log = record("lr")
    plugin = CLASSPPlugin(phases=[{"lr": 0.1}, {"lr": 0.2}])
    naive(linear_head(), plugin, watch, train_epochs=2).train(tiny.train_stream)
    assert log == [0.1, 0.1, 0.2, 0.2, 0.2, 0.2]


def test_a_phase_sets_every_hyperparameter(tiny):
    phase = {"lr": 0.3, "threshold": 1e-3, "epsilon": 0.2, "power": 2.0, "apply_decay": False}
    watch, log = record(*phase)
    fit(naive(linear_head(), CLASSPPlugin(phases=[{}, phase]), watch), tiny.train_stream[:2])
    assert log == [(0.1, 0.0, 1e-8, 1.5, True), (0.3, 1e-3, 0.2, 2.0, False)]


def test_phases_work_on_a_classp_optimizer(tiny):
    model = linear_head()
    watch, log = record("threshold", "power")
    plugin = CLASSPPlugin(phases=[{"threshold": 0.25}, {"power": 2.0}])
    optimizer = classp_over(model, threshold=0.125)
    fit(naive(model, plugin, watch, optimizer=optimizer), tiny.train_stream[:2])
    assert log == [(0.25, 1.5), (0.125, 2.0)]


def test_the_papers_phases_are_sgd_steps_above_a_threshold_then_decay_without_one(tiny):
    watch, log = record("apply_decay", "threshold")
    plugin = CLASSPPlugin(lr=0.2, threshold=0.5, epsilon=1e-5, phases=PAPER_PHASES)
    fit(naive(linear_head(), plugin, watch), tiny.train_stream)
    assert log == [(False, 0.5), (True, 0.0), (True, 0.0)]


def test_what_a_phase_does_not_name_comes_back_in_each_group(tiny):
    model = linear_head()
    watch, log = record("lr", "threshold")
    phases = [{"lr": 0.5}, {"threshold": 0.25}, {"lr": 0.6}]
    sgd = SGD(two_groups(model, threshold=1e-3), lr=0.3)
    fit(naive(model, CLASSPPlugin(phases=phases), watch, optimizer=sgd), tiny.train_stream)
    assert log == [
        [(0.5, 0.0), (0.5, 1e-3)],
        [(0.1, 0.25), (0.2, 0.25)],
        [(0.6, 0.0), (0.6, 1e-3)],
    ]


def test_phases_that_do_not_name_lr_leave_it_to_a_scheduler(tiny):
    model = linear_head()
    optimizer = classp_over(model, lr=0.8)
    scheduler = LRSchedulerPlugin(
        StepLR(optimizer, step_size=1, gamma=0.5), reset_lr=False, reset_scheduler=False
    )
    watch, log = record("lr", "threshold")
    plugin = CLASSPPlugin(phases=[{"threshold": 0.25}, {"threshold": 0.125}])
    strategy = naive(model, plugin, scheduler, watch, optimizer=optimizer, train_epochs=2)
    fit(strategy, tiny.train_stream[:2])
    assert log == [(0.8, 0.25), (0.4, 0.25), (0.2, 0.125), (0.1, 0.125)]


def test_the_last_phase_is_not_set_again_in_later_experiences(tiny):
    """A scheduler's changes within a phase stay: it is entered once."""
    model = linear_head()
    optimizer = classp_over(model)
    scheduler = LRSchedulerPlugin(
        StepLR(optimizer, step_size=1, gamma=0.5), reset_lr=False, reset_scheduler=False
    )
    watch, log = record("lr")
    plugin = CLASSPPlugin(phases=[{"lr": 0.8}])
    fit(naive(model, plugin, scheduler, watch, optimizer=optimizer), tiny.train_stream)
    assert log == [0.8, 0.4, 0.2]


@pytest.mark.parametrize(("phases", "error", "named"), BAD_PHASES)
def test_wrong_phases_are_refused_at_construction(phases, error, named):
    with pytest.raises(error) as caught:
        CLASSPPlugin(phases=phases)
    assert all(part in str(caught.value) for part in named)


def test_the_callers_phases_are_copied(tiny):
    phases = [{"lr": 0.1}]
    watch, log = record("lr")
    plugin = CLASSPPlugin(phases=phases)
    phases[0]["lr"] = 0.9
    fit(naive(linear_head(), plugin, watch), tiny.train_stream[:1])
    assert log == [0.1]


@pytest.mark.parametrize("hook", ["before_training_exp", "after_training_iteration"])
def test_an_interrupted_experience_keeps_its_phase(tiny, hook):
    stop = chain([False, True], repeat(False))

    def interrupt(strategy: Any) -> None:
        if next(stop):
            raise KeyboardInterrupt

    watch, log = record("lr")
    plugin = CLASSPPlugin(phases=[{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}])
    strategy = naive(linear_head(), plugin, watch, On(**{hook: interrupt}))
    first, second, third = tiny.train_stream
    with pytest.raises(KeyboardInterrupt):
        fit(strategy, [first, second])
    done = plugin.experiences_seen
    log.clear()
    fit(strategy, [(first, second, third)[done]])
    assert log == [(0.1, 0.2, 0.3)[done]]
    assert plugin.experiences_seen == done + 1


@pytest.mark.parametrize(
    ("size", "drop_last"), [(5, False), (5, True), (6, True), (6, False), (24, False), (100, False)]
)
def test_sub_experiences_share_a_phase_where_boundaries_are_known(tiny, size, drop_last):
    watch, log = record("lr")
    plugin = CLASSPPlugin(phases=[{"lr": 0.1}, {"lr": 0.2}, {"lr": 0.3}])
    online = split_online_stream(
        tiny.train_stream, size, drop_last=drop_last, access_task_boundaries=True, seed=0
    )
    strategy = fit(naive(linear_head(), plugin, watch), online)
    parts = 24 // size if drop_last else math.ceil(24 / size)
    assert log == [0.1] * parts + [0.2] * parts + [0.3] * parts
    # Where Avalanche does not mark the last part, the next experience shows that it was the last.
    fit(strategy, tiny.train_stream[:1])
    assert plugin.experiences_seen == 4


@pytest.mark.parametrize("size", [9, 12])
def test_every_sub_experience_advances_where_boundaries_are_unknown(tiny, size):
    watch, log = record("lr")
    lrs = [0.1, 0.2, 0.3, 0.4, 0.5]
    plugin = CLASSPPlugin(phases=[{"lr": lr} for lr in lrs])
    online = split_online_stream(tiny.train_stream, size, access_task_boundaries=False, seed=0)
    fit(naive(linear_head(), plugin, watch), online)
    parts = 3 * math.ceil(24 / size)
    assert log == [lrs[min(i, 4)] for i in range(parts)]


# --- consolidation --------------------------------------------------------------------------------


def test_consolidation_trains_like_a_hand_written_loop_that_multiplies(tiny):
    hyper = {"lr": 0.05, "epsilon": 1e-5, "power": 2.0}
    ends = []
    for consolidation in (1.0, 4.0):
        plain = linear_head()
        hand_written_loop(plain, epochs=1, consolidation=consolidation, **hyper)
        for strategy in (
            naive(linear_head(), CLASSPPlugin(**hyper, consolidation=consolidation)),
            CLASSP(model=linear_head(), **hyper, consolidation=consolidation, train_mb_size=BATCH),
        ):
            fit(strategy, tiny.train_stream)
            assert same(weights(strategy.model), weights(plain))
        ends.append(weights(plain))
    assert not same(*ends)


@pytest.mark.parametrize("known", [True, False])
def test_sub_experiences_are_consolidated_where_another_experience_begins(tiny, known):
    growths = []
    for size, drop_last in ((6, False), (5, True)):
        for consolidation in (1.0, 4.0):
            history = History()
            online = split_online_stream(
                tiny.train_stream,
                size,
                drop_last=drop_last,
                access_task_boundaries=known,
                seed=0,
            )
            # So small a step leaves the gradients as they are.
            plugin = CLASSPPlugin(lr=1e-12, epsilon=1e-5, power=1.0, consolidation=consolidation)
            fit(naive(linear_head(), plugin, history), online)
            growths.append([total(start) for start in history.starts])
    for once, multiplied in zip(growths[::2], growths[1::2], strict=True):
        expected = 0.0
        for i, added in enumerate((b - a for a, b in pairwise(once)), 1):
            expected += added
            if not known or i % 4 == 0:  # an experience has four parts
                expected *= 4
            assert multiplied[i] == pytest.approx(expected, rel=1e-4)


def test_an_interrupted_experience_that_begins_again_does_not_consolidate_again(tiny):
    def interrupt(strategy: Any) -> None:
        raise KeyboardInterrupt

    plugin = CLASSPPlugin(lr=0.1, consolidation=4.0)
    strategy = naive(linear_head(), plugin)
    fit(strategy, tiny.train_stream[:1])
    before = total(accumulators(strategy))
    strategy.plugins.append(On(before_training_iteration=interrupt))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            fit(strategy, tiny.train_stream[1:2])
        assert total(accumulators(strategy)) == 4 * before


@pytest.mark.parametrize(
    ("value", "error"), [(0.0, ValueError), (math.inf, ValueError), ("2", TypeError)]
)
def test_a_wrong_consolidation_is_refused_at_construction(value, error):
    with pytest.raises(error, match=f"consolidation must be .*{value}"):
        CLASSPPlugin(consolidation=value)


# --- accumulators survive -------------------------------------------------------------------------


class History(On):
    """Notes the accumulators at the start and at the end of each experience."""

    def __init__(self) -> None:
        self.starts: list[dict[str, Tensor]] = []
        self.ends: list[dict[str, Tensor]] = []
        super().__init__(
            before_training_epoch=lambda s: self.starts.append(accumulators(s)),
            after_training_exp=lambda s: self.ends.append(accumulators(s)),
        )


def fit_with_history(make_model: Any, plugins: Any, experiences: Any, between: Any = None) -> Any:
    """Train with CLASSP, and `between(strategy)` after each experience; return the History."""
    model, history = make_model(), History()
    strategy = naive(model, *plugins, history, optimizer=classp_over(model))
    for experience in experiences:
        fit(strategy, [experience])
        if between is not None:
            between(strategy)
    return history


def assert_grown(old: Tensor, new: Tensor) -> None:
    rows = len(old)
    assert old.any()
    assert len(new) > rows
    assert torch.equal(new[:rows], old)
    assert not new[rows:].any()


def is_lost(name: str, history: dict[str, Tensor]) -> bool:
    return name not in history or not history[name].any()


def rest(history: dict[str, Tensor], left_out: tuple[str, ...]) -> dict[str, Tensor]:
    return {name: a for name, a in history.items() if name not in left_out}


# (1) the reset before the first train()


def saved_state(tiny: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Tensor]]:
    """Return the states of a model and its optimizer after one experience, and the history."""
    model = growing_head()
    strategy = fit(naive(model, optimizer=classp_over(model)), tiny.train_stream[:1])
    return model.state_dict(), strategy.optimizer.state_dict(), accumulators(strategy)


def start_from(saved: Any, plugins: Any, *, eval_first: Any, experience: Any) -> Any:
    """Train a fresh strategy with the saved states; return its accumulators at the start."""
    model_state, optimizer_state, _ = saved
    model, history = growing_head(), History()
    optimizer = classp_over(model)
    model.load_state_dict(model_state)
    optimizer.load_state_dict(optimizer_state)
    strategy = naive(model, *plugins, history, optimizer=optimizer)
    if eval_first is not None:
        strategy.eval(eval_first)
    fit(strategy, [experience])
    return history.starts[0]


def test_a_loaded_history_survives_the_first_train(tiny):
    saved = saved_state(tiny)
    start = start_from(saved, [CLASSPPlugin()], eval_first=None, experience=tiny.train_stream[0])
    assert all(a.any() for a in start.values())
    assert same(start, saved[2])


@pytest.mark.parametrize("next_experience", [0, 1])
def test_a_loaded_history_survives_an_evaluation_before_the_first_train(tiny, next_experience):
    saved = saved_state(tiny)
    start = start_from(
        saved,
        [CLASSPPlugin()],
        eval_first=tiny.test_stream,
        experience=tiny.train_stream[next_experience],
    )
    assert same(rest(start, GROWING), rest(saved[2], GROWING))
    for name in GROWING:
        assert_grown(saved[2][name], start[name])


@pytest.mark.parametrize("eval_first", [False, True])
def test_without_the_plugin_the_first_train_loses_a_loaded_history(tiny, eval_first):
    stream = tiny.test_stream if eval_first else None
    start = start_from(saved_state(tiny), [], eval_first=stream, experience=tiny.train_stream[0])
    assert all(is_lost(name, start) for name in dict(growing_head().named_parameters()))


def test_training_can_be_continued_from_saved_states(tiny):
    unbroken = fit(naive(growing_head(), CLASSPPlugin()), tiny.train_stream)

    first = fit(naive(growing_head(), CLASSPPlugin()), tiny.train_stream[:1])
    model = growing_head()
    model.load_state_dict(first.model.state_dict())
    optimizer = classp_over(model)
    optimizer.load_state_dict(first.optimizer.state_dict())
    strategy = naive(model, CLASSPPlugin(), optimizer=optimizer)
    fit(strategy, tiny.train_stream[1:])
    assert same(weights(model), weights(unbroken.model))


# (2) a head that grows


def test_a_growing_head_keeps_the_old_rows_history_and_new_rows_start_at_zero(tiny):
    history = fit_with_history(growing_head, [CLASSPPlugin()], tiny.train_stream)
    for end, start in zip(history.ends, history.starts[1:], strict=False):
        assert same(rest(start, GROWING), rest(end, GROWING))
        for name in GROWING:
            assert_grown(end[name], start[name])


def test_without_the_plugin_a_growing_head_loses_its_history(tiny):
    history = fit_with_history(growing_head, [], tiny.train_stream)
    for end, start in zip(history.ends, history.starts[1:], strict=False):
        assert all(end[name].any() for name in GROWING)
        assert all(is_lost(name, start) for name in GROWING)


def test_the_kept_history_changes_what_is_learnt(tiny):
    with_plugin, without = growing_head(), growing_head()
    fit(naive(with_plugin, CLASSPPlugin(), optimizer=classp_over(with_plugin)), tiny.train_stream)
    fit(naive(without, optimizer=classp_over(without)), tiny.train_stream)
    assert not same(weights(with_plugin), weights(without))


# (3) one head per task

HEAD_0 = tuple(f"classifier.classifiers.0.classifier.{kind}" for kind in ("weight", "bias"))
HEAD_1 = tuple(f"classifier.classifiers.1.classifier.{kind}" for kind in ("weight", "bias"))


@pytest.fixture(scope="module")
def tasks() -> Any:
    """Task 0, task 1, and task 0 again with classes for which its head must grow."""
    return make_benchmark(CLASSES, tasks=[0, 1, 0])


@pytest.mark.parametrize("evaluate", [False, True])
def test_old_heads_and_the_body_keep_their_history_when_heads_are_added(tasks, evaluate):
    def between(strategy: Any) -> None:
        if evaluate:
            strategy.eval(tasks.test_stream)

    history = fit_with_history(many_heads, [CLASSPPlugin()], tasks.train_stream, between)
    _, start_1, start_2 = history.starts
    end_0, end_1, _ = history.ends

    assert all(end_0[name].any() for name in HEAD_0)
    assert all(is_lost(name, start_1) for name in HEAD_1)
    new_task = (*HEAD_0, *HEAD_1) if evaluate else HEAD_1
    assert same(rest(start_1, new_task), rest(end_0, new_task))
    if evaluate:  # it has seen task 0's later classes
        for name in HEAD_0:
            assert_grown(end_0[name], start_1[name])

    assert all(end_1[name].any() for name in HEAD_1)
    grown = () if evaluate else HEAD_0
    assert same(rest(start_2, grown), rest(end_1, grown))
    for name in grown:
        assert_grown(end_1[name], start_2[name])


def test_a_new_head_learns(tasks):
    history = fit_with_history(many_heads, [CLASSPPlugin()], tasks.train_stream[:2])
    assert all(history.ends[1][name].any() for name in HEAD_1)


def test_without_the_plugin_a_tasks_head_that_grows_later_loses_its_history(tasks):
    """New heads alone cost the old ones nothing in Avalanche 0.6; growth does."""
    history = fit_with_history(many_heads, [], tasks.train_stream)
    assert all(history.ends[1][name].any() for name in HEAD_0)
    assert all(is_lost(name, history.starts[2]) for name in HEAD_0)


# (4) evaluations that replace a head's tensors


def test_history_survives_evaluations_of_the_full_test_stream_between_experiences(tiny):
    shapes = []

    def evaluate(strategy: Any) -> None:
        strategy.eval(tiny.test_stream)
        shapes.append(strategy.model[2].classifier.weight.shape[0])

    history = fit_with_history(growing_head, [CLASSPPlugin()], tiny.train_stream, evaluate)
    assert shapes == [6, 6, 6]
    for name in GROWING:
        assert_grown(history.ends[0][name], history.starts[1][name])
    assert same(rest(history.starts[1], GROWING), rest(history.ends[0], GROWING))
    assert same(history.starts[2], history.ends[1])


def test_without_the_plugin_an_evaluation_between_experiences_costs_the_heads_history(tiny):
    def evaluate(strategy: Any) -> None:
        strategy.eval(tiny.test_stream)

    history = fit_with_history(growing_head, [], tiny.train_stream, evaluate)
    assert all(history.ends[0][name].any() for name in GROWING)
    assert all(is_lost(name, history.starts[1]) for name in GROWING)


class EvaluateOnce(On):
    """Evaluates in the middle of the first experience, which replaces the head's tensors."""

    def __init__(self, stream: Any, hook: str) -> None:
        self.stream = stream
        self.old: dict[str, Tensor] = {}
        self.new: dict[str, Tensor] = {}
        self.weights: dict[str, Tensor] = {}
        super().__init__(**{hook: self.evaluate})

    def evaluate(self, strategy: Any) -> None:
        if self.new or strategy.model[2].classifier.out_features > 2:
            return
        self.old = accumulators(strategy)
        strategy.eval(self.stream)
        assert strategy.model[2].classifier.out_features == 6
        self.new = accumulators(strategy)
        self.weights = weights(strategy.model)
        self.held = held_ids(strategy.optimizer)
        self.current = [[id(p) for p in strategy.model.parameters()]]


def test_history_survives_an_evaluation_in_the_middle_of_an_experience(tiny):
    model, evaluate = growing_head(), EvaluateOnce(tiny.test_stream, "after_training_iteration")
    strategy = naive(model, CLASSPPlugin(), evaluate, optimizer=classp_over(model))
    fit(strategy, tiny.train_stream[:1])

    assert evaluate.held == evaluate.current
    assert same(rest(evaluate.new, GROWING), rest(evaluate.old, GROWING))
    for name in GROWING:
        assert_grown(evaluate.old[name], evaluate.new[name])
        assert (weights(model)[name][:2] != evaluate.weights[name][:2]).all()
        assert (accumulators(strategy)[name][:2] > evaluate.new[name][:2]).all()


def test_without_the_plugin_an_evaluation_in_the_middle_of_an_experience_stops_the_head(tiny):
    model, evaluate = growing_head(), EvaluateOnce(tiny.test_stream, "after_training_iteration")
    strategy = naive(model, evaluate, optimizer=classp_over(model))
    fit(strategy, tiny.train_stream[:1])

    assert all(evaluate.old[name].any() for name in GROWING)
    assert all(is_lost(name, evaluate.new) for name in GROWING)
    assert all(torch.equal(weights(model)[name], evaluate.weights[name]) for name in GROWING)


@pytest.mark.parametrize(
    "hook",
    [
        "before_training_exp",
        "before_training_epoch",
        "before_update",
        "after_update",
        "after_training_epoch",
    ],
)
@pytest.mark.parametrize("first", ["classp", "other"])
def test_the_head_learns_on_wherever_another_plugin_evaluates(tiny, hook, first):
    model = growing_head()
    plugins = [CLASSPPlugin(), EvaluateOnce(tiny.test_stream, hook)]
    if first == "other":
        plugins.reverse()
    strategy = naive(model, *plugins, optimizer=classp_over(model), train_epochs=2)
    fit(strategy, tiny.train_stream[:1])
    assert held_ids(strategy.optimizer) == [[id(p) for p in model.parameters()]]
    evaluate = next(p for p in plugins if isinstance(p, EvaluateOnce))
    for name in GROWING:
        assert (weights(model)[name][:2] != evaluate.weights[name][:2]).all()


@pytest.mark.parametrize("eval_every", [0, 1])
def test_periodic_evaluation_does_not_change_what_is_learnt(tiny, eval_every):
    """With a head of fixed size an evaluation has no say in training at all."""
    quiet, evaluated = linear_head(), linear_head()
    fit(naive(quiet, CLASSPPlugin(), train_epochs=2), tiny.train_stream)
    strategy = naive(evaluated, CLASSPPlugin(), train_epochs=2, eval_every=eval_every)
    fit(strategy, tiny.train_stream, eval_streams=[tiny.test_stream])
    assert same(weights(quiet), weights(evaluated))


@pytest.mark.parametrize("eval_every", [0, 1])
def test_history_survives_periodic_evaluation(tiny, eval_every):
    model, history = growing_head(), History()
    strategy = naive(
        model, CLASSPPlugin(), history, optimizer=classp_over(model), eval_every=eval_every
    )
    fit(strategy, tiny.train_stream, eval_streams=[tiny.test_stream])
    assert same(history.starts[1], history.ends[0])
    assert same(history.starts[2], history.ends[1])
    assert all(history.ends[0][name][:2].all() for name in GROWING)


def test_an_evaluation_between_sub_experiences_leaves_the_head_learning(tiny):
    model, history = growing_head(), History()
    strategy = naive(model, CLASSPPlugin(), history, optimizer=classp_over(model))
    online = split_online_stream(tiny.train_stream, 10, access_task_boundaries=True, seed=0)
    for part in islice(online, 2):
        before = weights(model)
        fit(strategy, [part])
        strategy.eval(tiny.test_stream)
    for name in GROWING:
        assert_grown(history.ends[0][name], history.starts[1][name])
        assert (weights(model)[name][:2] != before[name][:2]).all()


# (5) two groups, one of them with a growing head


def fit_two_groups(plugins: Any, experiences: Any) -> tuple[Any, History]:
    model, history = growing_head(), History()
    optimizer = CLASSPOptimizer(two_groups(model))
    strategy = naive(model, *plugins, history, optimizer=optimizer)
    return fit(strategy, experiences), history


def test_a_head_that_grows_stays_in_its_group_with_its_history(tiny):
    strategy, history = fit_two_groups([CLASSPPlugin()], tiny.train_stream)
    body, head = strategy.model[0], strategy.model[2]
    assert held_ids(strategy.optimizer) == [
        [id(p) for p in body.parameters()],
        [id(p) for p in head.parameters()],
    ]
    assert values(strategy.optimizer, "lr") == [0.1, 0.2]
    for end, start in zip(history.ends, history.starts[1:], strict=False):
        assert same(rest(start, GROWING), rest(end, GROWING))
        for name in GROWING:
            assert_grown(end[name], start[name])


def test_without_the_plugin_a_group_whose_head_grows_loses_its_history(tiny):
    _, history = fit_two_groups([], tiny.train_stream)
    assert all(history.ends[0][name].any() for name in GROWING)
    assert all(is_lost(name, history.starts[1]) for name in GROWING)


# what is not kept


class ShrinkingHead(IncrementalClassifier):
    """Has as many outputs as the experience has classes."""

    @torch.no_grad()
    def adaptation(self, experience: Any) -> None:
        size = len(experience.classes_in_this_experience)
        if size != self.classifier.out_features:
            self.classifier = nn.Linear(HIDDEN, size)


def shrinking_head() -> nn.Module:
    torch.manual_seed(0)
    body = (nn.Linear(6, HIDDEN), nn.Tanh())
    return nn.Sequential(*body, ShrinkingHead(HIDDEN, initial_out_features=4, masking=False))


def test_a_head_that_shrinks_is_warned_about_and_starts_anew():
    benchmark = make_benchmark([(0, 1, 2, 3), (0, 1)])
    first, second = benchmark.train_stream
    model, history = shrinking_head(), History()
    strategy = naive(model, CLASSPPlugin(), history, optimizer=classp_over(model))
    fit(strategy, [first])
    with pytest.warns(UserWarning, match="changed its shape") as caught:
        fit(strategy, [second])

    messages = [str(w.message) for w in caught]
    assert [sum(name in m for m in messages) for name in GROWING] == [1, 1]
    assert all(is_lost(name, history.starts[1]) for name in GROWING)
    assert same(history.starts[1], rest(history.ends[0], GROWING))
    assert history.ends[1][GROWING[0]].shape == (2, HIDDEN)


def test_growth_is_not_warned_about(tiny):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*CLASSP")
        fit_with_history(growing_head, [CLASSPPlugin()], tiny.train_stream)


@pytest.mark.parametrize("make_model", [linear_head, growing_head])
def test_train_with_reset_optimizer_state_forgets_the_history(tiny, make_model):
    model, history = make_model(), History()
    strategy = naive(model, CLASSPPlugin(), history, optimizer=classp_over(model))
    fit(strategy, tiny.train_stream[:1])
    fit(strategy, tiny.train_stream[1:2], reset_optimizer_state=True)
    fit(strategy, tiny.train_stream[2:])
    assert all(a.any() for a in history.ends[0].values())
    assert all(is_lost(name, history.starts[1]) for name in history.ends[0])
    assert all(not is_lost(name, history.starts[2]) for name in history.ends[1])


# what is reset on purpose, and weights that are made anew


def restart(strategy: Any) -> None:
    """Give the model the weights that it had at first."""
    strategy.model.load_state_dict(linear_head().state_dict())


def initialize(strategy: Any) -> None:
    torch.manual_seed(5)
    for module in strategy.model:
        if isinstance(module, nn.Linear):
            module.reset_parameters()


def replace_model(strategy: Any) -> None:
    strategy.model = linear_head()


def load_best(strategy: Any) -> None:
    strategy.model.load_state_dict(strategy.best)


def average(strategy: Any) -> None:
    with torch.no_grad():
        for p, best in zip(strategy.model.parameters(), strategy.best.values(), strict=True):
            p.lerp_(best, 0.5)


def average_with_the_start(strategy: Any) -> None:
    strategy.best = linear_head().state_dict()
    average(strategy)


def reset_two_units(strategy: Any) -> None:
    with torch.no_grad():
        strategy.model[0].weight[:2] = 0
        strategy.model[0].bias[:2] = 0
        strategy.model[2].weight[:, :2] = 0
        strategy.model[2].bias[:2] = 0


def round_to_half(strategy: Any) -> None:
    strategy.model.half().float()


def copy_model(strategy: Any) -> None:
    strategy.model = copy.deepcopy(strategy.model)


def shrink(strategy: Any) -> None:
    with torch.no_grad():
        for p in strategy.model.parameters():
            p.mul_(0.99)


def after_one_more_epoch_by_hand(strategy: Any) -> None:
    x, y = make_data(CLASSES[0])
    for _ in range(3):
        strategy.optimizer.zero_grad()
        nn.functional.cross_entropy(strategy.model(x), y).backward()
        strategy.optimizer.step()


@pytest.mark.parametrize(
    ("hook", "change"),
    [
        *product(["between", "before_training", "before_training_exp"], [restart, initialize]),
        # Later Avalanche has made the optimizer's list of parameters.
        *product(["between", "before_training"], [replace_model]),
    ],
)
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_weights_made_anew_lose_their_history_with_one_line(tiny, change, hook, power):
    history = History()
    once = iter([False, True, False])
    again = On(**({} if hook == "between" else {hook: lambda s: next(once) and change(s)}))
    plugin = CLASSPPlugin(lr=0.01, epsilon=1e-3, power=power)
    strategy = naive(linear_head(), plugin, again, history, train_epochs=2)
    fit(strategy, tiny.train_stream[:1])
    if hook == "between":
        change(strategy)
    with pytest.warns(UserWarning, match="were made anew") as caught:
        fit(strategy, tiny.train_stream[1:2])
    assert len([w for w in caught if "made anew" in str(w.message)]) == 1
    assert all(is_lost(name, history.starts[2]) for name in history.ends[0])
    fit(strategy, tiny.train_stream[2:])
    assert same(history.starts[4], history.ends[1])


@pytest.mark.parametrize(
    "change",
    [
        load_best,
        average,
        average_with_the_start,
        reset_two_units,
        round_to_half,
        copy_model,
        shrink,
        after_one_more_epoch_by_hand,
        lambda strategy: None,
    ],
)
@pytest.mark.parametrize("experiences", [1, 2])
def test_weights_that_change_otherwise_keep_their_history(tiny, change, experiences):
    history = History()
    strategy = naive(linear_head(), CLASSPPlugin(lr=0.1), history, train_epochs=4)
    epochs: list[Any] = []
    note = On(before_training_epoch=lambda s: epochs.append(copy.deepcopy(s.model.state_dict())))
    strategy.plugins.append(note)
    fit(strategy, tiny.train_stream[:experiences])
    strategy.best = epochs[-3]
    before = len(history.starts)
    ends = accumulators(strategy)
    change(strategy)
    if change is after_one_more_epoch_by_hand:
        ends = accumulators(strategy)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(strategy, tiny.train_stream[2:])
    assert same(history.starts[before], ends)


def from_scratch(first: str, plugin: Any, **kwargs: Any) -> Any:
    plugins = [FromScratchTrainingPlugin(**kwargs), plugin]
    return plugins if first == "scratch" else plugins[::-1]


@pytest.mark.parametrize("first", ["classp", "scratch"])
@pytest.mark.parametrize("reset_optimizer", [True, False])
@pytest.mark.parametrize("strategy_class", [Naive, Cumulative])
@pytest.mark.filterwarnings("ignore:the weights of:UserWarning")
def test_training_from_scratch_has_no_history(tiny, first, reset_optimizer, strategy_class):
    history = History()
    plugins = from_scratch(first, CLASSPPlugin(lr=0.01), reset_optimizer=reset_optimizer)
    strategy = build(strategy_class, linear_head(), plugins=[*plugins, history])
    fit(strategy, tiny.train_stream)
    for start, end in zip(history.starts[1:], history.ends, strict=False):
        assert all(is_lost(name, start) for name in end)
    alone = build(strategy_class, linear_head(), plugins=[CLASSPPlugin(lr=0.01)])
    fit(alone, tiny.train_stream[:1])
    assert same(history.ends[0], accumulators(alone))


@pytest.mark.filterwarnings("ignore:the weights of:UserWarning")
def test_gdumb_and_a_growing_head_begin_without_history(tiny):
    for make_model in (linear_head, growing_head):
        history = History()
        strategy = build(GDumb, make_model(), plugins=[CLASSPPlugin(lr=0.01), history])
        fit(strategy, tiny.train_stream)
        for start, end in zip(history.starts[1:], history.ends, strict=False):
            assert all(is_lost(name, start) for name in end)


@pytest.mark.parametrize("first", ["classp", "other"])
@pytest.mark.parametrize("make_model", [linear_head, growing_head])
@pytest.mark.parametrize("how", ["clear", "new", "pop"])
def test_a_reset_by_a_plugin_stays_a_reset(tiny, first, make_model, how):
    def reset(strategy: Any) -> None:
        if how == "new":
            strategy.optimizer.state = defaultdict(dict)
        elif how == "clear":
            strategy.optimizer.state.clear()
        else:
            for p in strategy.model.parameters():
                strategy.optimizer.state.pop(p, None)

    history = History()
    plugins = [CLASSPPlugin(), On(before_training_exp=reset)]
    if first == "other":
        plugins.reverse()
    fit(naive(make_model(), *plugins, history), tiny.train_stream)
    for start in history.starts:
        assert not start


def test_a_reset_of_one_layer_is_of_that_layer(tiny):
    def reset(strategy: Any) -> None:
        strategy.optimizer.state.pop(strategy.model[0].weight, None)

    history = History()
    plugins = [On(before_training_exp=reset), CLASSPPlugin(), history]
    fit(naive(growing_head(), *plugins), tiny.train_stream[:2])
    assert "0.weight" not in history.starts[1]
    assert_grown(history.ends[0][GROWING[0]], history.starts[1][GROWING[0]])


# whether it was CLASSP that trained


class Accumulating(Naive):
    """Steps once in so many iterations."""

    every = 100
    count = 0

    def optimizer_step(self) -> None:
        self.count += 1
        if self.count % self.every == 0:
            super().optimizer_step()


class ByHand(Naive):
    def optimizer_step(self) -> None:
        with torch.no_grad():
            for p in self.model.parameters():
                p -= 0.1 * p.grad


def test_an_experience_without_a_step_is_warned_about(tiny):
    strategy = build(Accumulating, linear_head(), plugins=[CLASSPPlugin()])
    with pytest.warns(UserWarning, match=r"Accumulating has trained 3 iterations without one step"):
        fit(strategy, tiny.train_stream[:1])


def test_an_experience_with_few_steps_is_not(tiny):
    strategy = build(Accumulating, linear_head(), plugins=[CLASSPPlugin()])
    strategy.every = 3
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit(strategy, tiny.train_stream)


def test_training_without_the_optimizer_is_refused_in_the_first_experience(tiny):
    strategy = build(ByHand, linear_head(), plugins=[CLASSPPlugin()])
    with pytest.raises(RuntimeError, match="changed the weights without one step"):
        fit(strategy, tiny.train_stream[:1])


def test_no_epochs_are_no_matter(tiny):
    strategy = fit(naive(linear_head(), CLASSPPlugin(), train_epochs=0), tiny.train_stream)
    assert same(weights(strategy.model), weights(linear_head()))


def test_an_optimizer_replaced_after_the_first_epoch_began_is_refused(tiny):
    def replace(strategy: Any) -> None:
        strategy.optimizer = SGD(strategy.model.parameters(), lr=0.1)

    strategy = naive(linear_head(), CLASSPPlugin(), On(after_training_iteration=replace))
    with pytest.raises(ValueError, match="optimizer was replaced by SGD"):
        fit(strategy, tiny.train_stream[:1])


@pytest.mark.parametrize("phases", [None, [{"lr": 0.05}, {"lr": 0.02}]])
def test_packnets_plugin_resets_the_optimizer_beside_classp(phases):
    watch, log = record("lr")
    model = PackNetModel(linear_head())
    strategy = CLASSP(
        model=model,
        lr=0.1,
        phases=phases,
        plugins=[PackNetPlugin(1, 0.5), watch],
        train_epochs=2,
        train_mb_size=BATCH,
        evaluator=None,
    )
    before = weights(model)
    fit(strategy, make_benchmark(CLASSES[:2], tasks=[0, 1]).train_stream)
    assert not same(weights(model), before)
    assert total(accumulators(strategy)) > 0
    # The plugin before CLASSP's sees the phase from the second epoch on.
    assert log[1::2] == ([0.1, 0.1] if phases is None else [0.05, 0.02])


# one plugin, two strategies


def test_a_plugin_starts_afresh_with_a_strategy_of_another_model(tiny):
    watch, log = record("lr", "threshold")
    plugin = CLASSPPlugin(phases=[{"lr": 0.1}, {"lr": 0.2, "threshold": 1e-4}], consolidation=4.0)
    ends = []
    for _ in range(3):
        strategy = fit(naive(linear_head(), plugin, watch), tiny.train_stream[:2])
        ends.append(weights(strategy.model))
        assert plugin.experiences_seen == 2
    assert log == [(0.1, 0.0), (0.2, 1e-4)] * 3
    assert same(ends[0], ends[1])
    assert same(ends[0], ends[2])


def test_a_plugin_goes_on_with_a_strategy_of_the_same_model(tiny):
    plugin, model = CLASSPPlugin(phases=[{"lr": 0.1}, {"lr": 0.2}]), linear_head()
    first = fit(naive(model, plugin), tiny.train_stream[:1])
    started: dict[str, Tensor] = {}
    before = accumulators(first)
    note = On(before_training_epoch=lambda s: started.update(accumulators(s)))
    fit(naive(model, plugin, note), tiny.train_stream[1:2])
    assert plugin.experiences_seen == 2
    assert same(started, before)


# help


def test_help_explains_every_hyperparameter_and_its_default():
    for of in (CLASSPPlugin, CLASSP, CLASSPOptimizer):
        parameters = inspect.signature(of).parameters
        text = inspect.getdoc(of)
        for name, spec in SPECS.items():
            own = of is CLASSPPlugin and name == "lr"
            assert parameters[name].default == (None if own else spec.default)
            assert f"    {name}: {'For every' if own else spec.doc[:12]}" in text
        assert "{hyperparameters}" not in text
        assert "hyperparameters" not in parameters


def test_an_unknown_argument_is_refused():
    with pytest.raises(TypeError, match="treshold"):
        CLASSPPlugin(treshold=0.1)


@pytest.mark.parametrize("make_model", [linear_head, growing_head])
def test_a_history_of_gradients_goes_through_plugin_and_strategy(tiny, make_model):
    for strategy in (
        naive(make_model(), CLASSPPlugin(lr=0.05, history="gradients", rank=2)),
        CLASSP(model=make_model(), history="gradients", rank=2, evaluator=None),
    ):
        fit(strategy, tiny.train_stream)
        state = strategy.optimizer.state[strategy.model[0].weight]
        assert kind_of(state) is KINDS["gradients"]
        assert values(strategy.optimizer, "power") == [1.5]


def test_an_experience_interrupted_before_it_began_costs_no_history(tiny):
    model, history = growing_head(), History()
    stop = chain([False, True], repeat(False))

    def interrupt(strategy: Any) -> None:
        if next(stop):
            raise KeyboardInterrupt

    plugins = (On(before_training_exp=interrupt), CLASSPPlugin(), history)
    strategy = naive(model, *plugins, optimizer=classp_over(model))
    with pytest.raises(KeyboardInterrupt):
        fit(strategy, tiny.train_stream[:2])
    fit(strategy, tiny.train_stream[1:2])
    for name in GROWING:
        assert_grown(history.ends[0][name], history.starts[1][name])


# --- the plugin itself ----------------------------------------------------------------------------


def tensors_in(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [t for pair in value.items() for part in pair for t in tensors_in(part)]
    if isinstance(value, list | tuple | set):
        return [t for part in value for t in tensors_in(part)]
    return tensors_in(vars(value)) if hasattr(value, "__dict__") else []


@pytest.mark.parametrize("evaluate", [False, True])
def test_the_plugin_holds_no_tensors_between_experiences(tiny, evaluate):
    plugin = CLASSPPlugin(phases=[{"lr": 0.1}, {"lr": 0.2}])
    strategy = naive(growing_head(), plugin)
    for experience in tiny.train_stream:
        fit(strategy, [experience])
        if evaluate:
            strategy.eval(tiny.test_stream)
        held = {k: v for k, v in vars(plugin).items() if v is not strategy.optimizer}
        assert len(held) == len(vars(plugin)) - 1
        assert tensors_in(held) == []


def test_every_hook_is_one_that_avalanche_calls():
    hooks = [name for name in dir(CLASSPPlugin) if name.startswith(("before_", "after_"))]
    assert set(hooks) <= set(dir(SupervisedPlugin))
    own = [name for name in vars(CLASSPPlugin) if "before" in name or "after" in name]
    assert own
    assert set(own) <= set(hooks)


# --- copies ---------------------------------------------------------------------------------------


def through_dill(strategy: Any) -> Any:
    file = io.BytesIO()
    dill.dump(strategy, file)
    return dill.loads(file.getvalue())


def through_pickle(strategy: Any) -> Any:
    return pickle.loads(pickle.dumps(strategy))


COPIES = [copy.deepcopy, through_pickle, through_dill]


@pytest.mark.parametrize("make_copy", COPIES)
@pytest.mark.parametrize("make_optimizer", [classp_over, lambda m: SGD(m.parameters(), lr=0.1)])
def test_a_copied_strategy_trains_on_like_the_original(tiny, make_copy, make_optimizer):
    model = growing_head()
    plugin = CLASSPPlugin(phases=[{"threshold": 1e-4}, {"power": 2.0}])
    strategy = naive(model, plugin, optimizer=make_optimizer(model))
    fit(strategy, tiny.train_stream[:1])
    strategy.eval(tiny.test_stream)

    clone = make_copy(strategy)
    before = weights(clone.model)
    fit(strategy, tiny.train_stream[1:])
    assert same(weights(clone.model), before)
    fit(clone, tiny.train_stream[1:])
    assert not same(weights(clone.model), before)
    assert same(weights(clone.model), weights(strategy.model))
    assert same(accumulators(clone), accumulators(strategy))


@pytest.mark.parametrize("make_copy", COPIES)
def test_a_copied_plugin_goes_on_in_a_new_strategy(tiny, make_copy):
    plugin = CLASSPPlugin(threshold=1e-6, phases=[{"lr": 0.1}, {"lr": 0.05}])
    strategy = fit(naive(growing_head(), plugin), tiny.train_stream[:1])
    model, optimizer, copied = make_copy((strategy.model, strategy.optimizer, plugin))
    assert copied.experiences_seen == 1
    clone = naive(model, copied, optimizer=optimizer)
    fit(strategy, tiny.train_stream[1:])
    fit(clone, tiny.train_stream[1:])
    assert same(weights(model), weights(strategy.model))


class Average(SupervisedPlugin):
    """Evaluates the average of the weights in the model's place."""

    def __init__(self):
        super().__init__()
        self.kept = None

    def before_eval(self, strategy, **kwargs):
        self.kept, strategy.model = strategy.model, copy.deepcopy(strategy.model)

    def after_eval(self, strategy, **kwargs):
        strategy.model = self.kept


@pytest.mark.parametrize("first", [True, False])
def test_training_goes_on_beside_a_plugin_that_evaluates_another_model(tiny, first):
    log = []
    watch = On(after_training_epoch=lambda s: log.append(total(accumulators(s))))
    plugins = [CLASSPPlugin(), Average()] if first else [Average(), CLASSPPlugin()]
    strategy = naive(linear_head(), *plugins, watch, train_epochs=3, eval_every=1)
    fit(strategy, tiny.train_stream[:2])
    assert all(after > before for before, after in pairwise(log))
    assert held_ids(strategy.optimizer) == [[id(p) for p in strategy.model.parameters()]]


def test_another_optimizer_between_experiences_is_replaced_and_keeps_the_history(tiny):
    strategy = fit(naive(linear_head(), CLASSPPlugin(threshold=1e-3)), tiny.train_stream[:1])
    before = {name: a.clone() for name, a in accumulators(strategy).items()}
    strategy.optimizer = SGD(strategy.model.parameters(), lr=0.05)
    started = {}
    note = On(before_training_epoch=lambda s: started.update(copy.deepcopy(accumulators(s))))
    strategy.plugins.append(note)
    fit(strategy, tiny.train_stream[1:2])
    (group,) = strategy.optimizer.param_groups
    assert (group["lr"], group["threshold"]) == (0.05, 1e-3)
    assert same(before, started)


def test_a_scheduler_in_a_list_of_a_plugin_is_refused_too(tiny):
    strategy = naive(linear_head(), CLASSPPlugin())
    holder = SupervisedPlugin()
    holder.schedulers = [torch.optim.lr_scheduler.StepLR(strategy.optimizer, 1)]
    strategy.plugins.append(holder)
    with pytest.raises(ValueError, match=r"schedulers holds the SGD .* give it to StepLR"):
        strategy.train(tiny.train_stream[0])
