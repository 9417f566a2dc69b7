"""CLASSPPlugin in every strategy that Avalanche exports: it trains, or there is one clear refusal.

A strategy that a later Avalanche exports appears here by itself. If it needs more than a model, an
optimizer, a criterion and arguments with defaults it fails until it has an entry in ``NEEDS``.
"""

from __future__ import annotations

import contextlib
import inspect
import io
from collections.abc import Callable
from typing import Any

import avalanche.training
import avalanche.training.supervised
import numpy as np
import pytest
import torch
from avalanche.benchmarks import tensors_benchmark
from avalanche.models import PNN, ExpertGate, MlpVAE, SCRModel, SimpleMLP
from avalanche.models.packnet import PackNetModel
from avalanche.training.plugins import GenerativeReplayPlugin, bic, gem
from avalanche.training.supervised import ar1, l2p
from avalanche.training.supervised.lamaml_v2 import LaMAML
from avalanche.training.supervised.strategy_wrappers import VAETraining
from avalanche.training.templates import BaseSGDTemplate
from conftest import (
    CLASSES,
    FEATURES,
    HIDDEN,
    SGD,
    linear_head,
    make_data,
    many_heads,
    seed_everything,
)
from torch import Tensor, nn
from torch.optim.lr_scheduler import MultiStepLR

from avalanche_classp import CLASSPOptimizer, CLASSPPlugin
from avalanche_classp.optim.accumulators import has_history

EXPORTED = {
    name: inspect.unwrap(value)
    for module in (avalanche.training, avalanche.training.supervised)
    for name, value in vars(module).items()
    if inspect.isclass(inspect.unwrap(value)) and issubclass(inspect.unwrap(value), BaseSGDTemplate)
}
# Not exported, but used.
STRATEGIES = {**EXPORTED, "LaMAML": LaMAML}


# --- models that some strategies ask for ----------------------------------------------------------


def mlp() -> nn.Module:
    return SimpleMLP(num_classes=6, input_size=FEATURES, hidden_size=HIDDEN, drop_rate=0)


def features() -> nn.Module:
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.Tanh())


class Autoencoder(nn.Sequential):
    feature_module = nn.Identity()

    def __init__(self) -> None:
        super().__init__(nn.Linear(FEATURES, HIDDEN), nn.Linear(HIDDEN, FEATURES))


def vae() -> nn.Module:
    return MlpVAE((1, 2, 3), nhid=2, n_classes=6)


class TinyMobilenet(nn.Module):
    """What AR1 asks of MobilenetV1, whose weights would be downloaded."""

    def __init__(self, pretrained: bool, latent_layer_num: int) -> None:
        super().__init__()
        self.lat_features = nn.Sequential(nn.Linear(FEATURES, HIDDEN))
        self.end_features = nn.Sequential(nn.Linear(HIDDEN, HIDDEN), nn.Tanh())
        self.output = nn.Linear(HIDDEN, 6, bias=False)

    def forward(self, x: Tensor, latent_input: Any = None, return_lat_acts: bool = False) -> Any:
        acts = self.lat_features(x)
        inputs = acts if latent_input is None else torch.cat((acts, latent_input))
        logits = self.output(self.end_features(inputs))
        return (logits, acts) if return_lat_acts else logits


