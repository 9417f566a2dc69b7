"""The methods: one entry each, of all that the experiments know about it.

Nothing here imports torch or Avalanche before a strategy is built, so that names are checked at
once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from .config import Hyper, RunConfig
from .losses import USUAL_LOSS

if TYPE_CHECKING:
    from optuna.trial import BaseTrial
    from torch import nn

Build = Callable[["nn.Module", Hyper, dict[str, Any]], Any]
Space = Callable[["BaseTrial"], dict[str, Any]]


class Style(NamedTuple):
    """How a method's lines and points look, the same in all figures.

    The colours were chosen by computation: under the common kinds of colour blindness as well
    (Machado et al. 2009, full severity) any two of the first twelve methods are at least 21 apart
    in CIELAB. Of the extensions classp-matrix is 14 from replay and 19 from the others,
    classp-consolidated 20 from all. The markers tell the twelve apart without colour.
    """

    colour: str
    marker: str


_OTHER_STYLE = Style("#737765", "d")

TRAINS = "trains the network"
CLOSED_FORM = "closed form on fixed features"
GENERATES = "generates data"
STORES = "stores data"
"""The families of methods: by what they keep of earlier experiences."""


@dataclass(frozen=True)
class Method:
    """A method by name.

    Attributes:
        description: one line.
        defaults: its hyper-parameters with the values used where nothing was searched.
        build: makes the strategy from a model, hyper-parameters and Avalanche's common arguments.
        space: suggests hyper-parameters to a search; those it leaves out keep their defaults.
        style: its look in figures.
        usual: it is compared where no methods are named.
        family: one of the four families.
        scenarios: those that it is for.
        origin: the user's function that it was declared with; None for a built-in one.
        unseen: hyper-parameters that change nothing before a second experience comes; a search
            on the first experience leaves their defaults.
    """

    description: str
    defaults: Hyper
    build: Build
    space: Space
    style: Style = _OTHER_STYLE
    usual: bool = True
    family: str = TRAINS
    scenarios: tuple[str, ...] = ("class", "domain", "task")
    origin: Build | None = None
    unseen: tuple[str, ...] = ()

    @property
    def has_old_samples(self) -> bool:
        """Whether samples of earlier experiences, real or made up, are trained on."""
        return self.family in (GENERATES, STORES)


def why_not(method: str, scenario: str, loss: str = USUAL_LOSS) -> str | None:
    """Return why a method cannot be run so, in one line; None where it can."""
    spec = METHODS[method]
    if scenario not in spec.scenarios:
        known = " and ".join(spec.scenarios)
        return f"{method} is for {known}-incremental streams, not for the scenario {scenario}"
    if loss == USUAL_LOSS:
        return None
    if spec.family == CLOSED_FORM:
        return f"{method} trains no network, so it has no loss; leave --loss out"
    if loss == "masked-cross-entropy" and (scenario != "class" or method == "joint"):
        return (
            f"{method} in the scenario {scenario} sees all classes of the head at once; "
            f"masked-cross-entropy is for class-incremental streams, and not for joint"
        )
    return None


# Building


def _on_sgd(model: nn.Module, hyper: Hyper, common: dict[str, Any], *plugins: Any) -> Any:
    from avalanche.training import Naive

    return Naive(model=model, optimizer=_sgd(model, hyper), plugins=list(plugins), **common)


def _sgd(model: nn.Module, hyper: Hyper) -> Any:
    from torch.optim import SGD

    return SGD(model.parameters(), lr=float(hyper["lr"]))


def _require(holds: bool, name: str, value: Any, condition: str) -> None:
    """Check what Avalanche does not: it would give NaN, or go on with nonsense."""
    if not holds:
        raise ValueError(f"{name} must be {condition}, got {value!r}")


def _adagrad(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from avalanche.training import Naive
    from torch.optim import Adagrad

    lr, initial = float(hyper["lr"]), float(hyper.get("initial_accumulator_value", 0.0))
    optimizer = Adagrad(model.parameters(), lr=lr, initial_accumulator_value=initial)
    return Naive(model=model, optimizer=optimizer, **common)


def _adam(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from avalanche.training import Naive
    from torch.optim import Adam

    betas = (float(hyper["beta1"]), float(hyper["beta2"]))
    lr, eps = float(hyper["lr"]), float(hyper["eps"])
    optimizer = Adam(model.parameters(), lr=lr, betas=betas, eps=eps)
    return Naive(model=model, optimizer=optimizer, **common)


# How Avalanche's methods differ from their papers, where they run and are used as they are:
# - EWC, online EWC and RWalk take the squared gradient of a mini-batch's mean loss for the Fisher
#   information (the papers: of each sample), so the useful λ grows with the batch size; there is no
#   ½ before λ.
# - EWC, online EWC and MAS measure importance on the training data as it is trained on, random
#   augmentation included; MAS in training mode (with dropout, and batch norm learns on).
# - SI sums gradients that include its own penalty's (the paper: the loss's alone), cuts
#   importances off at 0.001 (Maltoni and Lomonaco, 2019, https://arxiv.org/abs/1806.08568) and
#   leaves batch norm free. With Avalanche's eps of 1e-7, 96 % of the importances stand at that
#   limit after the first experience of split-digits, with eps 0.1 it is 1 % (lr 0.01, 10 epochs).
# - MAS takes the absolute gradient of a mini-batch's mean (the paper: of each sample), mixes old
#   and new importances by alpha (the paper: adds them).
# - LwF's distillation lacks the factor temperature², and alpha is the same in every experience.
# - RWalk takes its gradients in a second pass of each mini-batch, in evaluation mode; where delta_t
#   exceeds the iterations of the first experience, only the Fisher information is left.
# - Replay adds as many stored samples to each mini-batch, which is then twice as large.


def _ewc(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from avalanche.training import EWC

    own: dict[str, Any] = {key: value for key, value in hyper.items() if key != "lr"}
    decay = own.get("decay_factor", 0)
    _require(decay <= 1, "decay_factor", decay, "from 0 to 1")
    mode = "online" if "decay_factor" in own else "separate"
    return EWC(model=model, optimizer=_sgd(model, hyper), mode=mode, **own, **common)


def _si(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from .avalanche_fixes import FixedSIPlugin

    _require(hyper["eps"] > 0, "eps", hyper["eps"], "greater than 0")
    plugin = FixedSIPlugin(si_lambda=hyper["si_lambda"], eps=hyper["eps"])
    return _on_sgd(model, hyper, common, plugin)


def _mas(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from .avalanche_fixes import FixedMASPlugin

    _require(hyper["alpha"] <= 1, "alpha", hyper["alpha"], "from 0 to 1")
    plugin = FixedMASPlugin(lambda_reg=hyper["lambda_reg"], alpha=hyper["alpha"])
    return _on_sgd(model, hyper, common, plugin)


def _lwf(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from .avalanche_fixes import FixedLwFPlugin

    temperature = hyper["temperature"]
    _require(temperature > 0, "temperature", temperature, "greater than 0")
    plugin = FixedLwFPlugin(alpha=hyper["alpha"], temperature=temperature)
    return _on_sgd(model, hyper, common, plugin)


def _rwalk(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from .avalanche_fixes import FixedRWalkPlugin

    _require(hyper["ewc_alpha"] <= 1, "ewc_alpha", hyper["ewc_alpha"], "from 0 to 1")
    _require(hyper["delta_t"] >= 1, "delta_t", hyper["delta_t"], "at least 1")
    own: dict[str, Any] = {key: hyper[key] for key in ("ewc_lambda", "ewc_alpha", "delta_t")}
    return _on_sgd(model, hyper, common, FixedRWalkPlugin(**own))


def _replay(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from .avalanche_fixes import FixedReplayPlugin

    return _on_sgd(model, hyper, common, FixedReplayPlugin(mem_size=hyper["mem_size"]))


def _joint(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from .avalanche_fixes import FixedJointTraining

    return FixedJointTraining(model=model, optimizer=_sgd(model, hyper), **common)


def _classp(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from avalanche_classp import CLASSP, PAPER_PHASES

    own: dict[str, Any] = {key: value for key, value in hyper.items() if key != "paper_phases"}
    phases = PAPER_PHASES if hyper.get("paper_phases") else None
    history = "gradients" if "both_sides" in own else "inputs" if "rank" in own else "weights"
    if history == "inputs":  # 0: the plugin chooses epsilon; all directions are told apart
        own = {key: value for key, value in own.items() if value or key not in ("epsilon", "rank")}
    # fused=False: no result depends on whether a kernel lies ready.
    return CLASSP(model=model, phases=phases, history=history, fused=False, **own, **common)


# Where the methods below differ from their papers:
# - NCM and FeCAM average an old mean, or covariance, with a new one of the same class, as halves.
# - LFL's penalty is the mean over the features (the paper: half the sum), so lambda_e is larger.
# - CWR* leaves the biases of the head as they are trained.
# - PackNet freezes biases after the first experience, as in the paper; heads are not pruned.


def _ncm(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from avalanche.training.plugins import CurrentDataNCMUpdate

    from .avalanche_fixes import FixedNCMClassifier

    return _prototypes(model, hyper, common, FixedNCMClassifier(), CurrentDataNCMUpdate())


def _fecam(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from avalanche.training.plugins import CurrentDataFeCAMUpdate

    from .avalanche_fixes import FixedFeCAMClassifier

    return _prototypes(model, hyper, common, FixedFeCAMClassifier(), CurrentDataFeCAMUpdate())


def _prototypes(
    model: nn.Module, hyper: Hyper, common: dict[str, Any], head: Any, update: Any
) -> Any:
    from .avalanche_fixes import FixedFeatureDistillationPlugin
    from .prototypes import WithPrototypes

    distillation = FixedFeatureDistillationPlugin(alpha=float(hyper["alpha"]))
    return _on_sgd(WithPrototypes(model, head), hyper, common, distillation, update)


def _lfl(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from avalanche.models.utils import FeatureExtractorModel

    from .avalanche_fixes import FixedLFLPlugin
    from .prototypes import split

    plugin = FixedLFLPlugin(lambda_e=float(hyper["lambda_e"]))
    return _on_sgd(FeatureExtractorModel(*split(model)), hyper, common, plugin)


def _cwr(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from avalanche.training.plugins import CWRStarPlugin

    return _on_sgd(model, hyper, common, CWRStarPlugin(model))


def _packnet(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from .avalanche_fixes import FixedPackNetModel, FixedPackNetPlugin
    from .prototypes import split

    for name in ("prune", "retrain"):
        _require(0 < hyper[name] < 1, name, hyper[name], "between 0 and 1")
    plugin = FixedPackNetPlugin(float(hyper["prune"]), float(hyper["retrain"]))
    return _on_sgd(FixedPackNetModel(*split(model)), hyper, common, plugin)


def _generative_replay(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from .avalanche_fixes import FixedGenerativeReplay
    from .models import sizes_of

    inputs, _, _ = sizes_of(model)
    return FixedGenerativeReplay(
        model=model,
        optimizer=_sgd(model, hyper),
        inputs=inputs,
        latent=int(hyper["latent"]),
        generator_lr=float(hyper["generator_lr"]),
        **common,
    )


def _closed_form(head: Callable[[Hyper], Any]) -> Build:
    """Return a builder of a method that solves a head on features that never change."""

    def build(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
        from .closed_form import ClosedForm
        from .models import sizes_of

        inputs, labels, by_task = sizes_of(model)
        width = int(hyper.get("width", 0))
        return ClosedForm(
            make=head(hyper), width=width, inputs=inputs, labels=labels, by_task=by_task, **common
        )

    return build


def _class_means(hyper: Hyper) -> Any:
    from .closed_form import ClassMeans

    return ClassMeans


def _lda(hyper: Hyper) -> Any:
    from .closed_form import StreamingLDA

    return lambda features, labels: StreamingLDA(features, labels, hyper["shrinkage"])


def _ridge(hyper: Hyper) -> Any:
    from .closed_form import Ridge

    return lambda features, labels: Ridge(features, labels, hyper["penalty"])


def _owm(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from .projections import OWMPlugin

    _require(hyper["alpha"] > 0, "alpha", hyper["alpha"], "greater than 0")
    return _on_sgd(model, hyper, common, OWMPlugin(alpha=float(hyper["alpha"])))


def _kfac_laplace(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from .laplace import KroneckerLaplacePlugin

    plugin = KroneckerLaplacePlugin(strength=float(hyper["strength"]))
    return _on_sgd(model, hyper, common, plugin)


def _gpm(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
    from .projections import GPMPlugin

    _require(0 < hyper["share"] < 1, "share", hyper["share"], "between 0 and 1")
    return _on_sgd(model, hyper, common, GPMPlugin(threshold=float(hyper["share"])))


# Search spaces. Learning rates reach down to where a method hardly moves, because slow learning
# alone forgets less; Adam moves every weight by about lr in each step, so its lr goes lower than
# the others'. A penalty's weight spans ten orders of magnitude, because Avalanche's importances
# depend on the batch size and the number of steps; distillation's spans four, around the weight of
# the loss itself. CLASSP's epsilon reaches down to where it is AdaGrad with power 2. The size of
# the replay buffer is not searched: more is better; nor is the rank, for the same reason. With
# matrix accumulators lr follows from the rate in directions that are still free,
# lr / epsilon^(1/power), which is SGD's and has SGD's limits. With consolidation the rate goes to
# 3: what was learnt is protected by the factor, and trials with the other space had their best
# rates at its end. Closed forms have a penalty or a shrinkage; the width of a random layer is not
# searched: more is better.


def _log(trial: BaseTrial, name: str, low: float, high: float) -> float:
    return trial.suggest_float(name, low, high, log=True)


def _flag(trial: BaseTrial, name: str) -> bool:
    return trial.suggest_categorical(name, [False, True])


def _both(first: Space, second: Space) -> Space:
    return lambda trial: {**first(trial), **second(trial)}


def _rate(low: float, high: float) -> Space:
    return lambda trial: {"lr": _log(trial, "lr", low, high)}


def _ewc_space(trial: BaseTrial) -> dict[str, Any]:
    return {"ewc_lambda": _log(trial, "ewc_lambda", 1e-3, 1e10)}


def _si_space(trial: BaseTrial) -> dict[str, Any]:
    return {
        "si_lambda": _log(trial, "si_lambda", 1e-3, 1e7),
        "eps": _log(trial, "eps", 1e-4, 1.0),
    }


def _mas_space(trial: BaseTrial) -> dict[str, Any]:
    return {
        "lambda_reg": _log(trial, "lambda_reg", 1e-5, 1e5),
        "alpha": trial.suggest_float("alpha", 0.0, 1.0),
    }


def _lwf_space(trial: BaseTrial) -> dict[str, Any]:
    return {
        "alpha": _log(trial, "alpha", 1e-2, 1e2),
        "temperature": trial.suggest_float("temperature", 1.0, 4.0),
    }


def _distilled_space(trial: BaseTrial) -> dict[str, Any]:
    return {"alpha": _log(trial, "alpha", 1e-2, 1e3)}


def _rwalk_space(trial: BaseTrial) -> dict[str, Any]:
    return {
        "ewc_lambda": _log(trial, "ewc_lambda", 1e-5, 1e5),
        "ewc_alpha": trial.suggest_float("ewc_alpha", 0.1, 1.0),
        "delta_t": trial.suggest_int("delta_t", 1, 100, log=True),
    }


def rule_space(trial: BaseTrial) -> dict[str, Any]:
    """Suggest the hyper-parameters of the paper's rule."""
    return {
        "lr": _log(trial, "lr", 1e-4, 0.3),
        "threshold": _log(trial, "threshold", 1e-8, 1e-3) if _flag(trial, "sparse") else 0.0,
        "epsilon": _log(trial, "epsilon", 1e-12, 5.0),
        "power": trial.suggest_float("power", 0.5, 3.0),
    }


