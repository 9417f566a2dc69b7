"""The methods: each in every scenario, against their formulas, and what they keep in memory.

For every break of Avalanche that experiments/avalanche_fixes.py mends there is a test of
Avalanche's own class that fails once the break is gone.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from functools import cache

import pytest
import torch
from avalanche.benchmarks import nc_benchmark
from avalanche.evaluation.metrics import accuracy_metrics
from avalanche.models import as_multitask
from avalanche.training import JointTraining, Naive, SynapticIntelligence
from avalanche.training.plugins import (
    EvaluationPlugin,
    LwFPlugin,
    MASPlugin,
    ReplayPlugin,
    RWalkPlugin,
)
from conftest import On, same, seed_everything, weights
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from avalanche_classp import CLASSPOptimizer
from experiments.errors import UserError
from experiments.protocol.avalanche_fixes import (
    FixedJointTraining,
    FixedLwFPlugin,
    FixedMASPlugin,
    FixedReplayPlugin,
    FixedRWalkPlugin,
    FixedSIPlugin,
)
from experiments.protocol.methods import METHODS
from experiments.protocol.tuned_settings import make_config
from experiments.running.memory import method_state_bytes

pytestmark = pytest.mark.filterwarnings("ignore")  # Avalanche's own

SCENARIOS = ("class", "domain", "task")
SIZE = 6
LR = 0.05
USUAL = [name for name, method in METHODS.items() if method.usual]
WITH_MATRICES = ["classp-consolidated"] + [
    name for name in METHODS if name.endswith("-matrix") and name not in USUAL
]
FAST = {method: {"lr": LR} for method in METHODS} | {
    "adam": {"lr": 0.01},
    "adagrad": {"lr": 0.02},
    "classp": {"lr": 0.03},
    "classp-inputs": {"lr": 0.5, "epsilon": 10.0},
}
"""Values with which the tiny benchmark is learnt in a few steps."""


# --- a tiny benchmark, models, the protocol -------------------------------------------------------


class Noise:
    """A random augmentation."""

    def __call__(self, image):
        return image + 0.2 * torch.randn_like(image)


def dataset(classes, per_class, seed):
    prototypes = torch.randn(classes, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(7))
    y = torch.arange(classes).repeat(per_class)
    noise = torch.randn(len(y), 3, SIZE, SIZE, generator=torch.Generator().manual_seed(seed))
    return TensorDataset(prototypes[y] + 0.3 * noise, y)


@cache
def images(scenario, experiences=3, per_class=16, augment=True):
    """Return images in experiences of two classes."""
    classes = 2 * experiences
    return nc_benchmark(
        dataset(classes, per_class, seed=0),
        dataset(classes, 6, seed=1),
        n_experiences=experiences,
        task_labels=scenario == "task",
        fixed_class_order=list(range(classes)),
        class_ids_from_zero_in_each_exp=scenario != "class",
        train_transform=Noise() if augment else None,
        eval_transform=None,
    )


class Mlp(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 16), nn.ReLU())
        self.classifier = nn.Linear(16, outputs)

    def forward(self, x):
        return self.classifier(self.body(x))


class ResNet(nn.Module):
    """A residual network with batch norm and dropout."""

    def __init__(self, outputs):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.5), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8, momentum=0.5), nn.ReLU()
        )
        self.dropout = nn.Dropout(0.2)
        self.classifier = nn.Linear(8 * (SIZE - 2) ** 2, outputs)

    def forward(self, x):
        x = self.stem(x)
        return self.classifier(self.dropout(torch.flatten(x + self.block(x), 1)))


def network(kind, scenario, experiences=3):
    torch.manual_seed(0)
    net = {"mlp": Mlp, "resnet": ResNet}[kind](2 * experiences if scenario == "class" else 2)
    labels = net.classifier.out_features
    net = as_multitask(net, "classifier") if scenario == "task" else net
    net.sizes = (3 * SIZE * SIZE, labels, scenario == "task")  # as make_model notes them
    return net


def arguments(**changes):
    """Return what every strategy is built with."""
    return {
        "criterion": nn.CrossEntropyLoss(),
        "train_mb_size": 8,
        "train_epochs": 3,
        "eval_mb_size": 64,
        "evaluator": EvaluationPlugin(accuracy_metrics(experience=True), loggers=[]),
        "eval_every": 0,
    } | changes


def build(method, net, hyper=(), **changes):
    values = METHODS[method].defaults | FAST[method] | dict(hyper)
    return METHODS[method].build(net, values, arguments(**changes))


def on_sgd(net, plugin, **changes):
    """Return a strategy with this plugin, Avalanche's or ours, on SGD."""
    plugins = changes.pop("plugins", [])
    sgd = torch.optim.SGD(net.parameters(), lr=LR)
    return Naive(model=net, optimizer=sgd, plugins=[plugin, *plugins], **arguments(**changes))


def parts(strategy, benchmark):
    """Return what the strategy is trained on, one after the other."""
    stream = benchmark.train_stream
    return [stream] if isinstance(strategy, JointTraining) else list(stream)


