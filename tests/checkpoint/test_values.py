"""Values of every kind that a plugin, a scheduler or a model may hold: they come back, or are
refused before anything is trained."""

import argparse
import collections
import copy
import enum
import functools
import math
import os
import random
import sys
import weakref
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import MappingProxyType, ModuleType
from typing import NamedTuple
from uuid import UUID

import numpy as np
import pytest
import torch
from avalanche.training import LwF
from avalanche.training.plugins import LRSchedulerPlugin
from checkpoint_runs import StoppedError, Stopper, same
from conftest import (
    BATCH,
    FEATURES,
    SGD,
    On,
    build,
    linear_head,
    make_benchmark,
    naive,
    seed_everything,
)
from torch import nn
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    LambdaLR,
    LinearLR,
    LRScheduler,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from avalanche_classp import CLASSP, CheckpointError, CLASSPOptimizer, checkpointed

parametrize = pytest.mark.parametrize


class Phase(enum.Enum):
    WARM = 1
    MAIN = 2


class Number(enum.IntEnum):
    ONE = 1
    TWO = 2


class Word(str, enum.Enum):  # noqa: UP042 -- not the same as a StrEnum
    A = "a"
    B = "b"


class Rights(enum.Flag):
    R = enum.auto()
    W = enum.auto()


class IntRights(enum.IntFlag):
    R = 1
    W = 2


class Outer:
    class Inner(enum.StrEnum):
        X = "x"
        Y = "y"


Pair = collections.namedtuple("Pair", "a b")


class Typed(NamedTuple):
    phase: Phase
    path: Path


@dataclass
class Settings:
    phase: Phase = Phase.WARM
    folders: list = field(default_factory=list)


def square(x):
    return x * x


def cube(x):
    return x**3


def shown(value):
    """Return a repr that does not depend on the order of a set."""
    return str(sorted(map(repr, value))) if isinstance(value, set | frozenset) else repr(value)


class Holder(On):
    """A plugin that holds a value, and another one after the first experience."""

    def __init__(self, first, later):
        self.held, self.later, self.seen = first, later, []

    def after_training_exp(self, strategy, **kwargs):
        self.held = self.later

    def before_training_epoch(self, strategy, **kwargs):
        self.seen.append(shown(self.held))


LATER = {
    "enum": (Phase.WARM, Phase.MAIN),
    "int enum": (Number.ONE, Number.TWO),
    "str enum": (Word.A, Word.B),
    "nested StrEnum": (Outer.Inner.X, Outer.Inner.Y),
    "flag": (Rights.R, Rights.R | Rights.W),
    "no flag": (Rights.R, Rights(0)),
    "int flag": (IntRights.R, IntRights(3)),
    "enum for None": (None, Phase.MAIN),
    "path": (Path("a"), Path("b") / "c"),
    "pure paths": (None, [PurePosixPath("/x"), PureWindowsPath("c:\\y")]),
    "device": (torch.device("cpu"), torch.device("meta")),
    "device for None": (None, torch.device("cpu")),
    "dtype": (torch.float32, torch.bfloat16),
    "layouts": (None, [torch.strided, torch.channels_last, torch.float64]),
    "numpy dtype": (np.dtype("f4"), np.dtype("i8")),
    "keys": ({Phase.WARM: 0.1}, {Phase.MAIN: 0.2, Word.A: 1, Number.TWO: 2, Rights.W: 3}),
    "path keys": ({Path("a"): 1}, {Path("b"): {Path("c"): Phase.MAIN}}),
    "dtype and device keys": ({}, {torch.float16: 1, torch.device("cpu"): 2}),
    "set": ({Phase.WARM}, {Phase.MAIN, Phase.WARM}),
    "frozenset": (frozenset(), frozenset([Path("x"), Word.B])),
    "deque": (collections.deque([Phase.WARM], 3), collections.deque([Phase.MAIN, Path("p")], 3)),
    "defaultdict": (
        collections.defaultdict(list),
        collections.defaultdict(list, {Phase.MAIN: [Phase.WARM]}),
    ),
    "counter": (collections.Counter(), collections.Counter([Phase.MAIN, Phase.MAIN, Word.A])),
    "named tuple": (Pair(1, 2), Pair([Phase.MAIN], Pair(Path("x"), None))),
    "typed named tuple": (None, Typed(Phase.MAIN, Path("q"))),
    "named tuples as keys": ({Pair(1, 2): 3}, {Pair(3, 4): 5, Pair(Phase.MAIN, 0): 6}),
    "range and slice": (None, [range(1, 9, 2), slice(None, 3), slice(1, 2, 3)]),
    "bytearray": (bytearray(b"a"), bytearray(b"bc")),
    "nested": ([], [({"x": (Phase.MAIN, [{Path("y"): {Number.ONE}}])},)]),
    "times": (None, [datetime(2026, 1, 2, 3, tzinfo=UTC), date(2026, 1, 2), timedelta(3)]),
    "exact numbers": (None, [Decimal("0.10"), Fraction(1, 3), UUID(int=7)]),
    "namespace": (argparse.Namespace(a=1), argparse.Namespace(a=Phase.MAIN)),
    "builtin classes": (int, float),
    "built-in classes in containers": ({}, {int: [str, dict], "x": {float, bool}}),
    "tuple of nothing": ((), ((), [], {}, set(), frozenset())),
    "special floats": (0.0, [math.inf, -math.inf, -0.0, math.nan]),
    "big ints": (0, [2**70, -(2**200), True]),
    "strings": ("", ["é", "\0", "\ud800", b"\xff"]),
    "numpy numbers": (None, [np.float32(0.1), np.int8(3), np.bool_(True)]),
}
"""What a plugin holds at first, and later."""