_Limits = tuple[float, float]


def _matrix_rule(
    trial: BaseTrial, free_rate: _Limits, epsilon: _Limits, power: _Limits
) -> dict[str, float]:
    rate, eps = _log(trial, "free_rate", *free_rate), _log(trial, "epsilon", *epsilon)
    exponent = trial.suggest_float("power", *power)
    return {"lr": rate * eps ** (1 / exponent), "epsilon": eps, "power": exponent}


def _matrix_space(trial: BaseTrial) -> dict[str, Any]:
    rule = _matrix_rule(trial, free_rate=(0.01, 1.0), epsilon=(1e-4, 5.0), power=(0.5, 2.5))
    return {**rule, "both_sides": _flag(trial, "both_sides")}


def _inputs_space(trial: BaseTrial) -> dict[str, Any]:
    # lr · epsilon is 1 in recursive least squares; a power other than 1 takes long on a CPU.
    return {"lr": _log(trial, "lr", 0.1, 3.0), "epsilon": _log(trial, "epsilon", 0.3, 30.0)}


def _consolidated_space(trial: BaseTrial) -> dict[str, Any]:
    rule = _matrix_rule(trial, free_rate=(0.1, 3.0), epsilon=(1e-2, 5.0), power=(1.0, 2.5))
    return {**rule, "consolidation": _log(trial, "consolidation", 1.0, 100.0)}


