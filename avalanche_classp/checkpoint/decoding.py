"""Put what a file holds into a strategy that the same script has built anew.

What is there keeps its identity: a parameter that a user or an optimizer holds stays the one that
is trained, and gets the values of the file. Code comes from the script alone, and nothing is
imported or called because a file names it.
"""

from __future__ import annotations

import collections
import copy
import enum
import functools
import random
import types
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from avalanche_classp.checkpoint.avalanche_internals import ParamData
from avalanche_classp.checkpoint.encoding import classes_of
from avalanche_classp.checkpoint.file import CheckpointError
from avalanche_classp.checkpoint.initial_state import InitialState
from avalanche_classp.checkpoint.values import (
    ATOMS,
    GENERATORS,
    MAPPINGS,
    SEQUENCES,
    VALUES,
    class_name,
    is_named,
    key_path,
)

__all__ = ["check", "check_classes", "decode", "decode_random_state"]

_BUILD_AS_THEN = "build the strategy as it was built then, or name another folder to start anew"


def decode(
    strategy: Any,
    content: Mapping[str, Any],
    initial: InitialState,
    keep: Collection[str] = (),
) -> None:
    """Give a strategy, built by the same script, everything that was encoded.

    The content's tensors become the strategy's. ``keep`` are paths of settings that stay the
    script's. CheckpointError where the strategy is built differently; it may be changed in part
    then.
    """
    decoder = _Decoder(strategy, initial, keep)
    decoder.value(content["strategy"], strategy, "strategy")
    for module in strategy.model.modules():
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()  # in one piece of memory again, for cuDNN


def check_classes(strategy: Any, content: Mapping[str, Any]) -> None:
    """Refuse, by a CheckpointError, a strategy of other parts than the one that was saved."""
    for what, classes in classes_of(strategy):
        then = content["classes"][what]
        if len(then) != len(classes) or not all(map(is_named, classes, then)):
            raise CheckpointError(
                f"the checkpoint does not fit the strategy: {what} {_listed(then)} then, "
                f"{_listed(map(class_name, classes))} now; {_BUILD_AS_THEN}"
            )


def check(strategy: Any, content: Mapping[str, Any], initial: InitialState) -> None:
    """Raise a CheckpointError where :func:`decode` would; change nothing."""
    _Decoder(strategy, initial, dry=True).value(content["strategy"], strategy, "strategy")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(name.rpartition(":")[2] for name in names) or "none"