def follow(strategy, benchmark, evaluate=True, after=lambda strategy: None):
    """Evaluate, then train and evaluate again and again; return the accuracies after each.

    The order of the samples and what is drawn at random depend on the number of the part alone.
    """
    seed_everything(0)
    rows = [strategy.eval(benchmark.test_stream)] if evaluate else []
    for i, part in enumerate(parts(strategy, benchmark)):
        seed_everything(i)
        strategy.train(part, eval_streams=[])
        after(strategy)
        rows += [dict(strategy.eval(benchmark.test_stream))] if evaluate else []
    return [[v for k, v in row.items() if k.startswith("Top1_Acc_Exp/eval")] for row in rows]


def learnt(method, scenario, kind):
    """Return the accuracies and all tensors of the model after following the protocol."""
    strategy = build(method, network(kind, scenario))
    rows = follow(strategy, images(scenario))
    return rows, {name: t.clone() for name, t in strategy.model.state_dict().items()}


learnt_once = cache(learnt)


# --- every method in every scenario ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "resnet"])
@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("method", USUAL)
def test_every_method_learns_in_every_scenario(method, scenario, kind):
    rows, tensors = learnt_once(method, scenario, kind)
    assert [len(row) for row in rows] == [3] * (2 if method == "joint" else 4)
    current = rows[1] if method == "joint" else [rows[i + 1][i] for i in range(3)]
    assert min(current) > 0.7
    assert all(t.isfinite().all() for t in tensors.values())


@pytest.mark.parametrize("method", USUAL)
def test_the_same_seed_gives_the_same_weights(method):
    """With dropout, random augmentation, and samples that are stored at random."""
    rows, tensors = learnt(method, "task", "resnet")
    assert rows == learnt_once(method, "task", "resnet")[0]
    assert same(tensors, learnt_once(method, "task", "resnet")[1])


@pytest.mark.parametrize("method", USUAL)
def test_twenty_experiences_without_an_evaluation_between(method):
    """As a search does. Two steps for each experience, mini-batches smaller than the stream."""
    strategy = build(method, network("mlp", "task", 20), train_epochs=1)
    benchmark = images("task", experiences=20, per_class=8)
    follow(strategy, benchmark, evaluate=False)
    assert all(p.isfinite().all() for p in strategy.model.parameters())
    last = strategy.eval(benchmark.test_stream[-1:])
    assert last["Top1_Acc_Exp/eval_phase/test_stream/Task019/Exp019"] > 0.5


@pytest.mark.parametrize("method", WITH_MATRICES)
def test_with_matrices_a_baseline_is_ours_until_its_penalty_begins(method):
    """In the first experience no weight has an importance and no former model answers."""
    ends = {}
    for name in ("classp-matrix", method):
        seed_everything()
        strategy = build(name, network("mlp", "domain"))
        for experience in images("domain").train_stream[:2]:
            strategy.train(experience, eval_streams=[])
            ends.setdefault(name, []).append(weights(strategy.model))
        assert {group["rank"] for group in strategy.optimizer.param_groups} == {128}
    (ours, ours_later), (theirs, theirs_later) = ends.values()
    assert same(ours, theirs)
    assert not same(ours_later, theirs_later)


def test_the_defaults_learn_too():
    for method, spec in METHODS.items():
        scenario = "domain" if "domain" in spec.scenarios else "task"
        strategy = spec.build(network("mlp", scenario), spec.defaults, arguments(train_epochs=10))
        strategy.train(next(iter(images(scenario).train_stream)), eval_streams=[])
        accuracy = strategy.eval(images(scenario).test_stream[:1])
        assert min(v for k, v in accuracy.items() if "Acc_Exp/eval" in k) > 0.7, method


# --- hyper-parameters -----------------------------------------------------------------------------

NO_PENALTY = {
    "ewc": {"ewc_lambda": 0.0},
    "ewc-online": {"ewc_lambda": 0.0},
    "si": {"si_lambda": 0.0},
    "mas": {"lambda_reg": 0.0},
    "lwf": {"alpha": 0.0},
    "rwalk": {"ewc_lambda": 0.0},
    "replay": {"mem_size": 0},
}


# MAS lets batch norm learn on while it measures; LwF asks all heads again, and dropout with them.
@pytest.mark.parametrize(
    ("method", "kind"),
    [(m, "mlp" if m in ("mas", "lwf") else "resnet") for m in NO_PENALTY],
)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_without_its_penalty_a_method_is_plain_sgd(method, kind, scenario):
    strategy = build(method, network(kind, scenario), NO_PENALTY[method])
    follow(strategy, images(scenario))
    assert same(dict(strategy.model.state_dict()), learnt_once("naive", scenario, kind)[1])


