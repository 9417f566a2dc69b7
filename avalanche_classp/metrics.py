"""Metrics that show CLASSP at work, for Avalanche's EvaluationPlugin.

Each metric is two functions, what a layer contributes (``part``) and how contributions are put
together (``combine``), and the common class that calls them. ``docs/metrics.md`` says how to read
them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from avalanche.evaluation import PluginMetric
from avalanche.evaluation.metric_results import MetricValue
from avalanche.evaluation.metric_utils import phase_and_task, stream_type
from torch import Tensor

from avalanche_classp.optim.accumulators import diagonal
from avalanche_classp.optim.checks import require_flag, require_number
from avalanche_classp.optim.optimizer import CLASSPOptimizer
from avalanche_classp.optim.rule import Rule, accumulator_dtype, rule_of

__all__ = [
    "AccumulatorMetric",
    "CLASSPMetric",
    "EffectiveRateMetric",
    "FreeMetric",
    "Layer",
    "MovementMetric",
    "OverlapMetric",
    "UpdatedMetric",
    "classp_metrics",
    "effective_rate",
    "layers",
]

QUANTILES = (0.1, 0.5, 0.9)
FREE_SHARE = 0.1

_SAMPLE = 1 << 13
"""Weights of a layer that quantiles are taken of: a rank is then right to about 0.006."""

_SUFFIXES = {"minibatch": "MB", "epoch": "Epoch", "experience": "Exp"}


class Layer(NamedTuple):
    """A parameter with its name in the model, and the hyper-parameters of its group.

    The accumulator is A of each weight, zeros without history. Of a history of directions it is
    the diagonal, the same for all weights of an input; with ``both_sides`` the geometric mean of
    its input's and its output's.
    """

    name: str
    param: Tensor
    accumulator: Tensor
    rule: Rule


def layers(strategy: Any) -> Iterator[Layer]:
    """Return each parameter that CLASSP trains, in the order of the model.

    ValueError where the strategy's optimizer is no CLASSPOptimizer.
    """
    optimizer = strategy.optimizer
    if not isinstance(optimizer, CLASSPOptimizer):
        raise ValueError(
            f"classp_metrics needs a strategy that CLASSP trains, but its optimizer is "
            f"{type(optimizer).__name__}; add CLASSPPlugin() to its plugins"
        )
    rules = {p: rule_of(group) for group in optimizer.param_groups for p in group["params"]}
    for name, p in strategy.model.named_parameters():
        if p in rules:
            accumulator = diagonal(optimizer.state.get(p), p)
            if accumulator is None:
                accumulator = torch.zeros_like(p.detach(), dtype=accumulator_dtype(p))
            yield Layer(name, p.detach(), accumulator, rules[p])


def effective_rate(accumulator: Tensor, rule: Rule) -> Tensor:
    """Return what a gradient is multiplied with: lr / (epsilon + A)^(1/power), elementwise.

    It is lr without ``apply_decay``, and infinite where epsilon and A are 0.
    """
    if not rule.apply_decay:
        return torch.full_like(accumulator, rule.lr)
    return rule.lr / (rule.epsilon + accumulator) ** (1 / rule.power)


class CLASSPMetric(PluginMetric[dict[str, float]]):
    """What all metrics of CLASSP share: when they look, and the names of what they emit.

    A name is ``CLASSP_KIND_Epoch/train_phase/train_stream``, with ``_MB`` for mini-batches and
    ``_Exp`` for experiences. Then may follow ``/mean`` or ``/quantile_0.5``, and, ``per_layer``,
    the parameter's name. The x of a value is the number of training iterations so far.

    A metric that is used for another strategy starts afresh.

    Args:
        at: ``minibatch``, ``epoch`` or ``experience``: what a value is of.
        per_layer: also a value for each parameter. Default: False, the whole model alone.
    """

    kind: str
    kept: str | None = None
    """What is copied of each layer at the beginning: ``param``, ``accumulator`` or nothing."""

    def __init__(self, at: str, per_layer: bool = False) -> None:
        super().__init__()
        if at not in _SUFFIXES:
            raise ValueError(f"at must be one of {', '.join(_SUFFIXES)}, got {at!r}")
        self.at = at
        self.per_layer = per_layer
        self._values: dict[str, float] = {}
        self._before: dict[str, Tensor] = {}
        self._iterations = 0  # of the strategy, when this metric last saw one

    def __str__(self) -> str:
        return f"CLASSP_{self.kind}_{_SUFFIXES[self.at]}"

    def result(self) -> dict[str, float]:
        """Return the last values by what follows the metric's name; "" is the whole model."""
        return dict(self._values)

    def reset(self) -> None:
        """Forget the last values."""
        self._values = {}

    def part(self, layer: Layer) -> Any:
        """Return what a layer contributes; called once for each value's time and layer."""
        raise NotImplementedError

    def combine(self, parts: Iterable[Any]) -> dict[str, float]:
        """Return the values of layers taken together, by what follows the metric's name."""
        raise NotImplementedError

    def start_afresh(self) -> None:
        """Forget everything: another strategy begins."""
        self.reset()
        self._before = {}

    def before_training(self, strategy: Any) -> None:
        """Refuse a strategy that CLASSP does not train, and tell whether it is another one."""
        list(layers(strategy))
        now, then = strategy.clock.train_iterations, self._iterations
        # One less if the last iteration was interrupted: Avalanche's clock comes last.
        if now != then and (now == 0 or now != then - 1):
            self.start_afresh()
            self._iterations = now

    def before_training_exp(self, strategy: Any) -> None:
        """Begin, if the metric is of experiences."""
        self._begin(strategy, "experience")

    def before_training_epoch(self, strategy: Any) -> None:
        """Begin, if the metric is of epochs."""
        self._begin(strategy, "epoch")

    def before_training_iteration(self, strategy: Any) -> None:
        """Begin, if the metric is of mini-batches."""
        self._begin(strategy, "minibatch")

    def after_training_iteration(self, strategy: Any) -> list[MetricValue] | None:
        """Emit, if the metric is of mini-batches."""
        self._iterations = strategy.clock.train_iterations + 1
        return self._end(strategy, "minibatch")

    def after_training_epoch(self, strategy: Any) -> list[MetricValue] | None:
        """Emit, if the metric is of epochs."""
        return self._end(strategy, "epoch")

    def after_training_exp(self, strategy: Any) -> list[MetricValue] | None:
        """Emit, if the metric is of experiences."""
        return self._end(strategy, "experience")

    def _begin(self, strategy: Any, at: str) -> None:
        if self.kept and self.at == at:
            found = layers(strategy)
            self._before = {layer.name: getattr(layer, self.kept).clone() for layer in found}

    @torch.no_grad()
    def _end(self, strategy: Any, at: str) -> list[MetricValue] | None:
        if self.at != at:
            return None
        parts = {layer.name: self.part(layer) for layer in layers(strategy)}
        self._values = self.combine(parts.values())
        if self.per_layer:
            for name, part in parts.items():
                for what, value in self.combine([part]).items():
                    self._values[f"{what}/{name}"] = value
        self._before = {}
        phase, _ = phase_and_task(strategy)
        base = f"{self}/{phase}_phase/{stream_type(strategy.experience)}_stream"
        x = strategy.clock.train_iterations
        return [MetricValue(self, base + what, value, x) for what, value in self._values.items()]