class TinyPrompted(nn.Module):
    """What LearningToPrompt asks of a vision transformer, which would be downloaded."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__()
        self.body = nn.Linear(FEATURES, 768)
        self.head = nn.Linear(768, 6)

    def reset_classifier(self, classes: int) -> None:
        pass

    def forward(self, x: Tensor, **kwargs: Any) -> dict[str, Any]:
        features = self.body(x)
        return {"pre_logits": features, "logits": self.head(features), "reduce_sim": 0}


class TinyAlexnet(nn.Module):
    def __init__(self, weights: Any = None) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Linear(FEATURES, 256 * 6 * 6), nn.Unflatten(1, (256, 6, 6))
        )
        self.avgpool = nn.Identity()
        self.classifier = nn.Sequential(nn.Linear(256 * 6 * 6, HIDDEN), nn.Linear(HIDDEN, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).flatten(1))


@pytest.fixture(autouse=True)
def _tiny_models(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ar1, "MobilenetV1", TinyMobilenet)
    monkeypatch.setattr(l2p, "create_model", lambda **kwargs: TinyPrompted())
    monkeypatch.setattr("torchvision.models.alexnet", TinyAlexnet)
    # Avalanche 0.6 asks for an argument that torch has no longer, and for a package.
    monkeypatch.setattr(
        bic, "MultiStepLR", lambda *args, verbose, **kwargs: MultiStepLR(*args, **kwargs)
    )
    monkeypatch.setattr(gem.qpsolvers, "solve_qp", lambda q, **kwargs: np.zeros_like(q))


# --- what strategies need -------------------------------------------------------------------------


def generator() -> Any:
    model = vae()
    return VAETraining(
        model=model,
        optimizer=torch.optim.Adam(model.parameters()),
        train_mb_size=8,
        plugins=[GenerativeReplayPlugin()],
        evaluator=None,
    )


NEEDS: dict[str, Callable[[], dict[str, Any]]] = {
    "AETraining": lambda: {"model": Autoencoder(), "device": "cpu"},
    "AGEM": lambda: {"patterns_per_exp": 4},
    "AR1": lambda: {"rm_sz": 10, "freeze_below_layer": "lat_features.0"},
    "BiC": lambda: {"stage_2_epochs": 1},
    "CWRStar": lambda: {"cwr_layer_name": "2"},
    "CoPE": lambda: {"n_classes": 6, "p_size": 6},
    "ER_AML": lambda: {"feature_extractor": (model := linear_head())[:2], "model": model},
    "EWC": lambda: {"ewc_lambda": 1.0},
    "ExpertGateStrategy": lambda: {
        "model": ExpertGate((FEATURES,), "cpu", pretrained_flag=False),
        "ae_train_mb_size": 8,
        "ae_latent_dim": 4,
    },
    "FeatureReplay": lambda: {"model": mlp()},
    "GEM": lambda: {"patterns_per_exp": 4},
    "GSS_greedy": lambda: {"input_size": [FEATURES], "train_mb_size": 4},
    "GenerativeReplay": lambda: {
        "model": nn.Sequential(nn.Flatten(), linear_head()),
        "generator_strategy": generator(),
    },
    "ICaRL": lambda: {
        "feature_extractor": features(),
        "classifier": nn.Linear(HIDDEN, 6),
        "memory_size": 10,
        "buffer_transform": None,
        "fixed_memory": True,
    },
    "LFL": lambda: {"model": mlp(), "lambda_e": 0.1},
    "LaMAML": lambda: {
        "model": many_heads(),
        "criterion": nn.CrossEntropyLoss(),
        "n_inner_updates": 4,
    },
    "LearningToPrompt": lambda: {"model_name": "tiny", "num_classes": 6},
    "LwF": lambda: {"alpha": 1.0, "temperature": 2.0},
    "MIR": lambda: {"mem_size": 10, "subsample": 5},
    "PNNStrategy": lambda: {"model": PNN(1, FEATURES, HIDDEN)},
    "PackNet": lambda: {
        "model": PackNetModel(linear_head()),
        "post_prune_epochs": 1,
        "prune_proportion": 0.5,
        "train_epochs": 2,
    },
    "SCR": lambda: {"model": SCRModel(features(), nn.Linear(HIDDEN, 4))},
    "StreamingLDA": lambda: {"slda_model": features(), "input_size": HIDDEN, "num_classes": 6},
    "SynapticIntelligence": lambda: {"si_lambda": 1.0},
    "VAETraining": lambda: {"model": vae()},
}

REFUSED = {
    "LearningToPrompt": r"replaced by Adam .* CLASSP cannot train LearningToPrompt",
    "LaMAML": r"without one step of the optimizer.*sync_update=True",
    "PackNet": r"PackNet does not unpack plugins=.*give optimizer=CLASSPOptimizer",
    "StreamingLDA": r"StreamingLDA trains without an optimizer",
}


def make(name: str, plugins: list[Any], **own: Any) -> Any:
    """Return the strategy with small models, and SGD where it takes an optimizer."""
    of = STRATEGIES[name]
    takes = inspect.signature(of.__init__).parameters
    kwargs = {"train_mb_size": 8, "evaluator": None, "plugins": plugins}
    needs = NEEDS.get(name, dict)()
    if "model" in takes:
        kwargs["model"] = needs.pop("model", None) or linear_head()
    modules = [*kwargs.values(), *needs.values()]
    if "optimizer" in takes:
        parameters = [p for m in modules if isinstance(m, nn.Module) for p in m.parameters()]
        kwargs["optimizer"] = SGD(dict.fromkeys(parameters), lr=0.01)
    if getattr(takes.get("criterion"), "default", None) is inspect.Parameter.empty:
        kwargs["criterion"] = nn.CrossEntropyLoss()
    return of(**(kwargs | needs | own))


def train(strategy: Any) -> None:
    """Train two experiences, each a task of its own, and show no progress."""
    seed_everything()
    in_one_task = (avalanche.training.AR1, avalanche.training.ICaRL)
    tasks = [0, 0] if isinstance(strategy, in_one_task) else [0, 1]
    data = [make_data(classes, per_class=24) for classes in CLASSES[:2]]
    if isinstance(strategy, VAETraining | avalanche.training.GenerativeReplay):
        data = [(x.view(-1, 1, 2, 3), y) for x, y in data]
    benchmark = tensors_benchmark(data, data, task_labels=tasks)
    # iCaRL asks for what benchmarks from tensors do not know.
    benchmark.n_classes_per_exp, benchmark.classes_order = [2, 2], [0, 1, 2, 3]
    with contextlib.redirect_stdout(io.StringIO()):
        if isinstance(strategy, avalanche.training.JointTraining):
            strategy.train(benchmark.train_stream)
        else:
            for experience in benchmark.train_stream:
                strategy.train(experience)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(STRATEGIES))
def test_every_strategy_trains_with_classp_or_refuses_it(name):
    if name in REFUSED:
        with pytest.raises((ValueError, RuntimeError), match=REFUSED[name]) as refused:
            train(make(name, [CLASSPPlugin(lr=0.01)]))
        assert "\n" not in str(refused.value)
        return
    strategy = make(name, [CLASSPPlugin(lr=0.01)])
    before = {n: p.detach().clone() for n, p in strategy.model.named_parameters()}
    train(strategy)
    assert type(strategy.optimizer) is CLASSPOptimizer
    state = strategy.optimizer.state
    after = dict(strategy.model.named_parameters())
    moved = [n for n in after if n not in before or not torch.equal(before[n], after[n])]
    assert any(has_history(state.get(after[n])) for n in moved)
    assert all(p.isfinite().all() for p in after.values())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["LaMAML", "PackNet"])
def test_what_a_refusal_recommends_works(name):
    if name == "LaMAML":
        strategy = make(name, [CLASSPPlugin(lr=0.01)], sync_update=True)
    else:
        strategy = make(name, [])
        strategy.optimizer = CLASSPOptimizer(strategy.model.parameters(), lr=0.01)
    train(strategy)
    assert type(strategy.optimizer) is CLASSPOptimizer
    assert any(has_history(state) for state in strategy.optimizer.state.values())