@pytest.mark.parametrize(
    ("method", "hyper"),
    [
        ("adagrad", {"initial_accumulator_value": 0.1}),
        ("adam", {"beta1": 0.5}),
        ("adam", {"beta2": 0.9}),
        ("adam", {"eps": 0.1}),
        ("ewc", {"ewc_lambda": 1.0}),
        ("ewc-online", {"ewc_lambda": 1.0}),
        ("ewc-online", {"decay_factor": 0.1}),
        ("si", {"si_lambda": 100.0}),
        ("si", {"eps": 1.0}),
        ("mas", {"lambda_reg": 0.1}),
        ("mas", {"alpha": 0.9}),
        ("lwf", {"alpha": 0.1}),
        ("lwf", {"temperature": 1.0}),
        ("rwalk", {"ewc_lambda": 1.0}),
        ("rwalk", {"ewc_alpha": 0.1}),
        ("rwalk", {"delta_t": 2}),
        ("replay", {"mem_size": 3}),
        ("classp-matrix", {"threshold": 1e-3}),
        ("classp-matrix", {"epsilon": 1.0}),
        ("classp-matrix", {"power": 2.0}),
        ("classp-matrix", {"rank": 2}),
        ("classp-matrix", {"both_sides": True}),
        ("classp-consolidated", {"consolidation": 10.0}),
        ("classp-inputs", {"threshold": 1e-3}),
        ("classp-inputs", {"epsilon": 3.0}),
        ("classp-inputs", {"power": 2.0}),
        ("classp-inputs", {"rank": 2}),
        ("slda", {"shrinkage": 0.5}),
        ("ridge", {"penalty": 100.0}),
        ("ridge", {"width": 50}),
        ("ranpac", {"penalty": 100.0}),
        ("ranpac", {"width": 50}),
        ("owm", {"alpha": 0.01}),
        ("gpm", {"share": 0.85}),
        ("kfac-laplace", {"strength": 30.0}),
        ("ncm", {"alpha": 1.0}),
        ("fecam", {"alpha": 1.0}),
        ("lfl", {"lambda_e": 100.0}),
        ("packnet", {"prune": 0.9}),
        ("packnet", {"retrain": 0.9}),
        ("generative-replay", {"latent": 3}),
        ("generative-replay", {"generator_lr": 0.1}),
    ],
)
def test_every_hyper_parameter_has_an_effect(method, hyper):
    scenario = METHODS[method].scenarios[0]
    strategy = build(method, network("mlp", scenario), hyper)
    follow(strategy, images(scenario))
    with_default = learnt_once(method, scenario, "mlp")[1]
    assert not same(dict(strategy.model.state_dict()), with_default)


def test_every_hyper_parameter_of_the_baselines_is_tested_above():
    marks = test_every_hyper_parameter_has_an_effect.pytestmark
    cases = next(m.args[1] for m in marks if m.name == "parametrize")
    tested = {(method, key) for method, hyper in cases for key in hyper}
    for method in set(METHODS) - set(WITH_MATRICES) - {"classp"}:
        assert {(method, key) for key in METHODS[method].defaults if key != "lr"} <= tested


@pytest.mark.parametrize(
    ("method", "hyper", "message"),
    [
        ("adam", {"beta1": 1.0}, "adam: .*beta.*1.0"),
        ("ewc-online", {"decay_factor": 1.5}, "decay_factor must be from 0 to 1, got 1.5"),
        ("si", {"eps": 0.0}, "eps must be greater than 0, got 0.0"),
        ("mas", {"alpha": 2.0}, "alpha must be from 0 to 1, got 2.0"),
        ("lwf", {"temperature": 0.0}, "temperature must be greater than 0, got 0.0"),
        ("rwalk", {"ewc_alpha": 2.0}, "ewc_alpha must be from 0 to 1, got 2.0"),
        ("rwalk", {"delta_t": 0}, "delta_t must be at least 1, got 0"),
        ("replay", {"mem_size": -1}, "mem_size of replay must be at least 0, got -1"),
        ("lwf", {"ewc_lambda": 1.0}, "lwf has no hyper-parameter 'ewc_lambda'"),
    ],
)
def test_values_out_of_range_are_refused(method, hyper, message):
    with pytest.raises(UserError, match=message):
        make_config("split-digits", "class", method, 0, hyper)


# --- formulas -------------------------------------------------------------------------------------


class Record:
    """A plugin that keeps what was added to the loss, beside the model's weights then."""

    def __init__(self):
        self.added = []
        self.ends = []

    def after_backward(self, strategy, **kwargs):
        extra = strategy.loss.item() - strategy.criterion().item()
        entry = (strategy.clock.train_exp_counter, extra, weights(strategy.model))
        self.added.append((*entry, strategy.mb_x.clone()))

    def after_training_exp(self, strategy, **kwargs):
        self.ends.append(weights(strategy.model))


def recorded(method, scenario, hyper, **changes):
    """Return a strategy after the protocol, what was recorded, and its plugin's importances.

    The importances are copies, made after each experience.
    """
    record = Record()
    strategy = build(method, network("mlp", scenario), hyper, **changes)
    strategy.plugins.append(record)
    held = []
    follow(strategy, images(scenario), after=lambda s: held.append(importances(s.plugins[0])))
    return strategy, record, held


def importances(plugin):
    """Return the importances that the plugin penalises with in the next experience."""
    if isinstance(plugin, FixedSIPlugin):
        found = plugin.ewc_data[1]
    elif isinstance(plugin, FixedMASPlugin):
        found = plugin.importance
    elif isinstance(plugin, FixedRWalkPlugin):
        found = plugin.exp_penalties
    else:
        found = getattr(plugin, "importances", {0: {}})
        found = found[max(found)]
    return {name: entry.data.clone() for name, entry in found.items()}


def distance(importance, now, before):
    """Return Σ importance · (now − before)² over all weights."""
    return sum(
        (values.view_as(now[name]) * (now[name] - before[name]) ** 2).double().sum().item()
        for name, values in importance.items()
    )