class _Share(CLASSPMetric):
    """A sum over the weights divided by another; a part holds both."""

    def combine(self, parts: Iterable[tuple[Tensor | int, Tensor | int]]) -> dict[str, float]:
        """Return the share; 0 of nothing."""
        over, under = zip(*parts, strict=True)
        return {"": _total(over) / max(1, _total(under))}


class UpdatedMetric(_Share):
    """Share of the weights that were updated.

    Of a mini-batch: those that its iteration moved; while gradients are accumulated, and where a
    step was skipped, none. Of an epoch or experience: those whose accumulator grew. It keeps a copy
    of the weights or accumulators meanwhile.
    """

    kind = "Updated"

    def __init__(self, at: str, per_layer: bool = False) -> None:
        super().__init__(at, per_layer)
        self.kept = "param" if at == "minibatch" else "accumulator"

    def part(self, layer: Layer) -> tuple[Tensor, int]:
        """Return how many weights were updated, and how many there are."""
        if self.kept == "accumulator":
            updated = _grown(layer, self._before)
        else:
            now, before = _common(layer.param, self._before.get(layer.name))
            updated = now != before
        return updated.count_nonzero(), layer.param.numel()


class _Distribution(CLASSPMetric):
    """A distribution over the weights: its mean, and quantiles of a sample of each layer."""

    def __init__(
        self, at: str, per_layer: bool = False, quantiles: Sequence[float] = QUANTILES
    ) -> None:
        super().__init__(at, per_layer)
        self.quantiles = tuple(quantiles)

    of: Callable[[Layer], Tensor]
    """What the distribution is of, for each weight of a layer."""

    def part(self, layer: Layer) -> tuple[Tensor, int, Tensor]:
        """Return the sum, the number of weights and the sample."""
        values = self.of(layer).flatten()
        places = _places(len(values))
        sample = values if places is None else values[places.to(values.device)]
        return values.sum(dtype=torch.float64), len(values), sample

    def combine(self, parts: Iterable[tuple[Tensor, int, Tensor]]) -> dict[str, float]:
        """Return the mean and the quantiles."""
        sums, sizes, samples = zip(*parts, strict=True)
        size = sum(sizes)
        result = {"/mean": _total(sums) / max(1, size)}
        if not size or not self.quantiles:
            return result
        ordered, places = torch.cat(samples).sort()
        # A drawn weight stands for as many as its layer has for each drawn.
        shares = [
            torch.full_like(sample, n / max(1, len(sample)), dtype=torch.float64)
            for n, sample in zip(sizes, samples, strict=True)
        ]
        ranks = torch.tensor(self.quantiles, dtype=torch.float64, device=ordered.device)
        upto = torch.cat(shares)[places].cumsum(0)
        found = torch.searchsorted(upto, ranks * (size - 1), right=True)
        values = ordered[found.clamp(max=len(ordered) - 1)].tolist()
        return result | {
            f"/quantile_{q:g}": value for q, value in zip(self.quantiles, values, strict=True)
        }


