"""What defines a run: the same RunConfig gives the same numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import Any

from ..errors import UserError
from .losses import USUAL_LOSS

Hyper = Mapping[str, float | int | bool]
Epochs = int | tuple[int, ...]

WITHOUT_EFFECT = (("initial_accumulator_value", 0.0),)
"""Hyper-parameters and values with which a run is what it was before there were such."""


@dataclass(frozen=True)
class RunConfig:
    """One run. Everything that changes its numbers is here; paths are not.

    Attributes:
        benchmark: name of the benchmark.
        scenario: task, domain or class.
        method: name of the method.
        model: name of the model.
        experiences: number of experiences.
        seed: seeds model, data order and benchmark.
        epochs: training epochs per experience (over the joint data for ``joint``); of several
            numbers, experience i has the i-th, and the last one is for all that follow.
        batch_size: training mini-batch size.
        hyper: the method's own hyper-parameters, all of them.
        device: torch device.
        validation: evaluate on a part of the training data that is then not trained on, and
            leave the test data alone, after the last experience: for choosing settings.
        train_share: with ``validation``, the share of the other training data that is used.
        loss: name of the loss.
        first_only: with ``validation``, train on and evaluate the first experience alone.
        sources: where epochs, batch size and hyper-parameters come from, by name, as
            :class:`.tuned_settings.Source` writes it. It tells people and records, and is no part
            of what makes two configs equal.
    """

    benchmark: str
    scenario: str
    method: str
    model: str
    experiences: int
    seed: int
    epochs: Epochs
    batch_size: int
    hyper: Hyper = field(default_factory=dict)
    device: str = "cpu"
    validation: bool = False
    train_share: float = 1.0
    loss: str = USUAL_LOSS
    first_only: bool = False
    sources: Mapping[str, str] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.epochs, list):  # JSON has no tuples
            object.__setattr__(self, "epochs", tuple(self.epochs))
        epochs = self.epochs if isinstance(self.epochs, tuple) else (self.epochs,)
        if not epochs:
            raise UserError("epochs must be at least one whole number, got none")
        for name, least, value in (
            ("seed", 0, self.seed),
            ("experiences", 1, self.experiences),
            ("batch_size", 1, self.batch_size),
            *(("epochs", 1, value) for value in epochs),
        ):
            # NumPy takes seeds of 32 bits; more epochs or samples than that are a slip.
            most = 2**32 - 1
            if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
                raise UserError(
                    f"{name} must be a whole number from {least} to {most}, got {value!r}"
                )
        for name in ("benchmark", "scenario", "method", "model", "device", "loss"):
            if not isinstance(getattr(self, name), str):
                raise UserError(f"{name} must be a text, got {getattr(self, name)!r}")
        if not isinstance(self.validation, bool):
            raise UserError(f"validation must be true or false, got {self.validation!r}")
        if not isinstance(self.first_only, bool) or (self.first_only and not self.validation):
            raise UserError(
                f"first_only must be true or false, and false without validation, got "
                f"{self.first_only!r}"
            )
        if not isinstance(self.hyper, Mapping):
            raise UserError(f"hyper must be a table of hyper-parameters, got {self.hyper!r}")
        for name, number in (("train_share", self.train_share), *self.hyper.items()):
            if not isinstance(number, int | float) or not -math.inf < number < math.inf:
                raise UserError(f"{name} must be a finite number, got {number!r}")
        if not 0 < self.train_share <= 1 or (self.train_share < 1 and not self.validation):
            raise UserError(
                f"train_share must be in (0, 1], and 1 without validation, got {self.train_share!r}"
            )
        object.__setattr__(self, "hyper", MappingProxyType(dict(sorted(self.hyper.items()))))

    def as_dict(self) -> dict[str, Any]:
        """Return the config without its sources as JSON can hold it.

        Records name no loss where it is the usual one, nor ``first_only`` where it is false, nor
        what :data:`WITHOUT_EFFECT` names.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.compare}
        if self.loss == USUAL_LOSS:
            del values["loss"]
        if not self.first_only:
            del values["first_only"]
        epochs = list(self.epochs) if isinstance(self.epochs, tuple) else self.epochs
        hyper = {k: v for k, v in self.hyper.items() if (k, v) not in WITHOUT_EFFECT}
        return {**values, "epochs": epochs, "hyper": hyper}

    def epochs_in(self, experience: int) -> int:
        """Return the training epochs of the experience of this number, from 0 on."""
        if isinstance(self.epochs, int):
            return self.epochs
        return self.epochs[min(experience, len(self.epochs) - 1)]

    def __reduce__(self) -> Any:
        return (_from_dict, (self.as_dict() | {"sources": dict(self.sources)},))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """Make a config from :meth:`as_dict`'s value.

        Raises:
            UserError: unknown or missing keys, or values out of range.
        """
        known = {f.name for f in fields(cls) if f.compare}
        if unknown := set(values) - known:
            raise UserError(f"unknown config keys {sorted(unknown)}; known are {sorted(known)}")
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"incomplete config: {error}") from None

    def key(self) -> str:
        """Return a text that is equal for equal configs."""
        return json.dumps(self.as_dict(), sort_keys=True)


def _from_dict(values: dict[str, Any]) -> RunConfig:
    return RunConfig(**values)


# Values as people write them


def parse_value(text: str, like: float | int | bool, name: str) -> float | int | bool:
    """Turn the text into a value of the same type as ``like``.

    Raises:
        UserError: if it is none.
    """
    try:
        if isinstance(like, bool):
            return {"true": True, "false": False}[text.lower()]
        value = type(like)(text)
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError
        return value
    except (ValueError, KeyError):
        kind = {bool: "true or false", int: "a whole number", float: "a finite number"}
        raise UserError(f"{name} must be {kind[type(like)]}, got {text!r}") from None


def parse_whole(text: str, least: int = 1, most: int | None = None) -> int:
    """Turn the text into a whole number; ValueError where it is none from least to most."""
    if not text.isdecimal() or int(text) < least:
        raise ValueError(f"must be a whole number of at least {least}, got {text}")
    if most is not None and int(text) > most:
        raise ValueError(f"must be at most {most}, got {text}")
    return int(text)


def parse_epochs(text: str) -> Epochs:
    """Turn ``N`` or ``N,N,...`` into epochs; ValueError where it is neither."""
    numbers = tuple(map(parse_whole, text.split(",")))
    return numbers[0] if len(numbers) == 1 else numbers


def format_value(value: Any) -> str:
    """Return a value as the command line takes it."""
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