_sgd_space = _rate(1e-5, 1.0)

_MATRIX = {
    "lr": 0.02,
    "threshold": 0.0,
    "epsilon": 0.02,
    "power": 1.5,
    "rank": 128,
    "both_sides": False,
}

METHODS = {
    "naive": Method(
        description="plain SGD, one experience after the other",
        defaults={"lr": 0.01},
        build=_on_sgd,
        space=_sgd_space,
        style=Style("#a8a0b7", "o"),
    ),
    "adagrad": Method(
        description="plain AdaGrad, its sums kept from experience to experience",
        defaults={"lr": 0.001, "initial_accumulator_value": 0.0},
        build=_adagrad,
        space=lambda trial: {
            **_rate(1e-5, 0.3)(trial),
            "initial_accumulator_value": _log(trial, "initial_accumulator_value", 1e-12, 5.0),
        },
        style=Style("#69599d", "s"),
    ),
    "adam": Method(
        description="plain Adam, its moments kept from experience to experience",
        defaults={"lr": 0.001, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8},
        build=_adam,
        space=_rate(1e-7, 0.1),
        style=Style("#33a6f8", "D"),
    ),
    "ewc": Method(
        description="elastic weight consolidation on SGD: a penalty for each experience",
        defaults={"lr": 0.01, "ewc_lambda": 100.0},
        build=_ewc,
        space=_both(_sgd_space, _ewc_space),
        style=Style("#2009dd", "^"),
        unseen=("ewc_lambda",),
    ),
    "ewc-online": Method(
        description="online EWC on SGD: one penalty, old importances fade",
        defaults={"lr": 0.01, "ewc_lambda": 100.0, "decay_factor": 0.9},
        build=_ewc,
        space=lambda trial: {
            **_sgd_space(trial),
            **_ewc_space(trial),
            "decay_factor": trial.suggest_float("decay_factor", 0.5, 1.0),
        },
        style=Style("#5269fa", "v"),
        unseen=("ewc_lambda", "decay_factor"),
    ),
    "si": Method(
        description="synaptic intelligence on SGD: importance is a weight's part in the fall of "
        "the loss",
        defaults={"lr": 0.01, "si_lambda": 1000.0, "eps": 0.1},
        build=_si,
        space=_both(_sgd_space, _si_space),
        style=Style("#8e1404", "<"),
        unseen=("si_lambda", "eps"),
    ),
    "mas": Method(
        description="memory aware synapses on SGD: importance is what a weight does to the output",
        defaults={"lr": 0.01, "lambda_reg": 1.0, "alpha": 0.5},
        build=_mas,
        space=_both(_sgd_space, _mas_space),
        style=Style("#a8565c", ">"),
        unseen=("lambda_reg", "alpha"),
    ),
    "lwf": Method(
        description="learning without forgetting on SGD: the former model's answers on the new "
        "data are kept",
        defaults={"lr": 0.01, "alpha": 1.0, "temperature": 2.0},
        build=_lwf,
        space=_both(_sgd_space, _lwf_space),
        style=Style("#370c7d", "p"),
        unseen=("alpha", "temperature"),
    ),
    "rwalk": Method(
        description="Riemannian walk on SGD: importance is Fisher information plus a score along "
        "the path",
        defaults={"lr": 0.01, "ewc_lambda": 0.1, "ewc_alpha": 0.9, "delta_t": 10},
        build=_rwalk,
        space=_both(_sgd_space, _rwalk_space),
        style=Style("#75024b", "h"),
        unseen=("ewc_lambda", "ewc_alpha", "delta_t"),
    ),
    "replay": Method(
        description="SGD with stored samples in each mini-batch: a reference, the others store "
        "none",
        defaults={"lr": 0.01, "mem_size": 200},
        build=_replay,
        space=_sgd_space,
        style=Style("#cc9966", "P"),
        family=STORES,
    ),
    "joint": Method(
        description="SGD on all experiences at once: what forgetting costs the others",
        defaults={"lr": 0.1},
        build=_joint,
        space=_sgd_space,
        style=Style("#000000", "X"),
        family=STORES,
    ),
    "classp": Method(
        description="CLASSP",
        # The library's; a test holds the two together.
        defaults={
            "lr": 1e-3,
            "threshold": 0.0,
            "epsilon": 1e-8,
            "power": 1.5,
            "apply_decay": True,
            "paper_phases": False,
        },
        build=_classp,
        space=lambda trial: {**rule_space(trial), "paper_phases": _flag(trial, "paper_phases")},
        style=Style("#d55e00", "*"),
    ),
    "classp-matrix": Method(
        description="CLASSP with matrix accumulators, an extension: a history for directions",
        defaults=_MATRIX,
        build=_classp,
        space=_matrix_space,
        style=Style("#e8a400", "*"),
    ),
    "classp-inputs": Method(
        description="CLASSP with a history of inputs, an extension: what layers were given counts",
        defaults={"lr": 1.0, "threshold": 0.0, "epsilon": 0.0, "power": 1.0, "rank": 0},
        build=_classp,
        space=_inputs_space,
        style=Style("#009e73", "*"),
    ),
    "classp-consolidated": Method(
        description="classp-matrix whose accumulators are multiplied when an experience begins, an "
        "extension",
        defaults={**_MATRIX, "consolidation": 3.0},
        build=_classp,
        space=_consolidated_space,
        style=Style("#4b281e", "*"),
        usual=False,
        unseen=("consolidation",),
    ),
    "class-means": Method(
        description="closed form on raw inputs: the nearest class mean",
        defaults={},
        build=_closed_form(_class_means),
        space=lambda trial: {},
        usual=False,
        family=CLOSED_FORM,
    ),
    "slda": Method(
        description="closed form on raw inputs: class means and one covariance, streaming LDA",
        defaults={"shrinkage": 1e-4},
        build=_closed_form(_lda),
        space=lambda trial: {"shrinkage": _log(trial, "shrinkage", 1e-6, 0.5)},
        usual=False,
        family=CLOSED_FORM,
    ),
    "ridge": Method(
        description="closed form on a random ReLU layer: ridge regression, recursive least squares",
        defaults={"penalty": 1.0, "width": 2000},
        build=_closed_form(_ridge),
        space=lambda trial: {"penalty": _log(trial, "penalty", 1e-2, 1e5)},
        usual=False,
        family=CLOSED_FORM,
    ),
    "ranpac": Method(
        description="closed form on a wider random ReLU layer: ridge regression, as RanPAC has it",
        defaults={"penalty": 1.0, "width": 4000},
        build=_closed_form(_ridge),
        space=lambda trial: {"penalty": _log(trial, "penalty", 1e-2, 1e5)},
        usual=False,
        family=CLOSED_FORM,
    ),
    "owm": Method(
        description="orthogonal weights modification on SGD: gradients keep off earlier inputs",
        defaults={"lr": 0.1, "alpha": 1.0},
        build=_owm,
        space=lambda trial: {**_sgd_space(trial), "alpha": _log(trial, "alpha", 1e-4, 100.0)},
        usual=False,
        unseen=("alpha",),
    ),
    "gpm": Method(
        description="gradient projection memory on SGD: a basis of earlier inputs is kept off",
        defaults={"lr": 0.1, "share": 0.97},
        build=_gpm,
        space=lambda trial: {
            **_sgd_space(trial),
            "share": trial.suggest_float("share", 0.8, 0.999),
        },
        usual=False,
        unseen=("share",),
    ),
    "kfac-laplace": Method(
        description="Kronecker-factored online Laplace on SGD: EWC with correlated weights",
        defaults={"lr": 0.01, "strength": 1.0},
        build=_kfac_laplace,
        space=lambda trial: {**_sgd_space(trial), "strength": _log(trial, "strength", 1e-3, 1e6)},
        usual=False,
        unseen=("strength",),
    ),
    "ncm": Method(
        description="nearest class mean of the features, SGD with feature distillation",
        defaults={"lr": 0.01, "alpha": 100.0},  # Avalanche's 1 lets the features drift
        build=_ncm,
        space=_both(_sgd_space, _distilled_space),
        usual=False,
        scenarios=("class", "domain"),
        unseen=("alpha",),
    ),
    "fecam": Method(
        description="FeCAM: nearest class by its own covariance, SGD with feature distillation",
        defaults={"lr": 0.01, "alpha": 100.0},  # the paper's network is frozen
        build=_fecam,
        space=_both(_sgd_space, _distilled_space),
        usual=False,
        scenarios=("class", "domain"),
        unseen=("alpha",),
    ),
    "lfl": Method(
        description="less-forgetful learning on SGD: features are held, the first head stays",
        defaults={"lr": 0.01, "lambda_e": 1.0},
        build=_lfl,
        space=lambda trial: {**_sgd_space(trial), "lambda_e": _log(trial, "lambda_e", 1e-3, 1e3)},
        usual=False,
        scenarios=("class", "domain"),
        unseen=("lambda_e",),
    ),
    "cwr": Method(
        description="CWR*: the network learns once, then each class's weights of the head",
        defaults={"lr": 0.01},
        build=_cwr,
        space=_sgd_space,
        usual=False,
        scenarios=("class", "domain"),
    ),
    "packnet": Method(
        description="PackNet on SGD: each task keeps its largest weights for itself",
        defaults={"lr": 0.01, "prune": 0.5, "retrain": 1 / 3},
        build=_packnet,
        space=lambda trial: {
            **_sgd_space(trial),
            "prune": trial.suggest_float("prune", 0.3, 0.9),
        },
        usual=False,
        scenarios=("task",),
    ),
    "generative-replay": Method(
        description="SGD with samples in each mini-batch that an autoencoder makes up",
        defaults={"lr": 0.05, "latent": 16, "generator_lr": 0.003},
        build=_generative_replay,
        space=lambda trial: {
            **_sgd_space(trial),
            "latent": trial.suggest_int("latent", 2, 64, log=True),
            "generator_lr": _log(trial, "generator_lr", 1e-4, 0.03),
        },
        usual=False,
        family=GENERATES,
        scenarios=("class", "domain"),
        unseen=("latent", "generator_lr"),
    ),
}
"""All methods by name."""