class AccumulatorMetric(_Distribution):
    """Mean and quantiles of the accumulators A."""

    kind = "Accumulator"
    of = staticmethod(lambda layer: layer.accumulator)


class EffectiveRateMetric(_Distribution):
    """Mean and quantiles of the effective learning rate lr / (epsilon + A)^(1/power)."""

    kind = "EffectiveRate"
    of = staticmethod(lambda layer: effective_rate(layer.accumulator, layer.rule))


class FreeMetric(_Share):
    """Share of the weights that are still free: effective rate at least ``share`` of its start.

    The start is lr / epsilon^(1/power), the rate of a weight without history; the lr itself does
    not matter. With epsilon 0 a weight is free until its first update. Without ``apply_decay`` all
    are free.
    """

    kind = "Free"

    def __init__(self, at: str, per_layer: bool = False, share: float = FREE_SHARE) -> None:
        super().__init__(at, per_layer)
        self.share = share

    def part(self, layer: Layer) -> tuple[Tensor | int, int]:
        """Return how many weights are free, and how many there are."""
        rule, size = layer.rule, layer.param.numel()
        if not rule.apply_decay:
            return size, size
        # rate / start = (epsilon / (epsilon + A))^(1/power), solved for A: no root, no 0 / 0.
        free = layer.accumulator <= rule.epsilon * (self.share**-rule.power - 1)
        return free.count_nonzero(), size


class MovementMetric(_Share):
    """How far the weights moved since the beginning of the experience, as the root mean square.

    It keeps a copy of the weights meanwhile. Weights that came meanwhile (a head that an
    evaluation made larger) do not count.
    """

    kind = "Movement"
    kept = "param"

    def part(self, layer: Layer) -> tuple[Tensor, int]:
        """Return the sum of the squares, and of how many weights."""
        now, before = _common(layer.param, self._before.get(layer.name))
        return (now - before).square().sum(dtype=torch.float64), now.numel()

    def combine(self, parts: Iterable[tuple[Tensor | int, Tensor | int]]) -> dict[str, float]:
        """Return the root mean square."""
        return {"": super().combine(parts)[""] ** 0.5}


class OverlapMetric(_Share):
    """Share of the weights updated in this experience that an earlier one had updated, too.

    0 in the first experience. It keeps one bool for each weight, and a copy of the accumulators
    during an experience.
    """

    kind = "Overlap"
    kept = "accumulator"

    def __init__(self, at: str, per_layer: bool = False) -> None:
        super().__init__(at, per_layer)
        self._used: dict[str, Tensor] = {}

    def part(self, layer: Layer) -> tuple[Tensor, Tensor]:
        """Return how many weights were used before, of how many updated now, and note these."""
        now = _grown(layer, self._before)
        used = _fitted(self._used.get(layer.name), now)
        self._used[layer.name] = used | now
        return (now & used).count_nonzero(), now.count_nonzero()

    def start_afresh(self) -> None:
        """Forget which weights were updated, too."""
        super().start_afresh()
        self._used = {}