class _Decoder:
    """Values of records. A twin is what the strategy built anew has in a value's place."""

    def __init__(
        self, strategy: Any, initial: Any, keep: Collection[str] = (), dry: bool = False
    ) -> None:
        self._strategy = strategy
        self._initial = initial
        self._keep = keep
        self._dry = dry
        self._made: dict[int, Any] = {}
        self._taken: dict[int, Any] = {}
        self._makers: dict[str, Callable[[Any, Any, str], Any]] = {
            **dict.fromkeys(SEQUENCES, self._sequence),
            "list": self._list,
            "deque": self._deque,
            "mapping": self._mapping,
            "namedtuple": self._namedtuple,
            "value": self._value,
            "enum": self._enum,
            "torch": self._torch,
            "numpy dtype": lambda record, twin, where: np.dtype(record["name"]),
            "array": lambda record, twin, where: record["data"].numpy(),
            "number": lambda record, twin, where: record["data"].numpy()[()],
            "device": self._device,
            "weakref": self._weakref,
            "script": self._script,
            "not saved": lambda record, twin, where: twin,
            "method": self._method,
            "partial": self._partial,
            "object": self._object,
            "optimizer": self._optimizer,
            "state_dict": self._state_dict,
            "generator": self._generator,
        }

    def value(self, record: Any, twin: Any, where: str) -> Any:
        """Return the value of a record, in place of its twin if that is of the same kind."""
        if where in self._keep or f"len({where})" in self._keep:
            return self._initial.settings[where][0] if twin is None else twin
        if type(record) in ATOMS:
            return record
        if id(record) not in self._made:
            if isinstance(record, Tensor):
                if isinstance(record, nn.Parameter):
                    twin = self._untaken(twin)
                made = record if self._dry else _tensor(record, twin, self._strategy.device)
            else:
                # Lists, mappings and objects note what they make before they fill it: they may
                # hold themselves.
                made = self._makers[record["kind"]](record, twin, where)
            self._made[id(record)] = made
        return self._made[id(record)]

    def _script_object(self, record: Any, twin: Any) -> Any:
        """Return the object of the script whose place the record takes."""
        found = self._initial.at(record.get("path"))
        return twin if found is None else found

    def _untaken(self, twin: Any) -> Any:
        """Return a twin, but only once: what was one thing at first may be two."""
        if id(twin) in self._taken:
            return None
        self._taken[id(twin)] = twin
        return twin

    # --- containers -------------------------------------------------------------------------------

    def _list(self, record: Any, twin: Any, where: str) -> Any:
        own = self._untaken(twin)
        made = self._made[id(record)] = own if type(own) is list and not self._dry else []
        made[:] = self._items(record["items"], twin, where)
        return made

    def _sequence(self, record: Any, twin: Any, where: str) -> Any:
        return SEQUENCES[record["kind"]](self._items(record["items"], twin, where))

    def _deque(self, record: Any, twin: Any, where: str) -> Any:
        items = self._items(record["items"], twin, where)
        return collections.deque(items, record["maxlen"])

    def _namedtuple(self, record: Any, twin: Any, where: str) -> Any:
        of = self._class_of_values(record, tuple, where)
        return tuple.__new__(of, self._items(record["items"], twin, where))

    def _items(self, records: list[Any], twins: Any, where: str) -> list[Any]:
        padded = [*(twins if isinstance(twins, list | tuple | collections.deque) else ())]
        padded += [None] * len(records)
        return [self.value(r, padded[i], f"{where}[{i}]") for i, r in enumerate(records)]

    def _mapping(self, record: Any, twin: Any, where: str) -> Any:
        of: Any = MAPPINGS[record["of"]]
        twins = twin if type(twin) is of else {}
        own = self._untaken(twin)
        made: Any = own if type(own) is of and not self._dry else of()
        self._made[id(record)] = made
        factory = None
        if of is collections.defaultdict:
            of_twin = getattr(twin, "default_factory", None)
            factory = made.default_factory = self.value(
                record["factory"], of_twin, f"{where}.default_factory"
            )
        new = {}
        for i, (key, value) in enumerate(zip(record["keys"], record["values"], strict=True)):
            key = self.value(key, None, f"{where}.keys()[{i}]")
            place = twins.get(key)
            if place is None and factory is not None and type(value) not in ATOMS:
                place = factory()
            new[key] = self.value(value, place, key_path(where, key, i))
        made.clear()
        made.update(new)
        return made

    # --- values -----------------------------------------------------------------------------------

    def _value(self, record: Any, twin: Any, where: str) -> Any:
        of, make, arguments_of = VALUES[record["of"]]
        twins = arguments_of(twin) if type(twin) is of else [None] * len(record["arguments"])
        pairs = zip(record["arguments"], twins, strict=True)
        return make(*[self.value(argument, own, where) for argument, own in pairs])

    def _enum(self, record: Any, twin: Any, where: str) -> Any:
        of: Any = self._class_of_values(record, enum.Enum, where)
        if "flags" in record:
            return of(record["flags"])
        if record["member"] not in of.__members__:
            raise self._misfit(where, f"{of.__name__}.{record['member']}", twin)
        return of.__members__[record["member"]]

    def _class_of_values(self, record: Any, base: type, where: str) -> type:
        of = self._initial.find_class(record["class"])
        if of is None or not issubclass(of, base):
            raise self._misfit(where, record["class"])
        return of

    def _torch(self, record: Any, twin: Any, where: str) -> Any:
        found = vars(torch).get(record["name"])
        if not isinstance(found, torch.dtype | torch.layout | torch.memory_format):
            raise self._misfit(where, record["name"])
        return found

    def _device(self, record: Any, twin: Any, where: str) -> Any:
        found = self._initial.at(record["path"])
        if isinstance(found, torch.device):
            return found
        then, own = torch.device(record["name"]), self._strategy.device
        return then if then.type in ("cpu", "meta", own.type) else own

    def _weakref(self, record: Any, twin: Any, where: str) -> Any:
        of_twin = twin() if isinstance(twin, weakref.ref) else None
        target = self.value(record["target"], of_twin, f"{where}()")
        return weakref.ref(set() if target is None else target)

    # --- code -------------------------------------------------------------------------------------

    def _script(self, record: Any, twin: Any, where: str) -> Any:
        found = self._script_object(record, twin)
        if found is None:
            raise self._misfit(where, record["class"])
        return found

    def _method(self, record: Any, twin: Any, where: str) -> Any:
        owner = self.value(record["self"], getattr(twin, "__self__", None), f"{where}.__self__")
        classes = [vars(of) for of in type(owner).__mro__ if record["name"] in vars(of)]
        function = classes[0][record["name"]] if classes else None
        if not isinstance(function, types.FunctionType):
            raise self._misfit(where, record["name"], twin)
        return types.MethodType(function, owner)

    def _partial(self, record: Any, twin: Any, where: str) -> Any:
        twins: tuple[Any, ...] = ()
        if isinstance(twin, functools.partial):
            twins = twin.func, twin.args, twin.keywords
        function, arguments, keywords = self._items(record["parts"], twins, where)
        return functools.partial(function, *arguments, **keywords)

    # --- objects ----------------------------------------------------------------------------------

    def _object(self, record: Any, twin: Any, where: str) -> Any:
        if record.get("path") is None and self._initial.path_of(twin) is not None:
            twin = None  # the script's object is another one's
        twin = self._script_object(record, twin)
        if type(twin) in ATOMS or not is_named(type(twin), record["class"]):
            if type(twin) not in ATOMS and record.get("path") is not None:
                raise self._misfit(where, record["class"], twin)
            twin = self._rebuilt(record["class"], where, twin)
        self._made[id(record)] = twin
        attributes = dict(vars(twin)) if self._dry else vars(twin)
        for name in record.get("deleted", ()):
            attributes.pop(name, None)
        for name, value in record["attributes"].items():
            attributes[name] = self.value(value, attributes.get(name), f"{where}.{name}")
        return twin

    def _rebuilt(self, name: str, where: str, twin: Any) -> Any:
        """Make an object that only the saved strategy had; no constructor of a user runs."""
        if is_named(ParamData, name):
            return ParamData("", (0,))
        for module in self._strategy.model.modules():
            if is_named(type(module), name):
                return copy.deepcopy(module)
        of = self._initial.find_class(name)
        if of is None or not self._initial.can_rebuild(of):
            raise self._misfit(where, name, twin)
        made: Any = object.__new__(of)
        if isinstance(made, nn.Module):
            nn.Module.__init__(made)
        return made

    def _optimizer(self, record: Any, twin: Any, where: str) -> Any:
        twin = self._fitting(record, twin, where)
        # A growing head's parameters are other ones than before, and Avalanche adds new ones.
        groups = [self._items(group, None, where) for group in record["groups"]]
        state = self._state(record, twin, where)
        if not self._dry:
            twin.state.clear()
            twin.param_groups[:] = [{**twin.param_groups[0], "params": params} for params in groups]
        return self._load(twin, state, where)

    def _state_dict(self, record: Any, twin: Any, where: str) -> Any:
        twin = self._fitting(record, twin, where)
        return self._load(twin, self._state(record, twin, where), where)

    def _fitting(self, record: Any, twin: Any, where: str) -> Any:
        twin = self._script_object(record, twin)
        if twin is None or not is_named(type(twin), record["class"]):
            raise self._misfit(where, record["class"], twin)
        return twin

    def _state(self, record: Any, twin: Any, where: str) -> Any:
        own = copy.copy(twin.state_dict()) if self._keep else None
        return self.value(record["state"], own, f"{where}.state_dict()")

    def _load(self, twin: Any, state: Any, where: str) -> Any:
        try:
            if not self._dry:
                twin.load_state_dict(state)
        except (TypeError, ValueError, KeyError, RuntimeError) as error:
            raise CheckpointError(
                f"{where} does not take the state of the checkpoint: {error}"
            ) from error
        return twin

    def _generator(self, record: Any, twin: Any, where: str) -> Any:
        twin = self._fitting(record, twin, where)
        state = self.value(record["state"], None, where)
        if self._dry:
            return twin
        for generator, _, set_state in GENERATORS:
            if isinstance(twin, generator):
                set_state(twin, state)
        return twin

    def _misfit(self, where: str, name: str, twin: Any = None) -> CheckpointError:
        now = "nothing" if twin is None else type(twin).__name__
        return CheckpointError(
            f"the checkpoint does not fit the strategy: {where} was {name.rpartition(':')[2]}, and "
            f"is {now} in the strategy built anew; {_BUILD_AS_THEN}"
        )


def _tensor(loaded: Tensor, twin: Any, device: torch.device) -> Tensor:
    # Moved only where it must be, for tensors that share memory go on sharing it then.
    if not isinstance(loaded, nn.Parameter):
        return loaded.to(twin.device) if isinstance(twin, Tensor) else loaded
    is_twin = isinstance(twin, nn.Parameter)
    data = loaded.data.to(twin.device if is_twin else device)
    if not is_twin or (twin.shape, twin.dtype) != (data.shape, data.dtype):
        return nn.Parameter(data, requires_grad=loaded.requires_grad)
    twin.data = data
    twin.grad = None
    return twin.requires_grad_(loaded.requires_grad)


def decode_random_state(content: Mapping[str, Any]) -> None:
    """Set the global generators; of CUDA's those of the devices that there are."""
    random.setstate(_Decoder(None, None).value(content["python"], None, "random"))
    name, words, *rest = content["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(content["torch"].cpu())
    if torch.cuda.is_available():
        for i, state in enumerate(content["cuda"][: torch.cuda.device_count()]):
            torch.cuda.set_rng_state(state.cpu(), i)
