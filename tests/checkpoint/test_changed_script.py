"""A script that was edited between two starts, and what a run that goes on says."""

import time
import uuid
from pathlib import Path

import pytest
import torch
from avalanche.training import EWC, Naive
from avalanche.training.plugins import EWCPlugin, LRSchedulerPlugin
from checkpoint_runs import StoppedError, Stopper, same
from conftest import (
    BATCH,
    FEATURES,
    SGD,
    On,
    build,
    growing_head,
    linear_head,
    make_benchmark,
    naive,
    seed_everything,
    weights,
)
from torch import nn

from avalanche_classp import CLASSP, CheckpointError, CLASSPOptimizer, CLASSPPlugin, checkpointed

parametrize = pytest.mark.parametrize
BENCHMARK = make_benchmark()
STREAM = BENCHMARK.train_stream


def run(strategy, folder, stop=None, stream=STREAM, **kwargs):
    """Train to the end or until a number of iterations, and return the strategy."""
    seed_everything(0)
    stopper = Stopper()
    strategy.plugins.append(stopper)
    stopper.left = float("inf") if stop is None else stop
    for experience in checkpointed(stream, strategy, folder, **kwargs):
        strategy.train(experience)
    return strategy


def stopped(strategy, folder, stop=4, **kwargs):
    with pytest.raises(StoppedError):
        run(strategy, folder, stop, **kwargs)


def sgd(lr=0.1, model=linear_head, plugins=(), momentum=0.0, of=Naive, **kwargs):
    built = model()
    optimizer = SGD(built.parameters(), lr=lr, momentum=momentum)
    return build(of, built, optimizer=optimizer, plugins=list(plugins), **kwargs)


def adam(**kwargs):
    model = linear_head()
    return naive(model, optimizer=torch.optim.Adam(model.parameters(), **kwargs))


def classp(lr=0.1, phases=None, **kwargs):
    if phases is not None:
        kwargs["phases"] = phases
    return CLASSP(model=linear_head(), lr=lr, train_mb_size=BATCH, evaluator=None, **kwargs)


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 9), nn.Tanh(), nn.Linear(9, 6))


def dropping(p):
    return lambda: nn.Sequential(nn.Dropout(p), linear_head())


def scheduled(gamma):
    def make(model=linear_head):
        built = model()
        optimizer = SGD(built.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma)
        return build(Naive, built, optimizer=optimizer, plugins=[LRSchedulerPlugin(scheduler)])

    return make()


def two_groups(lr):
    model = linear_head()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": lr}]
    return naive(model, optimizer=SGD(groups, lr=0.1))


def with_optimizer(**values):
    model = linear_head()
    optimizer = CLASSPOptimizer(model.parameters(), **values)
    return CLASSP(model=model, optimizer=optimizer, train_mb_size=BATCH, evaluator=None)


CHANGES = {
    "lr": (sgd, {"lr": 0.1}, {"lr": 0.01}, r"param_groups\[0\]\['lr'\] was 0.1 and is 0.01"),
    "momentum": (sgd, {}, {"momentum": 0.9}, r"\['momentum'\] was 0.0 and is 0.9"),
    "betas": (adam, {}, {"betas": (0.5, 0.9)}, r"betas'\] was \(0.9, 0.999\) and is \(0.5, 0.9\)"),
    "epochs": (sgd, {"train_epochs": 1}, {"train_epochs": 2}, r"train_epochs was 1 and is 2"),
    "batch": (sgd, {}, {"train_mb_size": 4}, r"strategy\.train_mb_size was 8 and is 4"),
    "eval batch": (sgd, {}, {"eval_mb_size": 4}, r"eval_mb_size was 8 and is 4"),
    "eval_every": (sgd, {}, {"eval_every": 1}, r"eval_every was -1 and is 1"),
    "dropout": (sgd, {"model": dropping(0.1)}, {"model": dropping(0.2)}, r"p was 0.1 and is 0.2"),
    "CLASSP lr": (
        classp,
        {"lr": 0.1},
        {"lr": 0.2},
        r"strategy\.optimizer\.param_groups\[0\]\['lr'\] was 0.1 and is 0.2",
    ),
    "CLASSP power": (classp, {"power": 1.0}, {"power": 2.0}, r"power'\] was 1.0 and is 2.0"),
    "phases": (
        classp,
        {"phases": [{"lr": 0.1}, {"lr": 0.2}]},
        {"phases": [{"lr": 0.1}, {"lr": 0.3}]},
        r"phases\[1\]\['lr'\] was 0.2 and is 0.3",
    ),
    "number of phases": (
        classp,
        {"phases": [{"lr": 0.1}, {"lr": 0.2}]},
        {"phases": [{"lr": 0.1}]},
        r"phases\) was 2 and is 1",
    ),
    "ewc_lambda": (
        sgd,
        {"of": EWC, "ewc_lambda": 1.0},
        {"of": EWC, "ewc_lambda": 2.0},
        r"ewc_lambda was 1.0 and is 2.0",
    ),
    "scheduler": (scheduled, {"gamma": 0.5}, {"gamma": 0.7}, r"\['gamma'\] was 0.5 and is 0.7"),
    "second group": (
        two_groups,
        {"lr": 0.1},
        {"lr": 0.2},
        r"groups\[1\]\['lr'\] was 0.1 and is 0.2",
    ),
    "optimizer of one's own": (
        with_optimizer,
        {"lr": 0.1, "threshold": 0.0},
        {"lr": 0.1, "threshold": 0.1},
        r"\['threshold'\] was 0.0 and is 0.1",
    ),
}