@pytest.mark.parametrize("scenario", ["class", "task"])
@pytest.mark.parametrize(
    ("method", "hyper", "factor"),
    [
        ("ewc", {"ewc_lambda": 2.0}, 2.0),
        ("ewc-online", {"ewc_lambda": 2.0}, 2.0),
        ("si", {"si_lambda": 100.0}, 50.0),
        ("mas", {"lambda_reg": 0.01}, 0.01),
        ("rwalk", {"ewc_lambda": 0.5}, 0.5),
    ],
)
def test_the_penalty_is_added_once_and_holds_the_weights_to_the_last_experience(
    method, hyper, factor, scenario
):
    """Importance times the squared way from where the last experience ended; EWC: from each."""
    _, record, held = recorded(method, scenario, hyper)
    largest = 0.0
    for experience, extra, now, _ in record.added:
        before = range(experience) if method == "ewc" else range(experience)[-1:]
        expected = factor * sum(distance(held[i], now, record.ends[i]) for i in before)
        assert extra == pytest.approx(expected, rel=1e-3, abs=2e-6)
        largest = max(largest, expected)
    assert largest > 1e-4


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_lwf_adds_the_divergence_from_the_former_model_on_the_classes_it_knows(scenario):
    formers = []
    record = Record()
    strategy = build("lwf", network("mlp", scenario), {"alpha": 3.0, "temperature": 2.0})
    strategy.plugins.append(record)
    record.after_backward = lambda s, **kw: compare(s)

    def compare(s):
        extra = s.loss.item() - s.criterion().item()
        expected = 0.0
        for task in range(s.clock.train_exp_counter if scenario == "task" else 1):
            if not formers:
                break
            seen = 2 * s.clock.train_exp_counter if scenario == "class" else 2
            now, then = (
                (net(s.mb_x, task) if scenario == "task" else net(s.mb_x)).detach()[:, :seen] / 2
                for net in (s.model, formers[-1])
            )
            q = then.double().softmax(1)
            terms = q * (q.log() - now.double().log_softmax(1))
            expected += 3.0 * terms.sum(1).mean().item()
        assert extra == pytest.approx(expected, rel=1e-3, abs=2e-6)
        record.added.append(expected)

    def keep(s):
        formers.append(network("mlp", scenario))
        if scenario == "task":
            for experience in images("task").train_stream:
                formers[-1].classifier.adaptation(experience)
        formers[-1].load_state_dict(s.model.state_dict())

    follow(strategy, images(scenario), after=keep)
    assert max(record.added) > 1e-3


# Importances by hand, of a linear model in float64 (SI takes float32 alone) on images in a fixed
# order. Avalanche adds them up in float32.


class Path:
    """A plugin that keeps the weights before and after every step, and the gradients."""

    def __init__(self):
        self.steps = []

    def after_backward(self, strategy, **kwargs):
        gradients = {n: p.grad.clone() for n, p in strategy.model.named_parameters()}
        self.steps.append((strategy.clock.train_exp_counter, weights(strategy.model), gradients))

    def after_update(self, strategy, **kwargs):
        self.steps[-1] = (*self.steps[-1], weights(strategy.model))

    def of(self, experience, name):
        """Return gradients, weights before and weights after, each with a row for each step."""
        chosen = [(g[name], w[name], v[name]) for e, w, g, v in self.steps if e == experience]
        return tuple(torch.stack(rows) for rows in zip(*chosen, strict=True))