def _with_matrices(method: str, penalty: Space) -> Method:
    """Return a method with CLASSP's matrix accumulators in the place of plain SGD."""
    spec = METHODS[method]

    def build(model: nn.Module, hyper: Hyper, common: dict[str, Any]) -> Any:
        from avalanche_classp import CLASSPPlugin

        strategy = spec.build(model, {key: hyper[key] for key in spec.defaults}, common)
        own: dict[str, Any] = {key: hyper[key] for key in _MATRIX}
        strategy.plugins.append(CLASSPPlugin(history="gradients", fused=False, **own))
        return strategy

    return Method(
        description=f"{method} with matrix accumulators in SGD's place",
        defaults={**spec.defaults, **_MATRIX},
        build=build,
        space=_both(penalty, _matrix_space),
        usual=False,
        unseen=spec.unseen,
    )


METHODS |= {
    f"{method}-matrix": _with_matrices(method, penalty)
    for method, penalty in (
        ("ewc", _ewc_space),
        ("si", _si_space),
        ("mas", _mas_space),
        ("lwf", _lwf_space),
    )
}


def style_of(method: str) -> Style:
    """Return the look of the method with this name, also of one that is not here."""
    return METHODS[method].style if method in METHODS else _OTHER_STYLE


def family_of(method: str) -> str:
    """Return the family of the method with this name; of one that is not here nothing."""
    return METHODS[method].family if method in METHODS else ""


def count_steps(config: RunConfig) -> int:
    """Return how often a run of this config trains and evaluates."""
    return 1 if config.method == "joint" else config.experiences