@parametrize("change", CHANGES)
def test_a_changed_number_is_refused_and_named(tmp_path, change):
    make, then, now, says = CHANGES[change]
    stopped(make(**then), tmp_path)
    with pytest.raises(CheckpointError, match=says) as caught:
        run(make(**now), tmp_path)
    message = str(caught.value)
    assert "00000001.checkpoint" in message and "\n" not in message
    assert 'on_change="script"' in message and "name another folder to start anew" in message
    # As it was it goes on; each of the others is refused once more, with the old values written.
    assert same(weights(run(make(**then), tmp_path).model), weights(whole(make, then)))


def whole(make, arguments):
    seed_everything(0)
    strategy = make(**arguments)
    seed_everything(0)
    for experience in STREAM:
        strategy.train(experience)
    return strategy.model


@parametrize("change", CHANGES)
def test_going_on_with_the_old_numbers_on_purpose(tmp_path, change):
    make, then, now, _ = CHANGES[change]
    stopped(make(**then), tmp_path)
    found = run(make(**now), tmp_path, on_change="checkpoint")
    assert same(weights(found.model), weights(whole(make, then)))
    with pytest.raises(CheckpointError):  # not forgotten
        run(make(**now), tmp_path)


@parametrize("change", CHANGES)
def test_going_on_with_the_new_numbers_on_purpose(tmp_path, change):
    make, then, now, _ = CHANGES[change]
    stopped(make(**then), tmp_path)
    found = run(make(**now), tmp_path, stop=10**6, on_change="script")
    # The new numbers are those of its later checkpoints.
    run(make(**now), tmp_path)
    with pytest.raises(CheckpointError):
        run(make(**then), tmp_path)
    fresh = make(**now)
    for name in ("train_epochs", "train_mb_size", "eval_mb_size"):
        assert getattr(found, name) == getattr(fresh, name)
    if change in ("lr", "momentum", "second group", "CLASSP lr", "CLASSP power"):
        for group, new in zip(
            found.optimizer.param_groups, fresh.optimizer.param_groups, strict=True
        ):
            assert {k: v for k, v in group.items() if k != "params" and k in new} == {
                k: v for k, v in new.items() if k != "params"
            }


def test_the_new_lr_is_what_a_resumed_run_trains_with(tmp_path):
    stopped(sgd(lr=0.1), tmp_path)
    after_one = sgd(lr=0.1)
    seed_everything(0)
    after_one.train(STREAM[0])
    after_one.optimizer.param_groups[0]["lr"] = 0.01
    for experience in STREAM[1:]:
        after_one.train(experience)
    found = run(sgd(lr=0.01), tmp_path, on_change="script")
    assert same(weights(found.model), weights(after_one.model))


def test_more_epochs_within_an_experience(tmp_path):
    stopped(sgd(train_epochs=2), tmp_path, every_epochs=1)
    found = run(sgd(train_epochs=4), tmp_path, on_change="script", every_epochs=1)
    assert found.clock.train_iterations == 3 * 4 * 3
    assert found.train_epochs == 4


@parametrize("on_change", ["refuse", "script"])
def test_another_shape_is_refused_and_named(tmp_path, on_change):
    stopped(sgd(), tmp_path)
    says = r"_parameters\['weight'\] was of shape \(5, 6\) and is of shape \(9, 6\)"
    with pytest.raises(CheckpointError, match=says) as caught:
        run(sgd(model=wide), tmp_path, on_change=on_change)
    assert 'on_change="checkpoint"' in str(caught.value)
    found = run(sgd(model=wide), tmp_path, on_change="checkpoint")
    assert same(weights(found.model), weights(whole(sgd, {})))


def test_a_hyperparameter_that_only_a_later_release_has_is_no_change(tmp_path):
    class Later(SGD):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            if new:
                self.param_groups[0]["new"] = 1.0
                self.version = 2

        def state_dict(self):
            return {**super().state_dict(), "version": 1 + new}

    def make():
        model = linear_head()
        return naive(model, optimizer=Later(model.parameters(), lr=0.1))

    new = False
    stopped(make(), tmp_path)
    new = True
    run(make(), tmp_path)


def test_a_head_that_grew_is_no_change(tmp_path):
    stopped(sgd(model=growing_head), tmp_path, stop=7)
    found = run(sgd(model=growing_head), tmp_path)
    assert same(weights(found.model), weights(whole(sgd, {"model": growing_head})))