def regression(method, hyper, train_mb_size=8, plugin=None, dtype=torch.float64):
    """Train a linear model on two experiences; return the importances after each."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 6)).to(dtype)
    strategy = build(method, net, hyper, train_mb_size=train_mb_size)
    method_plugin = strategy.plugins[0]
    strategy.plugins.insert(0, plugin or Record())
    held = []
    for experience in list(exact_images(dtype).train_stream)[:2]:
        strategy.train(experience, eval_streams=[], shuffle=False)
        held.append(importances(method_plugin))
    return held


@cache
def exact_images(dtype=torch.float64):
    x, y = dataset(6, 16, seed=0).tensors
    data = TensorDataset(x.to(dtype), y)
    return nc_benchmark(data, data, n_experiences=3, task_labels=False, shuffle=False)


def exact_tensors(experience):
    """Return flat inputs with a one for the bias, and labels."""
    rows = [(x.flatten(), y) for x, y, _ in exact_images().train_stream[experience].dataset]
    x = torch.stack([x for x, _ in rows])
    return torch.cat([x, torch.ones(len(x), 1)], 1), torch.tensor([y for _, y in rows])


def affine(tensors):
    """Return weight and bias side by side, as the inputs of `exact_tensors` need them."""
    return torch.cat([tensors["1.weight"], tensors["1.bias"].unsqueeze(1)], 1).double()


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [("naive", "SGD"), ("adagrad", "Adagrad"), ("adam", "Adam")],
)
def test_a_plain_optimizer_keeps_its_state_from_experience_to_experience(method, optimizer):
    """As it is in a loop without Avalanche."""
    path = Path()
    regression(method, {}, plugin=path)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 6)).double()
    steps = getattr(torch.optim, optimizer)(net.parameters(), **FAST[method])
    for i in range(2):
        x, y = exact_tensors(i)
        for _ in range(3):
            for rows in torch.arange(len(y)).split(8):
                steps.zero_grad()
                functional.cross_entropy(net(x[rows, :-1]), y[rows]).backward()
                steps.step()
    _, _, _, end = path.steps[-1]
    torch.testing.assert_close(end, weights(net))


def test_ewcs_fisher_information_with_single_samples():
    """The mean over the samples of the squared gradient of −log p(label)."""
    ends = Record()
    held = regression("ewc", {"ewc_lambda": 0.1}, train_mb_size=1, plugin=ends)
    for i in range(2):
        x, y = exact_tensors(i)
        error = (x @ affine(ends.ends[i]).T).softmax(1) - functional.one_hot(y, 6)
        fisher = (error.unsqueeze(2) * x.unsqueeze(1)).square().mean(0)
        torch.testing.assert_close(affine(held[i]), fisher, rtol=1e-5, atol=1e-9)


def test_online_ewcs_old_importances_fade():
    separate = regression("ewc", {"ewc_lambda": 0.0})
    online = regression("ewc-online", {"ewc_lambda": 0.0, "decay_factor": 0.25})
    torch.testing.assert_close(online[0], separate[0])
    faded = 0.25 * affine(separate[0]) + affine(separate[1])
    torch.testing.assert_close(affine(online[1]), faded)


def test_mas_importance():
    """The mean over mini-batches of |d mean(‖output‖²) / d weight|, mixed with the one before."""
    ends = Record()
    held = regression("mas", {"lambda_reg": 0.01, "alpha": 0.3}, plugin=ends)
    expected = 0.0
    for i in range(2):
        x, _ = exact_tensors(i)
        batches = [(2 * (b @ affine(ends.ends[i]).T).T @ b / len(b)).abs() for b in x.split(8)]
        new = torch.stack(batches).mean(0)
        expected = new if i == 0 else 0.3 * expected + 0.7 * new
        torch.testing.assert_close(affine(held[i]), expected, rtol=1e-5, atol=1e-7)


def test_si_importance():
    """Summed over the experiences: the fall of the loss along the path, over (way² + eps)."""
    path = Path()
    held = regression("si", {"si_lambda": 0.0, "eps": 100.0}, plugin=path, dtype=torch.float32)
    for name in ("1.weight", "1.bias"):
        total = 0.0
        for i in range(2):
            gradient, before, after = (t.double() for t in path.of(i, name))
            fall = -(gradient * (after - before)).sum(0)
            total = total + fall / ((after[-1] - before[0]) ** 2 + 100.0)
            expected = total.clamp(max=0.001).flatten()
            torch.testing.assert_close(held[i][name].double(), expected, rtol=1e-4, atol=1e-9)
            if name == "1.weight":
                assert 0.1 < (expected < 0.001).double().mean() < 1


def test_rwalk_penalty():
    """EWC++'s importance and the path's score, each as a part of its largest."""
    path, share = Path(), 0.6
    hyper = {"ewc_lambda": 0.0, "ewc_alpha": share, "delta_t": 5}
    held = regression("rwalk", hyper, plugin=path)
    names = ("1.weight", "1.bias")
    fisher, scores = dict.fromkeys(names), dict.fromkeys(names)
    steps = 0
    for i in range(2):
        for name in names:
            gradient, before, after = path.of(i, name)
            score = torch.zeros_like(before[0])
            fall, start, t = torch.zeros_like(score), before[0], steps
            for g, w, v in zip(gradient, before, after, strict=True):
                old = fisher[name]
                fisher[name] = g**2 if old is None else share * g**2 + (1 - share) * old
                fall = fall - g * (v - w)
                t += 1
                if t % 5 == 0:
                    way = (v - start) ** 2
                    score += fall / (fisher[name] * way / 2 + torch.finfo(torch.float32).eps)
                    fall, start = torch.zeros_like(score), v
            scores[name] = score if scores[name] is None else (scores[name] + score) / 2
        steps = t
        most = max(f.max() for f in fisher.values())
        best = max(s.max() for s in scores.values())
        for name in names:
            expected = fisher[name] / most + scores[name].relu() / best
            torch.testing.assert_close(held[i][name].double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_replay_stores_as_much_of_each_experience_and_trains_on_it(scenario):
    batches = []
    strategy = build("replay", network("mlp", scenario), {"mem_size": 24})
    strategy.plugins.append(On(before_forward=lambda s: batches.append((s.mb_x, s.mb_y))))
    follow(strategy, images(scenario, augment=False))
    groups = strategy.plugins[0].storage_policy.buffer_groups
    assert [len(group.buffer) for group in groups.values()] == [8, 8, 8]
    known = [
        {x.numpy().tobytes() for x, *_ in experience.dataset}
        for experience in images(scenario, augment=False).train_stream
    ]
    for experience, group in groups.items():
        assert {x.numpy().tobytes() for x, *_ in group.buffer} <= known[experience]
    # 3 experiences of 3 epochs with 4 mini-batches of 8, from the second on with stored ones.
    assert [len(y) for _, y in batches] == [8] * 12 + [16] * 24
    for i, (x, _) in enumerate(batches):
        old = sum(image.numpy().tobytes() not in known[i // 12] for image in x)
        assert old == (0 if i < 12 else 8)


@pytest.mark.parametrize(
    ("method", "key", "factor"),
    [
        ("ewc", "ewc_lambda", 2),
        ("ewc-online", "ewc_lambda", 2),
        ("si", "si_lambda", 1),
        ("mas", "lambda_reg", 2),
        ("rwalk", "ewc_lambda", 2),
    ],
)
def test_a_large_penalty_holds_the_important_weights(method, key, factor):
    """As large as gradient descent bears: one step takes the most important weight back home."""
    moved = []
    for strength in (0.0, 1.0):
        strategy = build(method, network("mlp", "class"), {key: 0.0}, train_epochs=6)
        first, second, _ = images("class", augment=False).train_stream
        strategy.train(first, eval_streams=[])
        importance = importances(strategy.plugins[0])
        start = weights(strategy.model)
        largest = max(t.max().item() for t in importance.values())
        set_strength(strategy.plugins[0], strength / (factor * LR * largest))
        seed_everything(1)
        strategy.train(second, eval_streams=[])
        moved.append(distance(importance, weights(strategy.model), start))
    assert moved[1] < 0.3 * moved[0]


def set_strength(plugin, value):
    if isinstance(plugin, FixedSIPlugin):
        plugin.si_lambda = [value]
    elif isinstance(plugin, FixedMASPlugin):
        plugin._lambda = value
    else:
        plugin.ewc_lambda = value


# --- what Avalanche's own classes do wrong --------------------------------------------------------


def mended(fix):
    return f"Avalanche has mended this: {fix.__name__} in experiments/avalanche_fixes.py can go"


def fails_as_it_did(error, function, fix):
    """Check that the function still raises this error."""
    try:
        with warnings.catch_warnings(record=True):
            function()
    except error:
        return
    pytest.fail(mended(fix))


def test_avalanches_si_finds_no_importance_on_a_cpu():
    def importance(strategy):
        follow(strategy, images("class"))
        return strategy.plugins[0].ewc_data[1]

    net = network("mlp", "class")
    sgd = torch.optim.SGD(net.parameters(), lr=LR)
    stock = SynapticIntelligence(model=net, optimizer=sgd, si_lambda=100.0, eps=0.1, **arguments())
    assert not any(entry.data.any() for entry in importance(stock).values()), mended(FixedSIPlugin)
    assert same(dict(net.state_dict()), learnt_once("naive", "class", "mlp")[1])

    ours = importance(build("si", network("mlp", "class"), {"si_lambda": 100.0, "eps": 0.1}))
    assert all((entry.data > 0).any() for entry in ours.values())


def test_si_leaves_batch_norm_free():
    strategy = build("si", network("resnet", "task"))
    follow(strategy, images("task"))
    held = set(strategy.plugins[0].ewc_data[1])
    norms = {n for n, p in strategy.model.named_parameters() if ".stem.1" in n or ".block.1" in n}
    assert len(norms) == 4
    assert held == {n for n, _ in strategy.model.named_parameters()} - norms


def losses_of_zero(plugin):
    """Train on two experiences, the second with a loss that is 0 and a gradient that is not."""
    net = network("mlp", "domain")
    strategy = on_sgd(net, plugin)
    first, second, _ = images("domain", augment=False).train_stream
    strategy.train(first, eval_streams=[])
    strategy._criterion = lambda output, y: 1e-3 * (output.sum() - output.sum().detach())
    seed_everything(1)
    strategy.train(second, eval_streams=[])
    return weights(net)


def test_avalanches_mas_fails_where_the_loss_is_zero():
    fails_as_it_did(ValueError, lambda: losses_of_zero(MASPlugin()), FixedMASPlugin)
    assert same(losses_of_zero(FixedMASPlugin(lambda_reg=0.0)), losses_of_zero(On()))


def test_avalanches_lwf_keeps_a_former_model_with_dropout():
    x = torch.randn(4, 3, SIZE, SIZE)
    for plugin, steady in ((LwFPlugin(1.0, 2.0), False), (FixedLwFPlugin(1.0, 2.0), True)):
        follow(on_sgd(network("resnet", "domain"), plugin), images("domain"))
        former = plugin.lwf.prev_model
        assert torch.equal(former(x), former(x)) == steady, mended(FixedLwFPlugin)


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_avalanches_rwalk_trains_in_evaluation_mode(scenario):
    for plugin, expected in ((RWalkPlugin(), False), (FixedRWalkPlugin(), True)):
        modes = set()
        watch = On(before_forward=lambda s, modes=modes: modes.add(s.model.training))
        strategy = on_sgd(network("resnet", scenario), plugin, plugins=[watch])
        follow(strategy, images(scenario))
        norms = [m for m in strategy.model.modules() if isinstance(m, nn.BatchNorm2d)]
        assert modes == {expected}, mended(FixedRWalkPlugin)
        assert all(norm.running_mean.any() == expected for norm in norms)


def test_avalanches_rwalk_does_not_know_a_new_head():
    def train(plugin):
        strategy = on_sgd(network("mlp", "task"), plugin)
        follow(strategy, images("task"), evaluate=False)
        return strategy

    fails_as_it_did(KeyError, lambda: train(RWalkPlugin()), FixedRWalkPlugin)
    assert all(p.isfinite().all() for p in train(FixedRWalkPlugin()).model.parameters())


def test_avalanches_rwalk_divides_by_zero_in_a_short_experience():
    """12 steps for each experience are fewer than delta_t: no weight has a score."""

    def penalties(plugin):
        strategy = on_sgd(network("mlp", "class"), plugin)
        strategy.train(images("class").train_stream[0], eval_streams=[])
        return plugin.exp_penalties, plugin.iter_importance

    stock, _ = penalties(RWalkPlugin(delta_t=100))
    assert all(entry.data.isnan().all() for entry in stock.values()), mended(FixedRWalkPlugin)
    ours, fisher = penalties(FixedRWalkPlugin(delta_t=100))
    most = max(entry.data.max() for entry in fisher.values())
    for name, entry in ours.items():
        torch.testing.assert_close(entry.data, fisher[name].data / most)


def test_rwalk_without_any_gradient_penalises_nothing():
    plugin = FixedRWalkPlugin(delta_t=5)
    strategy = on_sgd(network("mlp", "domain"), plugin)
    strategy._criterion = lambda output, y: output.sum() * 0
    strategy.train(images("domain").train_stream[0], eval_streams=[])
    assert not any(entry.data.any() for entry in plugin.exp_penalties.values())


def test_avalanches_replay_warns_in_every_experience():
    for plugin, expected in ((ReplayPlugin(9), 3), (FixedReplayPlugin(9), 0)):
        strategy = on_sgd(network("mlp", "class"), plugin)
        with warnings.catch_warnings(record=True) as shown:
            warnings.simplefilter("ignore")
            follow(strategy, images("class"))
        deprecated = [w for w in shown if "update" in str(w.message)]
        assert len(deprecated) == expected, mended(FixedReplayPlugin)


def test_avalanches_replay_fails_with_a_tiny_buffer():
    def train(plugin):
        strategy = on_sgd(network("mlp", "task", 5), plugin, train_epochs=1)
        follow(strategy, images("task", experiences=5))
        return plugin.storage_policy

    fails_as_it_did(AttributeError, lambda: train(ReplayPlugin(1)), FixedReplayPlugin)
    for size in (0, 1, 3, 6):
        policy = train(FixedReplayPlugin(size))
        assert len(policy.buffer) == size
        assert max(policy.buffer_groups, default=0) == max(0, min(size, 5) - 1)


def joint(strategy_class, experiences=3, **changes):
    net = network("mlp", "task", experiences)
    sgd = torch.optim.SGD(net.parameters(), lr=LR)
    return strategy_class(model=net, optimizer=sgd, **arguments(**changes))


def test_avalanches_joint_training_cannot_be_evaluated_before():
    stream = images("task").test_stream
    fails_as_it_did(KeyError, lambda: joint(JointTraining).eval(stream), FixedJointTraining)
    strategy = joint(FixedJointTraining)
    follow(strategy, images("task"))
    assert len(strategy.model.classifier.classifiers) == 3
    held = {id(p) for group in strategy.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in strategy.model.parameters()}


def test_avalanches_joint_training_refuses_mini_batches_smaller_than_the_number_of_tasks():
    def train(strategy_class):
        strategy = joint(strategy_class, train_mb_size=2)
        tasks = []
        strategy.plugins.append(On(before_forward=lambda s: tasks.append(s.mb_task_id)))
        follow(strategy, images("task"), evaluate=False)
        return tasks

    fails_as_it_did(AssertionError, lambda: train(JointTraining), FixedJointTraining)
    tasks = train(FixedJointTraining)
    assert {len(batch) for batch in tasks} == {2}
    # 32 samples of each task once in each of 3 epochs, in mixed order.
    epochs = torch.cat(tasks).view(3, 96)
    assert [epoch.bincount().tolist() for epoch in epochs] == [[32, 32, 32]] * 3
    assert not torch.equal(epochs[0], epochs[0].sort().values)


# --- memory ---------------------------------------------------------------------------------------


MLP = 3 * SIZE * SIZE * 16 + 16 + 16 * 6 + 6
"""Numbers in the MLP with a head for six classes."""

RESNET = 3 * 8 * 9 + 8 + 8 * 8 * 9 + 8 + 8 * 16 * 6 + 6
"""Numbers in the convolutions and the head of the residual network."""

NORMS = 2 * 2 * 8
"""Numbers in its batch norm; there are as many statistics, and two counters of 8 bytes."""


SAMPLE = 3 * SIZE * SIZE * 4 + 8
"""Bytes of an image and its label."""


@pytest.mark.parametrize(
    ("method", "mlp", "resnet"),
    [
        ("naive", [0] * 3, [0] * 3),
        # A sum for each number, a step count for each tensor.
        ("adagrad", [4 * MLP + 4 * 4] * 3, [4 * (RESNET + NORMS) + 4 * 10] * 3),
        # Two moments.
        ("adam", [8 * MLP + 4 * 4] * 3, [8 * (RESNET + NORMS) + 4 * 10] * 3),
        # Weights and importances: for each experience, or once.
        ("ewc", [8 * MLP * k for k in (1, 2, 3)], [8 * (RESNET + NORMS) * k for k in (1, 2, 3)]),
        ("ewc-online", [8 * MLP] * 3, [8 * (RESNET + NORMS)] * 3),
        ("mas", [8 * MLP] * 3, [8 * (RESNET + NORMS)] * 3),
        # Weights, importances, weights before the last step, the path's sum and the sums' sum.
        ("si", [20 * MLP] * 3, [20 * RESNET] * 3),
        # The former model.
        ("lwf", [4 * MLP] * 3, [4 * (RESNET + 2 * NORMS) + 2 * 8] * 3),
        # The last experience's weights, importances, scores and penalties; weights, fall of the
        # loss and scores since the last checkpoint; weights and gradients of the last step.
        ("rwalk", [36 * MLP] * 3, [36 * (RESNET + NORMS)] * 3),
        # The buffer of 200 has room for all samples, 32 of each experience.
        ("replay", [k * 32 * SAMPLE for k in (1, 2, 3)], [k * 32 * SAMPLE for k in (1, 2, 3)]),
        ("joint", [0], [0]),
        ("classp", [4 * MLP] * 3, [4 * (RESNET + NORMS)] * 3),
    ],
)
def test_state_is_counted_to_the_byte(method, mlp, resnet):
    for kind, expected in (("mlp", mlp), ("resnet", resnet)):
        strategy = build(method, network(kind, "class"))
        assert counted_bytes(strategy, images("class")) == expected
        # An evaluation leaves it as it is.
        assert method_state_bytes(strategy) == expected[-1]


def counted_bytes(strategy, benchmark):
    """Return the bytes after each experience."""
    counted = []
    follow(strategy, benchmark, after=lambda s: counted.append(method_state_bytes(s)))
    return counted


BODY = 3 * SIZE * SIZE * 16 + 16
HEAD = 16 * 2 + 2
"""Numbers in the parts of the MLP with a head of two classes for each task."""

ALL = BODY + 3 * HEAD


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # Heads without a gradient yet have no moments, and no sums.
        ("adagrad", [4 * (BODY + k * HEAD) + 4 * (2 + 2 * k) for k in (1, 2, 3)]),
        ("adam", [8 * (BODY + k * HEAD) + 4 * (2 + 2 * k) for k in (1, 2, 3)]),
        ("ewc", [8 * ALL * k for k in (1, 2, 3)]),
        ("ewc-online", [8 * ALL] * 3),
        ("mas", [8 * ALL] * 3),
        ("si", [20 * ALL] * 3),
        # Each head has a mask of two bytes, and its classifier another.
        ("lwf", [4 * ALL + 3 * 2 * 2] * 3),
        # Gradients, importances and penalties of the current head alone.
        ("rwalk", [36 * (BODY + HEAD) + 24 * 2 * HEAD] * 3),
    ],
)
def test_state_of_all_heads_is_counted(method, expected):
    strategy = build(method, network("mlp", "task"))
    assert counted_bytes(strategy, images("task")) == expected


@pytest.mark.parametrize("size", [0, 7])
def test_a_replay_buffer_is_counted_as_the_model_gets_it(size):
    """Digits of 64 numbers, stored as bytes that a transform makes floats of."""
    digits = TensorDataset(torch.zeros(20, 64, dtype=torch.uint8), torch.arange(20) % 4)
    benchmark = nc_benchmark(
        digits,
        digits,
        n_experiences=2,
        task_labels=False,
        train_transform=torch.Tensor.float,
        eval_transform=torch.Tensor.float,
    )
    strategy = build("replay", nn.Linear(64, 4), {"mem_size": size})
    follow(strategy, benchmark)
    assert method_state_bytes(strategy) == size * (64 * 4 + 8)


def test_counting_draws_nothing_at_random():
    strategy = build("replay", network("mlp", "class"))
    follow(strategy, images("class"))
    before = torch.get_rng_state()
    method_state_bytes(strategy)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_not_the_methods_is_not_counted():
    """A plugin may refer to anything, also to itself."""
    net = network("mlp", "class")
    plugin = FixedMASPlugin()
    strategy = on_sgd(net, plugin)
    follow(strategy, images("class"))
    counted = method_state_bytes(strategy)
    plugin.strategy, plugin.me, plugin.evaluator = strategy, plugin, strategy.evaluator
    plugin.model, plugin.dataset = strategy.model, images("class").train_stream[0].dataset
    plugin.loader = torch.utils.data.DataLoader(plugin.dataset)
    plugin.views = [plugin.params["classifier.weight"].data[:2], plugin.me]
    plugin.views.append(plugin.views)
    strategy.evaluator.kept = torch.zeros(1000)
    strategy.mbatch = [torch.zeros(1000)]
    assert method_state_bytes(strategy) == counted == 8 * MLP
    plugin.more = {"a": (torch.zeros(10), {"b": nn.Linear(3, 1)})}
    assert method_state_bytes(strategy) == counted + 4 * (10 + 4)


# --- the list -------------------------------------------------------------------------------------


def test_methods_are_listed_from_the_plainest_to_ours():
    assert " ".join(METHODS) == (
        "naive adagrad adam ewc ewc-online si mas lwf rwalk replay joint classp classp-matrix "
        "classp-inputs classp-consolidated class-means slda ridge ranpac owm gpm "
        "kfac-laplace ncm fecam lfl cwr packnet generative-replay "
        "ewc-matrix si-matrix mas-matrix lwf-matrix"
    )
    for spec in METHODS.values():
        assert 0 < len(spec.description) < 90
        assert "\n" not in spec.description


def test_classps_defaults_are_the_librarys():
    (group,) = CLASSPOptimizer([torch.ones(1, requires_grad=True)]).param_groups
    defaults = dict(METHODS["classp"].defaults)
    assert defaults.pop("paper_phases") is False
    assert defaults == {key: group[key] for key in defaults}
    assert set(defaults) == {"lr", "threshold", "epsilon", "power", "apply_decay"}


@pytest.mark.slow
def test_names_are_there_without_torch_or_avalanche():
    program = (
        "import sys\n"
        "from experiments.protocol import benchmarks, methods, models, tuned_settings\n"
        "print([name for name in ('torch', 'avalanche', 'numpy', 'optuna') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
