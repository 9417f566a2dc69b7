"""Bad input of the API: it works, or one clear error names it, and nothing has been changed."""

import copy
import math
from contextlib import suppress
from functools import partial

import pytest
import torch
from bad_input import JUNK, NUMBERS, anything, attempt, changed, examples
from conftest import linear_head, make_data, naive
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import Parameter

from avalanche_classp import (
    CLASSP,
    CLASSPOptimizer,
    CLASSPPlugin,
    NonFiniteGradientError,
    carry_accumulators,
    classp_metrics,
    in_memory,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own
parametrize = pytest.mark.parametrize

NAMES = ("lr", "threshold", "epsilon", "power", "apply_decay", "maximize", "nonfinite", "foreach")
NAMES += ("fused",)
PATHS = [{"fused": False}, {"foreach": False}, {"foreach": True}, {}, {"fused": True}]
"""Blocks, loop, foreach; the kernel where there is one."""


def parameter(*shape):
    return Parameter(torch.ones(*shape or (2, 3)))


def kept(optimizer):
    """Return all that a failed call must leave as it was."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = [optimizer.state.get(p, {}).get("accumulator") for p in params]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    return copy.deepcopy(([p.detach() for p in params], state, groups))


def same(one, other):
    pairs = [*zip(one[0], other[0], strict=True), *zip(one[1], other[1], strict=True)]
    equal = all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)
    return equal and repr(one[2]) == repr(other[2])


# Hyper-parameters


def works(optimizer):
    """Take steps: what was accepted must do, and never spoil an accumulator."""
    for g in (0.5, -1e-3, 0.0, 1e4):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, g)
        with suppress(NonFiniteGradientError):
            optimizer.step()
    for group in optimizer.param_groups:
        for p in group["params"]:
            accumulator = optimizer.state[p].get("accumulator", torch.zeros(1))
            assert accumulator.isfinite().all() and (accumulator >= 0).all()


def build_optimizer(name, value):
    works(CLASSPOptimizer([parameter()], **{name: value}))


def build_group(name, value):
    works(CLASSPOptimizer([{"params": [parameter()], name: value}]))


def add_group(name, value):
    optimizer = CLASSPOptimizer([parameter()])
    try:
        optimizer.add_param_group({"params": [parameter()], name: value})
    except (TypeError, ValueError):
        assert len(optimizer.param_groups) == 1
        raise
    works(optimizer)


def give_plugin(name, value):
    plugin = CLASSPPlugin(**{name: value})
    works(plugin.make_optimizer([parameter()]))


def give_phase(name, value):
    CLASSPPlugin(phases=[{}, {name: value}])


@parametrize("place", [build_optimizer, build_group, add_group, give_plugin, give_phase])
def test_a_hyper_parameter_of_any_value_works_or_is_named(place):
    for name in NAMES:
        if place is give_plugin and name == "maximize":
            continue
        for value in JUNK:
            attempt(partial(place, name, value), name)


@given(name=st.sampled_from(NAMES), value=anything, path=st.sampled_from(PATHS))
@examples(400)
def test_a_hyper_parameter_of_a_generated_value_works_or_is_named(name, value, path):
    group = {"params": [parameter()], **path, name: value}
    attempt(lambda: works(CLASSPOptimizer([group])), name)


@given(phases=anything | st.lists(st.dictionaries(st.sampled_from([*NAMES, "", "x"]), anything)))
@examples(200)
def test_phases_of_any_kind_work_or_are_named(phases):
    attempt(lambda: CLASSPPlugin(phases=phases), "phases")


# Parameters and gradients

PARAMS = [
    *(None, 5, "x", [], [None], [5], [[]], [{}], [{"lr": 0.1}], [{"params": None}]),
    *([{"params": 5}], [{"params": [5]}], {"params": [1]}, torch.ones(2), ...),
    *([torch.ones(2).int()], [torch.ones(2, dtype=torch.cfloat)], [("a", None)]),
    *([torch.ones(2).to(torch.float8_e4m3fn)], [parameter().sum()], [(1, 2, 3)]),
    *([parameter(), 3], [{"params": {parameter()}}]),
]


@parametrize("params", PARAMS, ids=repr)
def test_what_are_no_parameters_is_refused(params):
    assert not attempt(lambda: CLASSPOptimizer(params))
    optimizer = CLASSPOptimizer([parameter()])
    assert not attempt(lambda: optimizer.add_param_group(params))
    if not isinstance(params, torch.Tensor) and params != []:
        assert not attempt(lambda: optimizer.add_param_group({"params": params}))
    assert len(optimizer.param_groups) == 1


@given(group=st.dictionaries(st.sampled_from(["params", "lr", "fused", "foreach", "x"]), anything))
@examples(100)
def test_a_group_of_any_kind_works_or_is_refused(group):
    optimizer = CLASSPOptimizer([parameter()])
    before = len(optimizer.param_groups)
    if not attempt(lambda: optimizer.add_param_group(group)):
        assert len(optimizer.param_groups) == before


SHAPES = [(), (1,), (3,), (5,), (40000,), (1, 3), (2, 3), (3, 2), (0,)]


@parametrize("path", PATHS, ids=repr)
def test_data_replaced_by_another_shape_is_refused_before_anything_is_written(path):
    """A kernel knows no shapes: it would read and write beyond the tensors."""
    for old in SHAPES:
        for new in SHAPES:
            for stale in ("gradient", "accumulator"):
                first, p = parameter(1), Parameter(torch.ones(old))
                optimizer = CLASSPOptimizer([first, p], **path)
                first.grad, p.grad = torch.ones(1), torch.ones(old)
                if stale == "accumulator":
                    optimizer.step()
                p.data = torch.ones(new)
                if stale == "accumulator":
                    p.grad = torch.ones(new)
                before = kept(optimizer)
                done = attempt(optimizer.step, "shape", errors=(RuntimeError,))
                assert done is (old == new)
                assert done or same(kept(optimizer), before)


@parametrize("path", PATHS, ids=repr)
@parametrize("nonfinite", ["raise", "skip"])
def test_gradients_of_any_value_leave_everything_finite(path, nonfinite):
    for value in [x for x in NUMBERS if isinstance(x, float)]:
        for power in (1.0, 2.0, 0.5, 3.0):
            p = parameter()
            optimizer = CLASSPOptimizer([p], power=power, nonfinite=nonfinite, **path)
            dense = torch.full((2, 3), value, dtype=torch.float64).float()
            for g in (dense, dense.to_sparse()):
                p.grad = g
                before = kept(optimizer)
                done = attempt(optimizer.step, "non-finite", errors=(NonFiniteGradientError,))
                assert done or (same(kept(optimizer), before) and nonfinite == "raise")
            assert all(v["accumulator"].isfinite().all() for v in optimizer.state.values())
            assert p.isfinite().all()


def test_a_closure_of_any_kind_is_called_or_refused():
    for closure in JUNK:
        attempt(lambda closure=closure: CLASSPOptimizer([parameter()]).step(closure))


# Saved state


def trained(power=1.0, **matrix):
    shapes = [(2, 3), (3,), (0,)]
    groups = [{"params": [parameter(*s) for s in shapes]}, {"params": [parameter(4)], "lr": 0.5}]
    optimizer = CLASSPOptimizer(groups, power=power, **matrix)
    for group in groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer


BAD_ACCUMULATORS = [
    torch.full((2, 3), math.nan),
    torch.full((2, 3), math.inf),
    torch.full((2, 3), -1e-9),
    torch.ones(2, 3, dtype=torch.cfloat),
    torch.ones(2, 3, dtype=torch.int64),
    torch.ones(2, 3, dtype=torch.bool),
    torch.ones(2, 3).to_sparse(),
    torch.ones(2, 3, device="meta"),
    torch.ones(3, 2),
    torch.ones(6),
    None,
    1.0,
    [[1.0] * 3] * 2,
]


def load(state_dict):
    """Load it, and see that it works; if it is refused nothing has been changed."""
    optimizer = trained(power=2.0)
    before = kept(optimizer)
    if attempt(lambda: optimizer.load_state_dict(state_dict), "state"):
        works(optimizer)
        return True
    assert same(kept(optimizer), before)
    return False


def test_a_damaged_accumulator_is_refused():
    for accumulator in BAD_ACCUMULATORS:
        state = trained().state_dict()
        state["state"][0]["accumulator"] = accumulator
        assert not load(state)


def test_a_damaged_sketch_is_refused():
    good = trained(history="gradients", rank=2, both_sides=True).state_dict()["state"][0]
    for key in good:
        for value in (*BAD_ACCUMULATORS, torch.ones(2, 2), torch.full((), -1.0)):
            state = trained(history="gradients", rank=2, both_sides=True).state_dict()
            state["state"][0][key] = value
            as_good = torch.is_tensor(value) and key.endswith("sketch")
            if as_good and value.shape == good[key].shape and value.isfinite().all():
                continue
            assert not load(state)


@given(data=st.data())
@examples(300)
def test_a_damaged_state_is_refused_or_works(data):
    load(changed(data, trained().state_dict(), anything | st.sampled_from(BAD_ACCUMULATORS)))


def test_what_is_no_state_is_refused():
    for value in JUNK:
        assert not load(value)
    for version in (-1, 4, True, None, "1", math.nan, 10**30):
        assert not load({**trained().state_dict(), "version": version})
    sgd = torch.optim.SGD([parameter()], lr=0.1)
    assert not load(sgd.state_dict())
    for ids in ([0, 0, 1], [0, 1, 7], [0, 1], [0, 1, 2, 3], [None, 1, 2], ["a", "b", "c"], "abc"):
        state = trained().state_dict()
        state["param_groups"][0]["params"] = ids
        assert not load(state)


def carry(old=None, new=None, old_optimizer=None, new_optimizer=None):
    small, large = nn.Linear(2, 2), nn.Linear(2, 3)
    optimizers = CLASSPOptimizer(small.parameters()), CLASSPOptimizer(large.parameters())
    small(torch.ones(1, 2)).sum().backward()
    optimizers[0].step()
    return carry_accumulators(
        optimizers[0] if old_optimizer is None else old_optimizer,
        small.named_parameters() if old is None else old,
        optimizers[1] if new_optimizer is None else new_optimizer,
        large.named_parameters() if new is None else new,
    )


PAIRS = [*JUNK, [("a",)], [("a", "b")], [(1, 2, 3)], [None], ["ab"], [("w", [])], nn.Linear(2, 2)]
PAIRS += [list(nn.Linear(2, 2).parameters()), nn.Linear(2, 2).state_dict()]


def test_what_is_no_model_has_nothing_to_carry():
    for named in PAIRS:
        if named is not None:
            attempt(lambda named=named: carry(old=named), "old_named")
            attempt(lambda named=named: carry(new=named), "new_named")
            assert not attempt(lambda named=named: carry(old_optimizer=named), "old_optimizer")
            assert not attempt(lambda named=named: carry(new_optimizer=named), "new_optimizer")


# Metrics, strategy, data


@given(
    arguments=st.dictionaries(
        st.sampled_from(
            ["minibatch", "epoch", "experience", "per_layer", "quantiles", "free_share"]
        ),
        anything | st.just(True) | st.lists(st.floats()),
        min_size=1,
    )
)
@examples(150)
def test_metrics_of_any_arguments_are_made_or_refused(arguments):
    attempt(lambda: classp_metrics(**arguments), "nothing to emit", *arguments)


def strategy_with(**arguments):
    usual = {"model": linear_head(), "evaluator": None, "train_mb_size": 4}
    return CLASSP(**(usual | arguments))


ARGUMENTS = ("model", "criterion", "optimizer", "train_mb_size", "train_epochs", "eval_mb_size")
ARGUMENTS += ("plugins", "evaluator", "eval_every", "phases", "consolidation", *NAMES)


def test_a_strategy_of_any_arguments_is_made_or_names_them():
    for name in ARGUMENTS:
        if name == "maximize":
            continue
        for value in JUNK:
            if not callable(value):  # what a user's function raises is the user's
                attempt(partial(strategy_with, **{name: value}), name)
    for name in ("maximize", "learning_rate", "treshold"):
        assert not attempt(partial(strategy_with, **{name: 1}), name)


@given(st.dictionaries(st.sampled_from(ARGUMENTS), anything, min_size=1, max_size=2))
@examples(150)
def test_a_strategy_of_generated_arguments_is_made_or_names_them(arguments):
    attempt(partial(strategy_with, **arguments), *arguments, "unexpected")


def stream(*parts):
    from avalanche.benchmarks import tensors_benchmark

    return tensors_benchmark(list(parts), [make_data([0, 1])], task_labels=[0] * len(parts))


def samples(count, label=None):
    x, y = make_data([0, 1], per_class=count)
    x, y = x[:count], y[:count]
    return (x, y if label is None else torch.full_like(y, label))


@parametrize("way", [lambda benchmark: benchmark, in_memory], ids=["stock", "in memory"])
def test_data_of_any_kind_is_learnt_or_refused(way):
    whole = samples(8)
    kinds = {
        "one sample": ([samples(1)], {}, None),
        "batch larger than the data": ([samples(3)], {"train_mb_size": 10**6}, None),
        "huge batch": ([samples(3)], {"train_mb_size": 2**62}, None),
        "an empty experience": ([whole, samples(0), whole], {}, "experience 1 has no samples"),
        "nothing but empty": ([samples(0)], {}, "experience 0 has no samples"),
        "label out of range": ([samples(1, 6)], {}, "out of bounds"),
        "label below zero": ([samples(1, -1)], {}, "out of bounds"),
        "NaN": ([(whole[0] * math.nan, whole[1])], {}, "non-finite"),
        "infinity": ([(whole[0] * math.inf, whole[1])], {}, "non-finite"),
        "too many features": ([(torch.ones(2, 9), whole[1][:2])], {}, "shapes"),
        "fractions for labels": ([(whole[0], whole[1] + 0.5)], {}, "target"),
    }
    errors = (ValueError, NonFiniteGradientError, IndexError, RuntimeError)  # torch's own, too
    for parts, arguments, message in kinds.values():
        for strategy in (strategy_with(**arguments), naive(linear_head(), CLASSPPlugin())):
            benchmark = way(stream(*parts))
            before = kept(strategy.optimizer)
            learnt = []

            def train(strategy=strategy, benchmark=benchmark, learnt=learnt):
                for experience in benchmark.train_stream:
                    strategy.train(experience)
                    learnt.append(experience)
                strategy.eval(benchmark.test_stream)

            done = attempt(train, message or "", errors=errors)
            assert done is (message is None)
            if not learnt:
                after = kept(strategy.optimizer)
                assert all(map(torch.equal, after[0], before[0]))
                assert all(a is None or not a.any() for a in after[1])


def test_what_is_no_benchmark_is_refused():
    for value in JUNK:
        assert not attempt(lambda value=value: in_memory(value), "benchmark")
        if not isinstance(value, bool):
            benchmark = stream(samples(1))
            call = partial(in_memory, benchmark, deterministic=value)
            assert not attempt(call, "deterministic")