class Stamped(On):
    """What a careful user notes: another time, name and random number at each start."""

    def __init__(self, name):
        self.name = name
        self.started = time.time()
        self.id = uuid.uuid4().hex
        self.folder = Path("runs") / self.id
        self.python = torch.Generator().manual_seed(int(self.started * 1e6) % 2**30)


def test_a_stream_of_another_length_is_refused(tmp_path):
    stopped(sgd(), tmp_path)
    with pytest.raises(CheckpointError, match=r"len\(stream\) was 3 and is 2"):
        run(sgd(), tmp_path, stream=STREAM[:2])
    assert run(sgd(), tmp_path, stream=STREAM[:2], on_change="script").clock.train_exp_counter == 2


def test_two_streams_with_a_folder_each(tmp_path):
    def make():
        model = growing_head()
        optimizer = SGD(model.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
        plugins = [LRSchedulerPlugin(scheduler, reset_scheduler=False, reset_lr=False)]
        return build(Naive, model, optimizer=optimizer, plugins=plugins)

    def both(folder, stop=None):
        strategy = make()
        stopper = Stopper()
        strategy.plugins.append(stopper)
        stopper.left = float("inf") if stop is None else stop
        seed_everything(0)
        for name, stream in (("a", STREAM[:2]), ("b", STREAM)):
            for experience in checkpointed(stream, strategy, folder / name):
                strategy.train(experience)
        return weights(strategy.model)

    with pytest.raises(StoppedError):
        both(tmp_path / "stopped", stop=10)
    assert same(both(tmp_path / "stopped"), both(tmp_path / "whole"))


def test_times_and_names_are_no_reason_to_refuse(tmp_path):
    stopped(sgd(plugins=[Stamped("a")]), tmp_path)
    plugin = Stamped("b")
    with pytest.warns(
        UserWarning, match=r"name was 'a' and is 'b'.*The old values go on"
    ) as caught:
        run(sgd(plugins=[plugin]), tmp_path)
    assert len([w for w in caught if "script" in str(w.message)]) == 1 and plugin.name == "a"


def test_a_name_of_the_script_can_go_on(tmp_path, recwarn):
    stopped(sgd(plugins=[Stamped("a")]), tmp_path)
    plugin = Stamped("b")
    run(sgd(plugins=[plugin]), tmp_path, on_change="script")
    assert plugin.name == "b" and not [w for w in recwarn if "old values" in str(w.message)]


@parametrize("make", [sgd, classp, lambda: sgd(plugins=[EWCPlugin(1.0), CLASSPPlugin(lr=0.1)])])
def test_an_unchanged_script_warns_of_nothing(tmp_path, make, recwarn):
    stopped(make(), tmp_path, every_epochs=1)
    run(make(), tmp_path)
    assert not [w for w in recwarn if "script" in str(w.message)]


def test_a_bad_value_of_on_change(tmp_path):
    with pytest.raises(
        ValueError, match="on_change must be one of refuse, script, checkpoint, got"
    ):
        checkpointed(STREAM, sgd(), tmp_path, on_change="new")


# --- what is said ---------------------------------------------------------------------------------


def test_a_first_start_says_nothing(tmp_path, capsys):
    run(sgd(), tmp_path)
    assert capsys.readouterr().err == ""


def test_a_run_that_goes_on_says_from_where(tmp_path, capsys):
    stopped(sgd(train_epochs=3), tmp_path, stop=14, every_epochs=1)
    run(sgd(train_epochs=3), tmp_path, every_epochs=1)
    assert capsys.readouterr().err == (
        f"Resuming from {tmp_path}/00000004.checkpoint: 1 of 3 experiences done, and 1 epoch of "
        f"the next\n"
    )


def test_a_run_with_nothing_left_says_so(tmp_path, capsys):
    run(sgd(), tmp_path)
    run(sgd(), tmp_path)
    assert capsys.readouterr().err == (
        f"Nothing left to train: {tmp_path}/00000003.checkpoint has 3 of 3 experiences done; name "
        f"another folder to start anew\n"
    )


def test_a_stream_without_a_length(tmp_path, capsys):
    for _ in range(2):
        run(sgd(), tmp_path, stream=(experience for experience in STREAM))
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "Nothing left to train" in err and "3 experiences done" in err


# --- counting and pairing -------------------------------------------------------------------------


def test_experiences_are_counted_and_paired_inside(tmp_path):
    valid = BENCHMARK.valid_stream

    def pairs(strategy):
        stream = zip(STREAM, valid, strict=True)
        for i, (train, other) in checkpointed(enumerate(stream), strategy, tmp_path):
            yield i, train.current_experience, other.current_experience
            strategy.train(train)

    begun = pairs(sgd())
    assert [next(begun), next(begun)] == [(0, 0, 0), (1, 1, 1)]
    begun.close()
    assert list(pairs(sgd())) == [(1, 1, 1), (2, 2, 2)]