def classp_metrics(
    *,
    minibatch: bool = False,
    epoch: bool = False,
    experience: bool = False,
    per_layer: bool = False,
    quantiles: Sequence[float] = QUANTILES,
    free_share: float = FREE_SHARE,
) -> list[CLASSPMetric]:
    """Make metrics that show CLASSP at work, for ``EvaluationPlugin(*classp_metrics(...), ...)``.

    Each is computed on the optimizer's device from its state, when it is emitted; without metrics
    nothing is computed or kept. All are of training.

    * ``CLASSP_Updated``: share of the weights updated, see :class:`UpdatedMetric`.
    * ``CLASSP_Accumulator``: mean and quantiles of A.
    * ``CLASSP_EffectiveRate``: mean and quantiles of lr / (epsilon + A)^(1/power).
    * ``CLASSP_Free``: share of the weights whose effective rate is at least ``free_share`` of its
      start.
    * ``CLASSP_Movement``: root mean square of how far the weights moved in the experience.
    * ``CLASSP_Overlap``: share of the weights updated in the experience that an earlier one used.

    Args:
        minibatch: emit Updated after each iteration. Copies the weights in each, and waits for the
            device.
        epoch: emit the first four after each epoch. Keeps a copy of the accumulators.
        experience: emit all after each experience. Keeps copies of the weights and, twice, of the
            accumulators during an experience, and a bool for each weight between them.
        per_layer: also emit them for each parameter, under its name.
        quantiles: of Accumulator and EffectiveRate, each from 0 to 1. They are taken of at most
            8192 weights of each layer, drawn once for each size, with replacement.
        free_share: above 0 and at most 1.

    Raises:
        TypeError, ValueError: a wrong type, a value out of its range, nothing to be emitted. At the
            start of training: a strategy that CLASSP does not train.
    """
    wanted = {"minibatch": minibatch, "epoch": epoch, "experience": experience}
    for name, value in {**wanted, "per_layer": per_layer}.items():
        require_flag(name, value)
    if not any(wanted.values()):
        raise ValueError("nothing to emit: give minibatch=True, epoch=True or experience=True")
    if isinstance(quantiles, str) or not isinstance(quantiles, Sequence):
        raise TypeError(f"quantiles must be a sequence of numbers, got {quantiles!r}")
    for q in quantiles:
        if not 0 <= require_number("quantiles", q) <= 1:
            raise ValueError(f"quantiles must be from 0 to 1, got {q!r}")
    if not 0 < require_number("free_share", free_share) <= 1:
        raise ValueError(f"free_share must be above 0 and at most 1, got {free_share!r}")
    metrics: list[CLASSPMetric] = []
    if minibatch:
        metrics.append(UpdatedMetric("minibatch", per_layer))
    for at in ("epoch", "experience"):
        if wanted[at]:
            metrics += [
                UpdatedMetric(at, per_layer),
                AccumulatorMetric(at, per_layer, quantiles),
                EffectiveRateMetric(at, per_layer, quantiles),
                FreeMetric(at, per_layer, free_share),
            ]
    if experience:
        metrics += [MovementMetric("experience", per_layer), OverlapMetric("experience", per_layer)]
    return metrics


def _grown(layer: Layer, before: dict[str, Tensor]) -> Tensor:
    """Return where the accumulator is larger than it was; new weights began at 0."""
    return layer.accumulator > _fitted(before.get(layer.name), layer.accumulator)


def _fitted(old: Tensor | None, like: Tensor) -> Tensor:
    """Return the old values in the shape of another tensor, zero where it has grown."""
    if old is not None and old.shape == like.shape:
        return old
    fitted = torch.zeros_like(like)
    into, values = _common(fitted, old)
    into.copy_(values)
    return fitted


def _common(new: Tensor, old: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the part that two tensors have in common: a growing head; nothing without an old."""
    if old is None or old.dim() != new.dim():
        return new.new_empty(0), new.new_empty(0)
    where = tuple(slice(min(m, n)) for m, n in zip(new.shape, old.shape, strict=True))
    return new[where], old[where]


def _total(parts: Iterable[Tensor | int]) -> float:
    """Add up numbers on a device and wait for it once."""
    tensors = [part.double() for part in parts if isinstance(part, Tensor)]
    numbers = float(sum(part for part in parts if not isinstance(part, Tensor)))
    return numbers + (torch.stack(tensors).sum().item() if tensors else 0.0)


@lru_cache(maxsize=256)
def _places(size: int) -> Tensor | None:
    """Return which weights of a layer of this size quantiles are taken of; None: all."""
    if size <= _SAMPLE:
        return None
    # A generator of its own: training draws the same random numbers as without metrics. Not at
    # regular distances, which could hit the same few columns of a matrix. On the CPU whatever
    # torch's default device is.
    generator = torch.Generator(device="cpu").manual_seed(size)
    return torch.randint(size, (_SAMPLE,), generator=generator, device="cpu").sort().values