def train(plugin, folder, stop=None, epochs=1, make=None, every=None):
    """Train three experiences, or until a number of iterations; 3 of them are an epoch."""
    seed_everything(0)
    plugins = [] if plugin is None else [plugin]
    strategy = make(*plugins) if make else naive(linear_head(), *plugins, train_epochs=epochs)
    stopper = Stopper()
    strategy.plugins.append(stopper)
    stopper.left = math.inf if stop is None else stop
    for experience in checkpointed(BENCHMARK.train_stream, strategy, folder, every_epochs=every):
        strategy.train(experience)
    return strategy


BENCHMARK = make_benchmark()


@parametrize("kind", LATER)
def test_a_changed_value_comes_back(tmp_path, kind):
    first, later = LATER[kind]
    whole, stopped, resumed = (Holder(*copy.deepcopy(LATER[kind])) for _ in range(3))
    train(whole, tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(stopped, tmp_path / "stopped", stop=4)
    train(resumed, tmp_path / "stopped")
    assert resumed.seen == whole.seen == [shown(first), shown(later), shown(later)]
    assert type(resumed.held) is type(later)


@parametrize("kind", LATER)
def test_a_value_that_is_there_at_the_beginning_comes_back(tmp_path, kind):
    later = LATER[kind][1]
    with pytest.raises(StoppedError):
        train(Holder(*copy.deepcopy((later, later))), tmp_path, stop=4)
    resumed = Holder(*copy.deepcopy((later, later)))
    train(resumed, tmp_path)
    assert resumed.seen == 3 * [shown(later)]


def test_the_weights_of_a_run_whose_phase_changed(tmp_path):
    class Slower(Holder):
        def __init__(self):
            super().__init__(Phase.WARM, Phase.MAIN)
            self.lrs = {Phase.WARM: 0.1, Phase.MAIN: 0.01}

        def before_training_exp(self, strategy, **kwargs):
            strategy.optimizer.param_groups[0]["lr"] = self.lrs[self.held]

    whole = train(Slower(), tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(Slower(), tmp_path / "stopped", stop=4)
    resumed = train(Slower(), tmp_path / "stopped")
    assert same(resumed.model.state_dict(), whole.model.state_dict())


# --- code -----------------------------------------------------------------------------------------


def code_of_the_script():
    return {
        "function": square,
        "list": [square, cube],
        "set": {square, cube, int},
        "frozenset": frozenset([square, len]),
        "keys": {square: Phase.WARM, Phase.MAIN: cube, nn.Linear: "x"},
        "deque": collections.deque([square, nn.Linear, torch.relu], maxlen=4),
        "defaultdict": collections.defaultdict(int, {1: cube}),
        "factory": collections.defaultdict(lambda: collections.defaultdict(list)),
        "tuple": Pair(square, nn.functional.relu),
        "partial": functools.partial(square, Phase.MAIN),
        "partial of a class": functools.partial(nn.Linear, 3, bias=False),
        "builtin": [len, max, math.sin, str.lower, torch.Tensor.add, np.add],
        "lambda": [lambda x: x, lambda x: x + 1],
        "class": [nn.Linear, Phase, Path, Settings],
        "module": [math, os],
        "generic": list[int],
        "read-only mapping": MappingProxyType({Phase.MAIN: [square, Path("x")]}),
    }


@parametrize("kind", code_of_the_script())
def test_code_comes_from_the_script(tmp_path, kind):
    value, twin = code_of_the_script()[kind], code_of_the_script()[kind]
    with pytest.raises(StoppedError):
        train(Holder(value, value), tmp_path, stop=4)
    resumed = Holder(twin, twin)
    before = repr(resumed.held)
    train(resumed, tmp_path)
    if "set" in kind:
        assert resumed.held == twin
    else:
        assert repr(resumed.held) == before


def test_code_that_the_script_holds_elsewhere_can_take_the_place_of_other_code(tmp_path):
    class Switching(Holder):
        def __init__(self):
            super().__init__(square, cube)
            self.method = self.first

        def first(self):
            return 1

        def second(self):
            return 2

        def after_training_exp(self, strategy, **kwargs):
            super().after_training_exp(strategy)
            self.method = self.second

    with pytest.raises(StoppedError):
        train(Switching(), tmp_path, stop=4)
    resumed = Switching()
    train(resumed, tmp_path)
    assert resumed.seen == [shown(square), shown(cube), shown(cube)]
    assert resumed.method() == 2 and resumed.method.__self__ is resumed


def test_an_object_that_only_a_method_holds(tmp_path):
    class Counter:
        def __init__(self):
            self.n = 0

        def count(self):
            self.n += 1

    class Counting(Holder):
        def __init__(self):
            super().__init__(0, 0)
            self.count = Counter().count

        def after_training_epoch(self, strategy, **kwargs):
            self.count()

    with pytest.raises(StoppedError):
        train(Counting(), tmp_path, stop=4)
    resumed = Counting()
    train(resumed, tmp_path)
    assert resumed.count.__self__.n == 3


def test_two_objects_that_have_changed_places(tmp_path):
    class Swapping(Holder):
        def __init__(self):
            super().__init__(0, 0)
            self.a, self.b = Settings(), Settings()
            self.a.folders.append("a")

        def after_training_exp(self, strategy, **kwargs):
            self.a, self.b = self.b, self.a
            self.a.phase = Phase.MAIN

    whole = Swapping()
    train(whole, tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(Swapping(), tmp_path / "stopped", stop=7)
    resumed = Swapping()
    a, b = resumed.a, resumed.b
    train(resumed, tmp_path / "stopped")
    assert (resumed.a, resumed.b) == (whole.a, whole.b)
    assert resumed.a is b and resumed.b is a


def test_a_module_that_another_took_the_place_of(tmp_path):
    class Keeping(Holder):
        def __init__(self):
            super().__init__(0, 0)
            self.current, self.old = nn.Linear(1, 1), None

        def after_training_exp(self, strategy, **kwargs):
            self.old, self.current = self.current, nn.Linear(1, 1)

    whole = Keeping()
    train(whole, tmp_path / "whole")
    for stop in (4, 4):
        with pytest.raises(StoppedError):
            train(Keeping(), tmp_path / "stopped", stop=stop)
    resumed = Keeping()
    train(resumed, tmp_path / "stopped")
    assert resumed.old is not resumed.current
    for name in ("old", "current"):
        assert same(getattr(resumed, name).state_dict(), getattr(whole, name).state_dict())


def test_what_was_one_at_first_can_be_two(tmp_path):
    class Parting(Holder):
        def __init__(self):
            super().__init__(0, 0)
            self.a = self.b = [0]
            self.c = self.d = {0: 0}
            self.layer, self.tied = nn.Linear(1, 1), nn.Linear(1, 1)
            self.tied.weight = self.layer.weight

        def after_training_exp(self, strategy, **kwargs):
            self.b, self.d = [1], {1: 1}
            self.tied.weight = nn.Parameter(self.layer.weight.detach() + 1)

    with pytest.raises(StoppedError):
        train(Parting(), tmp_path, stop=4)
    resumed = Parting()
    train(resumed, tmp_path, stop=6)
    assert (resumed.a, resumed.b, resumed.c, resumed.d) == ([0], [1], {0: 0}, {1: 1})
    assert torch.equal(resumed.tied.weight, resumed.layer.weight + 1)


def test_a_method_whose_name_is_mangled(tmp_path):
    class Private(Holder):
        def __init__(self):
            super().__init__(0, 0)
            self.step = self.__one

        def __one(self):
            return 1

        def __two(self):
            return 2

        def after_training_exp(self, strategy, **kwargs):
            self.step = self.__two

    with pytest.raises(StoppedError):
        train(Private(), tmp_path, stop=4)
    resumed = Private()
    train(resumed, tmp_path)
    assert resumed.step() == 2


def test_an_object_made_anew_by_the_plugin(tmp_path):
    class Renewing(Holder):
        def __init__(self):
            super().__init__(0, 0)
            self.meter = Settings()

        def before_training_exp(self, strategy, **kwargs):
            self.meter = Settings(folders=[Path("x")])

    with pytest.raises(StoppedError):
        train(Renewing(), tmp_path, stop=4)
    resumed = Renewing()
    train(resumed, tmp_path)
    assert resumed.meter.folders == [Path("x")]


def test_an_attribute_that_was_deleted_stays_deleted(tmp_path):
    class Deleting(Holder):
        def after_training_exp(self, strategy, **kwargs):
            if hasattr(self, "held"):
                del self.held

        def before_training_epoch(self, strategy, **kwargs):
            self.seen.append(hasattr(self, "held"))

    with pytest.raises(StoppedError):
        train(Deleting(1, 1), tmp_path, stop=4)
    resumed = Deleting(1, 1)
    train(resumed, tmp_path)
    assert resumed.seen == [True, False, False]


def new_closure(n):
    return lambda: n


def local_enum():
    class Local(enum.Enum):
        A = 1

    return Local


REFUSED_LATER = {
    "a function": (square, lambda: cube),
    "a closure with another value": (new_closure(1), lambda: new_closure(2)),
    "a class": (nn.Linear, lambda: Settings),
    "a function in a list": ([], lambda: [cube]),
    "a function as a key": ({}, lambda: {cube: 1}),
    "a partial of a function": (None, lambda: functools.partial(cube, 1)),
    "a member of a local enum": (None, lambda: local_enum().A),
    "an object": (None, Settings),
    "an object of another class": (Settings(), Stopper().__class__.__mro__[1]),
}


@parametrize("kind", REFUSED_LATER)
def test_what_the_script_could_not_find_again_is_not_saved(tmp_path, kind):
    first, later = REFUSED_LATER[kind]
    plugin = Holder(first, later())
    if kind == "an object of another class":
        plugin.later = On()
    with pytest.raises(CheckpointError, match=r"strategy\.plugins\[0\]\.(held|later)"):
        plugin.later, value = None, plugin.later  # the script does not hold it at first
        plugin.after_training_exp = lambda strategy, **kwargs: setattr(plugin, "held", value)
        train(plugin, tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_enum_of_a_module_that_is_imported_later_is_not_saved(tmp_path, monkeypatch):
    class Importing(Holder):
        def after_training_exp(self, strategy, **kwargs):
            module = ModuleType("imported_later")
            module.Later = enum.Enum("Later", "A", module="imported_later")
            monkeypatch.setitem(sys.modules, "imported_later", module)
            self.held = module.Later.A

    with pytest.raises(CheckpointError, match="class imported_later:Later, which the script could"):
        train(Importing(0, 0), tmp_path)
    assert not list(tmp_path.iterdir())


def two_of_one_name():
    return {local_enum(), local_enum()}


class Slots:
    __slots__ = ("x",)


class Own(tuple):
    pass


class TensorOfMine(torch.Tensor):
    pass


REFUSED_AT_ONCE = {
    "two classes of one name in a set": two_of_one_name(),
    "members of two enums of one name": [local_enum().A, local_enum().A],
    "slots": Slots(),
    "a subclass of tuple": Own([1]),
    "a tensor's subclass": torch.ones(2).as_subclass(TensorOfMine),
    "a weak dictionary": weakref.WeakKeyDictionary(),
    "an open file": sys.__stderr__,
    "a generator": (i for i in ()),
    "an array of objects": np.array([Phase.WARM], dtype=object),
}


@parametrize("kind", REFUSED_AT_ONCE)
@parametrize("place", ["value", "list", "key of a dict"])
def test_what_cannot_be_read_again_is_refused_by_the_first_call(tmp_path, kind, place):
    value = REFUSED_AT_ONCE[kind]
    if place == "key of a dict":
        value = {"x": {1: value}}
    elif place == "list":
        value = [[value]]
    with pytest.raises(CheckpointError, match=r"strategy\.plugins\[0\]\.held") as caught:
        checkpointed(BENCHMARK.train_stream, naive(linear_head(), Holder(value, value)), tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tensor_with_an_attribute_that_torch_cannot_load_is_refused_by_the_first_call(tmp_path):
    value = torch.ones(2)
    value.note = Settings()
    with pytest.raises(CheckpointError):
        checkpointed(BENCHMARK.train_stream, naive(linear_head(), Holder(value, 0)), tmp_path)


# --- schedulers -----------------------------------------------------------------------------------


class WarmUp(LRScheduler):
    """As the well-known package has it: a scheduler that holds the one after it, and more."""

    def __init__(self, optimizer, after, function=square):
        self.after, self.function, self.mode = after, function, Phase.WARM
        super().__init__(optimizer)

    def get_lr(self):
        if self.last_epoch < 2:
            return [self.function(self.last_epoch + 1) * 0.01]
        return self.after.get_last_lr()

    def step(self, epoch=None):
        if getattr(self, "last_epoch", -1) >= 2:
            self.mode = Phase.MAIN
            self.after.step()
        super().step()


SCHEDULERS = {
    "step": lambda o: StepLR(o, 1, 0.5),
    "warm up": lambda o: WarmUp(o, StepLR(o, 1, 0.5)),
    "warm up, warm up": lambda o: WarmUp(o, WarmUp(o, CosineAnnealingLR(o, 5), cube)),
    "lambda": lambda o: LambdaLR(o, lambda epoch: 0.7**epoch),
    "sequential": lambda o: SequentialLR(o, [LinearLR(o, 0.1), StepLR(o, 1, 0.5)], [2]),
    "one cycle": lambda o: OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
    "plateau": lambda o: ReduceLROnPlateau(o, "min", patience=0),
}


def scheduled(scheduler, classp):
    def make(*plugins):
        model = linear_head()
        optimizer = (CLASSPOptimizer if classp else SGD)(model.parameters(), lr=0.05)
        made = SCHEDULERS[scheduler](optimizer)
        plateau = isinstance(made, ReduceLROnPlateau)
        plugin = LRSchedulerPlugin(
            made,
            metric="train_loss" if plateau else None,
            reset_scheduler=not plateau and type(made) in (StepLR,),
        )
        arguments = {"train_mb_size": BATCH, "train_epochs": 2}
        if classp:
            return CLASSP(model=model, optimizer=optimizer, plugins=[plugin], **arguments)
        arguments["evaluator"] = lossy()
        return naive(model, plugin, optimizer=optimizer, **arguments)

    return make


def lossy():
    from avalanche.evaluation.metrics import loss_metrics
    from avalanche.training.plugins import EvaluationPlugin

    return EvaluationPlugin(loss_metrics(epoch=True), loggers=[])


@parametrize(
    ("scheduler", "classp"),
    [*((name, False) for name in SCHEDULERS), *((n, True) for n in SCHEDULERS if n != "plateau")],
)
def test_schedulers_go_on(tmp_path, scheduler, classp):
    make = scheduled(scheduler, classp)
    whole = train(None, tmp_path / "whole", make=make)
    for stop in (4, 5):
        with pytest.raises(StoppedError):
            train(None, tmp_path / "stopped", stop=stop, make=make, every=1)
    resumed = train(None, tmp_path / "stopped", make=make, every=1)
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    lrs = [group["lr"] for group in resumed.optimizer.param_groups]
    assert lrs == [group["lr"] for group in whole.optimizer.param_groups]


# --- recurrent networks ---------------------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self, of, **kwargs):
        super().__init__()
        self.recurrent = of(2, 4, batch_first=True, **kwargs)
        self.head = nn.LazyLinear(6)
        self(torch.zeros(1, FEATURES))

    def forward(self, x):
        out, _ = self.recurrent(x.view(len(x), -1, 2))
        return self.head(out.flatten(1))


NETWORKS = {
    **{of.__name__: lambda of=of: Recurrent(of) for of in (nn.LSTM, nn.GRU, nn.RNN)},
    "two ways": lambda: Recurrent(nn.LSTM, num_layers=2, bidirectional=True, dropout=0.2),
    "projected": lambda: Recurrent(nn.LSTM, proj_size=3),
    "without bias": lambda: Recurrent(nn.GRU, bias=False),
    "distilled": lambda: Recurrent(nn.GRU),
    "cell": lambda: nn.Sequential(nn.LSTMCell(FEATURES, 6), First()),
    "weight norm": lambda: nn.Sequential(
        nn.utils.parametrizations.weight_norm(nn.Linear(FEATURES, 6)), nn.ReLU()
    ),
    "spectral norm": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Linear(FEATURES, 6)), nn.ReLU()
    ),
    "attention": lambda: nn.Sequential(
        nn.Unflatten(1, (3, 2)),
        nn.TransformerEncoderLayer(2, 1, 4, batch_first=True),
        nn.Flatten(),
        nn.Linear(FEATURES, 6),
    ),
}


class First(nn.Module):
    def forward(self, pair):
        return pair[0]


def with_network(network, classp):
    def make(*plugins):
        model = NETWORKS[network]()
        if classp:
            return CLASSP(model=model, lr=0.05, train_mb_size=BATCH, train_epochs=2)
        if network == "distilled":
            return build(LwF, model, train_epochs=2, alpha=1.0, temperature=2.0)
        return naive(model, train_epochs=2)

    return make


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@parametrize("network", NETWORKS)
@parametrize("classp", [False, True])
def test_networks_go_on(tmp_path, network, classp):
    make = with_network(network, classp)
    whole = train(None, tmp_path / "whole", make=make)
    for stop in (4, 5):
        with pytest.raises(StoppedError):
            train(None, tmp_path / "stopped", stop=stop, make=make, every=1)
    resumed = train(None, tmp_path / "stopped", make=make, every=1)
    assert same(resumed.model.state_dict(), whole.model.state_dict())
    recurrent = getattr(resumed.model, "recurrent", None)
    if recurrent is not None:
        assert all(
            ref() is p
            for ref, p in zip(recurrent._flat_weight_refs, recurrent.parameters(), strict=True)
        )


def test_weak_references_lead_to_what_is_there_again(tmp_path):
    class Referring(Holder):
        def __init__(self):
            super().__init__(0, 0)
            self.object = Settings()
            self.ref = weakref.ref(self.object)
            self.dead = weakref.ref(Settings())

    with pytest.raises(StoppedError):
        train(Referring(), tmp_path, stop=4)
    resumed = Referring()
    train(resumed, tmp_path)
    assert resumed.ref() is resumed.object and resumed.dead() is None


def test_numpys_older_generator_goes_on(tmp_path):
    class Drawing(Holder):
        def __init__(self):
            super().__init__(0, 0)
            self.old, self.python = np.random.RandomState(1), random.Random(1)

        def before_training_epoch(self, strategy, **kwargs):
            self.seen.append([self.old.randn(), self.python.gauss(0, 1)])  # every second is kept

    whole = Drawing()
    train(whole, tmp_path / "whole")
    with pytest.raises(StoppedError):
        train(Drawing(), tmp_path / "stopped", stop=4)
    resumed = Drawing()
    train(resumed, tmp_path / "stopped")
    assert resumed.seen == whole.seen
